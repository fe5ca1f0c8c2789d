"""FLUX.1: dev, schnell and what is derived from them."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from denoise_env.arguments import integer, number
from denoise_env.models.base import Family
from denoise_env.models.flow_match import FlowOptions, check_schedule, pack, shifted_by_length, unpack
from denoise_env.models.guidance import GuidedModel
from denoise_env.models.pipeline import quiet
from denoise_env.prompts import Prompt
from denoise_env.schedules import Schedule

LONGEST = 512


@dataclass
class FluxOptions(FlowOptions):
    """The options of FLUX.1."""

    family = "flux"

    guidance_scale: float | None = None
    """The scale that the network is told. FLUX.1-dev was distilled to be guided by it, with one row a sample; 1 is a
    scale like any other. A network that was not distilled so (FLUX.1-schnell) is told nothing. Default: 3.5 where it
    was."""
    true_cfg_scale: float = 1.0
    """Scale w of classifier-free guidance beside the embedded one, un + w (cond − un), with the prompts' negative
    texts; 1 for none. It doubles the compute."""
    max_sequence_length: int = 512
    """Tokens of T5's that the network attends to, 512 at most. Shorter prompts are padded to it and the padding is
    attended to, so that another length gives other images."""


class Flux(GuidedModel):
    """A `FluxPipeline`'s components; arguments and errors as in `PipelineModel`.

    The latents are ``[16, H/8, W/8]``; the network gets 2 × 2 of them as one token.
    """

    title = "FLUX.1"
    pipeline_class = "FluxPipeline"
    encoder_names = ("text_encoder", "text_encoder_2")
    lora_targets = [  # noqa: RUF012
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    ]
    pipeline_arguments = {"image_encoder": None, "feature_extractor": None}  # noqa: RUF012
    entries = ("prompt_embeds", "pooled_prompt_embeds")
    prediction_type = "flow_prediction"
    options: FluxOptions

    def __init__(self, pipeline: Any, options: Any = None, device: str | torch.device = "cpu") -> None:
        options = options or FluxOptions()
        check_schedule(options)
        self.longest = integer(options.max_sequence_length, "max_sequence_length", 1, LONGEST)
        number(options.true_cfg_scale, "true_cfg_scale", at_least=1)
        self.distilled = bool(pipeline.transformer.config.guidance_embeds)
        if self.distilled:
            scale = 3.5 if options.guidance_scale is None else options.guidance_scale
            self.guidance_scale = number(scale, "guidance_scale", at_least=0)
        elif options.guidance_scale is not None:
            warnings.warn(
                f"this FLUX.1 was not distilled to be guided: guidance_scale={options.guidance_scale} has no effect. "
                "true_cfg_scale guides it, at twice the compute",
                stacklevel=2,
            )
        self.rows_per_sample = self.rows_guided = 1 if options.true_cfg_scale == 1 else 2
        super().__init__(pipeline, options, device)
        trained, factor = pipeline.vae.config.sample_size, pipeline.vae_scale_factor
        self.latent_shape = (
            pipeline.transformer.config.in_channels // 4,
            *self.latent_size((trained, trained), factor, patch=2),
        )
        h, w = self.latent_shape[1] // 2, self.latent_shape[2] // 2
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)
        self._image_ids = ids.to(self.device, self.dtype)

    def schedule(self, num_steps: int) -> Schedule:
        """As in `DenoisingModel.schedule`; the network is told σ."""
        return shifted_by_length(self.pipeline.scheduler, self.options, num_steps, len(self._image_ids))

    def check_prompt(self, prompt: Prompt) -> None:
        """As in `DenoisingModel.check_prompt`; a negative text needs ``true_cfg_scale``."""
        if prompt.negative is not None and self.options.true_cfg_scale == 1:
            raise ValueError(
                f"FLUX.1's guidance is embedded in the network, where a negative text has no place: leave "
                f"{prompt.negative!r} out, or set true_cfg_scale above 1"
            )
        super().check_prompt(prompt)

    def count_tokens(self, texts: Sequence[str]) -> tuple[list[int], int]:
        """As in `PipelineModel.count_tokens`; T5 reads more of them than CLIP."""
        tokens = self.pipeline.tokenizer_2(list(texts)).input_ids
        return [len(ids) for ids in tokens], self.options.max_sequence_length

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """``prompt_embeds [P, tokens, 4096]`` of T5 and ``pooled_prompt_embeds [P, 768]`` of CLIP."""
        with quiet():
            embeds, pooled, _ = self.pipeline.encode_prompt(
                list(texts), None, device=self.device, max_sequence_length=self.options.max_sequence_length
            )
        return {"prompt_embeds": embeds.to(self.dtype), "pooled_prompt_embeds": pooled.to(self.dtype)}

    def pool(self, conditioning: TensorDict) -> Tensor:
        """CLIP's pooled features ``[B, 768]``."""
        return conditioning["pooled_prompt_embeds"].float()

    def predict(
        self, latents: Tensor, timestep: Tensor, conditioning: TensorDict, guidance_scale: Tensor | None = None
    ) -> Tensor:
        """As in `DenoisingModel.predict`; ``guidance_scale`` is the one that the network is told."""
        if not self.distilled and guidance_scale is not None:
            raise ValueError("this FLUX.1 was not distilled to be guided: leave guidance_scale out")
        told = {}
        if self.distilled:
            scale = torch.tensor(self.guidance_scale) if guidance_scale is None else guidance_scale
            told["guidance"] = scale.to(latents.device, torch.float32).expand(len(latents))
        true_scale = None if self.rows_per_sample == 1 else self.options.true_cfg_scale
        return self.guide(latents, timestep, conditioning, true_scale, told)

    def call(self, latents: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """As in `GuidedModel.call`."""
        embeds = conditioning["prompt_embeds"]
        output = self.called(
            hidden_states=pack(latents),
            timestep=timestep,
            guidance=conditioning.get("guidance"),
            encoder_hidden_states=embeds,
            pooled_projections=conditioning["pooled_prompt_embeds"],
            txt_ids=self._image_ids.new_zeros(embeds.shape[1], 3),
            img_ids=self._image_ids,
            return_dict=False,
        )[0]
        return unpack(output, *latents.shape[2:])

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` float32 in [0, 1]."""
        vae = self.pipeline.vae
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        return self.pixels(vae.decode(latents.to(self.dtype), return_dict=False)[0])


FAMILY = Family(
    description="FLUX.1: text to image, rectified flow, embedded guidance",
    options=FluxOptions,
    load=Flux.load,
    outline=Flux.outline,
    classes=("FluxPipeline",),
    path="flow",
    preset="dancegrpo-flux",
)
