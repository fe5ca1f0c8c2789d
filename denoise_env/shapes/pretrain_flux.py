"""Make the embedded world's FLUX from nothing.

``python -m denoise_env.shapes.pretrain_flux --out DIR``

Four stages: the text encoders, which learn to tell what a caption says and then stay as they are, as FLUX.1's own; the
autoencoder; the flow; and guidance. Like FLUX.1-dev the network is distilled to be guided by a scale that it is told
(Meng et al. 2023): a frozen copy is guided, un + w (cond − un), and the network learns its answers.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import tyro
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from denoise_env.models.flow_match import pack
from denoise_env.models.pipeline import save_pipeline
from denoise_env.progress import progress
from denoise_env.shapes.compositions import ALL, HELD_OUT, TRAIN, Verifier, render
from denoise_env.shapes.compositions.grammar import PRETRAIN, parse
from denoise_env.shapes.compositions.renderer import encode
from denoise_env.shapes.pretraining import (
    FlowConfig,
    Source,
    Texts,
    build_clip,
    encode_pictures,
    sample_batches,
    step,
    train_flow,
    train_vae,
)
from denoise_env.shapes.renderer import BASE_SIZE
from denoise_env.shapes.tokenizer import build_t5_tokenizer, build_tokenizer

TOKENS = 12
"""Length of a padded prompt; the longest caption has 10 words, and CLIP adds two tokens."""
WIDTH = 64
"""Of the text encoders."""
LATENTS = 8
"""Channels of the latents."""
OFTEN = {"one": 2, "count": 6, "relation": 1}
"""How often a caption of each kind is drawn, of which there are 60, 180 and 6,048: most that is drawn are relations,
which are the hardest."""
NOTHING = -100
"""In place of what a token is not asked to tell."""
CAPTIONS = [caption for caption in PRETRAIN for _ in range(OFTEN[parse(caption).kind])]
SOURCE, ANYWHERE = Source(CAPTIONS, partial(render, board=True)), Source(CAPTIONS, render)
"""What the network and the autoencoder learn from. For the network several objects stand on a board: to draw them
anywhere, one of this size would have to learn for far longer."""


@dataclass
class Config(FlowConfig):
    """Pretraining on rendered compositions. The defaults make the weights that ship with the package, in 22 minutes on
    one core."""

    text_steps: int = 400
    """Optimiser steps of the text encoders, 128 captions each."""
    vae_steps: int = 1600
    """Optimiser steps of the autoencoder, 16 pictures each."""
    pictures: int = 20000
    """Rendered pictures the flow is trained on."""
    eval_images: int = 1056
    """Samples per set of captions that the verifier reads at the end; 0 for none."""


def build_pipeline() -> FluxPipeline:
    """A FLUX with 8 × 8 × 8 latents of 32 × 32 pictures, 12 tokens to the network, random weights."""
    clip, t5 = build_tokenizer(ALL, TOKENS), build_t5_tokenizer(ALL, TOKENS)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=build_vae(),
        text_encoder=build_clip(clip),
        tokenizer=clip,
        text_encoder_2=build_t5(t5),
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(
            in_channels=4 * LATENTS,
            num_layers=1,
            num_single_layers=5,
            attention_head_dim=32,
            num_attention_heads=3,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        ),
    )


def build_vae() -> AutoencoderKL:
    """An autoencoder from 32 × 32 pictures to 8 × 8 × 8 latents."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 16, 48),
        latent_channels=LATENTS,
        norm_num_groups=8,
        sample_size=BASE_SIZE,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    # The second half of the moments is a log-variance: at 0 its noise would drown the young latents.
    torch.nn.init.constant_(vae.encoder.conv_out.bias[LATENTS:], -6.0)
    return vae


