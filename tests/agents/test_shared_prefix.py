"""Network calls that a group has in common are made once, and change nothing."""

import functools

import pytest
import torch

from agents.algorithms import AGENTS
from agents.policy import DenoisingPolicy
from agents.rollout import collect
from denoise_env.mdp import DenoisingMDP, row_generators

GROUP, STEPS = 4, 6
SIZES = {"mix-grpo": 3, "flow-grpo-fast": 2, "tempflow": 1}


def make(name, mdp, share, microbatch=None, **config):
    config = {"group_size": GROUP, "share_prefix": share, "shared_noise": "group", "lr": 1e-3, **config}
    if name in SIZES:
        config |= {"window_size": SIZES[name], "timestep_fraction": 1.0, "window_every": 1}
    if name == "tempflow":
        config = {"kl_coef": 0.0, **config}
    kind = AGENTS[name].config_type
    agent = AGENTS[name](DenoisingPolicy(mdp), kind(**config), seed=1, microbatch=microbatch)
    agent.optimizer = torch.optim.SGD(agent.parameters, 1.0)  # the gradient itself
    return agent


def rollout_and_update(agent, iteration, prompts):
    """The rollout, the rows its network calls had, those of the update, and by how much the weights moved."""
    mdp, counted = agent.policy.mdp, []
    before = [p.detach().clone() for p in agent.parameters]
    handle = mdp.model.network.register_forward_pre_hook(lambda module, args: counted.append(len(args[0])))
    options = agent.rollout_options(iteration)
    rollout = collect(mdp, agent.policy, row_generators(range(GROUP * len(prompts))), prompts, **options)
    collected = sum(counted)
    assert agent.policy.network_calls == collected
    agent.update(rollout, iteration)
    handle.remove()
    updated = sum(counted) - collected
    assert agent.policy.network_calls == collected + 3 * updated
    return (
        rollout,
        collected,
        updated,
        torch.cat([(p.detach() - q).flatten() for p, q in zip(agent.parameters, before, strict=True)]),
    )


def check(name, make_mdp, iteration, prompts, tolerance, moved, microbatch=None):
    results = []
    for share in (True, False):
        agent = make(name, make_mdp(), share, microbatch)
        steps = agent.policy.mdp.num_steps
        window = agent.window(iteration) if name in SIZES else None
        start = window[0] if window else 0
        result = rollout_and_update(agent, iteration, prompts)
        factor, rows = agent.policy.model.rows_per_sample, GROUP * len(prompts)
        shared = len(prompts) * (start + 1) + rows * (steps - start - 1)
        assert result[1] == factor * (shared if share else rows * steps)
        if window:
            assert result[2] == factor * rows * len(window)
        results.append(result)
    one, other = results
    torch.testing.assert_close(one[0].final_latents, other[0].final_latents, rtol=0, atol=tolerance)
    found, expected = (r[0].steps["action_log_prob"] for r in results)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert (one[3] - other[3]).norm() <= moved * other[3].norm() > 0
    if name in SIZES:
        assert found.isfinite()[0].nonzero().flatten().tolist() == window
    latents = one[0].steps["latents"].view(len(prompts), GROUP, steps, -1)
    same = (latents == latents[:, :1]).flatten(3).all(3).all(1).all(0).tolist()
    assert same == [k <= start for k in range(steps)]  # one trajectory up to the first noise
    return results


@pytest.mark.parametrize("model", ["points", "points-flow"])
@pytest.mark.parametrize("iteration", [1, 2, 3])
@pytest.mark.parametrize("name", ["mix-grpo", "flow-grpo-fast", "tempflow", "grpo"])
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_sharing_saves_calls_and_changes_nothing_on_points(model, iteration, name, precision):
    def mdp():
        made = DenoisingMDP.make(model, num_steps=STEPS)
        if precision == "fp64":
            made.model.network.double()
            made.model.dtype = torch.float64
        return made

    tolerance, moved = (1e-12, 1e-6) if precision == "fp64" else (1e-5, 1e-3)  # log-probs are kept in float32
    check(name, mdp, iteration, ["ring", "line", "grid"], tolerance, moved)


