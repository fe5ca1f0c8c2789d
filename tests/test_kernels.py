"""The mathematics of the transition kernels.

Notation. A latent on the path is x = α x0 + σ ε; on the flow α = 1 − σ, the velocity is v = ε − x0,
x̂0 = x − σ v and ε̂ = x + (1 − σ) v. A step goes from σ to σ' = σ − Δ and is a Gaussian N(μ, k² I).
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from grids import F64, cosine, qwen, sd35, stable_diffusion, wan
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from denoise_env.kernels import CPS, DDIM, KERNELS, ODE, DanceSDE, FlowSDE, Kernel, Transition
from denoise_env.schedules import Schedule


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)[:, None]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def flow_kernel(kernel: type[Kernel], num_steps: int, shift: float = 1, **options: object) -> Kernel:
    return kernel(Schedule.flow(num_steps, shift), "flow_prediction", **options)


def test_pure_noise_at_the_start_is_read_where_the_output_tells_of_it() -> None:
    """Zero terminal SNR: the first latents are ε alone; predicting ε says nothing of x0 then, predicting v does."""
    schedule = Schedule.from_alphas_cumprod([0.0, 0.3, 0.8, 1.0], torch.tensor([999, 600, 300]))
    kernel, x, v = DDIM(schedule, "v_prediction", 1.0), normal(2, 3), normal(2, 3, seed=1)
    torch.testing.assert_close(kernel.pred_x0(x, v, 0), -v)
    torch.testing.assert_close(kernel.transition(x, v, 0).mean, -v * 0.3**0.5, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="'ddim' cannot read 'epsilon' on this schedule"):
        DDIM(schedule, "epsilon", 1.0)


# --- Published numbers ---


@pytest.mark.parametrize(
    ("step", "x0", "mean", "std", "log_prob"),
    [
        (0, 1.0, 0.314923913, 0.04423258685, 1.122159045),
        (5, 0.9078947368, 0.3241834131, 0.05619514869, 1.088649675),
        (14, 0.51, 0.3971333333, 0.1095445115, 0.3904767073),
        (15, 0.4166666667, 0.4294166667, 0.1224744871, 0.1079026631),
    ],
)
def test_dance_sde_fixtures(step: int, x0: float, mean: float, std: float, log_prob: float) -> None:
    kernel = flow_kernel(DanceSDE, 16, 3, last_step="sde")
    gaussian = kernel.transition(column(0.3), column(-0.7), step)
    got = [kernel.pred_x0(column(0.3), column(-0.7), step), gaussian.mean, gaussian.std]
    got.append(gaussian.log_prob(column(0.25)))
    assert [value.item() for value in got] == pytest.approx([x0, mean, std, log_prob], abs=1e-6)


def test_log_prob_of_a_vector_is_averaged() -> None:
    x, v, after = (torch.tensor([pair], dtype=F64) for pair in ([0.3, -1.2], [-0.7, 0.4], [0.25, -1.1]))
    gaussian = flow_kernel(DanceSDE, 16, 3).transition(x, v, 5)
    assert gaussian.log_prob(after).item() == pytest.approx(0.5321561727, abs=1e-6)


def test_ode_fixture() -> None:
    mean = flow_kernel(ODE, 16, 3).transition(column(0.3), column(-0.7), 5).mean
    assert mean.item() == pytest.approx(0.3245614035, abs=1e-6)


@pytest.mark.parametrize(
    ("timestep", "mean", "std", "log_prob"),
    [
        (981, 0.4999105545, 0.4544632724, -0.281496814),
        (501, 0.3923684447, 0.2947845403, 0.1859479892),
        (21, 0.3932296553, 0.03947954614, -4.26796149),
        (1, 0.3146282031, 0.02064832017, -1.937109722),
    ],
)
def test_ddim_fixtures(timestep: int, mean: float, std: float, log_prob: float) -> None:
    schedule = stable_diffusion()
    step = schedule.timesteps.tolist().index(timestep)
    gaussian = DDIM(schedule, "epsilon", 1.0).transition(column(0.3), column(-0.7), step)
    got = [gaussian.mean.item(), gaussian.std.item(), gaussian.log_prob(column(0.25)).item()]
    assert got == pytest.approx([mean, std, log_prob], abs=1e-6)


# --- Published formulas ---
# (x, v, σ, σ', noise level) → μ, k, as the papers write them.


def dance_paper(x: Tensor, v: Tensor, s: float, t: float, eta: float) -> tuple[Tensor, float]:
    score = -(x - (1 - s) * (x - s * v)) / s**2
    return x - (s - t) * (v - eta**2 / 2 * score), eta * math.sqrt(s - t)


def dance_closed(x: Tensor, v: Tensor, s: float, t: float, eta: float) -> tuple[Tensor, float]:
    d = s - t
    return x * (1 - eta**2 * d / (2 * s)) - d * v * (1 + eta**2 * (1 - s) / (2 * s)), eta * math.sqrt(d)


def flow_closed(x: Tensor, v: Tensor, s: float, t: float, a: float) -> tuple[Tensor, float]:
    return dance_closed(x, v, s, t, a * math.sqrt(s / (1 - (t if s > 1 - 1e-5 else s))))


def cps_paper(x: Tensor, v: Tensor, s: float, t: float, a: float) -> tuple[Tensor, float]:
    x0, noise = x - s * v, x + (1 - s) * v
    return (1 - t) * x0 + t * math.cos(a * math.pi / 2) * noise, t * math.sin(a * math.pi / 2)


def euler(x: Tensor, v: Tensor, s: float, t: float, _: float) -> tuple[Tensor, float]:
    return x - (s - t) * v, 0.0


@pytest.mark.parametrize(
    ("kernel", "eta", "formula"),
    [
        (DanceSDE, 0.3, dance_paper),
        (DanceSDE, 0.3, dance_closed),
        (DanceSDE, 1.0, dance_closed),
        (FlowSDE, 0.7, flow_closed),
        (FlowSDE, math.sqrt(2), flow_closed),
        (CPS, 0.7, cps_paper),
        (CPS, 1.0, cps_paper),
        (ODE, 0.0, euler),
    ],
)
@pytest.mark.parametrize(
    "schedule",
    [
        Schedule.flow(1),
        Schedule.flow(10),
        Schedule.flow(16, 3.0),
        Schedule.from_sigmas(sd35(10), timestep_scale=1000),
        Schedule.from_sigmas(qwen(10)),
        Schedule.from_sigmas(wan(10), (1000 * wan(10)[:-1]).long()),
    ],
    ids=["flow-1", "flow-10", "flow-16-shifted", "sd3.5", "qwen", "wan"],
)
def test_flow_kernels_are_the_published_formulas(kernel, eta, formula, schedule) -> None:
    x, v = normal(3, 2, 4, seed=1), normal(3, 2, 4, seed=2)
    built = kernel(schedule, "flow_prediction", eta=eta, last_step="sde")
    sigmas = schedule.sigmas.tolist()
    for step in range(schedule.num_steps):
        mean, std = formula(x, v, *sigmas[step : step + 2], eta)
        gaussian = built.transition(x, v, step)
        torch.testing.assert_close(gaussian.mean, mean, rtol=0, atol=1e-12)
        assert gaussian.std.item() == built.stds[step].item() == pytest.approx(std, abs=1e-14)
        torch.testing.assert_close(built.pred_x0(x, v, step), x - sigmas[step] * v)


def test_flow_sde_amplifies_the_velocity_by_one_constant() -> None:
    """For σ < 1, Δμ = −(1 + a²/2) Δ·Δv."""
    kernel, x, v, dv = (
        flow_kernel(FlowSDE, 16, 3, eta=0.7),
        normal(1, 5),
        normal(1, 5, seed=1),
        normal(1, 5, seed=2),
    )
    steps = -kernel.schedule.sigmas.diff()
    for k in range(1, 15):
        moved = kernel.transition(x, v + dv, k).mean - kernel.transition(x, v, k).mean
        torch.testing.assert_close(moved, -(1 + 0.7**2 / 2) * steps[k] * dv)


def outputs_from_noise(x: Tensor, noise: Tensor, alpha: float, sigma: float) -> dict[str, Tensor]:
    x0 = (x - sigma * noise) / alpha
    return {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_ddim_is_the_published_formula(eta: float, prediction: str) -> None:
    x, noise, schedule = normal(3, 5, seed=1), normal(3, 5, seed=2), stable_diffusion()
    kernel = DDIM(schedule, prediction, eta)
    products = (schedule.alphas**2).tolist()
    for step, (a, b) in enumerate(itertools.pairwise(products)):
        x0 = (x - math.sqrt(1 - a) * noise) / math.sqrt(a)
        std = eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
        mean = math.sqrt(b) * x0 + math.sqrt(1 - b - std**2) * noise
        output = outputs_from_noise(x, noise, math.sqrt(a), math.sqrt(1 - a))[prediction]
        gaussian = kernel.transition(x, output, step)
        torch.testing.assert_close(gaussian.mean, mean, rtol=1e-10, atol=1e-10)
        assert gaussian.std.item() == pytest.approx(std, abs=1e-12)
        torch.testing.assert_close(kernel.pred_x0(x, output, step), x0, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernel", [ODE, DanceSDE, FlowSDE, CPS, "epsilon", "sample", "v_prediction"], ids=str)
def test_gains_are_the_means_derivatives_by_the_output(kernel) -> None:
    made = DDIM(stable_diffusion(10), kernel) if isinstance(kernel, str) else flow_kernel(kernel, 10, 3)
    x, output = normal(4, 3, seed=1), normal(4, 3, seed=2).requires_grad_()
    for step, gain in enumerate(made.gains.tolist()):
        (slope,) = torch.autograd.grad(made.transition(x, output, step).mean.sum(), output)
        torch.testing.assert_close(slope.abs(), torch.full_like(slope, gain), rtol=1e-9, atol=0)
    drops = -made.schedule.sigmas.diff()
    torch.testing.assert_close(made.step_sizes, drops if kernel in (ODE, DanceSDE, FlowSDE) else made.gains)
    if kernel in (DanceSDE, FlowSDE):
        sigmas = made.schedule.sigmas[:-1]
        torch.testing.assert_close(made.gains / drops, 1 + made.stds**2 * (1 - sigmas) / (2 * sigmas * drops))


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("to_one", [False, True])
def test_ddim_is_diffusers_ddim(prediction: str, to_one: bool) -> None:
    """Same timesteps, same mean, same std as the step of diffusers' own scheduler (float32 tables)."""
    scheduler = pytest.importorskip("diffusers").DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=to_one,
        steps_offset=1,
        prediction_type=prediction,
    )
    scheduler.set_timesteps(50)
    ours = stable_diffusion()
    assert scheduler.timesteps.tolist() == ours.timesteps.tolist()
    schedule = Schedule.diffusion(scheduler.alphas_cumprod, scheduler.timesteps, float(scheduler.final_alpha_cumprod))
    torch.testing.assert_close(schedule.alphas[:-1], ours.alphas[:-1], rtol=1e-5, atol=0)

    x, noise = normal(2, 4, seed=1, dtype=torch.float32), normal(2, 4, seed=2, dtype=torch.float32)
    for eta, step in itertools.product((0.0, 0.6, 1.0), (0, 17, 40, 48, 49)):
        a, s = schedule.alphas[step].item(), schedule.sigmas[step].item()
        output = outputs_from_noise(x, noise, a, s)[prediction]
        gaussian = DDIM(schedule, prediction, eta).transition(x, output, step)
        t = int(scheduler.timesteps[step])
        mean, plus = (
            scheduler.step(output, t, x, eta=eta, variance_noise=torch.full_like(x, e)).prev_sample for e in (0.0, 1.0)
        )
        torch.testing.assert_close(gaussian.mean, mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gaussian.std.expand_as(mean), plus - mean, rtol=1e-3, atol=1e-5)


