"""TempFlow-GRPO (He et al. 2025, arXiv:2508.04324): credit to the one step where samples branch.

Samples follow one ODE trajectory up to a step, take that step stochastically, and follow the ODE to the end: only that
step makes them, and so their rewards, differ. These siblings are compared with each other. The policy loss is weighed
by the step's std s√Δ. The published code has six siblings at every step but the last of four trajectories of a prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from agents.grpo import GRPO, GRPOConfig
from agents.normalisation import PopulationNormalisationConfig
from agents.window import Strategy, WindowConfig, Windowed
from denoise_env.kernels import Kernel


@dataclass
class TempFlowConfig(PopulationNormalisationConfig, WindowConfig, GRPOConfig):
    """TempFlow-GRPO's settings."""

    group_size: int = 6
    """Samples of one prompt, G: trajectories times window_size times branches."""
    branches: int = 0
    """How many samples branch from each step of a trajectory; with 0 all of a group, which then has one trajectory."""
    share_prefix: bool = True
    """Compute each trajectory, and the branching at its steps, once for all samples that branch from it."""
    lr: float = 3e-4
    """AdamW's learning rate (published for LoRA)."""
    timestep_fraction: float = 1.0
    """Share of each sample's stochastic steps that an update trains, rounded up; a sample has one."""
    step_weighting: Literal["uniform", "std"] = "std"
    """Weigh every step's policy loss alike ("uniform"), or by the step's std divided by the mean std of the trainable
    steps ("std")."""
    kl_coef: float = 0.004
    """Weight β of the KL to the model before training, in the log-prob's reduction; with 0 the reference is not
    computed."""
    window_size: int = 1
    """How many steps of a trajectory samples branch from; all but the last in the published code."""
    window_strategy: Strategy = "random"
    """How the window moves between rollouts: from the noisy end to the clean end and then from the beginning again
    ("progressive"), to a random place ("random"), to random steps that need not be neighbours ("scattered"), like
    "progressive" but ever faster towards the clean end ("decay"), or not at all, at the noisy end ("frozen")."""


class TempFlow(Windowed, GRPO):
    """TempFlow-GRPO: branch at one step, and weigh it by its noise."""

    name = "tempflow"
    own_settings = ("step_weighting",)
    config_type = TempFlowConfig
    config: TempFlowConfig

    def _validate(self) -> None:
        super()._validate()
        config = self.config
        if config.shared_noise == "none":
            raise ValueError('tempflow compares branches of one trajectory: shared_noise must be "group" or "rollout"')
        if config.window_end != "whole":
            raise ValueError('tempflow divides a group among the window\'s steps: window_end must be "whole"')
        per_trajectory = config.window_size * (config.branches or 1)
        if config.branches < 0 or self.group_size % per_trajectory:
            raise ValueError(
                f"group_size={self.group_size} cannot be divided into whole trajectories with branches="
                f"{config.branches} at each of window_size={config.window_size} steps"
            )
        if self.siblings < 2:
            raise ValueError("tempflow compares branches of one step: it needs at least 2 from each")

    @property
    def siblings(self) -> int:
        """How many samples branch from a step, and are compared with each other."""
        return self.config.branches or self.group_size // self.config.window_size

    def rollout_options(self, iteration: int) -> dict[str, Any]:
        """As in `Agent.rollout_options`: branches at the window's steps."""
        return {**super().rollout_options(iteration), "shared_noise": False, "siblings": self.siblings}

    def select_steps(self, seeds: Sequence[int], kernel: Kernel | None = None) -> Tensor:
        """As in `TrajectoryAgent.select_steps`: the step ``[B, 1]`` that each sample branches from."""
        steps, choose = self.steps_of(kernel or self.policy.kernel).tolist(), super().select_steps
        each = torch.stack([choose(seeds, self.policy.kernel.only([step])) for step in steps])
        rows = torch.arange(len(seeds))
        return each[rows // self.siblings % len(steps), rows]
