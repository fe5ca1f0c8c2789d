"""Whatever is typed, put in a file or pointed at: a sentence, status 2 and nothing changed."""

import json
import os
import subprocess
import sys

import pytest

from agents import cli
from agents.training.config import TrainConfig
from agents.training.logging import Logger

TINY = ["--preset", "points", "--iterations", "1", "--agent.group-size", "2", "--eval-images-per-prompt", "1"]
OWN = {
    "syntax": "def reward(:\n",
    "raising": "raise KeyError('x')\n",
    "leaving": "raise SystemExit(3)\n",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with modules of one's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name, text in OWN.items():
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def files(here):
    """What lies there, and when its files were last written; a lock comes and goes."""
    found = [path for path in here.rglob("*") if "__pycache__" not in path.parts]
    return {path: path.stat().st_mtime_ns if path.is_file() else None for path in found}


def refused(capsys, here, *line):
    """The sentence with which a command line is refused."""
    before = files(here)
    capsys.readouterr()
    assert cli.main([*line]) == 2
    assert files(here) == before
    error = capsys.readouterr().err
    assert error.startswith("denoise-env: ")
    assert "Traceback" not in error
    return error


@pytest.fixture
def run(here):
    assert cli.main(["train", *TINY, "--output-dir", "run"]) == 0
    return here / "run"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must hold an object"),
        ("3", "must hold an object"),
        ('"points"', "must hold an object"),
        ("[" * 100_000, "cannot read the configuration 'own.json'"),
        ('{"iteratoins": 3}', "no setting 'iteratoins'; did you mean 'iterations'?"),
        ('{"help": true}', "no setting 'help'"),
        ('{"tyro-write-completion": ["bash", "x"]}', "no setting 'tyro-write-completion'"),
        ('{"resume": "x"}', "no setting 'resume'"),
        ('{"iterations": {}}', "iterations must be a value, not a table"),
        ('{"agent": {"lr": {"a": 1}}}', "agent.lr must be a value, not a table"),
        ('{"rewards": {"-x": 1.0}}', "rewards cannot hold '-x'"),
        ('{"preset": "pionts"}', "did you mean 'points'?"),
        ('{"agent": null}', "unknown agent 'None'"),
    ],
)
def test_a_settings_file(here, capsys, text, message):
    (here / "own.json").write_text(text)
    assert message in refused(capsys, here, "train", "--config", "own.json")


@pytest.mark.parametrize("target", ["..a:b", ":b", "a:", ".:b", "syntax:reward", "raising:reward", "leaving:reward"])
def test_a_module_that_cannot_be_imported(here, capsys, target):
    assert repr(target) in refused(capsys, here, "train", *TINY, "--rewards", target, "1.0")
    assert repr(target) in refused(capsys, here, "train", *TINY, "--agent", target)
    assert repr(target) in refused(capsys, here, "eval", "--rewards", "points", "--", target)


def test_an_abstract_agent(here, capsys):
    told = refused(capsys, here, "train", *TINY, "--agent", "agents.base:Agent")
    assert "is abstract: it lacks example_loss, examples" in told


def test_an_agent_without_settings(here, capsys):
    (here / "bare.py").write_text("from agents.grpo import GRPO\nclass Bare(GRPO):\n    config_type = int\n")
    assert "must be a subclass of agents.base.AgentConfig" in refused(
        capsys, here, "train", *TINY, "--agent", "bare:Bare"
    )


@pytest.mark.parametrize(
    "text", ["no,such\ntable,1\n", "iteration\n1.5\n", '"\n', "iteration,images\n0,x\n", "\x00\n\x00\n"]
)
def test_a_damaged_table(run, here, capsys, text):
    (run / "eval.csv").write_text(text)
    assert "eval.csv is damaged" in refused(capsys, here, "train", "--resume", "run", "--iterations", "2")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["sample", "points", "--images-per-prompt", "0"], "--images-per-prompt must lie in [1, 1,000]"),
        (["sample", "points", "--images-per-prompt", "1000000"], "--images-per-prompt must lie in [1, 1,000]"),
        (["eval", "points", "--images-per-prompt", "0"], "--images-per-prompt must lie in [1, "),
        (["sample", "points", "--output", "x.xyz"], "picture format"),
        (["sample", "points", "--output", "syntax.py/x.png"], "is no directory"),
        (["eval", "points", "--json", "."], "is a directory"),
        (["eval", "points", "--json", ""], "is a directory"),
        (["train", "--preset", "points", "--device", "tpu"], "the device 'tpu' cannot be used"),
        (["train", "--preset", "points", "--device", "meta"], "the device 'meta' cannot be used"),
        (["train", "--preset", "points", "--device", "privateuseone"], "the device 'privateuseone' cannot be used"),
        (["train", "--preset", "points", "--device", ""], "the device '' cannot be used"),
        (["describe", "points", "--num-steps", "-3"], "--num-steps must be at least 1"),
        (["train", "--resume", ""], "--resume needs the directory of a run"),
        (["train", "--config", ""], "cannot read the configuration ''"),
        (["train", "--preset", ""], "unknown preset ''"),
        (["train", "--model", ""], "''"),
    ],
)
def test_an_option(here, capsys, line, message):
    assert message in refused(capsys, here, *line)


