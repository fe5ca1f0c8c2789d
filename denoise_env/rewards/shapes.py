"""Rewards of the embedded world: does the picture show what its caption says?"""

from collections.abc import Sequence
from functools import cache, partial

import torch
from torch import Tensor

from denoise_env.prompts import Prompt
from denoise_env.rewards.base import score_captions
from denoise_env.shapes.grammar import parse
from denoise_env.shapes.verifier import Verifier


@cache
def _verifier(device: torch.device) -> Verifier:
    return Verifier().to(device)


class ShapesReward:
    """The verifier's probability of the right caption, in [0, 1]; NaN where the prompt is no caption."""

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score pictures ``[B, 3, H, W]`` in [0, 1]: ``[B]`` float32."""
        return score_captions(images, prompts, parse, partial(self._score, _verifier(images.device)))

    def _score(self, verifier: Verifier, images: Tensor, captions: Sequence[str]) -> Tensor:
        return verifier.score(images, captions)


class ShapesCorrect(ShapesReward):
    """1 where colour, shape and background are all right, else 0; NaN where the prompt is no caption."""

    meaning = "share with all attributes right"

    def _score(self, verifier: Verifier, images: Tensor, captions: Sequence[str]) -> Tensor:
        return verifier.correct(images, captions)["all"].float()
