"""PPO from TorchRL's own pieces, unmodified: `Collector`, `GAE`, `ClipPPOLoss`, as in its tutorial."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import InteractionType, TensorDictModule
from tensordict.nn.distributions import NormalParamExtractor
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.envs import EnvBase
from torchrl.modules import MLP, IndependentNormal, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from agents.generic import check_rewards
from denoise_env.progress import progress


@dataclass
class TorchRLPPOConfig:
    """The tutorial's settings, for short episodes whose reward comes at the end."""

    lr: float = 3e-4
    """Adam's learning rate."""
    epochs: int = 10
    """Passes over every rollout."""
    minibatch: int = 256
    """Steps per gradient."""
    max_batch: int = 16384
    """The most denoising steps that a batch of episodes may have in all."""
    clip_epsilon: float = 0.2
    """PPO's clip range."""
    entropy_coeff: float = 0.0
    """Weight of the entropy bonus."""
    gamma: float = 1.0
    """Discount; 1, as only the last step is rewarded."""
    gae_lambda: float = 0.95
    """λ of generalized advantage estimation, from 0 to 1."""
    max_grad_norm: float = 0.5
    """A gradient with a larger norm than this is scaled down to it."""
    width: int = 64
    """Width of the two hidden layers of actor and critic."""


class TorchRLPPO:
    """TorchRL's PPO on flat observations: `learn` in its own loop, or ``act``, ``observe``, ``update`` in `run`.

    The policy starts as N(0, I), which is the base sampler where the action is the noise. Actions that leave the action
    space are clipped by the environment's convention.

    Args:
        observation_size: length F of an observation.
        action_size: length D of an action.
        config: the settings; default: those of `TorchRLPPOConfig`.
        seed: seed of the weights and of all random draws; it seeds torch's global generator.
        device: where the networks live.
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        config: TorchRLPPOConfig | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        torch.manual_seed(seed)
        self.device = torch.device(device)
        self.config = config = config or TorchRLPPOConfig()
        cells = [config.width, config.width]
        body = MLP(observation_size, 2 * action_size, num_cells=cells, activation_class=nn.Tanh, device=device)
        with torch.no_grad():
            body[-1].weight.mul_(0.01)
            body[-1].bias.zero_()
        network = nn.Sequential(body, NormalParamExtractor())
        self.actor = ProbabilisticActor(
            TensorDictModule(network, in_keys=["observation"], out_keys=["loc", "scale"]),
            in_keys=["loc", "scale"],
            distribution_class=IndependentNormal,
            return_log_prob=True,
            default_interaction_type=InteractionType.RANDOM,
        )
        critic = MLP(observation_size, 1, num_cells=cells, activation_class=nn.Tanh, device=device)
        self.critic = ValueOperator(critic, in_keys=["observation"])
        self.advantage = GAE(gamma=config.gamma, lmbda=config.gae_lambda, value_network=self.critic)
        self.loss = ClipPPOLoss(
            self.actor,
            self.critic,
            clip_epsilon=config.clip_epsilon,
            entropy_coeff=config.entropy_coeff,
            normalize_advantage=True,
        )
        self.optimizer = torch.optim.Adam(self.loss.parameters(), config.lr)
        self._steps: list[TensorDictBase] = []
        storage = LazyTensorStorage(config.max_batch, device=device)
        self._buffer = ReplayBuffer(storage=storage, sampler=SamplerWithoutReplacement(), batch_size=config.minibatch)

    def learn(self, env: EnvBase, episodes: int, desc: str = "episodes") -> np.ndarray:
        """Collect whole episodes with TorchRL's collector and train on each batch of them.

        Args:
            env: its states have an ``observation``, which `denoise_env.torchrl_transforms` adds.
            episodes: a multiple of the environment's rows.
            desc: the progress bar's title.

        Returns:
            The episodes' returns ``[episodes]``.

        Raises:
            ValueError: a number of episodes that the rows do not divide; a reward that could not be computed.
        """
        rows = env.batch_size.numel()
        if episodes % rows:
            raise ValueError(f"episodes must be a multiple of the environment's {rows} rows, not {episodes}")
        steps = env.base_env.mdp.num_steps
        collector = Collector(env, self.actor, frames_per_batch=rows * steps, total_frames=episodes * steps)
        returns = []
        with progress(total=episodes, desc=desc, leave=False) as bar:
            for batch in collector:
                returns.append(batch["next", "reward"].sum(1)[:, 0].cpu().numpy())
                check_rewards(returns[-1])
                self._train(batch)
                bar.set_postfix({"return": f"{returns[-1].mean():.3g}"}, refresh=False)
                bar.update(rows)
        collector.shutdown()
        return np.concatenate(returns)

    @torch.no_grad()
    def act(self, observation: Any) -> torch.Tensor:
        """Actions ``[n, D]`` sampled for observations ``[n, F]``."""
        self._step = self.actor(TensorDict({"observation": self._tensor(observation)}, [len(observation)]))
        return self._step["action"]

    def observe(self, observation: Any, action: Any, reward: Any, done: Any, next_observation: Any) -> None:
        """Keep a step for the next `update`."""
        column = {"reward": self._tensor(reward)[:, None], "done": self._tensor(done)[:, None]}
        after = {"observation": self._tensor(next_observation), "terminated": column["done"], **column}
        self._steps.append(self._step.set("next", TensorDict(after, self._step.batch_size)))

    def update(self) -> dict[str, float]:
        """Train on the episodes that were observed."""
        batch = torch.stack(self._steps, 1)
        self._steps = []
        return self._train(batch)

    def _tensor(self, values: Any) -> torch.Tensor:
        return torch.as_tensor(values, device=self.device)

    def _train(self, batch: TensorDictBase) -> dict[str, float]:
        """PPO on a batch ``[n, K]`` of whole episodes."""
        config = self.config
        with torch.no_grad():
            self.advantage(batch)
        flat = batch.select(*self.loss.in_keys, "advantage", "value_target", strict=False).reshape(-1)
        self._buffer.empty()
        self._buffer.extend(flat)
        for _ in range(config.epochs):
            for minibatch in self._buffer:
                losses = self.loss(minibatch)
                loss = sum(losses[name] for name in ("loss_objective", "loss_critic", "loss_entropy") if name in losses)
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.loss.parameters(), config.max_grad_norm)
                self.optimizer.step()
        return {"loss": loss.item(), "kl": losses["kl_approx"].item()}
