"""Advantages from the rewards of finished episodes."""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from denoise_env.mdp import Scores

StdOver = Literal["group", "batch", "rewards"]
StdForm = Literal["unbiased", "population"]
Aggregation = Literal["advantages", "losses", "rewards"]
Loss = tuple[Tensor, dict[str, Tensor]]


def aggregate(
    how: Aggregation,
    scores: Scores,
    weights: Mapping[str, float],
    advantages: Callable[[str, Tensor], Tensor],
    clip: float = math.inf,
) -> dict[str, Tensor]:
    """One advantage per episode from several rewards.

    Args:
        how: "advantages" normalises each reward by itself and adds up the advantages, "rewards" takes the advantages
            of the weighted sum of the rewards, and "losses" keeps the rewards' advantages apart for `add_losses`.
        scores: the rewards of B episodes.
        weights: each reward's weight, by name; a reward of weight 0 takes no part.
        advantages: a function from a reward's name ("total" for the sum) and its values ``[B]`` to its advantages
            ``[B]``.
        clip: advantages are clipped to the range ±clip.

    Returns:
        ``advantage [B]``; for "losses" also each reward's weighted advantages, as ``advantage of NAME``.
    """
    if how == "rewards":
        return {"advantage": advantages("total", scores.total).clamp(-clip, clip)}
    own = {name: advantages(name, values) for name, values in scores.values.items() if weights[name]}
    total = torch.stack([weights[name] * advantage for name, advantage in own.items()]).sum(0).clamp(-clip, clip)
    if how == "advantages":
        return {"advantage": total}
    return {"advantage": total} | {f"{_OWN}{name}": weights[name] * a.clamp(-clip, clip) for name, a in own.items()}


def add_losses(examples: TensorDict, loss: Callable[[TensorDict], Loss]) -> Loss:
    """The loss of ``examples [N]``; where `aggregate` kept the rewards apart, the sum of the rewards' losses.

    Args:
        examples: they hold what `aggregate` returned.
        loss: a function that reads the examples' ``advantage`` and returns their loss ``[N]`` and figures ``[N]``.

    Returns:
        The loss, and the figures, averaged over the rewards.
    """
    own = [name for name in examples.keys() if name.startswith(_OWN)]  # noqa: SIM118
    if not own:
        return loss(examples)
    losses, figures = zip(*(loss(examples.copy().set("advantage", examples[name])) for name in own), strict=True)
    return torch.stack(losses).sum(0), {n: torch.stack([f[n] for f in figures]).mean(0) for n in figures[0]}


_OWN = "advantage of "


def group_advantages(
    values: Tensor,
    valid: Tensor,
    group_size: int,
    over: StdOver = "group",
    form: StdForm = "unbiased",
    epsilon: float = 1e-8,
) -> Tensor:
    """(r − mean of its group) / (std + epsilon).

    Args:
        values: ``[B]`` rewards; each run of G neighbouring episodes is a group.
        valid: ``[B]`` bool, the episodes that were scored; the others take no part and get 0.
        group_size: G, the number of samples per prompt.
        over: which std divides: "group" is that of the group; "batch" that of all gaps to their groups' means;
            "rewards" that of all rewards, which includes the differences between prompts.
        form: the std's divisor: "unbiased" is the number of values less one ("batch": less one for every group),
            "population" the number of values.
        epsilon: added to the std.

    Returns:
        ``[B]`` float32. A group whose valid rewards are all equal, or that has fewer than two, gets exactly 0.
    """
    r, mask, count = _grouped(values, valid, group_size)
    gap = (r - r.sum(1, keepdim=True) / count.clamp(min=1)).where(mask, 0.0)
    correction = int(form == "unbiased")
    squares, freedom = gap.square().sum(1, keepdim=True), (count - correction).clamp(min=0)
    if over == "batch":
        squares, freedom = squares.sum(), freedom.sum()
    std = (squares / freedom.clamp(min=1)).sqrt()
    if over == "rewards" and mask.sum() > correction:
        std = r[mask].std(correction=correction)
    high = r.where(mask, -torch.inf).amax(1, keepdim=True)
    low = r.where(mask, torch.inf).amin(1, keepdim=True)
    return (gap / (std + epsilon)).where((high > low) & mask, 0.0).flatten().float()


def leave_one_out(values: Tensor, valid: Tensor, group_size: int) -> Tensor:
    """Each reward minus the mean of the other rewards in its group (Ahmadian et al. 2024, eq. 8), ``[B]`` float32.

    Args:
        values: ``[B]`` rewards; each run of G neighbouring episodes is a group.
        valid: ``[B]`` bool, the episodes that were scored; the others take no part and get 0.
        group_size: G, the number of samples per prompt.
    """
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
    """The last rewards of every prompt (Black et al. 2023, DDPO, whose code keeps a deque per prompt).

    Args:
        prompts: the number of prompts.
        size: how many rewards are kept per prompt.
        min_count: a prompt with fewer rewards than this is normalised by the batch.
    """

    values: Tensor
    count: Tensor

    def __init__(self, prompts: int, size: int = 16, min_count: int = 16) -> None:
        super().__init__()
        self.min_count = min_count
        self.register_buffer("values", torch.zeros(prompts, size))
        self.register_buffer("count", torch.zeros(prompts, dtype=torch.long))

    def normalise(self, rewards: Tensor, valid: Tensor, prompt_index: Tensor) -> Tensor:
        """(r − mean) / (std + 1e-6), ``[B]`` float32.

        Mean and population std are those of the prompt's last rewards, these rewards included. A prompt that the
        tracker has no room for, or with too few rewards, is normalised by the batch. The tracker stays as it is.

        Args:
            rewards: ``[B]`` rewards.
            valid: ``[B]`` bool, the episodes that were scored; the others get 0.
            prompt_index: ``[B]``, each episode's prompt.
        """
        batch = rewards[valid].double()
        result = torch.zeros_like(rewards)
        for prompt in prompt_index[valid].unique().tolist():
            episodes = (prompt_index == prompt) & valid
            seen = self._seen(prompt, rewards[episodes])
            known = seen.double() if len(seen) >= self.min_count else batch
            std = known.std(correction=0)
            result[episodes] = ((rewards[episodes].double() - known.mean()) / (std + 1e-6)).float()
        return result

    def remember(self, rewards: Tensor, valid: Tensor, prompt_index: Tensor) -> None:
        """Keep a batch's rewards.

        Args:
            rewards: ``[B]`` rewards.
            valid: ``[B]`` bool, the episodes that were scored; the others are not kept.
            prompt_index: ``[B]``, each episode's prompt.
        """
        for prompt in prompt_index[valid].unique().tolist():
            seen = self._seen(prompt, rewards[(prompt_index == prompt) & valid])
            if len(seen):
                self.values[prompt, : len(seen)] = seen
                self.count[prompt] = len(seen)

    def _seen(self, prompt: int, rewards: Tensor) -> Tensor:
        """A prompt's last rewards, the given ones included; empty for a prompt that the tracker has no room for."""
        if prompt >= len(self.count):
            return rewards[:0]
        return torch.cat([self.values[prompt, : int(self.count[prompt])], rewards])[-self.values.shape[1] :]
