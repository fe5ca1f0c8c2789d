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
    if name == "flow-grpo-fast":
        config |= {"kl_coef": 0.0}
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
        start, stop = agent.window(iteration) if name in SIZES else (0, None)
        result = rollout_and_update(agent, iteration, prompts)
        factor, rows = agent.policy.model.rows_per_sample, GROUP * len(prompts)
        shared = len(prompts) * (start + 1) + rows * (steps - start - 1)
        assert result[1] == factor * (shared if share else rows * steps)
        if stop is not None:
            assert result[2] == factor * rows * (stop - start)
        results.append(result)
    one, other = results
    torch.testing.assert_close(one[0].final_latents, other[0].final_latents, rtol=0, atol=tolerance)
    found, expected = (r[0].steps["action_log_prob"] for r in results)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert (one[3] - other[3]).norm() <= moved * other[3].norm() > 0
    if name in SIZES:
        assert torch.equal(found.isfinite()[0].nonzero().flatten(), torch.arange(start, stop))
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