def build_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """A T5 encoder of three layers, whose tokens the network attends to."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=16,
            d_ff=2 * WIDTH,
            num_layers=3,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
        )
    )


def read_captions(pipe: FluxPipeline, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """What the network reads of n captions: CLIP's pooled features ``[n, 64]`` and T5's of every token
    ``[n, 12, 64]``."""
    padded = {"padding": "max_length", "max_length": TOKENS, "return_tensors": "pt"}
    clip, t5 = (tokenizer(list(captions), **padded) for tokenizer in (pipe.tokenizer, pipe.tokenizer_2))
    return pipe.text_encoder(clip.input_ids).pooler_output, pipe.text_encoder_2(t5.input_ids).last_hidden_state


def train_texts(pipe: FluxPipeline, steps: int, generator: torch.Generator) -> float:
    """Fit the text encoders: CLIP's pooled features tell all of a caption's scene, T5's tokens what `told` says.

    Returns the share of captions of which everything is told, in the last steps.
    """
    scenes, tokens = encode(SOURCE.captions) + 1, torch.stack([told(text) for text in SOURCE.captions])
    classes = [(truth.flatten(0, -2).amax(0) + 1).tolist() for truth in (scenes, tokens)]
    readers = nn.ModuleList([nn.Linear(WIDTH, sum(sizes)) for sizes in classes])
    parameters = [*pipe.text_encoder.parameters(), *pipe.text_encoder_2.parameters(), *readers.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-3)
    schedule, right = OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1), [0.0]
    for _ in (bar := progress(range(steps), desc="texts")):
        rows = torch.randint(len(scenes), (128,), generator=generator)
        found = read_captions(pipe, [SOURCE.captions[i] for i in rows.tolist()])
        loss, hits = torch.zeros(()), []
        for reader, sizes, features, truth in zip(readers, classes, found, (scenes, tokens), strict=True):
            answers = reader(features).flatten(0, -2).split(sizes, -1)
            wanted = truth[rows].flatten(0, -2).unbind(-1)
            for answer, value in zip(answers, wanted, strict=True):
                loss = loss + F.cross_entropy(answer, value, ignore_index=NOTHING)
                hits.append(((answer.argmax(-1) == value) | (value == NOTHING)).view(len(rows), -1).all(1))
        step(loss, optimizer, schedule, parameters)
        right = [*right[-19:], torch.stack(hits).all(0).float().mean().item()]
        bar.set_postfix_str(f"right {sum(right) / len(right):.4f}", refresh=False)
    return sum(right) / len(right)


def told(caption: str) -> Tensor:
    """What each T5 token is to tell ``[12, 5]``: colour, shape and place of the object that its word is of, the number
    of objects and the background.

    An object's words reach to the next object's or to the background's, which are of no object. Its place is 0 for
    none, or 1 more than in `RELATIONS`, as seen from the other object.
    """
    scene = parse(caption)
    background, relation, *things = scene.indices
    words = caption.split()
    found = torch.full((TOKENS, 5), NOTHING)
    found[:, 3:] = torch.tensor([len(scene.things) - 1, background])
    end = words.index("on")
    found[:end, :3] = torch.tensor([*things[:2], relation + 1])
    if scene.relation:
        found[end - 3 : end, :3] = torch.tensor([*things[2:4], (relation ^ 1) + 1])  # the opposite is its neighbour
    return found


class Flow:
    """The denoiser as a function to train.

    Args:
        transformer: the pipeline's network.
    """

    def __init__(self, transformer: FluxTransformer2DModel) -> None:
        self.transformer = transformer
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4))
        self.image_ids = F.pad(places, (1, 0)).float()

    def __call__(self, noisy: Tensor, sigma: Tensor, texts: Texts, guidance: Tensor) -> Tensor:
        """The packed velocity of packed latents ``[n, 16, 32]`` at σ ``[n]``, told the guidance ``[n]``."""
        return self.transformer(
            hidden_states=noisy,
            timestep=sigma,
            guidance=guidance,
            pooled_projections=texts[0],
            encoder_hidden_states=texts[1],
            txt_ids=torch.zeros(TOKENS, 3),
            img_ids=self.image_ids,
        ).sample


def train_network(pipe: FluxPipeline, config: Config, generator: torch.Generator) -> float:
    """Fit the network, as `train_flow` does, to the latents of rendered pictures; returns its mean loss."""
    latents, places = encode_pictures(pipe.vae, SOURCE, config.pictures, generator)
    with torch.no_grad():
        texts = read_captions(pipe, [*SOURCE.captions, ""])
    return train_flow(Flow, pipe.transformer, pack(latents), places, texts, config, generator)


def sample(
    pipe: FluxPipeline,
    prompts: Sequence[str],
    generator: torch.Generator,
    guidance: float = 1.0,
    num_steps: int = 10,
    batch_size: int = 132,
) -> Tensor:
    """Sample with the plain pipeline: ``[B, 3, 32, 32]`` in [0, 1]."""
    size: dict[str, Any] = {"height": BASE_SIZE, "width": BASE_SIZE, "max_sequence_length": TOKENS}
    told: dict[str, Any] = {"num_inference_steps": num_steps, "guidance_scale": guidance}
    return sample_batches(pipe, prompts, batch_size, generator=generator, **size, **told)


def share_right(
    pipe: FluxPipeline, captions: Sequence[str], n: int, generator: torch.Generator, guidance: float = 1.0
) -> dict[str, float]:
    """Share of n samples, spread evenly over the captions, whose parts are right; and the mean score."""
    prompts = [captions[i * len(captions) // n % len(captions)] for i in range(n)]
    images, verifier = sample(pipe, prompts, generator, guidance), Verifier()
    shares = {name: hits.float().mean().item() for name, hits in verifier.correct(images, prompts).items()}
    return shares | {"score": verifier.score(images, prompts).mean().item()}


def pretrain(config: Config) -> FluxPipeline:
    """Build, train and save a pipeline, and print what was measured."""
    started = time.perf_counter()
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    pipe = build_pipeline()
    right = train_texts(pipe, config.text_steps, generator)
    pipe.text_encoder.requires_grad_(False)
    pipe.text_encoder_2.requires_grad_(False)
    error = train_vae(pipe.vae, ANYWHERE, config.vae_steps, generator, lr=4e-3, edges=1.0)
    pipe.vae.requires_grad_(False)
    generator.manual_seed(config.seed + 1)
    loss = train_network(pipe, config, generator)
    save_pipeline(pipe, config.out)
    size = sum(file.stat().st_size for file in config.out.rglob("*") if file.is_file())
    print(f"captions read {right:.4f}, autoencoder error {error:.5f}, flow loss {loss:.4f}, {size / 1e6:.2f} MB")
    print(f"trained in {time.perf_counter() - started:.0f} s")
    if config.eval_images:
        for name, captions in (("train", TRAIN), ("held out", HELD_OUT)):
            for guidance in (1.0, 2.0, 3.5):
                shares = share_right(pipe, captions, config.eval_images, generator, guidance)
                report = ", ".join(f"{key} {share:.3f}" for key, share in shares.items())
                print(f"{name}, guidance {guidance:g}, {config.eval_images} samples: {report}")
    return pipe


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `pretrain`."""
    config = tyro.cli(Config, args=args, description=Config.__doc__)
    torch.set_num_threads(config.threads)
    pretrain(config)


if __name__ == "__main__":
    main()
