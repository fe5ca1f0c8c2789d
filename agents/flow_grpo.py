"""Flow-GRPO (Liu et al. 2025, arXiv:2505.05470): GRPO with a KL to the model before training.

    L = mean max( −A ρ, −A clip(ρ, 1 ± ε) ) + β KL(π_θ ‖ π_ref),        A = (r − group mean) / (std + 1e-4).

With μ the means, std = s√Δ and D latent dimensions, the KL of the paper (its eq. 11) is the Gaussians' own,
|μ_θ − μ_ref|²/(2 s²Δ), summed over dimensions. Its code takes mean[(μ_θ − μ_ref)²]/(2 s²): smaller by D/Δ. Its β of
0.04 (GenEval) and 0.01 (PickScore) belong to the code's.
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
    """Neighbouring samples of one prompt, G."""
    shared_noise: bool = False
    """A group starts from the same initial noise."""
    timestep_fraction: float = 1.0
    """Share of the trainable steps that each update recomputes."""
    lr: float = 3e-4
    """AdamW's learning rate (published for LoRA)."""
    advantage_std: StdOver = "rewards"
    """Whose std divides the advantages; the code's default is that of all the rollout's rewards."""
    kl_coef: float = 0.04
    """Weight β of the KL to the model before training, scaled as kl_scaling says; 0 spares the reference."""
    kl_scaling: Literal["code", "paper"] = "code"
    """The KL of the published code, or the paper's, which is larger by D/Δ."""


class FlowGRPO(GRPO):
    """Flow-GRPO: GRPO with a KL to the base model."""

    name = "flow-grpo"
    config_type = FlowGRPOConfig
    config: FlowGRPOConfig
    std_epsilon = 1e-4

    def divergence(self, transition: Transition, reference: Transition, step: Tensor) -> Tensor:
        """The KL ``[N]`` in the configured scaling."""
        if self.config.kl_scaling == "paper":
            return transition.kl(reference, "sum")
        drop = -self.policy.mdp.schedule.sigmas.diff()
        return transition.kl(reference, "mean") * drop[step.cpu()].to(transition.mean)
