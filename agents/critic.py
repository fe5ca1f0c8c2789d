"""A value function of the denoising MDP's states, and the base of the agents that learn one.

The reward comes after the last step; with ``kl_reward`` β every step also costs β (ℓ_old − ℓ_ref) of its action. The
mean of that is β KL(π_old ‖ π_ref). (The KL itself would teach nothing, since it is the same for every action.)
With δ_k = r_k + γ V_{k+1} − V_k the advantages are GAE's (Schulman et al. 2015, arXiv:1506.02438, eq. 16),

    A_k = Σ_j (γλ)^j δ_{k+j},      and the critic's loss is c · mean over k of (V − (A_k + V_k))².

The mean is over all K states, whatever steps the policy trains: the advantages rely on the values of all of them.
γ = λ = 1 gives A_k = r − V(x_k, k, c).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from agents.policy import DenoisingPolicy
from agents.rollout import Rollout
from agents.trajectory import TrajectoryAgent, TrajectoryConfig

MAX_SIDE = 16


class Critic(nn.Module):
    """V(x_k, k, c): latents, step and pooled prompt through a multilayer perceptron.

    Latents with more than 16 rows or columns are averaged down to 16 first.

    Args:
        policy: the policy whose states are valued.
        width: width of the two hidden layers.
        seed: seed of the first weights. The last layer starts at 0, and with it V.
    """

    def __init__(self, policy: DenoisingPolicy, width: int = 256, seed: int = 0) -> None:
        super().__init__()
        mdp = policy.mdp
        pooled = mdp.model.pool(mdp.conditioning.rows(mdp.drawn[:1])).shape[1]
        size = self._shrink(torch.zeros(1, *mdp.model.latent_shape)).shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.step = nn.Embedding(mdp.num_steps, width)
            self.input = nn.Linear(size + pooled, width)
            self.hidden = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU())
            self.output = nn.Linear(width, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    @staticmethod
    def _shrink(latents: Tensor) -> Tensor:
        if latents.ndim > 3 and max(latents.shape[-2:]) > MAX_SIDE:
            height, width = (min(side, MAX_SIDE) for side in latents.shape[-2:])
            latents = adaptive_avg_pool2d(latents.flatten(1, -3), (height, width))
        return latents.flatten(1)

    def forward(self, latents: Tensor, step: Tensor, pooled: Tensor) -> Tensor:
        """Values ``[B]`` of ``latents [B, *latent]`` at steps ``[B]`` with ``pooled [B, E]``."""
        dtype = self.input.weight.dtype
        x = torch.cat([self._shrink(latents).to(dtype), pooled.to(dtype)], 1)
        return self.output(self.hidden(self.input(x) + self.step(step.to(x.device)))).squeeze(1)

    def values(self, latents: Tensor, pooled: Tensor) -> Tensor:
        """Values ``[B, K]`` of the states ``latents [B, K, *latent]`` with ``pooled [B, E]``."""
        found = [self(x, torch.full((len(x),), k), pooled) for k, x in enumerate(latents.unbind(1))]
        return torch.stack(found, 1)


@dataclass
class ActorCriticConfig(TrajectoryConfig):
    """The settings of every agent that learns a value function."""

    group_size: int = 1
    """Neighbouring samples of one prompt, G. They form a group."""
    gamma: float = 1.0
    """Discount γ per denoising step."""
    gae_lambda: float = 0.95
    """λ of generalized advantage estimation, from 0 to 1. With 0 a step's advantage relies on the critic's value of the
    next state; with 1 it uses the episode's actual reward."""
    critic_width: int = 256
    """Hidden width of the critic."""
    critic_lr: float = 1e-3
    """The critic's learning rate."""
    value_coef: float = 1.0
    """Weight c of the critic's loss. It scales the critic's gradient, not the policy's."""
    kl_reward: float = 0.0
    """Weight β of the KL to the model before training that every step's reward loses, in the log-prob's reduction."""


