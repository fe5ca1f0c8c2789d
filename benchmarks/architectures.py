"""The published presets' models in their true architecture: whole from configuration alone, or shallow with weights.

Widths, heads, vocabularies and VAEs are the published ones. Those of FLUX.1-dev, HunyuanVideo and their VAEs are
diffusers' defaults; Stable Diffusion 1.4's and 3.5 medium's are written here. Of SkyReels only its 32 channels could be
read, and not whether its network is told a guidance scale; LLaMA's vocabulary is written from memory. No hub is needed.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from agents.training.presets.published import FLUX, HUNYUAN, SD14, SD15, SD35, SKYREELS
from benchmarks.tokenizers import clip_tokenizer, llama_tokenizer, t5_tokenizer
from denoise_env.models.pipeline import quiet, save_pipeline


@dataclass(frozen=True)
class Depth:
    """How many blocks of each kind; ``None`` for all.

    Attributes:
        network: blocks of the network: a UNet's levels with their blocks a level, or a transformer's blocks of each
            kind.
        encoders: layers of every text encoder, up to the one whose states are read.
    """

    network: tuple[int, ...] | None = None
    encoders: int | None = None


def _clip(
    kind: str, width: int, heads: int, layers: int, projection: int, depth: Depth, act: str = "quick_gelu"
) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=heads,
        num_hidden_layers=depth.encoders or layers,
        projection_dim=projection,
        hidden_act=act,
    )
    return getattr(transformers, kind)(config)


def _t5(depth: Depth) -> Any:
    """The encoder of T5 v1.1 XXL."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=depth.encoders or 24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
    )
    return T5EncoderModel(config)


def _vae(latents: int, **changes: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=latents,
        **changes,
    )


_OF_FLOWS: dict[str, Any] = {"sample_size": 1024, "use_quant_conv": False, "use_post_quant_conv": False}


def stable_diffusion_1(depth: Depth) -> dict[str, Any]:
    """Stable Diffusion 1.4 and 1.5."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    levels, layers = depth.network or (4, 2)
    return {
        "vae": lambda: _vae(4, sample_size=512),
        "text_encoder": lambda: _clip("CLIPTextModel", 768, 12, 12, 768, depth),
        "unet": lambda: UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=768,
            attention_head_dim=8,
            block_out_channels=(320, 640, 1280, 1280)[:levels],
            layers_per_block=layers,
            down_block_types=(*["CrossAttnDownBlock2D"] * (levels - 1), "DownBlock2D"),
            up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * (levels - 1)),
        ),
        "tokenizer": clip_tokenizer(77),
        "scheduler": DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
    }


def stable_diffusion_3_5(depth: Depth) -> dict[str, Any]:
    """Stable Diffusion 3.5 medium."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    dual, plain = depth.network or (13, 11)
    return {
        "vae": lambda: _vae(16, scaling_factor=1.5305, shift_factor=0.0609, **_OF_FLOWS),
        "text_encoder": lambda: _clip("CLIPTextModelWithProjection", 768, 12, 12, 768, depth),
        "text_encoder_2": lambda: _clip("CLIPTextModelWithProjection", 1280, 20, 32, 1280, depth, "gelu"),
        "text_encoder_3": lambda: _t5(depth),
        "transformer": lambda: SD3Transformer2DModel(
            sample_size=128,
            num_layers=dual + plain,
            attention_head_dim=64,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(dual)),
            qk_norm="rms_norm",
        ),
        "tokenizer": clip_tokenizer(77),
        "tokenizer_2": clip_tokenizer(77),
        "tokenizer_3": t5_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def flux(depth: Depth) -> dict[str, Any]:
    """FLUX.1-dev."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    double, single = depth.network or (19, 38)
    return {
        "vae": lambda: _vae(16, scaling_factor=0.3611, shift_factor=0.1159, **_OF_FLOWS),
        "text_encoder": lambda: _clip("CLIPTextModel", 768, 12, 12, 768, depth),
        "text_encoder_2": lambda: _t5(depth),
        "transformer": lambda: FluxTransformer2DModel(
            num_layers=double, num_single_layers=single, guidance_embeds=True
        ),
        "tokenizer": clip_tokenizer(77),
        "tokenizer_2": t5_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
    }


def _llama(depth: Depth) -> Any:
    """LLaMA 3 8B in LLaVA's version; the states that are read come from the layer below its last two."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=128320,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=(depth.encoders or 30) + 2,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500000.0,
    )
    return LlamaModel(config)


def hunyuan_video(depth: Depth, in_channels: int = 16) -> dict[str, Any]:
    """HunyuanVideo."""
    from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, HunyuanVideoTransformer3DModel

    double, single = depth.network or (20, 40)
    return {
        "vae": AutoencoderKLHunyuanVideo,
        "text_encoder": lambda: _llama(depth),
        "text_encoder_2": lambda: _clip("CLIPTextModel", 768, 12, 12, 768, depth),
        "transformer": lambda: HunyuanVideoTransformer3DModel(
            in_channels=in_channels, num_layers=double, num_single_layers=single
        ),
        "tokenizer": llama_tokenizer(),
        "tokenizer_2": clip_tokenizer(77),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
    }


def skyreels(depth: Depth) -> dict[str, Any]:
    """SkyReels-V1, image to video: HunyuanVideo's parts, and a network that gets the first frame's latents too."""
    return hunyuan_video(depth, in_channels=32)


ARCHITECTURES: dict[str, tuple[str, Callable[[Depth], dict[str, Any]]]] = {
    SD14: ("StableDiffusionPipeline", stable_diffusion_1),
    SD15: ("StableDiffusionPipeline", stable_diffusion_1),
    SD35: ("StableDiffusion3Pipeline", stable_diffusion_3_5),
    FLUX: ("FluxPipeline", flux),
    HUNYUAN: ("HunyuanVideoPipeline", hunyuan_video),
    SKYREELS: ("HunyuanSkyreelsImageToVideoPipeline", skyreels),
}
"""A checkpoint's id → its pipeline's class, and what makes the pipeline's parts at a depth, modules when called."""
MODULES = {"vae", "unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"}


def write_configuration(model: str, directory: Path, depth: Depth | None = None) -> None:
    """Write a checkpoint's configuration files and small tokenizers, without weights."""
    kind, make = ARCHITECTURES[model]
    index: dict[str, Any] = {"_class_name": kind}
    for name, part in make(depth or Depth()).items():
        if name in MODULES:
            with torch.device("meta"):
                module: Any = part()
            library = "transformers" if name.startswith("text_encoder") else "diffusers"
            index[name] = [library, type(module).__name__]
            if library == "diffusers":
                module.save_config(directory / name)
            else:
                module.config.save_pretrained(directory / name)
        else:
            library = "transformers" if name.startswith("tokenizer") else "diffusers"
            index[name] = [library, type(part).__name__]
            part.save_pretrained(directory / name)
    (directory / "model_index.json").write_text(json.dumps(index))


def write_weights(model: str, directory: Path, depth: Depth, dtype: torch.dtype) -> None:
    """Write a shallow checkpoint with random weights of ``dtype``."""
    import diffusers

    kind, make = ARCHITECTURES[model]
    torch.manual_seed(0)
    with quiet():
        parts = {name: part() if name in MODULES else part for name, part in make(depth).items()}
        for name in MODULES & parts.keys():
            parts[name].to(dtype)
        absent = {"safety_checker": None, "feature_extractor": None} if kind == "StableDiffusionPipeline" else {}
        save_pipeline(getattr(diffusers, kind)(**parts, **absent), directory)
