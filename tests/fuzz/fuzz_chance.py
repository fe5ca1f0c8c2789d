"""What the fuzzers of the environments and of the command line share: chance, limits of time, and comparisons."""

import contextlib
import random
import signal
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar("T")
STRANGE = [
    *("", " ", "-", "--", "=", ".", "..", "/", "~", "@", ":", "a:", ":b", "..a:b", "a:b:c", "os:getcwd", "nan", "-inf"),
    *(
        "None",
        "null",
        "true",
        "[]",
        "{}",
        "0",
        "-1",
        "1.5",
        "1e400",
        "9" * 30,
        "9" * 5000,
        "x" * 300,
        "-p.txt",
        "--help=1",
    ),
    *("a\nb", "💥", "\u202eabc", "$HOME", "%s", "{0}", "<b>", "\udcff", "points@", "points@x", "a/b", "a/b/c", "C:\\x"),
]
"""Words that somebody may type, by mistake or on purpose."""


class Hang(BaseException):
    """A call took longer than it may."""


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise `Hang` in the context after so many seconds."""

    def stop(*_: object) -> None:
        raise Hang(f"no answer after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Chance(random.Random):
    """Random choices; the same seed makes the same ones."""

    def often(self, share: float) -> bool:
        """True with this probability."""
        return self.random() < share

    def some(self, items: Sequence[T], most: int) -> list[T]:
        """Up to ``most`` different items, in random order."""
        return self.sample(items, min(self.randint(0, most), len(items)))


def same(one: Any, other: Any) -> bool:
    """Whether two results hold the same values of the same types; NaN is NaN."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and same(one.detach().cpu().numpy(), other.detach().cpu().numpy())
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        if one.dtype == object or other.dtype == object:
            return one.shape == other.shape and all(same(a, b) for a, b in zip(one.flat, other.flat, strict=True))
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind in "fc")
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and (one == other or (one != one and other != other))
