"""The timesteps and noises that finished samples are noised with, drawn from each sample's own seed."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from denoise_env.seeding import episode_numbers

StepDraws = Literal["even", "stratified", "logit_normal"]


def draw_steps(seeds: Sequence[int], times: int, levels: int, how: StepDraws, shares: tuple[float, float]) -> Tensor:
    """A row of T steps for every seed, ``[N, T]``.

    Args:
        seeds: N seeds.
        times: T.
        levels: K, the number of noise levels, 0 being the noisiest.
        how: from n levels, none twice before all have come once ("even"), one from each of T equal parts of them
            ("stratified"), or level ⌊n u⌋ with log(u/(1 − u)) standard normal ("logit_normal").
        shares: which levels, those between these two shares of K, rounded to more levels.
    """
    low, high = (share * levels for share in shares)
    first = min(math.floor(low + 1e-9), levels - 1)
    count = max(1, math.ceil(high - 1e-9) - first)
    if how == "even":
        laps = -(-times // count)
        order = episode_numbers(seeds, "steps", laps * count).view(len(seeds), laps, count).argsort(2)
        return first + order.flatten(1)[:, :times]
    share = episode_numbers(seeds, "steps", times).double() / 2**63
    share = (torch.arange(times) + share) / times if how == "stratified" else torch.special.ndtri(share).sigmoid()
    return first + (share * count).long().clamp(max=count - 1)


def draw_noise(seeds: Sequence[int], times: int, shape: Sequence[int]) -> Tensor:
    """T noises of a shape for every seed, ``[N, T, *shape]`` on the CPU."""
    noise, random = torch.empty(len(seeds), times, *shape), torch.Generator()
    for own, seed in zip(noise.unbind(), episode_numbers(seeds, "noise").flatten().tolist(), strict=True):
        own.normal_(generator=random.manual_seed(seed))
    return noise
