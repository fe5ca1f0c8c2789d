"""Stable Diffusion XL."""

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
class StableDiffusionXLOptions(PipelineOptions):
    """The options of Stable Diffusion XL."""

    family = "stable-diffusion-xl"

    guidance_scale: float = 5.0
    """Scale w of classifier-free guidance, ε_u + w (ε_c − ε_u) with and without the prompt, in rollout and in training.
    With 1 there is no guidance, and half the compute."""


class StableDiffusionXL(GuidedModel):
    """A `StableDiffusionXLPipeline`'s components; arguments and errors as in `PipelineModel`.

    The network is told the image's size, as an original of that size that was not cropped. No prompt is zeros in the
    place of the text encoders' features, where the checkpoint says so; a negative text, "" too, is encoded.
    """

    title = "Stable Diffusion XL"
    pipeline_class = "StableDiffusionXLPipeline"
    network_names = ("unet",)
    encoder_names = ("text_encoder", "text_encoder_2")
    pipeline_arguments = {"image_encoder": None, "feature_extractor": None}  # noqa: RUF012
    entries = ("prompt_embeds", "pooled_prompt_embeds")
    options: StableDiffusionXLOptions

    def __init__(self, pipeline: Any, options: Any = None, device: str | torch.device = "cpu") -> None:
        options = options or StableDiffusionXLOptions()
        self.guide_by(options.guidance_scale)
        if not hasattr(pipeline.scheduler, "alphas_cumprod"):
            raise ValueError(
                f"the noise levels of Stable Diffusion XL come from DDPM's table of ᾱ, which this checkpoint's "
                f"{type(pipeline.scheduler).__name__} has not: give it an EulerDiscreteScheduler, if it was trained so"
            )
        self.prediction_type = pipeline.scheduler.config.prediction_type
        super().__init__(pipeline, options, device)
        factor, config = pipeline.vae_scale_factor, pipeline.unet.config
        trained = config.sample_size * factor
        height, width = self.latent_size((trained, trained), factor)
        self.latent_shape = (config.in_channels, height, width)
        size = [height * factor, width * factor]
        self._time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=self.device)

    def schedule(self, num_steps: int) -> Schedule:
        """As in `DenoisingModel.schedule`: the levels that the pipeline's own DDIM or Euler sampler visits.

        Any other scheduler's configuration is read as that of Euler's; or as that of DDIM's, if it has a final ᾱ.
        """
        from diffusers import DDIMScheduler, EulerDiscreteScheduler

        own = self.pipeline.scheduler
        check_num_steps(num_steps, own.config.num_train_timesteps - own.config.get("steps_offset", 0))
        # Euler's published configuration has a leftover set_alpha_to_one=false, which it does not read.
        if hasattr(own, "final_alpha_cumprod"):
            ddim = DDIMScheduler.from_config(own.config)
            ddim.set_timesteps(num_steps)
            return Schedule.diffusion(ddim.alphas_cumprod, ddim.timesteps, float(ddim.final_alpha_cumprod))
        euler = EulerDiscreteScheduler.from_config(own.config)
        euler.set_timesteps(num_steps)
        return Schedule.from_alphas_cumprod(1 / (1 + euler.sigmas.double() ** 2), euler.timesteps)

    def count_tokens(self, texts: Sequence[str]) -> tuple[list[int], int]:
        """As in `PipelineModel.count_tokens`; the second encoder cuts at the same token."""
        tokenizer = self.pipeline.tokenizer
        return [len(ids) for ids in tokenizer(list(texts)).input_ids], tokenizer.model_max_length

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """``prompt_embeds [P, tokens, 2048]`` of both CLIPs and ``pooled_prompt_embeds [P, 1280]`` of the second."""
        with quiet():
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                list(texts), device=self.device, do_classifier_free_guidance=False
            )
        return {"prompt_embeds": embeds.to(self.dtype), "pooled_prompt_embeds": pooled.to(self.dtype)}

    def unconditional(self) -> dict[str, Tensor]:
        """As in `GuidedModel.unconditional`: zeros, unless the checkpoint's configuration wants "" encoded."""
        found = super().unconditional()
        if not self.pipeline.config.force_zeros_for_empty_prompt:
            return found
        return {name: torch.zeros_like(tensor) for name, tensor in found.items()}

    def pool(self, conditioning: TensorDict) -> Tensor:
        """The second CLIP's pooled features ``[B, 1280]``."""
        return conditioning["pooled_prompt_embeds"].float()

    def call(self, latents: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """As in `GuidedModel.call`."""
        size = self._time_ids.expand(len(latents), -1)
        return self.called(
            latents,
            timestep,
            encoder_hidden_states=conditioning["prompt_embeds"],
            added_cond_kwargs={"text_embeds": conditioning["pooled_prompt_embeds"], "time_ids": size},
            return_dict=False,
        )[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` float32 in [0, 1]."""
        vae = self.pipeline.vae
        return self.pixels(vae.decode(latents.to(self.dtype) / vae.config.scaling_factor, return_dict=False)[0])


FAMILY = Family(
    description="Stable Diffusion XL: text to image, diffusion, classifier-free guidance",
    options=StableDiffusionXLOptions,
    load=StableDiffusionXL.load,
    outline=StableDiffusionXL.outline,
    classes=("StableDiffusionXLPipeline",),
    path="diffusion",
)