# --- One Gaussian: density, entropy, KL ---


@pytest.fixture(params=[torch.float32, F64], ids=["float32", "float64"])
def pair(request: pytest.FixtureRequest) -> tuple[Transition, Transition]:
    """Two transitions with one std per row."""
    dtype = request.param
    stds = torch.tensor([[0.02, 0.3, 1.1], [0.05, 0.3, 0.7]], dtype=dtype)[:, :, None, None]
    means = normal(2, 3, 4, 5, dtype=dtype)
    return Transition(means[0], stds[0]), Transition(means[1], stds[1])


def reduced(distribution_value: Tensor, dims: int, reduction: str) -> Tensor:
    return distribution_value / dims if reduction == "mean" else distribution_value


def as_torch(gaussian: Transition) -> Independent:
    return Independent(Normal(gaussian.mean, gaussian.std.expand_as(gaussian.mean)), 2)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_density_entropy_and_kl_are_torch_distributions(pair, reduction) -> None:
    p, q = pair
    x = p.sample(normal(3, 4, 5, seed=3, dtype=p.mean.dtype))
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if x.dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    for ours, theirs in [
        (p.log_prob(x, reduction), as_torch(p).log_prob(x)),
        (p.entropy(reduction), as_torch(p).entropy()),
        (p.kl(q, reduction), kl_divergence(as_torch(p), as_torch(q))),
    ]:
        assert ours.shape == (3,)
        torch.testing.assert_close(ours, reduced(theirs, 20, reduction), **tolerance)


