"""Rewards made of rewards. An expression names them: ``threshold(clip_score, 0.3)``."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from denoise_env.arguments import number
from denoise_env.prompts import Prompt
from denoise_env.rewards.base import Reward, Takes, computes_elsewhere, frames

REDUCTIONS = {
    "mean": lambda scores: scores.mean(1),
    "min": lambda scores: scores.amin(1),
    "max": lambda scores: scores.amax(1),
    "first": lambda scores: scores[:, 0],
    "last": lambda scores: scores[:, -1],
}
"""How the scores ``[B, F]`` of a clip's frames become one; a frame without a score leaves the clip without one where it
counts."""


class Combinator:
    """What a reward made of others says of itself: it takes, cites and compares what they do."""

    range: tuple[float, float] = (-float("inf"), float("inf"))

    def __init__(self, *rewards: Reward) -> None:
        for reward in rewards:
            if not callable(reward):
                raise ValueError(f"{type(self).__name__} takes rewards, not {reward!r}")
            if getattr(reward, "only_pairs", False) and not isinstance(self, WinRate):
                raise ValueError(f"{type(self).__name__} takes scores, and a judge of pairs gives none: put win_rate "
                                 "around the judge")  # fmt: skip
        self.rewards = rewards
        kinds: list[Takes] = [getattr(reward, "takes", "either") for reward in rewards]
        if {"images", "clips"} <= {*kinds}:
            raise ValueError("one of the rewards takes images and another clips: put per_frame around the former")
        self.takes: Takes = next((kind for kind in kinds if kind != "either"), "either")
        self.citation = "; ".join(filter(None, dict.fromkeys(getattr(reward, "citation", "") for reward in rewards)))
        self.compares_group = any(getattr(reward, "compares_group", False) for reward in rewards)

    def check(self) -> None:
        """Check the rewards that can be checked at the start."""
        for reward in self.rewards:
            if callable(check := getattr(reward, "check", None)):
                check()

    def elsewhere(self, device: torch.device) -> bool:
        """Whether one of the rewards computes elsewhere."""
        return any(computes_elsewhere(reward, device) for reward in self.rewards)


class Threshold(Combinator):
    """The binary reward: 1 where a reward is above a value, else 0.

    DanceGRPO, arXiv 2505.07818, trains on HPS above 0.28 and CLIP above 0.39.

    Args:
        reward: the reward.
        above: what it must be above; equal is not enough.
    """

    range = (0.0, 1.0)

    def __init__(self, reward: Reward, above: float) -> None:
        super().__init__(reward)
        self.above = number(above, "the threshold")

    def __call__(self, images: Tensor, prompts: Sequence[Prompt], **group: int) -> Tensor:
        """As in `Reward`; NaN stays NaN."""
        score = call(self.rewards[0], images, prompts, **group)
        return (score > self.above).float().where(~score.isnan(), torch.nan)


class Scale(Combinator):
    """A reward times a factor, plus an offset."""

    def __init__(self, reward: Reward, factor: float, offset: float = 0.0) -> None:
        super().__init__(reward)
        self.factor, self.offset = number(factor, "the factor"), number(offset, "the offset")
        if self.factor:
            low, high = getattr(reward, "range", self.range)
            ends = sorted((low * self.factor + self.offset, high * self.factor + self.offset))
            self.range = (ends[0], ends[1])

    def __call__(self, images: Tensor, prompts: Sequence[Prompt], **group: int) -> Tensor:
        """As in `Reward`."""
        return call(self.rewards[0], images, prompts, **group) * self.factor + self.offset


class Clip(Combinator):
    """A reward clipped to [low, high]."""

    def __init__(self, reward: Reward, low: float, high: float) -> None:
        super().__init__(reward)
        self.range = (number(low, "the lower end"), number(high, "the upper end"))
        if not low < high:
            raise ValueError(f"the lower end must be below the upper end, not {low} and {high}")

    def __call__(self, images: Tensor, prompts: Sequence[Prompt], **group: int) -> Tensor:
        """As in `Reward`; NaN stays NaN."""
        return call(self.rewards[0], images, prompts, **group).clamp(*self.range)


class WeightedSum(Combinator):
    """Rewards added up, as in weighted_sum([hps, clip_score], [0.7, 1.4]).

    Agents normalise it as one reward. Several ``--rewards`` instead stay apart up to their advantages or losses, as
    ``reward_aggregation`` says.

    Args:
        rewards: the rewards.
        weights: as many numbers; default: 1 each.
    """

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float] | None = None) -> None:
        if not isinstance(rewards, (list, tuple)) or not rewards:
            raise ValueError(f"weighted_sum takes a list of rewards, not {rewards!r}")
        super().__init__(*rewards)
        weights = [1.0] * len(rewards) if weights is None else weights
        if not isinstance(weights, (list, tuple)) or len(weights) != len(rewards):
            raise ValueError(f"{len(rewards)} rewards need as many weights, not {weights!r}")
        self.weights = [number(weight, "a weight") for weight in weights]

    def __call__(self, images: Tensor, prompts: Sequence[Prompt], **group: int) -> Tensor:
        """As in `Reward`; a row that one of them cannot score is NaN."""
        scores = [
            weight * call(reward, images, prompts, **group)
            for weight, reward in zip(self.weights, self.rewards, strict=True)
        ]
        return torch.stack(scores).sum(0)


class PerFrame(Combinator):
    """A reward of images on the frames of a clip, as in per_frame(hps, "mean", every=4).

    An image is a clip of one frame.

    Args:
        reward: takes images.
        reduction: in `REDUCTIONS`: how the frames' scores become one.
        every: score each so many-th frame only, the first included.
    """

    def __init__(
        self, reward: Reward, reduction: Literal["mean", "min", "max", "first", "last"] = "mean", every: int = 1
    ) -> None:
        super().__init__(reward)
        if self.takes == "clips":
            raise ValueError("per_frame takes a reward of images, and this one takes clips already")
        if self.compares_group:
            raise ValueError("per_frame cannot score frames against those of other samples")
        if reduction not in REDUCTIONS:
            raise ValueError(f"the reduction must be one of {list(REDUCTIONS)}, not {reduction!r}")
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every must be an integer of at least 1, not {every!r}")
        self.takes = "either"
        self.reduction, self.every = reduction, every
        self.range = getattr(reward, "range", self.range)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """As in `Reward`; only the frames that count are scored."""
        clips = frames(images)
        if self.reduction in ("first", "last"):
            clips = clips[:, :1] if self.reduction == "first" else clips[:, -1:]
        clips = clips[:, :: self.every]
        count = clips.shape[1]
        scores = self.rewards[0](clips.flatten(0, 1), [prompt for prompt in prompts for _ in range(count)])
        return REDUCTIONS[self.reduction](scores.view(-1, count))


class WinRate(Combinator):
    """The share of the other samples of its group that a sample beats; a tie is half a win.

    Pref-GRPO, arXiv 2508.20751. Every pair of a group is compared once, by the scores of a reward, or by a reward with
    a method ``compare(images, others, prompts)`` that gives each pair 1 (the first is better), 0 or 0.5.

    Args:
        reward: what compares.
    """

    range = (0.0, 1.0)

    def __init__(self, reward: Reward) -> None:
        super().__init__(reward)
        self.compares_group = True

    def __call__(self, images: Tensor, prompts: Sequence[Prompt], group_size: int = 1) -> Tensor:
        """As in `Reward`, of whole groups: each ``group_size`` neighbours. NaN where a sample has no comparison."""
        if group_size < 2:
            raise ValueError("win_rate compares the samples of a group, and a group here has one: train an agent with "
                             "a group_size of at least 2, and evaluate with as many images per prompt")  # fmt: skip
        count, (i, j) = len(images) // group_size, torch.triu_indices(group_size, group_size, 1)
        first = (torch.arange(count)[:, None] * group_size + i).flatten()
        second = (torch.arange(count)[:, None] * group_size + j).flatten()
        compare: Any = getattr(self.rewards[0], "compare", None)
        if compare is not None:
            chosen = [prompts[k] for k in first.tolist()]
            wins = torch.as_tensor(compare(images[first], images[second], chosen), dtype=torch.float32)
        else:
            score = torch.as_tensor(self.rewards[0](images, prompts)).float().cpu()
            gap = score[first] - score[second]
            wins = (gap > 0).float() + 0.5 * (gap == 0).float()
            wins[gap.isnan()] = torch.nan
        wins = wins.cpu()
        table = torch.full((len(images), len(images)), torch.nan)
        table[first, second], table[second, first] = wins, 1 - wins
        return table.nanmean(1).to(images.device)


def call(reward: Reward, images: Tensor, prompts: Sequence[Prompt], **group: int) -> Tensor:
    """A reward's scores, with the group's size where it compares groups."""
    return torch.as_tensor(reward(images, prompts, **group if getattr(reward, "compares_group", False) else {}))
