"""Advantages and targets against numbers computed by hand."""

import dataclasses
import math
from collections import deque

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from agents.advantages import PromptTracker, add_losses, aggregate, group_advantages, leave_one_out, whiten
from agents.algorithms import AGENTS
from agents.policy import DenoisingPolicy
from agents.rollout import begin, collect, solve
from agents.surrogate import clipped
from denoise_env.mdp import DenoisingMDP, Scores, row_generators


def scored(agent, total, prompts=("ring", "line"), **more):
    """A rollout with made-up rewards; NaN is a row that could not be scored."""
    mdp, total = agent.policy.mdp, torch.tensor(total)
    group = len(total) // len(prompts)
    rollout = collect(mdp, agent.policy, row_generators(range(len(total))), prompts, group_size=group)
    scores = Scores({"points": total}, total, total.isfinite(), {})
    return dataclasses.replace(rollout, scored=lambda: scores, **more)


def make(points, name, **config):
    return AGENTS[name](DenoisingPolicy(points), AGENTS[name].config_type(**{"group_size": 4, **config}))


# --- DDPO's tracker ---


class Published:
    """DDPO's tracker: a deque per prompt, in numpy."""

    def __init__(self, size, minimum):
        self.size, self.minimum, self.stats = size, minimum, {}

    def update(self, prompts, rewards):
        found = np.empty_like(rewards)
        for prompt in np.unique(prompts):
            own = rewards[prompts == prompt]
            self.stats.setdefault(prompt, deque(maxlen=self.size)).extend(own)
            known = self.stats[prompt] if len(self.stats[prompt]) >= self.minimum else rewards
            found[prompts == prompt] = (own - np.mean(known)) / (np.std(known) + 1e-6)
        return found


def learn(tracker, *batch):
    found = tracker.normalise(*batch)
    assert torch.equal(found, tracker.normalise(*batch))
    tracker.remember(*batch)
    return found