def test_mean_is_the_default_reduction_and_the_sum_over_dimensions(pair) -> None:
    p, q = pair
    x = p.mean + 0.01
    for default, summed in [
        (p.log_prob(x), p.log_prob(x, "sum")),
        (p.entropy(), p.entropy("sum")),
        (p.kl(q), p.kl(q, "sum")),
    ]:
        torch.testing.assert_close(default * 20, summed, rtol=1e-5, atol=1e-5)


def test_kl_of_equal_stds_is_the_squared_distance() -> None:
    p, q = (Transition(normal(2, 6, seed=i), column(0.1, 0.4)) for i in (0, 1))
    expected = (p.mean - q.mean).square().sum(1) / (2 * column(0.1, 0.4)[:, 0] ** 2)
    torch.testing.assert_close(p.kl(q, "sum"), expected)
    assert p.kl(p, "sum").tolist() == [0, 0]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_only_free_dimensions_count(pair, reduction) -> None:
    """Log-prob, entropy and KL are those of the free dimensions alone, whatever the others are."""
    free = torch.zeros(4, 5, dtype=torch.bool)
    free[1:, :3] = True
    whole, part = (
        [replace(g, mean=g.mean.where(free, torch.nan), free=free) for g in pair],
        [replace(g, mean=g.mean[:, 1:, :3]) for g in pair],
    )
    x = pair[0].sample(normal(3, 4, 5, seed=3, dtype=pair[0].mean.dtype))
    assert whole[0].dimensions == part[0].dimensions == 9
    torch.testing.assert_close(whole[0].log_prob(x, reduction), part[0].log_prob(x[:, 1:, :3], reduction))
    torch.testing.assert_close(whole[0].entropy(reduction), part[0].entropy(reduction))
    torch.testing.assert_close(whole[0].kl(whole[1], reduction), part[0].kl(part[1], reduction))


