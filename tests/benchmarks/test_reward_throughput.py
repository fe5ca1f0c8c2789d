"""The architectures whose speed is measured are the published ones, and the committed table is of all of them."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import reward_architectures, reward_throughput
from benchmarks.reward_architectures import PUBLISHED
from benchmarks.reward_throughput import REWARDS, prompts, samples, table

RESULTS = Path(reward_throughput.__file__).parent / "results"
LARGE = 427_616_513
PARAMETERS = {
    "aesthetic": LARGE,
    "clip_score": 986_714_881,
    'clip_score("openai/clip-vit-large-patch14")': LARGE,
    "geneval": LARGE + 68_741_083,
    "hps": 986_109_441,
    "hpsv3": 8_291_375_616 - (2 * 152_064 - 151_658) * 3584,
    "image_reward": 445_278_720,
    "pickscore": 986_109_441,
    "videoalign": 2_208_985_600 - (151_936 - 151_660) * 1536,
    "visionreward": 8_292_166_656,
}
"""Of the published checkpoints; Qwen2-VL's without ``lm_head``, and with the reward tokens in place of unused ones."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_networks_are_of_the_published_size(name):
    assert PUBLISHED[name].parameters() == PARAMETERS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in ("hpsv3", "visionreward")])
def test_shallow_ones_score(name, monkeypatch):
    monkeypatch.setattr(reward_architectures, "DEPTH", 1)
    reward = PUBLISHED[name].make("fp32")
    if name == "geneval":
        reward.resolution = 64
    assert reward(samples(name, 1, torch.Generator().manual_seed(0)), prompts(name, 1)).isfinite().all()


def test_the_committed_table_is_of_known_rewards():
    report = json.loads((RESULTS / "rewards-throughput.json").read_text(encoding="utf-8"))
    names = [row["reward"] for row in report["rewards"]]
    assert names == [name for name in REWARDS if name in names]
    assert not any("error" in row for row in (*report["rewards"], *report["servers"].values()))
    assert (RESULTS / "rewards-throughput.md").read_text(encoding="utf-8") == table(report)


def test_the_table_says_what_was_not_run():
    needed = {"reward": "hpsv3", "precision": "fp32", "parameters": 2**31, "needed": 2**33}
    failed = {"reward": "hps", "error": "not done"}
    report = {"machine": {}, "rewards": [needed, failed], "servers": {"remote": {"error": "none"}}}
    page = table(report)
    assert "| `hpsv3` | 2,147 M | fp32 | not run: its weights alone take 8.0 GiB | | |" in page
    assert "| `hps` | | | not done | | |" in page
    assert page.endswith("| error | none |\n")
