import pytest
import torch

from denoise_env.prompts import Prompt
from denoise_env.rewards import load_reward
from denoise_env.rewards.base import Reward
from denoise_env.rewards.shapes import ShapesCorrect, ShapesReward
from denoise_env.shapes import ALL, render


@pytest.fixture
def images(generator):
    return render(ALL, generator)


def call(reward: Reward, images, prompts):
    return reward(images, [Prompt(p) for p in prompts])


def test_score_is_the_verifiers(images, verifier):
    scores = call(ShapesReward(), images, ALL)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, verifier.score(images, ALL))


def test_correct_is_binary(images):
    assert torch.equal(call(ShapesCorrect(), images, ALL), torch.ones(72))
    wrong = ALL[36:] + ALL[:36]
    assert torch.equal(call(ShapesCorrect(), images, wrong), torch.zeros(72))


@pytest.mark.parametrize("reward", [ShapesReward(), ShapesCorrect()])
def test_other_prompts_are_nan_and_leave_the_rest_alone(images, reward):
    prompts = ["a photo of a dog", *ALL[1:5], ""]
    scores = call(reward, images[:6], prompts)
    assert scores.isnan().tolist() == [True, False, False, False, False, True]
    torch.testing.assert_close(scores[1:5], call(reward, images[1:5], ALL[1:5]))
    assert call(reward, images[:2], ["", "dog"]).isnan().all()


def test_counts_must_agree(images):
    with pytest.raises(ValueError, match="as many prompts"):
        call(ShapesReward(), images, ALL[:3])


def test_names():
    assert type(load_reward("shapes")) is ShapesReward
    assert type(load_reward("shapes-correct")) is ShapesCorrect
