"""A small run on Points, and what makes two runs the same."""

import csv

import torch
from safetensors.torch import load_file

from agents.grpo import GRPOConfig
from agents.training import checkpoints
from agents.training.config import TrainConfig
from agents.training.experiment import build
from agents.training.loop import train


def run(config, directory, **options):
    return train(build(config), directory, **options)


TIMING = {"seconds", "images_per_second"}


def small(**changes):
    settings = {
        "model": "points",
        "agent_options": GRPOConfig(group_size=4, lr=1e-3, ema_decay=0.9, kl_coef=0.01),
        "iterations": 6,
        "prompts_per_iteration": 2,
        "microbatch": None,
        "checkpoint_every": 2,
        "eval_every": 3,
        "eval_images_per_prompt": 4,
        "num_steps": 5,
    }
    return TrainConfig(**{**settings, **changes})


def deterministic(path):
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMING} for row in csv.DictReader(file)]


def assert_same_run(one, other):
    for name in ("metrics.csv", "eval.csv"):
        assert deterministic(one / name) == deterministic(other / name)
    newest = checkpoints.latest(one / "checkpoints")
    assert newest.name == checkpoints.latest(other / "checkpoints").name
    a, b = (load_file(run / "checkpoints" / newest.name / "state.safetensors") for run in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    for picture in (one / "samples").iterdir():
        assert picture.read_bytes() == (other / "samples" / picture.name).read_bytes()
