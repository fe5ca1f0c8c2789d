"""Noise levels that published pipelines visit, in closed form."""

import math

import torch
from torch import Tensor

from denoise_env.schedules import Schedule

F64 = torch.float64


def stable_diffusion(num_steps: int = 50) -> Schedule:
    """Scaled-linear betas, "leading" spacing with offset 1, set_alpha_to_one False."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=F64) ** 2
    products = (1 - betas).cumprod(0)
    timesteps = torch.arange(num_steps - 1, -1, -1) * (1000 // num_steps) + 1
    return Schedule.diffusion(products, timesteps, products[0].item())


def cosine(num_steps: int) -> Schedule:
    """A diffusion for any number of steps: √ᾱ is a cosine from nearly 0 to 1."""
    products = torch.cos(torch.linspace(0.98, 0, num_steps + 1, dtype=F64) * math.pi / 2) ** 2
    return Schedule.diffusion(products[:-1].flip(0), torch.arange(num_steps - 1, -1, -1), 1.0)


def shifted(u: Tensor, m: float) -> Tensor:
    return m * u / (1 + (m - 1) * u)


def sd35(num_steps: int, shift: float = 3.0) -> Tensor:
    """What FlowMatchEuler visits where a pipeline gives it no sigmas: shifted twice, to its smallest σ and then 0."""
    u = torch.linspace(1, shifted(torch.tensor(1e-3, dtype=F64), shift).item(), num_steps, dtype=F64)
    return torch.cat([shifted(u, shift), torch.zeros(1, dtype=F64)])


def qwen(num_steps: int, shift: float = 2.001, terminal: float = 0.02) -> Tensor:
    """Qwen-Image's: shifted, 1 − σ stretched so that the last σ above 0 is ``terminal``, then 0."""
    sigmas = shifted(torch.linspace(1, 1 / num_steps, num_steps, dtype=F64), shift)
    stretched = 1 - (1 - sigmas) * (1 - terminal) / (1 - sigmas[-1])
    return torch.cat([stretched, torch.zeros(1, dtype=F64)])


def wan(num_steps: int, shift: float = 5.0) -> Tensor:
    """Wan's as published: a first σ just below 1."""
    sigmas = shifted(torch.linspace(1, 1e-3, num_steps + 1, dtype=F64)[:-1], shift)
    sigmas[0] -= 1e-6
    return torch.cat([sigmas, torch.zeros(1, dtype=F64)])
