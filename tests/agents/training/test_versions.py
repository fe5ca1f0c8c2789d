"""What a run writes down about its starts."""

import importlib.util
import json
import shutil
import subprocess

import pytest
from small_runs import run, small

from agents.training import versions


def test_every_start_is_kept(tmp_path):
    directory = tmp_path / "run"
    run(small(iterations=2), directory, command=["denoise-env", "train", "a b"])
    run(small(iterations=3), directory, command=["denoise-env", "train", "--resume"], resume=True)
    run(small(iterations=4), directory, command=["third"], resume=True)
    about = json.loads((directory / "versions.json").read_text())
    assert about["command"] == "denoise-env train 'a b'"
    assert [later["command"] for later in about["resumed"]] == ["denoise-env train --resume", "third"]
    assert about["torch"] == about["resumed"][0]["torch"] != "not installed"


def test_the_commit_is_recorded_where_there_is_one(tmp_path):
    def git(*line):
        options = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *options, *line], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    def commit():
        spec = importlib.util.spec_from_file_location("copied", tmp_path / "versions.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.write_versions(tmp_path / "v.json", [], {})
        return json.loads((tmp_path / "v.json").read_text())["commit"]

    shutil.copy(versions.__file__, tmp_path / "versions.py")
    assert commit() is None
    git("init", "-q")
    assert commit() is None  # somebody else's repository, in which this file is not
    git("add", "versions.py")
    git("commit", "-q", "-m", "first")
    assert commit() == git("rev-parse", "HEAD")
    (tmp_path / "versions.py").write_text((tmp_path / "versions.py").read_text() + "\n")
    assert commit() == git("rev-parse", "HEAD") + "-dirty"


def test_other_prompts_are_refused_by_their_content(tmp_path):
    directory = tmp_path / "run"
    (tmp_path / "a.txt").write_text("ring\nline\n")
    config = small(iterations=2, prompts=str(tmp_path / "a.txt"), eval_prompts=str(tmp_path / "a.txt"))
    run(config, directory)
    (tmp_path / "a.txt").write_text("ring\ngrid\n")
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="the training prompts have changed since the run began"):
        run(small(**{**vars(config), "iterations": 3}), directory, resume=True)
    assert before == {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("text", ["", "[]", "null", '{"resumed": 3}', '{"prompts": []}'])
def test_a_damaged_file_is_named(tmp_path, text):
    directory = tmp_path / "run"
    run(small(iterations=2), directory)
    (directory / "versions.json").write_text(text)
    with pytest.raises(ValueError, match=r"versions\.json is damaged"):
        run(small(iterations=3), directory, resume=True)
