"""Every family of `denoise_env.models`, for the tests that all of them must pass: a new one is an entry here."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.nn.functional import pixel_unshuffle

from denoise_env.models.flow_match import pack, unpack
from denoise_env.models.skyreels import posterior_seed
from denoise_env.prompts import Prompt
from denoise_env.shapes import WEIGHTS

TEXTS = ["a red circle on gray", "a prompt with more words than the others have", "blue"]


def same(latents: Tensor) -> Tensor:
    return latents


@dataclass(frozen=True)
class Variant:
    """One way to run a family and its own pipeline, which must agree.

    Attributes:
        options: the family's options.
        call: what the plain pipeline is called with beside prompts, latents, steps and size.
        negative: the prompts' negative text, where the pipeline gets one.
        pipeline: arguments of `Case.build`.
        rows: how many rows the network is given per sample.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    negative: str | None = None
    pipeline: Mapping[str, Any] = field(default_factory=dict)
    rows: int = 1


@dataclass(frozen=True)
class Case:
    """A family of a diffusers pipeline.

    Attributes:
        build: makes a pipeline with random weights.
        variants: by name; the first is what most tests run.
        given: our latents as the pipeline's argument ``latents``.
        returned: the pipeline's latents, with the height and width of ours, as our latents.
        images: how many images a prompt carries.
        given_images: the images of prompts as the plain pipeline's arguments.
        alone: whether the plain pipeline takes one prompt a call.
        size: height and width in pixels.
        step: height and width must be multiples of it.
        tolerance: of latents against the plain pipeline's.
        negative: negative texts as the plain pipeline's arguments.
        family: the family's name; default: the case's.
    """

    build: Callable[..., Any]
    variants: Mapping[str, Variant]
    given: Callable[[Tensor], Tensor] = same
    returned: Callable[[Tensor, int, int], Tensor] = lambda latents, height, width: latents
    images: int = 0
    given_images: Callable[[Sequence[Prompt]], Mapping[str, Any]] = lambda prompts: {}
    alone: bool = False
    size: tuple[int, int] = (64, 48)
    step: int = 16
    tolerance: float = 1e-4
    negative: Callable[[Any, list[str]], Mapping[str, Any]] = lambda pipeline, texts: {"negative_prompt": texts}
    family: str | None = None


def brightness(samples: Tensor, prompts: Any) -> Tensor:
    """A reward of images and of clips."""
    return samples.float().flatten(1).mean(1)


def prompts_of(name: str, variant: str | None = None) -> list[Prompt]:
    """Three prompts of a case, with images where it has some, and with the negative text of a variant."""
    case = CASES[name]
    negative = case.variants[variant].negative if variant else None
    random = np.random.default_rng(0)
    images = [
        [random.integers(0, 256, (50 + 10 * i, 40, 3), np.uint8) for _ in range(case.images)] for i in range(len(TEXTS))
    ]
    return [Prompt(text, negative, own) for text, own in zip(TEXTS, images, strict=True)]


def prompt_file(directory: Path, prompts: Sequence[Prompt]) -> str:
    """A file of prompts without negative texts, their images beside it."""
    from PIL import Image

    lines = []
    for i, prompt in enumerate(prompts):
        names = [f"{i}-{place}.png" for place in range(len(prompt.images))]
        for name, image in zip(names, prompt.images, strict=True):
            Image.fromarray(image.pixels()).save(directory / name)
        lines.append(json.dumps({"prompt": prompt.text, "image": names or None}))
    (directory / "prompts.jsonl").write_text("\n".join(lines))
    return str(directory / "prompts.jsonl")


def stable_diffusion() -> Any:
    return StableDiffusionPipeline.from_pretrained(WEIGHTS, safety_checker=None, local_files_only=True)


def normalised(latents: Tensor, height: int, width: int) -> Tensor:
    """FLUX.2-klein's latents as the network sees them, of those that it gives to its VAE."""
    std = (pipelines.FLUX2_VARIANCE + 1e-4).sqrt()
    return (pixel_unshuffle(latents, 2) - pipelines.FLUX2_MEAN[:, None, None]) / std[:, None, None]


def encoded_negative(pipeline: Any, texts: list[str]) -> Mapping[str, Any]:
    return {"negative_prompt_embeds": pipeline.encode_prompt(texts, max_sequence_length=40)[0]}


def pictures(prompts: Sequence[Prompt]) -> list[Any]:
    """The prompts' first images as PIL's."""
    from PIL import Image

    return [Image.fromarray(prompt.images[0].pixels()) for prompt in prompts]


def sampled_pictures(prompts: Sequence[Prompt]) -> Mapping[str, Any]:
    """SkyReels' first frames, with the noise of their latents."""
    seeds = [posterior_seed(prompt.images[0]) for prompt in prompts]
    return {"image": pictures(prompts), "generator": [torch.Generator().manual_seed(seed) for seed in seeds]}


