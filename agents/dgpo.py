"""DGPO (Luo et al. 2025, arXiv:2510.08425): direct preference optimization between the good and the bad of a group.

With d the error |v − target|² of the network's output v at a noised sample, averaged over dimensions, A the group's
advantages, and θ_ref the weights before training, the loss is −log σ(−S) of a group's

    S = (β/G) Σ_i A_i (d_i − d_ref,i),        whose gradient is that of        L = mean_i σ(S) A_i d_i,

S without gradient, + κ |v − v_ref|². A group shares one noise ε at all its steps, and all groups share the steps, which
are drawn from the noisier ones. As PPO's, the pull at a sample ends where the ratio ρ = exp(d_old − d) to weights that
follow the trained ones has left 1 ± ε in the direction of the pull. After some hundred updates these weights roll out.
"""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor

from agents.comparing import ComparingAgent
from agents.final_samples import Context, FinalSampleConfig, NoisedBatch, mean_square
from agents.normalisation import Normalised, PopulationNormalisationConfig
from agents.old_weights import OldWeightsConfig
from agents.rollout import Rollout


@dataclass
class DGPOConfig(PopulationNormalisationConfig, OldWeightsConfig, FinalSampleConfig):
    """DGPO's settings."""

    lr: float = 3e-4
    """AdamW's learning rate (published for LoRA)."""
    draws_per_sample: int = 4
    """How many timesteps each sample is trained at, T. Each takes one forward and one backward pass."""
    step_range: tuple[float, float] = (0.0, 0.5)
    """Which of the K noise levels are drawn from: those between these two shares of them, counted from the noisiest and
    rounded to more levels. Published: the noisier half (GenEval), or 0 to 0.7."""
    shared_steps: bool = True
    """Draw the T steps once for all samples of a rollout, instead of for each."""
    shared_draws: bool = True
    """Give all samples of a group one noise, the same at all T steps, instead of one for every sample and step."""
    reference_coef: float = 0.02
    """Weight κ of mean |output − base model's output|²; with 0 only its error is computed."""
    beta: float = 100.0
    """Strength β of a group's preference; 10 for PickScore."""
    clip_range: float = 1e-2
    """The ratio exp(d_old − d) ends a sample's pull outside 1 ± this value, ε."""
    advantage_clip: float = 5.0
    """Advantages are clipped to the range from minus this to plus this."""
    old_rolls_out_after: int = 500
    """After how many optimizer steps the old weights collect the rollouts, instead of the trained ones."""


class DGPO(Normalised, ComparingAgent):
    """DGPO: a preference between the good and the bad samples of a group."""

    name = "dgpo"
    config_type = DGPOConfig
    config: DGPOConfig
    needs_reference = True
    aggregations = ("advantages", "rewards")
    joins_rewards = "a group has one weight, σ(S)"

    def _validate(self) -> None:
        super()._validate()
        self.require_positive("beta", "clip_range", "advantage_clip")

    def rollout_weights(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the policy has the weights that collect the rollout."""
        made = [state["step"] for state in self.optimizer.state.values()]
        steps = int(torch.stack(made).max()) if made else 0
        return self.weights(self.old if steps >= self.config.old_rolls_out_after else {})

    def targets(self, rollout: Rollout) -> dict[str, Tensor]:
        """The advantages."""
        return self.advantages(rollout)

    def draw_noise(self, seeds: Sequence[int], times: int) -> Tensor:
        """As in `FinalSampleAgent.draw_noise`; with ``shared_draws`` one noise for every group."""
        if not self.config.shared_draws:
            return super().draw_noise(seeds, times)
        noise = super().draw_noise(seeds[:: self.group_size], 1)
        return noise.expand(-1, times, *noise.shape[2:]).repeat_interleave(self.group_size, 0)

    def distance(self, gap: Tensor) -> Tensor:
        """d ``[N]``."""
        return mean_square(gap)

    def measured(self) -> dict[str, Context]:
        """As in `ComparingAgent.measured`: d_ref and d_old."""
        return {"base": self.policy.model.reference, "old": functools.partial(self.weights, self.old)}

    def compare(self, examples: TensorDict) -> dict[str, Tensor]:
        """σ(S) of each sample's group, ``[N, T]``."""
        gain = examples["advantage"] * (examples["now"] - examples["base"])
        groups = self.config.beta * gain.view(-1, self.group_size, gain.shape[1]).mean(1)
        return {"share": groups.sigmoid().repeat_interleave(self.group_size, 0)}

    def loss(self, batch: NoisedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """As in `FinalSampleAgent.loss`."""
        distance, advantage = mean_square(batch.output - batch.target), batch.examples["advantage"]
        ratio = (batch.examples["old"] - distance).exp().detach()
        far = ((ratio - 1) * advantage.sign() > self.config.clip_range) & (advantage != 0)
        loss = batch.examples["share"] * advantage * distance.detach().where(far, distance)
        return loss, {"ratio": ratio, "clip_fraction": far.float(), "share": batch.examples["share"]}