@pytest.mark.parametrize("kernel", [DanceSDE, FlowSDE, CPS])
@pytest.mark.parametrize("step", [0, 7])
def test_dimensions_that_are_not_free_take_the_odes_step(kernel: type[Kernel], step: int) -> None:
    free = torch.tensor([False, True, True])
    x, v, noise = (normal(2, 3, seed=seed) for seed in range(3))
    found = flow_kernel(kernel, 8, 3, last_step="sde", free=free).transition(x, v, step).sample(noise)
    plain = flow_kernel(kernel, 8, 3, last_step="sde").transition(x, v, step).sample(noise)
    assert torch.equal(found[:, 1:], plain[:, 1:])
    assert torch.equal(found[:, 0], flow_kernel(ODE, 8, 3).transition(x, v, step).mean[:, 0])


@pytest.mark.parametrize(("moved", "widened"), [(1e-4, 0.0), (1e-6, 0.0), (0.0, 1e-3), (0.0, -1e-3)])
def test_kl_is_precise_for_tiny_differences(moved: float, widened: float) -> None:
    """A policy-gradient step changes little; float32 must still see how much."""
    mean, std = normal(1, 64, dtype=torch.float32) * 1e-2, torch.full((1, 1), 0.05)
    p, q = Transition(mean + moved * std, std * (1 + widened)), Transition(mean, std)
    d = (p.mean.double() - mean.double()) / std.double()
    w = ((p.std.double() - std.double()) / std.double()).item()
    exact = 0.5 * d.square().sum().item() + 64 * (w + w * w / 2 - math.log1p(w))
    assert exact > 0
    assert p.kl(q, "sum").item() == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("size", [0.02, 0.3])
def test_log_ratio_has_mean_minus_kl_and_variance_twice_kl(size: float) -> None:
    """With x' ~ old, ℓ = log π(x') − log π_old(x') is Gaussian with E ℓ = −KL(old ‖ new) and Var ℓ = 2 KL."""
    n, dims, std = 200_000, 8, torch.full((1, 1), 0.07, dtype=F64)
    mean = normal(1, dims)
    old, new = Transition(mean, std), Transition(mean + size * std * normal(1, dims, seed=1), std)
    x = old.sample(normal(n, dims, seed=2))
    ratio = new.log_prob(x, "sum") - old.log_prob(x, "sum")
    kl = old.kl(new, "sum").item()
    assert abs(ratio.mean().item() + kl) < 4 * math.sqrt(2 * kl / n)
    assert abs(ratio.var().item() - 2 * kl) < 4 * 2 * kl * math.sqrt(2 / n)
    weights = ratio.exp()
    assert abs(weights.mean().item() - 1) < 4 * weights.std().item() / math.sqrt(n)  # E_old[π/π_old] = 1


def test_samples_have_the_stated_mean_and_std() -> None:
    n = 100_000
    gaussian = flow_kernel(DanceSDE, 16, 3).transition(column(0.3), column(-0.7), 5)
    x = gaussian.sample(normal(n, 1))
    assert abs((x.mean() - gaussian.mean).item()) < 4 * gaussian.std.item() / math.sqrt(n)
    assert x.std().item() == pytest.approx(gaussian.std.item(), rel=4 / math.sqrt(2 * n))


# --- Precision ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [DanceSDE, FlowSDE, CPS])
def test_ratio_is_exactly_one_when_latents_are_rounded_first(kernel: type[Kernel], dtype: torch.dtype) -> None:
    """The rollout's log-prob of the stored latents is the one the update computes."""
    built = flow_kernel(kernel, 16, 3)
    x, v = normal(4, 16, 8, 8, seed=1).to(dtype), normal(4, 16, 8, 8, seed=2).to(dtype)
    stored = built.transition(x, v, 5).sample(normal(4, 16, 8, 8, seed=3, dtype=torch.float32), dtype)
    assert stored.dtype == dtype
    recorded = built.transition(x, v, 5).log_prob(stored, "sum")
    again = flow_kernel(kernel, 16, 3).transition(x, v, torch.full((4,), 5)).log_prob(stored.clone(), "sum")
    assert ((again - recorded).exp() == 1).all()


