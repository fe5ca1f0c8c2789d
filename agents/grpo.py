"""GRPO for denoising: DanceGRPO (Xue et al. 2025, arXiv:2505.07818).

For every prompt a group of G samples is drawn, from the same initial noise. Each reward j is normalised within the
group,

    A_ij = (r_ij − mean_j) / (std_j + 1e-8),        A_i = Σ_j w_j A_ij,

the same A_i stands for every step of sample i, and a random subset of steps is trained with

    L = mean max( −A ρ, −A clip(ρ, 1 ± ε) ),   ρ = exp(ℓ_θ − ℓ_old).

No value function, no discount, no KL. The reduction of ℓ over latent dimensions is the policy's.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from agents.advantages import StdOver, group_advantages
from agents.rollout import Rollout
from agents.trajectory import Batch, TrajectoryAgent, TrajectoryConfig


@dataclass
class GRPOConfig(TrajectoryConfig):
    """DanceGRPO: group-relative policy optimization from shared noise."""

    shared_noise: bool = True
    """A group starts from the same initial noise (DanceGRPO)."""
    clip_range: float = 1e-4
    """ε of the clipped ratio; for the mean log-prob, whose ratio is (true ratio)^(1/D)."""
    advantage_std: StdOver = "group"
    """Divide by the std of the group (DanceGRPO); by that of all the rollout's gaps to their group's mean ("batch"), so
    that groups with little left to tell weigh little; or by that of all its "rewards" (Flow-GRPO's global std)."""
    advantage_clip: float = 5.0
    """Advantages are cut at ± this."""
    reward_aggregation: Literal["advantages", "losses"] = "advantages"
    """Add up the rewards' advantages (DanceGRPO's paper) or their clipped losses (its video code)."""


class GRPO(TrajectoryAgent):
    """See the module's text; arguments as in `Agent`, with a `GRPOConfig`."""

    name = "grpo"
    config_type = GRPOConfig
    config: GRPOConfig
    smallest_group = 2
    std_epsilon = 1e-8

    def _validate(self) -> None:
        super()._validate()
        self.require_positive("clip_range", "advantage_clip")

    def reward_advantages(self, rollout: Rollout) -> dict[str, Tensor]:
        """Each reward's own advantages ``[B]``."""
        valid = rollout.scores.valid
        options = {"group_size": self.group_size, "over": self.config.advantage_std, "epsilon": self.std_epsilon}
        return {
            name: self.over_all_rows(group_advantages, values, valid, **options)
            for name, values in rollout.scores.values.items()
        }

    def advantages(self, rollout: Rollout) -> Tensor:
        """As in `TrajectoryAgent.advantages`: the weighted sum of the rewards' advantages, clipped."""
        return self.targets(rollout)["advantage"]

    def targets(self, rollout: Rollout) -> dict[str, Tensor]:
        """As in `TrajectoryAgent.targets`; with each reward's own, where their losses are added up."""
        clip, weights = self.config.advantage_clip, self.policy.mdp.reward_weights
        found = self.reward_advantages(rollout)
        total = torch.stack([weights[name] * advantage for name, advantage in found.items()]).sum(0)
        apart = self.config.reward_aggregation == "losses"
        own = {f"advantage of {name}": weights[name] * a.clamp(-clip, clip) for name, a in found.items() if apart}
        return {"advantage": total.clamp(-clip, clip), **own}

    def ratio(self, batch: Batch) -> Tensor:
        """ρ ``[N]``."""
        return (batch.log_prob - batch.old_log_prob).exp()

    def surrogate(self, batch: Batch, ratio: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """The clipped loss ``[N]``, and where the ratio is out of its range."""
        clip = self.config.clip_range
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
        return loss, (ratio - 1).abs() > clip

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As in `TrajectoryAgent.loss`."""
        ratio = self.ratio(batch)
        if self.config.reward_aggregation == "advantages":
            loss, clipped = self.surrogate(batch, ratio, batch.advantage)
        else:
            assert batch.examples is not None
            names = [f"advantage of {name}" for name in self.policy.mdp.reward_weights]
            losses, clips = zip(*(self.surrogate(batch, ratio, batch.examples[n]) for n in names), strict=True)
            loss, clipped = torch.stack(losses).sum(0), torch.stack(clips).float().mean(0)
        return loss, {"clip_fraction": clipped.float()}
