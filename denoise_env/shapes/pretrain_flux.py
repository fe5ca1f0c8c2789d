"""Make the embedded world's FLUX from nothing.

``python -m denoise_env.shapes.pretrain_flux --out DIR``

Three stages: the autoencoder, the flow, and guidance. Like FLUX.1-dev the network is distilled to be guided by a scale
that it is told (Meng et al. 2023): a frozen copy is guided, un + w (cond − un), and the network learns its answers.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from denoise_env.models.flow_match import pack
from denoise_env.models.pipeline import save_pipeline
from denoise_env.progress import progress
from denoise_env.shapes.compositions import ALL, HELD_OUT, TRAIN, Verifier, render
from denoise_env.shapes.compositions.grammar import PRETRAIN, parse
from denoise_env.shapes.pretraining import Source, encode_pictures, step, train_vae
from denoise_env.shapes.renderer import BASE_SIZE
from denoise_env.shapes.tokenizer import build_t5_tokenizer, build_tokenizer

TOKENS = 16
"""Length of a padded prompt; the longest caption has 12 words."""
WIDTH = 64
"""Of the text encoders."""
OFTEN = {"one": 20, "count": 12, "relation": 1}
"""How often a caption of each kind is drawn, of which there are 60, 180 and 6,048."""
SOURCE = Source([caption for caption in PRETRAIN for _ in range(OFTEN[parse(caption).kind])], render)


@dataclass
class Config:
    """Pretraining on rendered compositions; the defaults make the weights that ship with the package."""

    out: Path
    """Directory to write the pipeline to, in the diffusers layout."""
    seed: int = 0
    """Seed of weights, pictures and noise."""
    vae_steps: int = 2000
    """Optimiser steps of the autoencoder, 16 pictures each."""
    steps: int = 5000
    """Optimiser steps of the flow and its text encoders."""
    distill_steps: int = 1000
    """Optimiser steps in which the network learns to be guided."""
    batch_size: int = 96
    """Latents per step."""
    lr: float = 2e-3
    """Peak of the one-cycle learning rate."""
    pictures: int = 30000
    """Rendered pictures the flow is trained on."""
    drop: float = 0.1
    """Share of captions replaced by the empty prompt, for guidance."""
    scales: tuple[float, float] = (1.0, 5.0)
    """Guidance scales that the network learns, evenly drawn."""
    ema: float = 0.998
    """Decay of the averaged weights, which are the ones saved."""
    eval_images: int = 1056
    """Samples per set of captions that the verifier reads at the end; 0 for none."""
    threads: int = 2
    """CPU threads; another number adds in another order, and gives slightly different weights."""


def build_pipeline() -> FluxPipeline:
    """A FLUX with 8 × 8 × 8 latents of 32 × 32 pictures, 16 tokens to the network, random weights."""
    clip, t5 = build_tokenizer(ALL, TOKENS), build_t5_tokenizer(ALL, TOKENS)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=build_vae(),
        text_encoder=build_clip(clip),
        tokenizer=clip,
        text_encoder_2=build_t5(t5),
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(
            in_channels=32,
            num_layers=2,
            num_single_layers=4,
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
        block_out_channels=(16, 32, 48),
        latent_channels=8,
        norm_num_groups=8,
        sample_size=BASE_SIZE,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    # The second half of the moments is a log-variance: at 0 its noise would drown the young latents.
    torch.nn.init.constant_(vae.encoder.conv_out.bias[8:], -6.0)
    return vae


def build_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text encoder of one layer, whose pooled output the network is modulated with."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """A T5 encoder of two layers, whose tokens the network attends to."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=16,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
        )
    )


