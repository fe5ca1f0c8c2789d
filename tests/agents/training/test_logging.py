"""What Weights & Biases is given."""

import sys
import types

import pytest
import torch
from PIL import Image
from small_runs import run, small

from agents.training.logging import Logger
from agents.training.pictures import grid


@pytest.fixture
def wandb(monkeypatch):
    """Stands in for the package; ``begun`` has what ``init`` was called with."""
    module = types.ModuleType("wandb")
    module.begun = []
    module.init = lambda **options: module.begun.append(options)
    module.log = lambda figures, step: None
    module.Image = str
    module.finish = lambda: None
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def test_a_run_has_an_id_of_its_own_and_keeps_it(tmp_path, wandb):
    for name in ("a", "b"):
        run(small(iterations=1, wandb=True), tmp_path / name / "run", report=False)
    run(small(iterations=2, wandb=True), tmp_path / "a" / "run", report=False, resume=True)
    first, other, again = (options["id"] for options in wandb.begun)
    assert first == again != other


def test_the_project_is_the_environments(tmp_path, wandb, monkeypatch):
    run(small(iterations=1, wandb=True), tmp_path / "a", report=False)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    run(small(iterations=1, wandb=True), tmp_path / "b", report=False)
    assert [options["project"] for options in wandb.begun] == ["denoise-env", "mine"]


def test_a_refused_login_is_a_sentence(tmp_path, wandb):
    def init(**options):
        raise KeyError("no login")

    wandb.init = init
    with pytest.raises(RuntimeError, match="Weights & Biases cannot begin"):
        run(small(iterations=1, wandb=True), tmp_path / "a", report=False)
    assert not (tmp_path / "a").exists()


def test_clips_are_logged_as_gifs_and_images_by_their_file(tmp_path, wandb):
    logged = []
    wandb.log = lambda figures, step: logged.append(figures["samples"])
    wandb.Video = lambda data, format: (Image.open(data).n_frames, format)
    grid(torch.arange(3, dtype=torch.uint8).view(1, 3, 1, 1, 1).expand(1, 3, 64, 64, 3) * 99, 1, tmp_path / "a.webp")
    grid(torch.zeros(1, 64, 64, 3, dtype=torch.uint8), 1, tmp_path / "a.png")
    with Logger(tmp_path, small(wandb=True)) as logger:
        logger.picture(1, tmp_path / "a.webp")
        logger.picture(2, tmp_path / "a.png")
    assert logged == [(3, "gif"), str(tmp_path / "a.png")]
