"""The pages in docs/ are followed to the letter."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks(page):
    """(language, file name, text) of every fenced block."""
    return re.findall(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.M | re.S)


@pytest.mark.slow
def test_add_an_agent(tmp_path):
    for part in ("agents", "denoise_env"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PATH": f"{scripts}:{os.environ['PATH']}"}
    found = blocks("add-an-agent.md")
    assert [language for language, *_ in found] == ["bash", "python", "bash", "bash"]
    printed = []
    for language, name, text in found:
        if language == "python":
            assert (tmp_path / name).exists()  # copied by the step before
            (tmp_path / name).write_text(text)
            continue
        command = ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert "rank                     REINFORCE on ranks within the group." in printed[-1]
    for run in ("rank", "rank-again"):
        first, *_, last = (tmp_path / "runs" / run / "eval.csv").read_text().splitlines()[1:]
        reward = [float(line.split(",")[2]) for line in (first, last)]
        assert reward[1] > reward[0] + 0.1
    assert (tmp_path / "runs" / "rank" / "metrics.csv").read_text().splitlines()[-1].startswith("25,")


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


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_the_files_a_page_names_exist(page):
    text = (ROOT / "docs" / page).read_text()
    named = re.findall(r"`((?:examples|benchmarks|agents|denoise_env)/[\w/.-]+)`", text)
    for path in named + [link.removeprefix("../") for link in re.findall(r"\]\((\.\./[\w/.]+)\)", text)]:
        assert (ROOT / path).exists(), path
