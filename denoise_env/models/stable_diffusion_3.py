"""Stable Diffusion 3 and 3.5."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from denoise_env.arguments import integer
from denoise_env.models.base import Family
from denoise_env.models.flow_match import FlowOptions, check_schedule, flow_schedule
from denoise_env.models.guidance import GuidedModel
from denoise_env.models.pipeline import quiet
from denoise_env.schedules import Schedule, check_num_steps

LONGEST = 512


@dataclass
class StableDiffusion3Options(FlowOptions):
    """The options of Stable Diffusion 3."""

    family = "stable-diffusion-3"

    guidance_scale: float = 7.0
    """Scale w of classifier-free guidance, v_u + w (v_c − v_u) with and without the prompt, in rollout and in training.
    With 1 there is no guidance, and half the compute."""
    max_sequence_length: int = 256
    """Tokens of T5's that the network attends to, 512 at most. Shorter prompts are padded to it and the padding is
    attended to, so that another length gives other images."""


class StableDiffusion3(GuidedModel):
    """A `StableDiffusion3Pipeline`'s components; arguments and errors as in `PipelineModel`.

    T5, the third text encoder, may be left out of a checkpoint: the network then attends to zeros in its place. LoRA
    adapts what Flow-GRPO adapts: the joint attention of image and text, not 3.5 medium's second one (``attn2``).
    """

    title = "Stable Diffusion 3"
    pipeline_class = "StableDiffusion3Pipeline"
    encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    optional_encoders = ("text_encoder_3",)
    lora_targets = [  # noqa: RUF012
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    ]
    pipeline_arguments = {"image_encoder": None, "feature_extractor": None}  # noqa: RUF012
    entries = ("prompt_embeds", "pooled_prompt_embeds")
    prediction_type = "flow_prediction"
    options: StableDiffusion3Options

    def __init__(self, pipeline: Any, options: Any = None, device: str | torch.device = "cpu") -> None:
        options = options or StableDiffusion3Options()
        check_schedule(options)
        self.longest = integer(options.max_sequence_length, "max_sequence_length", 1, LONGEST)
        self.guide_by(options.guidance_scale)
        super().__init__(pipeline, options, device)
        config, factor = pipeline.transformer.config, pipeline.vae_scale_factor
        trained = config.sample_size * factor
        size = self.latent_size((trained, trained), factor, config.patch_size)
        largest = config.pos_embed_max_size * config.patch_size
        if max(size) > largest:
            raise ValueError(
                f"height and width must be at most {largest * factor}, where this network's positions end, "
                f"not {size[0] * factor} and {size[1] * factor}"
            )
        self.latent_shape = (config.in_channels, *size)

    def schedule(self, num_steps: int) -> Schedule:
        """As in `DenoisingModel.schedule`; the network is told 1000 σ."""
        check_num_steps(num_steps)
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        scheduler, settings = self.pipeline.scheduler, {}
        if scheduler.config.get("use_dynamic_shifting"):
            _, height, width = self.latent_shape
            names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
            tokens = height * width // self.pipeline.transformer.config.patch_size**2
            settings["mu"] = calculate_shift(tokens, *(scheduler.config[name] for name in names))
        return flow_schedule(scheduler, self.options, num_steps, settings=settings, timestep_scale=1000)

    def count_tokens(self, texts: Sequence[str]) -> tuple[list[int], int]:
        """As in `PipelineModel.count_tokens`: T5's, or without T5 CLIP's."""
        pipeline, limit = self.pipeline, self.options.max_sequence_length
        tokenizer = pipeline.tokenizer_3
        if pipeline.text_encoder_3 is None:
            tokenizer, limit = pipeline.tokenizer, pipeline.tokenizer_max_length
        return [len(ids) for ids in tokenizer(list(texts)).input_ids], limit

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """``prompt_embeds [P, tokens, 4096]`` of both CLIPs, then T5; ``pooled_prompt_embeds [P, 2048]``."""
        with quiet():
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                list(texts),
                None,
                None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.options.max_sequence_length,
            )
        return {"prompt_embeds": embeds.to(self.dtype), "pooled_prompt_embeds": pooled.to(self.dtype)}

    def pool(self, conditioning: TensorDict) -> Tensor:
        """The CLIPs' pooled features ``[B, 2048]``."""
        return conditioning["pooled_prompt_embeds"].float()

    def call(self, latents: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """As in `GuidedModel.call`."""
        return self.called(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=conditioning["prompt_embeds"],
            pooled_projections=conditioning["pooled_prompt_embeds"],
            return_dict=False,
        )[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` float32 in [0, 1]."""
        vae = self.pipeline.vae
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        return self.pixels(vae.decode(latents.to(self.dtype), return_dict=False)[0])


FAMILY = Family(
    description="Stable Diffusion 3 and 3.5: text to image, rectified flow, classifier-free guidance",
    options=StableDiffusion3Options,
    load=StableDiffusion3.load,
    outline=StableDiffusion3.outline,
    classes=("StableDiffusion3Pipeline",),
    path="flow",
    preset="flow-grpo",
)
