"""Contracts that hold for every agent: ratio, resume, command line, configuration, refusals, controls, learning."""

import csv
import dataclasses
import json
import typing

import pytest
import torch
from safetensors.torch import load_file

from agents import cli
from agents.algorithms import AGENTS
from agents.commands.settings import run_config
from agents.policy import DenoisingPolicy
from agents.rollout import collect
from agents.training import loop
from agents.training.config import TrainConfig, as_dict
from agents.training.evaluation import evaluate
from agents.training.experiment import build
from agents.training.presets import make_config
from agents.trajectory import TrajectoryAgent
from denoise_env.mdp import row_generators

EVERY = sorted(AGENTS)
UNTRAINED = ["base", "best-of-n"]
LEARNING = [name for name in EVERY if name not in UNTRAINED]
TRAINING = [name for name in EVERY if name not in ("base", "best-of-n", "zero-lr", "shuffled-reward")]
RATIO = [name for name in EVERY if issubclass(AGENTS[name], TrajectoryAgent)]
SEVERAL = [name for name in TRAINING if not AGENTS[name].on_policy]
TIMING = {"seconds", "images_per_second"}
TWO_COMPOSITIONS = ["three green crosses on black", "a red circle left of a blue square on gray"]


def run(config, directory, **options):
    return loop.train(build(config), directory, **options)


def settings(name, **changes):
    """An agent's configuration, of those changes that it knows."""
    kind = AGENTS[name].config_type
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{key: value for key, value in changes.items() if key in known})


def tiny(name, changes=None, **options):
    """A run of well under a second."""
    several = {"updates_per_rollout": 2, "epochs": 2} if name in SEVERAL else {}
    small = {"group_size": 4, "lr": 3e-3, "ema_decay": 0.5, "window_size": 2, "window_every": 1, "kl_coef": 0.01}
    small |= {"kl_reward": 0.01, "critic_width": 8, "tracker_size": 6, "tracker_min_count": 6, "draws_per_sample": 3}
    small = {key: value for key, value in small.items() if key not in AGENTS[name].own_settings}
    chosen = settings(name, **{**small, "old_decay_slope": 0.2, "reference_every": 3, **several, **(changes or {})})
    base = TrainConfig(
        model="points",
        agent=name,
        agent_options=chosen,
        iterations=4,
        prompts_per_iteration=2,
        microbatch=None,
        checkpoint_every=2,
        eval_every=2,
        eval_images_per_prompt=2,
        num_steps=5,
    )
    return dataclasses.replace(base, **options)


# --- The ratio ---


def first_ratios(agent, rollout):
    """The ratios of an update's first optimizer step."""
    example_loss, found, stepped = agent.example_loss, [], []

    def recording(*arguments):
        loss, figures = example_loss(*arguments)
        if not stepped:
            found.append(figures["ratio"].detach().clone())
        return loss, figures

    agent.example_loss = recording
    handle = agent.optimizer.register_step_post_hook(lambda *_: stepped.append(1))
    agent.update(rollout, 1)
    handle.remove()
    return torch.cat(found)


@pytest.mark.parametrize("model", ["points", "points-flow"])
@pytest.mark.parametrize("share_prefix", [False, True])
@pytest.mark.parametrize("name", [*RATIO, "awm", "dgpo"])
def test_the_first_ratio_is_one(name, share_prefix, model):
    """Exactly; but for rounding, where network calls are shared."""
    changes = {"share_prefix": share_prefix, "shared_noise": "group", "timestep_fraction": 1.0}
    experiment = build(tiny(name, changes, model=model))
    agent, policy = experiment.agent, experiment.policy
    options = agent.rollout_options(1)
    rollout = collect(experiment.mdp, policy, row_generators(range(8)), ["ring", "line"], **options)
    ratio = first_ratios(agent, rollout)
    if share_prefix and name in RATIO:
        assert (ratio - 1).abs().max() < 1e-5
    else:
        assert (ratio == 1).all()
    assert len(ratio) >= 4


@pytest.mark.parametrize("name", ["grpo-guard", "ppo", "awm", "dgpo", "flow-dppo", "mix-grpo"])
@pytest.mark.parametrize("microbatch", [None, 2])
def test_the_first_ratio_is_one_in_bf16(make_shapes, name, microbatch):
    mdp = make_shapes(dtype="bf16")
    several = {"updates_per_rollout": 2, "share_prefix": False, "group_size": 4, "window_size": 2}
    agent = AGENTS[name](DenoisingPolicy(mdp), settings(name, **several, draws_per_sample=2), microbatch=microbatch)
    options = {**agent.rollout_options(1), "microbatch": microbatch or 4}
    rollout = collect(mdp, agent.policy, row_generators(range(8)), [p.text for p in mdp.prompts][:2], **options)
    assert (first_ratios(agent, rollout) == 1).all()