@pytest.mark.parametrize(("size", "minimum", "batch"), [(16, 16, 10), (16, 16, 64), (5, 3, 7), (1, 1, 3), (4, 4, 40)])
def test_the_tracker_is_ddpos(size, minimum, batch):
    """Over many batches, so that the buffers fill, wrap around and overflow in one batch."""
    tracker, published = PromptTracker(3, size, minimum), Published(size, minimum)
    rng = np.random.default_rng(0)
    for _ in range(12):
        prompts, rewards = rng.integers(0, 3, batch), rng.normal(size=batch).astype(np.float32)
        expected = published.update(prompts, rewards.astype(np.float64))
        valid = torch.ones(batch, dtype=torch.bool)
        found = learn(tracker, torch.tensor(rewards), valid, torch.tensor(prompts))
        torch.testing.assert_close(found.double(), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    for prompt, known in published.stats.items():
        count = int(tracker.count[prompt])
        assert tracker.values[prompt, :count].tolist() == pytest.approx(list(known))


def test_the_tracker_by_hand():
    tracker = PromptTracker(2, size=3, min_count=2)
    valid = torch.tensor([True, True, False])
    first = learn(tracker, torch.tensor([1.0, 2.0, torch.nan]), valid, torch.tensor([0, 1, 1]))
    # one reward each: the batch's mean 1.5 and std 0.5
    assert first.tolist() == pytest.approx([-1, 1, 0], abs=1e-5)
    second = learn(tracker, torch.tensor([3.0, 5.0]), torch.ones(2, dtype=torch.bool), torch.tensor([0, 0]))
    std = math.sqrt((4 + 0 + 4) / 3)  # of 1, 3, 5
    assert second.tolist() == pytest.approx([0, 2 / std], abs=1e-5)
    third = learn(tracker, torch.tensor([7.0]), torch.ones(1, dtype=torch.bool), torch.tensor([0]))
    assert third.tolist() == pytest.approx([2 / std], abs=1e-5)  # of 3, 5, 7: the 1 is forgotten
    assert tracker.values[0].tolist() == [3, 5, 7]
    assert tracker.count.tolist() == [3, 1]


def test_equal_rewards_have_no_advantage_in_the_tracker():
    tracker = PromptTracker(1, 4, 2)
    assert (
        tracker.normalise(torch.full((4,), 0.1), torch.ones(4, dtype=torch.bool), torch.zeros(4).long()).abs().max()
        < 1e-6
    )


@pytest.mark.parametrize("name", ["ddpo-is", "ddpo-sf"])
def test_the_tracker_remembers_once_per_update_and_asking_changes_nothing(points, name):
    agent = make(points, name, tracker_size=8, tracker_min_count=5)
    rollout = scored(agent, [0.3, 0.9, 0.1, 0.5, 2.0, torch.nan, -1.0, 0.0])
    before = {key: value.clone() for key, value in agent.modules.state_dict().items()}
    first = agent.advantages(rollout)["advantage"]
    assert torch.equal(first, agent.advantages(rollout)["advantage"])
    agent.examples(rollout, 1)
    assert all(torch.equal(before[key], value) for key, value in agent.modules.state_dict().items())
    agent.update(rollout, 1)
    tracker = agent.tracker("points")
    ring, line = ([p.text for p in points.prompts].index(prompt) for prompt in ("ring", "line"))
    assert tracker.values[ring, :4].tolist() == pytest.approx([0.3, 0.9, 0.1, 0.5])
    assert tracker.values[line, :3].tolist() == [2.0, -1.0, 0.0]
    assert tracker.count.sum() == 7
    assert not torch.equal(first, agent.advantages(rollout)["advantage"])  # now ring has 8, and line 6


def test_an_update_that_fails_is_not_remembered(points):
    agent = make(points, "ddpo-is", max_skipped_updates=0)
    rollout = scored(agent, [0.3, 0.9, 0.1, 0.5, 2.0, 1.0, -1.0, 0.0])
    rollout.steps["action_log_prob"][:] = -torch.inf
    with pytest.raises(FloatingPointError):
        agent.update(rollout, 1)
    assert agent.tracker("points").count.sum() == 0


def test_a_prompt_named_later_is_normalised_by_the_batch(points):
    """The trackers have room for the training prompts."""
    agent = make(points, "ddpo-is", tracker_size=4, tracker_min_count=2)
    rewards = torch.tensor([1.0, 3.0, 4.0, 8.0])
    prompts = torch.tensor([0, 0, len(points.prompts), len(points.prompts)])
    valid, tracker = torch.ones(4, dtype=torch.bool), agent.tracker("points")
    found = learn(tracker, rewards, valid, prompts)
    std = math.sqrt((9 + 1 + 0 + 16) / 4)
    assert found.tolist() == pytest.approx([-1, 1, 0, 4 / std], abs=1e-5)
    assert tracker.count.tolist() == [2, 0, 0, 0, 0, 0]


# --- Others ---


def test_leave_one_out():
    values = torch.tensor([1.0, 2.0, 6.0, torch.nan, 5.0, torch.nan, torch.nan, torch.nan])
    found = leave_one_out(values, values.isfinite(), 4)
    assert found.tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5, 0, 0, 0, 0, 0])
    values = torch.rand(12)
    scaled = (values.view(3, 4) - values.view(3, 4).mean(1, keepdim=True)) * 4 / 3  # G/(G − 1) times the gap
    torch.testing.assert_close(leave_one_out(values, values.isfinite(), 4), scaled.flatten())


def test_whiten():
    values = torch.tensor([[1.0, 2.0], [torch.nan, 6.0]])
    valid = values.isfinite()
    std = math.sqrt((4 + 1 + 9) / 2)
    assert whiten(values, valid).flatten().tolist() == pytest.approx([-2 / std, -1 / std, 0, 3 / std])
    assert whiten(torch.full((5,), 0.1), torch.ones(5, dtype=torch.bool)).abs().max() == 0
    assert whiten(values, torch.zeros(2, 2, dtype=torch.bool)).abs().max() == 0


