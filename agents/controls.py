"""Controls: what a benchmark needs beside its agents in order to mean anything."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from agents.base import Agent, AgentConfig
from agents.grpo import GRPO, GRPOConfig
from agents.rollout import Rollout
from denoise_env.seeding import generator


@dataclass
class BaseConfig(AgentConfig):
    """The base model's settings; those of training are fixed, since it is never trained."""

    group_size: int = 1
    """Neighbouring samples of one prompt, G. They form a group."""
    reward_aggregation: ClassVar[str] = "rewards"
    lr: ClassVar[float] = 0.0
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    weight_decay: ClassVar[float] = 0.0
    max_grad_norm: ClassVar[float] = 1.0
    updates_per_rollout: ClassVar[int] = 1
    best_and_worst: ClassVar[int] = 0
    epochs: ClassVar[int] = 1
    ema_decay: ClassVar[float] = 0.0
    ema_warmup: ClassVar[bool] = False
    ema_every: ClassVar[int] = 1
    max_skipped_updates: ClassVar[int] = 0


class Base(Agent):
    """Control: the base model, never trained."""

    name = "base"
    config_type = BaseConfig
    needs_density = False

    def examples(self, rollout: Rollout, iteration: int) -> Any:
        """Raises: the base model is not trained, so it has no examples."""
        raise NotImplementedError(f"{self.name} does not train")

    def example_loss(self, rollout: Rollout, examples: Any, conditioning: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Raises: the base model is not trained, so it has no loss."""
        raise NotImplementedError(f"{self.name} does not train")

    def update(self, rollout: Rollout, iteration: int) -> dict[str, float]:
        """Train nothing and report no figures."""
        return {}


@dataclass
class BestOfNConfig(BaseConfig):
    """Best of N's settings."""

    n: int = 4
    """Samples drawn for each one kept; evaluation costs N times as many network calls."""


class BestOfN(Base):
    """Control: the base model, evaluated on the best of N samples of a prompt by the reward."""

    name = "best-of-n"
    config_type = BestOfNConfig

    def _validate(self) -> None:
        super()._validate()
        self.require_positive("n")

    @property
    def best_of(self) -> int:
        """Samples that evaluation draws for each one it keeps, N."""
        return int(self.config.n)


@dataclass
class ZeroLRConfig(GRPOConfig):
    """GRPO's settings with a learning rate of 0."""

    lr: float = 0.0
    """AdamW's learning rate, which must be 0."""


class ZeroLR(GRPO):
    """Control: GRPO that goes through all the motions with a learning rate of 0 and changes nothing."""

    name = "zero-lr"
    config_type = ZeroLRConfig
    own_settings = ("lr",)

    def _validate(self) -> None:
        super()._validate()
        if self.config.lr:
            raise ValueError(f"{self.name} has a learning rate of 0, not {self.config.lr}: grpo takes another")


class ShuffledReward(GRPO):
    """Control: GRPO on rewards shuffled between the samples of a rollout: nothing to learn from."""

    name = "shuffled-reward"

    def examples(self, rollout: Rollout, iteration: int) -> Any:
        """As in `TrajectoryAgent.examples`, with the rewards shuffled between the episodes."""
        scores = rollout.scores
        order = torch.randperm(len(rollout) * self.ranks.size, generator=generator(self.seed, "shuffle", iteration))

        def shuffle(values: Tensor) -> Tensor:
            return self.over_all_rows(lambda every: every[order], values)

        shuffled = dataclasses.replace(
            scores,
            values={name: shuffle(values) for name, values in scores.values.items()},
            total=shuffle(scores.total),
            valid=shuffle(scores.valid),
        )
        return super().examples(dataclasses.replace(rollout, scored=lambda: shuffled), iteration)
