"""Every random number of a run follows from (seed, purpose, iteration), so a run resumes by counting.

What belongs to one episode follows from (the episode's own seed, purpose): it is the same in whatever batch, and on
whichever of several processes, the episode is trained.
"""

import zlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")


def _sequence(seed: int, purpose: str, iteration: int) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), iteration])


def row_seeds(seed: int, purpose: str, iteration: int, rows: int) -> list[int]:
    """One 63-bit seed per row; row i's does not depend on how many rows there are."""
    return (_sequence(seed, purpose, iteration).generate_state(rows, np.uint64) >> np.uint64(1)).tolist()


def generator(seed: int, purpose: str, iteration: int = 0) -> torch.Generator:
    """A CPU generator for one purpose in one iteration."""
    return torch.Generator().manual_seed(row_seeds(seed, purpose, iteration, 1)[0])


def episode_numbers(seeds: Sequence[int], purpose: str, count: int = 1) -> torch.Tensor:
    """63-bit numbers ``[B, count]`` for one purpose; row i's follow from ``seeds[i]`` alone."""
    entropy = zlib.crc32(purpose.encode())
    rows = [np.random.SeedSequence([seed, entropy]).generate_state(count, np.uint64) for seed in seeds]
    return torch.from_numpy((np.stack(rows) >> np.uint64(1)).astype(np.int64))


def epoch_order(items: Sequence[T], seed: int, start: int, count: int) -> list[T]:
    """Items ``start`` to ``start + count`` of an endless sequence of epochs, each with all items in a new order."""
    picked: list[T] = []
    while len(picked) < count:
        epoch, place = divmod(start + len(picked), len(items))
        order = torch.randperm(len(items), generator=generator(seed, "prompt order", epoch))
        picked += [items[i] for i in order[place : place + count - len(picked)].tolist()]
    return picked
