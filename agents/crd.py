"""Centered reward distillation, CRD (Zhu et al. 2026, arXiv:2603.14128): the change of the model becomes the reward.

A sample's implied reward is how much better the network's output v matches it, noised, than the output of old weights:

    r_θ = − mean[ |v − target|²/w − |v_old − target|²/w_old ],        w = mean |v − target| without gradient, ≥ 1e-5.

It is fitted to the group's advantages A, a = clip(A, ± A_max)/(2 A_max) + ½, after both have lost their means, with
which the unknown normalisation of the reward goes:

    L = (A_max/β) mean( β (r_θ − r̄_θ) − (a − ā) )² + κ mean (m + a (1 − m)) |v − v_ref|²,        m = κ_min/κ.

The means r̄_θ (without gradient) and ā are those of all samples of an optimizer step at a draw, as in the published
code, or of each group, as in the paper. Two copies follow the trained weights: the old ones, and those that roll out.
"""

import contextlib
import functools
from dataclasses import dataclass
from typing import Any, Literal

from tensordict import TensorDict
from torch import Tensor

from agents.comparing import ComparingAgent
from agents.final_samples import Context, FinalSampleConfig, NoisedBatch, mean_square
from agents.normalisation import Normalised, RolloutNormalisationConfig
from agents.old_weights import OldWeightsConfig
from agents.rollout import Rollout
from denoise_env.weights import copies, follow


@dataclass
class CRDConfig(RolloutNormalisationConfig, OldWeightsConfig, FinalSampleConfig):
    """CRD's settings."""

    group_size: int = 24
    """Neighbouring samples of one prompt, G. They form a group."""
    lr: float = 3e-4
    """AdamW's learning rate (published for LoRA)."""
    draws_per_sample: int = 20
    """How many (timestep, noise) pairs each sample is trained at, T, in every epoch anew. Each takes one forward and
    one backward pass."""
    beta: float = 1.0
    """How much reward a unit of the implied reward stands for, β."""
    centring: Literal["update", "group"] = "update"
    """Whose means are taken off implied rewards and advantages: those of all samples of an optimizer step ("update",
    the published code), or of each group ("group", the paper)."""
    reference_coef: float = 0.1
    """Weight κ of mean |output − base model's output|² for the best samples; with 0 the reference is not computed."""
    reference_floor: float = 1e-4
    """Weight κ_min of it for the worst samples."""
    advantage_clip: float = 5.0
    """Advantages are clipped to the range from minus this to plus this, A_max."""
    old_decay: float = 0.999
    """Largest share of the old weights that an iteration keeps, η; the rest comes from the trained weights."""
    old_decay_start: float = 0.25
    """The share η before it grows."""
    old_decay_slope: float = 0.005
    """Growth of the share η per iteration, until it reaches old_decay. With 0 it does not grow."""
    sampler_decay: float = 0.999
    """Largest share of the weights that roll out which an iteration keeps; the rest comes from the trained weights."""
    sampler_decay_slope: float = 0.0075
    """Growth of this share per iteration, from 0 until it reaches sampler_decay."""
    sampler_decay_after: int = 75
    """How many iterations pass before this share begins to grow; up to then the newest weights roll out."""


class CRD(Normalised, ComparingAgent):
    """CRD: fit the change of the denoising error to the reward, both without their means."""

    name = "crd"
    config_type = CRDConfig
    config: CRDConfig
    aggregations = ("advantages", "rewards")
    joins_rewards = "a sample has one implied reward"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.sampler = self.kept["sampler"] = copies(self.trained)

    def _validate(self) -> None:
        super()._validate()
        self.require_positive("beta", "advantage_clip")
        if self.config.sampler_decay >= 1:
            raise ValueError(f"sampler_decay must lie in [0, 1), not {self.config.sampler_decay}")

    def rollout_weights(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the policy has the sampling weights."""
        return self.weights(self.sampler)

    def decay(self, iteration: int) -> float:
        """As in `OldWeights.decay`, from ``old_decay_start`` on."""
        config = self.config
        grown = config.old_decay_slope * max(iteration - config.old_decay_after, 0)
        return min(config.old_decay_start + grown, config.old_decay)

    def targets(self, rollout: Rollout) -> dict[str, Tensor]:
        """a ``[B]`` in [0, 1], and whether the samples could be ``scored [B]``; the others take no part."""
        a = self.advantages(rollout)["advantage"] / (2 * self.config.advantage_clip) + 0.5
        return {"a": a, "scored": rollout.scores.valid.to(a)}

    def distance(self, gap: Tensor) -> Tensor:
        """|v − target|²/w, ``[N]``."""
        return mean_square(gap) / gap.detach().flatten(1).abs().mean(1).clamp(min=1e-5)

    def measured(self) -> dict[str, Context]:
        """As in `ComparingAgent.measured`: the old weights' distances."""
        return {"old": functools.partial(self.weights, self.old)}

    def compare(self, examples: TensorDict) -> dict[str, Tensor]:
        """The means of implied rewards and of a, ``[N, T]``."""
        implied, scored = examples["old"] - examples["now"], examples["scored"]
        means = {}
        for name, values in {"implied": implied, "a": examples["a"]}.items():
            means[f"mean {name}"] = self._mean(values * scored) / self._mean(scored).clamp(min=1e-12)
        return means

    def _mean(self, values: Tensor) -> Tensor:
        """The means ``[N, T]`` over the samples ``[N, T]`` that centring names, of all ranks."""
        if self.config.centring == "group":
            groups = values.view(-1, self.group_size, values.shape[1])
            return groups.mean(1).repeat_interleave(self.group_size, 0)
        return self.ranks.each(values.mean(0)).mean(0).expand_as(values)

    def loss(self, batch: NoisedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """As in `FinalSampleAgent.loss`."""
        config, examples = self.config, batch.examples
        implied = examples["old"] - self.distance(batch.output - batch.target)
        gap = config.beta * (implied - examples["mean implied"]) - (examples["a"] - examples["mean a"])
        loss = config.advantage_clip / config.beta * gap.square() * examples["scored"]
        return loss, {"implied_reward": implied.detach(), "a": examples["a"]}

    def penalty(self, batch: NoisedBatch) -> tuple[Tensor | float, dict[str, Tensor]]:
        """As in `FinalSampleAgent.penalty`, less for worse samples."""
        loss, figures = super().penalty(batch)
        if not figures:
            return loss, figures
        least = self.config.reference_floor / self.config.reference_coef
        return loss * (least + batch.examples["a"] * (1 - least)), figures

    def update(self, rollout: Rollout, iteration: int) -> dict[str, float]:
        """As in `OldWeights.update`; the sampling weights follow too."""
        figures, config = super().update(rollout, iteration), self.config
        decay = min(config.sampler_decay_slope * max(iteration - config.sampler_decay_after, 0), config.sampler_decay)
        follow(self.sampler, self.trained, decay)
        return {**figures, "sampler_decay": decay}
