"""Controls: what a benchmark needs beside its agents in order to mean anything."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.base import Agent, AgentConfig
from agents.grpo import GRPO, GRPOConfig
from agents.policy import DenoisingPolicy
from agents.ranks import Ranks
from agents.rollout import Rollout
from agents.training.seeding import generator


@dataclass
class BaseConfig(AgentConfig):
    """Control: the base model, never trained."""

    group_size: int = 1
    """Neighbouring samples of one prompt."""


class Base(Agent):
    """The base model: samples and learns nothing."""

    name = "base"
    config_type = BaseConfig
    needs_density = False

    def examples(self, rollout: Rollout, iteration: int) -> Any:
        """There are none."""
        raise NotImplementedError(f"{self.name} does not train")

    def evaluate(self, rollout: Rollout, examples: Any, conditioning: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """There is no loss."""
        raise NotImplementedError(f"{self.name} does not train")

    def update(self, rollout: Rollout, iteration: int) -> dict[str, float]:
        """Nothing."""
        return {}


@dataclass
class BestOfNConfig(BaseConfig):
    """Control: the base model, the best of N samples by the reward."""

    n: int = 4
    """Samples drawn for each one kept; evaluation costs N times as many network calls."""


class BestOfN(Base):
    """The base model, evaluated on the best of N samples of a prompt."""

    name = "best-of-n"
    config_type = BestOfNConfig

    def _validate(self) -> None:
        super()._validate()
        self.require_positive("n")
        self.best_of = self.config.n


@dataclass
class ZeroLRConfig(GRPOConfig):
    """Control: GRPO with a learning rate of 0, whatever ``lr`` says."""


class ZeroLR(GRPO):
    """GRPO that goes through all the motions and changes nothing."""

    name = "zero-lr"
    config_type = ZeroLRConfig

    def __init__(
        self,
        policy: DenoisingPolicy,
        config: Any = None,
        seed: int = 0,
        microbatch: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        config = dataclasses.replace(config or ZeroLRConfig(), lr=0.0)
        super().__init__(policy, config, seed, microbatch, ranks)


@dataclass
class ShuffledRewardConfig(GRPOConfig):
    """Control: GRPO on rewards shuffled between the samples of a rollout."""


class ShuffledReward(GRPO):
    """GRPO whose rewards tell nothing; an improvement would be the benchmark's fault."""

    name = "shuffled-reward"
    config_type = ShuffledRewardConfig

    def examples(self, rollout: Rollout, iteration: int) -> Any:
        """As in `TrajectoryAgent.examples`, of the shuffled rewards."""
        scores = rollout.scores
        order = torch.randperm(len(rollout) * self.ranks.size, generator=generator(self.seed, "shuffle", iteration))

        def shuffle(rows: Tensor) -> Tensor:
            return self.over_all_rows(lambda rows: rows[order], rows)

        shuffled = dataclasses.replace(
            scores,
            values={name: shuffle(values) for name, values in scores.values.items()},
            total=shuffle(scores.total),
            valid=shuffle(scores.valid),
        )
        return super().examples(dataclasses.replace(rollout, scores=shuffled), iteration)
