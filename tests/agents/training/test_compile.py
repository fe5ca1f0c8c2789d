"""torch.compile of the network in place."""

import pytest
import torch
from small_runs import run, small
from torch._dynamo.utils import counters

from agents.training import checkpoints, loop
from agents.training.experiment import build, restore
from denoise_env.models import load_model


@pytest.mark.slow
def test_a_compiled_run_compiles_once_and_its_checkpoint_is_anybodys(tmp_path, monkeypatch):
    torch.compiler.reset()
    counters.clear()
    graphs, iterate, figures = [], loop._iterate, []

    def counting(experiment, iteration, *more):
        figures.append(iterate(experiment, iteration, *more))
        graphs.append(counters["stats"]["unique_graphs"])
        return figures[-1]

    monkeypatch.setattr(loop, "_iterate", counting)
    directory = run(small(compile=True, eval_images_per_prompt=5), tmp_path / "run")
    assert graphs[0] > 0
    assert counters["stats"]["unique_graphs"] == graphs[0]  # the last evaluation's and pictures' too
    assert max(row["ratio_deviation"] for row in figures) < 1e-5
    plain = build(small())
    restore(plain, checkpoints.latest(directory / "checkpoints"))
    exported = load_model(str(directory / "export"))
    assert exported.trainable().keys() == plain.mdp.model.trainable().keys()
    for name, weight in plain.agent.average.items():
        assert torch.equal(exported.trainable()[name], weight)
