"""What a run says at its start of settings that have no effect in it."""

import dataclasses

import pytest
import torch

from agents.algorithms import AGENTS
from agents.policy import DenoisingPolicy
from agents.rollout import collect
from agents.training import loop
from agents.training.config import TrainConfig
from agents.training.experiment import build
from denoise_env.mdp import DenoisingMDP, row_generators

CLIPPED = ["dpok", "grpo", "flow-grpo", "grpo-guard", "flow-dppo", "ddpo-is", "ppo"]


def make(name, model="points", **changes):
    policy = DenoisingPolicy(DenoisingMDP.make(model, num_steps=6))
    return AGENTS[name](policy, AGENTS[name].config_type(**{"group_size": 4, **changes}), seed=1)


def updated(agent):
    """The weights after one iteration."""
    rollout = collect(agent.policy.mdp, agent.policy, row_generators(range(8)), **agent.rollout_options(1))
    agent.update(rollout, 1)
    return torch.cat([p.detach().flatten() for p in agent.parameters])


@pytest.mark.parametrize("name", CLIPPED)
@pytest.mark.parametrize("several", [{}, {"updates_per_rollout": 2}, {"epochs": 2}])
def test_a_clip_acts_only_where_a_rollout_has_several_optimizer_steps(name, several):
    """Where it is said to have no effect, any value trains the same bits; elsewhere not."""
    tight, loose = (make(name, lr=0.05, clip_range=clip, **several) for clip in (1e-6, 1e6))
    idle = "clip_range" in tight.idle_settings()
    assert idle == (not several)
    assert torch.equal(updated(tight), updated(loose)) == idle


IDLE = [
    ("grpo", {}, {"clip_range", "advantage_clip"}),
    ("grpo", {"advantage_clip": 1.51}, {"clip_range", "advantage_clip"}),
    ("grpo", {"advantage_clip": 1.49}, {"clip_range"}),  # of four, at most 3/√4
    ("grpo-guard", {"advantage_clip": 1.74}, {"clip_range", "advantage_clip"}),  # and √3 with the population's std
    ("grpo-guard", {"advantage_clip": 1.72}, {"clip_range"}),
    ("grpo", {"advantage_std": "batch"}, {"clip_range"}),
    ("grpo", {"shared_noise": "none", "share_prefix": True}, {"clip_range", "advantage_clip", "share_prefix"}),
    ("rloo", {"share_prefix": True, "shared_noise": "rollout"}, set()),
    ("rloo", {"ema_warmup": True, "ema_every": 2}, {"ema_warmup", "ema_every"}),
    ("rloo", {"ema_warmup": True, "ema_every": 2, "ema_decay": 0.9}, set()),
    (
        "rloo",
        {"timestep_rounding": "int", "timestep_selection": "per_group"},
        {"timestep_rounding", "timestep_selection"},
    ),
    ("rloo", {"timestep_rounding": "int", "timestep_selection": "per_group", "timestep_fraction": 0.5}, set()),
    ("rloo", {"reward_aggregation": "losses"}, {"reward_aggregation"}),
    ("rloo", {"drop_last": False}, {"drop_last"}),  # the last step of Points is deterministic
    ("ddpo-sf", {"normalisation": "batch", "tracker_size": 20}, {"tracker_size"}),
    ("ddpo-sf", {"tracker_size": 20}, set()),
    ("dpok", {"kl_coef": 0.0, "kl_scaling": "paper"}, {"clip_range", "kl_scaling"}),
    ("dpok", {"kl_scaling": "paper", "updates_per_rollout": 2}, set()),
    ("flow-grpo", {"kl_coef": 0.0, "kl_scaling": "mean"}, {"clip_range", "kl_scaling"}),
    ("rwr", {}, set()),
    ("base", {}, set()),
]


@pytest.mark.parametrize(("name", "changes", "idle"), IDLE)
def test_settings_without_effect_are_named(name, changes, idle):
    assert set(make(name, **changes).idle_settings()) == idle


def test_a_last_step_with_noise_can_be_trained():
    policy = DenoisingPolicy(DenoisingMDP.make("points-flow", num_steps=6), last_step="sde")
    config = AGENTS["rloo"].config_type(group_size=4, drop_last=False)
    assert AGENTS["rloo"](policy, config).idle_settings() == {}


@pytest.mark.parametrize("changes", [{"timestep_rounding": "int"}, {"timestep_selection": "per_group"}])
def test_what_is_said_to_have_no_effect_has_none(changes):
    changed, plain = (make("rloo", lr=0.05, **options) for options in (changes, {}))
    assert set(changed.idle_settings()) == set(changes)
    torch.testing.assert_close(updated(changed), updated(plain), rtol=1e-4, atol=1e-5)  # steps add up in another order


def test_a_run_says_so_once_at_its_start(tmp_path, capsys):
    options = AGENTS["grpo"].config_type(group_size=4, advantage_clip=1.0)
    config = TrainConfig("points", agent_options=options, prompts_per_iteration=2, num_steps=4, iterations=2)
    config = dataclasses.replace(config, eval_images_per_prompt=1)
    loop.train(build(config), tmp_path / "run", report=False)
    said = [line for line in capsys.readouterr().err.splitlines() if "no effect" in line]
    assert len(said) == 1
    assert said[0].startswith("clip_range has no effect in this run: with one optimizer step per rollout")
