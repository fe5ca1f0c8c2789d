"""GRPO-Guard (Wang et al. 2025, arXiv:2510.22319): a ratio whose mean is 1 at every step, and balanced gradients.

Under π_old the mean log-ratio is −KL, which shrinks ratios below 1 and keeps the upper clip from ever binding; the bias
depends on the step. GRPO-Guard takes it out and levels the steps' scale with the std k,

    ρ = exp( k [ ℓ_θ − ℓ_old + mean((μ_θ − μ_old)²)/(2k²) ] ) = exp( mean( e · (μ_θ − μ_old) ) ),  e = (x' − μ_old)/k,

and divides the policy loss by the step's size Δ = σ − σ'.
"""

from dataclasses import dataclass

from torch import Tensor

from agents.grpo import GRPO, GRPOConfig
from agents.trajectory import Batch


@dataclass
class GRPOGuardConfig(GRPOConfig):
    """GRPO-Guard's settings."""

    clip_range: float = 2e-6
    """ε of the clipped ratio."""
    balance: bool = True
    """Divide the policy loss by the step's Δ."""


class GRPOGuard(GRPO):
    """GRPO-Guard: normalised ratios and balanced gradients."""

    name = "grpo-guard"
    own_settings = ("step_weighting",)
    config_type = GRPOGuardConfig
    config: GRPOGuardConfig
    needs_means = True

    def ratio(self, batch: Batch) -> Tensor:
        """The normalised ratio ``[N]``; 1, and so without effect on the clip, where nothing has changed."""
        assert batch.old_mean is not None
        transition = batch.transition
        noise = (batch.action.to(transition.mean) - batch.old_mean) / transition.std
        return (noise * (transition.mean - batch.old_mean)).flatten(1).mean(1).exp()

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As in `ClippedSurrogate.loss`, divided by Δ."""
        loss, figures = super().loss(batch)
        if self.config.balance:
            drop = -self.policy.mdp.schedule.sigmas.diff()
            loss = loss / drop[batch.step.cpu()].to(loss)
        return loss, figures
