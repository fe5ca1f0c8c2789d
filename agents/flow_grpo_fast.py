"""Flow-GRPO-Fast (Liu et al. 2025, the code of arXiv:2505.05470): Flow-GRPO in a random window of one to three steps.

A group follows one ODE trajectory up to a random step, branches there by noise, and follows the ODE after it.
"""

from dataclasses import dataclass
from typing import Literal

from agents.flow_grpo import FlowGRPO, FlowGRPOConfig
from agents.window import WindowConfig, Windowed


@dataclass
class FlowGRPOFastConfig(WindowConfig, FlowGRPOConfig):
    """Flow-GRPO-Fast's settings."""

    shared_noise: bool = True
    """A group starts from the same initial noise."""
    share_prefix: bool = True
    """Make the network calls before the window once per group."""
    window_size: int = 2
    """Neighbouring steps that are stochastic and trained, 1 to 3 in the published code."""
    window_strategy: Literal["progressive", "random", "decay", "frozen"] = "random"
    """Where the window goes."""


class FlowGRPOFast(Windowed, FlowGRPO):
    """Flow-GRPO-Fast: Flow-GRPO in a short random window."""

    name = "flow-grpo-fast"
    config_type = FlowGRPOFastConfig
    config: FlowGRPOFastConfig
