"""TempFlow-GRPO (He et al. 2025, arXiv:2508.04324): credit to the one step where a group branches.

A group follows one ODE trajectory to a random step, takes that step stochastically, and follows the ODE to the end:
what its samples' rewards differ by is that step's doing. Its policy loss is weighed by the step's noise s√Δ.
"""

from dataclasses import dataclass
from typing import Literal

from agents.grpo import GRPO, GRPOConfig
from agents.window import WindowConfig, Windowed


@dataclass
class TempFlowConfig(WindowConfig, GRPOConfig):
    """TempFlow-GRPO's settings."""

    share_prefix: bool = True
    """Make the network calls before the branch once per group."""
    timestep_fraction: float = 1.0
    """Share of the window's steps that each update recomputes."""
    step_weighting: Literal["uniform", "std"] = "std"
    """Weigh a step's policy loss by its std over the trainable steps' mean."""
    window_size: int = 1
    """Neighbouring steps that are stochastic and trained."""
    window_strategy: Literal["progressive", "random", "decay", "frozen"] = "random"
    """Where the window goes."""


class TempFlow(Windowed, GRPO):
    """TempFlow-GRPO: branch at one step, and weigh it by its noise."""

    name = "tempflow"
    own_settings = ("step_weighting",)
    config_type = TempFlowConfig
    config: TempFlowConfig
