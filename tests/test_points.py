"""Points: a mixture model whose denoiser is exact, so that theory can be checked on samples."""

import math

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from denoise_env.kernels import CPS, DDIM, ODE, DanceSDE, FlowSDE, Kernel
from denoise_env.models import load_model
from denoise_env.models.points import COMPONENT_STD, MIXTURES, Points, PointsOptions
from denoise_env.prompts import Prompt

PATHS = ["diffusion", "flow"]
PROMPTS = list(MIXTURES)


def encode(model: Points, texts: list[str]) -> TensorDict:
    return model.encode([Prompt(text) for text in texts])


def perturbed(path: str, seed: int = 3) -> Points:
    """A model as if it had been trained."""
    model = Points(path)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def inputs(model: Points, rows: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timestep per row, prompt index per row."""
    generator = torch.Generator().manual_seed(0)
    timesteps = model.schedule(50).timesteps[torch.randint(50, (rows,), generator=generator)]
    return torch.randn(rows, 2, generator=generator), timesteps, torch.arange(rows) % len(PROMPTS)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Thousands of tiny operations: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- The exact denoiser ---


def posterior_mean(x: Tensor, alpha: float, sigma: float, means: Tensor) -> Tensor:
    """E[x0 | x] by brute force: x0 on a grid, weighted with prior times likelihood."""
    side = torch.linspace(-3, 3, 201, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    prior = torch.stack([-(grid - m).square().sum(1) / (2 * COMPONENT_STD**2) for m in means]).logsumexp(0)
    likelihood = -(x[:, None] - alpha * grid).square().sum(-1) / (2 * sigma**2)
    return (prior + likelihood).softmax(1) @ grid


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(
    ("path", "timestep"), [("diffusion", t) for t in (20, 300, 981)] + [("flow", t) for t in (0.1, 0.5, 1.0)]
)
def test_the_denoiser_is_the_posterior_mean(path: str, timestep: float, prompt: str) -> None:
    model = Points(path)
    network = model.network
    if path == "diffusion":
        alpha, sigma = network.alphas[timestep].item(), network.sigmas[timestep].item()
    else:
        alpha, sigma = 1 - timestep, timestep
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0 = posterior_mean(x, alpha, sigma, network.means[PROMPTS.index(prompt)].double())
    noise = (x - alpha * x0) / sigma
    expected = noise if path == "diffusion" else noise - x0
    output = model.predict(x.float(), torch.tensor(timestep), encode(model, [prompt] * 3)).double()
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_rows_do_not_mix(path: str) -> None:
    model = perturbed(path)
    x, t, index = inputs(model)
    conditioning = encode(model, PROMPTS)[index]
    together = model.predict(x, t, conditioning)
    for i in range(len(x)):
        alone = model.predict(x[i : i + 1], t[i], conditioning[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


# --- Sampling ---


def exact_samples(prompt: str, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    means = torch.tensor(MIXTURES[prompt])[torch.randint(8, (n,), generator=generator)]
    return means + COMPONENT_STD * torch.randn(n, 2, generator=generator)


def statistics(x: Tensor, prompt: str) -> Tensor:
    """Per row: first and second moments and, for the small scale, the squared distance to the next mean."""
    nearest = torch.cdist(x, torch.tensor(MIXTURES[prompt])).min(1).values ** 2
    return torch.stack([x[:, 0], x[:, 1], x[:, 0] ** 2, x[:, 1] ** 2, x[:, 0] * x[:, 1], nearest], 1)


def z_scores(kernel: type[Kernel], eta: float, rows: int = 1000) -> Tensor:
    """Of the statistics of a ring's and a spiral's samples, ``[2, 6]``."""
    model = Points("diffusion" if kernel is DDIM else "flow")
    schedule = model.schedule(1000 if kernel is DDIM else 200)  # DDIM's bias falls the slowest
    built = kernel(schedule, model.prediction_type, eta)
    prompts = ["ring", "spiral"]
    conditioning = encode(model, prompts).repeat_interleave(rows)
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2 * rows, 2, generator=generator)
    with torch.no_grad():
        for k, t in enumerate(schedule.timesteps):
            gaussian = built.transition(x, model.predict(x, t, conditioning), k)
            x = gaussian.sample(torch.randn(x.shape, generator=generator))
    scores = []
    for prompt, points in zip(prompts, x.chunk(2), strict=True):
        exact = statistics(exact_samples(prompt, 100_000), prompt)
        standard_error = exact.std(0) / math.sqrt(rows)
        scores.append((statistics(points, prompt).mean(0) - exact.mean(0)) / standard_error)
    return torch.stack(scores)


SMALL_CPS = 2 / math.pi * math.asin(math.sqrt(5 / 200))  # sin² ∝ 1/K: test_kernels.py says why


@pytest.mark.parametrize(
    ("kernel", "eta"),
    [(ODE, 0), (DDIM, 0), (DDIM, 1), (DanceSDE, 0.3), (FlowSDE, 0.7), (FlowSDE, 2**0.5), (CPS, SMALL_CPS)],
)
def test_many_steps_sample_the_mixture(kernel: type[Kernel], eta: float) -> None:
    assert z_scores(kernel, eta).abs().max() < 4


def test_the_test_sees_a_biased_sampler() -> None:
    """CPS at its usual noise level draws points towards the means, at any number of steps."""
    assert (z_scores(CPS, 0.7)[:, -1] < -5).all()


# --- The residual network: what training changes ---


@pytest.mark.parametrize("path", PATHS)
def test_the_residual_is_zero_at_the_start_and_trainable(path: str) -> None:
    model = Points(path)
    x, t, index = inputs(model)
    output = model.predict(x, t, encode(model, PROMPTS)[index])
    if path == "diffusion":
        alpha, sigma = model.network.alphas[t], model.network.sigmas[t]
    else:
        alpha, sigma = 1 - t, t
    assert torch.equal(output, model.network.exact(x, alpha[:, None], sigma[:, None], index))
    output.sum().backward()
    assert model.trainable()["residual.4.weight"].grad.abs().sum() > 0
    assert all(name.startswith("residual.") for name in model.trainable())


def test_the_seed_gives_the_hidden_layers_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    one, same, other = (Points(options=PointsOptions(seed=s)).network.residual[0].weight for s in (5, 5, 6))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_reference_is_the_model_before_training() -> None:
    model = Points()
    x, t, index = inputs(model)
    conditioning = encode(model, PROMPTS)[index]
    with pytest.raises(RuntimeError, match="keep_reference"), model.reference():
        pass
    before = model.predict(x, t, conditioning)
    model.keep_reference()
    with torch.no_grad():
        model.network.residual[-1].bias += 1
    model.keep_reference()
    with model.reference():
        assert torch.equal(model.predict(x, t, conditioning), before)
    torch.testing.assert_close(model.predict(x, t, conditioning), before + 1)


@pytest.mark.parametrize("path", PATHS)
def test_export_round_trip(path: str, tmp_path) -> None:
    model = perturbed(path)
    model.export(tmp_path / "new" / "folder")
    loaded = load_model(str(tmp_path / "new" / "folder"))
    x, t, index = inputs(model)
    conditioning = encode(model, PROMPTS)[index]
    assert loaded.architecture() == model.architecture()
    assert torch.equal(loaded.predict(x, t, conditioning), model.predict(x, t, conditioning))
    assert not torch.equal(Points(path).predict(x, t, conditioning), model.predict(x, t, conditioning))


# --- Prompts, schedules, pictures, loading ---


def test_encode_keeps_the_order_of_the_prompts() -> None:
    assert encode(Points(), ["grid", "ring", "grid"])["prompt_id"].tolist() == [3, 0, 3]


@pytest.mark.parametrize("prompt", ["circle", "Ring", ""])
def test_unknown_prompts_are_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match=rf"knows no prompt {prompt!r}; its prompts are \['ring'"):
        Points().check_prompt(Prompt(prompt))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 50, 333, 500, 501, 999, 1000])
def test_schedules_of_any_length(path: str, num_steps: int) -> None:
    model = Points(path)
    schedule = model.schedule(num_steps)
    assert schedule.num_steps == num_steps
    assert (schedule.timesteps.diff() < 0).all()
    assert schedule.sigmas[-1] == 0
    if path == "diffusion":  # what the network uses is what the kernel assumes
        assert torch.equal(model.network.alphas[schedule.timesteps].double(), schedule.alphas[:-1].float().double())
        assert schedule.timesteps.max() < 1000
    else:
        assert schedule.timesteps[0] == 1
    kernel = (DDIM if path == "diffusion" else FlowSDE)(schedule, model.prediction_type)
    x = torch.ones(1, 2)
    for k in {0, num_steps - 1}:
        output = model.predict(x, schedule.timesteps[k], encode(model, ["ring"]))
        assert kernel.transition(x, output, k).mean.isfinite().all()


def test_diffusion_timesteps_are_stable_diffusions() -> None:
    scheduler = pytest.importorskip("diffusers").DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    for num_steps in (1, 10, 50, 300):
        scheduler.set_timesteps(num_steps)
        assert Points().schedule(num_steps).timesteps.tolist() == scheduler.timesteps.tolist()
    torch.testing.assert_close(Points().network.alphas ** 2, scheduler.alphas_cumprod, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(path: str, num_steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_steps must be .*not {num_steps}"):
        Points(path).schedule(num_steps)


def test_render_draws_a_dot_where_the_point_is() -> None:
    picture = Points().render(torch.tensor([[1.0, -1.0]]))
    assert (picture.shape, picture.dtype) == ((1, 64, 64, 3), torch.uint8)
    row, col = divmod(int(picture[0].sum(-1).argmin()), 64)
    assert (row, col) == pytest.approx((63 * 0.75, 63 * 0.75), abs=1)  # x to the right, y up
    assert picture[0, 0, 0].tolist() == [243, 243, 243]
    assert picture[0, 31, 0].tolist() == picture[0, 0, 32].tolist() == [226, 226, 226]  # the axes


def test_load_model_knows_both_paths_and_refuses_other_options() -> None:
    assert load_model("points").prediction_type == "epsilon"
    assert load_model("points-flow", seed=2).prediction_type == "flow_prediction"
    with pytest.raises(ValueError, match="points has no option 'guidance_scale'; there are \\['seed'\\]"):
        load_model("points", guidance_scale=2)


def test_pooled_conditioning_is_the_prompt_one_hot():
    model = Points()
    pooled = model.pool(encode(model, ["line", "ring"]))
    assert pooled.tolist() == [[0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]


def test_a_portrait_has_its_samples_where_they_are() -> None:
    model = load_model("points")
    picture = model.portrait(torch.tensor([[1.0, 1.0], [-1.0, -1.0], [9.0, 0.0]]), Prompt("cross"))
    assert (picture.shape, picture.dtype) == ((160, 160, 3), torch.uint8)

    def at(x: float, y: float) -> list[int]:
        return picture[round((2 - y) / 4 * 159), round((x + 2) / 4 * 159)].tolist()

    blue = [30, 90, 200]
    assert at(1, 1) == at(-1, -1) == at(1.95, 0) == blue  # up is up, and what lies outside is on the border
    assert at(1, -1) == [255, 255, 255]
    red, green, _ = at(0.5, 0.0)  # a component of the mixture, orange
    assert red > green > 150
