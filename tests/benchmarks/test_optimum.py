"""The optimum on Points, against closed forms, brute-force sampling and trained policies."""

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.policy import DenoisingPolicy
from benchmarks import optimum
from benchmarks.optimum import BETAS, CASES, Frontier, backward, load, measure, solve
from denoise_env.mdp import DenoisingMDP
from denoise_env.models import load_model
from denoise_env.models.points import Points
from denoise_env.prompts import Prompt
from denoise_env.rewards.points import PointsReward

BOTH = pytest.mark.parametrize("policies", ["any", "gaussian"])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def base(model: str, kernel: str, num_steps: int, eta: float | None = None, **options) -> DenoisingPolicy:
    """The base policy on the ring alone."""
    mdp = DenoisingMDP(load_model(model), {"points": PointsReward()}, ["ring"], num_steps)
    return DenoisingPolicy(mdp, kernel, eta, **options)


def standard_error(x: Tensor) -> float:
    return x.std().item() / math.sqrt(x.numel())


# --- Closed form: Gaussian data and a quadratic reward ---

MEAN, STD, TARGET, ETA = (0.3, -0.2), 0.5, (0.8, 0.5), 0.9


class Gaussian(Points):
    """The rectified flow of N(MEAN, STD²)."""

    def predict(self, latents, timestep, conditioning):
        slope, offset = velocity(timestep)
        return slope * latents + offset * torch.tensor(MEAN)


def velocity(sigma):
    """(ε̂ − x̂0) as slope · x + offset · mean."""
    gain = (1 - sigma) * STD**2 / ((1 - sigma) ** 2 * STD**2 + sigma**2)
    return (1 - gain) / sigma, -(1 - gain * (1 - sigma)) / sigma


def quadratic(images, prompts):
    return -(images - torch.tensor(TARGET)).square().sum(1) / 2


def objective(beta: float, policies: str, steps: tuple[int, ...], num_steps: int) -> float:
    """max E[r] − β KL with V_k(x) = −p x²/2 + q x + s in each dimension, Dance-SDE's steps, the last an Euler step."""
    total, delta = 0.0, 1 / num_steps
    for mean, target in zip(MEAN, TARGET, strict=True):
        p, q, s = 1.0, target, -(target**2) / 2
        for k in reversed(range(num_steps)):
            sigma = 1 - k * delta
            eta = ETA if k < num_steps - 1 else 0.0
            variance = eta**2 * delta
            if k in steps:
                shrink = 1 + p * variance / beta
                s += q**2 * variance / (2 * beta * shrink)
                s -= beta / 2 * math.log(shrink) if policies == "any" else p * variance / 2
                p, q = p / shrink, q / shrink
            else:
                s -= p * variance / 2
            slope, offset = velocity(sigma)
            drift = delta * (1 + eta**2 * (1 - sigma) / (2 * sigma))
            a, b = 1 - eta**2 * delta / (2 * sigma) - drift * slope, -drift * offset * mean
            p, q, s = p * a**2, (q - p * b) * a, s + q * b - p * b**2 / 2
        total += s - p / 2
    return total


@BOTH
@pytest.mark.parametrize("steps", [(0, 1, 2, 3), (1, 3), ()])
def test_the_linear_quadratic_case_in_closed_form(policies: str, steps: tuple[int, ...]) -> None:
    betas = (math.inf, 3.0, 1.0, 0.3)
    policy = DenoisingPolicy(DenoisingMDP(Gaussian("flow"), {"r": quadratic}, ["ring"], 5), "dance_sde", ETA)
    found = solve(policy, betas, policies=policies, steps=steps, spacing=0.1)["ring"]
    for i, beta in enumerate(betas):
        beta = min(beta, 1e4)
        h = 1e-3 * beta
        kl = (objective(beta - h, policies, steps, 5) - objective(beta + h, policies, steps, 5)) / (2 * h)
        assert found.kls[i] == pytest.approx(kl, abs=2e-3, rel=2e-3)
        assert found.rewards[i] == pytest.approx(objective(beta, policies, steps, 5) + beta * kl, abs=2e-3)


# --- Brute force on the mixture ---


