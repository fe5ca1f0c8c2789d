"""MixGRPO (Li et al. 2025, arXiv:2507.21802): GRPO in a sliding window of SDE steps, ODE steps outside it.

Every τ iterations the window of w steps slides towards the clean end by s steps. Noise is added, and steps are trained,
inside it only.
"""

from dataclasses import dataclass

from agents.grpo import GRPO, GRPOConfig
from agents.window import WindowConfig, Windowed


@dataclass
class MixGRPOConfig(WindowConfig, GRPOConfig):
    """MixGRPO's settings."""

    group_size: int = 12
    """Neighbouring samples of one prompt, G. They form a group."""
    share_prefix: bool = True
    """Make the network calls that a group has in common, those up to the window, once per group."""
    timestep_fraction: float = 1.0
    """Share of the window's steps that each update trains: ceil(share · steps) of them, drawn at random."""


class MixGRPO(Windowed, GRPO):
    """MixGRPO: GRPO in a sliding window of stochastic steps."""

    name = "mix-grpo"
    config_type = MixGRPOConfig
    config: MixGRPOConfig
