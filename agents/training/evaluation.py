"""Evaluation on fixed prompts and fixed seeds: the same noise for every checkpoint."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from agents.policy import DenoisingPolicy
from agents.rollout import begin, denoise
from denoise_env.kernels import Transition
from denoise_env.mdp import DenoisingMDP, row_generators
from denoise_env.prompts import Prompt
from denoise_env.seeding import row_seeds


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        means: reward name → mean over all images of all prompts.
        intervals: reward name → 95 % bootstrap interval of that mean over images: how far it may be off because of the
            noise that was drawn, on these same prompts.
        prompt_intervals: reward name → 95 % bootstrap interval of that mean over prompts: how far it may be off as the
            mean of all prompts of their kind, because these prompts and this noise were drawn. NaN for one prompt.
        images: how many images the figures are taken from.
        unscored: how many images a reward failed on, rewards that are only measured included; each reward's figures
            leave out the images that it failed on.
        diversity: std of the final latents' entries among a prompt's images (root mean square over entries, mean
            over prompts).
        kl: KL of the policy's trajectories to the base model's, in nats, summed over stochastic steps and dimensions,
            mean over images; deterministic steps have no density and count nothing, though a trained network changes
            them too. NaN where it was not measured.
    """

    means: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    prompt_intervals: dict[str, tuple[float, float]]
    images: int
    unscored: int
    diversity: float
    kl: float

    def figures(self) -> dict[str, float]:
        """The figures by name, as columns of a table.

        A reward ``r`` has five of them: its mean ``r``, the interval over images ``r_low`` and ``r_high``, and the
        interval over prompts ``r_prompts_low`` and ``r_prompts_high``.
        """
        figures: dict[str, float] = {}
        for name, mean in self.means.items():
            figures[name] = mean
            figures[f"{name}_low"], figures[f"{name}_high"] = self.intervals[name]
            figures[f"{name}_prompts_low"], figures[f"{name}_prompts_high"] = self.prompt_intervals[name]
        counts = {"images": self.images, "unscored": self.unscored}
        return {**figures, "diversity": self.diversity, "kl": self.kl, **counts}


