"""GRPO for denoising, after DanceGRPO (Xue et al. 2025, arXiv:2505.07818) and Flow-GRPO (arXiv:2505.05470).

For every prompt a group of G samples is drawn. Each reward j is normalised within the group,

    A_ij = (r_ij − mean_j) / (std_j + 1e-8),        A_i = Σ_j w_j A_ij,

the same A_i stands for every step of sample i, and a random subset of steps is trained with

    L = mean max( −A ρ, −A clip(ρ, 1 ± ε) ) + β KL(π_θ ‖ π_ref),   ρ = exp(ℓ_θ − ℓ_old).

No value function, no discount. The reduction of ℓ over latent dimensions is the policy's.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from agents.base import Agent, AgentConfig, Batch
from agents.policy import DenoisingPolicy
from agents.rollout import Rollout


@dataclass
class GRPOConfig(AgentConfig):
    """Group-relative policy optimization."""

    group_size: int = 16
    """Samples per prompt, G."""
    shared_noise: bool = True
    """A group starts from the same initial noise (DanceGRPO)."""
    clip_range: float = 1e-4
    """ε of the clipped ratio; for the mean log-prob, whose ratio is (true ratio)^(1/D)."""
    advantage_std: Literal["group", "batch"] = "group"
    """Divide by the std of the group (DanceGRPO), or by that of all the rollout's gaps to their group's mean, so
    that groups with little left to tell weigh little (Flow-GRPO's global std)."""
    advantage_clip: float = 5.0
    """Advantages are cut at ± this."""


def group_advantages(
    values: Tensor, valid: Tensor, group_size: int, over: Literal["group", "batch"] = "group"
) -> Tensor:
    """(r − mean of its group) / (std + 1e-8), with the unbiased std.

    Args:
        values: ``[B]`` rewards; neighbouring rows form groups.
        valid: ``[B]`` bool; the others take no part and get 0.
        group_size: G.
        over: whose std, the group's or that of all gaps to their groups' means.

    Returns:
        ``[B]`` float32. A group whose valid rewards are all equal, or that has fewer than two, gets exactly 0.
    """
    mask = valid.view(-1, group_size)
    r = values.double().view(-1, group_size).where(mask, 0.0)
    count = mask.sum(1, keepdim=True)
    gap = (r - r.sum(1, keepdim=True) / count.clamp(min=1)).where(mask, 0.0)
    squares, freedom = gap.square().sum(1, keepdim=True), (count - 1).clamp(min=0)
    if over == "batch":
        squares, freedom = squares.sum(), freedom.sum()
    std = (squares / freedom.clamp(min=1)).sqrt()
    high = r.where(mask, -torch.inf).amax(1, keepdim=True)
    low = r.where(mask, torch.inf).amin(1, keepdim=True)
    return (gap / (std + 1e-8)).where((high > low) & mask, 0.0).flatten().float()


class GRPO(Agent):
    """See the module's text; arguments as in `Agent`, with a `GRPOConfig`."""

    name = "grpo"
    config: GRPOConfig

    def __init__(
        self,
        policy: DenoisingPolicy,
        config: GRPOConfig | None = None,
        seed: int = 0,
        microbatch: int | None = None,
    ) -> None:
        config = config or GRPOConfig()
        self.group_size, self.shared_noise = config.group_size, config.shared_noise
        super().__init__(policy, config, seed, microbatch)

    def _validate(self) -> None:
        super()._validate()
        if self.group_size < 2:
            raise ValueError(
                f"GRPO compares samples of one prompt: group_size must be at least 2, not {self.group_size}"
            )
        if self.config.clip_range <= 0 or self.config.advantage_clip <= 0:
            raise ValueError("clip_range and advantage_clip must be positive")

    def advantages(self, rollout: Rollout) -> Tensor:
        """As in `Agent.advantages`: the weighted sum of each reward's group advantages, clipped."""
        weights, scores = self.policy.mdp.reward_weights, rollout.scores
        total = torch.zeros_like(scores.total)
        for name, values in scores.values.items():
            total += weights[name] * group_advantages(values, scores.valid, self.group_size, self.config.advantage_std)
        return total.clamp(-self.config.advantage_clip, self.config.advantage_clip)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As in `Agent.loss`: the clipped surrogate."""
        ratio = (batch.log_prob - batch.old_log_prob).exp()
        clip = self.config.clip_range
        loss = torch.maximum(-batch.advantage * ratio, -batch.advantage * ratio.clamp(1 - clip, 1 + clip))
        return loss, {"clip_fraction": ((ratio - 1).abs() > clip).float()}