def test_the_batchs_std_leaves_unscored_rows_out():
    values = torch.tensor([0.0, 2.0, torch.nan, 1.0, torch.nan, torch.nan, 3.0, 5.0, 10.0])
    found = group_advantages(values, values.isfinite(), 3, "batch", epsilon=1e-4)
    std = math.sqrt((1 + 1 + 0 + (9 + 1 + 16)) / (1 + 0 + 2))
    assert found.tolist() == pytest.approx([g / (std + 1e-4) for g in (-1, 1, 0, 0, 0, 0, -3, -1, 4)], abs=1e-6)


# --- PPO ---


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.0), (0.9, 0.7), (0.0, 0.5)])
def test_gae_is_the_double_sum(points, gamma, lam):
    agent = make(points, "ppo", gamma=gamma, gae_lambda=lam)
    rollout = scored(agent, [0.3, 0.9, 0.1, 0.5, 2.0, torch.nan, -1.0, 0.0])
    rows, steps = rollout.steps.batch_size
    torch.manual_seed(0)
    values = torch.rand(rows, steps)
    rewards = torch.zeros(rows, steps)
    rewards[:, -1] = rollout.scores.total
    agent.critic.values = lambda latents, pooled: values
    advantages, returns = agent.gae(rollout)
    valid = rollout.scores.valid
    after = torch.cat([values[:, 1:], torch.zeros(rows, 1)], 1)
    for k in range(steps):
        expected = sum(
            (gamma * lam) ** (j - k) * (rewards[:, j] + gamma * after[:, j] - values[:, j]) for j in range(k, steps)
        )
        torch.testing.assert_close(advantages[valid, k], expected[valid], rtol=1e-4, atol=1e-5)
    if gamma == lam == 1:
        torch.testing.assert_close(advantages[valid], (rollout.scores.total[:, None] - values)[valid])
    torch.testing.assert_close(returns[valid], (advantages + values)[valid])
    assert (advantages[~valid] == 0).all()
    assert torch.equal(returns[~valid], values[~valid])  # no error to learn from


@pytest.mark.parametrize(("name", "model"), [("ppo", "points"), ("ppo", "points-flow"), ("dpok", "points-flow")])
def test_the_critic_learns_the_last_state_as_well_as_its_neighbours(name, model):
    """The policy is not trained there, but the advantages of earlier steps rely on its value.

    The later the state, the more it tells of the reward: the last one's error is the smallest.
    """
    kind, mdp = AGENTS[name], DenoisingMDP.make(model, num_steps=6)
    options = {"group_size": 4, "lr": 0.0, "critic_lr": 0.01, "critic_width": 64, "timestep_fraction": 0.2}
    agent = kind(DenoisingPolicy(mdp), kind.config_type(**options, gae_lambda=1.0, max_grad_norm=1.0))
    rollout = collect(mdp, agent.policy, row_generators(range(256)), ["ring"] * 32 + ["line"] * 32, group_size=4)
    for iteration in range(40):
        agent.update(rollout, iteration)
    error = (agent.critic.values(rollout.steps["latents"], rollout.pooled()) - rollout.scores.total[:, None]).square()
    assert (error[:, -1] - error[:, -2]).mean() < 3 * (error[:, -1] - error[:, -2]).std() / 256**0.5
    assert error[:, -1].mean() < 0.5 * rollout.scores.total.var()  # it has learned


def test_ppos_critic_reads_the_state_at_its_own_step(points):
    agent = make(points, "ppo")
    torch.nn.init.normal_(agent.critic.output.weight)
    rollout = scored(agent, [0.0] * 8)
    table = agent.critic.values(rollout.steps["latents"], rollout.pooled())
    pooled = torch.nn.functional.one_hot(rollout.prompt_index, 6).float()
    for k in (0, 4, 9):
        one = agent.critic(rollout.steps["latents"][:, k], torch.full((8,), k), pooled)
        torch.testing.assert_close(table[:, k], one.detach())
    assert len({round(v, 6) for v in table.flatten().tolist()}) == table.numel()


