"""A window of stochastic steps in an otherwise deterministic trajectory.

Outside the window the kernel is the ODE, and only the window's steps are trained. Before the window, a group from one
initial noise is one trajectory, which can be computed once for all its samples (``share_prefix``).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from agents.trajectory import TrajectoryAgent
from denoise_env.kernels import Kernel
from denoise_env.seeding import generator

Strategy = Literal["progressive", "random", "scattered", "decay", "frozen"]
Reach = Literal["all", "first_half", "all_but_two"]


@dataclass
class WindowConfig:
    """The settings of the window: its size, and how it moves between rollouts."""

    window_size: int = 4
    """Size of the window: how many steps are stochastic and trained, w. They are neighbours, but with "scattered"."""
    window_strategy: Strategy = "progressive"
    """How the window moves between rollouts: from the noisy end to the clean end and then from the beginning again
    ("progressive"), to a random place ("random"), to random steps that need not be neighbours ("scattered"), like
    "progressive" but ever faster towards the clean end ("decay"), or not at all, at the noisy end ("frozen")."""
    window_reach: Reach = "all"
    """Which of the trainable steps the window may hold: all of them ("all"), those among the first K/2 of the K steps
    ("first_half"), or among the first K − 2 ("all_but_two")."""
    window_end: Literal["whole", "shrink"] = "whole"
    """Where "progressive" and "decay" begin again: when the window has reached the last step it may hold ("whole"), or
    when it has slid out over it, with ever fewer steps down to one ("shrink")."""
    window_stride: int = 1
    """How many steps the window moves at a time with "progressive" and "decay", s."""
    window_every: int = 25
    """How many iterations the window stays in one place with "progressive", and at most with "decay", τ."""
    window_decay: float = 0.1
    """How much faster the window moves with "decay": it stays at the l-th place, counted from 0, for
    ⌈τ exp(−window_decay · max(l − window_decay_start, 0))⌉ iterations."""
    window_decay_start: int = 13
    """The place up to which the window does not yet move faster with "decay"."""


class Windowed(TrajectoryAgent):
    """Mixin for agents whose config is a `WindowConfig` too."""

    def _validate(self) -> None:
        super()._validate()
        config: Any = self.config
        if not 1 <= config.window_size <= len(self.reach):
            raise ValueError(
                f"window_size must lie between 1 and the {len(self.reach)} trainable steps of {self.policy.kernel!r} "
                f'that window_reach "{config.window_reach}" allows, not {config.window_size}: use a smaller window, '
                "more num_steps or another window_reach"
            )
        if config.window_strategy != "scattered" and (self.reach.diff() != 1).any():
            raise ValueError(f"{self.name} needs neighbouring stochastic steps, which {self.policy.kernel!r} lacks")
        self.require_positive("window_stride", "window_every")

    def idle_settings(self) -> dict[str, str]:
        """As in `Agent.idle_settings`: how a window slides that does not slide."""
        how = self.config.window_strategy
        idle = [] if how == "decay" else ["window_decay", "window_decay_start"]
        if how not in ("decay", "progressive"):
            idle += ["window_end", "window_stride", "window_every"]
        why = f'with window_strategy "{how}" the window does not slide so'
        return super().idle_settings() | {name: why for name in idle if self.chosen(name)}

    @property
    def reach(self) -> Tensor:
        """The steps that the window may hold, in order."""
        steps = self.policy.mdp.num_steps
        end = {"all": steps, "first_half": steps // 2, "all_but_two": steps - 2}[self.config.window_reach]
        return self.trainable_steps[self.trainable_steps < end]

    def window(self, iteration: int) -> list[int]:
        """The steps of an iteration's window, in order; iterations count from 1."""
        config: Any = self.config
        reach, size = self.reach, config.window_size
        places = len(reach) - size + 1
        random = generator(self.seed, "window", iteration)
        if config.window_strategy == "scattered":
            return sorted(reach[torch.randperm(len(reach), generator=random)[:size]].tolist())
        if config.window_strategy == "frozen":
            place = 0
        elif config.window_strategy == "random":
            place = int(torch.randint(places, (), generator=random))
        else:
            place = self._slide(max(iteration - 1, 0), places if config.window_end == "whole" else len(reach))
        found: list[int] = reach[place : place + size].tolist()
        return found

    def _slide(self, past: int, places: int) -> int:
        config: Any = self.config
        visited = range(0, places, config.window_stride)
        later = [max(place - config.window_decay_start, 0) for place in visited]
        rate = config.window_decay if config.window_strategy == "decay" else 0.0
        stays = torch.tensor([math.ceil(config.window_every * math.exp(-rate * late)) for late in later])
        return visited[int((stays.cumsum(0) <= past % int(stays.sum())).sum())]

    def kernel(self, iteration: int) -> Kernel:
        """The policy's kernel inside the window, the ODE outside."""
        return self.policy.kernel.only(self.window(iteration))
