"""What Weights & Biases is given."""

import sys
import types

import pytest
from small_runs import run, small


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
