"""The examples run as they are, made short."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(monkeypatch, name, *arguments, **options):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    return runpy.run_path(str(EXAMPLES / name), **options)


@pytest.mark.parametrize("env", ["Points-v0", "Shapes-v0", "ShapesFlux-v0", "ShapesVideo-v0", "ShapesI2V-v0"])
def test_stepping_by_hand(monkeypatch, capsys, tmp_path, env):
    picture = tmp_path / "film.png"
    found = run(
        monkeypatch, "step_by_hand.py", "--env", env, "--rows", "2", "--num-steps", "3", "--output", str(picture)
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "step 2: " in capsys.readouterr().out
    # the TorchRL half has the same seeds and the same noise as the Gymnasium half
    rollout = found["rollout"]
    assert float(rollout["next", "reward"][:, -1].mean()) == pytest.approx(float(found["reward"].mean()), abs=1e-5)


def test_ppo_in_a_single_file(monkeypatch, capsys):
    run(monkeypatch, "ppo_single_file.py", "--episodes", "1280", "--num-steps", "4", run_name="__main__")
    before, after = (float(line.split()[1]) for line in capsys.readouterr().out.splitlines()[::2])
    assert after > before + 0.2


@pytest.mark.slow
def test_training_without_the_loop(monkeypatch, capsys):
    run(monkeypatch, "train_grpo.py", "--iterations", "1")
    printed = capsys.readouterr().out
    assert printed.startswith("before {'shapes': 0.")
    assert "after  {'shapes': 0." in printed
