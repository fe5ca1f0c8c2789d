"""Flow-GRPO (Liu et al. 2025, arXiv:2505.05470): GRPO with a KL to the model before training.

    L = mean max( −A ρ, −A clip(ρ, 1 ± ε) ) + β KL(π_θ ‖ π_ref),        A = (r − group mean) / (std + 1e-4).

With the means μ, the step's std s√Δ and D latent dimensions, the KL of the paper (its eq. 11) is the Gaussians' own,
|μ_θ − μ_ref|²/(2 s²Δ), summed over dimensions. The published code takes mean[(μ_θ − μ_ref)²]/(2 s²), which is D/Δ times
smaller. The published β, 0.04 (GenEval) and 0.01 (PickScore), belong to the code's KL. On a diffusion the step's size
|∂μ/∂output| takes the place of Δ.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from tensordict import TensorDict
from torch import Tensor

from agents.base import SharedNoise
from agents.grpo import GRPO, GRPOConfig
from agents.normalisation import RolloutNormalisationConfig
from agents.rollout import Rollout
from denoise_env.kernels import Transition


@dataclass
class FlowGRPOConfig(RolloutNormalisationConfig, GRPOConfig):
    """Flow-GRPO's settings."""

    group_size: int = 24
    """Neighbouring samples of one prompt, G. They form a group."""
    shared_noise: SharedNoise = "none"
    """Which samples start from the same initial noise: none, those of a group, or all of a rollout."""
    timestep_fraction: float = 1.0
    """Share of the trainable steps that each update trains, drawn at random."""
    lr: float = 3e-4
    """AdamW's learning rate (published for LoRA)."""
    drop_zero_advantages: bool = True
    """Leave samples whose advantage is exactly 0 out of the update, as the published code does: the KL does not pull at
    them, and the loss is the mean over the others."""
    kl_coef: float = 0.04
    """Weight β of the KL to the model before training, scaled as kl_scaling says; with 0 the reference is not
    computed."""
    kl_scaling: Literal["code", "mean", "paper"] = "code"
    """Which KL kl_coef weighs: that of the steps' Gaussians, as in the paper ("paper"); this divided by the number of
    latent dimensions, as in the published code with CPS ("mean"); or that times the step's size, as in the code with
    its SDE ("code")."""


class FlowGRPO(GRPO):
    """Flow-GRPO: GRPO with a KL to the base model."""

    name = "flow-grpo"
    config_type = FlowGRPOConfig
    config: FlowGRPOConfig

    def divergence(self, transition: Transition, reference: Transition, step: Tensor) -> Tensor:
        """The KL ``[N]`` in the scaling that ``kl_scaling`` names."""
        if self.config.kl_scaling == "paper":
            return transition.kl(reference, "sum")
        kl = transition.kl(reference, "mean")
        return kl if self.config.kl_scaling == "mean" else kl * self.policy.kernel.step_sizes[step.cpu()].to(kl)

    def idle_settings(self) -> dict[str, str]:
        """As in `Agent.idle_settings`."""
        idle = {"kl_scaling": "kl_coef is 0"} if self.chosen("kl_scaling") and not self.config.kl_coef else {}
        return super().idle_settings() | idle

    def targets(self, rollout: Rollout) -> dict[str, Tensor]:
        """As in `TrajectoryAgent.targets`; with ``drop_zero_advantages`` also each sample's ``weight [B]``."""
        found = super().targets(rollout)
        if self.config.drop_zero_advantages:
            some = torch.stack([advantage != 0 for advantage in found.values()]).any(0)
            found["weight"] = self.over_all_rows(self._weights, some)
        return found

    def _weights(self, some: Tensor) -> Tensor:
        """1 divided by the share of ``some [B]`` among the episodes of the same optimizer step, 0 for the others."""
        part = some.view(self.config.updates_per_rollout, -1)
        return (part / part.float().mean(1, keepdim=True)).where(part, 0.0).flatten()

    def example_loss(
        self, rollout: Rollout, examples: TensorDict, conditioning: TensorDict
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As in `TrajectoryAgent.example_loss`, times the samples' weights."""
        loss, figures = super().example_loss(rollout, examples, conditioning)
        return (loss * examples["weight"] if self.config.drop_zero_advantages else loss), figures
