"""GRPO's arithmetic against numbers computed by hand or by other means."""

import dataclasses
import math

import pytest
import torch
from tensordict import TensorDict

from agents.advantages import group_advantages
from agents.grpo import GRPO, GRPOConfig
from agents.policy import DenoisingPolicy
from agents.ppo import PPO, PPOConfig
from agents.rollout import collect
from agents.trajectory import Batch, kl_estimate
from denoise_env.kernels import Transition
from denoise_env.mdp import DenoisingMDP, Scores, row_generators
from denoise_env.seeding import row_seeds


def make(points, **changes):
    policy = DenoisingPolicy(points)
    return GRPO(policy, dataclasses.replace(GRPOConfig(group_size=4), **changes))


def test_the_published_advantages():
    """reference: r = (.25, .30, .28, .35) with the unbiased std."""
    advantages = group_advantages(torch.tensor([0.25, 0.30, 0.28, 0.35]), torch.ones(4, dtype=torch.bool), 4)
    expected = torch.tensor([-1.07061939, 0.11895771, -0.35687313, 1.30853481])
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-6)


def test_groups_are_apart_and_a_constant_group_is_exactly_zero():
    values = torch.tensor([1.0, 3.0, 0.1, 0.1, 0.1, 0.1, 5.0, 9.0])[[0, 1, 2, 3]]
    assert group_advantages(values, torch.ones(4, dtype=torch.bool), 2).tolist()[2:] == [0.0, 0.0]
    constant = torch.full((12,), 0.1) * 3
    assert group_advantages(constant, torch.ones(12, dtype=torch.bool), 12).abs().max() == 0


def test_rows_without_a_score_take_no_part():
    values = torch.tensor([0.25, torch.nan, 0.30, 0.28, 0.35, torch.nan, torch.nan, 1.0])
    advantages = group_advantages(values, values.isfinite(), 4)
    kept = torch.tensor([0.25, 0.30, 0.28], dtype=torch.float64)
    expected = (kept - kept.mean()) / kept.std()
    torch.testing.assert_close(advantages[[0, 2, 3]].double(), expected, rtol=0, atol=1e-5)
    assert advantages[1] == 0
    pair = group_advantages(values[4:], values[4:].isfinite(), 4)
    torch.testing.assert_close(pair, torch.tensor([-1, 0, 0, 1]) * 2**-0.5, rtol=0, atol=1e-6)


def test_rewards_are_normalised_one_by_one_and_then_weighted(points):
    points.rewards = {"a": points.rewards["points"], "b": points.rewards["points"]}
    points.reward_weights = {"a": 0.7, "b": 1.4}
    agent = make(points)
    a, b = torch.rand(8), 1000 * torch.rand(8)
    scores = Scores({"a": a, "b": b}, 0.7 * a + 1.4 * b, torch.ones(8, dtype=torch.bool), {})
    rollout = collect(points, agent.policy, row_generators(range(8)), group_size=4)
    advantages = agent.advantages(dataclasses.replace(rollout, scored=lambda: scores))["advantage"]
    valid = scores.valid
    expected = 0.7 * group_advantages(a, valid, 4) + 1.4 * group_advantages(b, valid, 4)
    torch.testing.assert_close(advantages, expected)
    tight = make(points, advantage_clip=0.5).advantages(dataclasses.replace(rollout, scored=lambda: scores))[
        "advantage"
    ]
    torch.testing.assert_close(tight, expected.clamp(-0.5, 0.5))


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "loss", "slope"),
    [
        (0.0, 2.0, -2.0, -2.0),
        (0.2, 2.0, -2.2, 0.0),  # better and already far: clipped, no gradient
        (0.2, -2.0, 2.0 * 1.2214027581601699, 2.0 * 1.2214027581601699),  # worse and grown: full gradient
        (-0.2, -2.0, 1.8, 0.0),
        (-0.2, 2.0, -2.0 * 0.8187307530779818, -2.0 * 0.8187307530779818),
    ],
)
def test_the_clipped_surrogate(points, log_ratio, advantage, loss, slope):
    agent = make(points, clip_range=0.1)
    log_prob = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    old, zero = torch.zeros(1, dtype=torch.float64), torch.zeros(1)
    batch = Batch(None, log_prob, old, torch.tensor([advantage]), zero.long(), zero, zero)
    value, figures = agent.loss(batch)
    value.sum().backward()
    assert value.item() == pytest.approx(loss)
    assert log_prob.grad.item() == pytest.approx(slope)
    assert figures["clip_fraction"].item() == float(abs(log_ratio) > 0.1)


