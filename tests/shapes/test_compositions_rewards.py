import pytest
import torch
from diffusers import StableDiffusionPipeline

from denoise_env.prompts import Prompt
from denoise_env.rewards import load_reward
from denoise_env.rewards.compositions import CompositionsCorrect, CompositionsReward
from denoise_env.shapes import WEIGHTS, grammar
from denoise_env.shapes.compositions import HELD_OUT, TRAIN, Verifier, render
from denoise_env.shapes.pretrain import sample

CAPTIONS = ["a red circle on gray", *TRAIN[::40], *HELD_OUT[::12]]


def call(reward, images, prompts):
    return reward(images, [Prompt(p) for p in prompts])


@pytest.fixture
def images(generator):
    return render(CAPTIONS, generator)


def test_score_is_the_verifiers(images):
    scores = call(CompositionsReward(), images, CAPTIONS)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, Verifier().score(images, CAPTIONS))


def test_correct_is_binary(images):
    assert torch.equal(call(CompositionsCorrect(), images, CAPTIONS), torch.ones(len(CAPTIONS)))
    assert torch.equal(call(CompositionsCorrect(), images.roll(1, 0), CAPTIONS), torch.zeros(len(CAPTIONS)))


@pytest.mark.parametrize("reward", [CompositionsReward(), CompositionsCorrect()])
def test_other_prompts_are_nan_and_leave_the_rest_alone(images, reward):
    prompts = ["a photo of a dog", *CAPTIONS[1:5], "two red circle on gray"]
    scores = call(reward, images[:6], prompts)
    assert scores.isnan().tolist() == [True, False, False, False, False, True]
    torch.testing.assert_close(scores[1:5], call(reward, images[1:5], CAPTIONS[1:5]))


def test_counts_must_agree(images):
    with pytest.raises(ValueError, match="as many prompts"):
        call(CompositionsReward(), images, CAPTIONS[:3])


@pytest.mark.parametrize("name", ["CompositionsReward", "CompositionsCorrect"])
def test_targets_load(name):
    assert type(load_reward(f"denoise_env.rewards.compositions:{name}")).__name__ == name


def test_scores_what_the_shapes_world_samples(generator):
    """Its model has seen one object only, and draws that for every caption."""
    pipe = StableDiffusionPipeline.from_pretrained(WEIGHTS, safety_checker=None)
    prompts = HELD_OUT[::2]
    images = sample(pipe, prompts, generator)
    scores, correct = (call(reward, images, prompts) for reward in (CompositionsReward(), CompositionsCorrect()))
    assert 0.02 < scores.mean() < 0.5
    assert len(scores.unique()) > 30
    assert correct.mean() < 0.1
    ones = grammar.TRAIN
    assert call(CompositionsCorrect(), sample(pipe, ones, generator), ones).mean() > 0.3
