"""Flow-GRPO-Fast (Liu et al. 2025, the code of arXiv:2505.05470): Flow-GRPO in a random window of one to three steps.

A group follows one ODE trajectory up to a random step, branches there by noise, and follows the ODE after it.
"""

from dataclasses import dataclass

from agents.base import SharedNoise
from agents.flow_grpo import FlowGRPO, FlowGRPOConfig
from agents.window import Reach, Strategy, WindowConfig, Windowed


@dataclass
class FlowGRPOFastConfig(WindowConfig, FlowGRPOConfig):
    """Flow-GRPO-Fast's settings."""

    shared_noise: SharedNoise = "group"
    """Which samples start from the same initial noise: none, those of a group, or all of a rollout."""
    share_prefix: bool = True
    """Make the network calls that a group has in common, those up to the window, once per group."""
    window_size: int = 2
    """Size of the window: how many neighbouring steps are stochastic and trained, 1 to 3 in the published code."""
    window_strategy: Strategy = "random"
    """How the window moves between rollouts: from the noisy end to the clean end and then from the beginning again
    ("progressive"), to a random place ("random"), to random steps that need not be neighbours ("scattered"), like
    "progressive" but ever faster towards the clean end ("decay"), or not at all, at the noisy end ("frozen")."""
    window_reach: Reach = "first_half"
    """Which of the trainable steps the window may hold: all of them ("all"), those among the first K/2 of the K steps
    ("first_half", as published), or among the first K − 2 ("all_but_two")."""
    clip_range: float = 1e-5
    """The ratio is clipped to 1 ± this value, ε."""
    kl_coef: float = 0.0
    """Weight β of the KL to the model before training, scaled as kl_scaling says; with 0 the reference is not
    computed."""


class FlowGRPOFast(Windowed, FlowGRPO):
    """Flow-GRPO-Fast: Flow-GRPO in a short random window."""

    name = "flow-grpo-fast"
    config_type = FlowGRPOFastConfig
    config: FlowGRPOFastConfig