@pytest.mark.parametrize(("std", "shift"), [(0.3, 7e-5), (0.074, 4e-4), (0.03, 2e-3)])
def test_rounding_after_the_log_prob_moves_the_ratio(std: float, shift: float) -> None:
    """Why latents are rounded first: bf16 moves the mean log-ratio beyond DanceGRPO's clip of 1e-4."""
    gaussian = Transition(normal(8, 16384, dtype=torch.float32), torch.full((8, 1), std))
    x = gaussian.sample(normal(8, 16384, seed=1, dtype=torch.float32))
    late = gaussian.log_prob(x.bfloat16()) - gaussian.log_prob(x)
    assert late.exp().sub(1).abs().max().item() == pytest.approx(shift, rel=0.6)
    early = gaussian.sample(normal(8, 16384, seed=1, dtype=torch.float32), torch.bfloat16)
    assert (gaussian.log_prob(early) - gaussian.log_prob(early.clone()) == 0).all()


def test_half_precision_latents_are_computed_in_float32() -> None:
    x, v = normal(2, 3, seed=1).bfloat16(), normal(2, 3, seed=2).bfloat16()
    gaussian = flow_kernel(DanceSDE, 4).transition(x, v, 1)
    assert gaussian.mean.dtype == gaussian.std.dtype == gaussian.log_prob(x).dtype == torch.float32
    exact = flow_kernel(DanceSDE, 4).transition(x.double(), v.double(), 1)
    torch.testing.assert_close(gaussian.mean.double(), exact.mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", list(KERNELS))
def test_a_step_per_row_is_bitwise_the_step_for_all(name: str) -> None:
    on_flow = "flow" in KERNELS[name].paths
    schedule, prediction = (Schedule.flow(6, 3), "flow_prediction") if on_flow else (cosine(6), "epsilon")
    kernel = KERNELS[name](schedule, prediction)
    x, out = normal(6, 2, 3, seed=1, dtype=torch.float32), normal(6, 2, 3, seed=2, dtype=torch.float32)
    steps = torch.tensor([4, 0, 2, 2, 1, 3])
    rows = kernel.transition(x, out, steps)
    for i, k in enumerate(steps.tolist()):
        alone = kernel.transition(x[i : i + 1], out[i : i + 1], k)
        assert torch.equal(rows.mean[i], alone.mean[0])
        assert torch.equal(rows.std[i], alone.std[0])
        assert torch.equal(kernel.pred_x0(x, out, steps)[i], kernel.pred_x0(x[i : i + 1], out[i : i + 1], k)[0])


# --- Marginals on Gaussian data ---
# With x0 ~ N(m, s²) the best denoiser is known and linear, so the mean and variance of a kernel's samples
# follow from a recursion without sampling: x' = b + c x + k e gives mean' = b + c mean, var' = c² var + k².


def moments(kernel: Kernel, m: float, s: float) -> list[tuple[float, float]]:
    """(mean, variance) of the latents after 0, …, K steps, started on the path, with the exact denoiser."""
    alphas, sigmas = kernel.schedule.alphas.tolist(), kernel.schedule.sigmas.tolist()
    mean, var = alphas[0] * m, (alphas[0] * s) ** 2 + sigmas[0] ** 2
    out = [(mean, var)]
    x = column(0.0, 1.0)
    for k, (a, sigma) in enumerate(zip(alphas[:-1], sigmas[:-1], strict=True)):
        x0 = m + a * s**2 / ((a * s) ** 2 + sigma**2) * (x - a * m)
        noise = (x - a * x0) / sigma
        gaussian = kernel.transition(x, noise - x0 if kernel.schedule.path == "flow" else noise, k)
        at_zero, at_one = gaussian.mean[:, 0].tolist()
        slope = at_one - at_zero
        mean, var = at_zero + slope * mean, slope**2 * var + gaussian.std.item() ** 2
        out.append((mean, var))
    return out


def excess(kernel: Kernel, m: float = 1.0, s: float = 0.5) -> float:
    """Relative error of the samples' standard deviation."""
    return math.sqrt(moments(kernel, m, s)[-1][1]) / s - 1


def build(name: str, num_steps: int, eta: float, shift: float = 1) -> Kernel:
    if KERNELS[name].paths == ("diffusion",):
        return KERNELS[name](cosine(num_steps), "epsilon", eta)
    return flow_kernel(KERNELS[name], num_steps, shift, eta=eta)


FIRST_ORDER = [
    ("ode", 0.0),
    ("ddim", 0.0),
    ("ddim", 0.5),
    ("ddim", 1.0),
    ("dance_sde", 0.3),
    ("dance_sde", 0.7),
]


@pytest.mark.parametrize(("name", "eta"), [*FIRST_ORDER, ("flow_sde", 0.7), ("flow_sde", math.sqrt(2)), ("cps", 0.7)])
def test_the_mean_is_exact_at_any_number_of_steps(name: str, eta: float) -> None:
    assert moments(build(name, 7, eta), 1.0, 0.5)[-1][0] == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(("name", "eta"), FIRST_ORDER)
def test_marginals_become_exact_like_one_over_the_steps(name: str, eta: float) -> None:
    errors = [excess(build(name, k, eta)) for k in (200, 400, 800)]
    assert abs(errors[-1]) < 0.005
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2, rel=0.1)


