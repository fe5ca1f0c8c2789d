"""Z-Image and Z-Image Turbo."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from denoise_env.arguments import integer, number
from denoise_env.models.base import Family
from denoise_env.models.flow_match import FlowOptions, check_schedule, shifted_by_length
from denoise_env.models.masked_text import MaskedTextModel
from denoise_env.models.pipeline import quiet
from denoise_env.schedules import Schedule

TRAINED = 1024
MULTIPLE = 32


@dataclass
class ZImageOptions(FlowOptions):
    """The options of Z-Image."""

    family = "z-image"

    guidance_scale: float = 5.0
    """Scale w of classifier-free guidance as Z-Image's pipeline counts it, cond + w (cond − un), which is one less than
    elsewhere: 0 is no guidance, and half the compute. Z-Image Turbo needs 0. The model's own ``guidance_scale``, and
    what agents and controls say of guidance, is w + 1, so that 1 is no guidance in every family."""
    cfg_normalization: float = 0.0
    """The norm of a sample's guided output is at most this times that of the output with the prompt; 0 for no limit."""
    cfg_truncation: float = 1.0
    """Steps with 1 − σ above this are not guided, though their compute is the same; 1 guides all."""
    max_sequence_length: int = 512
    """Tokens of a prompt that are kept, the chat template around it among them."""


class ZImage(MaskedTextModel):
    """A `ZImagePipeline`'s components; arguments and errors as in `PipelineModel`.

    The latents are ``[16, H/8, W/8]``. The network gets captions as a list, each as long as its text, so that a
    compiled one is compiled for every combination of lengths.
    """

    title = "Z-Image"
    pipeline_class = "ZImagePipeline"
    prediction_type = "flow_prediction"
    guidance_scale: float
    options: ZImageOptions

    def __init__(self, pipeline: Any, options: Any = None, device: str | torch.device = "cpu") -> None:
        options = options or ZImageOptions()
        check_schedule(options)
        config = pipeline.transformer.config
        # A caption padded to a multiple of 32 has the places 1, 2, …, and the image the one after them.
        most = (config.axes_lens[0] - 2) // MULTIPLE * MULTIPLE
        self.longest = integer(options.max_sequence_length, "max_sequence_length", 1, most)
        self.guidance_scale = 1 + number(options.guidance_scale, "guidance_scale", at_least=0)
        number(options.cfg_normalization, "cfg_normalization", at_least=0)
        number(options.cfg_truncation, "cfg_truncation", at_least=0)
        self.rows_per_sample = 1 if options.guidance_scale == 0 else 2
        super().__init__(pipeline, options, device)
        size = self.latent_size((TRAINED, TRAINED), pipeline.vae_scale_factor, patch=2)
        self.latent_shape = (config.in_channels, *size)
        self.text_width = config.cap_feat_dim

    def schedule(self, num_steps: int) -> Schedule:
        """As in `DenoisingModel.schedule`; the network is told 1 − σ."""
        tokens = self.latent_shape[1] * self.latent_shape[2] // 4
        found = shifted_by_length(self.pipeline.scheduler, self.options, num_steps, tokens)
        return replace(found, timesteps=found.alphas[:-1].float())

    def count_tokens(self, texts: Sequence[str]) -> tuple[list[int], int]:
        """As in `PipelineModel.count_tokens`, in the chat template."""
        chats = [[{"role": "user", "content": text}] for text in texts]
        tokenizer = self.pipeline.tokenizer
        templated = tokenizer.apply_chat_template(
            chats, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return [len(ids) for ids in tokenizer(templated).input_ids], self.longest

    def features(self, texts: Sequence[str]) -> list[Tensor]:
        """Qwen3's hidden states before its last layer, ``[L, 2560]``, of each text in the chat template."""
        with quiet():  # the pipeline writes into the list that it is given
            found, _ = self.pipeline.encode_prompt(
                list(texts), self.device, do_classifier_free_guidance=False, max_sequence_length=self.longest
            )
        return found

    def predict(
        self, latents: Tensor, timestep: Tensor, conditioning: TensorDict, guidance_scale: Tensor | None = None
    ) -> Tensor:
        """As in `DenoisingModel.predict`; ``guidance_scale`` 1 is no guidance, not the option's 0."""
        limit = self.options.cfg_truncation
        if limit < 1 and (guidance_scale is not None or self.rows_per_sample == 2):
            scale = torch.tensor(self.guidance_scale) if guidance_scale is None else guidance_scale
            guided = timestep.to(latents.device) <= limit
            guidance_scale = torch.where(guided, scale.to(latents.device), 1.0).expand(len(latents))
        return super().predict(latents, timestep, conditioning, guidance_scale)

    def call(self, latents: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """As in `GuidedModel.call`. The network's x0 − ε becomes ε − x0."""
        lengths = self.lengths(conditioning["prompt_embeds_mask"])
        captions = [row[:length] for row, length in zip(conditioning["prompt_embeds"], lengths, strict=True)]
        output = self.called(list(latents[:, :, None]), timestep, captions, return_dict=False)[0]
        return -torch.stack(output)[:, :, 0]

    def combine(self, unconditional: Tensor, conditional: Tensor, scale: float | Tensor) -> Tensor:
        """As in `GuidedModel.combine`, its norm limited by ``cfg_normalization``; without guidance it is not."""
        guided = super().combine(unconditional, conditional, scale)
        if limit := self.options.cfg_normalization:
            norms = [each.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for each in (conditional, guided)]
            guided = guided * (limit * norms[0] / norms[1]).clamp(max=1)
        return torch.where(scale == 1, conditional, guided) if isinstance(scale, Tensor) else guided

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` float32 in [0, 1]."""
        vae = self.pipeline.vae
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        return self.pixels(vae.decode(latents.to(self.dtype), return_dict=False)[0])


FAMILY = Family(
    description="Z-Image: text to image, rectified flow, classifier-free guidance; Turbo without",
    options=ZImageOptions,
    load=ZImage.load,
    outline=ZImage.outline,
    classes=("ZImagePipeline",),
    path="flow",
    preset="flow-grpo",
)
