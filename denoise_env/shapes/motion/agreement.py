"""How far scores of clips of moving shapes, as of VideoAlign, agree with the verifier."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from denoise_env.shapes.motion.renderer import render
from denoise_env.shapes.motion.spoilt import WORDS, choose, draw_spoilt, near_miss
from denoise_env.shapes.motion.verifier import Verifier, total

Scores = Callable[[Tensor, Sequence[str]], Tensor]
"""The normalised scores VQ, MQ and TA ``[n, 3]`` of n clips and captions."""


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of ``[n]`` each; those that are equal share a rank."""
    ranks = [(x[:, None] > x).float().sum(1) + (x[:, None] == x).float().sum(1) / 2 for x in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def ranked(scores: Tensor, gold: Tensor, least: float = 0.1) -> float:
    """Of all pairs whose gold differs by more than ``least``, the share that the scores rank as it does."""
    margin, gap = (x[:, None] - x for x in (scores, gold))
    return ((margin > 0) == (gap > 0))[gap.abs() > least].float().mean().item()


@torch.no_grad()
def agreement(scores: Scores, captions: Sequence[str], generator: torch.Generator, n: int) -> dict[str, float]:
    """How far scores agree with the verifier on fresh clips.

    Args:
        scores: the three scores.
        captions: what the clips are of.
        generator: the source of randomness.
        n: how many clips, evenly of the captions.

    Returns:
        Of clips spoilt as in training, half of them with a wrong caption: the rank correlation of "VQ" with the
        verifier's appearance, of "MQ" with its consistency and of "TA" with its score, and the share of pairs ranked
        rightly ("VQ pairs", …). Of clean clips, by which part of the caption is wrong: the share in which the right
        caption has the higher TA ("colour", …).
    """
    texts, verifier = [captions[i % len(captions)] for i in range(n)], Verifier()
    drawn = draw_spoilt(texts, choose(captions, n, generator), generator)
    reading = verifier(drawn.clips)
    told = [near_miss(text, generator) if i % 2 else text for i, text in enumerate(texts)]
    own = verifier.compare(reading, texts)
    gold = (own["appearance"], own["consistency"], total(verifier.compare(reading, told)))
    found: dict[str, float] = {}
    for name, score, truth in zip(("VQ", "MQ", "TA"), scores(drawn.clips, told).T, gold, strict=True):
        found |= {name: rank_correlation(score, truth), f"{name} pairs": ranked(score, truth)}
    clean = render(texts, generator)
    right = scores(clean, texts)[:, 2]
    for part in WORDS:
        wrong = scores(clean, [near_miss(text, generator, part) for text in texts])[:, 2]
        found[part] = (right > wrong).float().mean().item()
    return found