@pytest.mark.parametrize("name", ["rwr", "nft", "awm", "dpo"])
def test_final_samples_losses_are_float32_in_bf16(make_shapes, name):
    """Those of the same outputs in float64. Near 1 bf16's steps are 1/128, and DPO's β of 100 makes them 0.4."""
    mdp = make_shapes(dtype="bf16")
    config = settings(name, group_size=4, draws_per_sample=1, updates_per_rollout=2)
    agent = AGENTS[name](DenoisingPolicy(mdp), config)
    rollout = collect(mdp, agent.policy, row_generators(range(8)), mdp.prompts[:2], group_size=4)
    examples = agent.examples(rollout, 1)
    with torch.no_grad():
        for p in agent.parameters:  # away from the reference, by less than bf16 resolves in a mean square of about 1
            p.mul_(1.001)
    conditioning = agent.conditioning(rollout, examples)
    predict, noised = agent.policy.predict, agent.noised
    completed = agent.complete(rollout, examples, conditioning)
    loss, figures = agent.example_loss(rollout, completed[:, 0], conditioning)
    agent.policy.predict = lambda *inputs: predict(*inputs).double()
    agent.noised = lambda x0, step, noise: (noised(x0, step, noise)[0], noised(x0.double(), step, noise)[1])
    completed = agent.complete(rollout, examples, conditioning)
    exact, exact_figures = agent.example_loss(rollout, completed[:, 0], conditioning)
    assert loss.dtype == torch.float32
    assert exact.dtype == torch.float64
    for value, right in ((loss, exact), *((figures[key], exact_figures[key]) for key in figures)):
        torch.testing.assert_close(value.double(), right.double(), rtol=0, atol=1e-3 if name == "dpo" else 1e-5)


def test_awms_old_likelihoods_come_from_the_batches_of_the_first_update():
    """A network's rounding may depend on the size of its batch."""
    experiment = build(tiny("awm", {"reference_coef": 0.0, "slow_coef": 0.0}))
    agent, sizes = experiment.agent, []
    agent.microbatch = None
    rollout = collect(experiment.mdp, agent.policy, row_generators(range(8)), ["ring", "line"], group_size=4)
    experiment.mdp.model.network.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    agent.update(rollout, 1)
    assert sizes == [4] * 2 * (2 * 2 * 3)  # two halves, two epochs of three draws each; the old ones, then the new


@pytest.mark.parametrize("name", LEARNING)
def test_what_agents_share_they_do_alike(name):
    """So many optimizer steps, each on a clipped gradient; between them the weights stay; nothing is scored anew."""
    experiment = build(tiny(name, {"max_grad_norm": 1e-3}))
    agent, seen = experiment.agent, []
    with agent.rollout_weights():
        rollout = collect(
            experiment.mdp,
            agent.policy,
            row_generators(range(8)),
            ["ring"] * (8 // agent.group_size),
            **agent.rollout_options(1),
        )
    now = [p.detach().clone() for p in agent.parameters]

    def before(optimizer, args, kwargs):
        norm = torch.stack([p.grad.norm() for p in agent.parameters]).norm()
        assert 0 < norm <= 1e-3 * (1 + 1e-5)
        assert all(torch.equal(a, b) for a, b in zip(now, agent.parameters, strict=True))

    def after(optimizer, args, kwargs):
        now[:] = [p.detach().clone() for p in agent.parameters]
        seen.append(now)

    agent.optimizer.register_step_pre_hook(before)
    agent.optimizer.register_step_post_hook(after)
    experiment.mdp.score = experiment.mdp.step = experiment.mdp.reset = None  # not callable
    agent.update(rollout, 1)
    config = experiment.config.agent_options
    assert len(seen) == config.updates_per_rollout * config.epochs
    assert all(torch.equal(a, b) for a, b in zip(now, agent.parameters, strict=True))


# --- Resuming ---


def table(path):
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMING} for row in csv.DictReader(file)]


