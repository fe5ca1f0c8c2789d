"""Training the extremes of every group: DanceGRPO's best-of-N."""

import math
import threading
import time

import pytest
import torch

from agents.algorithms import AGENTS
from agents.base import LearningConfig, extremes
from agents.grpo import GRPO, GRPOConfig
from agents.policy import DenoisingPolicy
from agents.rollout import collect
from denoise_env.mdp import DenoisingMDP, row_generators


@pytest.mark.parametrize(
    ("rewards", "count", "expected"),
    [
        ([0.1, 0.9, 0.5, 0.3], 2, [0, 1]),
        ([0.1, 0.9, 0.5, 0.3], 3, [0, 1, 2]),  # an odd one is among the highest
        ([0.1, 0.9, 0.5, 0.3], 1, [1]),
        ([0.1, 0.9, 0.5, 0.3], 4, [0, 1, 2, 3]),
        ([0.5, 0.5, 0.5, 0.5], 2, [0, 3]),
        ([math.nan, 0.9, 0.5, 0.1], 2, [1, 3]),
        ([1.0, 2.0, 3.0, 4.0, 40.0, 10.0, 30.0, 20.0], 2, [0, 3, 4, 5]),
    ],
)
def test_extremes(rewards, count, expected):
    assert extremes(torch.tensor(rewards), 4, count).tolist() == expected


def rollout_of(agent, policy, groups=3, microbatch=None):
    mdp = policy.mdp
    generators = row_generators(range(groups * agent.group_size))
    return collect(mdp, policy, generators, mdp.drawn_prompts[:groups], **agent.rollout_options(1))


def agent_of(name, **settings):
    policy = DenoisingPolicy(DenoisingMDP.make("points", num_steps=6))
    kind = AGENTS[name]
    return kind(policy, kind.config_type(group_size=8, **settings)), policy


def test_the_gradient_is_that_of_the_chosen_samples_with_the_groups_advantages():
    found = {}
    for kept in (0, 4):
        agent, policy = agent_of("grpo", best_and_worst=kept, timestep_fraction=1.0, max_grad_norm=1e9)
        rollout = rollout_of(agent, policy)
        if not kept:  # the same by hand: a mean over the chosen is twice the mean over all, of which half are 0
            groups = rollout.scores.total.view(3, 8)
            order = groups.argsort(1)
            chosen = torch.zeros_like(groups, dtype=torch.bool)
            chosen.scatter_(1, order[:, [0, 1, 6, 7]], True)
            advantages = agent.targets

            def masked(rollout, chosen=chosen, advantages=advantages):
                return {"advantage": 2 * advantages(rollout)["advantage"] * chosen.flatten()}

            agent.targets = masked
        found[kept] = agent.update(rollout, 1)["grad_norm"]
    assert found[4] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize(
    "name", [n for n, a in AGENTS.items() if issubclass(a.config_type, LearningConfig) and not a.whole_groups]
)
def test_every_agent_trains_fewer_samples(name):
    calls = []
    for kept in (0, 4):
        agent, policy = agent_of(name, best_and_worst=kept)
        rollout = rollout_of(agent, policy)
        before = policy.network_calls
        figures = agent.update(rollout, 1)
        calls.append(policy.network_calls - before)
        assert math.isfinite(figures["loss"])
    assert calls[1] <= calls[0] / 2 * 1.4, calls  # a critic's values of the whole rollout may join


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"best_and_worst": 9}, r"best_and_worst must lie in \[0, group_size=8\], not 9"),
        ({"best_and_worst": -1}, "best_and_worst must lie in"),
    ],
)
def test_what_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        agent_of("grpo", **settings)


@pytest.mark.parametrize("name", [n for n, a in AGENTS.items() if getattr(a, "whole_groups", False)])
def test_agents_that_compare_whole_groups_leave_none_out(name):
    with pytest.raises(ValueError, match=f"{name} compares whole groups in its loss: set best_and_worst to 0"):
        agent_of(name, best_and_worst=4)


def test_microbatches_divide_what_is_left():
    policy = DenoisingPolicy(DenoisingMDP.make("points", num_steps=6))
    config = GRPOConfig(group_size=8, best_and_worst=3)
    GRPO(policy, config, microbatch=16).check_rows(16)  # 6 are left: one microbatch
    GRPO(policy, config, microbatch=4).check_rows(32)  # 12 are left
    with pytest.raises(ValueError, match="the 6 episodes of one update cannot be divided into microbatches of 4"):
        GRPO(policy, config, microbatch=4).check_rows(16)


# --- Scoring elsewhere ---


class Elsewhere:
    """A reward that says it computes on another machine, and notes when and where it was called."""

    def __init__(self):
        self.spans, self.threads = [], set()

    def elsewhere(self, device):
        return True

    def __call__(self, images, prompts):
        started = time.perf_counter()
        self.threads.add(threading.current_thread())
        time.sleep(0.05)
        self.spans.append((started, time.perf_counter()))
        return (-images.square().sum(1)).exp()


@pytest.mark.parametrize("microbatch", [None, 4, 8])
def test_scores_from_elsewhere_are_the_same(microbatch):
    reward = Elsewhere()
    plain = DenoisingMDP.make("points", num_steps=6, microbatch=microbatch)
    mdp = DenoisingMDP(plain.model, {"r": reward}, plain.drawn_prompts, 6, microbatch=microbatch)
    policy, calls = DenoisingPolicy(mdp), []
    policy.before_call = lambda: calls.append(time.perf_counter())
    rollout = collect(
        mdp, policy, row_generators(range(16)), mdp.drawn_prompts[:4], group_size=4, microbatch=microbatch
    )
    expected = mdp.score(rollout.final_latents, rollout.prompt_index)
    assert torch.equal(rollout.scores.total, expected.total)
    rounds = 1 if microbatch is None else 16 // microbatch
    during = [call for call in calls for start, end in reward.spans[: rounds - 1] if start < call < end]
    assert bool(during) == (rounds > 1)  # denoised while it scored
    assert len(reward.threads) == (2 if rounds > 1 else 1)


def test_what_an_overlapped_reward_raises_masks_its_rows():
    def half(images, prompts):
        if (images[:, 0] > 0).all():
            raise RuntimeError("no answer")
        return images[:, 0]

    half.elsewhere = lambda device: True
    plain = DenoisingMDP.make("points", num_steps=6)
    mdp = DenoisingMDP(plain.model, {"r": half}, plain.drawn_prompts, 6, microbatch=1)
    with pytest.warns(UserWarning, match="reward 'r' failed"):
        rollout = collect(mdp, DenoisingPolicy(mdp), row_generators(range(8)), microbatch=1)
    right = rollout.final_latents[:, 0] > 0
    assert 0 < right.sum() < 8
    assert torch.equal(rollout.scores.valid, ~right)
    assert "no answer" in rollout.scores.errors["r"]