def test_intermediate_marginals_become_exact_too() -> None:
    for name, eta in [("ddim", 1.0), ("dance_sde", 0.3), ("flow_sde", math.sqrt(2))]:
        kernel = build(name, 800, eta)
        exact = (0.5 * kernel.schedule.alphas) ** 2 + kernel.schedule.sigmas**2
        got = torch.tensor([var for _, var in moments(kernel, 1.0, 0.5)], dtype=F64)
        forgotten = kernel.schedule.sigmas < 0.8  # Flow-SDE's first step, see below
        assert (got / exact - 1)[forgotten].abs().max() < 0.01, name


def test_memoryless_flow_sde_converges_with_second_order() -> None:
    errors = [excess(build("flow_sde", k, math.sqrt(2))) for k in (100, 200, 400)]
    assert abs(errors[-1]) < 1e-4
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("a", [0.5, 0.7, 1.0])
def test_flow_sdes_first_step_leaves_a_slow_error(a: float) -> None:
    """At σ = 1 its std is a and the variance a²Δ + a⁴/4 too large, whatever K is. The SDE
    forgets that excess like K^(−a²); 2 e(2K) − e(K) isolates it from the usual 1/K.
    """
    kernel = flow_kernel(FlowSDE, 1000, eta=a)
    assert kernel.stds[0].item() == pytest.approx(a)
    assert noise_levels(kernel)[1] - kernel.schedule.sigmas[1].item() ** 2 == pytest.approx(a**2 / 1000 + a**4 / 4)
    error = {k: excess(build("flow_sde", k, a)) for k in (200, 400, 800)}
    slow = [2 * error[2 * k] - error[k] for k in (200, 400)]
    assert slow[1] / slow[0] == pytest.approx(2 ** (-(a**2)), rel=0.02)
    assert abs(error[800]) < 0.01


@pytest.mark.parametrize("a", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("s", [0.15, 0.5])
def test_cps_loses_spread_however_many_steps(a: float, s: float) -> None:
    """CPS's noise per step does not shrink with the step: the samples' std tends to s cos(aπ/4), not to s."""
    limit = math.cos(a * math.pi / 4) - 1
    errors = [excess(build("cps", k, a), s=s) - limit for k in (400, 800, 1600)]
    assert abs(errors[-1]) < 0.006
    assert all(1.5 < coarse / fine < 2 for coarse, fine in itertools.pairwise(errors))


def test_cps_converges_when_its_noise_shrinks_with_the_step() -> None:
    """sin²(aπ/2) ∝ Δ makes it the discretisation of an SDE."""
    errors = [excess(build("cps", k, 2 / math.pi * math.asin(math.sqrt(4 / k)))) for k in (100, 200, 400)]
    assert abs(errors[-1]) < 0.006
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2, rel=0.05)


# Standard deviation of the samples over the data's, in percent too much, for data N(1, 0.5²).
STEPS = (10, 16, 25, 50, 100)
BIAS = {
    # kernel, noise level, shift: K = 10, 16, 25, 50, 100
    ("ode", 0.0, 1): (-13.84, -8.86, -5.76, -2.92, -1.47),
    ("ode", 0.0, 3): (-26.06, -16.88, -11.08, -5.68, -2.88),
    ("ddim", 0.0, 1): (-14.07, -9.00, -5.85, -2.97, -1.49),
    ("ddim", 1.0, 1): (-21.97, -15.78, -11.22, -6.34, -3.44),
    ("dance_sde", 0.3, 1): (-11.99, -7.62, -4.93, -2.49, -1.25),
    ("dance_sde", 0.3, 3): (-24.52, -15.54, -10.08, -5.12, -2.58),
    ("flow_sde", 0.7, 1): (-4.07, -2.32, -1.23, -0.31, 0.08),
    ("flow_sde", 0.7, 3): (-16.25, -10.32, -6.68, -3.28, -1.54),
    ("flow_sde", math.sqrt(2), 1): (1.38, 0.43, 0.15, 0.03, 0.01),
    ("cps", 0.7, 1): (-25.95, -22.43, -20.15, -17.91, -16.63),
    ("cps", 0.7, 3): (-34.49, -28.50, -24.57, -20.63, -18.31),
}


