import math

import pytest
import torch

from agents.policy import DenoisingPolicy
from agents.rollout import collect
from agents.training.evaluation import evaluate
from denoise_env import DenoiseVectorEnv
from denoise_env.mdp import DenoisingMDP, row_generators
from denoise_env.prompts import Prompt
from denoise_env.rewards import check_reward
from denoise_env.rewards.combinators import Clip, PerFrame, Scale, Threshold, WeightedSum, WinRate

NAN = math.nan


def fixed(*scores, **attributes):
    """A reward with the given scores, one a row."""

    def reward(images, prompts):
        return torch.tensor(scores[: len(images)])

    vars(reward).update(attributes)
    return reward


def run(reward, rows=4, **group):
    return reward(torch.rand(rows, 3, 4, 4), [Prompt("a")] * rows, **group)


def same(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected), equal_nan=True)


def test_threshold_is_strict_and_keeps_nan():
    same(run(Threshold(fixed(0.27, 0.28, 0.29, NAN), 0.28)), [0.0, 0.0, 1.0, NAN])


def test_scale_and_clip():
    base = fixed(-1.0, 0.0, 2.0, NAN, range=(-1.0, 2.0))
    same(run(Scale(base, -2, 1)), [3.0, 1.0, -3.0, NAN])
    assert Scale(base, -2, 1).range == (-3.0, 3.0)
    same(run(Clip(base, -0.5, 1.5)), [-0.5, 0.0, 1.5, NAN])
    assert Clip(base, -0.5, 1.5).range == (-0.5, 1.5)


def test_weighted_sum():
    one, other = fixed(1.0, 2.0, NAN, 4.0), fixed(10.0, 20.0, 30.0, 40.0)
    same(run(WeightedSum([one, other], [0.5, -0.1])), [-0.5, -1.0, NAN, -2.0])
    same(run(WeightedSum([one, other])), [11.0, 22.0, NAN, 44.0])


def brightness(images, prompts):
    assert images.ndim == 4
    return images.mean((1, 2, 3))


CLIP = torch.tensor([[0.1, 0.5, 0.3], [0.9, 0.2, 0.4]])


@pytest.mark.parametrize(
    ("reduction", "every", "expected"),
    [
        ("mean", 1, [0.3, 0.5]),
        ("mean", 2, [0.2, 0.65]),
        ("min", 1, [0.1, 0.2]),
        ("max", 1, [0.5, 0.9]),
        ("first", 1, [0.1, 0.9]),
        ("last", 1, [0.3, 0.4]),
    ],
)
def test_per_frame(reduction, every, expected):
    clips = CLIP[:, :, None, None, None].expand(2, 3, 3, 4, 4)
    same(PerFrame(brightness, reduction, every)(clips, [Prompt("a")] * 2), expected)


def test_per_frame_gives_each_frame_its_clips_prompt():
    def length(images, prompts):
        return torch.tensor([float(len(p.text)) for p in prompts])

    found = PerFrame(length)(torch.rand(2, 5, 3, 4, 4), [Prompt("a"), Prompt("abc")])
    assert found.tolist() == [1, 3]
    assert PerFrame(brightness)(torch.full((2, 3, 4, 4), 0.5), [Prompt("a")] * 2).tolist() == [0.5, 0.5]


def test_win_rate_of_scores():
    """Pref-GRPO's rate: wins among the others of the group; a tie is half a win."""
    reward = WinRate(fixed(3.0, 1.0, 3.0, 2.0, 5.0, NAN, 1.0, 1.0))
    same(run(reward, 8, group_size=4), [2.5 / 3, 0.0, 2.5 / 3, 1 / 3, 1.0, NAN, 0.25, 0.25])


class Judge:
    """Compares by a table of pairs: those of rewards.md's fixture."""

    def __init__(self):
        self.wins = {(0, 1): 1.0, (0, 2): 0.0, (0, 3): 0.5, (1, 2): 0.0, (1, 3): 1.0, (2, 3): 1.0}

    def __call__(self, images, prompts):
        raise AssertionError("pairs are compared")

    def compare(self, images, others, prompts):
        assert len(images) == len(others) == len(prompts) == 6
        pairs = zip(images[:, 0, 0, 0].tolist(), others[:, 0, 0, 0].tolist(), strict=True)
        return [self.wins[int(a), int(b)] for a, b in pairs]


