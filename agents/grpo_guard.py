"""GRPO-Guard (Wang et al. 2025, arXiv:2510.22319): a ratio whose mean is 1 at every step, and balanced gradients.

Under π_old the mean log-ratio is −KL, which shrinks ratios below 1 and keeps the upper clip from ever binding; how far
depends on the step. GRPO-Guard removes this bias and brings all steps to one scale with the step's std. For the step
from x to x', with e = (x' − μ_old)/std,

    ρ = exp( std · [ ℓ_θ − ℓ_old + mean((μ_θ − μ_old)²)/(2 std²) ] ) = exp( mean( e · (μ_θ − μ_old) ) ).

The policy loss is divided by the step's size, which on a flow is Δ = σ − σ', the drop of the noise level, as published.
On a diffusion it is how far the mean moves with the network's output, |∂μ/∂output|, which Δ does not tell there.
"""

from dataclasses import dataclass

from torch import Tensor

from agents.base import SharedNoise
from agents.grpo import GRPO, GRPOConfig
from agents.normalisation import PopulationNormalisationConfig
from agents.trajectory import Batch


@dataclass
class GRPOGuardConfig(PopulationNormalisationConfig, GRPOConfig):
    """GRPO-Guard's settings."""

    group_size: int = 24
    """Neighbouring samples of one prompt, G. They form a group."""
    shared_noise: SharedNoise = "none"
    """Which samples start from the same initial noise: none, those of a group, or all of a rollout."""
    timestep_fraction: float = 1.0
    """Share of the trainable steps that each update trains, drawn at random."""
    lr: float = 1e-4
    """AdamW's learning rate (published for LoRA)."""
    clip_range: float = 2e-6
    """The normalised ratio is clipped to 1 ± this value, ε."""
    balance: bool = True
    """Divide the policy loss of each step by the step's size (`denoise_env.kernels.Kernel.step_sizes`)."""


class GRPOGuard(GRPO):
    """GRPO-Guard: normalised ratios and balanced gradients."""

    name = "grpo-guard"
    own_settings = ("step_weighting",)
    config_type = GRPOGuardConfig
    config: GRPOGuardConfig
    needs_means = True

    def ratio(self, batch: Batch) -> Tensor:
        """The normalised ratio ``[N]``; it is 1 where the policy has not changed."""
        assert batch.old_mean is not None
        transition = batch.transition
        noise = (batch.action.to(transition.mean) - batch.old_mean) / transition.std
        return transition.reduce(noise * (transition.mean - batch.old_mean)).exp()

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As in `ClippedSurrogate.loss`, divided by the step's size."""
        loss, figures = super().loss(batch)
        if self.config.balance:
            loss = loss / self.policy.kernel.step_sizes[batch.step.cpu()].to(loss)
        return loss, figures