def test_ppos_kl_reward_pulls_towards_the_base_model():
    """E[∇ surrogate] of the KL reward alone is ∇KL, at a single step too, where the KL itself would give 0."""
    from denoise_env.mdp import DenoisingMDP

    mdp = DenoisingMDP.make("points-flow", num_steps=2)  # one stochastic step
    policy = DenoisingPolicy(mdp, "flow_sde", reduction="sum")
    kind = AGENTS["ppo"].config_type
    config = kind(kl_reward=0.5, timestep_fraction=1.0, max_grad_norm=1e9, gae_lambda=1.0, advantage_clip=1e9)
    agent = AGENTS["ppo"](policy, config)
    with torch.no_grad():
        agent.parameters[-1].add_(torch.tensor([0.4, -0.3]))
    rows = 4000
    rollout = collect(mdp, policy, row_generators(range(rows)), ["ring"] * rows, **agent.rollout_options(1))
    total = torch.zeros(rows)
    rollout = dataclasses.replace(rollout, scored=lambda: Scores({"points": total}, total, total == 0, {}))
    raw, _ = agent.gae(rollout)
    kl = (
        0.5
        * policy.kernel.transition(rollout.steps["latents"][:, 0], torch.tensor([[0.4, -0.3]]).expand(rows, 2), 0)
        .kl(policy.kernel.transition(rollout.steps["latents"][:, 0], torch.zeros(rows, 2), 0), "sum")
        .mean()
    )
    assert raw[:, 0].mean().item() == pytest.approx(-kl.item(), rel=0.1)
    gradient = []
    agent.parameters[-1].register_hook(lambda g: gradient.append(g.clone()))
    agent.update(rollout, 1)
    scale = float(raw.std())
    # KL = |c Δ|²/(2k²) with Δ the bias, so that ∇KL = 2 KL Δ/|Δ|²
    shift = torch.tensor([0.4, -0.3])
    expected = 2 * kl * shift / shift.square().sum() / scale
    torch.testing.assert_close(sum(gradient), expected, rtol=0.15, atol=0.0)


# --- Final samples ---


def test_rwrs_weights_average_to_one(points):
    agent = make(points, "rwr", temperature=0.5)
    rollout = scored(agent, [0.3, 0.9, 0.1, 0.5, 0.0, torch.nan, 1.0, 0.7])
    weight = agent.targets(rollout)["weight"]
    kept = [0.3, 0.9, 0.1, 0.5, 0.0, 1.0, 0.7]
    raw = [math.exp(r / 0.5) for r in kept]
    assert weight[rollout.scores.valid].tolist() == pytest.approx([7 * x / sum(raw) for x in raw], rel=1e-5)
    assert weight[rollout.scores.valid].mean().item() == pytest.approx(1, rel=1e-5)
    assert weight[5] == 0
    plain = make(points, "rwr", temperature=0.5, normalise=False).targets(rollout)["weight"]
    assert plain[[0, 5]].tolist() == pytest.approx([math.exp(0.6), 0])
    huge = dataclasses.replace(
        rollout, scored=lambda: Scores({}, torch.tensor([900.0, 901.0] * 4), torch.ones(8) > 0, {})
    )
    assert agent.targets(huge)["weight"].isfinite().all()
    none = scored(agent, [torch.nan] * 8)
    assert agent.targets(none)["weight"].tolist() == [0] * 8


@pytest.mark.parametrize("clip", [0.5, 5.0])
def test_nfts_q_lies_between_0_and_1(points, clip):
    agent = make(points, "nft", advantage_clip=clip, advantage_std="group", std_form="unbiased", std_epsilon=1e-8)
    rollout = scored(agent, [0.25, 0.30, 0.28, 0.35, 1.0, torch.nan, 1.0, 1.0])
    q = agent.targets(rollout)["q"]
    published = [-1.07061939, 0.11895771, -0.35687313, 1.30853481]
    expected = [min(max(a, -clip), clip) / (2 * clip) + 0.5 for a in published]
    assert q.tolist() == pytest.approx([*expected, 0.5, 0.5, 0.5, 0.5], abs=1e-6)


