"""FLUX.2: dev and klein."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn import functional as F

from denoise_env.arguments import integer, number
from denoise_env.models.base import Family
from denoise_env.models.flow_match import FlowOptions, check_schedule, flow_schedule
from denoise_env.models.guidance import GuidedModel
from denoise_env.models.pipeline import quiet
from denoise_env.prompts import Prompt
from denoise_env.schedules import Schedule, check_num_steps

LONGEST = 512


@dataclass
class Flux2Options(FlowOptions):
    """The options of FLUX.2."""

    family = "flux-2"

    guidance_scale: float | None = None
    """FLUX.2-dev: the scale that the network is told, which was distilled to be guided by it, with one row a sample.
    The base models of klein: scale w of classifier-free guidance, un + w (cond − un), with 1 for none and half the
    compute. A distilled klein has none, and says so. Default: 4 where there is one, as in the pipelines."""
    max_sequence_length: int = 512
    """Tokens of a prompt and the chat around it that the network attends to, 512 at most. Shorter prompts are padded to
    it and the padding is attended to, so that another length gives other images."""


class Flux2(GuidedModel):
    """A `Flux2KleinPipeline`'s or `Flux2Pipeline`'s components; arguments and errors as in `PipelineModel`.

    The latents are ``[128, H/16, W/16]``: 2 × 2 of the VAE's, normalised by its running statistics, are one token.
    """

    title = "FLUX.2"
    pipeline_class = ("Flux2KleinPipeline", "Flux2Pipeline")
    lora_targets = (
        r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    )
    prediction_type = "flow_prediction"
    options: Flux2Options

    def __init__(self, pipeline: Any, options: Any = None, device: str | torch.device = "cpu") -> None:
        options = options or Flux2Options()
        check_schedule(options)
        self.longest = integer(options.max_sequence_length, "max_sequence_length", 1, LONGEST)
        self.klein = type(pipeline).__name__ == "Flux2KleinPipeline"
        self.embedded = not self.klein and bool(pipeline.transformer.config.guidance_embeds)
        guided = self.klein and not pipeline.config.is_distilled
        self.rows_per_sample = self.rows_guided = 2 if guided else 1
        if self.embedded or guided:
            scale = 4.0 if options.guidance_scale is None else options.guidance_scale
            self.guidance_scale = number(scale, "guidance_scale", at_least=1 if guided else 0)
            self.rows_per_sample = 1 if scale == 1 else self.rows_guided
        elif options.guidance_scale not in (None, 1):
            warnings.warn(
                f"this FLUX.2 was distilled to be sampled without guidance: guidance_scale={options.guidance_scale} "
                "has no effect",
                stacklevel=2,
            )
        super().__init__(pipeline, options, device)
        trained, factor = pipeline.vae.config.sample_size, 2 * pipeline.vae_scale_factor
        self.latent_shape = (pipeline.transformer.config.in_channels, *self.latent_size((trained, trained), factor))
        height, width = (torch.arange(side, device=self.device) for side in self.latent_shape[1:])
        tokens = torch.arange(options.max_sequence_length, device=self.device)
        # Along frame, row, column and token of the text. The pipelines number a single image's frame 0.
        self._image_ids = torch.cartesian_prod(height[:1], height, width, height[:1])
        self._text_ids = torch.cartesian_prod(*[tokens[:1]] * 3, tokens)

    def schedule(self, num_steps: int) -> Schedule:
        """As in `DenoisingModel.schedule`; the shift depends on the number of steps too, and the network is told σ."""
        check_num_steps(num_steps)
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        settings = {"mu": compute_empirical_mu(len(self._image_ids), num_steps)}
        sigmas = np.linspace(1.0, 1 / num_steps, num_steps).tolist()
        return flow_schedule(self.pipeline.scheduler, self.options, num_steps, sigmas=sigmas, settings=settings)

    def check_prompt(self, prompt: Prompt) -> None:
        """As in `DenoisingModel.check_prompt`; FLUX.2-dev and a distilled klein take no negative text."""
        if prompt.negative is not None and self.embedded:
            raise ValueError(
                f"FLUX.2-dev's guidance is embedded in the network, where a negative text has no place: leave "
                f"{prompt.negative!r} out"
            )
        super().check_prompt(prompt)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """``prompt_embeds [P, tokens, features]``: three layers of a language model's states, one after another."""
        longest = self.options.max_sequence_length
        with quiet():
            embeds, _ = self.pipeline.encode_prompt(list(texts), device=self.device, max_sequence_length=longest)
        return {"prompt_embeds": embeds.to(self.dtype)}

    def count_tokens(self, texts: Sequence[str]) -> tuple[list[int], int]:
        """As in `PipelineModel.count_tokens`, in the chat that the pipeline makes of a text."""
        tokenizer = self.pipeline.tokenizer
        if self.klein:
            chats = [[{"role": "user", "content": text}] for text in texts]
            settings = {"add_generation_prompt": True, "enable_thinking": False}
        else:
            from diffusers.pipelines.flux2.pipeline_flux2 import format_input

            chats, settings = format_input(list(texts), self.pipeline.system_message), {}
        whole = tokenizer.apply_chat_template(chats, tokenize=False, **settings)
        tokenizer = tokenizer if self.klein else tokenizer.tokenizer
        tokens = tokenizer(whole, add_special_tokens=False).input_ids
        return [len(ids) for ids in tokens], self.options.max_sequence_length

    def pool(self, conditioning: TensorDict) -> Tensor:
        """The mean of the token features ``[B, features]``, padding included."""
        return conditioning["prompt_embeds"].float().mean(1)

    def predict(
        self, latents: Tensor, timestep: Tensor, conditioning: TensorDict, guidance_scale: Tensor | None = None
    ) -> Tensor:
        """As in `DenoisingModel.predict`; FLUX.2-dev is told ``guidance_scale``."""
        if self.guidance_scale is None and guidance_scale is not None:
            raise ValueError("this FLUX.2 was distilled to be sampled without guidance: leave guidance_scale out")
        if not self.embedded:
            return super().predict(latents, timestep, conditioning, guidance_scale)
        scale = torch.tensor(self.guidance_scale) if guidance_scale is None else guidance_scale
        told = {"guidance": scale.to(latents.device, torch.float32).expand(len(latents))}
        return self.guide(latents, timestep, conditioning, None, told)

    def call(self, latents: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """As in `GuidedModel.call`."""
        output = self.called(
            hidden_states=latents.flatten(2).mT,
            timestep=timestep,
            guidance=conditioning.get("guidance"),
            encoder_hidden_states=conditioning["prompt_embeds"],
            txt_ids=self._text_ids,
            img_ids=self._image_ids,
            return_dict=False,
        )[0]
        return output.mT.unflatten(2, latents.shape[2:])

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` float32 in [0, 1]."""
        vae = self.pipeline.vae
        std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        latents = latents * std[:, None, None] + vae.bn.running_mean[:, None, None]
        return self.pixels(vae.decode(F.pixel_shuffle(latents, 2).to(self.dtype), return_dict=False)[0])


FAMILY = Family(
    description="FLUX.2: text to image, rectified flow; embedded guidance (dev), classifier-free or none (klein)",
    options=Flux2Options,
    load=Flux2.load,
    outline=Flux2.outline,
    classes=Flux2.pipeline_class,
    path="flow",
    preset="dancegrpo-flux",
)
