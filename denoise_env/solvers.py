"""Deterministic solvers of higher order than the ODE kernel: fewer network calls for the same accuracy."""

from collections.abc import Sequence

import torch
from torch import Tensor

from denoise_env.schedules import Schedule


class DPMSolver:
    """DPM-Solver++ 2M (Lu et al. 2022, arXiv:2211.01095, algorithm 2), from one noise level of a schedule to its end.

    With α, σ and λ = log(α/σ) at a visited level, a prime for the next level and x̂0⁻, λ⁻ for the one before,

        x' = (σ'/σ) x + (α' − α σ'/σ) D,      D = x̂0 + (x̂0 − x̂0⁻) (λ' − λ)/(2 (λ − λ⁻)),

    which is exact where x̂0 is linear in λ. The first step, which has none before it, and the last, where λ' may be
    infinite, take D = x̂0, and are steps of the ODE kernel.

    Args:
        schedule: the noise levels.
        steps: the levels to visit and to call the network at, increasing; the end of the schedule comes after the last.

    Raises:
        ValueError: no steps, or steps that do not increase or are not the schedule's.
    """

    def __init__(self, schedule: Schedule, steps: Sequence[int]) -> None:
        levels = torch.tensor([*steps, schedule.num_steps])
        if len(steps) < 1 or steps[0] < 0 or (levels.diff() < 1).any():
            raise ValueError(f"steps must increase from 0 or more to below {schedule.num_steps}, not {list(steps)}")
        alphas, sigmas = schedule.alphas[levels], schedule.sigmas[levels]
        self.steps = list(steps)
        self._keep = sigmas[1:] / sigmas[:-1]
        self._take = alphas[1:] - alphas[:-1] * self._keep
        rise = (alphas / sigmas).log().diff()
        self._lean = torch.zeros_like(self._keep)
        self._lean[1:-1] = rise[1:-1] / (2 * rise[:-2])

    def step(self, place: int, latents: Tensor, pred_x0: Tensor, before: Tensor | None) -> Tensor:
        """The latents ``[B, *latent]`` of the next visited level, in the dtype of ``pred_x0``.

        Args:
            place: which of the ``steps`` this is, from 0.
            latents: ``[B, *latent]``, x.
            pred_x0: ``[B, *latent]``, x̂0 at these latents.
            before: ``[B, *latent]``, x̂0⁻, that of the step before; ``None`` at the first.
        """
        lean = self._lean[place].item()
        slope = pred_x0 if before is None or not lean else pred_x0 + lean * (pred_x0 - before)
        return self._keep[place].item() * latents.to(pred_x0.dtype) + self._take[place].item() * slope


def spread_steps(first: int, num_steps: int, share: float) -> list[int]:
    """Steps for a `DPMSolver` in place of those from ``first`` to K: max(⌊share · n⌋, 1) of these n, evenly spread.

    >>> spread_steps(4, 14, 0.4)
    [4, 6, 9, 12]
    """
    left = num_steps - first
    count = max(int(share * left + 1e-9), 1)
    return [first + round(i * left / count) for i in range(count)]
