"""MixGRPO (Li et al. 2025, arXiv:2507.21802): GRPO in a sliding window of SDE steps, ODE steps outside it.

The window of w steps slides from noisy to clean by a stride every τ iterations; sampling noise and loss stay inside it.
"""

from dataclasses import dataclass

from agents.grpo import GRPO, GRPOConfig
from agents.window import WindowConfig, Windowed


@dataclass
class MixGRPOConfig(WindowConfig, GRPOConfig):
    """MixGRPO's settings."""

    group_size: int = 12
    """Neighbouring samples of one prompt, G."""
    share_prefix: bool = True
    """Make the network calls before the window once per group."""
    timestep_fraction: float = 1.0
    """Share of the window's steps that each update recomputes."""


class MixGRPO(Windowed, GRPO):
    """MixGRPO: GRPO in a sliding window of stochastic steps."""

    name = "mix-grpo"
    config_type = MixGRPOConfig
    config: MixGRPOConfig
