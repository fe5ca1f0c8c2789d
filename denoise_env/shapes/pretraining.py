"""What the embedded world's pretraining scripts share: pictures to learn from, the autoencoder, an optimiser step."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

from denoise_env.progress import progress


@dataclass(frozen=True)
class Source:
    """Captions, and a renderer (captions, generator) → ``[n, 3, 32, 32]`` in [0, 1]."""

    captions: Sequence[str]
    render: Callable[[Sequence[str], torch.Generator], Tensor]

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Render n random captions.

        Returns:
            Pictures ``[n, 3, 32, 32]`` in [-1, 1], and ``[n]`` places among the captions.
        """
        index = torch.randint(len(self.captions), (n,), generator=generator)
        return self.render([self.captions[i] for i in index.tolist()], generator) * 2 - 1, index


def train_vae(
    vae: AutoencoderKL | AutoencoderKLHunyuanVideo,
    source: Source,
    steps: int,
    generator: torch.Generator,
    lr: float = 2e-3,
    edges: float = 0.0,
    batch_size: int = 16,
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
        batch_size: pictures or clips a step.
    """
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=1e-4)
    schedule = OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    error = torch.zeros(())
    for _ in (bar := progress(range(steps), desc="autoencoder")):
        pictures, _ = source.draw(batch_size, generator)
        posterior = vae.encode(pictures).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        error = F.mse_loss(decoded, pictures)
        loss = error + 1e-6 * posterior.kl().mean()
        if edges:
            rest = decoded - pictures
            steep = rest.diff(dim=-1).square().mean() + rest.diff(dim=-2).square().mean()
            loss = loss + edges * (steep + 0.05 * rest.abs().mean())
        step(loss, optimizer, schedule, vae.parameters())
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
def encode_pictures(vae: AutoencoderKL, source: Source, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Latents of n rendered pictures, scaled to unit standard deviation; sets the scaling factor.

    Returns:
        Latents ``[n, channels, 8, 8]`` and ``[n]`` places among the source's captions.
    """
    latents, places = [], []
    for start in progress(range(0, n, 250), desc="latents"):
        pictures, index = source.draw(min(250, n - start), generator)
        latents.append(vae.encode(pictures).latent_dist.sample(generator))
        places.append(index)
    stacked = torch.cat(latents)
    vae.register_to_config(scaling_factor=round(1 / stacked.std().item(), 5))
    return stacked * vae.config.scaling_factor, torch.cat(places)
