"""Noise levels: a `Schedule` of one's own, and those that published pipelines visit."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from grids import F64, cosine, qwen, sd35, shifted, stable_diffusion, wan
from torch import Tensor

from denoise_env.kernels import KERNELS, FlowSDE
from denoise_env.models.flow_match import FlowOptions, check_schedule, flow_schedule
from denoise_env.schedules import Schedule

# --- Schedules of one's own ---

SHIFT_3 = [
    *(1, 0.978261, 0.954545, 0.928571, 0.9, 0.868421, 0.833333, 0.794118, 0.75, 0.7, 0.642857, 0.576923, 0.5),
    *(0.409091, 0.3, 0.166667, 0),
]
"""DanceGRPO's 16 steps."""


def test_shifted_flow_sigmas() -> None:
    assert Schedule.flow(16, 3).sigmas.tolist() == pytest.approx(SHIFT_3, abs=1e-6)


@pytest.mark.parametrize("schedule", [Schedule.flow(7, 2), stable_diffusion(), cosine(9)], ids=lambda s: s.path)
def test_a_schedule_stays_on_its_path(schedule: Schedule) -> None:
    a, s = schedule.alphas, schedule.sigmas
    unit = a + s if schedule.path == "flow" else a**2 + s**2
    torch.testing.assert_close(unit, torch.ones_like(unit), rtol=0, atol=1e-14)


@pytest.mark.parametrize("num_steps", [2, 10, 40])
def test_explicit_sigmas_are_the_familys_own(num_steps: int) -> None:
    schedule = Schedule.from_sigmas(sd35(num_steps), timestep_scale=1000)
    assert schedule.num_steps == num_steps
    assert schedule.path == "flow"
    assert schedule.sigmas[-2].item() == pytest.approx(0.00893, abs=5e-6)  # shift 3, whatever K
    assert schedule.timesteps[0] == 1000
    assert schedule.timesteps.dtype == torch.float32
    gap = (schedule.sigmas - Schedule.flow(num_steps, 3).sigmas).abs().max().item()
    assert gap > 0.05
    stretched = Schedule.from_sigmas(qwen(num_steps).tolist())  # a list does as well
    assert stretched.sigmas[-2].item() == pytest.approx(0.02)
    assert torch.equal(stretched.sigmas + stretched.alphas, torch.ones(num_steps + 1, dtype=F64))


def test_explicit_sigmas_may_have_timesteps_of_their_own() -> None:
    sigmas = wan(4)
    schedule = Schedule.from_sigmas(sigmas, timesteps=(1000 * sigmas[:-1]).long())
    assert schedule.timesteps.tolist()[0] == 999  # cut off, not rounded
    assert schedule.timesteps.dtype == torch.int64
    assert schedule.sigmas[0].item() == 1 - 1e-6
    sigmas[0] = 0
    assert schedule.sigmas[0].item() == 1 - 1e-6  # the caller's tensor stays the caller's


def test_explicit_products_are_a_diffusion_with_timesteps_of_its_own() -> None:
    whole = stable_diffusion(50)
    again = Schedule.from_alphas_cumprod(whole.alphas**2, whole.timesteps + 0.25)
    torch.testing.assert_close(again.alphas, whole.alphas, rtol=0, atol=1e-15)
    torch.testing.assert_close(again.sigmas, whole.sigmas, rtol=0, atol=1e-12)
    assert again.timesteps[0] == 981.25


@pytest.mark.parametrize("shift", [0.05, 0.1, 0.3, 0.9, 1.1, 3.0, 7.0])
def test_a_flow_begins_at_pure_noise_whatever_its_shift(shift: float) -> None:
    schedule = Schedule.flow(10, shift)
    assert schedule.sigmas[0] == 1
    assert FlowSDE(schedule, "flow_prediction").stds.max() < 2


def test_flow_timesteps_are_scaled_sigmas() -> None:
    schedule = Schedule.flow(4, timestep_scale=1000)
    assert schedule.timesteps.tolist() == [1000, 750, 500, 250]