@pytest.mark.parametrize("name", ["mix-grpo", "flow-grpo-fast", "tempflow", "grpo"])
@pytest.mark.parametrize(("guidance", "microbatch"), [(1.0, None), (3.0, 4)])
def test_sharing_saves_calls_and_changes_nothing_on_shapes(make_shapes, name, guidance, microbatch):
    prompts = ["a red circle on gray", "a blue square on black"]
    mdp = functools.partial(make_shapes, num_steps=5, guidance_scale=guidance)
    check(name, mdp, 1, prompts, 1e-4, 1e-2, microbatch)


def test_without_shared_noise_nothing_is_shared():
    agent = make("grpo", DenoisingMDP.make("points", num_steps=STEPS), share=True, shared_noise="none")
    _, collected, _, _ = rollout_and_update(agent, 1, ["ring", "line"])
    assert collected == 2 * GROUP * STEPS


@pytest.mark.parametrize("microbatch", [1, 2, 3, 4, 6, 12])
def test_sharing_works_for_every_microbatch(microbatch):
    whole = make("mix-grpo", DenoisingMDP.make("points", num_steps=STEPS), share=True)
    split = make("mix-grpo", DenoisingMDP.make("points", num_steps=STEPS), share=True, microbatch=microbatch)
    rollouts = []
    for agent in (whole, split):
        options = agent.rollout_options(3)
        rollouts.append(
            collect(agent.policy.mdp, agent.policy, row_generators(range(12)), ["ring", "line", "grid"], **options)
        )
    torch.testing.assert_close(rollouts[0].final_latents, rollouts[1].final_latents, rtol=0, atol=1e-5)


# --- Branches, and an end that a solver makes ---


def branching(share, prompts=2, precision=torch.float64, **config):
    """TempFlow on Points: two trajectories, three siblings at each of two to five steps."""
    mdp = DenoisingMDP.make("points-flow", num_steps=STEPS)
    mdp.model.network.to(precision)
    mdp.model.dtype = precision
    config = {"branches": 3, "window_strategy": "scattered", "lr": 1e-3, "kl_coef": 0.0, **config}
    config.setdefault("group_size", 6 * config["window_size"])
    agent = AGENTS["tempflow"](DenoisingPolicy(mdp), AGENTS["tempflow"].config_type(share_prefix=share, **config))
    agent.optimizer = torch.optim.SGD(agent.parameters, 1.0)
    for p in agent.parameters:
        p.data.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    rows, counted = prompts * agent.group_size, []
    mdp.model.network.register_forward_pre_hook(lambda module, args: counted.append(len(args[0])))
    names = ["ring", "line"][:prompts]
    rollout = collect(mdp, agent.policy, row_generators(range(rows)), names, **agent.rollout_options(1))
    return agent, rollout, sum(counted)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_branches_of_one_trajectory(size):
    (agent, one, shared), (_, other, apart) = (branching(share, window_size=size) for share in (True, False))
    steps, trajectories = agent.window(1), 4
    assert len(steps) == size
    assert shared == trajectories * (steps[-1] + sum(1 + 3 * (STEPS - 1 - k) for k in steps))
    assert apart == trajectories * 3 * size * STEPS
    torch.testing.assert_close(one.final_latents, other.final_latents, rtol=0, atol=1e-12)
    for rollout in (one, other):
        latents = rollout.steps["latents"].view(trajectories, size, 3, STEPS, 2)
        log_prob = rollout.steps["action_log_prob"].view(trajectories, size, 3, STEPS)
        assert len(latents[:, 0, 0, 0].unique(dim=0)) == trajectories
        for i, k in enumerate(steps):
            assert (log_prob[:, i].isfinite() == (torch.arange(STEPS) == k)).all()
            own, trunk = latents[:, i, :, : k + 1], latents[:, -1:, 0, : k + 1]
            torch.testing.assert_close(own, trunk.expand_as(own), rtol=0, atol=1e-12)  # up to the branching
            after = rollout.steps["action"].view_as(latents)[:, i, :, k]
            assert ((after[:, 0] - after[:, 1]).abs().amax(1) > 1e-6).all()
    chosen = agent.select_steps(range(len(one)), one.kernel)[:, 0]
    assert chosen.view(trajectories, size, 3)[0, :, 0].tolist() == steps
    assert (chosen.view(trajectories, size, 3) == chosen.view(trajectories, size, 3)[:1, :, :1]).all()


