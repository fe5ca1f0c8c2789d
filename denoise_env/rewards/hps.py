"""HPS-v2.1: how well a picture pleases and fits its prompt, on open_clip."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import interpolate

from denoise_env.prompts import Prompt
from denoise_env.rewards.base import RewardModel
from denoise_env.rewards.encoders import OPEN_CLIP, OpenClipEncoder, check_architecture, check_directory
from denoise_env.rewards.preprocess import normalize, pad, to_levels
from denoise_env.rewards.pretrained import check_reference, fetch


class HPS(RewardModel):
    """HPS-v2.1, the human preference score: higher pleases more and fits the prompt better.

    The cosine of the picture's and the prompt's embeddings, about 0.2 to 0.4; the HPS benchmark's table has it times
    100. Compare scores of one prompt only.

    Pictures are preprocessed as by the package hpsv2: rounded to 8 bits; resized in floating point, bicubic with
    antialiasing, without rounding or clamping, so that the longer side is the network's; padded with zeros around the
    centre; normalised. (That package leaves a picture whose longer side is the network's already as it is, and fails
    unless it is square; here it is padded.) hpsv2 on CUDA computes in autocast float16, which moves a score by up to
    1e-3.

    Args:
        checkpoint: a weights file, local or "owner/name/file" on the Hugging Face hub; or a local directory with an
            `open_clip_config.json`, weights and, where the config names one, a tokenizer, as open_clip saves them.
        architecture: the network that a weights file is of: open_clip's name of it, or a JSON file in open_clip's form.
        device: as in `RewardModel`.
        dtype: as in `RewardModel`.
        microbatch: as in `RewardModel`.
    """

    range = (-1.0, 1.0)
    citation = "Wu et al. 2023, Human Preference Score v2, arXiv 2306.09341"
    packages = OPEN_CLIP

    def __init__(
        self,
        checkpoint: str = "xswu/HPSv2/HPS_v2.1_compressed.pt",
        architecture: str = "ViT-H-14",
        device: str | None = None,
        dtype: str = "fp32",
        microbatch: int = 32,
    ) -> None:
        super().__init__(device, dtype, microbatch)
        check_reference(checkpoint, "checkpoint", 3)
        if not isinstance(architecture, str):
            raise ValueError(f"architecture must be a string, not {architecture!r}")
        self.checkpoint, self.architecture = checkpoint, architecture
        self.directory = Path(checkpoint).expanduser().is_dir()
        if self.directory:
            check_directory(checkpoint)
        else:
            check_architecture(architecture)

    def load_network(self) -> nn.Module:
        """The two towers."""
        if self.directory:
            network = OpenClipEncoder(f"local-dir:{Path(self.checkpoint).expanduser()}")
        else:
            network = OpenClipEncoder(self.architecture, str(fetch(self.checkpoint)))
        network.preprocess = HPSPreprocess(network.preprocess)
        return network

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """As in `RewardModel`."""
        network: Any = self.network
        return network.cosine(images, [prompt.text for prompt in prompts])


class HPSPreprocess:
    """hpsv2's preprocessing, with the size, mean and standard deviation of another; of a square size."""

    def __init__(self, of: Any) -> None:
        self.size, self.mean, self.std = of.size, of.mean, of.std
        if self.size[0] != self.size[1]:
            raise ValueError(f"HPS needs a network of square pictures, not of {list(self.size)}")

    def __call__(self, images: Tensor) -> Tensor:
        """Turn pictures ``[b, 3, H, W]`` in [0, 1] into the network's input ``[b, 3, *size]``."""
        pixels = to_levels(images) / 255
        scale = self.size[0] / max(pixels.shape[-2:])
        if scale != 1:
            height, width = (round(side * scale) for side in pixels.shape[-2:])
            pixels = interpolate(pixels, (height, width), mode="bicubic", align_corners=False, antialias=True)
        return normalize(pad(pixels, self.size), self.mean, self.std)
