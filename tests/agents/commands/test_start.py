"""What the command line tells of a run."""

import io
import json
import math
import re
import subprocess
import sys

import pytest

from agents import cli
from agents.commands import output, settings

TINY = ["--iterations", "3", "--agent.group-size", "2", "--eval-images-per-prompt", "1", "--num-steps", "4"]


def test_a_run_says_what_it_is_and_costs(tmp_path, capsys):
    directory = tmp_path / "run"
    line = ["train", "--model", "points-flow", *TINY, "--prompts-per-iteration", "3", "--eval-every", "2"]
    assert cli.main([*line, "--output-dir", str(directory)]) == 0
    printed = capsys.readouterr().out
    assert "preset points, which goes with points-flow; --preset chooses another" in printed
    assert "model points-flow: latents 2, float32, on cpu" in printed
    assert "agent grpo: 3 iterations; each draws 6 images in 4 steps, 24 network calls" in printed
    assert "3 evaluations of 6 images, 24 network calls each" in printed
    calls = int(
        (directory / "metrics.csv").read_text().splitlines()[-1].split(",")[_column(directory, "network_calls")]
    )
    assert f"about {calls + 3 * 24:,} network calls in all" in printed
    assert re.search(r"iteration 1 took [\d,]+ network calls and \d", printed)
    assert cli.main(["train", "--resume", str(directory), "--iterations", "4"]) == 0
    assert "iteration 4 took" in capsys.readouterr().out


def _column(directory, name):
    return (directory / "metrics.csv").read_text().splitlines()[0].split(",").index(name)


def test_a_named_preset_is_told_as_named(tmp_path, capsys):
    assert cli.main(["train", "--preset", "points", *TINY, "--output-dir", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "preset points"


def test_a_preset_in_a_settings_file(tmp_path, capsys):
    file = tmp_path / "settings.toml"
    file.write_text('preset = "points"\niterations = 2\n[agent]\ngroup_size = 2\n')
    line = ["train", "--config", str(file), "--num-steps", "4", "--eval-images-per-prompt", "1"]
    assert cli.main([*line, "--output-dir", str(tmp_path / "run")]) == 0
    config = settings.run_config(tmp_path / "run")
    assert (config.model, config.iterations, config.agent_options.group_size, config.agent_options.lr) == (
        "points",
        2,
        2,
        3e-3,
    )
    assert cli.main([*line, "--preset", "pionts"]) == 2  # what is typed comes after the file
    assert "did you mean 'points'" in capsys.readouterr().err


def test_tables_are_strict_json(tmp_path):
    file = tmp_path / "new" / "table.json"
    assert (
        cli.main(["eval", "points", "--images-per-prompt", "1", "--prompts", _one(tmp_path), "--json", str(file)]) == 0
    )

    def refuse(constant):
        raise AssertionError(constant)

    figures = json.loads(file.read_text(), parse_constant=refuse)["points"]
    assert figures["kl"] is None
    assert isinstance(figures["points"], float)
    output.write_json(str(file), {"a": {"b": math.inf, "c": [1]}})
    assert json.loads(file.read_text()) == {"a": {"b": None, "c": [1]}}


def _one(tmp_path):
    (tmp_path / "one.txt").write_text("ring\n")
    return str(tmp_path / "one.txt")


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_terminal_that_lacks_characters(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ünï.txt").write_text("ring\n")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, name, stream)
    line = ["eval", "points", "--images-per-prompt", "1", "--prompts"]
    assert cli.main([*line, "ünï.txt"]) == 0
    assert cli.main([*line, "nö.txt"]) == 2
    stream.flush()
    assert stream.buffer.getvalue().isascii()


def test_a_closed_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["eval", "points", "--images-per-prompt", "1"]) == 0


def test_help_comes_at_once():
    """In a process of its own, and less than two seconds of work by this process's clock."""
    for line in (["--help"], ["train", "--help"], ["eval", "--help"], ["sample", "--help"], ["describe", "--help"]):
        script = "import sys, time; from agents.cli import main\ntry: main(sys.argv[1:])\n"
        script += "finally: print('torch' in sys.modules, time.process_time())"
        done = subprocess.run([sys.executable, "-c", script, *line], capture_output=True, text=True, check=False)
        heavy, seconds = done.stdout.split()[-2:]
        assert heavy == "False"
        assert float(seconds) < 2
