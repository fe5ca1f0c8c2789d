"""What the pretraining scripts share: what is learnt from, CLIP, the autoencoder, the flow, samples."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from denoise_env.progress import progress


@dataclass(frozen=True)
class Source:
    """Captions, and a renderer (captions, generator) → ``[n, 3, H, W]``, or clips ``[n, 3, F, H, W]``, in [0, 1]."""

    captions: Sequence[str]
    render: Callable[[Sequence[str], torch.Generator], Tensor]

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Render n random captions.

        Returns:
            Pictures or clips as of the renderer but in [-1, 1], and ``[n]`` places among the captions.
        """
        index = torch.randint(len(self.captions), (n,), generator=generator)
        return self.render([self.captions[i] for i in index.tolist()], generator) * 2 - 1, index


def build_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text encoder of two layers, 64 wide."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@torch.no_grad()
def sample_batches(
    pipe: Any, prompts: Sequence[str], batch_size: int, frames: Tensor | None = None, **options: Any
) -> Tensor:
    """What a plain pipeline makes of prompts, and of first frames ``[B, 3, H, W]`` where it takes them, in batches:
    ``[B, 3, H, W]``, or clips ``[B, F, 3, H, W]``, in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    batches = []
    for i in range(0, len(prompts), batch_size):
        images = {} if frames is None else {"image": frames[i : i + batch_size]}
        batches.append(pipe(prompt=list(prompts[i : i + batch_size]), output_type="pt", **images, **options)[0])
    return torch.cat(batches)


class Checkpoint:
    """A training's state in a file, for it to be stopped and gone on with.

    Args:
        path: the file; ``None`` for none.
        generator: the source of randomness, whose state is kept too.
        parts: what else is kept; each has a state dictionary.
    """

    def __init__(self, path: Path | None, generator: torch.Generator, **parts: Any) -> None:
        self.path, self.generator, self.parts = path, generator, parts

    def restore(self) -> int:
        """Go back to the file's state, if it is there; returns the steps that were done."""
        if not (self.path and self.path.is_file()):
            return 0
        state = torch.load(self.path, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        return state["done"]

    def keep(self, done: int) -> None:
        """Write the state, every hundred steps."""
        if self.path and done % 100 == 0:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            part = self.path.with_suffix(".part")
            torch.save(state | {"generator": self.generator.get_state(), "done": done}, part)
            part.replace(self.path)


def train_vae(
    vae: AutoencoderKL | AutoencoderKLHunyuanVideo,
    source: Source,
    steps: int,
    generator: torch.Generator,
    lr: float = 2e-3,
    edges: float = 0.0,
    chroma: float = 0.0,
    batch_size: int = 16,
    fused: bool = False,
    path: Path | None = None,
) -> float:
    """Fit the autoencoder by squared error with a slight pull to a normal prior; returns the last error.

    Args:
        vae: the autoencoder.
        source: where its pictures or clips are from.
        steps: optimiser steps.
        generator: the source of randomness.
        lr: peak of the one-cycle learning rate.
        edges: weight of the squared error of the differences between neighbouring pixels, and of a twentieth of the
            absolute error. Without them small objects long stay blobs.
        chroma: weight of the squared error of the colours less their grey. Without it everything long stays grey.
        batch_size: pictures or clips a step.
        fused: AdamW in one kernel, which is faster and rounds otherwise.
        path: of its `Checkpoint`.
    """
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=1e-4, fused=fused)
    schedule = OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    checkpoint = Checkpoint(path, generator, vae=vae, optimizer=optimizer, schedule=schedule)
    error = torch.zeros(())
    for done in (bar := progress(range(checkpoint.restore(), steps), desc="autoencoder")):
        pictures, _ = source.draw(batch_size, generator)
        posterior = vae.encode(pictures).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        error = F.mse_loss(decoded, pictures)
        loss = error + 1e-6 * posterior.kl().mean()
        rest = decoded - pictures
        if edges:
            steep = rest.diff(dim=-1).square().mean() + rest.diff(dim=-2).square().mean()
            loss = loss + edges * (steep + 0.05 * rest.abs().mean())
        if chroma:
            loss = loss + chroma * (rest - rest.mean(1, keepdim=True)).square().mean()
        step(loss, optimizer, schedule, vae.parameters())
        checkpoint.keep(done + 1)
        bar.set_postfix_str(f"error {error.item():.4f}", refresh=False)
    return error.item()


def step(loss: Tensor, optimizer: torch.optim.Optimizer, schedule: OneCycleLR, parameters: Iterable[Tensor]) -> None:
    """One clipped optimiser step."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()


@torch.no_grad()
def encode_pictures(
    vae: AutoencoderKL | AutoencoderKLHunyuanVideo, source: Source, n: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Latents of n rendered pictures or clips, scaled to unit standard deviation; sets the scaling factor.

    Returns:
        Latents ``[n, channels, 8, 8]``, of clips ``[n, channels, f, 8, 8]``, and ``[n]`` places among the source's
        captions.
    """
    latents, places = [], []
    for start in progress(range(0, n, 250), desc="latents"):
        pictures, index = source.draw(min(250, n - start), generator)
        latents.append(vae.encode(pictures).latent_dist.sample(generator))
        places.append(index)
    stacked = torch.cat(latents)
    vae.register_to_config(scaling_factor=round(1 / stacked.std().item(), 5))
    return stacked * vae.config.scaling_factor, torch.cat(places)


