import csv
import dataclasses
import json
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from agents.algorithms import AGENTS
from agents.grpo import GRPOConfig
from agents.training import checkpoints, loop
from agents.training.config import TrainConfig
from agents.training.experiment import build
from agents.training.loop import train as run
from agents.training.presets import make_config, points
from agents.training.seeding import row_seeds
from agents.training.tables import Table
from denoise_env.shapes import WEIGHTS

TIMING = {"seconds", "images_per_second"}


def small(**changes):
    options = GRPOConfig(group_size=4, lr=1e-3, ema_decay=0.9, kl_coef=0.01)
    base = TrainConfig(
        model="points",
        agent_options=options,
        iterations=6,
        prompts_per_iteration=2,
        microbatch=None,
        checkpoint_every=2,
        eval_every=3,
        eval_images_per_prompt=4,
        num_steps=5,
    )
    return dataclasses.replace(base, **changes)


def deterministic(path):
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMING} for row in csv.DictReader(file)]


def assert_same_run(one, other):
    for name in ("metrics.csv", "eval.csv"):
        assert deterministic(one / name) == deterministic(other / name)
    newest = checkpoints.latest(one / "checkpoints")
    assert newest.name == checkpoints.latest(other / "checkpoints").name
    a, b = (load_file(run / "checkpoints" / newest.name / "state.safetensors") for run in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    for picture in (one / "samples").iterdir():
        assert picture.read_bytes() == (other / "samples" / picture.name).read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never interrupted."""
    return run(small(), tmp_path_factory.mktemp("runs") / "whole", command=["denoise-env", "train"])


def test_a_run_writes_its_directory(whole):
    directory = whole
    rows = deterministic(directory / "metrics.csv")
    assert [int(row["iteration"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [int(row["iteration"]) for row in deterministic(directory / "eval.csv")] == [0, 3, 6]
    assert json.loads((directory / "config.json").read_text())["agent"]["lr"] == 1e-3
    assert "torch" in json.loads((directory / "versions.json").read_text())
    assert sorted(p.name for p in (directory / "checkpoints").iterdir()) == ["000004", "000006"]
    page = (directory / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("https://matplotlib.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "")
    assert (directory / "export" / "model.safetensors").exists()


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_resumed_run_equals_the_run_that_never_stopped(whole, tmp_path, monkeypatch, stop):
    iterate = loop._iterate

    def stopping(experiment, iteration):
        if iteration == stop:
            raise KeyboardInterrupt
        return iterate(experiment, iteration)

    monkeypatch.setattr(loop, "_iterate", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(small(), tmp_path / "stopped")
    monkeypatch.setattr(loop, "_iterate", iterate)
    run(small(), tmp_path / "stopped", resume=True)
    assert_same_run(whole, tmp_path / "stopped")


def test_resuming_shapes_is_exact(tmp_path):
    config = TrainConfig(
        num_steps=3,
        guidance_scale=3.0,
        lora_rank=2,
        agent_options=GRPOConfig(group_size=4, ema_decay=0.5),
        iterations=2,
        prompts_per_iteration=2,
        microbatch=4,
        checkpoint_every=1,
        eval_images_per_prompt=1,
        eval_every=0,
    )
    whole = run(config, tmp_path / "whole")
    run(dataclasses.replace(config, iterations=1), tmp_path / "part")
    (tmp_path / "part" / "eval.csv").write_text("".join((whole / "eval.csv").read_text().splitlines(True)[:2]))
    run(config, tmp_path / "part", resume=True)
    (tmp_path / "part" / "samples" / "000001.png").unlink()
    assert_same_run(whole, tmp_path / "part")


KILLED = """
import os, signal, sys
from pathlib import Path
from agents.training import checkpoints
from agents.training.config import TrainConfig
from agents.training.loop import train
sys.path.insert(0, {tests!r})
from test_train import small
sync, calls = checkpoints._sync, 0
def killing(path):
    global calls
    calls += 1
    if calls == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    sync(path)
if {call}:
    checkpoints._sync = killing
train(small(iterations={iterations}), Path({directory!r}), resume={resume})
"""


def in_process(directory, *, call=0, iterations=6, resume=False):
    code = KILLED.format(
        tests=str(__import__("pathlib").Path(__file__).parent),
        call=call,
        iterations=iterations,
        directory=str(directory),
        resume=resume,
    )
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 3, 6, 9])
def test_killed_during_a_save(whole, tmp_path, call):
    """``call`` counts fsyncs: of versions and config, then of each part of each checkpoints."""
    process = in_process(tmp_path / "killed", call=call)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    run(small(), tmp_path / "killed", resume=True)
    assert_same_run(whole, tmp_path / "killed")
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    """Six processes, each killed up to 0.6 s after it wrote its first row: in rollouts, updates, evaluations, saves."""
    rng = random.Random(0)
    config = small(iterations=150)
    whole = run(config, tmp_path / "whole")
    directory, rows = tmp_path / "killed", tmp_path / "killed" / "metrics.csv"
    reached = []
    for _ in range(6):
        before = rows.stat().st_mtime_ns if rows.exists() else None
        process = in_process(directory, iterations=config.iterations, resume=directory.exists())
        while process.poll() is None and (not rows.exists() or rows.stat().st_mtime_ns == before):
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.6))
        process.kill()
        process.communicate()
        if process.returncode == -signal.SIGKILL:
            reached.append(len(rows.read_text().splitlines()))
    assert len(set(reached)) >= 2  # it was killed at different places on its way
    run(config, directory, resume=True)
    assert_same_run(whole, directory)


def test_a_full_disk_leaves_the_last_good_checkpoint(whole, tmp_path, monkeypatch):
    directory = tmp_path / "run"
    save_file = checkpoints.save_file

    def full(tensors, path):
        save_file(tensors, path)
        if "000004" in str(path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(checkpoints.CheckpointError, match=r"No space left.*last good checkpoint is .*000002"):
        run(small(), directory)
    assert [p.name for p in (directory / "checkpoints").iterdir()] == ["000002"]
    monkeypatch.setattr(checkpoints, "save_file", save_file)
    run(small(), directory, resume=True)
    assert_same_run(whole, directory)


def test_a_directory_with_a_run_is_refused_untouched(tmp_path):
    directory = run(small(iterations=1), tmp_path / "run")
    before = (directory / "metrics.csv").read_bytes()
    with pytest.raises(FileExistsError, match="--resume"):
        run(small(iterations=1), directory)
    assert (directory / "metrics.csv").read_bytes() == before


@pytest.mark.parametrize("file", ["state.safetensors", "meta.json"])
def test_a_truncated_checkpoint_is_refused(tmp_path, file):
    directory = run(small(iterations=2), tmp_path / "run")
    path = directory / "checkpoints" / "000002" / file
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(checkpoints.CheckpointError, match="truncated or damaged"):
        run(small(iterations=3), directory, resume=True)


def test_a_checkpoint_of_another_version_or_architecture_is_refused(tmp_path):
    directory = run(small(iterations=2), tmp_path / "run")
    with pytest.raises(checkpoints.CheckpointError, match="another architecture"):
        run(small(iterations=3, model="points-flow"), directory, resume=True)
    meta = directory / "checkpoints" / "000002" / "meta.json"
    meta.write_text(meta.read_text().replace(f'"version": {checkpoints.VERSION}', '"version": 99'))
    with pytest.raises(checkpoints.CheckpointError, match="version 99"):
        run(small(iterations=3), directory, resume=True)


def broken(images, prompts, metadata):
    raise RuntimeError("the scorer is down")


def half(images, prompts, metadata):
    scores = images[:, 0].clone()
    scores[::2] = torch.nan
    return scores


@pytest.mark.filterwarnings("ignore:the reward")
def test_a_run_whose_reward_fails_stops_with_the_reason(tmp_path):
    name = f"{__name__}:broken"
    config = small(rewards={name: 1.0})
    with pytest.raises(RuntimeError, match=r"8 of 8 images could not be scored.*the scorer is down"):
        run(config, tmp_path / "run")


def test_rows_that_cannot_be_scored_are_counted_and_left_out(tmp_path):
    config = small(rewards={f"{__name__}:half": 1.0}, iterations=2)
    directory = run(config, tmp_path / "run")
    assert [row["unscored"] for row in deterministic(directory / "metrics.csv")] == ["4", "4"]
    with pytest.raises(RuntimeError, match="max_unscored"):
        run(dataclasses.replace(config, max_unscored=0.4), tmp_path / "strict")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"agent_options": GRPOConfig(group_size=1)}, "group_size must be at least 2"),
        ({"kernel": "ode"}, "deterministic"),
        ({"eta": 0.0}, "deterministic"),
        ({"kernel": "cps"}, "not defined on a diffusion"),
        ({"kernel": "ddpm"}, "unknown kernel"),
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 1001}, "at most 1000"),
        ({"num_steps": 1}, "no step|deterministic"),
        ({"microbatch": 3}, "microbatches of 3"),
        ({"agent_options": GRPOConfig(group_size=4, updates_per_rollout=3)}, "updates_per_rollout=3"),
        ({"model": "pionts"}, "did you mean 'points'"),
        ({"rewards": {"pionts": 1.0}}, "did you mean 'points'"),
        ({"prompts": "nowhere.txt"}, "no prompt file"),
        ({"iterations": 0}, "at least 1"),
        ({"agent_options": GRPOConfig(group_size=4, timestep_fraction=0.0)}, "timestep_fraction"),
        ({"agent_options": GRPOConfig(group_size=4, lr=float("nan"))}, "lr must be"),
        ({"agent_options": GRPOConfig(group_size=4, ema_decay=1.0)}, "ema_decay"),
    ],
)
def test_bad_configurations_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(small(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_table_forgets_what_lies_after_the_checkpoint(tmp_path):
    table = Table(tmp_path / "t.csv", 0)
    for i in range(1, 5):
        table.append({"iteration": i, "reward": i / 3})
    with (tmp_path / "t.csv").open("a") as file:
        file.write("5,0.3")  # a line cut off by a crash
    Table(tmp_path / "t.csv", 2).append({"iteration": 3, "reward": 0.5})
    assert (tmp_path / "t.csv").read_text().splitlines()[-2:] == [f"2,{2 / 3}", "3,0.5"]


def test_the_dancegrpo_preset_is_danceGRPOs_setting():
    from agents.training.presets import dancegrpo

    config = dancegrpo()
    assert config.prompts_per_iteration * config.agent_options.group_size == 512
    assert (config.num_steps, config.eta, config.guidance_scale, config.kernel) == (50, 1.0, 5.0, "ddim")
    agent = config.agent_options
    assert (agent.group_size, agent.updates_per_rollout, agent.lr, agent.clip_range) == (16, 2, 1e-5, 1e-4)
    assert (agent.timestep_fraction, agent.drop_last, agent.timestep_selection) == (1.0, True, "per_sample")
    assert (agent.betas, agent.weight_decay, agent.max_grad_norm) == ((0.9, 0.999), 1e-4, 1.0)
    assert (agent.advantage_clip, agent.shared_noise, config.reduction, agent.kl_coef) == (
        5.0,
        True,
        "mean",
        0,
    )
    tiny = dataclasses.replace(config, model="shapes", height=32, width=32, dtype="fp32")
    experiment = build(tiny)
    steps = experiment.agent.select_steps(row_seeds(0, "rollout", 1, 512))
    assert steps.shape == (512, 49)
    assert steps.max() == 48
    assert all(len(set(row)) == 49 for row in steps[:4].tolist())
    assert not torch.equal(steps[0], steps[1])


def test_a_microbatch_larger_than_the_rollout_is_the_rollout():
    assert build(small(microbatch=1000)).agent.microbatch == 8


def test_a_long_prompt_file_is_not_evaluated_whole(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"a red circle on gray {i}" for i in range(100)))
    experiment = build(TrainConfig(prompts=str(file), eval_prompts=None, model="shapes", eval_rewards=()))
    assert len(experiment.mdp.prompts.texts) == 100
    assert len(experiment.eval_prompts) == 12  # shapes has held-out prompts of its own
    options = {"model": str(WEIGHTS), "rewards": {"shapes": 1.0}, "prompts": str(file)}
    assert build(TrainConfig(**options)).eval_prompts == experiment.mdp.prompts.texts[:32]


def test_points_preset_builds():
    assert build(points()).agent.group_size == 16


def test_a_budget_of_network_calls_ends_the_run(tmp_path):
    # an iteration: 8 rows · (5 forwards + 3 of 4 steps · (3 + 1 of the reference)) = 136
    config = small(network_budget=400, eval_points=2, iterations=1000)
    run(config, tmp_path / "run", report=False)
    assert [row["network_calls"] for row in deterministic(tmp_path / "run" / "metrics.csv")] == ["136", "272", "408"]
    evals = deterministic(tmp_path / "run" / "eval.csv")
    assert [(row["iteration"], row["network_calls"]) for row in evals] == [("0", "0"), ("2", "272"), ("3", "408")]
    assert not (tmp_path / "run" / "samples").exists()
    run(config, tmp_path / "run", resume=True, report=False)  # spent: nothing more
    assert len(deterministic(tmp_path / "run" / "metrics.csv")) == 3
    with pytest.raises(ValueError, match="eval_points divides the network_budget"):
        build(small(eval_points=2))


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
        assert config.agent_options.lr == make_config("points").agent_options.lr
    assert make_config("shapes", "ppo", rows=64).prompts_per_iteration == 64