def assert_same_run(one, other):
    for name in ("metrics.csv", "eval.csv"):
        assert table(one / name) == table(other / name)
    kept = sorted(path.name for path in (one / "checkpoints").iterdir())
    assert kept == sorted(path.name for path in (other / "checkpoints").iterdir())
    for name in kept:
        a, b = (load_file(run / "checkpoints" / name / "state.safetensors") for run in (one, other))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
        metas = [json.loads((run / "checkpoints" / name / "meta.json").read_text()) for run in (one, other)]
        assert metas[0]["network_calls"] == metas[1]["network_calls"]
    return load_file(one / "checkpoints" / kept[-1] / "state.safetensors")


def stop_and_resume(config, directory, monkeypatch, stop):
    """A run that is interrupted in iteration ``stop``, and continued."""
    iterate = loop._iterate

    def stopping(experiment, iteration, *more):
        if iteration == stop:
            raise KeyboardInterrupt
        return iterate(experiment, iteration, *more)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_iterate", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(config, directory, report=False)
    return run(config, directory, resume=True, report=False)


REMEMBERED = {
    **dict.fromkeys(("nft", "awm", "dgpo", "crd"), "old.residual.0.weight"),
    "dpo": "reference.residual.0.weight",
    "ppo": "modules.critic.",
    "dpok": "modules.critic.",
    "ddpo-is": "modules.tracker 0.values",
}


@pytest.mark.parametrize("name", EVERY)
def test_a_resumed_run_equals_the_run_that_never_stopped(name, tmp_path, monkeypatch):
    config = tiny(name, eval_kl=True)
    whole = run(config, tmp_path / "whole", report=False)
    tensors = assert_same_run(whole, stop_and_resume(config, tmp_path / "stopped", monkeypatch, stop=4))
    assert any(key.startswith("average.") for key in tensors) == (name in LEARNING)
    if name in REMEMBERED:
        assert any(key.startswith(REMEMBERED[name]) for key in tensors)
    rows = table(whole / "metrics.csv")
    assert [row["iteration"] for row in rows] == ["1", "2", "3", "4"]
    assert not any(row[key] == "nan" for row in rows for key in row)
    changed = tensors["weights.residual.4.bias"].abs().max() > 0
    assert bool(changed) == (name not in ("base", "best-of-n", "zero-lr"))


@pytest.mark.parametrize("name", LEARNING)
def test_a_rollout_without_scores_changes_no_weights(name):
    """Nor does the momentum of the updates before it."""
    experiment = build(tiny(name, max_unscored=1.0))
    loop._iterate(experiment, 1)
    weights = [p for group in experiment.agent.optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in weights]
    mdp = experiment.mdp
    mdp.rewards = dict.fromkeys(mdp.rewards, lambda images, prompts: torch.full((len(images),), torch.nan))
    figures = loop._iterate(experiment, 2)
    assert figures["unscored"] == 8
    assert figures["skipped_updates"] >= 1
    assert all(torch.equal(one, other) for one, other in zip(weights, before, strict=True))
    assert experiment.agent.skipped == 0


