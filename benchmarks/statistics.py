"""Statistics over few runs, after Agarwal et al. 2021 (arXiv:2108.13264, "rliable").

Environments are strata: one array ``[runs, ...]`` each, resampled within itself. NaN entries are left out.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

DRAWS = 2000


class Estimate(NamedTuple):
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


def iqm(values: ArrayLike, axis: int = 0) -> Floats:
    """Interquartile mean: ⌊n/4⌋ of the n values are dropped at either end, the others averaged; NaN of nothing."""
    ordered = np.sort(np.moveaxis(np.asarray(values, float), axis, 0), 0)  # NaN last
    count = (~np.isnan(ordered)).sum(0)
    place = np.arange(len(ordered)).reshape(-1, *[1] * (ordered.ndim - 1))
    kept = (place >= count // 4) & (place < count - count // 4)
    with np.errstate(invalid="ignore"):
        return np.where(kept, ordered, 0).sum(0) / kept.sum(0)


def bootstrap(
    strata: Sequence[ArrayLike],
    statistic: Callable[..., Floats] = iqm,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[Floats, Floats]:
    """95 % percentile interval of the mean over strata of each one's ``statistic`` (called with ``axis``)."""
    resampled = _resample(strata, draws, np.random.default_rng(seed))
    found = np.mean([statistic(own, axis=1) for own in resampled], 0)
    missing = np.isnan(found).all(0)
    low, high = np.nanpercentile(np.where(missing, 0.0, found), [2.5, 97.5], axis=0)
    return np.where(missing, np.nan, low), np.where(missing, np.nan, high)


def estimate(*strata: ArrayLike) -> Estimate:
    """The mean over strata of each one's interquartile mean, with its stratified bootstrap interval.

    Every stratum counts the same, however many runs it has. The interquartile mean of all runs together would drop
    the environment with the lowest and the one with the highest values instead of odd runs.
    """
    low, high = bootstrap(strata)
    return Estimate(float(np.mean([iqm(own) for own in strata])), float(low), float(high))


def probability_of_improvement(x: Sequence[ArrayLike], y: Sequence[ArrayLike], draws: int = DRAWS) -> Estimate:
    """P(X > Y) + P(X = Y)/2 of a run of X against one of Y in the same environment, averaged over environments.

    Args:
        x: ``[runs]`` per environment.
        y: likewise, the same environments.
        draws: of the bootstrap, which resamples both.
    """
    rng = np.random.default_rng(0)
    value = np.mean([_wins(np.asarray(a), np.asarray(b)) for a, b in zip(x, y, strict=True)])
    pairs = zip(_resample(x, draws, rng), _resample(y, draws, rng), strict=True)
    low, high = np.percentile(np.mean([_wins(a, b) for a, b in pairs], 0), [2.5, 97.5])
    return Estimate(float(value), float(low), float(high))


def first_crossing(x: ArrayLike, y: ArrayLike, levels: ArrayLike) -> Floats:
    """y where a run's x first reaches each level, linear between evaluations; NaN where it never does.

    One definition serves reward at matched KL (x = KL), network calls to a target (x = reward), and curves over
    network calls or seconds.
    """
    xs, ys, found = np.asarray(x, float), np.asarray(y, float), []
    for level in np.atleast_1d(np.asarray(levels, float)):
        reached = xs >= level
        i = int(reached.argmax())
        if not reached.any():
            found.append(np.nan)
        elif i == 0:
            found.append(ys[0])
        else:
            share = (level - xs[i - 1]) / (xs[i] - xs[i - 1])
            found.append(ys[i - 1] + share * (ys[i] - ys[i - 1]))
    return np.array(found)


def censored_median(values: ArrayLike) -> float:
    """The median where NaN means "later than was watched"; infinite where too many never arrived to tell."""
    return float(np.median(np.where(np.isnan(np.asarray(values, float)), np.inf, values)))


def _resample(strata: Sequence[ArrayLike], draws: int, rng: np.random.Generator) -> list[Floats]:
    """``[draws, runs, ...]`` per stratum."""
    arrays = [np.asarray(s, float) for s in strata]
    return [a[rng.integers(0, len(a), (draws, len(a)))] for a in arrays]


def _wins(x: Floats, y: Floats) -> Floats:
    """Mann–Whitney's U over the last axis, divided by the number of pairs."""
    gap = x[..., :, None] - y[..., None, :]
    return ((gap > 0) + 0.5 * (gap == 0)).mean((-1, -2))
