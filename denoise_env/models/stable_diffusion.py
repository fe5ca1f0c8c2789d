"""Stable Diffusion 1.x and 2.x, and the tiny one of `denoise_env.shapes`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from denoise_env.models.base import Family
from denoise_env.models.guidance import GuidedModel
from denoise_env.models.pipeline import PipelineOptions, quiet
from denoise_env.schedules import Schedule, check_num_steps


@dataclass
class StableDiffusionOptions(PipelineOptions):
    """The options of Stable Diffusion."""

    family = "stable-diffusion"

    guidance_scale: float = 5.0
    """Scale w of classifier-free guidance, ε_u + w (ε_c − ε_u) with and without the prompt, in rollout and in training.
    With 1 there is no guidance, and half the compute."""


class StableDiffusion(GuidedModel):
    """A `StableDiffusionPipeline`'s components; arguments and errors as in `PipelineModel`.

    Whichever scheduler the pipeline has, only its noise table is used, at DDIM's timesteps.
    """

    title = "Stable Diffusion"
    pipeline_class = "StableDiffusionPipeline"
    network_names = ("unet",)
    pipeline_arguments = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}  # noqa: RUF012
    options: StableDiffusionOptions

    def __init__(self, pipeline: Any, options: Any = None, device: str | torch.device = "cpu") -> None:
        options = options or StableDiffusionOptions()
        self.guide_by(options.guidance_scale)
        self.prediction_type = pipeline.scheduler.config.prediction_type
        super().__init__(pipeline, options, device)
        factor, config = pipeline.vae_scale_factor, pipeline.unet.config
        side = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
        self.latent_shape = (config.in_channels, *self.latent_size((side[0] * factor, side[1] * factor), factor))

    def schedule(self, num_steps: int) -> Schedule:
        """As in `DenoisingModel.schedule`: the checkpoint's ᾱ table at DDIM's timesteps."""
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler.from_config(self.pipeline.scheduler.config)
        config = scheduler.config
        check_num_steps(num_steps, config.num_train_timesteps - config.steps_offset)
        scheduler.set_timesteps(num_steps)
        return Schedule.diffusion(scheduler.alphas_cumprod, scheduler.timesteps, float(scheduler.final_alpha_cumprod))

    def count_tokens(self, texts: Sequence[str]) -> tuple[list[int], int]:
        """As in `PipelineModel.count_tokens`."""
        tokenizer = self.pipeline.tokenizer
        return [len(ids) for ids in tokenizer(list(texts)).input_ids], tokenizer.model_max_length

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """``prompt_embeds [P, tokens, features]``."""
        with quiet():
            embeds, _ = self.pipeline.encode_prompt(
                list(texts), self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        return {"prompt_embeds": embeds.to(self.dtype)}

    def call(self, latents: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """As in `GuidedModel.call`."""
        embeds = conditioning["prompt_embeds"]
        return self.called(latents, timestep, encoder_hidden_states=embeds, return_dict=False)[0]

    def pool(self, conditioning: TensorDict) -> Tensor:
        """The mean of the text encoder's token features ``[B, features]``."""
        return conditioning["prompt_embeds"].float().mean(1)

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` float32 in [0, 1]."""
        vae = self.pipeline.vae
        return self.pixels(vae.decode(latents.to(self.dtype) / vae.config.scaling_factor, return_dict=False)[0])


FAMILY = Family(
    description="Stable Diffusion 1.x and 2.x: text to image, diffusion, classifier-free guidance",
    options=StableDiffusionOptions,
    load=StableDiffusion.load,
    outline=StableDiffusion.outline,
    classes=("StableDiffusionPipeline",),
    path="diffusion",
)