@pytest.mark.parametrize("name", ["grpo", "nft", "mix-grpo", "ppo", "base"])
@pytest.mark.parametrize("stop", [2, 3])
def test_a_budgeted_run_resumes_exactly(name, stop, tmp_path, monkeypatch):
    calls = int(
        table(run(tiny(name, iterations=1), tmp_path / "one", report=False) / "metrics.csv")[0]["network_calls"]
    )
    budget = 4 * calls + 1
    config = tiny(name, network_budget=budget, eval_points=3, iterations=50, checkpoint_every=1)
    whole = run(config, tmp_path / "whole", report=False)
    spent = [int(row["network_calls"]) for row in table(whole / "metrics.csv")]
    assert spent[-1] >= budget > spent[-2]
    assert spent[0] == calls
    evaluated = [int(row["network_calls"]) for row in table(whole / "eval.csv")]
    parts = [calls * 3 // budget for calls in [0, *spent]]
    due = [n for n, before, now in zip(spent, parts, parts[1:], strict=False) if now > before]
    assert evaluated == [0, *due]
    assert_same_run(whole, stop_and_resume(config, tmp_path / "stopped", monkeypatch, stop))


# --- A network of a real architecture ---


@pytest.mark.parametrize("name", LEARNING)
def test_every_agent_learns_from_the_tiny_flux(name):
    """A rollout of eight compositions and an update, in the preset but for the sizes."""
    config = make_config("shapes-flux", name, rows=8)
    config.agent_options.group_size = 4
    experiment = build(dataclasses.replace(config, prompts_per_iteration=2, num_steps=6, microbatch=4))
    agent = experiment.agent
    before = [p.detach().clone() for p in agent.parameters]
    with agent.rollout_weights():
        rows = row_generators(range(2 * agent.group_size))
        rollout = collect(experiment.mdp, agent.policy, rows, TWO_COMPOSITIONS, **agent.rollout_options(1))
    figures = agent.update(rollout, 1)
    assert all(p.isfinite().all() for p in agent.parameters)
    moved = any((p != old).any() for p, old in zip(agent.parameters, before, strict=True))
    assert moved == (name != "zero-lr")
    assert all(value == value for value in figures.values())


# --- The command line ---


@pytest.mark.parametrize("name", EVERY)
def test_every_agent_trains_from_the_command_line(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "write_report", lambda directory: None)
    flags = ["--iterations", "1", "--num-steps", "8", "--eval-images-per-prompt", "2", "--prompts-per-iteration", "2"]
    flags += ["--agent.group-size", "4", "--output-dir", str(tmp_path / "run")]
    assert cli.main(["train", "--preset", "points", "--agent", name, *flags]) == 0
    assert "evaluation prompts, mean reward 'points'" in capsys.readouterr().out
    assert run_config(tmp_path / "run").agent == name


def changed(config):
    """Every field with another value of its type."""
    hints = typing.get_type_hints(type(config))
    other = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool):
            other[field.name] = not value
        elif isinstance(value, str):
            other[field.name] = next(x for x in typing.get_args(hints[field.name]) if x != value)
        elif isinstance(value, tuple):
            other[field.name] = tuple(v / 2 for v in value)
        else:
            other[field.name] = value + 1 if isinstance(value, int) else value / 3 + 0.01
    return type(config)(**other)


@pytest.mark.parametrize("name", EVERY)
def test_every_agents_configuration_survives_its_file(name, tmp_path):
    for preset in ("shapes", "points"):
        config = make_config(preset, name)
        assert config.agent == name
        for agent in (config.agent_options, changed(config.agent_options)):
            full = dataclasses.replace(config, agent_options=agent)
            (tmp_path / "config.json").write_text(json.dumps(as_dict(full)))
            assert run_config(tmp_path) == full


@pytest.mark.parametrize("preset", ["shapes", "shapes-flux", "shapes-video", "points"])
@pytest.mark.parametrize("name", EVERY)
def test_every_agent_fits_its_presets(name, preset):
    """With as many episodes an iteration as the preset's own agent."""
    config = make_config(preset, name)
    experiment = build(config)
    own = make_config(preset)
    rows = config.prompts_per_iteration * experiment.agent.group_size
    assert rows == own.prompts_per_iteration * own.agent_options.group_size


@pytest.mark.parametrize("name", SEVERAL)
def test_several_updates_need_no_smaller_microbatch(name):
    """A microbatch is bounded by what one update has."""
    experiment = build(dataclasses.replace(make_config("points", name), microbatch=None))
    rows = experiment.config.prompts_per_iteration * experiment.agent.group_size
    agent = dataclasses.replace(experiment.config.agent_options, updates_per_rollout=2)
    assert build(dataclasses.replace(experiment.config, agent_options=agent)).agent.microbatch == rows // 2
    assert (
        build(dataclasses.replace(experiment.config, agent_options=agent, microbatch=1000)).agent.microbatch
        == rows // 2
    )


# --- Refusals ---

NEEDS_DENSITY = [name for name in EVERY if AGENTS[name].needs_density]


