"""The presets are what was published, value by value, and the page says so."""

import dataclasses

import published_page
import pytest
import torch
from published_page import COMMON, DATA, OURS, WITHOUT, effective, published

from agents.algorithms import AGENTS
from agents.rollout import collect
from agents.training.experiment import build
from agents.training.presets import PRESETS, make_config
from agents.training.presets.published import PUBLISHED
from denoise_env.mdp import row_generators
from denoise_env.models import families

EVERYWHERE = {
    *("model", "model.guidance_scale", "model.height", "model.width", "model.dtype", "model.lora_rank", "num_steps"),
    *("kernel", "iterations", "prompts_per_iteration", "agent", "agent.group_size", "agent.updates_per_rollout"),
    *("agent.epochs", "agent.lr", "agent.betas", "agent.weight_decay", "agent.max_grad_norm", "agent.ema_decay"),
    "agent.shared_noise",
}
"""What the record of every preset must tell, or say that the source does not state it."""


def test_every_agent_has_a_published_preset_or_a_reason():
    assert set(DATA) == set(PUBLISHED)
    assert {preset.agent for preset in PUBLISHED.values()} | set(WITHOUT) == set(AGENTS)
    assert not {preset.agent for preset in PUBLISHED.values()} & set(WITHOUT)
    for name in set(AGENTS) - set(WITHOUT) - {"grpo"}:
        assert PUBLISHED[name].agent == name
    assert PUBLISHED["dancegrpo"].agent == "grpo"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_every_published_value_or_a_reason(name):
    ours, theirs, why = effective(name), published(name), DATA[name]["why"]
    assert {key for key, value in theirs.items() if ours[key] != value or type(ours[key]) is not type(value)} == set(
        why
    )
    assert all(why.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_presets_record_is_whole(name):
    preset, unstated = PUBLISHED[name], set(DATA[name]["unstated"])
    told = set(published(name)) | unstated
    assert not set(published(name)) & unstated
    assert told >= EVERYWHERE
    said = {*preset.settings, *(f"agent.{key}" for key in preset.agent_options)}
    said |= {f"model.{key}" for key in preset.model_options}
    assert said <= told | set(OURS)
    assert told <= set(effective(name))  # no setting that is not there
    assert DATA[name]["of"]
    assert DATA[name]["source"]
    assert set(DATA[name]["sources"]) <= set(published(name)) | set(COMMON)


def test_the_page_is_made_of_them():
    written = published_page.PAGE.read_text(encoding="utf-8")
    assert written == published_page.page(), "run python tests/agents/training/published_page.py"


# --- On another model ---


def small(config):
    """With few images an iteration; everything that the algorithm is stays."""
    agent = config.agent_options
    branched = getattr(agent, "branches", 0) * getattr(agent, "window_size", 1)
    group = min(agent.group_size, branched or 4)
    updates = getattr(agent, "updates_per_rollout", 1)
    changes = {"best_and_worst": 2} if getattr(agent, "best_and_worst", 0) else {}
    agent = dataclasses.replace(agent, group_size=group, updates_per_rollout=min(updates, 2), **changes)
    changes = {"prompts_per_iteration": 2 * agent.updates_per_rollout, "microbatch": None}
    return dataclasses.replace(config, agent_options=agent, **changes)


@pytest.mark.parametrize("model", ["points", "points-flow"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_preset_trains_on_another_model(name, model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)  # nothing is asked of a hub
    config = make_config(name, model=model)
    preset = PUBLISHED[name]
    assert config.prompts_per_iteration == preset.settings["prompts_per_iteration"]
    without = {"reference_guidance": 0.0} if "reference_guidance" in preset.agent_options else {}  # Points has none
    assert config.agent_options == type(config.agent_options)(**{**preset.agent_options, **without})
    experiment = build(config)  # with the preset's own sizes
    assert experiment.policy.kernel.name in (
        "ode",
        *(("ddim",) if model == "points" else ("dance_sde", "flow_sde", "cps")),
    )
    experiment = build(small(config))
    agent, rows = experiment.agent, experiment.config.prompts_per_iteration * experiment.agent.group_size
    before = [p.detach().clone() for p in agent.parameters]
    prompts = [experiment.mdp.drawn_prompts[i % 6] for i in range(experiment.config.prompts_per_iteration)]
    with agent.rollout_weights():
        rollout = collect(
            experiment.mdp, experiment.policy, row_generators(range(rows)), prompts, **agent.rollout_options(1)
        )
    agent.update(rollout, 1)
    assert not all(torch.equal(p, old) for p, old in zip(agent.parameters, before, strict=True))


def test_the_kernel_is_the_presets_where_the_model_has_it():
    flow, diffusion = make_config("flow-cps", model="points-flow"), make_config("flow-cps", model="points")
    assert (flow.kernel, flow.eta, flow.reduction) == ("cps", 0.7, "squared_error")
    assert (diffusion.kernel, diffusion.eta, diffusion.reduction) == (None, None, "mean")
    assert (diffusion.eval_kernel, diffusion.eval_num_steps) == ("ode", 40)
    assert make_config("dancegrpo", model="points-flow").kernel is None
    assert make_config("nft", model="points").kernel == "ode"


@pytest.mark.parametrize("name", ["flow-grpo", "dancegrpo"])
def test_a_checkpoint_keeps_its_own_size(name):
    from denoise_env.shapes import WEIGHTS

    for model in ("shapes", str(WEIGHTS)):
        config = make_config(name, model=model)
        options, published = config.model_options, PUBLISHED[name].model_options
        assert (options.height, options.width) == (None, None)
        assert options.guidance_scale == published["guidance_scale"]
        assert (options.dtype, options.gradient_checkpointing) == (
            ("fp32", False) if model == "shapes" else ("bf16", True)
        )
        assert options.lora_rank == published.get("lora_rank", 0)
        assert config.prompts_per_iteration * config.agent_options.group_size % config.microbatch == 0
    plain = dataclasses.replace(options, gradient_checkpointing=False, dtype="fp32")
    model = build(small(dataclasses.replace(config, model="shapes", model_options=plain))).mdp.model
    assert model.latent_shape[1:] == build(make_config("shapes")).mdp.model.latent_shape[1:]


def test_a_preset_on_its_own_model_has_its_size_and_asks_no_hub_what_it_is(monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    config = make_config("dancegrpo")
    assert (config.model_options.height, config.model_options.width, config.model) == (
        512,
        512,
        PRESETS["dancegrpo"].model,
    )


def test_a_family_that_nothing_claims_is_one_sentence(monkeypatch, tmp_path, capsys):
    from agents import cli

    index = tmp_path / "model_index.json"
    index.write_text('{"_class_name": "NobodysPipeline"}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: str(index))
    for name, preset in PUBLISHED.items():
        if preset.family in {family.name for family in families()}:
            continue
        with pytest.raises(ValueError, match="holds a NobodysPipeline, which no family claims"):
            make_config(name)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: (_ for _ in ()).throw(OSError("offline")))
    assert cli.main(["train", "--preset", "flow-grpo"]) == 2
    assert "cannot find 'stabilityai/stable-diffusion-3.5-medium' on the hub" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [index]
