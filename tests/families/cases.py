"""Every family of `denoise_env.models`, for the tests that all of them must pass: a new one is an entry here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pipelines
from diffusers import StableDiffusionPipeline
from torch import Tensor

from denoise_env.models.flow_match import pack, unpack
from denoise_env.shapes import WEIGHTS


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
        size: height and width in pixels.
        step: height and width must be multiples of it.
        tolerance: of latents against the plain pipeline's.
    """

    build: Callable[..., Any]
    variants: Mapping[str, Variant]
    given: Callable[[Tensor], Tensor] = same
    returned: Callable[[Tensor, int, int], Tensor] = lambda latents, height, width: latents
    size: tuple[int, int] = (64, 48)
    step: int = 16
    tolerance: float = 1e-4


def brightness(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
    """A reward."""
    return images.float().mean((1, 2, 3))


def stable_diffusion() -> Any:
    return StableDiffusionPipeline.from_pretrained(WEIGHTS, safety_checker=None, local_files_only=True)


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
}
"""Name → case."""
