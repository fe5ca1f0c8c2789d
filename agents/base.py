"""What an agent is, and the update that all agents share; an algorithm adds what it learns from and its loss."""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from agents.advantages import Aggregation, aggregate
from agents.policy import DenoisingPolicy
from agents.rollout import Rollout
from denoise_env.kernels import Kernel


@dataclass
class AgentConfig:
    """How every agent rolls out."""

    group_size: int = 16
    """Neighbouring samples of one prompt, G."""
    shared_noise: bool = False
    """A group starts from the same initial noise."""
    share_prefix: bool = False
    """Make the network calls that a group with shared noise has in common once. The results stay the same but for
    rounding, so that the first ratio is 1 only to about 1e-6; keep it off in bf16."""


@dataclass
class LearningConfig(AgentConfig):
    """How every agent that learns is trained."""

    reward_aggregation: Aggregation = "rewards"
    """What several rewards are added up as, each times its weight: their advantages (every reward is normalised by
    itself), their losses (every reward's advantages are clipped, and so is its loss), or the rewards (the advantages
    are those of the sum). With one reward of weight 1 all three are the same."""
    lr: float = 1e-4
    """AdamW's learning rate, constant."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates."""
    weight_decay: float = 1e-4
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to at most this norm."""
    updates_per_rollout: int = 1
    """Optimizer steps per pass over a rollout, each on its own equal part of the episodes (and whole groups)."""
    epochs: int = 1
    """Passes over a rollout."""
    ema_decay: float = 0.0
    """Evaluate, sample and export an exponential moving average of the weights; 0 is off."""


class Agent(ABC):
    """A policy and an ``update``.

    Args:
        policy: acts and is trained.
        config: the algorithm's; default: its published settings.
        seed: of the agent's own draws.
        microbatch: rows per network call of an update; use the rollout's. It bounds the memory and does not
            change the result.

    Class attributes declare what the algorithm needs: ``smallest_group``, ``needs_density`` (a stochastic kernel),
    ``needs_means`` (of the rollout's Gaussians), ``needs_reference`` (the model before training), ``on_policy`` (one
    optimizer step per rollout), ``aggregations`` (what it can add several rewards up as) and ``joins_rewards`` (why
    it cannot do the others), ``own_settings`` (which a preset for another agent leaves as they are), and
    ``rows_per_example``, episodes that one example compares.

    Attributes:
        modules: what the agent trains or remembers beside the policy (a critic, say); checkpoints hold it.
        kept: lists of tensors that checkpoints hold too, by name.

    Raises:
        ValueError: the policy lacks what the algorithm needs.
    """

    name: ClassVar[str]
    config_type: ClassVar[type[AgentConfig]] = LearningConfig
    smallest_group: ClassVar[int] = 1
    needs_density: ClassVar[bool] = True
    needs_means: bool = False
    needs_reference: bool = False
    on_policy: ClassVar[bool] = False
    aggregations: ClassVar[tuple[Aggregation, ...]] = ("rewards",)
    joins_rewards: ClassVar[str] = "it learns from the rewards' weighted sum"
    own_settings: ClassVar[tuple[str, ...]] = ()
    rows_per_example: ClassVar[int] = 1
    config: Any

    def __init__(
        self,
        policy: DenoisingPolicy,
        config: Any = None,
        seed: int = 0,
        microbatch: int | None = None,
    ) -> None:
        self.config = config or self.config_type()
        self.policy = policy
        self.seed = seed
        self.microbatch = microbatch
        self.group_size: int = self.config.group_size
        self.parameters = list(policy.model.trainable().values())
        self._validate()
        self.modules = nn.ModuleDict(self.make_modules()).to(policy.model.device)
        if self.needs_reference:
            policy.model.keep_reference()
        fused = all(p.device.type in ("cpu", "cuda") for p in self.parameters)
        config = self.config
        self.optimizer = torch.optim.AdamW(
            self.parameter_groups(), config.lr, config.betas, weight_decay=config.weight_decay, fused=fused
        )
        self.average = [p.detach().clone() for p in self.parameters] if config.ema_decay else []
        self.kept: dict[str, list[Tensor]] = {"average": self.average}

    def _validate(self) -> None:
        config, kernel = self.config, self.policy.kernel
        if self.needs_density and not kernel.stochastic.any():
            raise ValueError(
                f"{self.name} needs log-probs, and the kernel {kernel!r} is deterministic: use a stochastic one "
                'with eta > 0 ("ddim" on a diffusion; "dance_sde", "flow_sde" or "cps" on a flow), or an agent that '
                "learns from final samples (nft, awm, rwr, dpo)"
            )
        if self.group_size < self.smallest_group:
            raise ValueError(
                f"{self.name} compares samples of one prompt: group_size must be at least {self.smallest_group}, "
                f"not {self.group_size}"
            )
        if not 0 <= config.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), not {config.ema_decay}")
        for name, value in vars(config).items():
            if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number ≥ 0, not {value}")
        if self.on_policy and config.updates_per_rollout * config.epochs > 1:
            raise ValueError(
                f"{self.name} is on-policy, one optimizer step per rollout: updates_per_rollout and epochs must be 1 "
                "(agents with a ratio take more: grpo, ppo, ddpo-is)"
            )
        if (how := config.reward_aggregation) not in self.aggregations:
            allowed = " or ".join(f'"{name}"' for name in self.aggregations)
            raise ValueError(
                f"{self.name} cannot add up the rewards' {how}, because {self.joins_rewards}: set reward_aggregation "
                f"to {allowed}"
            )
        if not any(self.policy.mdp.reward_weights.values()):
            raise ValueError("every reward has weight 0: give one that counts another weight")
        self.require_positive("max_grad_norm", "updates_per_rollout", "epochs", "group_size")

    def require_positive(self, *names: str) -> None:
        """Refuse settings that are not above 0 with a ``ValueError``."""
        for name in names:
            if not getattr(self.config, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self.config, name)}")

    def check_rows(self, rows: int) -> None:
        """Refuse a rollout size that groups, updates or microbatches do not divide with a ``ValueError``."""
        updates = self.config.updates_per_rollout
        if rows % (updates * self.group_size):
            raise ValueError(
                f"{rows} episodes per rollout cannot be divided into updates_per_rollout={updates} parts of whole "
                f"groups of {self.group_size}"
            )
        if self.microbatch and (rows // updates) % self.microbatch:
            raise ValueError(
                f"the {rows // updates} episodes of one update cannot be divided into microbatches of {self.microbatch}"
            )

    # --- What an algorithm may say about its rollouts ---

    @property
    def best_of(self) -> int:
        """Samples that evaluation draws for each one it keeps."""
        return 1

    def kernel(self, iteration: int) -> Kernel:
        """The kernel of an iteration's rollout."""
        return self.policy.kernel

    def rollout_options(self, iteration: int) -> dict[str, Any]:
        """What `agents.rollout.collect` is to be called with."""
        return {
            "group_size": self.group_size,
            "shared_noise": self.config.shared_noise,
            "share_prefix": self.config.share_prefix,
            "keep_means": self.needs_means,
            "kernel": self.kernel(iteration),
            "microbatch": self.microbatch,
        }

    def rollout_weights(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the policy has the weights that are to roll out."""
        return contextlib.nullcontext()

    # --- What an algorithm must say about its updates ---

    def make_modules(self) -> dict[str, nn.Module]:
        """The algorithm's ``modules``."""
        return {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer trains."""
        return [{"params": self.parameters}]

    def reward_advantages(self, name: str, rewards: Tensor, rollout: Rollout) -> Tensor:
        """One reward's own advantages ``[B]`` float32, 0 for episodes that could not be scored.

        Args:
            name: the reward's, or "total" for the weighted sum of all.
            rewards: ``[B]``, its values; NaN where there is none.
            rollout: of B episodes.
        """
        raise NotImplementedError(f"{self.name} has no advantages")

    def advantages(self, rollout: Rollout) -> dict[str, Tensor]:
        """The ``advantage [B]`` that `reward_advantages` and ``reward_aggregation`` make, see `aggregate`.

        Where the config has an ``advantage_clip``, advantages are cut at ± this.
        """
        config, weights = self.config, self.policy.mdp.reward_weights
        clip = getattr(config, "advantage_clip", math.inf)

        def own(name: str, rewards: Tensor) -> Tensor:
            return self.reward_advantages(name, rewards, rollout)

        return aggregate(config.reward_aggregation, rollout.scores, weights, own, clip)

    @abstractmethod
    def examples(self, rollout: Rollout, iteration: int) -> TensorDict:
        """What an update learns from, ``[N, T]``: T forward passes for each of N examples.

        ``episode [N, T]`` is the example's place in the rollout; an algorithm adds what it needs. Examples are in the
        order of their episodes, so that the equal parts of an update hold whole groups.
        """

    @abstractmethod
    def example_loss(
        self, rollout: Rollout, examples: TensorDict, conditioning: TensorDict
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss ``[n]`` of a microbatch of examples ``[n]``, with gradient, and figures ``[n]`` to log."""

    def conditioning(self, rollout: Rollout, examples: TensorDict) -> TensorDict:
        """The conditioning of a microbatch of examples ``[n, T]``."""
        return rollout.conditioning(examples["episode"][:, 0])

    def update(self, rollout: Rollout, iteration: int) -> dict[str, float]:
        """Train on a rollout.

        Args:
            rollout: of this agent's policy, with its parameters as they are now.
            iteration: numbers the agent's random draws.

        Returns:
            Figures to log, averages over the rollout's updates.

        Raises:
            FloatingPointError: the gradient is not finite; the weights are as before that step.
        """
        self.check_rows(len(rollout))
        examples = self.examples(rollout, iteration)
        part = len(examples) // self.config.updates_per_rollout
        parts = [examples[start : start + part] for start in range(0, len(examples), part)] * self.config.epochs
        results = [self._optimize(rollout, examples) for examples in parts]
        figures = {name: sum(result[name] for result in results) / len(results) for name in results[0]}
        if "ratio" in figures:
            figures["ratio_deviation"] = max(result["ratio_deviation"] for result in results)
        return figures

    def _optimize(self, rollout: Rollout, examples: TensorDict) -> dict[str, float]:
        """One optimizer step."""
        rows, times = examples.batch_size
        size = max(1, self.microbatch // self.rows_per_example) if self.microbatch else rows
        sums: dict[str, Tensor] = {}
        deviation = torch.zeros((), device=self.policy.model.device)
        for first in range(0, rows, size):
            chunk = examples[first : first + size]
            conditioning = self.conditioning(rollout, chunk)
            for j in range(times):
                loss, figures = self.example_loss(rollout, chunk[:, j], conditioning)
                (loss.sum() / (rows * times)).backward()
                if "ratio" in figures:
                    deviation = torch.maximum(deviation, (figures["ratio"] - 1).abs().max())
                for name, value in {**figures, "loss": loss}.items():
                    sums[name] = sums.get(name, 0) + value.detach().sum()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        if not norm.isfinite():
            self.optimizer.zero_grad()
            raise FloatingPointError(
                "the gradient is not finite: lower the learning rate, use dtype fp32, or look for a reward that "
                "explodes"
            )
        if others := list(self.modules.parameters()):
            torch.nn.utils.clip_grad_norm_(others, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            follow(self.average, self.parameters, self.config.ema_decay)
        result = {name: value.item() / (rows * times) for name, value in sums.items()}
        return {**result, "ratio_deviation": deviation.item(), "grad_norm": norm.item()}

    # --- Weights and state ---

    @contextlib.contextmanager
    def weights(self, other: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the policy has ``other`` weights; an empty list leaves it as it is."""
        for p, tensor in zip(self.parameters, other, strict=False):
            p.data, tensor.data = tensor.data, p.data
        try:
            yield
        finally:
            for p, tensor in zip(self.parameters, other, strict=False):
                p.data, tensor.data = tensor.data, p.data

    def evaluation_weights(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the policy has the averaged weights, where there are any."""
        return self.weights(self.average)

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint needs to continue, by name."""
        tensors = {f"weights.{name}": p.detach() for name, p in self.policy.model.trainable().items()}
        tensors |= {f"modules.{name}": t.detach() for name, t in self.modules.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{key}": value for key, value in state.items()}
        return tensors | {f"{name}.{i}": t for name, kept in self.kept.items() for i, t in enumerate(kept)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Continue from ``state``'s tensors.

        Raises:
            ValueError: they belong to another architecture or configuration.
        """
        parameters = self.policy.model.trainable()
        expected = {f"weights.{name}": tuple(p.shape) for name, p in parameters.items()}
        expected |= {f"modules.{name}": tuple(t.shape) for name, t in self.modules.state_dict().items()}
        found = {n: tuple(t.shape) for n, t in tensors.items() if n.startswith(("weights.", "modules."))}
        if found != expected:
            odd = sorted(dict(found.items() ^ expected.items()))[0]
            raise ValueError(
                f"the checkpoint holds another architecture: {odd} is {found.get(odd, 'missing')} in it and "
                f"{expected.get(odd, 'absent')} in the model"
            )
        if bool(self.average) != ("average.0" in tensors):
            raise ValueError("the checkpoint and ema_decay disagree on whether weights are averaged")
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(tensors[f"weights.{name}"])
        modules = {n.removeprefix("modules."): t for n, t in tensors.items() if n.startswith("modules.")}
        self.modules.load_state_dict(modules)
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".")
                state.setdefault(int(number), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        for name, kept in self.kept.items():
            for i, tensor in enumerate(kept):
                tensor.copy_(tensors[f"{name}.{i}"])


@torch.no_grad()
def follow(average: list[Tensor], parameters: Sequence[Tensor], decay: float) -> None:
    """``average ← decay · average + (1 − decay) · parameters``, in place."""
    torch._foreach_lerp_(average, list[Tensor](parameters), 1 - decay)
