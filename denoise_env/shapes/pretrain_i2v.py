"""Make a tiny SkyReels-I2V of moving shapes from nothing: it goes on from a clip's first frame as a caption says.

``python -m denoise_env.shapes.pretrain_i2v --out DIR``

The stages are those of `denoise_env.shapes.pretrain_video`, but for guidance: as in SkyReels it is classifier-free, so
the network is told no scale. It is given the first frame's latents as 8 further channels, and zeros for the frames
after. A single frame and a clip have other latents, since the autoencoder normalises over all frames of what it is
given: the first frame is encoded alone, as the pipeline does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from diffusers import HunyuanSkyreelsImageToVideoPipeline
from torch import Tensor

from denoise_env.shapes.motion import HELD_OUT, TRAIN, kept, render
from denoise_env.shapes.pretrain_video import (
    CALL,
    LATENTS,
    SOURCE,
    Config,
    Run,
    build_parts,
    report,
    share_right,
    spread,
)
from denoise_env.shapes.pretraining import Source, encode_pictures, sample_batches


@dataclass
class I2VConfig(Config):
    """Pretraining on rendered clips and their first frames."""

    steps: int = 3000
    """Optimiser steps of the flow; with more the model is better, and reinforcement learning has less to add."""
    distill_steps: int = 0
    """No network of this kind is told a guidance scale."""


def build_pipeline() -> HunyuanSkyreelsImageToVideoPipeline:
    """A SkyReels-I2V with 8 × 3 × 8 × 8 latents of clips of 9 frames, 32 × 32, random weights."""
    return HunyuanSkyreelsImageToVideoPipeline(**build_parts(2 * LATENTS, guidance_embeds=False))


@torch.no_grad()
def encode_clips(
    pipe: HunyuanSkyreelsImageToVideoPipeline, n: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """`encode_pictures` of n rendered clips, with their first frames' latents ``[n, 8, 1, 8, 8]``."""
    firsts: list[Tensor] = []

    def render_and_keep(captions: Sequence[str], generator: torch.Generator) -> Tensor:
        clips = SOURCE.render(captions, generator)
        firsts.append(pipe.vae.encode(clips[:, :, :1] * 2 - 1).latent_dist.sample(generator))
        return clips

    latents, places = encode_pictures(pipe.vae, Source(TRAIN, render_and_keep), n, generator)
    return latents, places, torch.cat(firsts) * pipe.vae.config.scaling_factor


def sample(
    pipe: HunyuanSkyreelsImageToVideoPipeline,
    prompts: Sequence[str],
    frames: Tensor,
    generator: torch.Generator,
    num_steps: int = 10,
    batch_size: int = 60,
) -> Tensor:
    """Sample with the plain pipeline from first frames ``[B, 3, 32, 32]``: ``[B, FRAMES, 3, 32, 32]`` in [0, 1]."""
    told: dict[str, Any] = {"num_inference_steps": num_steps, "generator": generator}
    return sample_batches(pipe, prompts, batch_size, frames, **CALL, **told)


def pretrain(config: I2VConfig) -> HunyuanSkyreelsImageToVideoPipeline:
    """Build, train and save a pipeline, and print what was measured."""
    torch.manual_seed(config.seed)
    run = Run(pipe := build_pipeline(), config)
    run.prepare()
    latents, places, firsts = encode_clips(pipe, config.clips, run.generator)
    pipe = run.train(latents, places, (firsts,))
    for name, captions in (("train", TRAIN), ("held out", HELD_OUT)) if config.eval_clips else ():
        prompts = spread(captions, config.eval_clips)
        frames = render(prompts, run.generator, frames=1)[:, 0]
        clips = sample(pipe, prompts, frames, run.generator)
        report(share_right(clips, prompts) | {"first frame": kept(clips, frames).mean().item()}, name)
    return pipe


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `pretrain`."""
    config = tyro.cli(I2VConfig, args=args, description=I2VConfig.__doc__)
    torch.set_num_threads(config.threads)
    pretrain(config)


if __name__ == "__main__":
    main()
