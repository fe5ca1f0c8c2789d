"""Advantage weighted matching (Xue et al. 2025, arXiv:2509.25050): policy gradient on the pretraining loss.

The log-likelihood of a finished sample is replaced by ℓ = −w(t) mean |output(x_t, t) − target|² at random (t, ε).
The trained weights θ and the weights that sampled see the same (t, ε):

    ρ = exp(ℓ_θ − ℓ_old),      L = mean max( −A ρ, −A clip(ρ, 1 ± ε) ) + β |output − output_ref|².
"""

from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor

from agents.advantages import StdForm, StdOver
from agents.final_samples import FinalSampleAgent, FinalSampleConfig, NoisedBatch, mean_square, precise
from agents.normalisation import NormalisationConfig, Normalised
from agents.rollout import Rollout
from agents.surrogate import clipped


@dataclass
class AWMConfig(NormalisationConfig, FinalSampleConfig):
    """AWM's settings."""

    group_size: int = 24
    """Neighbouring samples of one prompt, G. They form a group."""
    lr: float = 3e-4
    """AdamW's learning rate (published for LoRA)."""
    reference_coef: float = 0.4
    """Weight β of mean |output − base model's output|²; with 0 the reference is not computed."""
    clip_range: float = 1e-3
    """The ratio of the likelihoods exp(−mean |output − target|²) is clipped to 1 ± this value, ε."""
    advantage_std: StdOver = "rewards"
    """Which std divides the advantages: that of the group ("group"), that of all the rollout's gaps to their group's
    mean ("batch"), or that of all the rollout's rewards ("rewards", as published)."""
    std_form: StdForm = "population"
    """The std's divisor: the number of values less one ("unbiased"), or the number of values ("population", as
    published)."""
    std_epsilon: float = 1e-4
    """Added to the std that divides the advantages."""
    advantage_clip: float = 5.0
    """Advantages are clipped to the range from minus this to plus this."""


class AWM(Normalised, FinalSampleAgent):
    """AWM: a clipped policy gradient on the denoising loss, with w(t) = 1."""

    name = "awm"
    config_type = AWMConfig
    aggregations = ("advantages", "losses", "rewards")

    def _validate(self) -> None:
        super()._validate()
        self.require_positive("clip_range", "advantage_clip")

    def targets(self, rollout: Rollout) -> dict[str, Tensor]:
        """The advantages."""
        return self.advantages(rollout)

    def examples(self, rollout: Rollout, iteration: int) -> TensorDict:
        """As in `Agent.examples`; with ℓ_old where a rollout has more than one optimizer step, which then need it."""
        examples = super().examples(rollout, iteration)
        if self.config.updates_per_rollout * self.config.epochs == 1:
            return examples
        old = torch.empty(examples.shape, dtype=precise(rollout.final_latents).dtype)
        size = self.microbatch or len(examples) // self.config.updates_per_rollout  # as `update` calls the network
        with torch.no_grad():
            for start in range(0, len(examples), size):
                chunk = examples[start : start + size]
                conditioning = self.conditioning(rollout, chunk)
                for j in range(examples.shape[1]):
                    noisy, target = self.noised(
                        rollout.final_latents[chunk["episode"][:, j]], chunk["step"][:, j], chunk["noise"][:, j]
                    )
                    output = self.predict(noisy, chunk["step"][:, j], conditioning)
                    old[start : start + size, j] = -mean_square(output - target)
        return examples.set("old", old)

    def loss(self, batch: NoisedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """As in `FinalSampleAgent.loss`."""
        likelihood, advantage = -mean_square(batch.output - batch.target), batch.examples["advantage"]
        old = batch.examples.get("old", likelihood.detach())
        ratio, clip = (likelihood - old.to(likelihood)).exp(), self.config.clip_range
        figures = {"ratio": ratio.detach(), "clip_fraction": ((ratio - 1).abs() > clip).float()}
        return clipped(advantage, ratio, clip), figures
