"""What a run takes beside its activations is what its parts really hold."""

import dataclasses
import json

import pytest

from agents import cli
from agents.algorithms import find_agent
from agents.training.config import TrainConfig
from agents.training.experiment import build
from agents.training.memory import Memory, plan

KNOWN: dict[str, list[int]] = {}  # activations do not depend on the agent


def config(agent, **options):
    settings = find_agent(agent).config_type(group_size=4, **options)
    return TrainConfig(
        "shapes", agent=agent, agent_options=settings, prompts_per_iteration=2, microbatch=8, num_steps=4
    )


@pytest.mark.parametrize(
    ("agent", "options", "sets"),
    [
        ("grpo", {}, 0),
        ("grpo", {"kl_coef": 0.1, "ema_decay": 0.9}, 2),
        ("nft", {"ema_decay": 0.9}, 3),
        ("nft", {"reference_coef": 0.0}, 1),
        ("crd", {}, 3),
        ("dpo", {}, 1),
        ("dpo", {"reference_every": 0}, 1),
        ("dpok", {}, 1),
        ("ppo", {}, 0),
    ],
)
def test_the_copies_that_an_agent_keeps_are_counted(agent, options, sets):
    found = plan(config(agent, **options), known=KNOWN)
    real = build(config(agent, **options)).agent
    weights = sum(p.nbytes for p in real.parameters)
    modules = sum(t.nbytes for t in real.modules.state_dict().values())
    assert found.copies == sets * weights + modules
    assert found.swapped == (weights if sets else 0)
    learned = [p for group in real.optimizer.param_groups for p in group["params"]]
    assert found.gradients == sum(p.nbytes for p in learned) == found.optimizer // 2


def test_latents_and_noise_are_counted():
    found = plan(config("grpo"), known=KNOWN)
    assert (found.images, found.microbatch, found.noises) == (8, 8, 0)
    assert found.rollout == 8 * 5 * 4 * 8 * 8 * 4
    assert plan(config("nft", draws_per_sample=3), known=KNOWN).noises == 8 * 3 * 4 * 8 * 8 * 4
    assert plan(config("dpo", draws_per_sample=3), known=KNOWN).noises == 2 * 3 * 4 * 8 * 8 * 4


def test_the_peak_is_the_largest_phase_and_the_gpu_the_smallest_that_holds_it():
    sizes = dict.fromkeys((f.name for f in dataclasses.fields(Memory)), 0) | {"cuda": True, "weights": 2**30}
    found = Memory(**sizes | {"encoders": 6 * 2**30, "decoding": 2**30})
    assert found.phases == {"encode prompts": 7 * 2**30, "rollout": 2**30, "decode": 2 * 2**30, "update": 2**30}
    assert (found.peak, found.gpu) == (7 * 2**30, 12)  # 7 GiB and 10 % and 1 GiB are more than 8
    assert dataclasses.replace(found, cuda=False).standing == 7 * 2**30
    assert dataclasses.replace(found, encoders=2**40).gpu is None


def test_describe_tells_of_a_run(capsys, tmp_path):
    line = ["describe", "shapes", "--preset", "shapes", "--microbatch", "4", "--images", "32", "--num-steps", "3"]
    assert cli.main([*line, "--json", str(tmp_path / "found.json")]) == 0
    assert "Training with grpo on a GPU, 32 images, 4 in a network call:" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())["training"]
    assert (found["images"], found["microbatch"]) == (32, 4)
    assert found["peak"] == max(found["phases"].values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--microbatch", "0"], "--microbatch must be at least 1, not 0"),
        (["--images", "30"], "--images must be a multiple of the 16 of a group, not 30"),
        (["--preset", "shape"], "unknown preset 'shape'"),
    ],
)
def test_what_describe_refuses(capsys, flags, message):
    assert cli.main(["describe", "shapes", *flags]) == 2
    assert message in capsys.readouterr().err
