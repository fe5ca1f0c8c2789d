"""Reward-weighted regression (Peters & Schaal 2007; for diffusion Lee et al. 2023, arXiv:2302.12192, and DDPO's RWR).

The pretraining loss on the model's own samples, weighted by their rewards:

    L = mean w |output − target|²,        w = exp(r/τ) / mean exp(r/τ).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from agents.final_samples import FinalSampleAgent, FinalSampleConfig, NoisedBatch, mean_square
from agents.rollout import Rollout


@dataclass
class RWRConfig(FinalSampleConfig):
    """RWR's settings."""

    group_size: int = 1
    """Neighbouring samples of one prompt, G. They form a group."""
    lr: float = 1e-5
    """AdamW's learning rate (published for full fine-tuning)."""
    epochs: int = 5
    """Passes over every rollout."""
    draws_per_sample: int = 1
    """How many (timestep, noise) pairs each sample is trained at, T, in every epoch anew. Each takes one forward and
    one backward pass."""
    temperature: float = 5.0
    """Temperature τ of the weights exp(r/τ), in the unit of the reward r."""
    normalise: bool = True
    """Divide the weights by their mean, so that shifting the reward or changing τ does not scale the learning rate."""


class RWR(FinalSampleAgent):
    """RWR: reward-weighted regression on finished samples."""

    name = "rwr"
    config_type = RWRConfig
    joins_rewards = "a sample has one weight, exp(r/τ)"

    def _validate(self) -> None:
        super()._validate()
        self.require_positive("temperature")

    def targets(self, rollout: Rollout) -> dict[str, Tensor]:
        """The weights ``[B]``, 0 for samples that could not be scored."""
        return {"weight": self.over_all_rows(self.weigh, rollout.scores.total, rollout.scores.valid)}

    def weigh(self, total: Tensor, valid: Tensor) -> Tensor:
        """The weights ``[B]`` of all episodes of an iteration."""
        logits = (total / self.config.temperature).where(valid, -torch.inf)
        if self.config.normalise and valid.any():
            logits = logits - (logits.logsumexp(0) - valid.sum().log())
        return logits.exp()

    def loss(self, batch: NoisedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """As in `FinalSampleAgent.loss`."""
        return batch.examples["weight"] * mean_square(batch.output - batch.target), {}
