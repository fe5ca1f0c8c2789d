"""Make the embedded world's FLUX from nothing.

``python -m denoise_env.shapes.pretrain_flux --out DIR``

Four stages: the text encoders, which learn to tell what a caption says and then stay as they are, as FLUX.1's own; the
autoencoder; the flow; and guidance. Like FLUX.1-dev the network is distilled to be guided by a scale that it is told
(Meng et al. 2023): a frozen copy is guided, un + w (cond − un), and the network learns its answers.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from denoise_env.models.flow_match import pack
from denoise_env.models.pipeline import save_pipeline
from denoise_env.progress import progress
from denoise_env.shapes.compositions import ALL, HELD_OUT, TRAIN, Verifier, render
from denoise_env.shapes.compositions.grammar import PRETRAIN, parse
from denoise_env.shapes.compositions.renderer import encode
from denoise_env.shapes.pretraining import Source, encode_pictures, step, train_vae
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
class Config:
    """Pretraining on rendered compositions. The defaults make the weights that ship with the package, in 22 minutes on
    one core."""

    out: Path
    """Directory to write the pipeline to, in the diffusers layout."""
    seed: int = 0
    """Seed of weights, pictures and noise."""
    text_steps: int = 400
    """Optimiser steps of the text encoders, 128 captions each."""
    vae_steps: int = 1600
    """Optimiser steps of the autoencoder, 16 pictures each."""
    steps: int = 2600
    """Optimiser steps of the flow."""
    distill_steps: int = 250
    """Optimiser steps in which the network learns to be guided."""
    batch_size: int = 64
    """Latents per step."""
    lr: float = 2e-3
    """Peak of the one-cycle learning rate."""
    pictures: int = 20000
    """Rendered pictures the flow is trained on."""
    drop: float = 0.1
    """Share of captions replaced by the empty prompt, for guidance."""
    scales: tuple[float, float] = (1.0, 5.0)
    """Guidance scales that the network learns, evenly drawn."""
    ema: float = 0.998
    """Decay of the averaged weights, which are the ones saved."""
    eval_images: int = 1056
    """Samples per set of captions that the verifier reads at the end; 0 for none."""
    threads: int = 1
    """CPU threads; another number adds in another order, and gives slightly different weights."""


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


def build_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text encoder of two layers, whose pooled output the network is modulated with."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


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
        self.parameters = list(transformer.parameters())

    def __call__(self, noisy: Tensor, sigma: Tensor, texts: tuple[Tensor, Tensor], guidance: Tensor) -> Tensor:
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


def train_flow(pipe: FluxPipeline, config: Config, generator: torch.Generator) -> float:
    """Fit the network to the velocity ε − x0, then to guidance; leave the average of its weights in the pipeline.

    Noise levels are logit-normal (Esser et al. 2024), and even in the second stage. Returns the mean loss of the last
    hundred steps of the first.
    """
    latents, places = encode_pictures(pipe.vae, SOURCE, config.pictures, generator)
    latents, flow, n = pack(latents), Flow(pipe.transformer), config.batch_size
    with torch.no_grad():
        pooled, tokens = read_captions(pipe, [*SOURCE.captions, ""])
    empty = len(pooled) - 1

    def batch(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.randint(len(latents), (n,), generator=generator)
        noise = torch.randn(n, *latents.shape[1:], generator=generator)
        s = sigma[:, None, None]
        return (1 - s) * latents[rows] + s * noise, noise - latents[rows], places[rows]

    ema, losses = EMAModel(flow.parameters, decay=config.ema), [0.0]
    optimizer = torch.optim.AdamW(flow.parameters, lr=config.lr, weight_decay=1e-3)
    schedule = OneCycleLR(optimizer, config.lr, total_steps=config.steps, pct_start=0.1)
    for _ in (bar := progress(range(config.steps), desc="flow")):
        sigma = torch.randn(n, generator=generator).sigmoid()
        noisy, velocity, shown = batch(sigma)
        shown = shown.masked_fill(torch.rand(n, generator=generator) < config.drop, empty)
        loss = F.mse_loss(flow(noisy, sigma, (pooled[shown], tokens[shown]), torch.ones(n)), velocity)
        step(loss, optimizer, schedule, flow.parameters)
        ema.step(flow.parameters)
        losses = [*losses[-99:], loss.item()]
        bar.set_postfix_str(f"loss {sum(losses) / len(losses):.4f}", refresh=False)
    ema.copy_to(flow.parameters)
    if config.distill_steps:
        distill(flow, config, batch, (pooled, tokens), generator)
    return sum(losses) / len(losses)


def distill(
    flow: Flow,
    config: Config,
    batch: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    texts: tuple[Tensor, Tensor],
    generator: torch.Generator,
) -> None:
    """Teach the network to answer a scale w that it is told with un + w (cond − un) of what it was before."""
    teacher, n, empty = Flow(copy.deepcopy(flow.transformer)), config.batch_size, len(texts[0]) - 1
    ema = EMAModel(flow.parameters, decay=config.ema)
    optimizer = torch.optim.AdamW(flow.parameters, lr=config.lr / 4, weight_decay=1e-3)
    schedule = OneCycleLR(optimizer, config.lr / 4, total_steps=config.distill_steps, pct_start=0.1)
    low, high = config.scales
    for _ in progress(range(config.distill_steps), desc="guidance"):
        sigma, draws = torch.rand(2, n, generator=generator)
        noisy, _, shown = batch(sigma)
        scale = low + (high - low) * draws
        both = torch.cat([shown, torch.full_like(shown, empty)])
        with torch.no_grad():
            answers = teacher(noisy.repeat(2, 1, 1), sigma.repeat(2), _rows(texts, both), torch.ones(2 * n))
        conditional, unconditional = answers.chunk(2)
        target = unconditional + scale[:, None, None] * (conditional - unconditional)
        loss = F.mse_loss(flow(noisy, sigma, _rows(texts, shown), scale), target)
        step(loss, optimizer, schedule, flow.parameters)
        ema.step(flow.parameters)
    ema.copy_to(flow.parameters)


def _rows(texts: tuple[Tensor, Tensor], places: Tensor) -> tuple[Tensor, Tensor]:
    return texts[0][places], texts[1][places]


@torch.no_grad()
def sample(
    pipe: FluxPipeline,
    prompts: Sequence[str],
    generator: torch.Generator,
    guidance: float = 1.0,
    num_steps: int = 10,
    batch_size: int = 132,
) -> Tensor:
    """Sample with the plain pipeline: ``[B, 3, 32, 32]`` in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    batches = [list(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]
    return torch.cat(
        [
            pipe(
                batch,
                height=BASE_SIZE,
                width=BASE_SIZE,
                num_inference_steps=num_steps,
                guidance_scale=guidance,
                max_sequence_length=TOKENS,
                generator=generator,
                output_type="pt",
            ).images
            for batch in batches
        ]
    )


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
    loss = train_flow(pipe, config, generator)
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