@pytest.mark.parametrize(("name", "eta", "shift"), BIAS, ids=str)
def test_bias_at_few_steps(name: str, eta: float, shift: float) -> None:
    measured = [100 * excess(build(name, k, eta, shift)) for k in STEPS]
    assert measured == pytest.approx(BIAS[name, eta, shift], abs=0.006)


# --- Marginals where the data is a single point ---
# A perfect denoiser then knows x0 and ε, and all that is left is the noise level: var' = (noise/σ)² var + k².


def noise_levels(kernel: Kernel) -> list[float]:
    """Variance of the latents after 0, …, K steps."""
    return [var for _, var in moments(kernel, 0.7, 0.0)]


@pytest.mark.parametrize("num_steps", [1, 2, 5, 16])
@pytest.mark.parametrize(("name", "eta"), [("ddim", 0.3), ("ddim", 1.0), ("cps", 0.3), ("cps", 0.7), ("cps", 1.0)])
def test_ddim_and_cps_keep_the_noise_level_exactly(name: str, eta: float, num_steps: int) -> None:
    kernel = build(name, num_steps, eta, shift=3)
    assert noise_levels(kernel) == pytest.approx((kernel.schedule.sigmas**2).tolist(), abs=1e-14)


def test_ddim_keeps_the_noise_level_on_stable_diffusions_schedule() -> None:
    kernel = DDIM(stable_diffusion(), "epsilon", 1.0)
    assert noise_levels(kernel) == pytest.approx((kernel.schedule.sigmas**2).tolist(), abs=1e-14)


@pytest.mark.parametrize("kernel", [DanceSDE, FlowSDE])
def test_the_sdes_inject_too_much_noise(kernel: type[Kernel]) -> None:
    """From exactly σ², one step arrives at σ'² + k²Δ/σ + k⁴/(4σ²)."""
    built = flow_kernel(kernel, 16, 3, last_step="sde")
    sigmas, x = built.schedule.sigmas.tolist(), column(0.0, 1.0)
    for k, (s, t) in enumerate(itertools.pairwise(sigmas)):
        gaussian = built.transition(x, x / s, k)  # x0 = 0, so v = ε = x/σ
        std = gaussian.std.item()
        var = gaussian.mean.diff(dim=0).item() ** 2 * s**2 + std**2
        assert var == pytest.approx(t**2 + std**2 * (s - t) / s + std**4 / (4 * s**2), abs=1e-14)


@pytest.mark.parametrize(("num_steps", "factor"), [(16, 1.115), (25, 1.189)])
def test_dance_sdes_cumulative_noise_on_fluxs_schedule(num_steps: int, factor: float) -> None:
    """Std over σ where the last, deterministic step begins."""
    kernel = flow_kernel(DanceSDE, num_steps, 3)
    assert math.sqrt(noise_levels(kernel)[-2]) / kernel.schedule.sigmas[-2].item() == pytest.approx(factor, abs=5e-4)


# --- The last step and deterministic steps ---


@pytest.mark.parametrize("kernel", [DanceSDE, FlowSDE, CPS, ODE])
def test_on_the_flow_the_sample_is_by_default_the_last_x0(kernel: type[Kernel]) -> None:
    built = flow_kernel(kernel, 5)
    x, v = normal(2, 3, seed=1), normal(2, 3, seed=2)
    last = built.transition(x, v, 4)
    assert not last.stochastic
    assert torch.equal(last.sample(normal(2, 3)), last.mean)
    torch.testing.assert_close(last.mean, built.pred_x0(x, v, 4))


@pytest.mark.parametrize(("kernel", "noisy"), [(DanceSDE, True), (FlowSDE, True), (CPS, False)])
def test_last_step_sde_keeps_the_kernels_own_last_step(kernel: type[Kernel], noisy: bool) -> None:
    built = flow_kernel(kernel, 5, last_step="sde")
    assert built.stochastic.tolist() == [True] * 4 + [noisy]


def test_ddim_keeps_its_small_last_noise_on_stable_diffusions_schedule() -> None:
    assert DDIM(stable_diffusion(), "epsilon").stochastic.all()
    without = DDIM(stable_diffusion(), "epsilon", last_step="ode")
    assert without.stochastic.tolist() == [True] * 49 + [False]
    x, noise = normal(2, 3, seed=1), normal(2, 3, seed=2)
    eta_zero = DDIM(stable_diffusion(), "epsilon", 0.0)
    assert torch.equal(without.transition(x, noise, 49).mean, eta_zero.transition(x, noise, 49).mean)
    assert not DDIM(cosine(5), "epsilon").stochastic[-1]  # ᾱ = 1 at the end leaves no noise