CASES: dict[str, Case] = {
    "stable-diffusion": Case(
        stable_diffusion,
        {
            "guided": Variant({"guidance_scale": 5.0}, {"guidance_scale": 5.0}, rows=2),
            "negative": Variant({"guidance_scale": 5.0}, {"guidance_scale": 5.0}, "blurry", rows=2),
            "plain": Variant({"guidance_scale": 1.0}, {"guidance_scale": 1.0}),
        },
        size=(48, 32),
        step=4,
    ),
    "flux": Case(
        pipelines.flux,
        {
            "dev": Variant({"max_sequence_length": 16}, {"guidance_scale": 3.5, "max_sequence_length": 16}),
            "dev, true guidance": Variant(
                {"max_sequence_length": 16, "true_cfg_scale": 4.0},
                {"guidance_scale": 3.5, "max_sequence_length": 16, "true_cfg_scale": 4.0},
                "blurry",
                rows=2,
            ),
            "schnell": Variant(
                {"max_sequence_length": 16},
                {"max_sequence_length": 16},
                pipeline={"guidance_embeds": False, "dynamic": False},
            ),
        },
        given=pack,
        returned=unpack,
    ),
    "stable-diffusion-3": Case(
        pipelines.stable_diffusion_3,
        {
            "guided": Variant({"max_sequence_length": 16}, {"guidance_scale": 7.0, "max_sequence_length": 16}, rows=2),
            "negative": Variant(
                {"max_sequence_length": 16}, {"guidance_scale": 7.0, "max_sequence_length": 16}, "blurry", rows=2
            ),
            "plain": Variant(
                {"guidance_scale": 1.0, "max_sequence_length": 16}, {"guidance_scale": 1.0, "max_sequence_length": 16}
            ),
        },
    ),
    "stable-diffusion-xl": Case(
        pipelines.stable_diffusion_xl,
        {
            "guided": Variant({}, {"guidance_scale": 5.0}, rows=2),
            "negative": Variant({}, {"guidance_scale": 5.0}, "blurry", rows=2),
            "plain": Variant({"guidance_scale": 1.0}, {"guidance_scale": 1.0}),
        },
        step=8,
    ),
    "flux-2": Case(
        pipelines.flux2_klein,
        {
            "klein": Variant({"max_sequence_length": 40}, {"max_sequence_length": 40}, rows=2),
            "klein, negative": Variant(
                {"max_sequence_length": 40, "guidance_scale": 2.5},
                {"max_sequence_length": 40, "guidance_scale": 2.5},
                "blurry",
                rows=2,
            ),
            "klein, unguided": Variant(
                {"max_sequence_length": 40, "guidance_scale": 1.0}, {"max_sequence_length": 40, "guidance_scale": 1.0}
            ),
            "klein, distilled": Variant(
                {"max_sequence_length": 40}, {"max_sequence_length": 40}, pipeline={"is_distilled": True}
            ),
        },
        returned=normalised,
        negative=encoded_negative,
    ),
    "flux-2-dev": Case(
        pipelines.flux2_dev,
        {
            "dev": Variant({"max_sequence_length": 64}, {"max_sequence_length": 64}),
            "dev, told 1": Variant(
                {"max_sequence_length": 64, "guidance_scale": 1.0}, {"max_sequence_length": 64, "guidance_scale": 1.0}
            ),
        },
        returned=lambda tokens, height, width: tokens.mT.unflatten(2, (height, width)),
        family="flux-2",
    ),
    "qwen-image": Case(
        pipelines.qwen_image,
        {
            "guided": Variant({"guidance_scale": 4.0}, {"true_cfg_scale": 4.0, "negative_prompt": [" "] * 3}, rows=2),
            "negative": Variant({"guidance_scale": 4.0}, {"true_cfg_scale": 4.0}, "blurry", rows=2),
            "plain, cut": Variant({"guidance_scale": 1.0, "max_sequence_length": 8}, {"max_sequence_length": 8}),
        },
        given=pack,
        returned=unpack,
    ),
    "z-image": Case(
        pipelines.z_image,
        {
            "guided": Variant({"guidance_scale": 5.0}, {"guidance_scale": 5.0}, rows=2),
            "negative": Variant({"guidance_scale": 5.0}, {"guidance_scale": 5.0}, "blurry", rows=2),
            "normalised, truncated": Variant(
                {"guidance_scale": 5.0, "cfg_normalization": 0.9, "cfg_truncation": 0.5},
                {"guidance_scale": 5.0, "cfg_normalization": 0.9, "cfg_truncation": 0.5},
                rows=2,
            ),
            "turbo, cut": Variant(
                {"guidance_scale": 0.0, "max_sequence_length": 12},
                {"guidance_scale": 0.0, "max_sequence_length": 12},
                pipeline={"dynamic": False},
            ),
        },
    ),
    "hunyuan-video": Case(
        pipelines.hunyuan_video,
        {
            "clips": Variant({"num_frames": 9}, {"guidance_scale": 6.0, "num_frames": 9}),
            "clips, true guidance": Variant(
                {"num_frames": 5, "true_cfg_scale": 4.0, "guidance_scale": 1.0},
                {"num_frames": 5, "true_cfg_scale": 4.0, "guidance_scale": 1.0},
                "blurry",
                rows=2,
            ),
            "images, cut": Variant(
                {"num_frames": 1, "max_sequence_length": 6}, {"num_frames": 1, "max_sequence_length": 6}
            ),
        },
    ),
    "skyreels": Case(
        pipelines.skyreels,
        {
            "guided": Variant({"num_frames": 5}, {"num_frames": 5, "negative_prompt": [""] * len(TEXTS)}, rows=2),
            "negative": Variant(
                {"num_frames": 9, "true_cfg_scale": 5.0}, {"num_frames": 9, "true_cfg_scale": 5.0}, "blurry", rows=2
            ),
            "plain, not told": Variant(
                {"num_frames": 5, "true_cfg_scale": 1.0}, {"num_frames": 5}, pipeline={"guidance_embeds": False}
            ),
        },
        images=1,
        given_images=sampled_pictures,
    ),
}
"""Name → case."""
