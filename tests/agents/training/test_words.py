"""Words of a user's own in a run: dollar signs, markup, emoji, right-to-left text; and a locale without UTF-8."""

import json
import os
import subprocess
import sys
import textwrap
import warnings

import pytest
from small_runs import run, small

WORDS = [
    "$\\frac{",
    "a_b $x_{1}$ 5$",
    "<script>alert(1)</script> & co",
    "a cat 🐈 and a 🐕",
    "חתול אדום",
    'it\'s "quoted"',
]
FAMILY = '''
import torch
from tensordict import TensorDict
from denoise_env.models.base import Family, ModelOptions
from denoise_env.models.points import Points


class WordOptions(ModelOptions):
    family = "words"


class Words(Points):
    """Points that take any text for the first mixture."""

    vocabulary = None

    def encode(self, prompts):
        return TensorDict({"prompt_id": torch.zeros(len(prompts), dtype=torch.long)}, batch_size=len(prompts))


FAMILY = Family("takes any words", WordOptions, lambda c, o, device: Words(device=device), preset="points")


def left(images, prompts):
    return -images[:, 0]


globals()["$<left>_🐈"] = left
'''


def make_family(tmp_path, monkeypatch):
    (tmp_path / "own_words.py").write_text(FAMILY, encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("\n".join(WORDS), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)


def test_any_words_can_be_prompts_and_names_of_rewards(tmp_path, monkeypatch):
    make_family(tmp_path, monkeypatch)
    config = small(
        model="own_words:FAMILY",
        rewards={"own_words:$<left>_🐈": 1.0},
        prompts=str(tmp_path / "prompts.txt"),
        iterations=1,
        eval_images_per_prompt=2,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        directory = run(config, tmp_path / "run")
    page = (directory / "report.html").read_text(encoding="utf-8")
    assert "<bdi>own_words:$&lt;left&gt;_🐈</bdi>" in page
    assert "<left>" not in page
    assert "<script>alert" not in page
    assert (directory / "before_after.png").read_bytes()[:4] == b"\x89PNG"
    assert (directory / "samples" / "prompts.txt").read_text(encoding="utf-8").splitlines() == WORDS


@pytest.mark.slow
def test_commands_work_without_utf8(tmp_path, monkeypatch):
    make_family(tmp_path, monkeypatch)
    script = """
        from agents.cli import main
        train = ["train", "--model", "own_words:FAMILY", "--rewards", "own_words:left", "1", "--prompts", "prompts.txt"]
        settings = ["--iterations", "1", "--num-steps", "2", "--agent.group-size", "2", "--prompts-per-iteration", "2"]
        evaluation = ["--eval-images-per-prompt", "2", "--output-dir", "run", "--microbatch", "4"]
        assert main([*train, *settings, *evaluation]) == 0
        looked_at = ["own_words:FAMILY", "--prompts", "prompts.txt", "--images-per-prompt", "2", "--num-steps", "2"]
        assert main(["eval", *looked_at, "--rewards", "own_words:left", "--json", "table.json"]) == 0
        assert main(["sample", *looked_at]) == 0
        assert main(["list"]) == 0
    """
    environment = {
        **os.environ,
        "PYTHONUTF8": "0",
        "LC_ALL": "C",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"row 4: a cat \\U0001f408" in done.stdout
    assert "own_words:FAMILY" in json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert (tmp_path / "run" / "samples" / "prompts.txt").read_text(encoding="utf-8").splitlines() == WORDS