def test_stable_diffusion_table() -> None:
    products = stable_diffusion().alphas[:2] ** 2
    assert products.tolist() == pytest.approx([0.005775500139, 0.007281727141], abs=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule.flow(0), "at least 1, not 0"),
        (lambda: Schedule.flow(4, 0), "shift must be positive"),
        (lambda: Schedule(torch.ones(2), torch.ones(2), torch.ones(2), "flow"), r"K \+ 1 alphas"),
        (
            lambda: Schedule(torch.ones(2), torch.ones(3), torch.tensor([1, 0.5, 0.5]), "flow"),
            "decrease strictly",
        ),
        (lambda: Schedule.flow(4, math.inf), "shift must be a finite number, not inf"),
        (lambda: Schedule(torch.ones(0), torch.ones(1), torch.zeros(1), "flow"), "at least 1, not 0"),
        (
            lambda: Schedule(torch.tensor([math.inf]), torch.tensor([0.0, 1]), torch.tensor([1.0, 0]), "flow"),
            "timesteps",
        ),
        (lambda: Schedule(torch.ones(1), torch.tensor([0.5, 1]), torch.tensor([1.0, 0]), "flow"), r"α \+ σ must be 1"),
        (
            lambda: Schedule(torch.ones(1), torch.tensor([0.5, 1]), torch.tensor([0.5, 0]), "diffusion"),
            "α² \\+ σ² must",
        ),
        (lambda: Schedule.from_sigmas([math.nan, 0.0]), r"sigmas must be finite numbers, not \[nan, 0.0\]"),
        (lambda: Schedule.from_sigmas([1.0, 0.5, 0.02]), "sigmas must end at 0, not 0.02: append the 0"),
        (lambda: Schedule.from_sigmas([1.0, 0.5, 0.5, 0.0]), "decrease strictly"),
        (lambda: Schedule.from_sigmas([1.5, 0.5, 0.0]), r"lie in \[0, 1\]"),
        (lambda: Schedule.from_sigmas([1.0, -0.5, 0.0]), r"lie in \[0, 1\]"),
        (lambda: Schedule.from_sigmas([0.0]), "num_steps must be at least 1, not 0"),
        (lambda: Schedule.from_sigmas([]), r"K \+ 1 alphas"),
        (lambda: Schedule.from_sigmas([1.0, 0.5, 0.0], torch.ones(3)), r"K \+ 1 alphas"),
        (lambda: Schedule.from_alphas_cumprod([0.5, math.nan], torch.ones(1)), "sigmas must be finite"),
        (lambda: Schedule.from_alphas_cumprod([0.5, 1.1], torch.ones(1)), "finite"),
        (lambda: Schedule.from_alphas_cumprod([0.5, 0.2], torch.ones(1)), "decrease strictly"),
    ],
)
def test_what_makes_no_schedule_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- Schedules of published pipelines ---


class Called(Exception):
    """The network was called, so that all noise levels are known."""


def even(num_steps: int) -> list[float]:
    return np.linspace(1.0, 1 / num_steps, num_steps).tolist()


def line(tokens: int, at_256: float, at_most: float, most: int) -> float:
    """Log of FLUX.1's shift, a line through its values at 256 and at ``most`` tokens."""
    return at_256 + (tokens - 256) * (at_most - at_256) / (most - 256)


def flux2_mu(tokens: int, num_steps: int) -> float:
    """Log of FLUX.2's shift: a line in the tokens at 200 steps, another at 10, and a line in the steps between them."""
    many = 0.00016927 * tokens + 0.45666666
    few = 8.73809524e-05 * tokens + 1.89833333
    return many if tokens > 4300 else few + (many - few) * (num_steps - 10) / 190


def flow(num_steps: int, shift: float) -> Tensor:
    return shifted(torch.linspace(1, 0, num_steps + 1, dtype=F64), shift)


@dataclass(frozen=True)
class Grid:
    """A pipeline's noise levels.

    Attributes:
        pipeline: its class.
        network: a small network of its class.
        scheduler: the scheduler's configuration.
        call: what the pipeline needs in the place of prompts.
        arguments: what `flow_schedule` gets for so many tokens and steps.
        levels: the levels in closed form, for so many steps and that shift.
        shift: for so many tokens and steps.
        shortest: the fewest steps.
    """

    pipeline: type
    network: Callable[[], torch.nn.Module]
    scheduler: Mapping[str, Any]
    call: Mapping[str, Any]
    arguments: Callable[[int, int], Mapping[str, Any]]
    levels: Callable[[int, float], Tensor]
    shift: Callable[[int, int], float]
    shortest: int = 1

    def make(self, num_steps: int, tokens: int = 1024, **options: Any) -> Schedule:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**self.scheduler)
        return flow_schedule(scheduler, FlowOptions(**options), num_steps, **self.arguments(tokens, num_steps))

    def visited(self, num_steps: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """The levels and timesteps that the pipeline itself has when it calls its network."""
        parts = dict.fromkeys(self.pipeline._get_signature_keys(self.pipeline)[0])
        parts |= {
            "transformer": self.network(),
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**self.scheduler),
        }

        def stop(*args: Any) -> None:
            raise Called

        parts["transformer"].register_forward_pre_hook(stop)
        pipeline = self.pipeline(**parts)
        pipeline.set_progress_bar_config(disable=True)
        with pytest.raises(Called):
            pipeline(num_inference_steps=num_steps, height=height, width=width, **self.call)
        return pipeline.scheduler.sigmas.double(), pipeline.scheduler.timesteps