def test_win_rate_of_a_judge():
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 2, 2)
    found = WinRate(Judge())(images, [Prompt("a")] * 4, group_size=4)
    assert [round(x, 3) for x in found.tolist()] == [0.5, 0.333, 1, 0.167]


def test_what_a_combination_says_of_itself():
    images, clips = fixed(1.0, takes="images", citation="A 2020"), fixed(1.0, takes="clips", citation="B 2021")
    assert Threshold(clips, 0).takes == "clips"
    assert WeightedSum([images, fixed(1.0)]).takes == "images"
    assert PerFrame(images).takes == "either"
    assert WeightedSum([Scale(images, 2), Clip(images, 0, 1)]).citation == "A 2020"
    assert WeightedSum([PerFrame(images), clips]).citation == "A 2020; B 2021"
    assert Threshold(WinRate(images), 0.5).compares_group
    assert not Threshold(images, 0.5).compares_group
    same(run(Threshold(WinRate(fixed(3.0, 1.0, 2.0, 0.0)), 0.5), 4, group_size=4), [1.0, 0.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightedSum([fixed(1.0, takes="images"), fixed(1.0, takes="clips")]), "put per_frame around"),
        (lambda: WeightedSum([fixed(1.0)], [1, 2]), "1 rewards need as many weights"),
        (lambda: WeightedSum([]), "takes a list of rewards"),
        (lambda: Threshold(fixed(1.0, only_pairs=True), 0), "put win_rate around the judge"),
        (lambda: check_reward("j", fixed(1.0, only_pairs=True)), r"write win_rate\(j\)"),
        (lambda: Clip(fixed(1.0), 1, 1), "the lower end must be below the upper end"),
        (lambda: PerFrame(fixed(1.0, takes="clips")), "takes clips already"),
        (lambda: PerFrame(fixed(1.0), "median"), "the reduction must be one of"),
        (lambda: PerFrame(fixed(1.0), every=0), "every must be an integer of at least 1"),
        (lambda: PerFrame(WinRate(fixed(1.0))), "cannot score frames against those of other samples"),
        (lambda: run(WinRate(fixed(1.0))), "compares the samples of a group, and a group here has one"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("microbatch", [None, 2, 4, 6])
def test_groups_reach_their_reward_whole(microbatch):
    mdp = DenoisingMDP.make("points", {"win_rate(points)": 1.0, "points": 0.0}, num_steps=3, microbatch=microbatch)
    rollout = collect(mdp, DenoisingPolicy(mdp), row_generators(range(12)), mdp.drawn_prompts[:3], group_size=4)
    values = rollout.scores.values["points"].view(3, 4)
    expected = (values[:, :, None] > values[:, None]).float().sum(2) / 3
    torch.testing.assert_close(rollout.scores.total.view(3, 4), expected)
    found = evaluate(mdp, DenoisingPolicy(mdp), mdp.drawn_prompts[:3], 5, 0, microbatch)
    assert found.means["win_rate(points)"] == pytest.approx(0.5)  # somebody loses wherever somebody wins
    assert found.unscored == 0


def test_environments_refuse_rewards_that_compare_groups():
    with pytest.raises(ValueError, match=r"'win_rate\(points\)' compares the samples of a group"):
        DenoiseVectorEnv("points", 4, rewards="win_rate(points)")


def test_a_reward_of_clips_is_refused_for_images_and_the_other_way_round():
    mdp = DenoisingMDP.make("points")
    with pytest.raises(ValueError, match="the reward 'motion' takes clips, and the model makes images"):
        DenoisingMDP(mdp.model, {"motion": fixed(1.0, takes="clips")}, mdp.drawn_prompts)
    mdp.model.makes = "clips"
    with pytest.raises(ValueError, match=r"makes clips: write per_frame\(hps\)"):
        DenoisingMDP(mdp.model, {"hps": fixed(1.0, takes="images")}, mdp.drawn_prompts)
    DenoisingMDP(mdp.model, {"hps": PerFrame(fixed(1.0, takes="images"))}, mdp.drawn_prompts)
