"""Another package called ``agents`` in front of ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import denoise_env


@pytest.fixture
def elsewhere(tmp_path):
    """A folder with a package ``agents`` of somebody else's."""
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "__init__.py").touch()
    return tmp_path


def run(folder, *arguments):
    """A process in a folder, where Python looks first."""
    environment = {**os.environ, "PYTHONPATH": str(Path(denoise_env.__file__).parents[1])}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_import_says_what_is_hidden_by_what(elsewhere):
    found = run(elsewhere, "-c", "import denoise_env")
    assert found.returncode == 0
    assert found.stderr.count(f"finds {elsewhere / 'agents'}, which hides denoise_env's own package") == 1
    (elsewhere / "agents" / "__init__.py").unlink()
    (elsewhere / "agents").rmdir()
    assert "hides" not in run(elsewhere, "-c", "import denoise_env").stderr


def test_the_command_stops_with_a_sentence(elsewhere):
    found = run(elsewhere, "-W", "ignore", "-m", "denoise_env", "list")
    assert found.returncode == 2
    assert found.stderr.startswith(f"denoise-env: `import agents` finds {elsewhere / 'agents'}")
    assert len(found.stderr.splitlines()) == 1
