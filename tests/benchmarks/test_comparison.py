import numpy as np
import pytest
from results import record, write, write_optimum

from benchmarks.comparison import OVERALL, compare_all
from benchmarks.leaderboard import table, write_leaderboard

BASE = [record("points", "base", seed, [0.2, 0.2, 0.2], kl=[0, 0, 0]) for seed in range(2)]


def comparisons(tmp_path, runs, name="points", pooled=True):
    write(tmp_path / f"{name}.json", runs, pooled)
    return {c.environment: c for c in compare_all(tmp_path)}


def test_a_row_by_hand(tmp_path):
    runs = [record("points", "grpo", 0, [0.2, 0.4, 0.8]), record("points", "grpo", 1, [0.2, 0.3, 0.4])]
    found = comparisons(tmp_path, BASE + runs)["points"]
    assert [row.agent for row in found.rows] == ["grpo", "base"]
    row = found.rows[0]
    assert (found.base.value, found.target, found.kl_level) == pytest.approx((0.2, 0.6, 4))
    assert row.reward.value == pytest.approx(0.6)
    assert row.gain.value == pytest.approx(0.4)
    assert (row.kl, row.reached_kl) == (4, 2)
    assert row.diversity == pytest.approx(1 / 3)
    assert row.reached_target == 1
    assert row.calls_to_target == np.inf  # the median of 1,500 and never
    assert row.seconds == pytest.approx(0.2)
    assert found.better["grpo"]["base"] == (1, 1, 1)
    assert row.better is None
    assert found.rows[1].better == (0, 0, 0)


def test_gains_are_over_each_runs_own_start(tmp_path):
    grpo = [record("points", "grpo", seed, [start, start, start + 0.1]) for seed, start in enumerate((0.2, 0.6))]
    ppo = [record("points", "ppo", seed, [start, start, start + 0.2]) for seed, start in enumerate((0.2, 0.6))]
    row = comparisons(tmp_path, grpo + ppo)["points"].rows[0]
    assert (row.agent, row.gain.value) == ("ppo", pytest.approx(0.2))
    assert row.better == (1, 1, 1)  # not ¾, as between the rewards


def test_an_undefined_kl_leaves_its_columns_empty(tmp_path):
    runs = [record("points", "grpo", 0, [0.2, 0.3, 0.4], kl=[None, None, None])]
    found = comparisons(tmp_path, runs)["points"]
    assert "kl" not in found.curves["grpo"]
    assert found.rows[0].reward_at_kl is None
    assert "| – |" not in table(found)


def test_failed_runs_are_counted_and_told(tmp_path):
    broken = [record("points", "ppo", seed, None, error="FloatingPointError: lower it") for seed in range(2)]
    one = record("points", "grpo", 1, None, error="ended by signal 9")
    found = comparisons(tmp_path, [record("points", "grpo", 0, [0.2, 0.3, 0.4]), one, *broken])["points"]
    text = table(found)
    assert "grpo (1 of 2 runs)" in text
    assert "ppo (0 of 2 runs)" in text
    assert "FloatingPointError: lower it" in text
    assert found.rows[-1].agent == "ppo"  # last, with nothing to rank by


def test_the_distance_to_the_optimum(tmp_path):
    write_optimum(tmp_path)
    found = comparisons(tmp_path, [record("points", "grpo", 0, [0.2, 0.3, 0.4])])["points"]
    assert found.rows[0].gap == pytest.approx(0.5)
    assert found.frontier["kl"][0] == 0
    assert found.frontier["reward"] == sorted(found.frontier["reward"])


def test_curves_follow_the_runs(tmp_path):
    runs = [record("points", "grpo", seed, [0.2, 0.4 + seed / 10, 0.8]) for seed in range(2)]
    curve = comparisons(tmp_path, runs)["points"].curves["grpo"]["network_calls"]["reward"]
    middle = len(curve["x"]) // 2
    assert curve["x"][middle] == pytest.approx(1000)
    assert curve["value"][[0, middle, -1]] == pytest.approx([0.2, 0.45, 0.8])
    assert (curve["low"][middle], curve["high"][middle]) == pytest.approx((0.4, 0.5))


def test_all_environments_together_share_the_possible_gain(tmp_path):
    for name, base, ends in (("points", 0.2, (0.6, 0.6)), ("shapes", 0.5, (1.0, 1.0))):
        runs = [record(name, "grpo", seed, [base, base, end]) for seed, end in enumerate(ends)]
        write(tmp_path / f"{name}.json", runs)
    write(tmp_path / "other.json", [record("other", "grpo", 0, [0.0, 0.0, 0.0])], pooled=False)
    found = {c.environment: c for c in compare_all(tmp_path)}
    assert list(found) == ["other", "points", "shapes", OVERALL]
    assert found[OVERALL].rows[0].reward.value == pytest.approx((0.5 + 0.5 + 1 + 1) / 4)
    assert found[OVERALL].rows[0].runs == 4


def test_no_environment_is_trimmed_away(tmp_path):
    """Ten good runs in one place and three bad ones in another: the interquartile mean of all 13 drops the bad."""
    write(tmp_path / "points.json", [record("points", "ppo", seed, [0.0, 0.5, 0.9]) for seed in range(10)])
    write(tmp_path / "shapes.json", [record("shapes", "ppo", seed, [0.5, 0.4, 0.2]) for seed in range(3)])
    (row,) = {c.environment: c for c in compare_all(tmp_path)}[OVERALL].rows
    assert row.reward.value == pytest.approx((0.9 - 0.6) / 2)


def test_the_base_models_estimate_has_the_interval_of_its_evaluations(tmp_path):
    starts = (0.18, 0.2, 0.2, 0.22)
    base = [record("points", "base", seed, [start] * 3, kl=[0, 0, 0]) for seed, start in enumerate(starts)]
    grpo = [record("points", "grpo", seed, [0.3, 0.3, 0.4]) for seed in range(4)]
    found = comparisons(tmp_path, base + grpo)["points"]
    assert found.base.value == pytest.approx(0.2)
    assert found.base.low < 0.2 < found.base.high
    assert next(row for row in found.rows if row.agent == "base").reward == pytest.approx(found.base, abs=0.01)


def test_a_learning_rate_at_the_end_of_the_search_is_marked(tmp_path):
    def trial(lr, reward):
        return {**record("points", "grpo", 1000, [reward], lr=lr), "reward": reward}

    runs = [record("points", "grpo", 0, [0.2, 0.3, 0.4], lr=1e-3)]
    for rates, edge in (((1e-4, 1e-3), "highest"), ((1e-3, 1e-2), "lowest"), ((1e-4, 1e-3, 1e-2), None)):
        write(tmp_path / "points.json", runs, search=[trial(lr, 0.1) for lr in rates])
        (found,) = compare_all(tmp_path)
        assert found.rows[0].edge == edge
        assert ("tried)" in table(found)) == bool(edge)


def test_the_table_defines_its_columns_where_they_stand(tmp_path):
    write_optimum(tmp_path)
    text = table(comparisons(tmp_path, [record("points", "grpo", 0, [0.2, 0.3, 0.4])])["points"])
    assert "| below the optimum |" in text
    assert "Below the optimum: the largest reward" in text
    assert "Diversity / base: std of the final latents" in text


def test_runs_of_other_code_are_told(tmp_path):
    runs = [record("points", "grpo", seed, [0.2, 0.3, 0.4], code=code) for seed, code in enumerate(("v1 aa", "v2 bb"))]
    comparisons(tmp_path, runs)
    text = write_leaderboard(tmp_path).read_text()
    assert "Code: v1 aa (1 runs), v2 bb (1 runs)." in text
