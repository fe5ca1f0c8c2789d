"""The pages in docs/ are followed to the letter."""

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from agents.cli import main
from agents.critic import ActorCritic
from agents.trajectory import TrajectoryAgent
from denoise_env.rewards import load_reward

ROOT = Path(__file__).parents[1]


def blocks(page):
    """(language, file name, text) of every fenced block."""
    return re.findall(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.M | re.S)


def follow(page, directory):
    """Write a page's files and run its commands; what each block of commands printed."""
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PYTHONPATH": str(directory), "PATH": f"{scripts}:{os.environ['PATH']}"}
    printed = []
    for language, name, text in blocks(page):
        if language == "python":
            (directory / name).write_text(text)
            continue
        command = ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    return printed


@pytest.fixture
def clone(tmp_path):
    """The packages, as a clone has them."""
    for part in ("agents", "denoise_env"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.slow
def test_add_an_agent(clone):
    assert [language for language, *_ in blocks("add-an-agent.md")] == ["bash", "python", "bash", "bash"]
    printed = follow("add-an-agent.md", clone)
    assert "rank                     REINFORCE on ranks within the group." in printed[-1]
    for run in ("rank", "rank-again"):
        first, *_, last = (clone / "runs" / run / "eval.csv").read_text().splitlines()[1:]
        reward = [float(line.split(",")[2]) for line in (first, last)]
        assert reward[1] > reward[0] + 0.1
    assert (clone / "runs" / "rank" / "metrics.csv").read_text().splitlines()[-1].startswith("25,")


def test_the_hooks_of_an_agent_are_those_of_the_page():
    """Every hook in the page's table exists, and the agent that the page names as an example changes it."""
    page = (ROOT / "docs" / "add-an-agent.md").read_text(encoding="utf-8")
    hooks = re.findall(r"^\| `(\w+)\(.*?\)` \|", page, re.M)
    assert hooks == ["make_modules", "parameter_groups", "targets", "auxiliary_loss"]
    for hook in hooks:
        assert getattr(ActorCritic, hook) is not getattr(TrajectoryAgent, hook)


@pytest.mark.slow
def test_add_a_model(clone):
    before = {path: path.read_bytes() for path in clone.rglob("*.py")}
    described, evaluated = follow("add-a-model.md", clone)
    assert "4,675, of which 4,675 are trained" in described
    run = clone / "runs" / "colours"
    assert (run / "metrics.csv").read_text().splitlines()[-1].startswith("40,")
    assert (clone / "colours.png").read_bytes()[:4] == b"\x89PNG"
    assert "before_after.png" in {path.name for path in run.iterdir()}
    rewards = dict(re.findall(r"^(\S+) +my_model:red +(\d\.\d+)", evaluated, re.M))
    base, trained = (float(rewards[name]) for name in ("my_model:FAMILY", "my_model:FAMILY@runs/colours/export"))
    assert trained > base + 0.05
    written = {path: path.read_bytes() for path in clone.rglob("*.py")}
    assert written.keys() - before.keys() == {clone / "my_model.py"}
    assert all(written[path] == before[path] for path in before)
    # the page's last section: one file and one line
    shutil.move(clone / "my_model.py", clone / "denoise_env" / "models" / "colours.py")
    registry = clone / "denoise_env" / "models" / "__init__.py"
    line = '    "denoise_env.models.stable_diffusion:FAMILY",\n'
    registry.write_text(registry.read_text().replace(line, line + '    "denoise_env.models.colours:FAMILY",\n'))
    script = "from agents.cli import main; main(['list']); main(['describe', 'runs/colours/export'])"
    environment = {**os.environ, "PYTHONPATH": str(clone)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=True)
    assert "pictures of one random colour" in done.stdout
    assert "family                   colours" in done.stdout


@pytest.mark.slow
def test_bring_your_agent(capsys):
    found: dict = {}
    for language, _, text in blocks("bring-your-agent.md"):
        assert language == "python"
        exec(text, found)
    numbers = [float(x) for x in re.findall(r"\d+\.\d+", capsys.readouterr().out)]
    base, cem_first, cem_last, still, _, sb3, torchrl_first, torchrl_last = numbers
    assert base < 0.5
    assert cem_last > cem_first + 0.2
    assert cem_last > still + 0.2
    assert sb3 > base + 0.3
    assert torchrl_last > torchrl_first + 0.2


def test_add_a_reward(tmp_path, monkeypatch):
    (_, name, module), (_, _, command), (_, _, program) = blocks("add-a-reward.md")
    (tmp_path / name).write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command.replace("\\\n", ""))[1:]) == 0
    rows = list(csv.DictReader((tmp_path / "runs" / "own" / "eval.csv").open()))
    named = ["my_rewards:dark", "threshold(my_rewards:Shade(0.3), 0.8)", "shapes", "my_rewards:Edges()"]
    assert all(0 < float(rows[0][reward]) < 10 for reward in named)
    found: dict = {}
    exec(program, found)
    images = torch.tensor([0.1, 0.9])[:, None, None, None].expand(2, 3, 4, 4)
    prompts = found["mdp"].prompts
    shade, dark = (found["rewards"][reward](images, prompts).tolist() for reward in ("shade", "dark"))
    assert shade == pytest.approx([1.0, 0.6])
    assert dark == pytest.approx([0.9, 0.1])
    assert load_reward("my_rewards:Edges")(torch.rand(2, 3, 8, 8), prompts).shape == (2,)


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_the_files_a_page_names_exist(page):
    text = (ROOT / "docs" / page).read_text()
    named = re.findall(r"`((?:examples|benchmarks|agents|denoise_env)/[\w/.-]+)`", text)
    for path in named + [link.removeprefix("../") for link in re.findall(r"\]\((\.\./[\w/.]+)\)", text)]:
        assert (ROOT / path).exists(), path
