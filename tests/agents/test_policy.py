"""The policy as a TensorDict module in the TorchRL environment."""

import pytest
import torch
from torchrl.collectors import Collector

from agents.policy import DenoisingPolicy
from denoise_env.kernels import Transition
from denoise_env.mdp import DenoisingMDP
from denoise_env.torchrl_env import DenoiseTorchRLEnv


def test_a_collector_gathers_whole_episodes_with_log_probs(points):
    env = DenoiseTorchRLEnv.from_mdp(points, num_envs=8)
    policy = DenoisingPolicy(points, seed=3)
    collector = Collector(env, policy, frames_per_batch=8 * 10, total_frames=2 * 8 * 10)
    for batch in collector:
        assert batch.batch_size == (8, 10)
        assert batch["next", "done"][:, -1].all()
        assert not batch["next", "done"][:, :-1].any()
        for k in range(9):
            rows = points.conditioning.rows(batch["prompt_index"][:, k].flatten())
            with torch.no_grad():
                transition = policy.transition(batch["latents"][:, k], k, rows)
            expected = policy.log_prob(transition, batch["action"][:, k])
            torch.testing.assert_close(batch["action_log_prob"][:, k], expected, rtol=1e-5, atol=1e-5)
        assert (batch["action_log_prob"][:, 9] == 0).all()  # Points' last step is deterministic
        assert batch["next", "reward"][:, -1].isfinite().all()
    collector.shutdown()


def test_the_policy_is_seeded(points):
    env = DenoiseTorchRLEnv.from_mdp(points, num_envs=4)
    rollouts = []
    for seed in (1, 1, 2):
        env.set_seed(0)
        rollouts.append(env.rollout(10, DenoisingPolicy(points, seed=seed))["action"])
    assert torch.equal(rollouts[0], rollouts[1])
    assert not torch.equal(rollouts[0], rollouts[2])


def test_rows_may_be_at_different_steps(points):
    policy = DenoisingPolicy(points)
    latents = torch.randn(3, 2)
    rows = points.conditioning.rows(torch.zeros(3, dtype=torch.long))
    with torch.no_grad():
        mixed = policy.transition(latents, torch.tensor([0, 4, 8]), rows)
        for i, k in enumerate((0, 4, 8)):
            alone = policy.transition(latents[i : i + 1], k, rows[i : i + 1])
            torch.testing.assert_close(mixed.mean[i : i + 1], alone.mean, rtol=0, atol=1e-6)
            assert mixed.std[i].item() == alone.std.item()


def test_the_squared_error_that_passes_for_a_log_prob():
    """x' (.25, −1.1), mean (.3, −1.2): −mean (.0025, .01); no 1/(2 std²)."""
    mdp = DenoisingMDP.make("points-flow", num_steps=4)
    policy = DenoisingPolicy(mdp, "cps", reduction="squared_error")
    transition = Transition(torch.tensor([[0.3, -1.2]]), torch.tensor(0.1))
    assert policy.log_prob(transition, torch.tensor([[0.25, -1.1]])).item() == pytest.approx(-0.00625)


def test_network_calls_are_rows_and_three_with_a_gradient(make_shapes):
    for guidance, rows in ((1.0, 1), (3.0, 2)):
        mdp = make_shapes(guidance_scale=guidance)
        policy = DenoisingPolicy(mdp)
        seen = []
        mdp.model.network.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(len(inputs[0])))
        conditioning, latents = mdp.conditioning.rows(torch.arange(3)), torch.zeros(3, *mdp.model.latent_shape)
        with torch.no_grad():
            policy.transition(latents, 0, conditioning)
        assert policy.network_calls == sum(seen) == 3 * rows
        policy.transition(latents, 0, conditioning)
        assert policy.network_calls == 3 * rows + 3 * 3 * rows
