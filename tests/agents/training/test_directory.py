"""A run's directory has one writer, holds nothing of anybody else's, and leads nowhere else."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import run, small

from agents import cli
from agents.grpo import GRPOConfig
from agents.training import checkpoints, directory, experiment, loop
from agents.training.directory import claim
from agents.training.experiment import build
from agents.training.resuming import resume_command

HOLD = """
import sys
from pathlib import Path
from agents.training.directory import claim
with claim(Path(sys.argv[1]), numbered="numbered" in sys.argv) as found:
    print(found, flush=True)
    sys.stdin.read()
"""


def holding(path, *words):
    """A process that holds a directory until its input ends."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", HOLD, str(path), *words], **pipes)


def names(path):
    return sorted(p.name for p in path.iterdir())


def contents(path):
    return {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_a_second_writer_is_told_who_the_first_is_and_the_lock_dies_with_it(tmp_path):
    path = tmp_path / "run"
    other = holding(path)
    assert other.stdout.readline().strip() == str(path)
    with pytest.raises(FileExistsError, match=rf"run is being written by process {other.pid} on \S+: wait"):
        run(small(), path, resume=True)
    assert names(path) == [".lock"]
    other.kill()
    other.wait()
    with claim(path):
        pass
    assert names(path) == []


def test_a_run_that_is_going_on_refuses_a_second_one(tmp_path, monkeypatch):
    seen = []

    def twice(experiment, iteration, *more):
        for resume in (False, True):
            with pytest.raises(FileExistsError, match=f"written by process {os.getpid()} on"):
                run(small(), tmp_path / "run", resume=resume)
        seen.append(iteration)
        return iterate(experiment, iteration, *more)

    iterate = loop._iterate
    monkeypatch.setattr(loop, "_iterate", twice)
    run(small(iterations=1), tmp_path / "run", report=False)
    assert seen == [1]
    assert ".lock" not in names(tmp_path / "run")


@pytest.mark.slow
def test_default_names_are_given_to_one_start_each(tmp_path):
    (tmp_path / "runs" / "points-2").mkdir(parents=True)
    starts = [holding(tmp_path / "runs" / "points", "numbered") for _ in range(6)]
    found = {Path(start.stdout.readline().strip()).name for start in starts}
    for start in starts:
        start.communicate()
    assert found == {"points", *(f"points-{n}" for n in range(3, 8))}
    assert names(tmp_path / "runs") == ["points-2"]  # nothing was begun in the others


def test_a_directory_that_cannot_be_locked_is_said_so(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(directory.fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="cannot be locked .No locks available"), claim(tmp_path / "run"):
        pass


def test_a_directory_with_anything_in_it_is_refused_untouched(tmp_path):
    for name in ("thesis.txt", "checkpoints/000001/mine", "metrics.csv"):
        path = tmp_path / name.partition("/")[0] / "run"
        (path / name).parent.mkdir(parents=True)
        (path / name).write_text("mine")
        for resume in (False, True):
            with pytest.raises(FileExistsError, match=rf"not empty, it holds {name.partition('/')[0]}: a run wants"):
                run(small(iterations=1), path, resume=resume)
        assert contents(path) == {path / name: b"mine"}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is not a directory"):
        run(small(iterations=1), tmp_path / "file")
    (tmp_path / "empty").mkdir()
    run(small(iterations=1), tmp_path / "empty", report=False)


def test_a_start_that_fails_leaves_no_directory(tmp_path, monkeypatch):
    def fails(folder, config):
        (folder / "wandb").mkdir()
        raise RuntimeError("no login")

    monkeypatch.setattr(loop, "Logger", fails)
    with pytest.raises(RuntimeError, match="no login"):
        run(small(iterations=1), tmp_path / "run")
    assert names(tmp_path) == []


def checkpoint(path, *others):
    path.mkdir(parents=True)
    for name in ("state.safetensors", "meta.json", *others):
        (path / name).write_text("")


def test_only_a_runs_own_checkpoints_are_counted_and_removed(tmp_path):
    saved = tmp_path / "checkpoints"
    for name in ("000002", "000004", "999999", "1000000", "10000000"):
        checkpoint(saved / name)
    checkpoint(saved / "000006", "notes.txt")
    for name in ("0000008", "000004.bak", "000004-best", "12", "best", "-00001", "٠٠٠٠٠٧", "20000000000000000000"):
        checkpoint(saved / name)
    checkpoint(tmp_path / "elsewhere")
    (saved / "000001").symlink_to(tmp_path / "elsewhere")
    (saved / "000003").write_text("a file")
    (saved / ".000005.tmp").mkdir()
    (saved / ".mine.tmp").mkdir()
    before = set(names(saved))
    assert checkpoints.latest(saved).name == "10000000"
    checkpoints.prune(saved, 2)
    assert before - set(names(saved)) == {"000002", "000004", "999999", ".000005.tmp"}
    assert names(tmp_path / "elsewhere") == ["meta.json", "state.safetensors"]
    assert checkpoints.latest(tmp_path / "nowhere") is None


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(small(iterations=2), tmp_path_factory.mktemp("runs") / "run", report=False)


@pytest.mark.parametrize("name", ["export", "checkpoints", "samples", "metrics.csv", ".config.json.tmp", "a/b"])
def test_a_link_out_of_the_run_is_refused(finished, tmp_path, name):
    copied, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(finished, copied)
    outside.mkdir()
    link = copied / name
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(outside if name in ("export", "checkpoints", "samples") else outside / "file")
    before = contents(copied)
    with pytest.raises(ValueError, match=f"{name} is a link that leads out of the run's directory"):
        run(small(iterations=3), copied, resume=True)
    assert contents(copied) == before
    assert names(outside) == []


def test_a_link_inside_the_run_is_none_out_of_it(finished, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(finished, copied)
    (copied / "latest").symlink_to("checkpoints")
    run(small(iterations=3), copied, resume=True, report=False)
    assert (copied / "checkpoints" / "000003").is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": 2**63}, "seed must be at most 9,223,372,036,854,775,807"),
        ({"seed": 1.0}, "seed must be a whole number, not 1.0"),
        ({"eval_seed": -5}, "eval_seed must be at least 0"),
        ({"iterations": True}, "iterations must be a whole number, not True"),
        ({"iterations": 10**10}, "iterations must be at most 1,000,000,000, not 10,000,000,000"),
        ({"eval_every": -1}, "eval_every must be at least 0"),
        ({"sample_every": -1}, "sample_every must be at least 0"),
        ({"eval_points": -1}, "eval_points must be at least 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
        ({"prompts_per_iteration": 10**7}, "prompts_per_iteration must be at most 1,000,000"),
        ({"prompts_per_iteration": 10**6}, None),
        ({"eval_images_per_prompt": 10**9}, "eval_images_per_prompt must be at most 1,000,000"),
        ({"eval_images_per_prompt": 10**6}, None),
        ({"prompts_per_iteration": 10**6, "agent_options": GRPOConfig(group_size=100)}, "a rollout of 100,000,000 im"),
        ({"microbatch": 0}, "microbatch must be at least 1"),
        ({"microbatch": 2.0}, "microbatch must be a whole number"),
        ({"network_budget": 0}, "network_budget must be at least 1"),
        ({"network_budget": 10**16}, "network_budget must be at most"),
        ({"num_steps": 10**7}, "num_steps must be at most"),
        ({"max_unscored": 1.5}, r"max_unscored must lie in \[0, 1\], not 1.5"),
        ({"max_unscored": float("nan")}, "max_unscored must lie"),
        ({"conditioning_host_gib": -1.0}, "conditioning_host_gib must lie"),
        ({"conditioning_device_gib": float("nan")}, "conditioning_device_gib must lie"),
        ({"agent_options": GRPOConfig(group_size=10**7)}, "group_size must be at most 1,000,000"),
        ({"agent_options": GRPOConfig(group_size=4, epochs=10**9)}, "epochs must be at most 1,000,000"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused_before_there_is_a_directory(tmp_path, changes, message):
    if message is None:
        build(small(**changes))
        return
    with pytest.raises(ValueError, match=message):
        run(small(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_evaluation_too_large_to_be_meant_is_refused(monkeypatch):
    monkeypatch.setattr(experiment, "MOST_IMAGES", 23)
    with pytest.raises(ValueError, match="an evaluation of 24 images cannot be meant: at most 23 are taken"):
        build(small())


def test_a_model_seed_is_a_seed():
    config = small()
    config.model_options.seed = -1
    with pytest.raises(ValueError, match="the model's seed must be at least 0"):
        build(config)


FAST = ["--preset", "points", "--iterations", "1", "--agent.group-size", "4", "--eval-images-per-prompt", "2"]
OWN = """
from pathlib import Path
Path({marker!r}).write_text("imported")
from agents.grpo import GRPO
class Mine(GRPO): pass
def left(images, prompts): return -images[:, 0]
from denoise_env.models.points import FAMILY
"""


@pytest.fixture
def stranger(finished, tmp_path, monkeypatch):
    """A run directory that names code in the working directory, and whether the code has been imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    marker = tmp_path / "marker"
    Path("strange_code.py").write_text(OWN.format(marker=str(marker)))

    def make(change):
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree(finished, "run")
        config = json.loads(Path("run/config.json").read_text())
        change(config)
        Path("run/config.json").write_text(json.dumps(config))
        sys.modules.pop("strange_code", None)
        marker.unlink(missing_ok=True)
        return marker

    return make


CHANGES = {
    "strange_code:Mine": lambda config: config["agent"].update(name="strange_code:Mine"),
    "strange_code:FAMILY": lambda config: config["model"].update(name="strange_code:FAMILY"),
    "strange_code:left": lambda config: config.update(rewards={"strange_code:left": 1.0}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_runs_code_is_not_imported_unless_it_is_allowed(stranger, capsys, name):
    for command in (["train", "--resume", "run"], ["eval", "run"], ["sample", "run"]):
        imported = stranger(CHANGES[name])
        assert cli.main(command) == 2
        error = capsys.readouterr().err
        assert f"the run in run names {name}: that would be imported" in error
        assert "--trust" in error
        assert not imported.exists()
    cli.main(["eval", "run", "--images-per-prompt", "2", "--trust"])
    assert imported.exists()


def test_measured_rewards_and_dotted_keys_are_code_too(stranger, capsys):
    for change in (
        lambda config: config.update(eval_rewards=["strange_code:left"]),
        lambda config: config.update({"agent.name": "strange_code:Mine"}),
        lambda config: config.update({"model.name": "strange_code:FAMILY"}),
        lambda config: config.update(agent="strange_code:Mine"),
        lambda config: config.update(eval_rewards=["points", "--agent", "strange_code:Mine"]),
    ):
        imported = stranger(change)
        assert cli.main(["train", "--resume", "run"]) == 2
        assert not imported.exists(), capsys.readouterr().err


def test_code_that_is_named_again_is_allowed_and_the_way_to_resume_says_trust(stranger, monkeypatch):
    monkeypatch.setattr(loop, "write_report", lambda directory: None)
    imported = stranger(lambda config: None)
    assert cli.main(["train", *FAST, "--agent", "strange_code:Mine", "--output-dir", "own"]) == 0
    assert imported.exists()
    assert cli.main(["train", "--resume", "own"]) == 2
    assert cli.main(["train", "--resume", "own", "--agent", "strange_code:Mine"]) == 0
    assert cli.main(["train", "--resume", "own", "--trust"]) == 0
    config = small(agent="strange_code:Mine", agent_options=GRPOConfig())
    assert resume_command(Path("a b"), config) == "denoise-env train --resume 'a b' --trust"


def test_the_working_directory_comes_last_for_imports(tmp_path):
    (tmp_path / "tqdm.py").write_text("raise SystemExit('the file in the working directory')")
    (tmp_path / "mine.py").write_text("")
    code = """
import contextlib, sys
from agents import cli
sys.argv[1:] = ["--help"]
with contextlib.suppress(SystemExit):
    cli.main()
import mine, tqdm
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