@pytest.mark.parametrize("name", NEEDS_DENSITY)
def test_agents_that_need_log_probs_refuse_the_ode(name, tmp_path):
    for options in ({"kernel": "ode"}, {"eta": 0.0}):
        with pytest.raises(ValueError, match=rf"{name} needs log-probs.*use a stochastic one.*nft, awm, rwr, dpo"):
            run(tiny(name, **options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", sorted(set(EVERY) - set(NEEDS_DENSITY)))
def test_the_others_learn_from_the_ode(name, tmp_path):
    directory = run(tiny(name, kernel="ode", iterations=1), tmp_path / "run", report=False)
    assert len(table(directory / "metrics.csv")) == 1


GROUPS = ["grpo", "flow-grpo", "flow-grpo-fast", "mix-grpo", "tempflow", "grpo-guard", "flow-dppo", "rloo"]
GROUPS += ["nft", "awm", "dgpo", "crd", "dpo", "dcpo", "zero-lr", "shuffled-reward"]
JOINS = {
    **dict.fromkeys(("ppo", "dpok"), "it has one critic, for their weighted sum"),
    **dict.fromkeys(("dpo", "dcpo"), "a sample has one place in its group's ranking"),
    "rwr": r"a sample has one weight, exp\(r/τ\)",
    "nft": "a sample has one probability q of being a good one",
    "dgpo": r"a group has one weight, σ\(S\)",
    "crd": "a sample has one implied reward",
}
POSITIVE = {
    "grpo": ["clip_range", "advantage_clip", "max_grad_norm", "updates_per_rollout", "epochs"],
    "ddpo-is": ["tracker_size", "tracker_min_count"],
    "mix-grpo": ["window_stride", "window_every"],
    "nft": ["strength", "advantage_clip", "draws_per_sample"],
    "awm": ["clip_range", "advantage_clip"],
    "dpok": ["clip_range"],
    "dgpo": ["beta", "clip_range", "advantage_clip"],
    "crd": ["beta", "advantage_clip"],
    "rwr": ["temperature"],
    "dpo": ["beta"],
    "best-of-n": ["n"],
}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        *((name, {"group_size": 1}, "group_size must be at least 2, not 1") for name in GROUPS),
        *(
            (name, {key: many}, "on-policy.*must be 1.*grpo, ppo, ddpo-is")
            for name in ("ddpo-sf", "rloo")
            for key, many in (("updates_per_rollout", 2), ("epochs", 3))
        ),
        *((name, {"critic_width": 0}, "needs a critic.*must be positive.*do without one") for name in ("ppo", "dpok")),
        ("ppo", {"critic_lr": 0.0}, "needs a critic"),
        ("ppo", {"gamma": 1.5}, r"gamma and gae_lambda must lie in \[0, 1\]"),
        ("ppo", {"gae_lambda": 1.01}, r"gamma and gae_lambda must lie in \[0, 1\]"),
        *(
            (
                name,
                {"reward_aggregation": how},
                f"{name} cannot add up the rewards' {how}, because {why}: set reward_aggreg",
            )
            for name, why in JOINS.items()
            for how in ("advantages", "losses")
            if how not in AGENTS[name].aggregations
        ),
        ("nft", {"reward_aggregation": "losses"}, 'set reward_aggregation to "advantages" or "rewards"'),
        ("zero-lr", {"lr": 1e-3}, "zero-lr has a learning rate of 0, not 0.001"),
        *(
            (
                name,
                {"window_size": size, "window_reach": reach, "group_size": 12},
                f'between 1 and the {steps} trainable steps.*"{reach}" allows, not {size}: use a smaller window',
            )
            for name in ("mix-grpo", "flow-grpo-fast", "flow-dppo", "tempflow")
            for reach, steps in (("all", 4), ("first_half", 2), ("all_but_two", 3))
            for size in (0, steps + 1)
        ),
        ("tempflow", {"shared_noise": "none"}, 'branches of one trajectory: shared_noise must be "group" or "rollout"'),
        ("tempflow", {"window_end": "shrink"}, 'window_end must be "whole"'),
        (
            "tempflow",
            {"group_size": 6, "branches": 2},
            "group_size=6 cannot be .*branches=2 at each .*=2 steps",
        ),
        ("tempflow", {"group_size": 2}, "at least 2 from each"),
        ("mix-grpo", {"after_window_share": 0.0}, r"after_window_share must lie in \(0, 1\], not 0.0"),
        *(
            ("nft", {"step_range": shares}, "step_range must be two shares between 0 and 1, the first smaller")
            for shares in ((0.5, 0.5), (0.6, 0.4), (-0.1, 1.0), (0.0, 1.1))
        ),
        ("crd", {"reference_guidance": 4.5}, "Points has no guidance: set reference_guidance to 0"),
        ("crd", {"sampler_decay": 1.0}, r"sampler_decay must lie in \[0, 1\)"),
        ("awm", {"old_decay_after": -1}, "old_decay_after must be at least 0"),
        ("dpo", {"reference_every": -1}, "reference_every must be at least 0"),
        ("ddpo-is", {"tracker_min_count": 7}, "tracker_min_count=7 is never reached.*tracker_size=6"),
        ("ddpo-sf", {"tracker_min_count": 7}, "tracker_min_count=7 is never reached"),
        ("nft", {"old_decay": 1.0}, r"old_decay must lie in \[0, 1\)"),
        *((name, {key: 0}, f"{key} must be positive, not 0") for name, keys in POSITIVE.items() for key in keys),
        *((name, {"lr": float("nan")}, "lr must be a finite number") for name in LEARNING),
        *((name, {"ema_decay": 1.0}, "ema_decay must lie in") for name in LEARNING),
        ("dpok", {"kl_coef": -1.0}, "kl_coef must be a finite number ≥ 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(name, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tiny(name, changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rewards_that_all_weigh_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="every reward has weight 0"):
        run(tiny("grpo", rewards={"points": 0.0}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_second_caption_needs_a_second_prompt(tmp_path):
    (tmp_path / "one.txt").write_text("ring\n")
    with pytest.raises(ValueError, match="at least two prompts"):
        run(tiny("dcpo", prompts=str(tmp_path / "one.txt")), tmp_path / "run")


# --- Controls ---


@pytest.mark.parametrize("name", EVERY)
def test_without_a_learning_rate_nothing_changes(name):
    experiment = build(tiny(name, {"lr": 0.0, "weight_decay": 0.1}))
    before = [p.detach().clone() for p in experiment.agent.parameters]
    for iteration in (1, 2):
        loop._iterate(experiment, iteration)
    assert all(torch.equal(a, b) for a, b in zip(before, experiment.agent.parameters, strict=True))


@pytest.mark.parametrize("name", ["base", "best-of-n", "zero-lr"])
def test_controls_change_nothing(name):
    experiment = build(tiny(name, {"weight_decay": 1.0}))
    before = [p.detach().clone() for p in experiment.agent.parameters]
    for iteration in (1, 2):
        figures = loop._iterate(experiment, iteration)
        assert figures["network_calls"] > 0
    assert all(torch.equal(a, b) for a, b in zip(before, experiment.agent.parameters, strict=True))
    assert figures.get("ratio_deviation", 0) == 0


@pytest.mark.parametrize("name", UNTRAINED)
def test_what_does_not_train_has_no_setting_of_training(name, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--preset", "points", "--agent", name, "--agent.lr", "0.1"])
    assert "--agent.lr" in capsys.readouterr().err


def final(name, seed=0, iterations=30, **changes):
    """Mean final evaluation reward with its interval."""
    config = make_config("points", name)
    config = dataclasses.replace(
        config,
        agent_options=dataclasses.replace(config.agent_options, **changes),
        seed=seed,
        eval_images_per_prompt=128,
    )
    experiment = build(config)
    for iteration in range(1, iterations + 1):
        loop._iterate(experiment, iteration)
    with experiment.agent.evaluation_weights():
        return measure(experiment)


def measure(experiment):
    found = evaluate(
        experiment.eval_mdp,
        experiment.eval_policy,
        experiment.eval_prompts,
        128,
        1234,
        best_of=experiment.agent.best_of,
    )
    return found.means["points"], *found.intervals["points"]


BASE = 0.256


def test_a_shuffled_reward_does_not_improve_and_the_base_model_is_what_it_is():
    assert final("base", iterations=1)[0] == pytest.approx(BASE, abs=2e-3)
    means, lows, _ = zip(*(final("shuffled-reward", seed, 25) for seed in range(3)), strict=True)
    assert min(lows) < BASE
    assert sum(means) / 3 < BASE + 0.03


def test_best_of_n_is_better_than_the_base():
    _, low, _ = final("best-of-n", iterations=1)
    assert low > 2 * BASE


PAIRS = {"beta": 5.0, "draws_per_sample": 6, "pairing": "ranked", "reference_every": 0}
EASIER = {
    "dpo": PAIRS,
    "dcpo": PAIRS,
    "dgpo": {"beta": 5.0},
    "rwr": {"temperature": 0.2, "epochs": 1, "draws_per_sample": 6},
    "crd": {"draws_per_sample": 6},
}
"""β multiplies an average over latent dimensions: the published values are for images' thousands, and Points has two.
The published temperature is for rewards of a range of about 10, and Points' is 1."""


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_every_agent_learns_on_points(name):
    """In 30 iterations, with every one of five seeds: the interval lies clear of the base model's, 0.23 to 0.28."""
    for seed in range(5):
        mean, low, _ = final(name, seed, 30, **EASIER.get(name, {}))
        assert low > 0.3, (seed, mean)