@dataclass
class FlowConfig:
    """What the training of a flow is set by."""

    out: Path
    """Directory to write the pipeline to, in the diffusers layout."""
    seed: int = 0
    """Seed of weights, samples and noise."""
    steps: int = 2600
    """Optimiser steps of the flow."""
    distill_steps: int = 250
    """Optimiser steps in which the network learns to be guided."""
    batch_size: int = 64
    """Latents per step."""
    lr: float = 2e-3
    """Peak of the one-cycle learning rate."""
    drop: float = 0.1
    """Share of captions replaced by the empty prompt, for guidance."""
    scales: tuple[float, float] = (1.0, 5.0)
    """Guidance scales that the network learns, evenly drawn."""
    ema: float = 0.998
    """Decay of the averaged weights, which are the ones saved."""
    fused: bool = False
    """AdamW in one kernel, which is faster and rounds otherwise."""
    threads: int = 1
    """CPU threads; another number adds in another order, and gives slightly different weights."""


Texts = tuple[Tensor, ...]
Flow = Callable[[Tensor, Tensor, Texts, Tensor], Tensor]
"""The velocity of noisy latents at σ ``[n]``, given what was encoded of n prompts and what is given beside them, told
the guidance ``[n]``."""


def train_flow(
    make: Callable[[nn.Module], Flow],
    network: nn.Module,
    latents: Tensor,
    places: Tensor,
    texts: Texts,
    config: FlowConfig,
    generator: torch.Generator,
    path: Path | None = None,
    given: Texts = (),
) -> float:
    """Fit a network to the velocity ε − x0, then to guidance; leave the average of its weights in it.

    Noise levels are logit-normal (Esser et al. 2024), and even in the second stage. Returns the mean loss of the last
    hundred steps of the first.

    Args:
        make: network → the velocity that it gives.
        network: what is trained.
        latents: ``[N, …]`` what it learns to make.
        places: ``[N]`` whose of the texts they are.
        texts: what was encoded of every caption, and in the last row of the empty prompt.
        config: steps, rates and shares.
        generator: the source of randomness.
        path: of the `Checkpoint` of its first stage.
        given: ``[N, …]`` each, what else the network gets of the latents; it stands behind the texts.
    """
    flow, weights, n = make(network), list(network.parameters()), config.batch_size
    empty = len(texts[0]) - 1

    def batch(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Texts]:
        rows = torch.randint(len(latents), (n,), generator=generator)
        noise = torch.randn(n, *latents.shape[1:], generator=generator)
        s = _like(sigma, noise)
        return (1 - s) * latents[rows] + s * noise, noise - latents[rows], places[rows], _rows(given, rows)

    ema, losses = EMAModel(weights, decay=config.ema), [0.0]
    optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=1e-3, fused=config.fused)
    schedule = OneCycleLR(optimizer, config.lr, total_steps=config.steps, pct_start=0.1)
    checkpoint = Checkpoint(path, generator, network=network, ema=ema, optimizer=optimizer, schedule=schedule)
    for done in (bar := progress(range(checkpoint.restore(), config.steps), desc="flow")):
        sigma = torch.randn(n, generator=generator).sigmoid()
        noisy, velocity, shown, beside = batch(sigma)
        shown = shown.masked_fill(torch.rand(n, generator=generator) < config.drop, empty)
        loss = F.mse_loss(flow(noisy, sigma, _rows(texts, shown) + beside, torch.ones(n)), velocity)
        step(loss, optimizer, schedule, weights)
        ema.step(weights)
        checkpoint.keep(done + 1)
        losses = [*losses[-99:], loss.item()]
        bar.set_postfix_str(f"loss {sum(losses) / len(losses):.4f}", refresh=False)
    ema.copy_to(weights)
    if config.distill_steps:
        _distill(make, network, config, batch, texts, generator)
    return sum(losses) / len(losses)


def _distill(
    make: Callable[[nn.Module], Flow],
    network: nn.Module,
    config: FlowConfig,
    batch: Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Texts]],
    texts: Texts,
    generator: torch.Generator,
) -> None:
    """Teach the network to answer a scale w that it is told with un + w (cond − un) of what it was before."""
    flow, teacher, weights = make(network), make(copy.deepcopy(network)), list(network.parameters())
    n, empty = config.batch_size, len(texts[0]) - 1
    ema = EMAModel(weights, decay=config.ema)
    optimizer = torch.optim.AdamW(weights, lr=config.lr / 4, weight_decay=1e-3, fused=config.fused)
    schedule = OneCycleLR(optimizer, config.lr / 4, total_steps=config.distill_steps, pct_start=0.1)
    low, high = config.scales
    for _ in progress(range(config.distill_steps), desc="guidance"):
        sigma, draws = torch.rand(2, n, generator=generator)
        noisy, _, shown, beside = batch(sigma)
        scale = low + (high - low) * draws
        both = torch.cat([shown, torch.full_like(shown, empty)])
        twice = tuple(torch.cat([part, part]) for part in beside)
        with torch.no_grad():
            told = _rows(texts, both) + twice
            answers = teacher(torch.cat([noisy, noisy]), sigma.repeat(2), told, torch.ones(2 * n))
        conditional, unconditional = answers.chunk(2)
        target = unconditional + _like(scale, noisy) * (conditional - unconditional)
        loss = F.mse_loss(flow(noisy, sigma, _rows(texts, shown) + beside, scale), target)
        step(loss, optimizer, schedule, weights)
        ema.step(weights)
    ema.copy_to(weights)


def _like(values: Tensor, latents: Tensor) -> Tensor:
    return values.view(-1, *[1] * (latents.ndim - 1))


def _rows(texts: Texts, places: Tensor) -> Texts:
    return tuple(part[places] for part in texts)