def flux_network() -> torch.nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=0,
        num_single_layers=0,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    )


def sd3_network() -> torch.nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
    )


def qwen_network() -> torch.nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        in_channels=4,
        out_channels=1,
        num_layers=0,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=8,
        axes_dims_rope=(4, 6, 6),
    )


def flux2_network() -> torch.nn.Module:
    return diffusers.Flux2Transformer2DModel(
        in_channels=4,
        num_layers=0,
        num_single_layers=0,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=8,
        axes_dims_rope=(4, 4, 4, 4),
    )


TEXT = {"prompt_embeds": torch.zeros(1, 4, 8)}
POOLED = {**TEXT, "pooled_prompt_embeds": torch.zeros(1, 8)}
DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0}

GRIDS = {
    "FLUX.1-dev": Grid(
        diffusers.FluxPipeline,
        flux_network,
        DYNAMIC,
        POOLED,
        lambda tokens, k: {"sigmas": even(k), "settings": {"mu": line(tokens, 0.5, 1.15, 4096)}},
        flow,
        lambda tokens, k: math.exp(line(tokens, 0.5, 1.15, 4096)),
    ),
    "FLUX.1-schnell": Grid(
        diffusers.FluxPipeline,
        flux_network,
        {"shift": 1.0},
        POOLED,
        lambda tokens, k: {"sigmas": even(k), "settings": {"mu": line(tokens, 0.5, 1.15, 4096)}},  # which it ignores
        flow,
        lambda tokens, k: 1.0,
    ),
    "SD3.5": Grid(
        diffusers.StableDiffusion3Pipeline,
        sd3_network,
        {"shift": 3.0},
        {**POOLED, "guidance_scale": 1.0},
        lambda tokens, k: {"timestep_scale": 1000},
        sd35,
        lambda tokens, k: 3.0,
    ),
    "Qwen-Image": Grid(
        diffusers.QwenImagePipeline,
        qwen_network,
        {"use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02},
        {**TEXT, "prompt_embeds_mask": torch.ones(1, 4, dtype=torch.long), "true_cfg_scale": 1.0},
        lambda tokens, k: {"sigmas": even(k), "settings": {"mu": line(tokens, 0.5, 0.9, 8192)}},
        qwen,
        lambda tokens, k: math.exp(line(tokens, 0.5, 0.9, 8192)),
        shortest=2,
    ),
    "FLUX.2": Grid(
        diffusers.Flux2Pipeline,
        flux2_network,
        DYNAMIC,
        TEXT,
        lambda tokens, k: {"sigmas": even(k), "settings": {"mu": flux2_mu(tokens, k)}},
        flow,
        lambda tokens, k: math.exp(flux2_mu(tokens, k)),
    ),
}
STEPS = [(name, k) for name, grid in GRIDS.items() for k in (1, 2, 4, 10, 28, 50) if k >= grid.shortest]


@pytest.mark.parametrize("size", [(512, 768), (1152, 1024)], ids=str)
@pytest.mark.parametrize(("name", "num_steps"), STEPS)
def test_a_pipelines_schedule_is_its_own(name: str, num_steps: int, size: tuple[int, int]) -> None:
    grid, tokens = GRIDS[name], size[0] * size[1] // 256
    found = grid.make(num_steps, tokens)
    sigmas, timesteps = grid.visited(num_steps, *size)
    torch.testing.assert_close(found.sigmas, sigmas, rtol=0, atol=1e-6)
    told = timesteps if name == "SD3.5" else timesteps / 1000
    torch.testing.assert_close(found.timesteps, told, rtol=1e-6, atol=0)
    closed = grid.levels(num_steps, grid.shift(tokens, num_steps))
    torch.testing.assert_close(found.sigmas, closed, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "num_steps"), STEPS)
