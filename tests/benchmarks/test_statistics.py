import numpy as np
import pytest

from benchmarks.statistics import (
    bootstrap,
    censored_median,
    estimate,
    first_crossing,
    iqm,
    probability_of_improvement,
)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2, 3], 2),  # fewer than four: nothing is dropped
        ([0, 1, 2, 100], 1.5),
        ([9, 1, 2, 3, 4, 5, 6, 7, 8, 1000], (3 + 4 + 5 + 6 + 7 + 8) / 6),
        ([np.nan, 0, 1, 2, 100], 1.5),
    ],
)
def test_iqm_drops_a_quarter_at_either_end(values, expected):
    assert iqm(values) == pytest.approx(expected)


def test_iqm_along_an_axis_counts_each_column_by_itself():
    table = np.array([[0, 5], [1, np.nan], [2, 7], [100, np.nan]], float)
    assert iqm(table) == pytest.approx([1.5, 6])
    assert iqm(table.T, axis=1) == pytest.approx([1.5, 6])
    assert np.isnan(iqm([np.nan, np.nan]))


def test_bootstrap_resamples_within_strata_only():
    # each stratum is constant, so the pooled mean can never change; unstratified resampling would change it
    low, high = bootstrap([[0.0, 0.0], [1.0, 1.0]], statistic=np.mean)
    assert (low, high) == (0.5, 0.5)


def test_bootstrap_of_a_mean_has_its_width():
    values = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap([values], statistic=np.mean)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert low < values.mean() < high


def test_bootstrap_of_curves_is_that_of_every_column():
    table = np.random.default_rng(1).normal(size=(10, 3))
    low, high = bootstrap([table])
    alone = bootstrap([table[:, 1]])
    assert (low[1], high[1]) == alone
    table[:, 2] = np.nan
    assert np.isnan(bootstrap([table])[0]).tolist() == [False, False, True]


def test_an_estimate_counts_every_stratum_the_same():
    value, low, high = estimate([0.0, 1.0, 2.0, 3.0, 90.0, 4.0, 5.0, 6.0], [100.0, 104.0])
    assert value == (3.5 + 102) / 2  # of 2, 3, 4, 5 and of both
    assert low < value < high


def test_probability_of_improvement_counts_pairs_and_half_of_the_ties():
    # (3 > 2, 3 > 1, 1 < 2, 1 = 1): (1 + 1 + 0 + ½) / 4
    assert probability_of_improvement([[3, 1]], [[2, 1]]).value == 2.5 / 4
    # averaged over environments, each compared within itself only
    assert probability_of_improvement([[0, 0], [9, 9]], [[1, 1], [8, 8]]) == (0.5, 0.5, 0.5)
    assert probability_of_improvement([[5, 6, 7]], [[1, 2]]) == (1, 1, 1)


def test_probability_of_improvement_is_symmetric():
    x, y = np.random.default_rng(0).normal(size=(2, 10))
    one, other = probability_of_improvement([x], [y]), probability_of_improvement([y], [x])
    assert one.value == pytest.approx(1 - other.value)
    assert one.low <= one.value <= one.high


def test_first_crossing_interpolates_on_the_way_up_only():
    kl, reward = [0, 2, 1, 4], [0.2, 0.6, 0.9, 1.0]
    found = first_crossing(kl, reward, [0, 1, 2, 3, 5])
    assert found[:3] == pytest.approx([0.2, 0.4, 0.6])
    assert found[3] == pytest.approx(0.9 + 2 / 3 * 0.1)
    assert np.isnan(found[4])


def test_first_crossing_of_an_undefined_x_is_undefined():
    assert np.isnan(first_crossing([np.nan, np.nan], [1, 2], [0.5])).all()


def test_calls_to_a_target_are_the_first_crossing_with_the_axes_swapped():
    calls, reward = [0, 100, 200, 300], [0.2, 0.4, 0.8, 0.5]
    assert first_crossing(reward, calls, [0.6]) == pytest.approx([150])


def test_a_censored_median_is_infinite_when_half_never_arrive():
    assert censored_median([10, 20, np.nan]) == 20
    assert censored_median([10, np.nan]) == np.inf
    assert censored_median([np.nan, 30, 10, 20]) == 25
