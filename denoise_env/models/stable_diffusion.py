"""Stable Diffusion 1.x and 2.x, and the tiny one of `denoise_env.shapes`."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from denoise_env.arguments import integer, number
from denoise_env.models.base import Family
from denoise_env.models.pipeline import PipelineModel, PipelineOptions, quiet
from denoise_env.prompts import Prompt
from denoise_env.schedules import Schedule, check_num_steps


@dataclass
class StableDiffusionOptions(PipelineOptions):
    """The options of Stable Diffusion."""

    family = "stable-diffusion"

    guidance_scale: float = 5.0
    """Scale w of classifier-free guidance, ε_u + w (ε_c − ε_u) with and without the prompt, in rollout and in training.
    With 1 there is no guidance, and half the compute."""
    height: int | None = None
    """Image height in pixels; default: what the checkpoint was trained for."""
    width: int | None = None
    """Image width in pixels; default: what the checkpoint was trained for."""


class StableDiffusion(PipelineModel):
    """A `StableDiffusionPipeline`'s components; arguments and errors as in `PipelineModel`.

    Whichever scheduler the pipeline has, only its noise table is used, at DDIM's timesteps.
    """

    title = "Stable Diffusion"
    pipeline_class = "StableDiffusionPipeline"
    network_name = "unet"
    pipeline_arguments = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}  # noqa: RUF012
    options: StableDiffusionOptions
    guidance_scale: float

    def __init__(self, pipeline: Any, options: Any = None, device: str | torch.device = "cpu") -> None:
        options = options or StableDiffusionOptions()
        if number(options.guidance_scale, "guidance_scale") < 1:
            raise ValueError(f"guidance_scale must be at least 1 (no guidance), not {options.guidance_scale}")
        self.guidance_scale = options.guidance_scale
        self.rows_per_sample = 1 if options.guidance_scale == 1 else 2
        self.latent_shape = _latent_shape(pipeline, options.height, options.width)
        self.prediction_type = pipeline.scheduler.config.prediction_type
        super().__init__(pipeline, options, device)
        with self.encoding():
            self._unconditional = self._embed([""])

    def schedule(self, num_steps: int) -> Schedule:
        """As in `DenoisingModel.schedule`: the checkpoint's ᾱ table at DDIM's timesteps."""
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler.from_config(self.pipeline.scheduler.config)
        config = scheduler.config
        check_num_steps(num_steps, config.num_train_timesteps - config.steps_offset)
        scheduler.set_timesteps(num_steps)
        return Schedule.diffusion(scheduler.alphas_cumprod, scheduler.timesteps, float(scheduler.final_alpha_cumprod))

    @torch.no_grad()
    def _embed(self, texts: Sequence[str]) -> Tensor:
        tokenizer = self.pipeline.tokenizer
        for text, ids in zip(texts, tokenizer(list(texts)).input_ids, strict=True):
            if len(ids) > tokenizer.model_max_length:
                warnings.warn(
                    f"the text encoder reads {tokenizer.model_max_length} tokens; the end of this prompt of "
                    f"{len(ids)} is cut off: {text!r}",
                    stacklevel=2,
                )
        with quiet():
            embeds, _ = self.pipeline.encode_prompt(
                list(texts), self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        return embeds.to(self.dtype)

    def encode(self, prompts: Sequence[Prompt]) -> TensorDict:
        """``prompt_embeds [P, tokens, features]``, and ``negative_embeds`` of prompts that have a negative text.

        A text with too many tokens is cut, with a warning.
        """
        found = {"prompt_embeds": self._embed([prompt.text for prompt in prompts])}
        if prompts[0].negative is not None:
            found["negative_embeds"] = self._embed([prompt.negative or "" for prompt in prompts])
        return TensorDict(found, batch_size=len(prompts))

    def collate(self, rows: Sequence[Mapping[str, Tensor]]) -> TensorDict:
        """As in `DenoisingModel.collate`; where some prompts have a negative text, the others get the empty one."""
        if any("negative_embeds" in row for row in rows):
            rows = [{"negative_embeds": self._unconditional[0], **row} for row in rows]
        return super().collate(rows)

    def pool(self, conditioning: TensorDict) -> Tensor:
        """The mean of the text encoder's token features ``[B, features]``."""
        return conditioning["prompt_embeds"].float().mean(1)

    def predict(
        self, latents: Tensor, timestep: Tensor, conditioning: TensorDict, guidance_scale: Tensor | None = None
    ) -> Tensor:
        """As in `DenoisingModel.predict`; guidance batches its two halves into one call."""
        embeds = conditioning["prompt_embeds"]
        rows = len(latents)
        timestep = timestep.to(latents.device).expand(rows)
        scale = self.guidance_scale if guidance_scale is None else guidance_scale.view(rows, 1, 1, 1)
        guided = guidance_scale is not None or self.guidance_scale != 1
        if guided:
            latents, timestep = torch.cat([latents, latents]), torch.cat([timestep, timestep])
            negative = conditioning.get("negative_embeds", self._unconditional.expand_as(embeds))
            embeds = torch.cat([negative, embeds])
        with self.autocast():
            output = self.called(latents, timestep, encoder_hidden_states=embeds, return_dict=False)[0]
        if not guided:
            return output
        unconditional, conditional = output.float().chunk(2)
        return unconditional + scale * (conditional - unconditional)

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` float32 in [0, 1]."""
        vae = self.pipeline.vae
        return self.pixels(vae.decode(latents.to(self.dtype) / vae.config.scaling_factor, return_dict=False)[0])


def _latent_shape(pipeline: Any, height: int | None, width: int | None) -> tuple[int, int, int]:
    factor, config = pipeline.vae_scale_factor, pipeline.unet.config
    side = config.sample_size
    trained = (side, side) if isinstance(side, int) else tuple(side)
    pixels = [
        trained[i] * factor if given is None else integer(given, name)
        for i, (name, given) in enumerate((("height", height), ("width", width)))
    ]
    if any(p <= 0 or p % factor for p in pixels):
        raise ValueError(f"height and width must be multiples of {factor}, not {pixels[0]}x{pixels[1]}")
    return (config.in_channels, pixels[0] // factor, pixels[1] // factor)


FAMILY = Family(
    description="Stable Diffusion 1.x and 2.x: text to image, diffusion, classifier-free guidance",
    options=StableDiffusionOptions,
    load=StableDiffusion.load,
    outline=StableDiffusion.outline,
    classes=("StableDiffusionPipeline",),
    path="diffusion",
)
