"""Advantage weighted matching (Xue et al. 2025, arXiv:2509.25050): policy gradient on the pretraining loss.

The log-likelihood of a finished sample is replaced by its denoising error at random (t, ε), with v the network's output
e = mean |v(x_t, t) − target|²: by ℓ = −e, or as in the published code, with t the noise level σ, by

    ℓ = −4 t [ (e + 1e-10)^¼ − 1e-10^¼ ].

The trained weights θ and the weights that sampled see the same (t, ε):

    ρ = exp(ℓ_θ − ℓ_old),      L = mean max( −A ρ, −A clip(ρ, 1 ± ε) ) + β |v − v_ref|² + γ |v − v_slow|².

The slow weights follow the trained ones after every update, θ_slow ← η θ_slow + (1 − η) θ.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from tensordict import TensorDict
from torch import Tensor

from agents.draws import StepDraws
from agents.final_samples import FinalSampleConfig, NoisedBatch, mean_square, precise
from agents.normalisation import Normalised, RolloutNormalisationConfig
from agents.old_weights import OldWeights, OldWeightsConfig
from agents.rollout import Rollout
from agents.surrogate import clipped


@dataclass
class AWMConfig(RolloutNormalisationConfig, OldWeightsConfig, FinalSampleConfig):
    """AWM's settings."""

    group_size: int = 24
    """Neighbouring samples of one prompt, G. They form a group."""
    lr: float = 3e-4
    """AdamW's learning rate (published for LoRA)."""
    likelihood: Literal["ghuber", "uniform"] = "ghuber"
    """What stands for the log-likelihood: minus the denoising error ("uniform"), or about its fourth root times the
    noise level, which a few large errors cannot dominate ("ghuber", as published)."""
    step_draws: StepDraws = "stratified"
    """How a sample's T steps are drawn from n noise levels: none twice before all have come once ("even"), one from
    each of T equal parts of them ("stratified"), or most often from the middle ("logit_normal": level ⌊n u⌋, where
    log(u/(1 − u)) is standard normal)."""
    step_range: tuple[float, float] = (0.08, 0.85)
    """Which of the K noise levels are drawn from: those between these two shares of them, counted from the noisiest and
    rounded to more levels. The default is levels 1 to 11 of 14, counted from 0, as published."""
    shared_steps: bool = True
    """Draw the T steps once for all samples of a rollout, instead of for each."""
    reference_coef: float = 0.001
    """Weight β of mean |output − base model's output|²; with 0 the reference is not computed."""
    slow_coef: float = 1.0
    """Weight γ of mean |output − the slow weights' output|²; with 0 there are no slow weights."""
    clip_range: float = 1.0
    """The ratio of the likelihoods exp(ℓ) is clipped to 1 ± this value, ε."""
    advantage_clip: float = 5.0
    """Advantages are clipped to the range from minus this to plus this."""
    unit_advantages: bool = True
    """Divide the clipped advantages by advantage_clip, so that they lie between −1 and 1, as published."""


class AWM(Normalised, OldWeights):
    """AWM: a clipped policy gradient on the denoising loss."""

    name = "awm"
    config_type = AWMConfig
    config: AWMConfig
    aggregations = ("advantages", "losses", "rewards")

    def _validate(self) -> None:
        super()._validate()
        self.require_positive("clip_range", "advantage_clip")

    def idle_settings(self) -> dict[str, str]:
        """As in `Agent.idle_settings`."""
        found, config = super().idle_settings(), self.config
        if config.updates_per_rollout * config.epochs == 1 and self.chosen("clip_range"):
            found["clip_range"] = "with one optimizer step per rollout every ratio is 1"
        return found

    @property
    def needs_old(self) -> bool:
        """Whether there are slow weights."""
        return self.config.slow_coef > 0

    def targets(self, rollout: Rollout) -> dict[str, Tensor]:
        """The advantages."""
        scale = self.config.advantage_clip if self.config.unit_advantages else 1.0
        return {name: advantage / scale for name, advantage in self.advantages(rollout).items()}

    def examples(self, rollout: Rollout, iteration: int) -> TensorDict:
        """As in `Agent.examples`; with ℓ_old where a rollout has more than one optimizer step, which then need it."""
        examples = super().examples(rollout, iteration)
        if self.config.updates_per_rollout * self.config.epochs == 1:
            return examples
        before = torch.empty(examples.shape, dtype=precise(rollout.final_latents).dtype)
        size = self.microbatch or len(examples) // self.config.updates_per_rollout  # as `update` calls the network
        with torch.no_grad():
            for start in range(0, len(examples), size):
                chunk = examples[start : start + size]
                conditioning = self.conditioning(rollout, chunk)
                for j, column in enumerate(chunk.unbind(1)):
                    noisy, target = self.noised(*self.sample(rollout, column))
                    output = self.predict(noisy, column["step"], conditioning)
                    before[start : start + size, j] = self.log_likelihood(output - target, column["step"])
        return examples.set("before", before)

    def log_likelihood(self, gap: Tensor, step: Tensor) -> Tensor:
        """ℓ ``[N]`` from the outputs' errors ``gap [N, *latent]`` at ``step [N]``."""
        error = mean_square(gap)
        if self.config.likelihood == "uniform":
            return -error
        level = self.policy.mdp.schedule.sigmas[step.cpu()].to(error)
        return -4 * level * ((error + 1e-10) ** 0.25 - 1e-10**0.25)

    def loss(self, batch: NoisedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """As in `FinalSampleAgent.loss`."""
        likelihood = self.log_likelihood(batch.output - batch.target, batch.step)
        before = batch.examples.get("before", likelihood.detach())
        ratio, clip = (likelihood - before.to(likelihood)).exp(), self.config.clip_range
        figures = {"ratio": ratio.detach(), "clip_fraction": ((ratio - 1).abs() > clip).float()}
        return clipped(batch.examples["advantage"], ratio, clip), figures

    def penalty(self, batch: NoisedBatch) -> tuple[Tensor | float, dict[str, Tensor]]:
        """As in `FinalSampleAgent.penalty`, with the pull to the slow weights."""
        loss, figures = super().penalty(batch)
        if not self.old:
            return loss, figures
        distance = mean_square(batch.output - batch.examples["old"])
        return loss + self.config.slow_coef * distance, {**figures, "slow_distance": distance}
