"""Qwen-Image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from denoise_env.arguments import integer
from denoise_env.models.base import Family
from denoise_env.models.flow_match import FlowOptions, check_schedule, pack, shifted_by_length, unpack
from denoise_env.models.masked_text import MaskedTextModel
from denoise_env.models.pipeline import quiet
from denoise_env.schedules import Schedule

LONGEST = 1024


@dataclass
class QwenImageOptions(FlowOptions):
    """The options of Qwen-Image."""

    family = "qwen-image"

    guidance_scale: float = 4.0
    """Scale w of classifier-free guidance, un + w (cond − un), rescaled to the norm that the answer with the prompt has
    at each token; the pipeline's ``true_cfg_scale``. With 1 there is no guidance, and half the compute. A prompt
    without a negative text has " ", where the plain pipeline would not guide."""
    max_sequence_length: int = 512
    """Tokens of a prompt that are kept, 1024 at most; 5 of them belong to the template around it."""


class QwenImage(MaskedTextModel):
    """A `QwenImagePipeline`'s components; arguments and errors as in `PipelineModel`.

    The latents are ``[16, H/8, W/8]``; the network gets 2 × 2 of them as one token. The VAE is one for videos and gets
    them as a video of one frame.
    """

    title = "Qwen-Image"
    pipeline_class = "QwenImagePipeline"
    lora_targets = [  # noqa: RUF012
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    ]
    default_negative = " "
    prediction_type = "flow_prediction"
    options: QwenImageOptions

    def __init__(self, pipeline: Any, options: Any = None, device: str | torch.device = "cpu") -> None:
        options = options or QwenImageOptions()
        check_schedule(options)
        self.longest = integer(options.max_sequence_length, "max_sequence_length", 1, LONGEST)
        self.guide_by(options.guidance_scale)
        super().__init__(pipeline, options, device)
        factor, config = pipeline.vae_scale_factor, pipeline.transformer.config
        trained = pipeline.default_sample_size * factor
        self.latent_shape = (config.in_channels // 4, *self.latent_size((trained, trained), factor, patch=2))
        self.text_width = config.joint_attention_dim

    def schedule(self, num_steps: int) -> Schedule:
        """As in `DenoisingModel.schedule`; the network is told σ.

        The checkpoint's own levels are stretched so that the last before 0 is σ = 0.02, which takes 2 steps at least.
        """
        tokens = self.latent_shape[1] * self.latent_shape[2] // 4
        return shifted_by_length(self.pipeline.scheduler, self.options, num_steps, tokens)

    def count_tokens(self, texts: Sequence[str]) -> tuple[list[int], int]:
        """As in `PipelineModel.count_tokens`, without those of the template's start."""
        pipeline, start = self.pipeline, self.pipeline.prompt_template_encode_start_idx
        tokens = pipeline.tokenizer([pipeline.prompt_template_encode.format(text) for text in texts]).input_ids
        return [len(ids) - start for ids in tokens], self.longest

    def features(self, texts: Sequence[str]) -> list[Tensor]:
        """Qwen2.5-VL's last hidden states ``[L, 3584]`` of each text in its template, without the template's start."""
        with quiet():
            embeds, mask = self.pipeline.encode_prompt(list(texts), self.device, max_sequence_length=self.longest)
        return list(embeds) if mask is None else [row[kept] for row, kept in zip(embeds, mask.bool(), strict=True)]

    def call(self, latents: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """As in `GuidedModel.call`; where there is no padding there is no mask, as faster attention needs."""
        rows, _, height, width = latents.shape
        mask = conditioning["prompt_embeds_mask"]
        output = self.called(
            hidden_states=pack(latents),
            timestep=timestep,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_hidden_states_mask=mask if min(self.lengths(mask)) < mask.shape[1] else None,
            img_shapes=[[(1, height // 2, width // 2)]] * rows,
            return_dict=False,
        )[0]
        return unpack(output, height, width)

    def combine(self, unconditional: Tensor, conditional: Tensor, scale: float | Tensor) -> Tensor:
        """As in `GuidedModel.combine`, with the norm of the conditional output at every token (4 C numbers)."""
        guided = pack(super().combine(unconditional, conditional, scale))
        norm = pack(conditional).norm(dim=-1, keepdim=True)
        return unpack(guided * (norm / guided.norm(dim=-1, keepdim=True)), *conditional.shape[2:])

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` float32 in [0, 1]."""
        vae, latents = self.pipeline.vae, latents.float()
        mean, std = (
            latents.new_tensor(each)[:, None, None] for each in (vae.config.latents_mean, vae.config.latents_std)
        )
        frames = (latents * std + mean).to(self.dtype)[:, :, None]
        return self.pixels(vae.decode(frames, return_dict=False)[0][:, :, 0])


FAMILY = Family(
    description="Qwen-Image: text to image, rectified flow, classifier-free guidance of kept norm",
    options=QwenImageOptions,
    load=QwenImage.load,
    outline=QwenImage.outline,
    classes=("QwenImagePipeline",),
    path="flow",
    preset="flow-grpo",
)
