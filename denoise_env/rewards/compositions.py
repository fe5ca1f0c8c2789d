"""Rewards of compositions: how far does the picture show what its caption says?"""

from collections.abc import Sequence
from functools import cache, partial

import torch
from torch import Tensor

from denoise_env.prompts import Prompt
from denoise_env.rewards.base import score_captions
from denoise_env.shapes.compositions.grammar import parse
from denoise_env.shapes.compositions.verifier import Verifier


@cache
def _verifier(device: torch.device) -> Verifier:
    return Verifier().to(device)


class CompositionsReward:
    """`Verifier.score`, graded in [0, 1]; NaN where the prompt is no caption.

    It scores captions of one object, of several of a kind, and of two in a relation.
    """

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score pictures ``[B, 3, H, W]`` in [0, 1]: ``[B]`` float32."""
        return score_captions(images, prompts, parse, partial(self._score, _verifier(images.device)))

    def _score(self, verifier: Verifier, images: Tensor, captions: Sequence[str]) -> Tensor:
        return verifier.score(images, captions)


class CompositionsCorrect(CompositionsReward):
    """1 where background, colours, shapes, count and relation are all right, else 0; NaN where there is no caption."""

    meaning = "share with all parts right"

    def _score(self, verifier: Verifier, images: Tensor, captions: Sequence[str]) -> Tensor:
        return verifier.correct(images, captions)["all"].float()
