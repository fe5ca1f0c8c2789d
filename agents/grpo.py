"""GRPO for denoising: DanceGRPO (Xue et al. 2025, arXiv:2505.07818).

For every prompt a group of G samples is drawn from the same initial noise. Each reward j is normalised within the
group,

    A_ij = (r_ij − mean_j) / (std_j + 1e-8),        A_i = Σ_j w_j A_ij,

the same A_i stands for every step of sample i, and a random subset of steps is trained with

    L = mean max( −A ρ, −A clip(ρ, 1 ± ε) ),   ρ = exp(ℓ_θ − ℓ_old).

There is no value function, no discount and no KL. The reduction of ℓ over latent dimensions is the policy's.
"""

from dataclasses import dataclass

from torch import Tensor

from agents.advantages import Aggregation, StdOver, group_advantages
from agents.rollout import Rollout
from agents.surrogate import ClippedSurrogate, SurrogateConfig


@dataclass
class GRPOConfig(SurrogateConfig):
    """DanceGRPO's settings."""

    shared_noise: bool = True
    """Start all samples of a group from the same initial noise, as DanceGRPO does."""
    advantage_std: StdOver = "group"
    """Which std divides the advantages: that of the group ("group", DanceGRPO), that of all the rollout's gaps to their
    group's mean ("batch", where groups whose samples hardly differ weigh little), or that of all the rollout's rewards
    ("rewards", Flow-GRPO's global std)."""
    reward_aggregation: Aggregation = "advantages"
    """How several rewards become one loss: add up their advantages (DanceGRPO's paper), their clipped losses (its video
    code), or the rewards themselves."""


class GRPO(ClippedSurrogate):
    """DanceGRPO: group-relative policy optimization from shared noise."""

    name = "grpo"
    config_type = GRPOConfig
    config: GRPOConfig
    smallest_group = 2
    std_epsilon = 1e-8

    def reward_advantages(self, name: str, rewards: Tensor, rollout: Rollout) -> Tensor:
        """As in `Agent.reward_advantages`, normalised within the group."""
        options = {"group_size": self.group_size, "over": self.config.advantage_std, "epsilon": self.std_epsilon}
        return self.over_all_rows(group_advantages, rewards, rollout.scores.valid, **options)
