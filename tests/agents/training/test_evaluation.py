import math

import numpy as np
import pytest
import torch

from agents.policy import DenoisingPolicy
from agents.rollout import collect
from agents.training.evaluation import bootstrap, evaluate, sample
from denoise_env.mdp import row_generators
from denoise_env.seeding import row_seeds


@pytest.mark.parametrize("images", [2, 3, 40])
def test_the_interval_covers_as_often_as_it_says(images):
    rng = np.random.default_rng(0)
    hits = 0
    prompts = np.resize([0.0, 5.0, -5.0], (60, 1))  # they differ, and are fixed
    for trial in range(200):
        table = rng.normal(prompts, 1.0, (60, images))
        low, high = bootstrap(table, trial, draws=400)
        hits += low <= 0 <= high
    assert 0.91 <= hits / 200 <= 0.99
    assert high - low < 1  # the spread between prompts is no uncertainty


def test_one_image_a_prompt_has_no_interval_over_images():
    assert np.isnan(bootstrap(np.arange(5.0)[:, None], 0)).all()
    assert np.isfinite(bootstrap(np.arange(5.0)[:, None], 0, over="prompts")).all()


def test_the_interval_over_prompts_covers_the_mean_of_all_prompts_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits, hits_over_images = 0, 0
    for trial in range(200):
        prompts = rng.normal(0.0, 1.0, (25, 1))  # drawn from all prompts, whose mean is 0
        table = prompts + rng.normal(0.0, 1.0, (25, 8))
        low, high = bootstrap(table, trial, draws=400, over="prompts")
        hits += low <= 0 <= high
        low, high = bootstrap(table, trial, draws=400)
        hits_over_images += low <= 0 <= high
    assert 0.89 <= hits / 200 <= 0.99
    assert hits_over_images / 200 < 0.7  # the noise alone explains little of the difference


def test_without_noise_the_interval_over_prompts_is_that_of_their_means():
    table = np.repeat(np.arange(20.0)[:, None], 3, 1)
    assert bootstrap(table, 0) == (9.5, 9.5)
    low, high = bootstrap(table, 0, over="prompts")
    error = np.arange(20.0).std() / math.sqrt(20)
    assert (low, high) == pytest.approx((9.5 - 1.96 * error, 9.5 + 1.96 * error), abs=0.3)


@pytest.mark.parametrize("over", ["images", "prompts"])
def test_the_interval_leaves_unscored_images_out(over):
    table = np.array([[1.0, np.nan, 1.0], [1.0, 1.0, np.nan]])  # of few images all that is drawn may be unscored
    assert bootstrap(table, 0, over=over) == (1.0, 1.0)
    assert np.isnan(bootstrap(table * np.nan, 0, over=over)).all()


def test_both_intervals_are_columns_and_one_prompt_has_no_interval_over_prompts(points):
    policy = DenoisingPolicy(points)
    found = evaluate(points, policy, [p.text for p in points.prompts], 16, seed=5)
    row, (low, high), (far_low, far_high) = found.figures(), found.intervals["points"], found.prompt_intervals["points"]
    assert [row[f"points{end}"] for end in ("_low", "_high", "_prompts_low", "_prompts_high")] == [
        low,
        high,
        far_low,
        far_high,
    ]
    assert far_low < low < row["points"] < high < far_high
    alone = evaluate(points, policy, ["ring"], 16, seed=5).figures()
    assert np.isnan([alone["points_prompts_low"], alone["points_prompts_high"]]).all()
    assert alone["points_low"] < alone["points"] < alone["points_high"]


def test_evaluation_is_the_same_for_the_same_seed_and_any_microbatch(points):
    policy = DenoisingPolicy(points)
    prompts = [p.text for p in points.prompts]
    one = evaluate(points, policy, prompts, 16, seed=5)
    assert one == evaluate(points, policy, prompts, 16, seed=5)
    assert one.images == 96
    assert one.means != evaluate(points, policy, prompts, 16, seed=6).means
    for microbatch in (256, 32, 16, 5):
        other = evaluate(points, policy, prompts, 16, seed=5, microbatch=microbatch)
        assert other.means["points"] == pytest.approx(one.means["points"], abs=1e-5)
    low, high = one.intervals["points"]
    assert low < one.means["points"] < high


@pytest.fixture
def calls(points, monkeypatch):
    """Rows of every network call, and of every call of the reward."""
    seen = {"network": [], "reward": []}
    predict, reward = points.model.predict, points.rewards["points"]

    def predicting(latents, *others):
        seen["network"].append(len(latents))
        return predict(latents, *others)

    def rewarding(images, *others):
        seen["reward"].append(len(images))
        return reward(images, *others)

    monkeypatch.setattr(points.model, "predict", predicting)
    points.rewards["points"] = rewarding
    return seen


def test_rows_go_through_the_network_in_full_microbatches_and_a_smaller_last_one(points, calls):
    found = evaluate(points, DenoisingPolicy(points), [p.text for p in points.prompts], 131, seed=5, microbatch=128)
    assert calls["network"] == [128] * 60 + [18] * 10  # 6 · 131 rows, 10 steps
    assert calls["reward"] == [128] * 6 + [18]
    whole = evaluate(points, DenoisingPolicy(points), [p.text for p in points.prompts], 131, seed=5, microbatch=786)
    assert calls["network"][70:] == [786] * 10
    assert found.figures() == pytest.approx(whole.figures(), abs=1e-5, nan_ok=True)


