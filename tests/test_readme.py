"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=["gymnasium", "torchrl", "stable-baselines3"])
def test_the_code_runs(block):
    found: dict = {}
    exec(block, found)
    if "infos" in found:
        assert found["terminated"].all()
        assert found["infos"]["reward_terms"]["shapes"].shape == (16,)
        assert (found["infos"]["prompt"] == "a red circle on gray").all()
    elif "rollout" in found:
        assert found["rollout"]["action_log_prob"].shape == (16, 10)
        assert torch.isfinite(found["rollout"]["next", "reward"]).all()


def test_the_files_it_names_exist():
    for path in re.findall(r"`((?:denoise_env|agents|examples|benchmarks)/[\w/.]+)`", README):
        assert (Path(__file__).parents[1] / path).exists(), path
    for path in re.findall(r"\]\((docs/[\w/.]+)\)", README):
        assert (Path(__file__).parents[1] / path).exists(), path
