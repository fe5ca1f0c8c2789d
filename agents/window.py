"""A window of stochastic steps in an otherwise deterministic trajectory.

Outside the window the kernel is the ODE, and only the window's steps are trained. Before the window, a group from one
initial noise is one trajectory, which can be computed once for all its samples (``share_prefix``).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from agents.training.seeding import generator
from agents.trajectory import TrajectoryAgent
from denoise_env.kernels import Kernel


@dataclass
class WindowConfig:
    """The settings of the window: its size, and how it moves between rollouts."""

    window_size: int = 4
    """Size of the window: how many neighbouring steps are stochastic and trained, w."""
    window_strategy: Literal["progressive", "random", "decay", "frozen"] = "progressive"
    """How the window moves between rollouts: from the noisy end to the clean end and then from the beginning again
    ("progressive"), to a random place ("random"), like "progressive" but ever faster towards the clean end ("decay"),
    or not at all, staying at the noisy end ("frozen")."""
    window_stride: int = 1
    """How many steps the window moves at a time with "progressive" and "decay", s."""
    window_every: int = 25
    """How many iterations the window stays in one place with "progressive", and at most with "decay", τ."""
    window_decay: float = 0.1
    """How much faster the window moves with "decay": it stays at step l for τ exp(−window_decay · max(l −
    window_decay_start, 0)) iterations, and at least for one."""
    window_decay_start: int = 13
    """The step up to which the window does not yet move faster with "decay"."""


class Windowed(TrajectoryAgent):
    """Mixin for agents whose config is a `WindowConfig` too."""

    def _validate(self) -> None:
        super()._validate()
        size, available = self.config.window_size, len(self.trainable_steps)
        if not 1 <= size <= available:
            raise ValueError(
                f"window_size must lie between 1 and the {available} trainable steps of {self.policy.kernel!r}, not "
                f"{size}: use a smaller window or more num_steps"
            )
        if not torch.equal(self.trainable_steps.diff(), torch.ones(available - 1, dtype=torch.long)):
            raise ValueError(f"{self.name} needs neighbouring stochastic steps, which {self.policy.kernel!r} lacks")
        self.require_positive("window_stride", "window_every")

    def window(self, iteration: int) -> tuple[int, int]:
        """The first step of an iteration's window and the step after its last; iterations count from 1."""
        config: Any = self.config
        places = len(self.trainable_steps) - config.window_size + 1
        if config.window_strategy == "frozen":
            place = 0
        elif config.window_strategy == "random":
            place = int(torch.randint(places, (), generator=generator(self.seed, "window", iteration)))
        else:
            place = self._slide(max(iteration - 1, 0), places)
        start = int(self.trainable_steps[place])
        return start, start + config.window_size

    def _slide(self, past: int, places: int) -> int:
        config: Any = self.config
        stays = [config.window_every] * len(range(0, places, config.window_stride))
        if config.window_strategy == "decay":
            later = [max(place - config.window_decay_start, 0) for place in range(0, places, config.window_stride)]
            weight = torch.exp(-config.window_decay * torch.tensor(later, dtype=torch.float64))
            stays = [max(1, round(config.window_every * float(w))) for w in weight]
        past %= sum(stays)
        ends = torch.tensor(stays).cumsum(0)
        return int((ends <= past).sum()) * config.window_stride

    def kernel(self, iteration: int) -> Kernel:
        """The policy's kernel inside the window, the ODE outside."""
        return self.policy.kernel.windowed(*self.window(iteration))