@pytest.mark.parametrize(("model", "kernel"), [("points", "ddim"), ("points-flow", "flow_sde")])
def test_the_optimum_from_sampled_paths(model: str, kernel: str) -> None:
    """From a fixed x_0: V_0 = β log E[exp(r/β)], and E*[r] with weights exp(r/β)."""
    policy, beta, n = base(model, kernel, 4), 0.2, 20_000
    side = torch.linspace(-5, 5, 201, dtype=torch.float64)
    values, rewards, _ = backward(policy, "ring", (math.inf, beta), side)
    generator = torch.Generator().manual_seed(0)
    for i, j in ((100, 100), (80, 110), (124, 96)):
        x = torch.stack([side[i], side[j]]).float().expand(n, 2)
        for k in range(4):
            transition = policy.transition(x, k, policy.mdp.conditioning.rows(torch.zeros(n, dtype=torch.long)))
            x = transition.sample(torch.randn(n, 2, generator=generator))
        r = policy.mdp.score(x, torch.zeros(n, dtype=torch.long)).total.double()
        weight = (r / beta).exp() / (r / beta).exp().mean()
        sampled = beta * (r / beta).exp().mean().log()
        tilted = (weight * r).mean()
        assert abs(values[0, i, j] - r.mean()) < 4 * standard_error(r)
        assert abs(values[1, i, j] - sampled) < 4 * beta * standard_error(weight)
        assert abs(rewards[1, i, j] - tilted) < 4 * standard_error(weight * (r - tilted))


@pytest.mark.parametrize(("model", "kernel"), CASES)
def test_without_tilt_it_is_the_base(model: str, kernel: str) -> None:
    policy = base(model, kernel, 10)
    found = solve(policy, (math.inf, 100.0), spacing=0.05)["ring"]
    rewards, kls = measure(policy, policy, 10_000, seed=0)
    assert abs(found.rewards[0] - rewards.mean()) < 4 * standard_error(rewards)
    assert found.kls[0] == 0 == kls.max()
    assert 0 < found.kls[1] < 1e-4
    assert found.reward_at(0) == found.rewards[0]


