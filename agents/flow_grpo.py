"""Flow-GRPO (Liu et al. 2025, arXiv:2505.05470): GRPO with a KL to the model before training.

    L = mean max( −A ρ, −A clip(ρ, 1 ± ε) ) + β KL(π_θ ‖ π_ref),        A = (r − group mean) / (std + 1e-4).

With the means μ, the step's std s√Δ and D latent dimensions, the KL of the paper (its eq. 11) is the Gaussians' own,
|μ_θ − μ_ref|²/(2 s²Δ), summed over dimensions. The published code takes mean[(μ_θ − μ_ref)²]/(2 s²), which is D/Δ times
smaller. The published β, 0.04 (GenEval) and 0.01 (PickScore), belong to the code's KL.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from agents.advantages import StdOver
from agents.grpo import GRPO, GRPOConfig
from denoise_env.kernels import Transition


@dataclass
class FlowGRPOConfig(GRPOConfig):
    """Flow-GRPO's settings."""

    group_size: int = 24
    """Neighbouring samples of one prompt, G. They form a group."""
    shared_noise: bool = False
    """Start all samples of a group from the same initial noise."""
    timestep_fraction: float = 1.0
    """Share of the trainable steps that each update trains: ceil(share · steps) of them, drawn at random."""
    lr: float = 3e-4
    """AdamW's learning rate (published for LoRA)."""
    advantage_std: StdOver = "rewards"
    """Which std divides the advantages: that of the group ("group"), that of all the rollout's gaps to their group's
    mean ("batch"), or that of all the rollout's rewards ("rewards", the published code's default)."""
    kl_coef: float = 0.04
    """Weight β of the KL to the model before training, scaled as kl_scaling says; with 0 the reference is not
    computed."""
    kl_scaling: Literal["code", "paper"] = "code"
    """Which KL kl_coef weighs: the published code's ("code"), or the paper's ("paper"), which is D/Δ times larger (D
    latent dimensions, step size Δ in σ)."""


class FlowGRPO(GRPO):
    """Flow-GRPO: GRPO with a KL to the base model."""

    name = "flow-grpo"
    config_type = FlowGRPOConfig
    config: FlowGRPOConfig
    std_epsilon = 1e-4

    def divergence(self, transition: Transition, reference: Transition, step: Tensor) -> Tensor:
        """The KL ``[N]`` in the scaling that ``kl_scaling`` names."""
        if self.config.kl_scaling == "paper":
            return transition.kl(reference, "sum")
        drop = -self.policy.mdp.schedule.sigmas.diff()
        return transition.kl(reference, "mean") * drop[step.cpu()].to(transition.mean)
