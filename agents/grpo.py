"""GRPO for denoising: DanceGRPO (Xue et al. 2025, arXiv:2505.07818).

For every prompt a group of G samples is drawn, from the same initial noise. Each reward j is normalised within the
group,

    A_ij = (r_ij − mean_j) / (std_j + 1e-8),        A_i = Σ_j w_j A_ij,

the same A_i stands for every step of sample i, and a random subset of steps is trained with

    L = mean max( −A ρ, −A clip(ρ, 1 ± ε) ),   ρ = exp(ℓ_θ − ℓ_old).

No value function, no discount, no KL. The reduction of ℓ over latent dimensions is the policy's.
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
    """A group starts from the same initial noise (DanceGRPO)."""
    advantage_std: StdOver = "group"
    """Divide by the std of the group (DanceGRPO); by that of all the rollout's gaps to their group's mean ("batch"), so
    that groups with little left to tell weigh little; or by that of all its "rewards" (Flow-GRPO's global std)."""
    reward_aggregation: Aggregation = "advantages"
    """What several rewards are added up as: their advantages (DanceGRPO's paper), their clipped losses (its video
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
