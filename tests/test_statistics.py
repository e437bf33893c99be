"""Intervals against values worked out by hand with tables of Student's t."""

from __future__ import annotations

import math

import numpy as np
import pytest

from foundation.errors import InputError
from foundation.statistics import mean_interval, overall_difference, paired_interval, stratified, student_t


@pytest.mark.parametrize(
    ("freedom", "t"),
    # t of two-sided p = .05 as printed: NIST/SEMATECH e-Handbook of Statistical Methods, section 1.3.6.7.2
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (29, 2.045)],
)  # fmt: skip
def test_students_t_as_in_printed_tables(freedom: int, t: float) -> None:
    assert student_t(freedom) == pytest.approx(t, abs=0.0006)


def test_students_t_where_it_has_a_closed_form() -> None:
    assert student_t(1) == pytest.approx(math.tan(0.475 * math.pi), rel=1e-10)  # Cauchy
    assert student_t(2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), rel=1e-10)
    assert 1.9600 < student_t(10**6) < 1.9625


def test_mean_interval_by_hand() -> None:
    """Mean .5; deviations -.1, .1, 0, -.1, .1; variance .04 / 4 = .01; error .1 / sqrt 5; t(4) = 2.7764."""
    found = mean_interval(np.array([0.4, 0.6, 0.5, 0.4, 0.6]))
    assert found.mean == pytest.approx(0.5)
    assert found.high - found.mean == pytest.approx(2.776445 * 0.0447213595, rel=1e-6)
    assert found.mean - found.low == pytest.approx(0.12416640, rel=1e-6)


def test_paired_interval_by_hand() -> None:
    """Differences .1, .2, .3: mean .2, deviation .1, error .1 / sqrt 3, t(2) = 4.30265: .2 +- .248413."""
    found = paired_interval(np.array([0.5, 0.3, 0.9]), np.array([0.4, 0.1, 0.6]))
    assert found == pytest.approx((0.2, -0.0484138, 0.4484138), rel=1e-5)


def test_pairs_leave_out_how_hard_an_item_is() -> None:
    hard = np.linspace(0.1, 0.8, 40)
    better = hard + np.tile([0.01, 0.03], 20)
    mean, low, high = paired_interval(better, hard)
    assert low == pytest.approx(0.02 - 2.0227 * 0.0101274 / math.sqrt(40), rel=1e-3)
    assert low > 0.0 and mean == pytest.approx(0.02) and high < 0.03
    assert mean_interval(better).low < mean_interval(hard).high  # apart, nothing could be said


def test_strata_of_unequal_size_by_hand() -> None:
    """Means .4 and .2; the variance of each mean by hand:

    (.2, .4, .6): s^2 = (.04 + 0 + .04) / 2 = .04, by n = 3: .0133333. (.1, .3): s^2 = .02, by n = 2: .01.
    Error sqrt(.0233333) / 2 = .0763763. Freedom .0233333^2 / (.0133333^2 / 2 + .01^2 / 1) = 2.88, taken as 2.
    """
    found = stratified([np.array([0.2, 0.4, 0.6]), np.array([0.1, 0.3])])
    assert found.mean == pytest.approx(0.3)  # of the means, not of the five scores (.32)
    assert found.mean + 4.302653 * 0.0763763 == pytest.approx(found.high, rel=1e-5)
    assert found.low == 0.0  # .3 - .3286: cut where scores end


def test_overall_difference_is_that_of_the_strata() -> None:
    a = [np.array([0.5, 0.9, 0.7]), np.array([0.2, 0.4])]
    b = [np.array([0.4, 0.7, 0.4]), np.array([0.2, 0.3])]
    mean, low, high = overall_difference(a, b)
    assert mean == pytest.approx((0.2 + 0.05) / 2)
    # variances of means: .01 / 3 and .005 / 2; freedom .00583333^2 / (.00333333^2 / 2 + .0025^2) = 2.88
    half = 4.302653 * math.sqrt(0.01 / 3 + 0.005 / 2) / 2
    assert (low, high) == pytest.approx((0.125 - half, 0.125 + half), rel=1e-5)
    other = overall_difference(b, a)
    assert (other.low, other.high) == pytest.approx((-high, -low))


def test_what_little_is_known_is_said() -> None:
    one = np.array([0.5])
    assert mean_interval(one) == (0.5, 0.0, 1.0)
    assert paired_interval(one, one) == (0.0, -1.0, 1.0)
    assert stratified([one, np.array([0.5, 0.5])]) == (0.5, 0.0, 1.0)
    assert mean_interval(np.full(7, 0.25)) == (0.25, 0.25, 0.25)
    with pytest.raises(InputError, match="no scores"):
        mean_interval(np.array([]))
    with pytest.raises(InputError, match="no scores"):
        stratified([])
    with pytest.raises(InputError, match=r"\[2\] items can not be paired with scores of \[3\]"):
        paired_interval(np.zeros(2), np.zeros(3))


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    """2000 draws of three tasks with skewed scores: 95 % within what chance allows (sd .5 %)."""
    rng = np.random.default_rng(5)
    sizes, means = (12, 40, 25), (2 / 7, 0.5, 0.4)
    held = 0
    for _ in range(2000):
        draws = [rng.beta(2, 5, sizes[0]), rng.random(sizes[1]), rng.beta(4, 6, sizes[2])]
        found = stratified(draws)
        held += found.low <= sum(means) / 3 <= found.high
    assert 0.93 < held / 2000 < 0.97
