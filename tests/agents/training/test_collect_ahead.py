"""Rollouts that are collected while the one before them is scored."""

import threading
import time

import pytest
import torch
from small_runs import assert_same_run, deterministic, run, small

from agents.grpo import GRPOConfig
from agents.training import loop
from agents.training.experiment import build
from denoise_env.mdp import DenoisingMDP
from denoise_env.models import load_model
from denoise_env.rewards.points import PointsReward


class Elsewhere(PointsReward):
    """A reward that says it computes on another machine."""

    def elsewhere(self, device):
        return True


class Waits(Elsewhere):
    """One that answers only when the next rollout's first network call has been made, and keeps what it saw."""

    def __init__(self):
        super().__init__()
        self.asked, self.called, self.waited = threading.Event(), threading.Event(), []

    def __call__(self, images, prompts):
        self.asked.set()
        self.waited.append(self.called.wait(10))
        return super().__call__(images, prompts)


def options(**changes):
    return GRPOConfig(group_size=4, lr=1e-2, collect_ahead=True, **changes)


def ahead(**changes):
    """Points in twelve iterations, a checkpoint every four; one optimizer step per rollout."""
    rewards = {"test_collect_ahead:Elsewhere": 1.0}
    return small(
        **{
            "rewards": rewards,
            "agent_options": options(),
            "iterations": 12,
            "checkpoint_every": 4,
            "eval_every": 4,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(ahead(), tmp_path_factory.mktemp("runs") / "whole")


def test_a_rollout_is_one_update_old_but_behind_a_checkpoint(whole):
    deviations = [float(row["ratio_deviation"]) for row in deterministic(whole / "metrics.csv")]
    assert [deviation > 0 for deviation in deviations] == [i % 4 != 0 for i in range(12)]


def test_it_makes_the_network_calls_of_any_other_run(whole, tmp_path):
    plain = run(ahead(agent_options=GRPOConfig(group_size=4, lr=1e-2)), tmp_path / "plain")
    rows = [deterministic(path / "metrics.csv") for path in (whole, plain)]
    assert [row["network_calls"] for row in rows[0]] == [row["network_calls"] for row in rows[1]]
    assert all(float(row["ratio_deviation"]) == 0 for row in rows[1])
    assert rows[0][0]["reward"] == rows[1][0]["reward"]
    assert rows[0][2]["reward"] != rows[1][2]["reward"]


def test_it_continues_from_a_checkpoint_as_if_it_had_never_stopped(whole, tmp_path):
    run(ahead(iterations=8), tmp_path / "run")
    assert_same_run(whole, run(ahead(), tmp_path / "run", resume=True))


def test_a_budget_ends_it_without_a_rollout_too_many(tmp_path):
    experiment = build(ahead(network_budget=10**4, checkpoint_every=100))
    loop.train(experiment, tmp_path / "run", report=False)
    counted = int(deterministic(tmp_path / "run" / "metrics.csv")[-1]["network_calls"])
    evaluated = experiment.eval_policy.network_calls
    assert experiment.policy.network_calls + evaluated * (experiment.policy is experiment.eval_policy) == counted


def test_the_next_rollout_is_denoised_while_this_one_is_scored():
    reward = Waits()
    experiment = build(ahead())
    mdp, pending = experiment.mdp, {}
    mdp.rewards = dict.fromkeys(mdp.rewards, reward)
    experiment.policy.before_call = lambda: reward.asked.is_set() and reward.called.set()
    loop._iterate(experiment, 1, None, pending, more=True)
    assert list(pending) == [2]
    assert all(reward.waited)
    reward.called.set()
    loop._iterate(experiment, 2, None, pending, more=False)
    assert not pending


def test_one_thread_decodes_at_a_time():
    model, inside, most = load_model("points"), [], []
    decode = model.decode

    def slow(latents):
        inside.append(0)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return decode(latents)

    model.decode = slow
    mdps = [DenoisingMDP(model, {"points": PointsReward()}, ["ring"], 4) for _ in range(2)]
    index = mdps[0].drawn.expand(3)
    threads = [threading.Thread(target=mdp.score, args=(torch.zeros(3, 2), index)) for mdp in mdps for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]


def test_it_is_refused_where_nothing_is_computed_elsewhere():
    with pytest.raises(ValueError, match="the rewards are computed on the model's own device: leave it out"):
        build(ahead(rewards={"points": 1.0}))


def test_a_clip_is_said_to_act(whole):
    assert "clip_range" not in build(ahead()).agent.idle_settings()
