"""Gaussian transition kernels of the denoising MDP.

The latents before step k are ``x_k = alphas[k] · x0 + sigmas[k] · ε``: x0 clean, ε standard normal noise, k = 0 the
noisiest. Whatever the paper, step k is

    x_{k+1} ~ N( alphas[k+1] · x̂0 + kept[k] · ε̂,  std[k]² I )

with x̂0 and ε̂, the estimates of x0 and ε, read off the network's output (`Reading`). A kernel is its two numbers per
step, ``kept`` and ``std``; sampling, log-prob, entropy and KL follow from them and so can never disagree.

| kernel | path | kept[k] | std[k] | reference |
|---|---|---|---|---|
| `ODE` | both | σ' | 0 | Song et al. 2021 (DDIM, η = 0); Euler on a rectified flow |
| `DDIM` | diffusion | √(σ'² − std²) | η σ'/σ √(1 − ᾱ/ᾱ') | Song et al. 2021, eq. 12 and 16 |
| `DanceSDE` | flow | σ' − std²/(2σ) | η √Δ | Xue et al. 2025 (DanceGRPO), eq. 8 |
| `FlowSDE` | flow | σ' − std²/(2σ) | a √(σ/(1−σ)) √Δ | Liu et al. 2025 (Flow-GRPO), eq. 9 |
| `CPS` | flow | σ' cos(aπ/2) | σ' sin(aπ/2) | Wang & Yu 2025 (Coefficients-Preserving Sampling) |

σ = sigmas[k] and σ' = sigmas[k+1] are the stds of the noise in the latents before and after the step, Δ = σ − σ',
ᾱ = alphas[k]² and ᾱ' = alphas[k+1]². kept[k] is the std of the estimated noise that stays, std[k] that of the fresh
noise which the step adds. DDIM and CPS keep kept² + std² = σ'²: where the data is a single point their marginals are
exact. The two SDEs keep it to first order in Δ only: there their variance after a step is too large by
std²Δ/σ + std⁴/(4σ²).

Where the data has a spread, every kernel has a bias at few steps, even with a perfect network. It vanishes
like 1/K for ODE, DDIM and Dance-SDE; Flow-SDE's first step leaves a part that vanishes like K^(−a²). It does
not vanish for CPS, whose noise does not shrink with the step: on Gaussian data the std of its samples tends
to cos(aπ/4) times the data's. `tests/test_kernels.py` measures all this.
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from denoise_env.arguments import number
from denoise_env.schedules import Schedule

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class Transition:
    """One step's Gaussian N(mean, std² I) for a batch.

    Attributes:
        mean: ``[B, *latent]`` float32 (float64 for float64 latents).
        std: broadcastable to ``mean``; one number per row.
        stochastic: false where the step is known to have std 0, so that it has no density.
        free: ``[*latent]`` bool, which of a row's dimensions are random; ``None`` for all. The others are left out of
            log-probs, entropies and KLs, and a sample has the mean there.
    """

    mean: Tensor
    std: Tensor
    stochastic: bool = True
    free: Tensor | None = None

    def sample(self, noise: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """``mean + std · noise``, rounded to ``dtype`` (default: the noise's).

        Take the log-prob of what this returns: rounding first is what keeps the ratio of an
        unchanged policy at exactly 1 in every dtype.
        """
        random = noise if self.free is None else noise * self.free
        return (self.mean + self.std * random).to(dtype or noise.dtype)

    def log_prob(self, x: Tensor, reduction: Reduction = "mean") -> Tensor:
        """Log-density of ``x``, ``[B]``.

        Args:
            x: ``[B, *latent]``.
            reduction: "sum" is the log-density. "mean" divides it by the number of free latent dimensions D, as
                DDPO and DanceGRPO do; its ratio is (true ratio)^(1/D) and depends on the resolution.

        Raises:
            ValueError: the step is deterministic and has no density.
        """
        self._need_density("log-prob")
        z = (x.to(self.mean.dtype) - self.mean) / self.std
        return self.reduce(-0.5 * (z * z) - self.std.log() - 0.5 * math.log(2 * math.pi), reduction)

    def entropy(self, reduction: Reduction = "mean") -> Tensor:
        """Differential entropy ``[B]`` in nats, per dimension or summed over them."""
        self._need_density("entropy")
        per_dim = self.std.log() + 0.5 * math.log(2 * math.pi * math.e)
        return self.reduce(per_dim.expand_as(self.mean), reduction)

    def kl(self, other: "Transition", reduction: Reduction = "mean") -> Tensor:
        """KL(self ‖ other) ``[B]``; |μ − μ'|²/(2 std²) where the stds agree, with the two means μ and μ'."""
        self._need_density("KL")
        other._need_density("KL")
        z = (self.mean - other.mean) / other.std
        wider = (self.std - other.std) / other.std  # (r² − 1)/2 − log r of the ratio r would cancel where r ≈ 1
        return self.reduce(0.5 * (z * z) + (wider + 0.5 * (wider * wider) - wider.log1p()), reduction)

    @property
    def dimensions(self) -> int | Tensor:
        """D, the number of a row's free dimensions."""
        return self.mean[0].numel() if self.free is None else self.free.sum()

    def reduce(self, per_dim: Tensor, reduction: Reduction = "mean") -> Tensor:
        """The mean or the sum ``[B]`` over the free dimensions of ``per_dim [B, *latent]``."""
        if reduction not in ("mean", "sum"):
            raise ValueError(f'reduction must be "mean" or "sum", not {reduction!r}')
        if self.free is None:
            flat = per_dim.flatten(1)
            return flat.mean(1) if reduction == "mean" else flat.sum(1)
        total = per_dim.where(self.free, 0.0).flatten(1).sum(1)
        return total / self.dimensions if reduction == "mean" else total

    def _need_density(self, what: str) -> None:
        if not self.stochastic:
            raise ValueError(
                f"a deterministic step (std 0) has no density, so no {what}: use a stochastic kernel "
                "(eta > 0), or leave the steps out where kernel.stochastic is False"
            )


class Reading(NamedTuple):
    """What a network's output says of the clean latents and of the noise, as factors of x_k and of the output.

    ``x̂0 = x0_from_x · x_k + x0_from_output · output`` and ``ε̂ = noise_from_x · x_k + noise_from_output · output``.
    """

    x0_from_x: Tensor
    x0_from_output: Tensor
    noise_from_x: Tensor
    noise_from_output: Tensor


def _read(prediction_type: str, alpha: Tensor, sigma: Tensor) -> Reading:
    """The two unknowns of x_k = α x0 + σ ε, solved with what the network predicts.

    | the output is | x̂0 | ε̂ |
    |---|---|---|
    | "epsilon": ε | (x_k − σ output) / α | output |
    | "sample": x0 | output | (x_k − α output) / σ |
    | "v_prediction": α ε − σ x0, where α² + σ² = 1 | α x_k − σ output | σ x_k + α output |
    | "flow_prediction": ε − x0, where α + σ = 1 | x_k − σ output | x_k + α output |
    """
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    return {
        "epsilon": Reading(1 / alpha, -sigma / alpha, zero, one),
        "sample": Reading(zero, one, 1 / sigma, -alpha / sigma),
        "v_prediction": Reading(alpha, -sigma, sigma, alpha),
        "flow_prediction": Reading(one, -sigma, one, alpha),
    }[prediction_type]


class Kernel:
    """A transition kernel on a schedule; see the table at the top of this module.

    Args:
        schedule: the K noise levels.
        prediction_type: what the network predicts, in diffusers' names; "flow_prediction" is the velocity
            ε − x0.
        eta: how much noise the kernel's steps add; 0 makes every step deterministic.
        last_step: "sde" keeps the kernel's own last step; "ode" makes it deterministic, so that with a final
            σ of 0 the sample is the last x̂0. ``None`` takes the kernel's default.
        free: ``[*latent]`` bool, the dimensions that have the kernel's noise; ``None`` for all. The others take the
            ODE's steps.

    Attributes:
        stds: ``[K]`` float64.
        stochastic: ``[K]`` bool, the steps that have a density.

    Raises:
        ValueError: the kernel does not live on the schedule's path, an option is out of range, or the network's output
            says nothing at α = 0 ("epsilon" from pure noise).
    """

    name: ClassVar[str]
    paths: ClassVar[tuple[str, ...]]
    default_eta: ClassVar[float]
    default_last_step: ClassVar[Literal["sde", "ode"]] = "ode"

    def __init__(
        self,
        schedule: Schedule,
        prediction_type: PredictionType,
        eta: float | None = None,
        last_step: Literal["sde", "ode"] | None = None,
        free: Tensor | None = None,
    ) -> None:
        if schedule.path not in self.paths:
            fitting = [name for name, kernel in KERNELS.items() if schedule.path in kernel.paths]
            raise ValueError(
                f"the kernel {self.name!r} is not defined on a {schedule.path} schedule; use one of {fitting}"
            )
        if prediction_type not in get_args(PredictionType):
            known = list(get_args(PredictionType))
            raise ValueError(f"prediction_type must be one of {known}, not {prediction_type!r}")
        if (prediction_type == "flow_prediction") != (schedule.path == "flow"):
            raise ValueError(f"a {schedule.path} schedule does not go with prediction_type {prediction_type!r}")
        eta = self.default_eta if eta is None else eta
        self.eta = number(eta, "eta", at_least=0)
        self.last_step = self.default_last_step if last_step is None else last_step
        if self.last_step not in ("sde", "ode"):
            raise ValueError(f'last_step must be "sde" or "ode", not {last_step!r}')
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.free = free
        kept, stds = self._coefficients(schedule)
        if self.last_step == "ode":
            kept[-1], stds[-1] = schedule.sigmas[-1], 0.0
        self._tabulate(kept, stds)

    def _tabulate(self, kept: Tensor, stds: Tensor) -> None:
        self._kept, self.stds = kept, stds
        self.stochastic = stds > 0
        schedule = self.schedule
        read = _read(self.prediction_type, schedule.alphas[:-1], schedule.sigmas[:-1])
        alphas = schedule.alphas[1:]
        # the mean α' x̂0 + kept ε̂ in terms of x_k and of the output; std; x̂0 in the same terms; the ODE's mean
        means = [
            alphas * x0 + noise * of_noise
            for noise in (kept, schedule.sigmas[1:])
            for x0, of_noise in ((read.x0_from_x, read.noise_from_x), (read.x0_from_output, read.noise_from_output))
        ]
        self._table = torch.stack([*means[:2], stds, read.x0_from_x, read.x0_from_output, *means[2:]])
        if not self._table.isfinite().all():
            raise ValueError(
                f"the kernel {self.name!r} cannot read {self.prediction_type!r} on this schedule: a mean, std or x̂0 "
                "is not finite (where α is 0, the latents are pure noise and a network that predicts it tells nothing)"
            )
        self._cast: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def _coefficients(self, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """``kept [K]`` and ``std [K]`` in float64."""
        raise NotImplementedError

    def only(self, steps: Iterable[int]) -> "Kernel":
        """This kernel on the given steps, the ODE on all others (MixGRPO, Flow-GRPO-Fast).

        Raises:
            ValueError: one of them is not among the K steps.
        """
        inside = torch.zeros(self.schedule.num_steps, dtype=torch.bool)
        for step in steps:
            if not 0 <= step < len(inside):
                raise ValueError(f"step {step} is not one of the {len(inside)} steps, which count from 0")
            inside[step] = True
        other = copy.copy(self)
        other._tabulate(self._kept.where(inside, self.schedule.sigmas[1:]), self.stds.where(inside, 0.0))
        return other

    def _rows(self, latents: Tensor, step: int | Tensor) -> tuple[Tensor, torch.dtype]:
        dtype = torch.float64 if latents.dtype == torch.float64 else torch.float32
        key = (latents.device, dtype)
        if key not in self._cast:
            self._cast[key] = self._table.to(*key)
        table = self._cast[key]
        rows = table[:, step : step + 1] if isinstance(step, int) else table[:, step.to(latents.device)]
        return rows.reshape(len(rows), -1, *[1] * (latents.ndim - 1)), dtype

    def transition(self, latents: Tensor, output: Tensor, step: int | Tensor) -> Transition:
        """The Gaussian of the next latents.

        Args:
            latents: ``[B, *latent]``, x_k.
            output: ``[B, *latent]``, the network's output at (x_k, timesteps[k]).
            step: k in [0, K), one for the batch or ``[B]`` integers (keep those on the CPU: a deterministic
                step among them is then told apart without a device sync).
        """
        rows, dtype = self._rows(latents, step)
        mean = latents.to(dtype) * rows[0] + output.to(dtype) * rows[1]
        if self.free is not None:
            mean = mean.where(self.free, latents.to(dtype) * rows[5] + output.to(dtype) * rows[6])
        known = isinstance(step, int) or step.device.type == "cpu"
        return Transition(mean, rows[2], bool(self.stochastic[step].all()) if known else True, self.free)

    def pred_x0(self, latents: Tensor, output: Tensor, step: int | Tensor) -> Tensor:
        """x̂0 ``[B, *latent]``, the network's estimate of the clean latents."""
        rows, dtype = self._rows(latents, step)
        return latents.to(dtype) * rows[3] + output.to(dtype) * rows[4]

    @property
    def gains(self) -> Tensor:
        """|∂mean/∂output| of each step, ``[K]`` float64: how far the mean moves when the output moves by 1."""
        return self._table[1].abs()

    @property
    def step_sizes(self) -> Tensor:
        """By what algorithms scale a step's terms so that all steps count alike, ``[K]`` float64: here the `gains`."""
        return self.gains

    def __repr__(self) -> str:
        return f"{type(self).__name__}(K={self.schedule.num_steps}, eta={self.eta:g}, last_step={self.last_step!r})"


class ODE(Kernel):
    """The deterministic sampler: every std is 0, no step has a density."""

    name, paths, default_eta = "ode", ("diffusion", "flow"), 0.0

    def _coefficients(self, schedule: Schedule) -> tuple[Tensor, Tensor]:
        if self.eta:
            raise ValueError(f"the ODE kernel has no noise: eta must be 0, not {self.eta}")
        return schedule.sigmas[1:].clone(), torch.zeros_like(schedule.sigmas[1:])


class DDIM(Kernel):
    """DDIM with η; η = 1 is ancestral DDPM sampling.

    Its last step keeps its noise (``last_step="sde"``): with Stable Diffusion's ``set_alpha_to_one=False`` the
    std there is small but positive, and DDPO trains it. DanceGRPO drops it from training.
    """

    name, paths, default_eta, default_last_step = "ddim", ("diffusion",), 1.0, "sde"

    def _coefficients(self, schedule: Schedule) -> tuple[Tensor, Tensor]:
        if self.eta > 1:
            raise ValueError(f"DDIM's eta must lie in [0, 1], not {self.eta}")
        a, s = schedule.alphas, schedule.sigmas
        variance = (s[1:] / s[:-1]) ** 2 * (1 - (a[:-1] / a[1:]) ** 2)
        stds = self.eta * variance.sqrt()
        return (s[1:] ** 2 - stds**2).clamp(min=0).sqrt(), stds  # all of σ' where α is 0 and η 1, but for rounding


class DanceSDE(Kernel):
    """DanceGRPO's SDE: constant η, an Euler-Maruyama step.

    By default the last step is deterministic: DanceGRPO rewards the last x̂0 and never trains that step.
    """

    name, paths, default_eta = "dance_sde", ("flow",), 0.3

    def _coefficients(self, schedule: Schedule) -> tuple[Tensor, Tensor]:
        before, after = schedule.sigmas[:-1], schedule.sigmas[1:]
        stds = self._noise_level(before, after) * (before - after).sqrt()
        return after - stds**2 / (2 * before), stds

    @property
    def step_sizes(self) -> Tensor:
        """Δ, as in the code of Flow-GRPO and GRPO-Guard. The `gains` are 1 + std²(1 − σ)/(2σΔ) times as large."""
        return -self.schedule.sigmas.diff()

    def _noise_level(self, before: Tensor, after: Tensor) -> Tensor:
        return torch.full_like(before, self.eta)


class FlowSDE(DanceSDE):
    """Flow-GRPO's SDE: noise a √(σ/(1−σ)); a = √2 is the memoryless schedule.

    At σ = 1 the denominator uses the next σ, as the published code does; so it does within 1e-5 of 1, where the
    published code adds noise of std 700 (Wan's grid begins at 1 − 1e-6). By default the last step is deterministic;
    with ``last_step="sde"`` its noise stays, and reaches the sample, as in the published code.
    """

    name, default_eta = "flow_sde", 0.7

    def _noise_level(self, before: Tensor, after: Tensor) -> Tensor:
        return self.eta * (before / (1 - torch.where(before > 1 - 1e-5, after, before))).sqrt()


class CPS(Kernel):
    """Coefficients-preserving sampling, the DDIM form on the flow path; a = 0 is Euler.

    At σ' = 0 its std is 0 by itself: no noise is left in the sample, and the last step has no density.
    """

    name, paths, default_eta = "cps", ("flow",), 0.7

    def _coefficients(self, schedule: Schedule) -> tuple[Tensor, Tensor]:
        if self.eta > 1:
            raise ValueError(f"CPS's eta must lie in [0, 1], not {self.eta}")
        after, angle = schedule.sigmas[1:], self.eta * math.pi / 2
        return after * math.cos(angle), after * math.sin(angle)


KERNELS: dict[str, type[Kernel]] = {kernel.name: kernel for kernel in (ODE, DDIM, DanceSDE, FlowSDE, CPS)}