def train(policy: DenoisingPolicy, reference: DenoisingPolicy, beta: float, steps: list[int]) -> None:
    """Ascend E[r] − β KL by its pathwise gradient."""
    optimizer = torch.optim.Adam(policy.network.residual.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    generator = torch.Generator().manual_seed(1)
    conditioning = policy.mdp.conditioning.rows(torch.zeros(256, dtype=torch.long))
    for _ in range(200):
        x, kl = torch.randn(256, 2, generator=generator), torch.zeros(())
        for k in range(policy.mdp.num_steps):
            transition = (policy if k in steps else reference).transition(x, k, conditioning)
            if k in steps:
                kl = kl + transition.kl(reference.transition(x, k, conditioning), "sum").mean()
            x = transition.sample(torch.randn(x.shape, generator=generator))
        loss = beta * kl - PointsReward()(x, [Prompt("ring")] * 256).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def test_a_trained_policy_comes_close_and_no_further() -> None:
    beta = 0.1
    reference, policy = (base("points-flow", "flow_sde", 4) for _ in range(2))
    bound, gaussian = (solve(reference, BETAS[::2], policies=p, spacing=0.08)["ring"] for p in ("any", "gaussian"))
    steps = [0, 1, 2]
    train(policy, reference, beta, steps)
    rewards, kls = measure(policy, reference, 20_000, 2, steps)
    reward, kl = rewards.mean().item(), kls.mean().item()
    error = standard_error(rewards - beta * kls)
    assert reward > 0.7
    assert -4 * error < gaussian.distance(reward, kl) < 0.005 + 4 * error
    assert bound.distance(reward, kl) > gaussian.distance(reward, kl) + 0.1
    # a network shared by all steps changes the deterministic last one too, which costs no KL and evades the bound
    rewards, same = measure(policy, reference, 20_000, 2)
    assert torch.equal(same, kls)
    assert gaussian.distance(rewards.mean(), kl) < -0.01


# --- Theory ---


@BOTH
@pytest.mark.parametrize("case", CASES)
def test_the_frontier_is_concave_with_slope_beta(case: tuple[str, str], policies: str) -> None:
    """By duality the secant between two optima has a slope between their betas."""
    for frontier in load(*case, policies).values():
        slopes = np.diff(frontier.rewards) / np.diff(frontier.kls)
        assert (np.diff(frontier.kls) > 0).all()
        assert (slopes < 1.03 * np.array(frontier.betas[:-1])).all()
        assert (slopes > 0.97 * np.array(frontier.betas[1:])).all()


def test_tilting_the_marginal_is_the_optimum_only_without_memory() -> None:
    beta, n = 0.2, 20_000
    gaps = {}
    for kernel, eta in (("flow_sde", 2**0.5), ("dance_sde", 0.3)):
        policy = base("points-flow", kernel, 10, eta)
        found = solve(policy, (math.inf, beta), spacing=0.06)["ring"]
        r = measure(policy, policy, n, seed=0)[0]
        weight = (r / beta).exp() / (r / beta).exp().mean()
        tilted = (weight * r).mean().item()
        gaps[kernel] = (tilted - found.rewards[1]) / standard_error(weight * (r - tilted))
        if kernel == "flow_sde":
            objective = found.rewards[1] - beta * found.kls[1]
            assert abs(beta * (r / beta).exp().mean().log() - objective) < 4 * beta * standard_error(weight)
    assert abs(gaps["flow_sde"]) < 4
    assert gaps["dance_sde"] > 30


@BOTH
def test_fewer_steps_reach_less(policies: str) -> None:
    policy = base("points-flow", "flow_sde", 4, last_step="sde")
    betas = (math.inf, 0.2)
    every, some = (solve(policy, betas, policies=policies, steps=s, spacing=0.08)["ring"] for s in (None, [0, 1, 2]))
    assert every.rewards[0] == pytest.approx(some.rewards[0], abs=1e-9)
    objectives = [f.rewards[1] - 0.2 * f.kls[1] for f in (every, some)]
    assert objectives[0] > objectives[1] + 0.01 > some.rewards[0]


# --- Numerics ---


@pytest.mark.parametrize(
    ("case", "policies", "spacings", "tolerance"),
    [
        (CASES[0], "any", (0.05, 0.04), 3e-4),
        (CASES[1], "gaussian", (0.06, 0.05), 1e-3),
    ],
)
def test_refining_the_grid_changes_little(case, policies, spacings, tolerance) -> None:
    policy, betas = base(*case, 10), (math.inf, 0.2, 0.05)
    coarse, fine = (solve(policy, betas, policies=policies, spacing=s, extent=4 + 20 * s)["ring"] for s in spacings)
    assert coarse.rewards == pytest.approx(fine.rewards, abs=tolerance)
    assert coarse.kls == pytest.approx(fine.kls, abs=10 * tolerance)


@pytest.mark.parametrize("case", CASES)
def test_the_committed_frontiers_are_what_the_code_gives(case: tuple[str, str]) -> None:
    betas = (math.inf, 0.5, 0.08)
    for policies, tolerance in (("any", 2e-3), ("gaussian", 5e-3)):
        kept = load(*case, policies)
        assert kept["mean"].betas == BETAS
        assert kept["mean"].rewards == pytest.approx(np.mean([kept[p].rewards for p in Points.vocabulary], 0), abs=1e-5)
        found = solve(base(*case, 10), betas, policies=policies, spacing=0.08)["ring"]
        picked = [BETAS.index(b) for b in betas]
        assert [kept["ring"].rewards[i] for i in picked] == pytest.approx(found.rewards, abs=tolerance)
        assert [kept["ring"].kls[i] for i in picked] == pytest.approx(found.kls, abs=3 * tolerance)


def test_between_and_beyond_the_optima() -> None:
    policy = base("points", "ddim", 4)
    betas = (math.inf, 20.0, 1.5, 0.7, 0.4, 0.25, 0.15, 0.1, 0.04)
    frontier, between = solve(policy, spacing=0.06)["ring"], solve(policy, betas, spacing=0.06)["ring"]
    assert frontier.reward_at(between.kls) == pytest.approx(between.rewards, abs=1e-3)
    assert frontier.reward_at(frontier.kls) == pytest.approx(frontier.rewards, abs=1e-12)
    assert frontier.distance(0.2, frontier.kls[3]) == pytest.approx(frontier.rewards[3] - 0.2)
    short = Frontier(BETAS[:5], frontier.rewards[:5], frontier.kls[:5], frontier.highest)
    assert (short.reward_at(frontier.kls[5:]) >= frontier.rewards[5:]).all()
    assert short.reward_at(1e9) == frontier.highest


# --- The rest ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (1.0, 0.5)}, "must decrease from infinity"),
        ({"betas": (math.inf, 0.5, 0.7)}, "must decrease from infinity"),
        ({"betas": (math.inf, 0.001)}, "leaves float64 for β = 0.001"),
        ({"policies": "linear"}, "policies must be one of .*'gaussian'.*not 'linear'"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(base("points", "ddim", 2), spacing=0.2, **options)


def test_what_has_no_optimum_is_refused() -> None:
    with pytest.raises(ValueError, match="has no stochastic step"):
        solve(base("points", "ode", 2))
    policy = base("points", "ddim", 2)
    policy.mdp.model.latent_shape = (3,)
    with pytest.raises(ValueError, match=r"the grid is 2-D, the latents have shape \(3,\)"):
        solve(policy)


def test_the_command_writes_what_it_prints(tmp_path, capsys) -> None:
    path = tmp_path / "ddim.json"
    optimum.main(["--kernel", "ddim", "--num-steps", "2", "--spacing", "0.2", "--out", str(path)])
    kept = load("points", "ddim", "gaussian", path)
    assert list(kept) == ["mean", *Points.vocabulary]
    assert f"| 0.5 | {load('points', 'ddim', 'any', path)['mean'].rewards[3]:.4f} |" in capsys.readouterr().out
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert {r["num_steps"] for r in json.loads(path.read_text(), parse_constant=pytest.fail)} == {2}
    with pytest.raises(ValueError, match="no frontier of 'any' policies for points with cps"):
        load("points", "cps", path=path)
    with pytest.raises(SystemExit):
        optimum.main(["--model", "points", "--kernel", "cps"])
