"""Stable Diffusion 1.x and 2.x, and the tiny one of `denoise_env.shapes`, on diffusers' own components."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.training_utils import cast_training_params
from tensordict import TensorDict
from torch import Tensor

from denoise_env.kernels import PredictionType, Schedule, check_num_steps
from denoise_env.layout import save_pipeline
from denoise_env.models.base import DenoisingModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


class StableDiffusion(DenoisingModel):
    """A `StableDiffusionPipeline`'s components behind the model interface.

    Args:
        pipeline: with its UNet, VAE, text encoder, tokenizer and any scheduler (its noise table is used with
            DDIM's timesteps).
        guidance_scale: w of classifier-free guidance ε_u + w (ε_c − ε_u), in rollout and training alike;
            1 is no guidance and half the compute.
        height: of the image in pixels; default: what the UNet was trained for.
        width: likewise.
        dtype: "bf16" computes under autocast and stores latents in bfloat16; the trained parameters stay float32.
        lora_rank: rank of LoRA adapters on the UNet's attention; 0 trains the whole UNet.
        lora_alpha: LoRA's scale is ``lora_alpha / lora_rank``; default: the rank.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        seed: of the adapters' first weights.
        device: where everything lives.

    Raises:
        ValueError: an option out of range.
    """

    network: Any

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        *,
        guidance_scale: float = 5.0,
        height: int | None = None,
        width: int | None = None,
        dtype: Literal["fp32", "bf16"] = "fp32",
        lora_rank: int = 0,
        lora_alpha: float | None = None,
        gradient_checkpointing: bool = False,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {list(DTYPES)}, not {dtype!r}")
        if guidance_scale < 1:
            raise ValueError(f"guidance_scale must be at least 1 (no guidance), not {guidance_scale}")
        if lora_rank < 0:
            raise ValueError(f"lora_rank must be 0 (train the whole UNet) or a positive rank, not {lora_rank}")
        self.pipeline = pipeline
        self.guidance_scale = guidance_scale
        self.rows_per_sample = 1 if guidance_scale == 1 else 2
        self.dtype = DTYPES[dtype]
        self.lora_rank = lora_rank
        self.latent_shape = self._latent_shape(height, width)
        self.prediction_type: PredictionType = pipeline.scheduler.config.prediction_type

        with _quiet():
            pipeline.text_encoder.requires_grad_(False).to(device, self.dtype).eval()
            pipeline.vae.requires_grad_(False).to(device, self.dtype).eval()
            self.network = pipeline.unet.to(device).eval()
            if lora_rank:
                self._add_adapters(lora_rank, lora_rank if lora_alpha is None else lora_alpha, seed)
        if gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        self._unconditional = self._embed([""])

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> "StableDiffusion":
        """Load a checkpoint in the diffusers layout.

        Args:
            name: a directory or a hub id ("CompVis/stable-diffusion-v1-4").
            options: this class's.

        Raises:
            ValueError: nothing that can be loaded is there.
        """
        try:
            with _quiet():
                pipeline = StableDiffusionPipeline.from_pretrained(
                    name, safety_checker=None, requires_safety_checker=False, local_files_only=Path(name).is_dir()
                )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"cannot load a Stable Diffusion checkpoint from {str(name)!r}: {error}") from error
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline, **options)

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        factor, config = self.pipeline.vae_scale_factor, self.pipeline.unet.config
        side = config.sample_size
        trained = (side, side) if isinstance(side, int) else tuple(side)
        pixels = [height or trained[0] * factor, width or trained[1] * factor]
        if any(p <= 0 or p % factor for p in pixels):
            raise ValueError(f"height and width must be multiples of {factor}, not {pixels[0]}x{pixels[1]}")
        return (config.in_channels, pixels[0] // factor, pixels[1] // factor)

    def _add_adapters(self, rank: int, alpha: float, seed: int) -> None:
        from peft import LoraConfig

        self.network.requires_grad_(False).to(self.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network.add_adapter(
                LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=LORA_TARGETS)
            )
        cast_training_params(self.network, dtype=torch.float32)

    def schedule(self, num_steps: int) -> Schedule:
        """As in `DenoisingModel.schedule`: the checkpoint's ᾱ table at DDIM's timesteps."""
        scheduler = DDIMScheduler.from_config(self.pipeline.scheduler.config)
        config = scheduler.config
        check_num_steps(num_steps, config.num_train_timesteps - config.steps_offset)
        scheduler.set_timesteps(num_steps)
        return Schedule.diffusion(scheduler.alphas_cumprod, scheduler.timesteps, float(scheduler.final_alpha_cumprod))

    @torch.no_grad()
    def _embed(self, prompts: Sequence[str]) -> Tensor:
        embeds, _ = self.pipeline.encode_prompt(
            list(prompts), self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return embeds.to(self.dtype)

    def encode(self, prompts: Sequence[str]) -> TensorDict:
        """``prompt_embeds [P, tokens, features]``; a prompt with too many tokens is cut, with a warning."""
        tokenizer = self.pipeline.tokenizer
        for prompt, ids in zip(prompts, tokenizer(list(prompts)).input_ids, strict=True):
            if len(ids) > tokenizer.model_max_length:
                warnings.warn(
                    f"the text encoder reads {tokenizer.model_max_length} tokens; the end of this prompt of "
                    f"{len(ids)} is cut off: {prompt!r}",
                    stacklevel=2,
                )
        with _quiet():
            embeds = self._embed(prompts)
        return TensorDict({"prompt_embeds": embeds}, batch_size=len(prompts))

    def pool(self, conditioning: TensorDict) -> Tensor:
        """The mean of the text encoder's token features ``[B, features]``."""
        return conditioning["prompt_embeds"].float().mean(1)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

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
            embeds = torch.cat([self._unconditional.expand_as(embeds), embeds])
        with self._autocast():
            output = self.called(latents, timestep, encoder_hidden_states=embeds, return_dict=False)[0]
        if not guided:
            return output
        unconditional, conditional = output.float().chunk(2)
        return unconditional + scale * (conditional - unconditional)

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` float32 in [0, 1]."""
        vae = self.pipeline.vae
        images = vae.decode(latents.to(self.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def export(self, directory: Path) -> None:
        """A whole pipeline, or ``pytorch_lora_weights.safetensors`` for ``load_lora_weights``."""
        if not self.lora_rank:
            with _quiet():
                save_pipeline(self.pipeline, directory)
            return
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft import get_peft_model_state_dict

        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.network))
        self.pipeline.save_lora_weights(directory, unet_lora_layers=layers)

    def describe(self) -> dict[str, Any]:
        """As in `DenoisingModel.describe`, with the UNet's config and the adapters' rank."""
        config = {k: v for k, v in self.network.config.items() if not k.startswith("_")}
        return {**super().describe(), "lora_rank": self.lora_rank, "unet": config}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what diffusers and transformers say about what is done on purpose here."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers = (diffusers_logging, transformers_logging)
    levels = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
        logger.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.set_verbosity(level)
            logger.enable_progress_bar()
