"""First frames for image-to-video: prompts that show where a clip is to begin, and how far it begins there."""

from collections.abc import Sequence

import torch
from torch import Tensor

from denoise_env.prompts import Prompt
from denoise_env.shapes.motion.renderer import render
from denoise_env.shapes.renderer import BASE_SIZE
from denoise_env.shapes.verifier import resample


def first_frames(
    captions: Sequence[str], generator: torch.Generator | None = None, size: int = BASE_SIZE
) -> list[Prompt]:
    """Captions as prompts, each with the first frame of a clip that `render` draws of it as its image.

    Raises:
        ValueError: as `render`.
    """
    frames = render(captions, generator, size, frames=1)[:, 0]
    return [Prompt(text, images=frame) for text, frame in zip(captions, frames, strict=True)]


def kept(clips: Tensor, frames: Tensor, tolerance: float = 0.01) -> Tensor:
    """How far clips begin with given frames: exp(−mean squared error / tolerance), ``[B]`` float32 in [0, 1].

    Args:
        clips: ``[B, F, 3, H, W]`` in [0, 1].
        frames: ``[B, 3, h, w]`` in [0, 1]; both are compared at 32 × 32 pixels, resampled by area.
        tolerance: the error at which the score is 1/e.
    """
    here = torch.zeros((), device=clips.device)
    error = resample(clips[:, 0], here) - resample(frames, here)
    return (-error.square().mean((1, 2, 3)) / tolerance).exp()
