"""DiffusionNFT (Zheng et al. 2025, arXiv:2509.16117): contrast a positive and a negative policy on noised samples.

With v the network's output, v_old that of the weights that sample, and A the group's advantage,

    q = clip(A, ± A_max)/(2 A_max) + ½,      v⁺ = b v + (1 − b) v_old,      v⁻ = (1 + b) v_old − b v,
    L = A_max [ q |x̂0⁺ − x0|²/w⁺ + (1 − q) |x̂0⁻ − x0|²/w⁻ ]/b + λ |v − v_ref|²,

where x̂0± is the estimate of x0 from x_t and v±, and w± = mean |x̂0± − x0| without gradient, at least 1e-5. It needs no
log-probs, so that any sampler will do, the ODE included. After every update the sampling weights follow the trained
ones, θ_old ← η θ_old + (1 − η) θ, where η grows with the iterations.
"""

import contextlib
from dataclasses import dataclass

from torch import Tensor

from agents.final_samples import FinalSampleConfig, NoisedBatch, mean_square
from agents.normalisation import Normalised, RolloutNormalisationConfig
from agents.old_weights import OldWeights, OldWeightsConfig
from agents.rollout import Rollout


@dataclass
class NFTConfig(RolloutNormalisationConfig, OldWeightsConfig, FinalSampleConfig):
    """DiffusionNFT's settings."""

    group_size: int = 24
    """Neighbouring samples of one prompt, G. They form a group."""
    lr: float = 3e-4
    """AdamW's learning rate (published for LoRA)."""
    draws_per_sample: int = 9
    """How many (timestep, noise) pairs each sample is trained at, T, in every epoch anew; 9 of 10 as published. Each
    takes one forward and one backward pass."""
    reference_coef: float = 1e-4
    """Weight λ of mean |output − base model's output|²; with 0 the reference is not computed."""
    strength: float = 1.0
    """How far the positive and the negative policy lie from the sampling policy, b."""
    advantage_clip: float = 5.0
    """Advantages are clipped to the range from minus this to plus this, A_max."""
    adaptive: bool = True
    """Divide the squared error of each sample's x̂0 by its mean absolute error, w±."""
    old_decay: float = 0.5
    """Largest share of the sampling weights that an iteration keeps, η; the rest comes from the trained weights."""


class NFT(Normalised, OldWeights):
    """DiffusionNFT: contrast positive and negative policies."""

    name = "nft"
    config_type = NFTConfig
    config: NFTConfig
    aggregations = ("advantages", "rewards")
    joins_rewards = "a sample has one probability q of being a good one"

    def _validate(self) -> None:
        super()._validate()
        self.require_positive("strength", "advantage_clip")

    def rollout_weights(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the policy has the sampling weights."""
        return self.weights(self.old)

    def targets(self, rollout: Rollout) -> dict[str, Tensor]:
        """q ``[B]`` in [0, 1], ½ for samples that could not be scored."""
        return {"q": self.advantages(rollout)["advantage"] / (2 * self.config.advantage_clip) + 0.5}

    def loss(self, batch: NoisedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """As in `FinalSampleAgent.loss`."""
        b, q, old = self.config.strength, batch.examples["q"], batch.examples["old"]
        positive = self._error(batch, b * batch.output + (1 - b) * old)
        negative = self._error(batch, (1 + b) * old - b * batch.output)
        return self.config.advantage_clip * (q * positive + (1 - q) * negative) / b, {"q": q}

    def _error(self, batch: NoisedBatch, output: Tensor) -> Tensor:
        gap = self.policy.kernel.pred_x0(batch.noisy, output, batch.step) - batch.x0
        if not self.config.adaptive:
            return mean_square(gap)
        return mean_square(gap) / gap.detach().flatten(1).abs().mean(1).clamp(min=1e-5)
