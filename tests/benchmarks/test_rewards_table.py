"""What is made of the figures of runs on proxies."""

import json

import pytest

from benchmarks import rewards


def curve(before, after, half):
    return {
        "r": [before, 0.9, after],
        "r_low": [before - half, 0, after - half],
        "r_high": [before + half, 1, after + half],
    }


def test_a_gain_has_the_intervals_of_both_evaluations_of_every_seed():
    mean, half = rewards.gain([curve(0.5, 0.7, 0.03), curve(0.4, 0.5, 0.04)], "r")
    assert mean == pytest.approx(0.15)
    assert half == pytest.approx((2 * 0.03**2 + 2 * 0.04**2) ** 0.5 / 2)


def test_every_run_has_a_seed_of_its_own_and_measures_what_it_does_not_train_on():
    planned, names = rewards.runs(2), [name for study in rewards.STUDIES for name in study.settings]
    assert len({run.key for run in planned.values()}) == 2 * len({*names}) == 2 * len(names)
    for study in rewards.STUDIES:
        for name in study.settings:
            run = planned[name, 1]
            assert {*run.overrides["rewards"], *run.overrides["eval_rewards"]} >= {*study.measured}
            run.config()


def test_the_page_is_made_of_the_figures():
    records = json.loads((rewards.RESULTS / "rewards.json").read_text())["runs"]
    assert (rewards.RESULTS / "rewards.md").read_text() == rewards.table(records)
    for study in rewards.STUDIES:  # each is there whole or not at all
        assert {*rewards.of_study(records, study)} in ({*study.settings}, set())
