"""All steps count alike: by the kernel's own dependence of a step's mean on the network's output."""

import pytest
import torch
from tensordict import TensorDict

from agents.grpo_guard import GRPOGuard, GRPOGuardConfig
from agents.policy import DenoisingPolicy
from agents.rollout import collect
from denoise_env.mdp import DenoisingMDP, row_generators

ROWS = 256


def gradients(model, kernel, num_steps, balance):
    """The norm of the loss's gradient by the network's output, for each trained step."""
    mdp = DenoisingMDP.make(model, num_steps=num_steps)
    agent = GRPOGuard(DenoisingPolicy(mdp, kernel), GRPOGuardConfig(group_size=16, balance=balance))
    prompts, episode = ["ring", "line"] * (ROWS // 32), torch.arange(ROWS)
    rollout = collect(mdp, agent.policy, row_generators(range(ROWS)), prompts, group_size=16, keep_means=True)
    advantage, conditioning = agent.targets(rollout)["advantage"], rollout.conditioning(episode)
    predict, norms = agent.policy.predict, []
    for k in agent.trainable_steps.tolist():
        entries = {"episode": episode, "step": torch.full_like(episode, k), "advantage": advantage}
        seen = []
        agent.policy.predict = lambda *inputs, seen=seen: seen.append(predict(*inputs)) or seen[0]
        loss, _ = agent.example_loss(rollout, TensorDict(entries, batch_size=ROWS), conditioning)
        (gradient,) = torch.autograd.grad(loss.mean(), seen)
        norms.append(gradient.norm().item())
    return norms


@pytest.mark.parametrize("num_steps", [10, 25])
@pytest.mark.parametrize(
    ("model", "kernel"),
    [("points", "ddim"), ("points-flow", "dance_sde"), ("points-flow", "flow_sde"), ("points-flow", "cps")],
)
def test_guards_balance_brings_all_steps_to_one_scale(model, kernel, num_steps):
    with_balance, without = (gradients(model, kernel, num_steps, balance) for balance in (True, False))
    assert max(with_balance) / min(with_balance) < 2
    if kernel in ("ddim", "cps"):
        assert max(without) / min(without) > 2
