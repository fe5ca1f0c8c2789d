"""Make the embedded world's Stable Diffusion from nothing.

``python -m denoise_env.shapes.pretrain --out DIR``
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

from denoise_env.models.pipeline import save_pipeline
from denoise_env.progress import progress
from denoise_env.shapes.grammar import ALL, HELD_OUT, TRAIN, parse
from denoise_env.shapes.pretraining import Source, build_clip, encode_pictures, sample_batches, step, train_vae
from denoise_env.shapes.renderer import BASE_SIZE, render
from denoise_env.shapes.tokenizer import build_tokenizer
from denoise_env.shapes.verifier import Verifier

SOURCE = Source(TRAIN, render)


@dataclass
class Config:
    """Pretraining on rendered scenes; the defaults make the weights that ship with the package."""

    out: Path
    """Directory to write the pipeline to, in the diffusers layout."""
    seed: int = 0
    """Seed of weights, pictures and noise."""
    vae_steps: int = 1600
    """Optimiser steps of the autoencoder, 16 pictures each."""
    steps: int = 1500
    """Optimiser steps of the denoiser and its text encoder."""
    batch_size: int = 64
    """Latents per step of the denoiser."""
    lr: float = 2e-3
    """Peak of the one-cycle learning rate."""
    pictures: int = 12000
    """Rendered pictures the denoiser is trained on."""
    drop: float = 0.1
    """Share of captions replaced by the empty prompt, for classifier-free guidance."""
    drop_words: float = 0.25
    """Share of captions that lose their colour, and of those that lose their background: otherwise a pair of the
    two foretells the shapes it was seen with, and held-out captions get one of those."""
    ema: float = 0.995
    """Decay of the averaged weights, which are the ones saved."""
    eval_images: int = 1008
    """Samples per split that the verifier reads at the end; 0 for none."""
    threads: int = 1
    """CPU threads; another number adds in another order, and gives slightly different weights."""


def build_vae() -> AutoencoderKL:
    """An autoencoder from 32 × 32 pictures to 8 × 8 × 4 latents."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=BASE_SIZE,
    )
    # The second half of the moments is a log-variance: at 0 its noise would drown the young latents.
    nn.init.constant_(vae.quant_conv.bias[4:], -6.0)
    return vae


def build_unet(text_width: int) -> UNet2DConditionModel:
    """A denoiser of 8 × 8 × 4 latents with cross-attention to the prompt at 4 × 4."""
    return UNet2DConditionModel(
        sample_size=BASE_SIZE // 4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=2,
        cross_attention_dim=text_width,
    )


def build_scheduler() -> DDIMScheduler:
    """DDIM with Stable Diffusion's configuration."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


def shorter(caption: str) -> list[str]:
    """The caption, without its background, without its colour, and with its shape alone."""
    scene = parse(caption)
    objects = (f"a {scene.colour} {scene.shape}", f"a {scene.shape}")
    return [text for thing in objects for text in (f"{thing} on {scene.background}", thing)]


def train_denoiser(pipe: StableDiffusionPipeline, config: Config, generator: torch.Generator) -> float:
    """Fit denoiser and text encoder to predict the noise, and leave their averages in the pipeline.

    Returns:
        The mean loss of the last hundred steps.
    """
    latents, places = encode_pictures(pipe.vae, SOURCE, config.pictures, generator)
    captions = [*(text for caption in TRAIN for text in shorter(caption)), ""]
    tokens = pipe.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    parameters = [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=1e-3)
    schedule = OneCycleLR(optimizer, config.lr, total_steps=config.steps, pct_start=0.1)
    ema = EMAModel(parameters, decay=config.ema)
    losses: list[float] = []
    for _ in (bar := progress(range(config.steps), desc="denoiser")):
        rows = torch.randint(len(latents), (config.batch_size,), generator=generator)
        draws = torch.rand(3, config.batch_size, generator=generator)
        lost = (draws[:2] < config.drop_words).long()
        prompts = 4 * places[rows] + 2 * lost[0] + lost[1]
        prompts = prompts.masked_fill(draws[2] < config.drop, len(captions) - 1)
        noise = torch.randn(config.batch_size, *latents.shape[1:], generator=generator)
        timesteps = torch.randint(1000, (config.batch_size,), generator=generator)
        noisy = pipe.scheduler.add_noise(latents[rows], noise, timesteps)
        hidden = pipe.text_encoder(tokens[prompts]).last_hidden_state
        loss = F.mse_loss(pipe.unet(noisy, timesteps, hidden).sample, noise)
        step(loss, optimizer, schedule, parameters)
        ema.step(parameters)
        losses = [*losses[-99:], loss.item()]
        bar.set_postfix_str(f"loss {sum(losses) / len(losses):.4f}", refresh=False)
    ema.copy_to(parameters)
    return sum(losses) / len(losses)


def sample(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    generator: torch.Generator,
    guidance: float = 1.0,
    num_steps: int = 10,
    batch_size: int = 126,
) -> Tensor:
    """Sample with DDIM at eta 1: ``[B, 3, 32, 32]`` in [0, 1]; guidance 1 means none."""
    told: dict[str, Any] = {"num_inference_steps": num_steps, "guidance_scale": guidance, "eta": 1.0}
    return sample_batches(pipe, prompts, batch_size, generator=generator, **told)


def share_right(
    pipe: StableDiffusionPipeline,
    captions: Sequence[str],
    n: int,
    generator: torch.Generator,
    guidance: float = 1.0,
) -> dict[str, float]:
    """Share of n samples, spread evenly over the captions, whose attributes are right.

    Returns:
        The shares by the keys of `Verifier.correct`, and the mean score under "score".
    """
    prompts = [captions[i % len(captions)] for i in range(n)]
    images, verifier = sample(pipe, prompts, generator, guidance), Verifier()
    shares = {name: hits.float().mean().item() for name, hits in verifier.correct(images, prompts).items()}
    return shares | {"score": verifier.score(images, prompts).mean().item()}


def pretrain(config: Config) -> StableDiffusionPipeline:
    """Build, train and save a pipeline, and print what was measured."""
    started = time.perf_counter()
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    tokenizer = build_tokenizer(ALL)
    text_encoder = build_clip(tokenizer)
    pipe = StableDiffusionPipeline(
        vae=build_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=build_unet(text_encoder.config.hidden_size),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    error = train_vae(pipe.vae, SOURCE, config.vae_steps, generator)
    pipe.vae.requires_grad_(False)
    generator.manual_seed(config.seed + 1)
    loss = train_denoiser(pipe, config, generator)
    save_pipeline(pipe, config.out)
    tokenizer.backend_tokenizer.model.save(str(config.out / "tokenizer"))
    size = sum(file.stat().st_size for file in config.out.rglob("*") if file.is_file())
    print(f"autoencoder error {error:.5f}, denoiser loss {loss:.4f}, {size / 1e6:.2f} MB")
    print(f"trained in {time.perf_counter() - started:.0f} s")
    if config.eval_images:
        for name, captions in (("train", TRAIN), ("held out", HELD_OUT)):
            shares = share_right(pipe, captions, config.eval_images, generator)
            report = ", ".join(f"{key} {share:.3f}" for key, share in shares.items())
            print(f"{name}, {config.eval_images} samples: {report}")
    return pipe


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `pretrain`."""
    config = tyro.cli(Config, args=args, description=Config.__doc__)
    torch.set_num_threads(config.threads)
    pretrain(config)


if __name__ == "__main__":
    main()
