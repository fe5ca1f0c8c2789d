"""The noise levels that denoising steps visit.

The latents before step k are ``x_k = alphas[k] · x0 + sigmas[k] · ε``: x0 clean, ε standard normal noise, k = 0 the
noisiest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from denoise_env.arguments import integer, number


@dataclass(frozen=True)
class Schedule:
    """The noise levels that K denoising steps visit.

    Build one with `flow`, `from_sigmas`, `diffusion` or `from_alphas_cumprod`.

    Attributes:
        timesteps: ``[K]``, what the network is told at each step.
        alphas: ``[K+1]`` float64, the factor of the clean latents in x_k; the last is (nearly) 1.
        sigmas: ``[K+1]`` float64, the std of the noise in x_k, strictly decreasing; the last is (nearly) 0.
        path: how α and σ belong together, "diffusion" (α² + σ² = 1) or "flow" (α + σ = 1).

    Raises:
        ValueError: lengths that do not fit, no step, a number that is not finite, σ that does not decrease, or α and σ
            that do not lie on the path.
    """

    timesteps: Tensor
    alphas: Tensor
    sigmas: Tensor
    path: Literal["diffusion", "flow"]

    def __post_init__(self) -> None:
        if not len(self.timesteps) + 1 == len(self.alphas) == len(self.sigmas):
            raise ValueError("a schedule of K steps has K timesteps and K + 1 alphas and sigmas")
        check_num_steps(self.num_steps)
        for name in ("sigmas", "alphas", "timesteps"):
            values = getattr(self, name)
            if not values.isfinite().all():
                raise ValueError(f"{name} must be finite numbers, not {values.tolist()}")
        if self.sigmas.min() < 0 or self.sigmas.max() > 1:
            raise ValueError(f"sigmas must lie in [0, 1], not {self.sigmas.tolist()}")
        if (self.sigmas.diff() >= 0).any():
            raise ValueError(f"sigmas must decrease strictly from one step to the next: {self.sigmas.tolist()}")
        power, name = (2, "α² + σ²") if self.path == "diffusion" else (1, "α + σ")
        if ((self.alphas**power + self.sigmas**power - 1).abs() > 1e-6).any():
            raise ValueError(f"on a {self.path} path {name} must be 1 at every step")

    @property
    def num_steps(self) -> int:
        """K."""
        return len(self.timesteps)

    @classmethod
    def flow(cls, num_steps: int, shift: float = 1.0, timestep_scale: float = 1.0) -> "Schedule":
        """Rectified flow: σ = m u / (1 + (m − 1) u) for u from 1 to 0 and shift m.

        Args:
            num_steps: K ≥ 1.
            shift: m > 0; larger spends more steps at high noise (FLUX 3, HunyuanVideo 5).
            timestep_scale: the network is told σ times this.
        """
        check_num_steps(num_steps)
        if number(shift, "shift") <= 0:
            raise ValueError(f"shift must be positive, not {shift}")
        u = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        sigmas = shift * u / (1 + (shift - 1) * u)
        sigmas[0] = 1  # shifts below 1 miss it by rounding
        return cls.from_sigmas(sigmas, timestep_scale=timestep_scale)

    @classmethod
    def from_sigmas(
        cls, sigmas: Tensor | Sequence[float], timesteps: Tensor | None = None, timestep_scale: float = 1.0
    ) -> "Schedule":
        """Rectified flow on noise levels of one's own, α = 1 − σ.

        Args:
            sigmas: ``[K+1]``, in [0, 1], strictly decreasing to 0. (The ``sigmas`` that diffusers' pipelines take are
                K: append the 0 that they append.)
            timesteps: ``[K]``, what the network is told; default: σ times ``timestep_scale``, in float32.
            timestep_scale: 1000 where the network counts timesteps to 1000.

        Raises:
            ValueError: what `Schedule` refuses, or sigmas that do not end at 0.

        >>> Schedule.from_sigmas([1.0, 0.75, 0.02, 0.0], timestep_scale=1000).timesteps
        tensor([1000.,  750.,   20.])
        """
        levels = torch.as_tensor(sigmas, dtype=torch.float64).cpu().clone()
        if len(levels) and levels[-1] != 0:
            raise ValueError(f"sigmas must end at 0, not {levels[-1].item():g}: append the 0 that sampling ends at")
        told = (levels[:-1] * timestep_scale).float() if timesteps is None else timesteps.cpu()
        return cls(told, 1 - levels, levels, "flow")

    @classmethod
    def diffusion(cls, alphas_cumprod: Tensor, timesteps: Tensor, final_alpha_cumprod: float) -> "Schedule":
        """DDPM's cumulative products ᾱ at the given (decreasing) integer timesteps.

        Args:
            alphas_cumprod: ``[train_steps]``.
            timesteps: ``[K]`` indices into it.
            final_alpha_cumprod: ᾱ after the last step (diffusers' ``set_alpha_to_one`` makes it 1).
        """
        last = torch.tensor([final_alpha_cumprod], dtype=torch.float64)
        return cls.from_alphas_cumprod(torch.cat([alphas_cumprod.double().cpu()[timesteps.cpu()], last]), timesteps)

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor | Sequence[float], timesteps: Tensor) -> "Schedule":
        """A diffusion on cumulative products ᾱ of one's own, α = √ᾱ and σ = √(1 − ᾱ).

        Args:
            alphas_cumprod: ``[K+1]``, in [0, 1], strictly increasing; the last is reached after the last step.
            timesteps: ``[K]``, what the network is told; they need not be integers.

        Raises:
            ValueError: what `Schedule` refuses.
        """
        products = torch.as_tensor(alphas_cumprod, dtype=torch.float64).cpu()
        return cls(timesteps.cpu(), products.sqrt(), (1 - products).sqrt(), "diffusion")


def check_num_steps(num_steps: int, at_most: int | None = None) -> None:
    """Raise a ``ValueError`` for a number of steps that is no integer, below 1 or above ``at_most``."""
    integer(num_steps, "num_steps", at_least=1)
    if at_most is not None and num_steps > at_most:
        raise ValueError(f"num_steps must be at most {at_most}, the steps the schedule has, not {num_steps}")