def test_a_shift_of_ones_own_takes_the_checkpoints_place(name: str, num_steps: int) -> None:
    """Whether that depends on the size or not; all else stays the pipeline's."""
    found = GRIDS[name].make(num_steps, shift=5.0)
    torch.testing.assert_close(found.sigmas, GRIDS[name].levels(num_steps, 5.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", GRIDS)
def test_linspace_is_dancegrpos_grid(name: str) -> None:
    """A straight grid with the 0, shifted; by 3 unless another shift is given."""
    assert GRIDS[name].make(16, schedule="linspace").sigmas.tolist() == pytest.approx(SHIFT_3, abs=1e-6)
    found = GRIDS[name].make(10, schedule="linspace", shift=2.0)
    torch.testing.assert_close(found.sigmas, flow(10, 2.0), rtol=0, atol=1e-12)
    scale = 1000 if name == "SD3.5" else 1
    torch.testing.assert_close(found.timesteps.double(), scale * found.sigmas[:-1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("last_step", ["ode", "sde"])
@pytest.mark.parametrize("kind", [name for name, kernel in KERNELS.items() if "flow" in kernel.paths])
@pytest.mark.parametrize("name", GRIDS)
def test_every_flow_kernel_works_on_every_schedule(name: str, kind: str, last_step: str) -> None:
    """Where the data is a point, x0, and the network perfect, so that x = α x0 + σ ε with ε known."""
    x0, noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    own = [GRIDS[name].make(k) for other, k in STEPS if other == name]
    for schedule in (*own, GRIDS[name].make(10, schedule="linspace")):
        kernel = KERNELS[kind](schedule, "flow_prediction", last_step=last_step)
        alphas, sigmas = schedule.alphas.tolist(), schedule.sigmas.tolist()
        for k in range(schedule.num_steps):
            x, velocity = alphas[k] * x0 + sigmas[k] * noise, noise - x0
            step = kernel.transition(x, velocity, k)
            torch.testing.assert_close(kernel.pred_x0(x, velocity, k), x0, rtol=0, atol=1e-12)
            assert step.mean.isfinite().all()
            assert 0 <= step.std.item() < 2
            assert step.stochastic == (step.std.item() > 0)
            if kind in ("ode", "cps"):  # the marginal is exact
                kept = ((step.mean - alphas[k + 1] * x0) / noise).mean().item()
                assert kept**2 + step.std.item() ** 2 == pytest.approx(sigmas[k + 1] ** 2, abs=1e-12)
        if last_step == "ode" or kind in ("ode", "cps"):
            torch.testing.assert_close(step.mean, x0, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: check_schedule(FlowOptions(schedule="karras")), r"one of \['pipeline', 'linspace'\], not 'karras'"),
        (lambda: check_schedule(FlowOptions(shift=0.0)), "shift must be positive, not 0.0"),
        (lambda: check_schedule(FlowOptions(shift=-3.0)), "shift must be positive, not -3.0"),
        (lambda: check_schedule(FlowOptions(shift=math.nan)), "shift must be a finite number, not nan"),
        *((lambda name=name: GRIDS[name].make(1, schedule="linspace", shift=0.0), "positive") for name in GRIDS),
        (
            lambda: flow_schedule(diffusers.FlowMatchEulerDiscreteScheduler(shift_terminal=0.02), FlowOptions(), 0),
            "num_steps must be at least 1, not 0",
        ),
        (
            lambda: flow_schedule(None, FlowOptions(schedule="linspace"), 0),
            "num_steps must be at least 1, not 0",
        ),
        (lambda: GRIDS["Qwen-Image"].make(1), 'num_steps must be at least 2, not 1: .* at 0.02 .*"linspace"'),
        (
            lambda: flow_schedule(
                diffusers.FlowMatchEulerDiscreteScheduler(), FlowOptions(), 3, sigmas=[1.0, 0.5, 0.0]
            ),  # Z-Image's before diffusers 0.39
            r"sigmas must decrease strictly from one step to the next: \[1.0, 0.5, 0.0, 0.0\]",
        ),
    ],
)
def test_what_makes_no_pipelines_schedule_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
