"""Evaluation on fixed prompts and fixed seeds: the same noise for every checkpoint."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from agents.policy import DenoisingPolicy
from agents.rollout import begin, denoise
from agents.seeding import row_seeds
from denoise_env.mdp import DenoisingMDP, row_generators


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        means: reward name → mean over prompts.
        intervals: reward name → 95 % bootstrap interval of the mean, over prompts and the images of each.
        images: how many images the figures are taken from.
        unscored: how many images a reward failed on; they are left out.
    """

    means: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    images: int
    unscored: int

    def row(self) -> dict[str, float]:
        """The figures by name, as columns of a table."""
        row: dict[str, float] = {}
        for name, mean in self.means.items():
            low, high = self.intervals[name]
            row |= {name: mean, f"{name}_low": low, f"{name}_high": high}
        return {**row, "images": self.images, "unscored": self.unscored}


def sample(
    mdp: DenoisingMDP,
    policy: DenoisingPolicy,
    prompts: Sequence[str],
    images_per_prompt: int,
    seed: int,
    microbatch: int | None = None,
    first: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finished latents ``[N, *latent]`` and their prompt indices ``[N]``, ``images_per_prompt`` rows a prompt.

    Row i's noise follows from (seed, first + i) alone.
    """
    rows = len(prompts) * images_per_prompt
    size = next(n for n in range(min(microbatch or rows, rows), 0, -1) if rows % n == 0)
    generators = row_generators(row_seeds(seed, "evaluation", 0, first + rows)[first:])
    latents, prompt_index = begin(mdp, generators, prompts, group_size=images_per_prompt)
    denoise(mdp, policy, latents, prompt_index, size)
    return latents[:, -1], prompt_index


def evaluate(
    mdp: DenoisingMDP,
    policy: DenoisingPolicy,
    prompts: Sequence[str],
    images_per_prompt: int,
    seed: int,
    microbatch: int | None = None,
    progress: Callable[[int], object] = lambda rows: None,
) -> Evaluation:
    """Mean rewards over prompts with a bootstrap interval.

    Args:
        mdp: with the rewards to measure.
        policy: samples.
        prompts: evaluated one after another; ``progress`` is called with the rows done.
        images_per_prompt: at least 1.
        seed: of the noise; not the training run's.
        microbatch: rows per network call; it does not change the noise.
        progress: for a progress bar.
    """
    if images_per_prompt < 1:
        raise ValueError(f"images_per_prompt must be at least 1, not {images_per_prompt}")
    rows = max(1, (microbatch or 256) // images_per_prompt)
    values: dict[str, list[torch.Tensor]] = {name: [] for name in mdp.rewards}
    for first in range(0, len(prompts), rows):
        chunk = prompts[first : first + rows]
        latents, index = sample(mdp, policy, chunk, images_per_prompt, seed, microbatch, first * images_per_prompt)
        scores = mdp.score(latents, index)
        for name, found in scores.values.items():
            values[name].append(found.cpu().view(len(chunk), images_per_prompt))
        progress(len(scores.total))
    table = {name: torch.cat(found).double().numpy() for name, found in values.items()}
    unscored = int(np.isnan(np.stack(list(table.values()))).any(0).sum())
    means = {name: float(np.nanmean(t)) if not np.isnan(t).all() else math.nan for name, t in table.items()}
    intervals = {name: bootstrap(t, seed) for name, t in table.items()}
    return Evaluation(means, intervals, len(prompts) * images_per_prompt, unscored)


def bootstrap(table: np.ndarray, seed: int, draws: int = 1000) -> tuple[float, float]:
    """95 % percentile interval of the mean of ``[prompts, images]``, resampling images within prompts.

    The prompts are a fixed set, so they are strata and are not resampled. NaN entries are left out.
    """
    if np.isnan(table).all():
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, table.shape[1], (draws, *table.shape))
    resampled = np.take_along_axis(table[None], picks, 2).reshape(draws, -1)
    resampled = resampled[~np.isnan(resampled).all(1)]
    low, high = np.percentile(np.nanmean(resampled, 1), [2.5, 97.5])
    return float(low), float(high)


def grid(images: torch.Tensor, columns: int, path: Path, scale: int | None = None) -> None:
    """Write uint8 ``[N, H, W, 3]`` as one PNG, ``columns`` pictures a row, small ones enlarged."""
    from PIL import Image

    height, width = images.shape[1:3]
    scale = scale or max(1, 64 // height)
    rows = -(-len(images) // columns)
    sheet = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, 3), 255, np.uint8)
    for i, image in enumerate(images.numpy()):
        y, x = (i // columns) * (height + 1), (i % columns) * (width + 1)
        sheet[y : y + height, x : x + width] = image
    size = (sheet.shape[1] * scale, sheet.shape[0] * scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).resize(size, Image.Resampling.NEAREST).save(path)
