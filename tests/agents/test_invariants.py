"""What must hold for every family, dtype, guidance, adapter and microbatch size (DESIGN: invariants)."""

import itertools

import pytest
import torch

from agents.grpo import GRPO, GRPOConfig
from agents.policy import DenoisingPolicy
from agents.rollout import collect
from denoise_env.mdp import DenoisingMDP, row_generators

PROMPTS = ["a red circle on gray", "a blue square on black"]


def roll(mdp, policy, agent, microbatch=None, seed=0):
    rows = len(PROMPTS) * agent.group_size
    prompts = PROMPTS if mdp.model.vocabulary is None else list(mdp.model.vocabulary[:2])
    return collect(
        mdp,
        policy,
        row_generators(range(seed, seed + rows)),
        prompts,
        group_size=agent.group_size,
        shared_noise=True,
        microbatch=microbatch,
    )


@pytest.mark.parametrize(
    ("dtype", "guidance", "lora", "microbatch"),
    [
        *itertools.product(("fp32", "bf16"), (1.0, 5.0), (0, 4), (None,)),
        ("fp32", 5.0, 0, 4),
        ("bf16", 5.0, 4, 2),
    ],
)
def test_unchanged_stable_diffusion_has_ratio_exactly_one(make_shapes, dtype, guidance, lora, microbatch):
    mdp = make_shapes(dtype=dtype, guidance_scale=guidance, lora_rank=lora)
    policy = DenoisingPolicy(mdp)
    agent = GRPO(policy, GRPOConfig(group_size=4, timestep_fraction=1.0), microbatch=microbatch)
    figures = agent.update(roll(mdp, policy, agent, microbatch), 0)
    assert figures["ratio_deviation"] == 0
    assert figures["grad_norm"] > 0


def test_gradient_checkpointing_keeps_the_ratio_and_the_gradient(make_shapes):
    norms = []
    for checkpointing in (False, True):
        mdp = make_shapes(gradient_checkpointing=checkpointing)
        policy = DenoisingPolicy(mdp)
        agent = GRPO(policy, GRPOConfig(group_size=4))
        figures = agent.update(roll(mdp, policy, agent), 0)
        assert figures["ratio_deviation"] == 0
        norms.append(figures["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize(
    ("model", "kernel"),
    [("points", "ddim"), ("points-flow", "dance_sde"), ("points-flow", "flow_sde"), ("points-flow", "cps")],
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_unchanged_points_have_ratio_exactly_one(model, kernel, reduction):
    mdp = DenoisingMDP.make(model, num_steps=8)
    policy = DenoisingPolicy(mdp, kernel, reduction=reduction)
    agent = GRPO(policy, GRPOConfig(group_size=8, timestep_fraction=1.0))
    assert agent.update(roll(mdp, policy, agent), 0)["ratio_deviation"] == 0


def test_a_changed_policy_has_another_ratio(make_shapes):
    mdp = make_shapes()
    policy = DenoisingPolicy(mdp)
    agent = GRPO(policy, GRPOConfig(group_size=4))
    rollout = roll(mdp, policy, agent)
    agent.update(rollout, 0)
    assert agent.update(rollout, 0)["ratio_deviation"] > 0


def test_microbatches_do_not_change_the_update(make_shapes):
    weights = []
    for microbatch in (None, 4, 2):
        mdp = make_shapes()
        policy = DenoisingPolicy(mdp)
        agent = GRPO(policy, GRPOConfig(group_size=4, lr=1e-3), microbatch=microbatch)
        agent.optimizer = torch.optim.SGD(agent.parameters, 1.0)  # the gradient itself
        agent.update(roll(mdp, policy, agent), 0)
        weights.append(torch.cat([p.detach().flatten() for p in agent.parameters]))
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=2e-6)


def test_rows_do_not_depend_on_their_batch(make_shapes):
    mdp = make_shapes()
    policy = DenoisingPolicy(mdp)
    whole = collect(mdp, policy, row_generators(range(6)), ["a red circle on gray"] * 6)
    alone = collect(mdp, policy, row_generators([4]), ["a red circle on gray"])
    torch.testing.assert_close(whole.steps["latents"][4:5], alone.steps["latents"], rtol=0, atol=1e-5)
    halves = collect(mdp, policy, row_generators(range(6)), ["a red circle on gray"] * 6, microbatch=3)
    torch.testing.assert_close(whole.final_latents, halves.final_latents, rtol=0, atol=1e-5)


def test_the_rollout_is_the_mdp_stepped_by_hand(points):
    """Latents, log-probs and scores of `collect` are those of reset, policy and step written out."""
    policy = DenoisingPolicy(points)
    rollout = collect(points, policy, row_generators(range(5)))
    generators = row_generators(range(5))
    state = points.reset(generators)
    noise = torch.stack([torch.randn(10, 2, generator=g) for g in generators])
    with torch.no_grad():
        for k in range(10):
            torch.testing.assert_close(state.latents, rollout.steps["latents"][:, k], rtol=0, atol=0)
            conditioning = points.conditioning.rows(state.prompt_index)
            transition = policy.transition(state.latents, k, conditioning)
            action = transition.sample(noise[:, k])
            if transition.stochastic:
                expected = policy.log_prob(transition, action)
                torch.testing.assert_close(rollout.steps["action_log_prob"][:, k], expected, rtol=0, atol=0)
            state = points.step(state, action)
    torch.testing.assert_close(rollout.scores.total, points.score(state.latents, state.prompt_index).total)


def test_a_rollout_stores_latents_once_and_no_conditioning(make_shapes):
    mdp = make_shapes(num_steps=10)
    policy = DenoisingPolicy(mdp)
    agent = GRPO(policy, GRPOConfig(group_size=16))
    rollout = roll(mdp, policy, agent)
    tensors = [*rollout.steps.values(), rollout.final_latents]
    tensors += [*rollout.scores.values.values(), rollout.scores.total, rollout.scores.valid]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert sum(storages.values()) <= 1.02 * 32 * 11 * 4 * 8 * 8 * 4
    row = mdp.conditioning.rows(mdp.drawn[:1])["prompt_embeds"]
    assert mdp.conditioning.host_bytes == (len(PROMPTS) + 1) * row.nbytes  # of the prompts that were asked for


def test_the_rollout_leaves_no_gradient_and_changes_no_weight(make_shapes):
    mdp = make_shapes()
    before = [p.clone() for p in mdp.model.network.parameters()]
    policy = DenoisingPolicy(mdp)
    rollout = collect(mdp, policy, row_generators(range(2)), PROMPTS)
    assert not any(t.requires_grad for t in rollout.steps.values())
    assert all(p.grad is None for p in mdp.model.network.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, mdp.model.network.parameters(), strict=True))


