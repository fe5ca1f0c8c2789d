"""What is known of a reward before a run begins."""

import dataclasses

import pytest

from agents.training.experiment import build
from agents.training.presets import make_config
from denoise_env.rewards.combinators import Scale


class Down:
    """A reward whose server does not answer."""

    def check(self):
        raise RuntimeError("http://127.0.0.1:9 does not answer")

    def __call__(self, images, prompts):
        raise AssertionError("never asked")


def halved():
    return Scale(Down(), 0.5)


@pytest.mark.parametrize("where", ["rewards", "eval_rewards"])
@pytest.mark.parametrize("reward", ["Down", "halved()"])
def test_a_reward_that_cannot_score_is_told_before_any_work(where, reward, monkeypatch):
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    name = f"test_reward_checks:{reward}"
    named = {name: 1.0} if where == "rewards" else (name,)
    with pytest.raises(ValueError, match=rf"the reward '{name[:-2]}.*' cannot score: http://127.0.0.1:9 does not"):
        build(dataclasses.replace(make_config("points"), **{where: named}))


def test_a_group_of_one_is_told_where_samples_are_compared():
    config = dataclasses.replace(make_config("points"), rewards={"win_rate(points)": 1.0}, eval_images_per_prompt=1)
    with pytest.raises(ValueError, match="group_size and eval_images_per_prompt must be at least 2, not 16 and 1"):
        build(config)
