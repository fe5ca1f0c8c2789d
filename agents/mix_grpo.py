"""MixGRPO (Li et al. 2025, arXiv:2507.21802): GRPO in a sliding window of SDE steps, ODE steps outside it.

Every τ iterations the window of w steps slides towards the clean end by s steps. Noise is added, and steps are trained,
inside it only. MixGRPO-Flash makes the end of the trajectory after the window with DPM-Solver++ in fewer network calls.
"""

from dataclasses import dataclass
from typing import Any, Literal

from agents.grpo import GRPO, GRPOConfig
from agents.window import Reach, WindowConfig, Windowed
from denoise_env.solvers import spread_steps


@dataclass
class MixGRPOConfig(WindowConfig, GRPOConfig):
    """MixGRPO's settings."""

    group_size: int = 12
    """Neighbouring samples of one prompt, G. They form a group."""
    lr: float = 1e-5
    """AdamW's learning rate (published for full fine-tuning)."""
    share_prefix: bool = True
    """Make the network calls that a group has in common, those up to the window, once per group."""
    timestep_fraction: float = 1.0
    """Share of the window's steps that each update trains: ceil(share · steps) of them, drawn at random."""
    window_reach: Reach = "all_but_two"
    """Which of the trainable steps the window may hold: all of them ("all"), those among the first K/2 of the K steps
    ("first_half"), or among the first K − 2 ("all_but_two", as published)."""
    window_end: Literal["whole", "shrink"] = "shrink"
    """Where "progressive" and "decay" begin again: when the window has reached the last step it may hold ("whole"), or
    when it has slid out over it, with ever fewer steps down to one ("shrink", as published)."""
    after_window: Literal["ode", "dpm_solver"] = "ode"
    """What makes the steps after the window: the ODE kernel ("ode"), or DPM-Solver++ 2M on fewer of the noise levels
    ("dpm_solver", MixGRPO-Flash)."""
    after_window_share: float = 0.4
    """Share ρ of the n noise levels after the window that "dpm_solver" visits: max(⌊ρ n⌋, 1) of them."""


class MixGRPO(Windowed, GRPO):
    """MixGRPO: GRPO in a sliding window of stochastic steps."""

    name = "mix-grpo"
    config_type = MixGRPOConfig
    config: MixGRPOConfig

    def _validate(self) -> None:
        super()._validate()
        if not 0 < self.config.after_window_share <= 1:
            raise ValueError(f"after_window_share must lie in (0, 1], not {self.config.after_window_share}")

    def idle_settings(self) -> dict[str, str]:
        """As in `Agent.idle_settings`."""
        ode = self.config.after_window == "ode" and self.chosen("after_window_share")
        return super().idle_settings() | ({"after_window_share": 'after_window is "ode"'} if ode else {})

    def rollout_options(self, iteration: int) -> dict[str, Any]:
        """As in `Agent.rollout_options`, with the solver's steps after the window."""
        options = super().rollout_options(iteration)
        first, num_steps = self.window(iteration)[-1] + 1, self.policy.mdp.num_steps
        if self.config.after_window == "ode" or first == num_steps:
            return options
        return {**options, "solver_steps": spread_steps(first, num_steps, self.config.after_window_share)}