def test_siblings_are_compared_with_each_other():
    """And with none that branched from another step, or from another trajectory."""
    agent, rollout, _ = branching(True, window_size=2)
    total = rollout.scores.total.view(-1, 3).double()
    expected = (total - total.mean(1, keepdim=True)) / (total.std(1, correction=0, keepdim=True) + 1e-4)
    torch.testing.assert_close(agent.targets(rollout)["advantage"].view(-1, 3).double(), expected)


def test_the_gradient_of_branches_is_that_of_each_by_itself():
    (one, shared, _), (other, apart, _) = (branching(share, window_size=2) for share in (True, False))
    before = torch.cat([p.detach().flatten() for p in one.parameters])
    for agent, rollout in ((one, shared), (other, apart)):
        figures = agent.update(rollout, 1)
        assert figures["ratio_deviation"] < 1e-6
    moved = [torch.cat([p.detach().flatten() for p in agent.parameters]) - before for agent in (one, other)]
    assert (moved[0] - moved[1]).norm() < 1e-5 * moved[0].norm()


def test_one_branching_step_is_the_window_of_one_group():
    """With whole groups as siblings it is what a window of one step does, to the bit."""
    agent, rollout, _ = branching(True, window_size=1, branches=0, group_size=4, precision=torch.float32)
    options = {**agent.rollout_options(1), "siblings": 0, "shared_noise": True}
    plain = collect(agent.policy.mdp, agent.policy, row_generators(range(8)), ["ring", "line"], **options)
    assert torch.equal(rollout.final_latents, plain.final_latents)
    assert torch.equal(rollout.steps["action_log_prob"].nan_to_num(7), plain.steps["action_log_prob"].nan_to_num(7))
    assert torch.equal(rollout.steps["action"], plain.steps["action"])


@pytest.mark.parametrize("model", ["points", "points-flow"])
@pytest.mark.parametrize(("share", "visited"), [(0.4, [4, 6, 9, 12]), (0.05, [4]), (1.0, list(range(4, 14)))])
def test_mix_grpo_flash_saves_calls_after_the_window(model, share, visited):
    mdp = DenoisingMDP.make(model, num_steps=14)
    options = {"after_window": "dpm_solver", "after_window_share": share, "shared_noise": "group"}
    agent, plain = (make_mix(mdp, **changes) for changes in (options, {"shared_noise": "group"}))
    counted = []
    handle = mdp.model.network.register_forward_pre_hook(lambda module, args: counted.append(len(args[0])))
    flash = collect(mdp, agent.policy, row_generators(range(8)), ["ring", "line"], **agent.rollout_options(1))
    handle.remove()
    assert sum(counted) == agent.policy.network_calls == 2 * 1 + 8 * (3 + len(visited))
    whole = collect(mdp, plain.policy, row_generators(range(8)), ["ring", "line"], **plain.rollout_options(1))
    assert flash.steps.batch_size == (8, 4)
    for name in ("latents", "action", "action_log_prob"):
        assert torch.equal(flash.steps[name], whole.steps[name][:, :4])  # exact in the window, and nothing after it
    near = (flash.final_latents - whole.final_latents).abs().mean()
    assert near < (0.15 if share > 0.1 else 1.0)  # of a std of 2 or so
    assert agent.update(flash, 1)["ratio_deviation"] < 1e-5


def make_mix(mdp, **config):
    config = {"group_size": GROUP, "window_size": 4, **config}
    return AGENTS["mix-grpo"](DenoisingPolicy(mdp), AGENTS["mix-grpo"].config_type(**config))