class ActorCritic(TrajectoryAgent):
    """An agent whose advantages come from a critic; arguments and errors as in `Agent`."""

    config_type: ClassVar[type[TrajectoryConfig]] = ActorCriticConfig
    aggregations = ("rewards",)
    joins_rewards = "it has one critic, for their weighted sum"

    def _validate(self) -> None:
        super()._validate()
        if self.config.critic_width < 1 or self.config.critic_lr <= 0:
            raise ValueError(
                f"{self.name} needs a critic: critic_width and critic_lr must be positive (rloo, grpo and ddpo-is "
                "do without one)"
            )
        if not (self.config.gamma <= 1 and self.config.gae_lambda <= 1):
            raise ValueError("gamma and gae_lambda must lie in [0, 1]")
        self.needs_reference = self.needs_reference or self.config.kl_reward > 0

    def make_modules(self) -> dict[str, nn.Module]:
        """The critic."""
        return {"critic": Critic(self.policy, self.config.critic_width, self.seed)}

    @property
    def critic(self) -> Critic:
        """The value function V."""
        critic = self.modules["critic"]
        assert isinstance(critic, Critic)
        return critic

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The policy's parameters and the critic's, which have a learning rate of their own."""
        return [*super().parameter_groups(), {"params": list(self.critic.parameters()), "lr": self.config.critic_lr}]

    def step_rewards(self, rollout: Rollout) -> Tensor:
        """The reward of each step, ``[B, K]``; NaN at the last step of episodes that could not be scored."""
        rewards = torch.zeros_like(rollout.steps["action_log_prob"])
        rewards[:, -1] = rollout.scores.total
        if self.config.kl_reward:
            rewards -= self.config.kl_reward * self.reference_log_ratio(rollout)
        return rewards

    @torch.no_grad()
    def reference_log_ratio(self, rollout: Rollout) -> Tensor:
        """ℓ_old − ℓ_ref ``[B, K]`` of a rollout's actions; 0, without a network call, at deterministic steps."""
        found = torch.zeros_like(rollout.steps["action_log_prob"])
        size = self.microbatch or len(rollout)
        with self.policy.model.reference():
            for start in range(0, len(rollout), size):
                part = slice(start, start + size)
                conditioning = rollout.conditioning(part)
                for k in rollout.kernel.stochastic.nonzero().flatten().tolist():
                    step = rollout.steps[part, k]
                    reference = self.policy.transition(step["latents"], k, conditioning, rollout.kernel)
                    found[part, k] = step["action_log_prob"] - self.policy.log_prob(reference, step["action"]).to(found)
        return found

    def gae(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """GAE's advantages, 0 for episodes without a score, and the values to fit the critic to; both ``[B, K]``."""
        with torch.no_grad():
            values = self.critic.values(rollout.steps["latents"], rollout.pooled())
        rewards = self.step_rewards(rollout)
        after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
        deltas = rewards + self.config.gamma * after - values
        advantages = torch.zeros_like(deltas)
        running = torch.zeros_like(deltas[:, 0])
        for k in reversed(range(deltas.shape[1])):
            running = deltas[:, k] + self.config.gamma * self.config.gae_lambda * running
            advantages[:, k] = running
        valid = rollout.scores.valid[:, None]
        return advantages.where(valid, 0.0), (advantages + values).where(valid, values)

    def targets(self, rollout: Rollout) -> dict[str, Tensor]:
        """As in `TrajectoryAgent.targets`; ``returns [B, 1, K]`` are the values to fit the critic to."""
        raw, returns = self.gae(rollout)
        advantage = self.scale(raw, rollout.scores.valid[:, None].expand_as(raw))
        return {"advantage": advantage, "returns": returns[:, None]}

    def scale(self, raw: Tensor, valid: Tensor) -> Tensor:
        """What the loss takes as advantages ``[B, K]``: here GAE's, unchanged.

        Args:
            raw: GAE's advantages ``[B, K]``.
            valid: ``[B, K]`` bool, the entries of episodes that were scored.
        """
        return raw

    def auxiliary_loss(
        self, rollout: Rollout, examples: TensorDict, conditioning: TensorDict
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic's squared error, averaged over the states of each episode."""
        first = examples[:, 0]
        latents = rollout.steps["latents"][first["episode"]]
        values = self.critic.values(latents, self.policy.model.pool(conditioning))
        error = (values - first["returns"]).square().mean(1)
        return self.config.value_coef * error, {"value_loss": error}
