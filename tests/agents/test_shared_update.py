"""Whatever the algorithm, the update that all agents share does the work."""

import dataclasses
from itertools import pairwise

import pytest
import torch

from agents.algorithms import AGENTS
from agents.training.experiment import build
from agents.training.loop import _iterate
from agents.training.presets import make_config

TRAINED = [name for name in AGENTS if name not in ("base", "best-of-n")]


@pytest.mark.parametrize("name", TRAINED)
def test_an_update_is_clipped_steps_of_one_optimizer_in_microbatches(name):
    config = make_config("points", name, rows=32)
    config.agent_options.max_grad_norm = 1e-3
    if not AGENTS[name].on_policy:
        config.agent_options.updates_per_rollout = 2
    experiment = build(dataclasses.replace(config, model="points-flow", num_steps=6, microbatch=8))
    agent, model = experiment.agent, experiment.mdp.model
    norms, weights, rows = [], [], []

    def look(optimizer, arguments, options):
        norms.append(torch.stack([p.grad.norm() for p in agent.parameters]).norm().item())
        weights.append([p.detach().clone() for p in agent.parameters])

    agent.optimizer.register_step_pre_hook(look)
    predict = model.predict
    model.predict = lambda latents, *others: rows.append(len(latents)) or predict(latents, *others)
    _iterate(experiment, 1)
    weights.append([p.detach().clone() for p in agent.parameters])
    options = agent.config
    assert len(norms) == options.updates_per_rollout * options.epochs
    assert 0 < max(norms) <= 1e-3 * (1 + 1e-4)
    assert max(rows) <= 8
    changed = [not all(map(torch.equal, one, other)) for one, other in pairwise(weights)]
    assert changed == [name != "zero-lr"] * len(norms)