def test_nfts_sampling_weights_follow_and_roll_out(points):
    agent = make(points, "nft", old_decay_slope=0.3, old_decay=0.5, lr=1e-2)
    old = [p.detach().clone() for p in agent.parameters]
    for iteration, decay in ((1, 0.3), (2, 0.5), (3, 0.5)):
        figures = agent.update(scored(agent, [0.25, 0.30, 0.28, 0.35, 1.0, 0.2, 0.7, 0.5]), iteration)
        assert figures["old_decay"] == pytest.approx(decay)
        old = [decay * a + (1 - decay) * p.detach() for a, p in zip(old, agent.parameters, strict=True)]
        torch.testing.assert_close(list(agent.old.values()), old)
    trained = [p.detach().clone() for p in agent.parameters]
    with agent.rollout_weights():
        torch.testing.assert_close([p.detach() for p in agent.parameters], old)
    assert all(torch.equal(p, q) for p, q in zip(agent.parameters, trained, strict=True))
    assert not torch.equal(trained[-1], old[-1])


def test_draws_visit_every_noise_level_before_any_twice(points):
    for count in (1, 6, 10, 13, 20):
        agent = make(points, "rwr", draws_per_sample=count, epochs=1)
        draws = agent.draws(range(64), 1)
        assert draws["step"].shape == (64, count)
        assert draws["noise"].shape == (64, count, 2)
        for row in draws["step"].tolist():
            times = [row.count(k) for k in range(10)]
            assert max(times) - min(times) <= 1
        for name, drawn in draws.items():
            assert torch.equal(drawn[8:24], agent.draws(range(8, 24), 1)[name])  # whatever the batch
        assert len(draws["noise"].flatten(1).unique(dim=0)) == 64
        moments = draws["noise"].mean().item(), draws["noise"].std().item()
        assert moments == pytest.approx((0, 1), abs=5 / (128 * count) ** 0.5)