def sample(
    mdp: DenoisingMDP,
    policy: DenoisingPolicy,
    prompts: Sequence[str | Prompt],
    images_per_prompt: int,
    seed: int,
    microbatch: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Finished latents ``[N, *latent]`` and their prompt indices ``[N]``, ``images_per_prompt`` rows a prompt.

    Row i's noise follows from (seed, i) alone. A network call has ``microbatch`` rows (default: all), and the last may
    have fewer.
    """
    parts = _microbatches(prompts, images_per_prompt, seed, microbatch)
    latents, index = zip(*(_finish(mdp, policy, *part) for part in parts), strict=True)
    return torch.cat(latents), torch.cat(index)


def _microbatches(
    prompts: Sequence[str | Prompt], images_per_prompt: int, seed: int, microbatch: int | None
) -> Iterator[tuple[list[str | Prompt], list[int]]]:
    """Each row's prompt and seed, ``microbatch`` rows at a time."""
    rows = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    seeds = row_seeds(seed, "evaluation", 0, len(rows))
    size = microbatch or len(rows)
    for first in range(0, len(rows), size):
        yield rows[first : first + size], seeds[first : first + size]


def _finish(
    mdp: DenoisingMDP,
    policy: DenoisingPolicy,
    prompts: Sequence[str | Prompt],
    seeds: Sequence[int],
    visit: Callable[[Tensor, int, Tensor, Transition], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Finished latents and prompt indices of one microbatch; ``visit`` sees (indices, k, latents, transition)."""
    latents, index = begin(mdp, row_generators(seeds), prompts)
    denoise(mdp, policy, latents, index, visit=visit and (lambda rows, *step: visit(index[rows], *step)))
    return latents[:, -1].clone(), index


def evaluate(
    mdp: DenoisingMDP,
    policy: DenoisingPolicy,
    prompts: Sequence[str | Prompt],
    images_per_prompt: int,
    seed: int,
    microbatch: int | None = None,
    progress: Callable[[int], object] = lambda images: None,
    *,
    best_of: int = 1,
    kl: bool = False,
) -> Evaluation:
    """Mean rewards with their bootstrap intervals, over images and over prompts.

    Args:
        mdp: the environment, with the rewards to measure.
        policy: the policy that samples.
        prompts: the prompts to evaluate on.
        images_per_prompt: how many images each prompt gets, at least 1.
        seed: seed of the noise; it is not the training run's.
        microbatch: rows per network call; the last may have fewer. It bounds the memory and changes the result by
            rounding at most. Default: whole prompts, up to 256 rows.
        progress: called with the number of images that have been finished since the last call, for a progress bar.
        best_of: how many samples to draw for every image, of which the one with the highest total reward is kept.
        kl: whether to measure the trajectories' KL to the reference, which the model must have kept. It doubles the
            network calls. For ``best_of`` N it is log N − (N − 1)/N, the exact KL of the best of N where no two rewards
            are equal.
    """
    if images_per_prompt < 1:
        raise ValueError(f"images_per_prompt must be at least 1, not {images_per_prompt}")
    drawn = images_per_prompt * best_of
    rows = len(prompts) * drawn
    values, total = torch.empty(len(mdp.rewards), rows), torch.empty(rows)
    spreads: list[Tensor] = []
    held = torch.empty(0)  # final latents of a prompt that is not complete yet
    divergence = torch.zeros((), dtype=torch.float64)

    def add_kl(prompt_index: Tensor, k: int, x: Tensor, transition: Transition) -> None:
        if transition.stochastic:
            with policy.model.reference():
                reference = policy.transition(x, k, mdp.conditioning.rows(prompt_index))
            divergence.add_(transition.kl(reference, "sum").double().sum().cpu())

    def best(total: Tensor) -> Tensor:
        """The place of the highest of every ``best_of`` neighbours; those that could not be scored come last."""
        place = total.nan_to_num(nan=-torch.inf).view(-1, best_of).argmax(1)
        return place + torch.arange(0, len(total), best_of)

    visit = add_kl if kl and best_of == 1 else None
    done = 0
    size = microbatch or max(1, 256 // drawn) * drawn
    if mdp.compares_groups:
        size = -(-size // drawn) * drawn  # whole prompts
    for part in _microbatches(prompts, drawn, seed, size):
        latents, index = _finish(mdp, policy, *part, visit)
        scores = mdp.score(latents, index, drawn)
        first, done = done, done + len(latents)
        values[:, first:done] = torch.stack(list(scores.values.values())).cpu()
        total[first:done] = scores.total.cpu()
        held = torch.cat([held, latents]) if len(held) else latents
        start, whole = done - len(held), len(held) // drawn * drawn
        if whole and images_per_prompt > 1:
            kept = held[best(total[start : start + whole]).to(held.device)]
            spreads.append(kept.float().view(-1, images_per_prompt, kept[0].numel()).var(1).mean(1).sqrt().cpu())
        held = held[whole:]
        progress(done // best_of - first // best_of)
    shape = (len(prompts), images_per_prompt)
    tables = values[:, best(total)].double().view(-1, *shape).numpy()
    table = dict(zip(mdp.rewards, tables, strict=True))
    images = len(prompts) * images_per_prompt
    nats = math.log(best_of) - 1 + 1 / best_of if best_of > 1 else float(divergence) / images
    return Evaluation(
        means={name: float(np.nanmean(t)) if not np.isnan(t).all() else math.nan for name, t in table.items()},
        intervals={name: bootstrap(t, seed) for name, t in table.items()},
        prompt_intervals={name: bootstrap(t, seed, over="prompts") for name, t in table.items()},
        images=images,
        unscored=int(np.isnan(tables).any(0).sum()),
        diversity=float(torch.cat(spreads).mean()) if spreads else 0.0,
        kl=nats if kl else math.nan,
    )


def bootstrap(
    table: np.ndarray, seed: int, draws: int = 1000, *, over: Literal["images", "prompts"] = "images"
) -> tuple[float, float]:
    """95 % percentile interval of the mean of ``[prompts, images]``; NaN entries are left out.

    Args:
        table: rewards, one row per prompt.
        seed: seed of the resampling.
        draws: how many means are resampled.
        over: "images" resamples each prompt's images: the prompts are fixed strata, and their differences are no
            uncertainty. It draws one image fewer than a prompt has, without which the interval of a few would be too
            narrow (Rao and Wu 1988), and is (NaN, NaN) for one. "prompts" resamples the prompts, and the images of
            each: the prompts stand for others of their kind. It needs two prompts and is (NaN, NaN) for one.
    """
    prompts, images = table.shape
    if np.isnan(table).all() or (prompts if over == "prompts" else images) == 1:
        return math.nan, math.nan
    drawn = images if over == "prompts" else images - 1
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, prompts, (draws, prompts, 1)) if over == "prompts" else np.arange(prompts)[:, None]
    resampled = table[rows, rng.integers(0, images, (draws, prompts, drawn))].reshape(draws, -1)
    resampled = resampled[~np.isnan(resampled).all(1)]
    low, high = np.percentile(np.nanmean(resampled, 1), [2.5, 97.5])
    return float(low), float(high)
