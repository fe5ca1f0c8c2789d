"""Evaluation on fixed prompts and fixed seeds: the same noise for every checkpoint."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from agents.policy import DenoisingPolicy
from agents.rollout import Visitor, begin, denoise
from agents.training.seeding import row_seeds
from denoise_env.kernels import Transition
from denoise_env.mdp import DenoisingMDP, row_generators
from denoise_env.prompts import Prompt


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        means: reward name → mean over prompts.
        intervals: reward name → 95 % bootstrap interval of the mean, over prompts and the images of each.
        images: how many images the figures are taken from.
        unscored: how many images a reward failed on; they are left out.
        diversity: std of the final latents' entries among a prompt's images (root mean square over entries, mean
            over prompts).
        kl: of the policy's trajectories to the base model's, in nats, summed over stochastic steps and dimensions,
            mean over images; deterministic steps have no density and count nothing, though a trained network changes
            them too. NaN where it was not measured.
    """

    means: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    images: int
    unscored: int
    diversity: float
    kl: float

    def row(self) -> dict[str, float]:
        """The figures by name, as columns of a table."""
        row: dict[str, float] = {}
        for name, mean in self.means.items():
            low, high = self.intervals[name]
            row |= {name: mean, f"{name}_low": low, f"{name}_high": high}
        figures = {"diversity": self.diversity, "kl": self.kl, "images": self.images, "unscored": self.unscored}
        return {**row, **figures}


def sample(
    mdp: DenoisingMDP,
    policy: DenoisingPolicy,
    prompts: Sequence[str | Prompt],
    images_per_prompt: int,
    seed: int,
    microbatch: int | None = None,
    first: int = 0,
    visit: Visitor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finished latents ``[N, *latent]`` and their prompt indices ``[N]``, ``images_per_prompt`` rows a prompt.

    Row i's noise follows from (seed, first + i) alone. ``visit`` is `agents.rollout.denoise`'s.
    """
    rows = len(prompts) * images_per_prompt
    size = next(n for n in range(min(microbatch or rows, rows), 0, -1) if rows % n == 0)
    generators = row_generators(row_seeds(seed, "evaluation", 0, first + rows)[first:])
    latents, prompt_index = begin(mdp, generators, prompts, group_size=images_per_prompt)
    denoise(mdp, policy, latents, prompt_index, size, visit=visit)
    return latents[:, -1], prompt_index


def evaluate(
    mdp: DenoisingMDP,
    policy: DenoisingPolicy,
    prompts: Sequence[str | Prompt],
    images_per_prompt: int,
    seed: int,
    microbatch: int | None = None,
    progress: Callable[[int], object] = lambda rows: None,
    *,
    best_of: int = 1,
    kl: bool = False,
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
        best_of: draw so many samples for every image and keep the one with the highest total of those rewards that
            have a weight.
        kl: measure the trajectories' KL to the reference, which the model must have kept; twice the network calls.
            For ``best_of`` N it is log N − (N − 1)/N, the exact KL of the best of N where no two rewards are equal.
    """
    if images_per_prompt < 1:
        raise ValueError(f"images_per_prompt must be at least 1, not {images_per_prompt}")
    drawn = images_per_prompt * best_of
    size = max(1, (microbatch or 256) // drawn)
    values: dict[str, list[torch.Tensor]] = {name: [] for name in mdp.rewards}
    spreads: list[torch.Tensor] = []
    divergence = torch.zeros((), dtype=torch.float64)

    def add_kl(rows: slice, k: int, x: torch.Tensor, transition: Transition) -> None:
        if transition.stochastic:
            with policy.model.reference():
                reference = policy.transition(x, k, mdp.conditioning.rows(place[rows]))
            divergence.add_(transition.kl(reference, "sum").double().sum().cpu())

    for first in range(0, len(prompts), size):
        chunk = prompts[first : first + size]
        place = mdp.conditioning.index(chunk).repeat_interleave(drawn).to(mdp.model.device)
        latents, index = sample(
            mdp, policy, chunk, drawn, seed, microbatch, first * drawn, add_kl if kl and best_of == 1 else None
        )
        scores = mdp.score(latents, index)
        trained = [w * scores.values[name] for name, w in mdp.reward_weights.items() if w] or [scores.total]
        ranked = torch.stack(trained).sum(0).nan_to_num(nan=-torch.inf).view(-1, best_of)
        kept = ranked.argmax(1) + torch.arange(0, len(latents), best_of, device=latents.device)
        for name, found in scores.values.items():
            values[name].append(found[kept].cpu().view(len(chunk), images_per_prompt))
        final = latents[kept].float().view(len(chunk), images_per_prompt, -1)
        spreads.append(final.var(1).mean(1).sqrt().cpu() if images_per_prompt > 1 else torch.zeros(len(chunk)))
        progress(len(kept))
    table = {name: torch.cat(found).double().numpy() for name, found in values.items()}
    unscored = int(np.isnan(np.stack(list(table.values()))).any(0).sum())
    means = {name: float(np.nanmean(t)) if not np.isnan(t).all() else math.nan for name, t in table.items()}
    intervals = {name: bootstrap(t, seed) for name, t in table.items()}
    images = len(prompts) * images_per_prompt
    nats = math.log(best_of) - 1 + 1 / best_of if best_of > 1 else float(divergence) / images
    diversity = float(torch.cat(spreads).mean())
    return Evaluation(means, intervals, images, unscored, diversity, nats if kl else math.nan)


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