@pytest.mark.parametrize("flag", ["--preset", "--config"])
def test_where_a_configuration_comes_from_beside_resume(run, here, capsys, flag):
    assert f"{flag} does not go with --resume" in refused(capsys, here, "train", "--resume", "run", flag, "points")


def test_a_prompt_file_that_begins_with_a_dash_survives_its_configuration(here, capsys):
    (here / "-p.txt").write_text("ring\nline\n")
    assert cli.main(["train", *TINY, "--prompts=-p.txt", "--output-dir=-run"]) == 0
    assert json.loads((here / "-run" / "config.json").read_text())["prompts"] == "-p.txt"
    assert cli.main(["train", "--resume=-run", "--iterations", "2"]) == 0


@pytest.mark.parametrize(("name", "encoding"), [("p.txt", "utf-16"), ("p.jsonl", "utf-16"), ("p.csv", "latin-1")])
def test_a_prompt_file_that_does_not_decode(here, capsys, name, encoding):
    (here / name).write_text("prompt\nfünf\n", encoding=encoding)
    for flag in ("--prompts", "--eval-prompts"):
        assert f"{name}, line" in refused(capsys, here, "train", *TINY, flag, name)


def test_a_prompt_file_that_has_changed(here, capsys):
    (here / "p.txt").write_text("ring\nline\n")
    assert cli.main(["train", *TINY, "--prompts", "p.txt", "--eval-prompts", "points", "--output-dir", "run"]) == 0
    (here / "p.txt").write_text("ring\n\nline\n")
    assert cli.main(["train", "--resume", "run", "--iterations", "2"]) == 0
    (here / "p.txt").write_text("line\nring\n")
    told = refused(capsys, here, "train", "--resume", "run", "--iterations", "3")
    assert "the training prompts have changed" in told


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_folder_is_no_package(here, capsys, monkeypatch, name):
    """Weights & Biases leaves a folder of its name in the working directory."""
    (here / name).mkdir()
    for module in [module for module in sys.modules if name in module.split(".") and "agents" not in module]:
        monkeypatch.delitem(sys.modules, module)
    config = TrainConfig(model="points", **{name: True})
    monkeypatch.setattr(sys, "path", [str(here), *(path for path in sys.path if "site-packages" not in path)])
    with pytest.raises(ValueError, match=f"{name} is not installed.*pip install {name}"):
        Logger(here / "run", config)
    for module in [module for module in sys.modules if name in module.split(".")]:
        del sys.modules[module]


def test_a_thousand_runs(here, capsys):
    for n in range(1, 1001):
        directory = here / "runs" / f"points-seed0{'' if n == 1 else f'-{n}'}"
        directory.mkdir(parents=True)
        (directory / "config.json").write_text("{}")
    assert cli.main(["train", *TINY]) == 0
    assert (here / "runs" / "points-seed0-1001" / "report.html").exists()


def test_a_working_directory_that_is_gone(tmp_path):
    (tmp_path / "gone").mkdir()
    script = "import os; os.rmdir(os.getcwd()); from agents.cli import main; main(['--help'])"
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path / "gone", env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_a_bug_is_a_sentence_and_its_traceback_is_kept(here, capsys, monkeypatch):
    from agents.commands import catalogue

    def run(options):
        raise KeyError("oh")

    monkeypatch.setattr(catalogue, "run", run)
    monkeypatch.setattr("tempfile.tempdir", str(here))
    assert cli.main(["list"]) == 3
    told = capsys.readouterr().err
    assert "KeyError: 'oh'" in told
    assert "Traceback" not in told
    (kept,) = here.glob("denoise-env-*.txt")
    assert str(kept) in told
    assert "Traceback" in kept.read_text()
    assert cli.main(["list", "-v"]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_v_shows_the_traceback_of_a_refusal(here, capsys):
    assert cli.main(["train", "-v", *TINY, "--rewards", "raising:reward", "1.0"]) == 2
    told = capsys.readouterr().err
    assert 'raising.py", line 1' in told
    assert told.splitlines()[-1].startswith("denoise-env: cannot load the reward 'raising:reward'")


def test_a_flag_without_a_value(here, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["describe", "points", "--num-steps=--"])
    assert stopped.value.code == 2
    assert "--num-steps=-- has no value" in capsys.readouterr().err