def test_the_candidates_of_the_best_of_n_keep_to_the_microbatch(points, calls):
    options = {"seed": 5, "best_of": 50, "kl": True}
    found = evaluate(points, DenoisingPolicy(points), ["ring", "line"], 3, microbatch=64, **options)
    assert calls["network"] == [64] * 40 + [44] * 10
    assert calls["reward"] == [64] * 4 + [44]
    points.microbatch = 20
    whole = evaluate(points, DenoisingPolicy(points), ["ring", "line"], 3, microbatch=300, **options)
    assert calls["reward"][5:] == [20] * 15
    assert found.figures() == pytest.approx(whole.figures(), abs=1e-5)


def test_without_a_microbatch_whole_prompts_go_together(points, calls):
    evaluate(points, DenoisingPolicy(points), [p.text for p in points.prompts], 100, seed=5)
    assert calls["reward"] == [200] * 3
    evaluate(points, DenoisingPolicy(points), ["ring", "line"], 300, seed=5)
    assert calls["reward"][3:] == [300] * 2


def test_progress_counts_the_images(points):
    for best_of in (1, 3):
        done = []
        evaluate(
            points, DenoisingPolicy(points), ["ring", "line"], 7, 5, microbatch=4, progress=done.append, best_of=best_of
        )
        assert sum(done) == 14
        assert len(done) == -(-14 * best_of // 4)


def test_a_microbatch_is_a_rollout_of_its_rows(points):
    policy, prompts = DenoisingPolicy(points), [p.text for p in points.prompts]
    latents, index = sample(points, policy, prompts, 12, seed=1, microbatch=24)
    generators = row_generators(row_seeds(1, "evaluation", 0, 72))
    rollout = collect(points, policy, generators[24:48], prompts[2:4], group_size=12)
    assert torch.equal(latents[24:48], rollout.final_latents)
    assert torch.equal(index[24:48], rollout.prompt_index)
    ragged, again = sample(points, policy, prompts, 12, seed=1, microbatch=7)
    torch.testing.assert_close(ragged, latents, rtol=0, atol=1e-5)
    assert torch.equal(again, index)


def test_a_row_is_sampled_from_its_own_seed(points):
    policy = DenoisingPolicy(points)
    few, _ = sample(points, policy, ["ring"], 4, seed=1)
    more, _ = sample(points, policy, ["ring", "line"], 4, seed=1)
    torch.testing.assert_close(few, more[:4], rtol=0, atol=1e-5)


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
    conditioning, total = rollout.conditioning(slice(None)), 0.0
    for k in range(9):
        x = rollout.steps["latents"][:, k]
        with torch.no_grad(), points.model.reference():
            reference = policy.transition(x, k, conditioning).mean
        with torch.no_grad():
            gap = policy.transition(x, k, conditioning).mean - reference
        total += (gap.square().sum(1) / (2 * policy.kernel.stds[k] ** 2)).mean()
    assert found.kl == pytest.approx(float(total), rel=1e-4)
    assert evaluate(points, policy, prompts, 8, seed=3, kl=True, microbatch=5).kl == pytest.approx(found.kl, rel=1e-5)
    final = rollout.final_latents.view(2, 8, 2)
    assert found.diversity == pytest.approx(final.var(1).mean(1).sqrt().mean().item(), rel=1e-5)
    assert np.isnan(evaluate(points, policy, prompts, 8, seed=3).kl)


def test_the_best_of_n_by_the_reward_that_counts(points):
    policy = DenoisingPolicy(points)
    points.rewards["other"] = lambda images, prompts: -images[:, 0]
    points.reward_weights = {"points": 1.0, "other": 0.0}
    found = evaluate(points, policy, ["ring", "line"], 6, seed=3, best_of=4, kl=True)
    latents, index = sample(points, policy, ["ring", "line"], 24, seed=3)
    scores = points.score(latents, index).values["points"]
    assert found.means["points"] == pytest.approx(scores.view(-1, 4).amax(1).mean().item())
    assert found.images == 12
    assert found.kl == pytest.approx(math.log(4) - 3 / 4)


def test_a_reward_that_is_only_measured_chooses_nothing_not_even_by_failing(points):
    trained = points.rewards["points"]

    def other(images, prompts):
        return torch.where(images[:, 0] > 0, torch.nan, -images[:, 1])

    points.rewards = {"points": trained, "other": other}
    points.reward_weights = {"points": 2.0, "other": 0.0}
    policy = DenoisingPolicy(points)
    found = evaluate(points, policy, ["ring", "line"], 3, seed=5, best_of=4)
    latents, index = sample(points, policy, ["ring", "line"], 12, seed=5)
    scores = points.score(latents, index).values["points"].view(6, 4)
    measured = other(latents[scores.argmax(1) + torch.arange(0, 24, 4)], [])
    assert found.means["points"] == pytest.approx(scores.amax(1).mean().item(), rel=1e-5)
    assert found.unscored == int(measured.isnan().sum()) > 0
    assert found.means["other"] == pytest.approx(measured.nanmean().item(), rel=1e-5)
