"""Rewards of file size: how many kilobytes a picture takes as a JPEG."""

import io
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from denoise_env.arguments import integer
from denoise_env.prompts import Prompt
from denoise_env.rewards.base import Takes, check_samples, pixels


class JpegIncompressibility:
    """Size of the picture as a JPEG in kilobytes; higher is more detailed.

    A kilobyte is 1000 bytes, as in the code of DDPO. Prompts are not read.

    Args:
        quality: that of the JPEG, from 1 to 100.
    """

    takes: Takes = "images"
    range = (0.0, math.inf)
    citation = "DDPO, arXiv 2305.13301"

    def __init__(self, quality: int = 95) -> None:
        self.quality = integer(quality, "quality", at_least=1, at_most=100)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """As in `Reward`."""
        check_samples(images, prompts, self.takes)
        with ThreadPoolExecutor() as pool:
            sizes = list(pool.map(self._size, pixels(images).numpy()))
        return torch.tensor(sizes, dtype=torch.float32, device=images.device) / 1000

    def _size(self, image: np.ndarray) -> int:
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=self.quality)
        return file.tell()

    def elsewhere(self, device: torch.device) -> bool:
        """Whether the model is on another device than the CPU, which does this work."""
        return device.type != "cpu"


class JpegCompressibility(JpegIncompressibility):
    """Size of the picture as a JPEG in kilobytes, negative; higher is easier to compress.

    The arguments are those of `JpegIncompressibility`.
    """

    range = (-math.inf, 0.0)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """As in `Reward`."""
        return -super().__call__(images, prompts)