@pytest.mark.parametrize("kernel", [DDIM, CPS, DanceSDE, FlowSDE])
def test_eta_zero_is_the_ode(kernel: type[Kernel]) -> None:
    on_flow = "flow" in kernel.paths
    schedule, prediction = (Schedule.flow(6, 3), "flow_prediction") if on_flow else (stable_diffusion(), "epsilon")
    still, ode = kernel(schedule, prediction, 0.0), ODE(schedule, prediction)
    assert not still.stochastic.any()
    x, out = normal(2, 3, seed=1), normal(2, 3, seed=2)
    for k in range(schedule.num_steps):
        torch.testing.assert_close(still.transition(x, out, k).mean, ode.transition(x, out, k).mean, rtol=0, atol=1e-14)
        assert still.transition(x, out, k).std.item() == 0


@pytest.mark.parametrize("step", [2, torch.tensor([0, 2])], ids=["one step", "one row of two"])
def test_a_deterministic_step_has_no_density(step: int | Tensor) -> None:
    gaussian = flow_kernel(DanceSDE, 3).transition(normal(2, 3), normal(2, 3), step)
    other = flow_kernel(DanceSDE, 3).transition(normal(2, 3), normal(2, 3), 0)
    with pytest.raises(ValueError, match="no density, so no log-prob"):
        gaussian.log_prob(normal(2, 3))
    with pytest.raises(ValueError, match="no density, so no entropy"):
        gaussian.entropy()
    for p, q in [(gaussian, other), (other, gaussian)]:
        with pytest.raises(ValueError, match="no density, so no KL"):
            p.kl(q)


# --- Refusals ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDIM(Schedule.flow(4), "epsilon"), "'ddim' is not defined on a flow schedule"),
        (
            lambda: DanceSDE(cosine(4), "epsilon"),
            r"on a diffusion schedule; use one of \['ode', 'ddim'\]",
        ),
        (lambda: CPS(cosine(4), "epsilon"), "'cps' is not defined on a diffusion"),
        (lambda: FlowSDE(Schedule.flow(4), "epsilon"), "does not go with prediction_type 'epsilon'"),
        (lambda: ODE(cosine(4), "flow_prediction"), "does not go with prediction_type 'flow_prediction'"),
        (lambda: ODE(cosine(4), "noise"), "prediction_type must be one of"),
        (lambda: flow_kernel(DanceSDE, 4, eta=-0.1), "eta must be at least 0, not -0.1"),
        (lambda: flow_kernel(DanceSDE, 4, eta=math.nan), "finite number"),
        (lambda: flow_kernel(CPS, 4, eta=1.01), r"CPS's eta must lie in \[0, 1\]"),
        (lambda: DDIM(cosine(4), "epsilon", 1.01), r"DDIM's eta must lie in \[0, 1\]"),
        (lambda: flow_kernel(ODE, 4, eta=0.1), "eta must be 0"),
        (lambda: flow_kernel(CPS, 4, last_step="euler"), "last_step must be"),
        (
            lambda: flow_kernel(CPS, 4).transition(column(1), column(1), 0).log_prob(column(1), "max"),
            "reduction must",
        ),
    ],
)
def test_refusals(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- Windows ---


@pytest.mark.parametrize("kernel", [DDIM, DanceSDE, FlowSDE, CPS])
def test_outside_its_window_a_kernel_is_the_ode(kernel) -> None:
    schedule = (
        Schedule.flow(6, 3.0)
        if kernel is not DDIM
        else Schedule.diffusion(torch.linspace(0.99, 0.01, 100), torch.arange(90, -1, -15)[:6], 1.0)
    )
    kind = "flow_prediction" if kernel is not DDIM else "epsilon"
    whole, ode = kernel(schedule, kind), ODE(schedule, kind)
    window = whole.only([2, 3])
    assert window.stochastic.tolist() == [False, False, True, True, False, False]
    generator = torch.Generator().manual_seed(0)
    x, output = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    for k in range(6):
        found, expected = window.transition(x, output, k), (whole if k in (2, 3) else ode).transition(x, output, k)
        torch.testing.assert_close(found.mean, expected.mean, rtol=1e-12, atol=1e-12)
        assert torch.equal(found.std, expected.std)
        assert found.stochastic == expected.stochastic
    assert whole.stochastic[:4].all()  # as it was


@pytest.mark.parametrize("step", [-1, 6])
def test_steps_that_there_are_not_are_refused(step) -> None:
    with pytest.raises(ValueError, match=f"step {step} is not one of the 6 steps"):
        FlowSDE(Schedule.flow(6), "flow_prediction").only([2, step])


def test_a_kernel_on_no_step_is_the_ode() -> None:
    kernel = FlowSDE(Schedule.flow(6), "flow_prediction").only([])
    assert not kernel.stochastic.any()