@pytest.mark.parametrize("kl_coef", [0.0, 0.5])
def test_the_gradient_is_that_of_the_published_objective(kl_coef):
    """Finite differences of L = mean(−A ρ) + β KL, written out in float64, over every trained pair."""
    points = DenoisingMDP.make("points", num_steps=5)
    points.model.network.double()
    points.model.dtype = torch.float64
    policy = DenoisingPolicy(points)
    config = GRPOConfig(group_size=4, timestep_fraction=1.0, clip_range=10.0, kl_coef=kl_coef, max_grad_norm=1e9)
    agent = GRPO(policy, config)
    with torch.no_grad():  # away from the reference, so that its KL has a gradient
        torch.manual_seed(0)
        for p in agent.parameters:
            p.add_(0.1 * torch.randn_like(p))
    rollout = collect(points, policy, row_generators(range(8)), ["ring", "line"], group_size=4, shared_noise=True)
    advantages, steps = agent.advantages(rollout)["advantage"].double(), agent.select_steps(rollout.seeds)
    parameter, place = agent.parameters[-2], (1, 3)

    def objective():
        total = 0.0
        for i in range(8):
            for k in steps[i].tolist():
                x, action = rollout.steps["latents"][i, k][None], rollout.steps["action"][i, k][None]
                conditioning = rollout.conditioning(slice(i, i + 1))
                timestep = points.schedule.timesteps[k]
                gaussian = policy.kernel.transition(x, points.model.predict(x, timestep, conditioning), k)
                std = policy.kernel.stds[k]
                new = torch.distributions.Normal(gaussian.mean, std).log_prob(action).mean()
                total -= advantages[i] * (new - rollout.steps["action_log_prob"][i, k].double()).exp()
                if kl_coef:
                    with points.model.reference():
                        base = policy.kernel.transition(x, points.model.predict(x, timestep, conditioning), k)
                    total += kl_coef * ((gaussian.mean - base.mean) ** 2 / (2 * std**2)).mean()
        return float(total / steps.numel())

    with torch.no_grad():
        values = []
        for sign in (1, -1):
            parameter[place] += sign * 1e-5
            values.append(objective())
            parameter[place] -= sign * 1e-5
    gradient = {}
    parameter.register_hook(lambda g: gradient.update(value=gradient.get("value", 0) + g[place].item()))
    agent.update(rollout, 0)
    assert gradient["value"] == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4)
    assert abs(gradient["value"]) > 1e-4


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("shift", "kl", "error"), [(0.07, 0.01150, 4e-4), (0.48, 0.5406, 0.02)])
def test_kl_old_is_the_kl(reduction, shift, kl, error):
    """Its mean over 80,000 recorded steps is KL(old ‖ new); half the squared log-ratio's is KL + KL²/2, here 0.6870."""
    points = DenoisingMDP.make("points-flow", num_steps=5)
    policy = DenoisingPolicy(points, reduction=reduction)
    agent = GRPO(policy, GRPOConfig(group_size=2, lr=0.0, timestep_fraction=1.0))
    rows = 20_000
    rollout = collect(
        points, policy, row_generators(range(rows)), ["ring"] * (rows // 2), group_size=2, keep_means=True
    )
    with torch.no_grad():
        agent.parameters[-1].add_(shift)
        exact = []
        for k in agent.trainable_steps.tolist():
            conditioning = rollout.conditioning(slice(None))
            new = policy.transition(rollout.steps["latents"][:, k], k, conditioning)
            exact.append(Transition(rollout.steps["mean"][:, k], new.std).kl(new, "sum").double())
    assert torch.stack(exact).mean().item() == pytest.approx(kl, abs=1e-4)
    assert agent.update(rollout, 1)["kl_old"] == pytest.approx(kl, abs=error)


def test_kl_old_stays_finite():
    values = kl_estimate(torch.tensor([0.0, 1e-9, -1e-9, 5.0, -1e6, 1e6], dtype=torch.float64))
    assert values.isfinite().all()
    assert (values >= 0).all()
    assert values[:4].tolist() == pytest.approx([0, 5e-19, 5e-19, math.exp(5) - 6], rel=1e-3)


def test_steps_are_drawn_per_sample_or_per_group(points):
    agent = make(points, timestep_fraction=0.6, drop_last=True)
    seeds = row_seeds(0, "rollout", 1, 64)
    steps = agent.select_steps(seeds)
    # ten steps; the last is deterministic on Points: nine trainable, less none dropped twice
    assert agent.trainable_steps.tolist() == list(range(9))
    assert steps.shape == (64, 6)
    assert all(len(set(row)) == 6 for row in steps.tolist())
    counts = torch.bincount(steps.flatten(), minlength=9)
    assert counts.min() > 25
    assert torch.equal(steps[8:24], agent.select_steps(seeds[8:24]))  # whatever the batch
    assert not torch.equal(steps, agent.select_steps(row_seeds(0, "rollout", 2, 64)))
    grouped = make(points, timestep_selection="per_group").select_steps(seeds).view(16, 4, -1)
    assert (grouped == grouped[:, :1]).all()
    assert not (grouped[0] == grouped[1]).all()


def test_shared_noise_starts_a_group_at_one_point(points):
    policy = DenoisingPolicy(points)
    shared = collect(points, policy, row_generators(range(8)), group_size=4, shared_noise=True)
    starts = shared.steps["latents"][:, 0].view(2, 4, 2)
    assert (starts == starts[:, :1]).all()
    assert not torch.equal(starts[0], starts[1])
    assert not torch.equal(shared.final_latents[0], shared.final_latents[1])


def test_two_updates_see_their_own_halves(points):
    agent = make(points, updates_per_rollout=2, lr=1e-2)
    rollout = collect(points, agent.policy, row_generators(range(8)), group_size=4)
    figures = agent.update(rollout, 0)
    assert figures["ratio_deviation"] > 0  # the second half was rolled out by the policy before the first update
    with pytest.raises(ValueError, match="updates_per_rollout=2"):
        agent.check_rows(12)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(points):
    agent = make(points, max_skipped_updates=0)
    rollout = collect(points, agent.policy, row_generators(range(4)), group_size=4)
    rollout.steps["action_log_prob"][:] = -torch.inf
    before = [p.detach().clone() for p in agent.parameters]
    with pytest.raises(FloatingPointError, match="gradient is not finite, 1 optimizer steps in a row"):
        agent.update(rollout, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, agent.parameters, strict=True))
    assert all(p.grad is None for p in agent.parameters)


