"""Advantages from the rewards of finished episodes."""

from typing import Literal

import torch
from torch import Tensor, nn

StdOver = Literal["group", "batch", "rewards"]


def group_advantages(
    values: Tensor, valid: Tensor, group_size: int, over: StdOver = "group", epsilon: float = 1e-8
) -> Tensor:
    """(r − mean of its group) / (std + epsilon).

    Args:
        values: ``[B]`` rewards; neighbouring rows form groups.
        valid: ``[B]`` bool; the others take no part and get 0.
        group_size: G.
        over: whose std: that of the "group", unbiased; of all gaps to their groups' means ("batch"), unbiased; or of
            all "rewards", differences between prompts included, not corrected (Flow-GRPO's code).
        epsilon: added to the std.

    Returns:
        ``[B]`` float32. A group whose valid rewards are all equal, or that has fewer than two, gets exactly 0.
    """
    r, mask, count = _grouped(values, valid, group_size)
    gap = (r - r.sum(1, keepdim=True) / count.clamp(min=1)).where(mask, 0.0)
    squares, freedom = gap.square().sum(1, keepdim=True), (count - 1).clamp(min=0)
    if over == "batch":
        squares, freedom = squares.sum(), freedom.sum()
    std = (squares / freedom.clamp(min=1)).sqrt()
    if over == "rewards" and mask.any():
        std = r[mask].std(correction=0)
    high = r.where(mask, -torch.inf).amax(1, keepdim=True)
    low = r.where(mask, torch.inf).amin(1, keepdim=True)
    return (gap / (std + epsilon)).where((high > low) & mask, 0.0).flatten().float()


def leave_one_out(values: Tensor, valid: Tensor, group_size: int) -> Tensor:
    """r_i − the mean of the others of its group (Ahmadian et al. 2024, eq. 8); ``[B]``, arguments as above."""
    r, mask, count = _grouped(values, valid, group_size)
    others = (r.sum(1, keepdim=True) - r) / (count - 1).clamp(min=1)
    return (r - others).where(mask & (count > 1), 0.0).flatten().float()


def _grouped(values: Tensor, valid: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    mask = valid.view(-1, group_size)
    return values.double().view(-1, group_size).where(mask, 0.0), mask, mask.sum(1, keepdim=True)


def whiten(values: Tensor, valid: Tensor, epsilon: float = 1e-8) -> Tensor:
    """(r − mean) / (std + epsilon) over all valid entries of any shape, 0 elsewhere."""
    kept = values[valid].double()
    if len(kept) < 2 or kept.max() == kept.min():
        return torch.zeros_like(values)
    return ((values - kept.mean()) / (kept.std() + epsilon)).where(valid, 0.0).to(values.dtype)


class PromptTracker(nn.Module):
    """The last rewards of every prompt (Black et al. 2023, DDPO; there a deque per prompt).

    Args:
        prompts: how many.
        size: rewards kept per prompt.
        min_count: a prompt with fewer is normalised by the batch.
    """

    values: Tensor
    count: Tensor

    def __init__(self, prompts: int, size: int = 16, min_count: int = 16) -> None:
        super().__init__()
        self.min_count = min_count
        self.register_buffer("values", torch.zeros(prompts, size))
        self.register_buffer("count", torch.zeros(prompts, dtype=torch.long))

    def normalise(self, rewards: Tensor, valid: Tensor, prompt_index: Tensor) -> Tensor:
        """Remember a batch's rewards, and give (r − mean) / (std + 1e-6), ``[B]`` float32; population std.

        Args:
            rewards: ``[B]``.
            valid: ``[B]`` bool; the others are not remembered and get 0.
            prompt_index: ``[B]``.
        """
        size = self.values.shape[1]
        batch = rewards[valid].double()
        result = torch.zeros_like(rewards)
        for prompt in prompt_index[valid].unique().tolist():
            rows = (prompt_index == prompt) & valid
            count = int(self.count[prompt])
            seen = torch.cat([self.values[prompt, : min(count, size)], rewards[rows]])[-size:]
            self.values[prompt, : len(seen)] = seen
            self.count[prompt] = len(seen)
            known = seen.double() if len(seen) >= self.min_count else batch
            std = known.std(correction=0)
            result[rows] = ((rewards[rows].double() - known.mean()) / (std + 1e-6)).float()
        return result
