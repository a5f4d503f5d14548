"""Numbers of the report, against scipy's own tests, closed forms and figures by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from adadim_lightning.report.statistics import (
    DASH,
    band,
    digits,
    mean_spectrum,
    paired_difference,
    rank_correlation,
    spread,
    thinned,
)


def test_spread_is_the_sample_standard_deviation() -> None:
    found = spread([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0])
    assert found is not None
    assert (found.mean, found.n) == (5.0, 8)
    assert found.sd == pytest.approx(math.sqrt(32 / 7))


def test_spread_of_one_value_has_no_deviation_and_of_none_is_none() -> None:
    found = spread([0.5])
    assert found is not None
    assert found.sd is None
    assert spread([]) is None


def test_paired_interval_is_that_of_scipy_s_paired_test() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0.9, 0.01, 6), rng.normal(0.88, 0.02, 6)
    found = paired_difference(list(enumerate(ours)), list(enumerate(theirs)))
    reference = stats.ttest_rel(ours, theirs)
    interval = reference.confidence_interval(0.95)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.mean == pytest.approx(np.mean(ours - theirs))
    assert found.n == 6


def test_paired_difference_by_hand() -> None:
    # differences 1, 2, 3: mean 2, sd 1, t(0.975, 2) = 4.302653
    found = paired_difference([(0, 2.0), (1, 4.0), (2, 6.0)], [(2, 3.0), (0, 1.0), (1, 2.0)])
    assert found is not None
    assert (found.mean, found.n) == (2.0, 3)
    assert found.high - 2 == pytest.approx(4.302652729911275 / math.sqrt(3))


def test_pairs_are_of_common_seeds_only_and_repeated_seeds_count_once() -> None:
    ours = [(0, 1.0), (1, 2.0), (1, 4.0), (7, 100.0), (None, 50.0)]
    found = paired_difference(ours, [(0, 0.0), (1, 0.0), (8, 100.0), (None, 0.0)])
    assert found is not None
    assert (found.mean, found.n) == (2.0, 2)  # of 1 and of the mean of 2 and 4


def test_fewer_than_two_pairs_are_no_difference() -> None:
    assert paired_difference([(0, 1.0), (1, 1.0)], [(0, 0.0), (2, 0.0)]) is None
    assert paired_difference([], []) is None


def test_rank_correlation_of_any_increasing_function_is_one() -> None:
    found = rank_correlation("x", [(x, math.exp(x)) for x in range(6)])
    assert found is not None
    assert (found.spearman, found.kendall, found.n) == (pytest.approx(1), pytest.approx(1), 6)


def test_rank_correlation_by_hand() -> None:
    # ranks 1 2 3 4 against 2 1 4 3: rho = 1 - 6 * 4 / (4 * 15), tau = (4 - 2) / 6
    found = rank_correlation("x", [(1.0, 20.0), (2.0, 10.0), (3.0, 40.0), (4.0, 30.0)])
    assert found is not None
    assert found.spearman == pytest.approx(0.6)
    assert found.kendall == pytest.approx(1 / 3)


@pytest.mark.parametrize("pairs", [[], [(1.0, 2.0), (2.0, 3.0)], [(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)]])
def test_rank_correlation_needs_three_pairs_that_differ(pairs: list[tuple[float, float]]) -> None:
    assert rank_correlation("x", pairs) is None


def test_band_takes_at_each_epoch_the_runs_that_have_one() -> None:
    found = band([(np.array([1, 2, 3]), np.array([1.0, 2.0, 3.0])), (np.array([1, 3]), np.array([3.0, 5.0]))])
    assert found.epoch.tolist() == [1, 2, 3]
    assert found.mean.tolist() == [2, 2, 4]
    assert found.sd[[0, 2]] == pytest.approx([math.sqrt(2), math.sqrt(2)])
    assert math.isnan(found.sd[1])


def test_mean_spectrum_is_of_shares_at_the_last_epoch() -> None:
    first = {"R": np.array([[1.0, 1.0], [3.0, 1.0]])}
    second = {"R": np.array([[10.0, 10.0]])}
    assert mean_spectrum([first, second, {}], "R") == pytest.approx([0.625, 0.375])
    assert len(mean_spectrum([first], "Z")) == 0
    assert len(mean_spectrum([{"R": np.zeros((1, 3))}], "R")) == 0  # collapsed: nothing to share


def test_thinned_keeps_both_ends() -> None:
    assert thinned(5, 200).tolist() == [0, 1, 2, 3, 4]
    kept = thinned(1000, 200)
    assert (kept[0], kept[-1], len(kept)) == (0, 999, 200)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.9876, "0.988"), (0.0, "0.000"), (45.678, "45.68"), (123.45, "123.5"), (12345.6, "12,346"),
        (-3.2, "-3.200"), (2e-5, "2.0e-05"), (3e9, "3.00e+09"), (None, DASH), (math.nan, DASH), (math.inf, DASH),
    ],
)  # fmt: skip
def test_digits_are_as_many_as_a_reader_can_use(value: float | None, text: str) -> None:
    assert digits(value) == text


def test_signed_digits_have_a_true_minus() -> None:
    assert digits(-0.01234, decimals=4, sign=True) == "\N{MINUS SIGN}0.0123"
    assert digits(0.01234, decimals=4, sign=True) == "+0.0123"
