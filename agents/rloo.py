"""RLOO: REINFORCE with the leave-one-out baseline (Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740, eq. 8).

    L = −mean A_i ℓ_θ,        A_i = r_i − mean of the other G − 1 rewards of i's prompt.

The baseline does not depend on sample i, so the gradient is unbiased. Nothing is clipped or divided by a std. Every
rollout has one optimizer step.
"""

from dataclasses import dataclass

from torch import Tensor

from agents.advantages import leave_one_out
from agents.rollout import Rollout
from agents.trajectory import Batch, TrajectoryAgent, TrajectoryConfig


@dataclass
class RLOOConfig(TrajectoryConfig):
    """RLOO's settings."""

    timestep_fraction: float = 1.0
    """Share of the trainable steps that each update trains, drawn at random."""


class RLOO(TrajectoryAgent):
    """RLOO: REINFORCE with a leave-one-out baseline."""

    name = "rloo"
    config_type = RLOOConfig
    smallest_group = 2
    on_policy = True

    def reward_advantages(self, name: str, rewards: Tensor, rollout: Rollout) -> Tensor:
        """As in `Agent.reward_advantages`: the reward minus the mean of the others in its group."""
        return leave_one_out(rewards, rollout.scores.valid, self.group_size)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As in `TrajectoryAgent.loss`: −A ℓ_θ."""
        return -batch.advantage * batch.log_prob, {}
