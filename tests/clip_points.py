"""A model that makes clips: Points, whose samples are shown as three frames, the last two where a point has moved."""

import torch

from denoise_env.models.base import Family
from denoise_env.models.points import Points, PointsOptions


class ClipPoints(Points):
    """A point is a bright column of a 4×6 picture, which moves to the right."""

    makes = "clips"
    frame_rate = 4.0
    portrait_size = 0

    def decode(self, latents):
        start = (latents[:, 0].clamp(-1.9, 1.9) + 2).long()
        clips = torch.zeros(len(latents), 3, 3, 4, 6)
        for frame in range(3):
            clips[torch.arange(len(latents)), frame, :, :, start + frame] = 1
        return clips

    render = Points.__mro__[1].render


def to_the_left(clips, prompts):
    """A reward."""
    return -clips[:, 0, 0, 0].argmax(-1).float()


to_the_left.takes = "clips"


def bright(images, prompts):
    """A reward of images."""
    return images.mean((1, 2, 3))


bright.takes = "images"
FAMILY = Family(
    "points that move", PointsOptions, lambda checkpoint, options, device: ClipPoints("flow", options, device)
)
