import pytest
import torch

from agents.algorithms import AGENTS
from agents.training.experiment import build
from agents.training.presets import PRESETS, make_config
from denoise_env.seeding import row_seeds


def test_the_dancegrpo_preset_is_danceGRPOs_setting():
    config = make_config("dancegrpo")
    assert config.prompts_per_iteration * config.agent_options.group_size == 512
    assert (config.num_steps, config.eta, config.model_options.guidance_scale, config.kernel) == (50, 1.0, 5.0, "ddim")
    agent = config.agent_options
    assert (agent.group_size, agent.updates_per_rollout, agent.lr, agent.clip_range) == (16, 2, 1e-5, 1e-4)
    assert (agent.timestep_fraction, agent.drop_last, agent.timestep_selection) == (1.0, True, "per_sample")
    assert (agent.betas, agent.weight_decay, agent.max_grad_norm) == ((0.9, 0.999), 1e-4, 1.0)
    assert (agent.advantage_clip, agent.shared_noise, config.reduction, agent.kl_coef) == (
        5.0,
        "rollout",
        "mean",
        0,
    )
    experiment = build(make_config("dancegrpo", model="shapes"))
    steps = experiment.agent.select_steps(row_seeds(0, "rollout", 1, 512))
    assert steps.shape == (512, 49)
    assert steps.max() == 48
    assert all(len(set(row)) == 49 for row in steps[:4].tolist())
    assert not torch.equal(steps[0], steps[1])


def test_points_preset_builds():
    assert build(make_config("points")).agent.group_size == 16


def test_an_agent_of_ones_own_is_found_by_module_and_class(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from agents.grpo import GRPO, GRPOConfig\n"
        "class Config(GRPOConfig): pass\n"
        "class Mine(GRPO): config_type = Config\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert type(build(make_config("points", "mine:Mine")).agent).__name__ == "Mine"
    for name, message in (
        ("mine:Config", "must be a subclass of agents.base.Agent"),
        ("mine:Absent", "cannot load the agent"),
        ("gpro", "did you mean 'grpo'"),
    ):
        with pytest.raises(ValueError, match=message):
            make_config("points", name)


def test_another_agent_keeps_the_episodes_of_a_preset():
    for name in AGENTS:
        config = make_config("points", name)
        assert config.prompts_per_iteration * config.agent_options.group_size == 96
        learns = name not in ("base", "best-of-n", "zero-lr")
        assert config.agent_options.lr == (make_config("points").agent_options.lr if learns else 0)
    assert make_config("shapes", "ppo", rows=64).prompts_per_iteration == 64


def test_a_run_measures_what_its_own_world_has():
    """Shapes' attributes mean nothing on Points."""
    assert make_config("shapes").eval_rewards == ("shapes-correct",)
    assert make_config("shapes", model="points").eval_rewards == ()
    assert make_config("points", model="shapes").eval_rewards == ("shapes-correct",)


def test_another_models_microbatch_divides_its_update():
    for name in PRESETS:
        config = make_config(name, model="points-flow" if name == "points" else "points")
        update = (
            config.prompts_per_iteration * config.agent_options.group_size // config.agent_options.updates_per_rollout
        )
        assert update % config.microbatch == 0
        assert config.microbatch * 2 > min(update, 128)