@pytest.mark.parametrize("lora", [0, 4])
def test_a_zero_learning_rate_changes_nothing(make_shapes, lora):
    mdp = make_shapes(lora_rank=lora)
    policy = DenoisingPolicy(mdp)
    agent = GRPO(policy, GRPOConfig(group_size=4, lr=0.0))
    before = [p.detach().clone() for p in mdp.model.network.parameters()]
    for iteration in range(2):
        figures = agent.update(roll(mdp, policy, agent), iteration)
        assert figures["ratio_deviation"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, mdp.model.network.parameters(), strict=True))


def train_points(shuffle: bool, iterations: int = 60) -> tuple[float, float]:
    mdp = DenoisingMDP.make("points", num_steps=10)
    if shuffle:
        reward, generator = mdp.rewards["points"], torch.Generator().manual_seed(0)
        mdp.rewards["points"] = lambda images, prompts: reward(images, prompts)[
            torch.randperm(len(images), generator=generator)
        ]
    policy = DenoisingPolicy(mdp)
    agent = GRPO(policy, GRPOConfig(group_size=32, lr=3e-3, shared_noise="none"))
    prompts = list(mdp.model.vocabulary)
    means = []
    for iteration in range(iterations):
        seeds = range(10_000 * iteration, 10_000 * iteration + 32 * len(prompts))
        rollout = collect(mdp, policy, row_generators(seeds), prompts, group_size=32)
        agent.update(rollout, iteration)
        means.append(rollout.scores.total.mean().item())
    return sum(means[:5]) / 5, sum(means[-5:]) / 5


def test_training_improves_the_reward_and_a_shuffled_reward_does_not():
    before, after = train_points(shuffle=False)
    assert after > before + 0.2
    before, after = train_points(shuffle=True)
    assert after < before + 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_ratio_is_one_on_an_accelerator(make_shapes, dtype):
    mdp = make_shapes(device="cuda", dtype=dtype, guidance_scale=5.0)
    policy = DenoisingPolicy(mdp)
    agent = GRPO(policy, GRPOConfig(group_size=16, timestep_fraction=1.0))
    assert agent.update(roll(mdp, policy, agent), 0)["ratio_deviation"] == 0
