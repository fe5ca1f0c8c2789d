import csv
import math

import numpy as np
import pytest
import torch
from PIL import Image

from agents.policy import DenoisingPolicy
from agents.rollout import collect
from agents.training.evaluation import bootstrap, evaluate, sample
from agents.training.pictures import grid
from agents.training.report import headline
from agents.training.seeding import epoch_order, row_seeds
from denoise_env.mdp import row_generators


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        table = rng.normal(np.array([[0.0], [5.0], [-5.0]]), 1.0, (3, 40))  # the prompts differ, and are fixed
        low, high = bootstrap(table, trial, draws=400)
        hits += low <= 0 <= high
    assert 0.89 <= hits / 200 <= 0.99
    assert high - low < 1  # the spread between prompts is no uncertainty


def test_the_interval_leaves_unscored_images_out():
    table = np.array([[1.0, np.nan, 1.0], [1.0, 1.0, np.nan]])
    assert bootstrap(table, 0) == (1.0, 1.0)
    assert np.isnan(bootstrap(table * np.nan, 0)).all()


def test_evaluation_is_the_same_for_the_same_seed_and_any_microbatch(points):
    policy = DenoisingPolicy(points)
    prompts = points.prompts.texts
    one = evaluate(points, policy, prompts, 16, seed=5)
    assert one == evaluate(points, policy, prompts, 16, seed=5)
    assert one.images == 96
    assert one.means != evaluate(points, policy, prompts, 16, seed=6).means
    for microbatch in (256, 32, 16, 5):
        other = evaluate(points, policy, prompts, 16, seed=5, microbatch=microbatch)
        assert other.means["points"] == pytest.approx(one.means["points"], abs=1e-5)
    low, high = one.intervals["points"]
    assert low < one.means["points"] < high


def test_a_row_is_sampled_from_its_own_seed(points):
    policy = DenoisingPolicy(points)
    few, _ = sample(points, policy, ["ring"], 4, seed=1)
    more, _ = sample(points, policy, ["ring", "line"], 4, seed=1)
    torch.testing.assert_close(few, more[:4], rtol=0, atol=1e-5)


def test_a_grid_has_its_pictures_in_order(tmp_path):
    images = torch.zeros(4, 2, 3, 3, dtype=torch.uint8)
    images[:, :, :, 0] = torch.tensor([10, 20, 30, 40])[:, None, None]
    grid(images, 2, tmp_path / "grid.png", scale=1)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape == (5, 7, 3)
    assert [sheet[0, 0, 0], sheet[0, 4, 0], sheet[3, 0, 0], sheet[3, 4, 0]] == [10, 20, 30, 40]


def test_every_prompt_comes_once_an_epoch_whatever_the_reading():
    items = [f"prompt {i}" for i in range(10)]
    whole = epoch_order(items, 0, 0, 30)
    assert sorted(whole[:10]) == sorted(whole[10:20]) == items
    assert whole[:10] != whole[10:20]
    pieces = [prompt for start in range(0, 30, 4) for prompt in epoch_order(items, 0, start, 4)]
    assert pieces[:30] == whole
    assert epoch_order(items, 1, 0, 10) != whole[:10]


def test_seeds_differ_by_purpose_iteration_and_row():
    draws = [tuple(row_seeds(s, p, i, 3)) for s in (0, 1) for p in ("rollout", "evaluation") for i in (0, 1)]
    assert len({seed for draw in draws for seed in draw}) == 24
    assert row_seeds(0, "rollout", 0, 2) == row_seeds(0, "rollout", 0, 5)[:2]


def test_the_headline_is_the_first_and_the_last_evaluation(tmp_path):
    rows = [
        {"iteration": i, "a": i / 10, "a_low": 0.0, "a_high": 1.0, "images": 4.0, "unscored": 0.0} for i in (0, 5, 9)
    ]
    with (tmp_path / "eval.csv").open("w") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert headline(rows) == [("a", rows[0], rows[2])]


def test_kl_and_diversity_are_those_of_their_definitions(points):
    policy = DenoisingPolicy(points)
    points.model.keep_reference()
    prompts = ["ring", "line"]
    assert evaluate(points, policy, prompts, 8, seed=3, kl=True).kl == 0
    with torch.no_grad():
        for p in points.model.network.parameters():
            p.add_(0.05)
    found = evaluate(points, policy, prompts, 8, seed=3, kl=True, microbatch=8)
    generators = row_generators(row_seeds(3, "evaluation", 0, 16))
    rollout = collect(points, policy, generators, prompts, group_size=8)
    conditioning, total = rollout.conditioning[rollout.row], 0.0
    for k in range(9):
        x = rollout.steps["latents"][:, k]
        with torch.no_grad(), points.model.reference():
            reference = policy.transition(x, k, conditioning).mean
        with torch.no_grad():
            gap = policy.transition(x, k, conditioning).mean - reference
        total += (gap.square().sum(1) / (2 * policy.kernel.stds[k] ** 2)).mean()
    assert found.kl == pytest.approx(float(total), rel=1e-4)
    final = rollout.final_latents.view(2, 8, 2)
    assert found.diversity == pytest.approx(final.var(1).mean(1).sqrt().mean().item(), rel=1e-5)
    assert np.isnan(evaluate(points, policy, prompts, 8, seed=3).kl)


def test_the_best_of_n_by_the_reward_that_counts(points):
    policy = DenoisingPolicy(points)
    points.rewards["other"] = lambda images, prompts, metadata: -images[:, 0]
    points.reward_weights = {"points": 1.0, "other": 0.0}
    found = evaluate(points, policy, ["ring", "line"], 6, seed=3, best_of=4, kl=True)
    latents, index = sample(points, policy, ["ring", "line"], 24, seed=3)
    scores = points.score(latents, index).values["points"]
    assert found.means["points"] == pytest.approx(scores.view(-1, 4).amax(1).mean().item())
    assert found.images == 12
    assert found.kl == pytest.approx(math.log(4) - 3 / 4)


def test_a_reward_that_is_only_measured_chooses_nothing_not_even_by_failing(points):
    trained = points.rewards["points"]

    def other(images, prompts, metadata):
        return torch.where(images[:, 0] > 0, torch.nan, -images[:, 1])

    points.rewards = {"points": trained, "other": other}
    points.reward_weights = {"points": 2.0, "other": 0.0}
    policy = DenoisingPolicy(points)
    found = evaluate(points, policy, ["ring", "line"], 3, seed=5, best_of=4)
    latents, index = sample(points, policy, ["ring", "line"], 12, seed=5)
    scores = points.score(latents, index).values["points"].view(6, 4)
    measured = other(latents[scores.argmax(1) + torch.arange(0, 24, 4)], [], [])
    assert found.means["points"] == pytest.approx(scores.amax(1).mean().item(), rel=1e-5)
    assert found.unscored == int(measured.isnan().sum()) > 0
    assert found.means["other"] == pytest.approx(measured.nanmean().item(), rel=1e-5)
