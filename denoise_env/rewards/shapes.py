"""Rewards of the embedded world: does the picture show what its caption says?"""

from collections.abc import Sequence
from functools import cache, partial

import torch
from torch import Tensor

from denoise_env.prompts import Prompt
from denoise_env.rewards.base import score_captions
from denoise_env.rewards.clip_score import ClipScore
from denoise_env.rewards.hps import HPS
from denoise_env.shapes import CLIP_WEIGHTS, HPS_WEIGHTS
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


class ShapesClip(ClipScore):
    """How well a picture of shapes fits its caption, by a tiny CLIP: higher fits better.

    A proxy of the verifier, as a CLIP is of what people see: it was trained on clean and slightly spoilt renders by
    `denoise_env.shapes.pretrain_clip`, and never saw what training may come up with.

    Args:
        device: as in `RewardModel`.
        dtype: as in `RewardModel`.
        microbatch: as in `RewardModel`.
    """

    def __init__(self, device: str | None = None, dtype: str = "fp32", microbatch: int = 128) -> None:
        super().__init__(str(CLIP_WEIGHTS), device=device, dtype=dtype, microbatch=microbatch)


class ShapesHPS(HPS):
    """How much a picture of shapes would be preferred, by a tiny HPS: higher is preferred.

    The CLIP of `ShapesClip`, trained further on choices between two pictures of a caption that follow the verifier.
    Compare scores of one caption only. The arguments are those of `ShapesClip`.
    """

    def __init__(self, device: str | None = None, dtype: str = "fp32", microbatch: int = 128) -> None:
        super().__init__(str(HPS_WEIGHTS), device=device, dtype=dtype, microbatch=microbatch)