@pytest.mark.parametrize(("shares", "levels"), [((0.0, 1.0), (0, 10)), ((0.0, 0.5), (0, 5)), ((0.25, 0.45), (2, 5))])
@pytest.mark.parametrize("how", ["even", "stratified", "logit_normal"])
@pytest.mark.parametrize("shared", [False, True])
def test_steps_are_drawn_as_named(points, how, shares, levels, shared):
    first, end = levels
    options = {"step_draws": how, "step_range": shares, "shared_steps": shared, "draws_per_sample": 4, "epochs": 1}
    agent = make(points, "rwr", **options)
    drawn = torch.cat([agent.draws(range(20 * i, 20 * i + 20), i)["step"] for i in range(500)])
    assert (drawn.view(500, 20, 4) == drawn[::20, None]).all() == shared
    assert not (drawn == drawn[:1]).all()
    assert drawn.unique().tolist() == list(range(first, end))
    if how == "stratified":  # one from each quarter
        quarter = (end - first) / 4
        for j, column in enumerate(drawn.unbind(1)):
            assert column.min() == first + math.floor(j * quarter)
            assert column.max() == first + math.ceil((j + 1) * quarter) - 1
    if not shared:  # the middle one of them
        count, share = end - first, (drawn == first + (end - first) // 2).double().mean()
        edges = torch.logit(torch.tensor([count // 2, count // 2 + 1]) / count)
        normal = torch.distributions.Normal(0, 1).cdf(edges).diff() if how == "logit_normal" else 1 / count
        assert float(share) == pytest.approx(float(normal), abs=0.01)


def test_every_epoch_has_draws_of_its_own(points):
    """Ten levels, in three epochs of four draws: none comes twice before all have come once."""
    agent = make(points, "rwr", draws_per_sample=4, epochs=3, reference_coef=0.0)
    rollout, seen, loss = scored(agent, [0.3, 0.9, 0.1, 0.5]), [], agent.example_loss

    def recording(rollout, examples, conditioning):
        seen.append(examples)
        return loss(rollout, examples, conditioning)

    agent.example_loss = recording
    agent.update(rollout, 1)
    steps, noise = (torch.stack([examples[name] for examples in seen], 1) for name in ("step", "noise"))
    assert steps.shape == (4, 12)
    assert all(sorted(row[:10]) == list(range(10)) for row in steps.tolist())
    assert len(noise.flatten(0, 1).unique(dim=0)) == 48


def test_a_solver_rolls_out(points):
    """One call a step, and what the solver reaches by itself."""
    agent = make(points, "nft", rollout_solver="dpm_solver")
    rollout = collect(points, agent.policy, row_generators(range(8)), ["ring", "line"], **agent.rollout_options(1))
    assert agent.policy.network_calls == 8 * 10
    assert rollout.steps.batch_size == (8, 0)
    latents, index = begin(points, row_generators(range(8)), ["ring", "line"], group_size=4)
    alone = solve(points, agent.policy, latents[:, 0], index, 3, range(10))
    torch.testing.assert_close(alone, rollout.final_latents, rtol=0, atol=1e-5)
    assert agent.update(rollout, 1)["loss"] > 0


def test_the_reference_has_a_guidance_of_its_own(make_shapes):
    """CRD's reference is guided where the policy is not: twice the rows, and only there."""
    mdp = make_shapes(num_steps=3, guidance_scale=1.0)
    agent = make(mdp, "crd", draws_per_sample=1, reference_guidance=4.5, reference_coef=0.1)
    rollout = collect(mdp, agent.policy, row_generators(range(4)), mdp.prompts[:1], group_size=4)
    examples, before = agent.examples(rollout, 1), agent.policy.network_calls
    conditioning = agent.conditioning(rollout, examples)
    found = agent.complete(rollout, examples, conditioning)["reference"][:, 0]
    assert agent.policy.network_calls - before == 2 * 4
    noisy, _ = agent.noised(*agent.sample(rollout, examples[:, 0]))
    with torch.no_grad():
        timestep = mdp.schedule.timesteps[examples["step"][:, 0]]
        expected = mdp.model.predict(noisy, timestep, conditioning, torch.full((4,), 4.5))
        plain = mdp.model.predict(noisy, timestep, conditioning)
    torch.testing.assert_close(found, expected)
    assert (plain - expected).abs().mean() > 1e-2


def test_dgpos_groups_share_a_noise(points):
    agent = make(points, "dgpo", draws_per_sample=3)
    noise = agent.draws(range(8), 1)["noise"].view(2, 4, 3, 2)
    assert (noise == noise[:, :1, :1]).all()
    assert not torch.equal(noise[0], noise[1])
    apart = make(points, "dgpo", draws_per_sample=3, shared_draws=False).draws(range(8), 1)["noise"]
    assert len(apart.flatten(0, 1).unique(dim=0)) == 24


@pytest.mark.parametrize(
    ("name", "n", "old", "sampler"),
    [
        ("awm", 1, 0.001, None),
        ("awm", 400, 0.3, None),
        ("dgpo", 2, 0.002, None),
        ("nft", 600, 0.5, None),
        ("crd", 1, 0.255, 0.0),
        ("crd", 75, 0.625, 0.0),
        ("crd", 79, 0.645, 0.03),
        ("crd", 300, 0.999, 0.999),
    ],
)
def test_old_weights_follow_as_published(points, name, n, old, sampler):
    agent = make(points, name, lr=1e-2)
    kept = {key: [t.clone() for t in agent.kept[key].values()] for key in ("old", "sampler") if key in agent.kept}
    assert set(kept) == {"old"} if sampler is None else {"old", "sampler"}
    figures = agent.update(scored(agent, [0.25, 0.30, 0.28, 0.35, 1.0, 0.2, 0.7, 0.5]), n)
    for key, decay in {"old": old, "sampler": sampler}.items():
        if key in kept:
            assert figures[f"{key}_decay"] == pytest.approx(decay)
            now = [decay * a + (1 - decay) * p.detach() for a, p in zip(kept[key], agent.parameters, strict=True)]
            torch.testing.assert_close(list(agent.kept[key].values()), now)
    assert not torch.equal(agent.parameters[-1], kept["old"][-1])


def test_dgpos_old_weights_roll_out_after_so_many_steps(points):
    agent = make(points, "dgpo", lr=1e-2, old_rolls_out_after=4, updates_per_rollout=2, old_decay_slope=0.3)
    for iteration in (1, 2, 3):
        old, now = (torch.cat([t.detach().flatten() for t in ts]) for ts in (agent.old.values(), agent.parameters))
        with agent.rollout_weights():
            rolling = torch.cat([p.detach().flatten() for p in agent.parameters])
        assert torch.equal(rolling, old if iteration == 3 else now)
        assert torch.equal(old, now) == (iteration == 1)
        agent.update(scored(agent, [0.25, 0.30, 0.28, 0.35, 1.0, 0.2, 0.7, 0.5]), iteration)


# --- Two rewards ---


def two(values_a, values_b):
    a, b = torch.tensor(values_a), torch.tensor(values_b)
    return Scores({"a": a, "b": b}, 0.7 * a + 1.4 * b, a.isfinite() & b.isfinite(), {})


WEIGHTS = {"a": 0.7, "b": 1.4}


def doubled(name, values):
    return 2 * values


def test_what_rewards_are_added_up_as():
    scores = two([1.0, -3.0], [2.0, 1.0])
    assert aggregate("rewards", scores, WEIGHTS, doubled, 1.0)["advantage"].tolist() == pytest.approx([1.0, -1.0])
    total = [2 * (0.7 + 2.8), 2 * (-2.1 + 1.4)]
    for how in ("advantages", "rewards"):
        found = aggregate(how, scores, WEIGHTS, doubled)
        assert list(found) == ["advantage"]
        assert found["advantage"].tolist() == pytest.approx(total)
    apart = aggregate("losses", scores, WEIGHTS, doubled, 3.0)
    assert apart.pop("advantage").tolist() == pytest.approx([3.0, -1.4])
    assert [values.tolist() for values in apart.values()] == [pytest.approx([1.4, -2.1]), pytest.approx([4.2, 2.8])]


@pytest.mark.parametrize("how", ["advantages", "losses"])
def test_a_reward_of_weight_0_takes_no_part(how):
    scores = two([1.0, -3.0], [torch.nan, 1.0])
    named = []

    def own(name, values):
        named.append(name)
        return values

    found = aggregate(how, scores, {"a": 0.5, "b": 0.0}, own)
    assert named == ["a"]
    assert all(values.tolist() == [0.5, -1.5] for values in found.values())


@pytest.mark.parametrize("log_ratio", [0.0, 0.5, -0.5])
@pytest.mark.parametrize(("a", "b"), [(1.0, 2.0), (-1.0, -2.0), (2.0, -1.0), (-2.0, 1.0), (1.0, -1.0)])
def test_losses_and_advantages_differ_where_signs_differ_and_the_clip_binds(a, b, log_ratio):
    scores, ratio = two([a], [b]), torch.tensor([log_ratio]).exp()
    found = {}
    for how in ("advantages", "losses"):
        examples = TensorDict(aggregate(how, scores, WEIGHTS, lambda name, values: values), batch_size=1)
        loss, figures = add_losses(examples, lambda e: (clipped(e["advantage"], ratio, 0.1), {"seen": e["advantage"]}))
        found[how], total = loss.item(), 0.7 * a + 1.4 * b
        assert figures["seen"].item() == pytest.approx(total if how == "advantages" else total / 2)
    rho = math.exp(log_ratio)
    cut = min(max(rho, 0.9), 1.1)
    assert found["advantages"] == pytest.approx(max(-total * rho, -total * cut), rel=1e-5)
    parts = [max(-x * rho, -x * cut) for x in (0.7 * a, 1.4 * b)]
    assert found["losses"] == pytest.approx(sum(parts), rel=1e-5)
    differ = a * b < 0 and log_ratio != 0
    assert (abs(found["advantages"] - found["losses"]) > 1e-4) == differ


def test_whose_std_divides():
    """Groups (0, 2) and (10, 10): the gaps are ±1, 0, 0; all rewards have the variance 83/4 about 5.5."""
    rewards, valid = torch.tensor([0.0, 2.0, 10.0, 10.0]), torch.ones(4, dtype=torch.bool)
    sizes = {
        "unbiased": {"group": 0.5**0.5, "batch": 1.0, "rewards": (3 / 83) ** 0.5},
        "population": {"group": 1.0, "batch": 2**0.5, "rewards": (4 / 83) ** 0.5},
    }
    for form, of in sizes.items():
        for over, size in of.items():
            found = group_advantages(rewards, valid, 2, over, form, 0.0)
            assert found.tolist() == pytest.approx([-size, size, 0, 0])
            found = group_advantages(rewards, valid, 2, over, form, 0.5)
            assert found.tolist() == pytest.approx([-1 / (1 / size + 0.5), 1 / (1 / size + 0.5), 0, 0])


@pytest.mark.parametrize("over", ["group", "batch", "rewards"])
@pytest.mark.parametrize("form", ["unbiased", "population"])
def test_a_std_of_too_few_rewards_is_no_error(over, form):
    values = torch.tensor([1.0, torch.nan, torch.nan, torch.nan])
    for valid in (values.isfinite(), torch.zeros(4, dtype=torch.bool)):
        assert group_advantages(values, valid, 2, over, form).tolist() == [0, 0, 0, 0]


PUBLISHED = {
    "grpo": ("group", "unbiased", 1e-8),
    "mix-grpo": ("group", "unbiased", 1e-8),
    "flow-grpo": ("rewards", "population", 1e-4),
    "grpo-guard": ("group", "population", 1e-4),
    "flow-dppo": ("rewards", "unbiased", 1e-8),
    "nft": ("rewards", "population", 1e-4),
    "awm": ("rewards", "population", 1e-4),
    "crd": ("rewards", "population", 1e-4),
    "dgpo": ("group", "population", 1e-4),
    "tempflow": ("group", "population", 1e-4),
    "flow-grpo-fast": ("rewards", "population", 1e-4),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_advantages_are_normalised_as_published(points, name):
    over, form, epsilon = PUBLISHED[name]
    agent = make(points, name)
    rewards = np.array([0.1, 0.2, 0.3, 0.9, 2.0, 2.1, 2.5, 2.2])
    gaps = rewards.reshape(2, 4) - rewards.reshape(2, 4).mean(1, keepdims=True)
    ddof = int(form == "unbiased")
    std = rewards.std(ddof=ddof) if over == "rewards" else rewards.reshape(2, 4).std(1, ddof=ddof, keepdims=True)
    rollout = scored(agent, rewards.tolist())
    found = agent.reward_advantages("points", rollout.scores.total, rollout)
    assert found.tolist() == pytest.approx((gaps / (std + epsilon)).flatten().tolist(), rel=1e-5, abs=1e-6)


def test_samples_whose_advantage_is_zero_are_dropped(points):
    """The loss is the mean over the others, in each optimizer step by itself, and the KL does not pull at them."""
    options = {"kl_coef": 0.3, "updates_per_rollout": 2, "timestep_fraction": 1.0}
    kept, dropped = (make(points, "flow-grpo", drop_zero_advantages=drop, **options) for drop in (False, True))
    rewards = [0.1, 0.2, 0.3, 0.9, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 2.0, 1.0, *[0.5] * 4]
    rollout = scored(dropped, rewards, ["ring", "line", "grid", "ring"])
    weights = dropped.targets(rollout)["weight"]
    first, second = [2.0] * 4 + [0.0] * 4, [4.0, 0.0, 4.0, 0.0] + [0.0] * 4  # the mean reward of its group is 1
    assert weights.tolist() == first + second
    assert "weight" not in kept.targets(rollout)
    for agent in (kept, dropped):
        with torch.no_grad():
            torch.manual_seed(0)
            for p in agent.parameters:
                p.copy_(0.1 * torch.randn_like(p))
    losses = []
    for agent in (kept, dropped):
        examples = agent.examples(rollout, 1)
        conditioning = agent.conditioning(rollout, examples)
        losses.append(agent.example_loss(rollout, agent.complete(rollout, examples, conditioning)[:, 0], conditioning))
    torch.testing.assert_close(losses[1][0], losses[0][0] * weights)
    assert (losses[0][0] != 0).all()  # it is the KL that remains of the dropped
