"""TempFlow-GRPO (He et al. 2025, arXiv:2508.04324): credit to the one step where a group branches.

A group follows one ODE trajectory to a random step, takes that step stochastically, and follows the ODE to the end:
only that step makes its samples, and so their rewards, differ. Its policy loss is weighed by the step's std s√Δ.
"""

from dataclasses import dataclass
from typing import Literal

from agents.grpo import GRPO, GRPOConfig
from agents.window import WindowConfig, Windowed


@dataclass
class TempFlowConfig(WindowConfig, GRPOConfig):
    """TempFlow-GRPO's settings."""

    share_prefix: bool = True
    """Make the network calls that a group has in common, those up to the branch, once per group."""
    timestep_fraction: float = 1.0
    """Share of the window's steps that each update trains: ceil(share · steps) of them, drawn at random."""
    step_weighting: Literal["uniform", "std"] = "std"
    """Weigh every step's policy loss alike ("uniform"), or by the step's std divided by the mean std of the trainable
    steps ("std")."""
    window_size: int = 1
    """Size of the window: how many neighbouring steps are stochastic and trained."""
    window_strategy: Literal["progressive", "random", "decay", "frozen"] = "random"
    """How the window moves between rollouts: from the noisy end to the clean end and then from the beginning again
    ("progressive"), to a random place ("random"), like "progressive" but ever faster towards the clean end ("decay"),
    or not at all, staying at the noisy end ("frozen")."""


class TempFlow(Windowed, GRPO):
    """TempFlow-GRPO: branch at one step, and weigh it by its noise."""

    name = "tempflow"
    own_settings = ("step_weighting",)
    config_type = TempFlowConfig
    config: TempFlowConfig