def test_so_many_steps_in_a_row_are_skipped_and_no_more(points):
    agent = make(points, max_skipped_updates=2, ema_decay=0.5, lr=1e-2)
    good, bad = (collect(points, agent.policy, row_generators(range(4)), group_size=4) for _ in range(2))
    bad.steps["action_log_prob"][:] = -torch.inf
    before = {name: tensor.clone() for name, tensor in agent.state().items()}
    for skipped in (bad, bad):
        figures = agent.update(skipped, 0)
        assert figures["skipped_updates"] == 1
    after = agent.state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)  # neither weights nor average nor optimizer
    assert agent.update(good, 0)["skipped_updates"] == 0
    for skipped in (bad, bad):
        agent.update(skipped, 0)
    with pytest.raises(FloatingPointError, match="3 optimizer steps in a row"):
        agent.update(bad, 0)


def test_a_skipped_step_is_not_in_the_figures(points):
    agent = make(points, updates_per_rollout=2, lr=1e-2)
    rollout = collect(points, agent.policy, row_generators(range(8)), group_size=4)
    rollout.steps["action_log_prob"][:4] = -torch.inf
    before = [p.detach().clone() for p in agent.parameters]
    figures = agent.update(rollout, 0)
    assert figures["skipped_updates"] == 1
    assert all(math.isfinite(value) for value in figures.values())
    assert not all(torch.equal(a, b) for a, b in zip(before, agent.parameters, strict=True))


def test_a_critics_gradient_that_is_not_finite_skips_the_step_too(points):
    agent = PPO(DenoisingPolicy(points), PPOConfig(group_size=4))
    rollout = collect(points, agent.policy, row_generators(range(4)), group_size=4)
    targets = agent.targets
    agent.targets = lambda rollout: {**targets(rollout), "returns": torch.full((4, 1, 10), torch.inf)}
    assert agent.update(rollout, 0)["skipped_updates"] == 1
    assert all(p.isfinite().all() for p in agent.critic.parameters())


def test_averaged_weights_follow_and_are_swapped_in(points):
    agent = make(points, ema_decay=0.5, lr=1e-2)
    parameter = agent.parameters[-1]
    average = parameter.detach().clone()
    for iteration in range(3):
        agent.update(collect(points, agent.policy, row_generators(range(8)), group_size=4), iteration)
        average = 0.5 * average + 0.5 * parameter.detach()
    trained = parameter.detach().clone()
    with agent.evaluation_weights():
        torch.testing.assert_close(parameter.detach(), average)
    assert torch.equal(parameter, trained)
    assert not torch.equal(trained, average)