class Flow:
    """The denoiser and its text encoders as one function to train.

    Args:
        pipe: the pipeline that they are of.
    """

    def __init__(self, pipe: FluxPipeline) -> None:
        self.pipe = pipe
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4))
        self.image_ids = F.pad(places, (1, 0)).float()

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """All that is trained."""
        modules = (self.pipe.transformer, self.pipe.text_encoder, self.pipe.text_encoder_2)
        return [parameter for module in modules for parameter in module.parameters()]

    def tokens(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """CLIP's and T5's token ids, ``[n, 16]`` each."""
        padded = {"padding": "max_length", "max_length": TOKENS, "return_tensors": "pt"}
        clip, t5 = (kind(list(captions), **padded) for kind in (self.pipe.tokenizer, self.pipe.tokenizer_2))
        return clip.input_ids, t5.input_ids

    def __call__(self, noisy: Tensor, sigma: Tensor, tokens: tuple[Tensor, Tensor], guidance: Tensor) -> Tensor:
        """The packed velocity of packed latents ``[n, 16, 32]`` at σ ``[n]``, told the guidance ``[n]``."""
        return self.pipe.transformer(
            hidden_states=noisy,
            timestep=sigma,
            guidance=guidance,
            pooled_projections=self.pipe.text_encoder(tokens[0]).pooler_output,
            encoder_hidden_states=self.pipe.text_encoder_2(tokens[1]).last_hidden_state,
            txt_ids=torch.zeros(TOKENS, 3),
            img_ids=self.image_ids,
        ).sample


def train_flow(pipe: FluxPipeline, config: Config, generator: torch.Generator) -> float:
    """Fit network and text encoders to the velocity ε − x0, then to guidance; leave their averages in the pipeline.

    Noise levels are logit-normal (Esser et al. 2024), and even in the second stage. Returns the mean loss of the last
    hundred steps of the first.
    """
    latents, places = encode_pictures(pipe.vae, SOURCE, config.pictures, generator)
    latents, flow, n = pack(latents), Flow(pipe), config.batch_size
    clip, t5 = flow.tokens([*SOURCE.captions, ""])
    empty = len(clip) - 1

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
        loss = F.mse_loss(flow(noisy, sigma, (clip[shown], t5[shown]), torch.ones(n)), velocity)
        step(loss, optimizer, schedule, flow.parameters)
        ema.step(flow.parameters)
        losses = [*losses[-99:], loss.item()]
        bar.set_postfix_str(f"loss {sum(losses) / len(losses):.4f}", refresh=False)
    ema.copy_to(flow.parameters)
    if config.distill_steps:
        distill(flow, config, batch, (clip, t5), generator)
    return sum(losses) / len(losses)


def distill(
    flow: Flow,
    config: Config,
    batch: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    tokens: tuple[Tensor, Tensor],
    generator: torch.Generator,
) -> None:
    """Teach the network to answer a scale w that it is told with un + w (cond − un) of what it was before."""
    teacher, n, empty = copy.deepcopy(flow), config.batch_size, len(tokens[0]) - 1
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
            answers = teacher(noisy.repeat(2, 1, 1), sigma.repeat(2), _rows(tokens, both), torch.ones(2 * n))
        conditional, unconditional = answers.chunk(2)
        target = unconditional + scale[:, None, None] * (conditional - unconditional)
        loss = F.mse_loss(flow(noisy, sigma, _rows(tokens, shown), scale), target)
        step(loss, optimizer, schedule, flow.parameters)
        ema.step(flow.parameters)
    ema.copy_to(flow.parameters)


def _rows(tokens: tuple[Tensor, Tensor], places: Tensor) -> tuple[Tensor, Tensor]:
    return tokens[0][places], tokens[1][places]


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
    error = train_vae(pipe.vae, SOURCE, config.vae_steps, generator)
    pipe.vae.requires_grad_(False)
    generator.manual_seed(config.seed + 1)
    loss = train_flow(pipe, config, generator)
    save_pipeline(pipe, config.out)
    size = sum(file.stat().st_size for file in config.out.rglob("*") if file.is_file())
    print(f"autoencoder error {error:.5f}, flow loss {loss:.4f}, {size / 1e6:.2f} MB")
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
