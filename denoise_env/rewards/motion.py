"""Rewards of moving shapes: does the clip show what its caption says, and move as it says?"""

from collections.abc import Sequence
from functools import cache, partial

import torch
from torch import Tensor

from denoise_env.prompts import Prompt
from denoise_env.rewards.base import Takes, check_samples, score_captions
from denoise_env.rewards.videoalign import VideoAlign, VideoAlignMQ, VideoAlignTA, VideoAlignVQ
from denoise_env.shapes import VIDEOALIGN_WEIGHTS
from denoise_env.shapes.motion.first_frames import kept
from denoise_env.shapes.motion.grammar import parse
from denoise_env.shapes.motion.verifier import Verifier


@cache
def _verifier(device: torch.device) -> Verifier:
    return Verifier().to(device)


class MotionReward:
    """`Verifier.score`, graded in [0, 1]: looks, direction, speed, consistency; NaN where the prompt is no caption."""

    takes: Takes = "clips"

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score clips ``[B, 9, 3, H, W]`` in [0, 1]: ``[B]`` float32."""
        return score_captions(images, prompts, parse, partial(self._score, _verifier(images.device)))

    def _score(self, verifier: Verifier, clips: Tensor, captions: Sequence[str]) -> Tensor:
        return verifier.score(clips, captions)


class MotionCorrect(MotionReward):
    """1 where colour, shape, background, motion and speed are all right, else 0; NaN where the prompt is no caption."""

    meaning = "share with all parts right"

    def _score(self, verifier: Verifier, clips: Tensor, captions: Sequence[str]) -> Tensor:
        return verifier.correct(clips, captions)["all"].float()


class _MotionPart(MotionReward):
    part: str

    def _score(self, verifier: Verifier, clips: Tensor, captions: Sequence[str]) -> Tensor:
        return verifier.parts(clips, captions)[self.part]


class MotionAppearance(_MotionPart):
    """How far the frames show the caption's colour, shape and background, in [0, 1]; NaN where it is no caption."""

    part = "appearance"


class MotionDirection(_MotionPart):
    """How surely the object moves, bounces or grows as the caption says, in [0, 1]; NaN where it is no caption."""

    part = "direction"


class MotionSpeed(_MotionPart):
    """How near its speed is to the caption's, whatever its direction, in [0, 1]; NaN where it is no caption."""

    part = "speed"


class MotionConsistency(_MotionPart):
    """How far the frames show one object on one smooth path, in [0, 1]; NaN where the prompt is no caption."""

    part = "consistency"


class MotionFirstFrame:
    """How far a clip begins with its prompt's image, in [0, 1], as `kept` has it; NaN where the prompt has no image."""

    takes: Takes = "clips"

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score clips ``[B, F, 3, H, W]`` in [0, 1]: ``[B]`` float32."""
        check_samples(images, prompts, self.takes)
        scores = torch.full((len(images),), torch.nan, device=images.device)
        for i, prompt in enumerate(prompts):
            if prompt.image:
                frame = torch.from_numpy(prompt.image.pixels()).movedim(-1, 0).to(images.device) / 255
                scores[i] = kept(images[i : i + 1], frame[None])[0]
        return scores


class _Tiny(VideoAlign):
    def __init__(self, device: str | None = None, dtype: str = "fp32", microbatch: int = 16) -> None:
        base = VIDEOALIGN_WEIGHTS / "base"
        super().__init__(str(VIDEOALIGN_WEIGHTS), str(base), device=device, dtype=dtype, microbatch=microbatch)


class ShapesVideoAlignVQ(_Tiny, VideoAlignVQ):
    """How well drawn a clip of shapes is, whatever its caption, by a tiny VideoAlign: unbounded, about N(0, 1).

    A proxy of the verifier, as VideoAlign is of what people see: it was trained on clean and spoilt renders by
    `denoise_env.shapes.pretrain_videoalign`, and never saw what training may come up with. It shares its network with
    `ShapesVideoAlignMQ` and `ShapesVideoAlignTA`, which take the same arguments.

    Args:
        device: as in `RewardModel`.
        dtype: as in `RewardModel`.
        microbatch: as in `RewardModel`.
    """


class ShapesVideoAlignMQ(_Tiny, VideoAlignMQ):
    """How steadily one object moves in a clip of shapes, whatever its caption, as `ShapesVideoAlignVQ` has it."""


class ShapesVideoAlignTA(_Tiny, VideoAlignTA):
    """How far a clip of shapes shows and moves what its caption says, as `ShapesVideoAlignVQ` has it."""
