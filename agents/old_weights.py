"""Weights that the policy had some time ago: a copy that follows the trained weights after every rollout."""

import functools
from dataclasses import dataclass
from typing import Any

from agents.base import LearningConfig
from agents.final_samples import Context, FinalSampleAgent
from agents.rollout import Rollout
from denoise_env.weights import copies, follow


@dataclass
class OldWeightsConfig(LearningConfig):
    """How fast the old weights follow: θ_old ← η θ_old + (1 − η) θ after every rollout's update."""

    old_decay: float = 0.3
    """Largest share of the old weights that an iteration keeps, η; the rest comes from the trained weights."""
    old_decay_slope: float = 0.001
    """Growth of the share η per iteration, until it reaches old_decay. With 0 it does not grow."""
    old_decay_after: int = 0
    """How many iterations pass before the share η begins to grow."""


class OldWeights(FinalSampleAgent):
    """Mixin for agents that remember old weights; their config is an `OldWeightsConfig` too.

    Attributes:
        old: the old weights by name; empty for an agent whose settings need none.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.old = self.kept["old"] = copies(self.trained) if self.needs_old else {}

    def _validate(self) -> None:
        super()._validate()
        if self.config.old_decay >= 1:
            raise ValueError(f"old_decay must lie in [0, 1), not {self.config.old_decay}")
        if self.config.old_decay_after < 0:
            raise ValueError(f"old_decay_after must be at least 0, not {self.config.old_decay_after}")

    def idle_settings(self) -> dict[str, str]:
        """As in `Agent.idle_settings`."""
        names = [] if self.needs_old else ["old_decay", "old_decay_slope", "old_decay_after"]
        return super().idle_settings() | {name: "no old weights are needed" for name in names if self.chosen(name)}

    @property
    def needs_old(self) -> bool:
        """Whether the settings need the old weights."""
        return True

    def decay(self, iteration: int) -> float:
        """The share η of the old weights that an iteration keeps; iterations count from 1."""
        config = self.config
        return min(config.old_decay_slope * max(iteration - config.old_decay_after, 0), config.old_decay)

    def others(self) -> dict[str, Context]:
        """As in `FinalSampleAgent.others`, with the old weights as "old"."""
        return {**super().others(), **({"old": functools.partial(self.weights, self.old)} if self.old else {})}

    def update(self, rollout: Rollout, iteration: int) -> dict[str, float]:
        """As in `Agent.update`; afterwards the old weights follow the trained ones."""
        figures = super().update(rollout, iteration)
        if not self.old:
            return figures
        follow(self.old, self.trained, self.decay(iteration))
        return {**figures, "old_decay": self.decay(iteration)}