@pytest.mark.parametrize(("warmup", "every"), [(True, 1), (False, 3), (True, 3)])
def test_an_average_warms_up_and_follows_every_so_many_steps(points, warmup, every):
    options = {"ema_decay": 0.3, "ema_warmup": warmup, "ema_every": every, "lr": 1e-2, "updates_per_rollout": 2}
    agent, tensors, weights = make(points, **options), {}, []
    parameter = agent.parameters[-1]
    average = parameter.detach().clone()
    for iterations in ((0, 1), (2, 3)):  # stopped and resumed in between
        agent = make(points, **options)
        agent.load_state(tensors or agent.state())
        agent.optimizer.register_step_post_hook(lambda *_: weights.append(parameter.detach().clone()))
        for iteration in iterations:
            agent.update(collect(points, agent.policy, row_generators(range(8)), group_size=4), iteration)
        tensors = agent.state()
    for n, now in enumerate(weights, 1):
        if n % every == 0:
            decay = min((1 + n) / (10 + n), 0.3) if warmup else 0.3
            average = decay * average + (1 - decay) * now
    assert len(weights) == 8
    torch.testing.assert_close(list(agent.average.values())[-1], average)


def test_all_of_a_rollout_may_start_at_one_point(points):
    """Whatever the rows; anew in each iteration; and other noise than this stays as it was."""
    agent = make(points, shared_noise="rollout")
    rolled = [
        collect(points, agent.policy, row_generators(range(rows)), ["ring"] * (rows // 4), **agent.rollout_options(i))
        for rows, i in ((8, 1), (4, 1), (8, 2))
    ]
    starts = [rollout.steps["latents"][:, 0] for rollout in rolled]
    assert all((start == start[:1]).all() for start in starts)
    assert torch.equal(starts[0][0], starts[1][0])
    assert not torch.equal(starts[0][0], starts[2][0])
    assert len(rolled[0].final_latents.unique(dim=0)) == 8
    torch.testing.assert_close(rolled[0].final_latents[:4], rolled[1].final_latents)


def test_a_word_that_is_no_choice_is_refused(points):
    for changes in ({"shared_noise": True}, {"std_form": "biased"}, {"timestep_rounding": "floor"}):
        name, value = next(iter(changes.items()))
        with pytest.raises(ValueError, match=f"{name} must be one of .*, not {value!r}"):
            make(points, **changes)


@pytest.mark.parametrize(("rounding", "share", "count"), [("ceil", 0.6, 6), ("int", 0.6, 5), ("int", 0.01, 1)])
def test_the_number_of_trained_steps_is_rounded_by_name(points, rounding, share, count):
    agent = make(points, timestep_fraction=share, timestep_rounding=rounding)
    assert agent.select_steps(range(5)).shape == (5, count)  # of the nine that can be trained


def test_steps_weigh_as_their_std(points):
    uniform, weighted = make(points), make(points, step_weighting="std")
    assert uniform.step_weights.tolist() == [1.0] * 10
    stds = uniform.policy.kernel.stds[:9]
    torch.testing.assert_close(weighted.step_weights[:9].double(), stds / stds.mean(), rtol=1e-6, atol=0)
    rollout = collect(points, uniform.policy, row_generators(range(8)), group_size=4)
    conditioning = rollout.conditioning(slice(None))
    for k in (0, 8):
        pairs = {"episode": torch.arange(8), "step": torch.full((8,), k), "advantage": torch.ones(8)}
        examples = TensorDict(pairs, batch_size=8)
        plain, _ = uniform.example_loss(rollout, examples, conditioning)
        scaled, _ = weighted.example_loss(rollout, examples, conditioning)
        torch.testing.assert_close(scaled, plain * (stds[k] / stds.mean()).float())


def test_the_batchs_std_is_that_of_all_gaps():
    values = torch.tensor([0.0, 2.0, 0.5, 0.5, 5.0, 5.2])
    valid = torch.ones(6, dtype=torch.bool)
    gaps = torch.tensor([-1, 1, 0, 0, -0.1, 0.1], dtype=torch.float64)
    expected = gaps / (gaps.square().sum() / 3).sqrt()
    torch.testing.assert_close(group_advantages(values, valid, 2, "batch").double(), expected, rtol=1e-5, atol=1e-7)
