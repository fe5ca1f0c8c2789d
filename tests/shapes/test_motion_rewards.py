import pytest
import torch

from denoise_env.prompts import Prompt
from denoise_env.rewards import check_takes, load_reward
from denoise_env.rewards.motion import MotionCorrect, MotionFirstFrame, MotionReward
from denoise_env.shapes.motion import ALL, Verifier, first_frames, render

SOME = ALL[::60]
PARTS = ("appearance", "direction", "speed", "consistency")
NAMES = ("motion", "motion-correct", *(f"motion-{part}" for part in PARTS))


@pytest.fixture(scope="module")
def clips():
    return render(SOME, torch.Generator().manual_seed(0))


def call(reward, clips, texts):
    return reward(clips, [Prompt(text) for text in texts])


def test_scores_are_the_verifiers(clips):
    reader = Verifier()
    assert torch.equal(call(load_reward("motion"), clips, SOME), reader.score(clips, SOME))
    for part, values in reader.parts(clips, SOME).items():
        assert torch.equal(call(load_reward(f"motion-{part}"), clips, SOME), values)


def test_correct_is_binary(clips):
    assert torch.equal(call(MotionCorrect(), clips, SOME), torch.ones(len(SOME)))
    assert torch.equal(call(MotionCorrect(), clips.roll(1, 0), SOME), torch.zeros(len(SOME)))


@pytest.mark.parametrize("name", NAMES)
def test_other_prompts_are_nan_and_leave_the_rest_alone(clips, name):
    reward = load_reward(name)
    scores = call(reward, clips[:6], ["a photo of a dog", *SOME[1:5], "a red circle on gray"])
    assert scores.isnan().tolist() == [True, False, False, False, False, True]
    torch.testing.assert_close(scores[1:5], call(reward, clips[1:5], SOME[1:5]))


@pytest.mark.parametrize("name", [*NAMES, "motion-first-frame"])
def test_only_clips_are_taken(name):
    reward = load_reward(name)
    check_takes(name, reward, "clips")
    with pytest.raises(ValueError, match="takes clips"):
        check_takes(name, reward, "images")


def test_counts_must_agree(clips):
    for reward in (MotionReward(), MotionFirstFrame()):
        with pytest.raises(ValueError, match="as many prompts"):
            call(reward, clips, SOME[:3])


def test_the_first_frame_is_the_prompts_image():
    prompts = first_frames(SOME, torch.Generator().manual_seed(0))
    clips = render(SOME, torch.Generator().manual_seed(0))
    scores = MotionFirstFrame()(clips, [*prompts[:-1], Prompt(SOME[-1])])
    assert scores.isnan().tolist() == [False] * (len(SOME) - 1) + [True]
    assert scores[:-1].min() > 0.99
    assert MotionFirstFrame()(clips.flip(1), prompts).mean() < 0.5
