import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import assert_same_run, deterministic, run, small

from agents.grpo import GRPOConfig
from agents.training import checkpoints, loop
from agents.training.config import TrainConfig
from agents.training.experiment import build, restore
from agents.training.loop import UnscoredError
from denoise_env.models import model_options
from denoise_env.rewards.points import PointsReward


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
    assert "over images: [" in page
    assert "over prompts: [" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("https://matplotlib.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "")
    assert (directory / "export" / "model.safetensors").exists()


@pytest.fixture
def stopped(monkeypatch):
    """Starts a run, interrupts it before an iteration, and gives its directory."""
    iterate = loop._iterate

    def start(config, directory, stop):
        def stopping(experiment, iteration, *more):
            if iteration == stop:
                raise KeyboardInterrupt
            return iterate(experiment, iteration, *more)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "_iterate", stopping)
            with pytest.raises(KeyboardInterrupt):
                run(config, directory)
        return directory

    return start


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_resumed_run_equals_the_run_that_never_stopped(whole, tmp_path, stopped, stop):
    directory = stopped(small(), tmp_path / "stopped", stop)
    assert_same_run(whole, run(small(), directory, resume=True))


@pytest.mark.slow
def test_resuming_shapes_is_exact(tmp_path, stopped):
    config = TrainConfig(
        num_steps=3,
        model_options=model_options("shapes", guidance_scale=3.0, lora_rank=2),
        agent_options=GRPOConfig(group_size=4, ema_decay=0.5),
        iterations=2,
        prompts_per_iteration=2,
        microbatch=4,
        checkpoint_every=1,
        eval_images_per_prompt=1,
        eval_every=1,
    )
    whole = run(config, tmp_path / "whole")
    directory = stopped(config, tmp_path / "stopped", 2)
    assert [row["iteration"] for row in deterministic(directory / "eval.csv")] == ["0", "1"]
    assert_same_run(whole, run(config, directory, resume=True))


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"changes seed \(now 1, was 0\); only iterations, .*tensorboard may change"),
        (
            {"agent_options": GRPOConfig(group_size=4, lr=1e-2, ema_decay=0.9)},
            r"changes agent\.kl_coef \(now .*\); only",
        ),
        ({"agent": "rloo", "agent_options": None}, r"agent\.clip_range \(now None, was .*agent\.name \(now 'rloo'"),
        ({"model": "points-flow"}, r"model.name \(now 'points-flow', was 'points'\)"),
        ({"rewards": {"points": 2.0}}, r"rewards\.points \(now 2\.0, was None\)"),
    ],
)
def test_a_resumed_run_keeps_its_configuration(whole, changes, message):
    before = contents(whole)
    with pytest.raises(ValueError, match=message):
        run(small(**{"iterations": 7, **changes}), whole, resume=True)
    assert contents(whole) == before


def test_a_resumed_run_may_go_on_for_longer_and_look_at_other_times(tmp_path):
    directory = run(small(iterations=2, eval_every=2), tmp_path / "run", report=False)
    longer = small(iterations=3, eval_every=1, sample_every=7, checkpoint_every=1, keep_checkpoints=1, tensorboard=True)
    run(longer, directory, resume=True, report=False)
    assert [row["iteration"] for row in deterministic(directory / "eval.csv")] == ["0", "2", "3"]
    assert json.loads((directory / "config.json").read_text())["iterations"] == 3


KILLED = """
import os, signal, sys
from pathlib import Path
from agents.training import checkpoints
from agents.training.experiment import build
from agents.training.loop import train
sys.path.insert(0, {tests!r})
from small_runs import small
sync, calls = checkpoints._sync, 0
def killing(path):
    global calls
    calls += 1
    if calls == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    sync(path)
if {call}:
    checkpoints._sync = killing
train(build(small(iterations={iterations})), Path({directory!r}), resume={resume})
"""


def in_process(directory, *, call=0, iterations=6, resume=False):
    code = KILLED.format(
        tests=str(Path(__file__).parent),
        call=call,
        iterations=iterations,
        directory=str(directory),
        resume=resume,
    )
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 3, 6, 9])
def test_killed_during_a_save(whole, tmp_path, call):
    """``call`` counts fsyncs: of config and versions, then of each part of each checkpoint."""
    process = in_process(tmp_path / "killed", call=call)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    run(small(), tmp_path / "killed", resume=True)
    assert_same_run(whole, tmp_path / "killed")
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*"))


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


def test_a_checkpoint_of_another_version_or_architecture_is_refused(tmp_path):
    directory = run(small(iterations=2), tmp_path / "run")
    with pytest.raises(checkpoints.CheckpointError, match="another architecture"):
        restore(build(small(model="points-flow")), directory / "checkpoints" / "000002")
    meta = directory / "checkpoints" / "000002" / "meta.json"
    meta.write_text(meta.read_text().replace(f'"version": {checkpoints.VERSION}', '"version": 99'))
    with pytest.raises(checkpoints.CheckpointError, match="version 99"):
        run(small(iterations=3), directory, resume=True)


def broken(images, prompts):
    raise RuntimeError("the scorer is down")


def half(images, prompts):
    scores = images[:, 0].clone()
    scores[::2] = torch.nan
    return scores


@pytest.mark.filterwarnings("ignore:the reward")
def test_a_run_whose_reward_fails_stops_with_the_reason(tmp_path):
    name = f"{__name__}:broken"
    config = small(rewards={name: 1.0})
    with pytest.raises(RuntimeError, match=r"8 of 8 images could not be scored.*the scorer is down"):
        run(config, tmp_path / "run")
    written = (tmp_path / "run" / "reward_errors.txt").read_text(encoding="utf-8")
    assert written.startswith(f"iteration 1, the reward {name!r}\nTraceback (most recent call last):\n")
    assert ", in broken\n" in written
    assert "the scorer is down" in written


def test_rows_that_cannot_be_scored_are_counted_and_left_out(tmp_path):
    config = small(rewards={f"{__name__}:half": 1.0}, iterations=2)
    directory = run(config, tmp_path / "run")
    assert [row["unscored"] for row in deterministic(directory / "metrics.csv")] == ["4", "4"]
    with pytest.raises(RuntimeError, match="max_unscored"):
        run(dataclasses.replace(config, max_unscored=0.4), tmp_path / "strict")


class Fails(PointsReward):
    """A reward that is down from its fourth rollout of 8 images on, until it is mended."""

    rollouts, mended = 0, False

    def __call__(self, images, prompts):
        Fails.rollouts += len(images) == 8
        if Fails.rollouts > 3 and not Fails.mended:
            raise RuntimeError("the scorer is down")
        return super().__call__(images, prompts)


@pytest.mark.filterwarnings("ignore:the reward")
def test_a_run_that_its_reward_ends_is_saved_and_continues_as_if_nothing_had_been(tmp_path):
    config = small(rewards={f"{__name__}:Fails": 1.0}, checkpoint_every=100, eval_every=0)
    told = r"what was trained before is saved\. Once the rewards can score, continue with: denoise-env train --resume "
    with pytest.raises(UnscoredError, match=told):
        run(config, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["000003"]
    Fails.mended = True
    assert_same_run(run(config, tmp_path / "run", resume=True), run(config, tmp_path / "whole"))


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
