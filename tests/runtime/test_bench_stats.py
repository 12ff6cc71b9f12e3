"""The statistics of `hcmen-bench`, against numbers worked out by hand, and against counting every case."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from hcmen.runtime.benchmark.stats import (
    blocks,
    calls_needed,
    enough,
    median_interval,
    paired_ratio,
    ratio_interval,
    row_interval,
    settled,
    u_distribution,
    wandering,
)


def test_a_percentile_needs_ten_calls_beyond_it():
    assert [calls_needed(p) for p in (50, 90, 95, 99, 99.9)] == [20, 100, 200, 1000, 10000]
    assert enough(20, 50)
    assert not enough(19, 50)
    assert enough(1000, 99)
    assert not enough(999, 99)


def test_the_interval_of_a_median_is_that_of_the_sign_test():
    """From tables: of ten values the second and ninth hold the median with 97.9 %, the third and eighth with 89.1 %."""
    ten = [3.0, 1.0, 2.0, 10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0]
    found = median_interval(ten)
    assert (found.estimate, found.low, found.high, found.blocks) == (5.5, 2.0, 9.0, 10)
    assert (median_interval(ten, 0.89).low, median_interval(ten, 0.99).low) == (3.0, 1.0)
    # 2 / 2^6 = 3.1 % is within 5 %; 2 / 2^5 = 6.3 % is not.
    assert median_interval(ten[:6]).low == 1.0
    assert median_interval(ten[:5]).low is None
    assert median_interval([4.0]).estimate == 4.0


@pytest.mark.parametrize("n", [6, 11, 25])
def test_the_interval_holds_the_median_as_often_as_it_says(n):
    rng = np.random.default_rng(n)
    held = 0
    for _ in range(2000):
        found = median_interval(rng.exponential(size=n))
        assert found.low is not None
        assert found.high is not None
        held += found.low <= math.log(2) <= found.high
    assert held / 2000 >= 0.94


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 5), (3, 2), (3, 4), (5, 5)])
def test_the_distribution_of_u_is_what_counting_all_orders_gives(n, m):
    counts = np.zeros(n * m + 1)
    for places in itertools.combinations(range(n + m), n):
        others = [i for i in range(n + m) if i not in places]
        counts[sum(a > b for a in places for b in others)] += 1
    np.testing.assert_allclose(u_distribution(n, m), np.cumsum(counts) / counts.sum(), atol=1e-14)


def test_the_distribution_of_u_goes_over_into_the_normal_one():
    exact = u_distribution(100, 100)
    z = (np.arange(10_001) + 0.5 - 5000) / math.sqrt(100 * 100 * 201 / 12)
    normal = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in z])
    np.testing.assert_allclose(exact, normal, atol=5e-4)
    assert u_distribution(120, 100)[5999] < 0.5 < u_distribution(120, 100)[6001]


def test_the_interval_of_a_ratio_is_that_of_mann_and_whitney():
    """By hand: 2 P(U < c) for 4 and 5 values is 2 * 2/126 = 3.2 % at c = 2, 2 * 4/126 = 6.3 % at c = 3."""
    new, old = [2.0, 4.0, 8.0, 16.0], [1.0, 1.0, 1.0, 1.0, 1.0]
    found = ratio_interval(new, old)
    # 20 ratios, five each of 2, 4, 8, 16: the median lies between 4 and 8, the second smallest is 2, the largest 16.
    assert found.estimate == pytest.approx(math.sqrt(32))
    assert (found.low, found.high) == pytest.approx((2.0, 16.0))
    assert ratio_interval([2.0, 4.0, 8.0], [1.0, 1.0, 1.0]).low is None


def test_neighbouring_rounds_that_resemble_each_other_are_merged():
    rng = np.random.default_rng(3)
    independent = np.exp(0.05 * rng.standard_normal(64))
    assert len(blocks(independent.tolist())) == 64
    wave = 2 + np.sin(np.linspace(0, 4 * math.pi, 64))
    merged = blocks(wave.tolist())
    assert 8 <= len(merged) <= 16
    assert merged.min() >= wave.min()
    assert merged.max() <= wave.max()
    assert len(blocks([1.0] * 40)) == 40
    # By hand: 17 rising values become 8, the last of three; the geometric mean of all stays.
    rising = 2.0 ** np.arange(17)
    merged = blocks(rising.tolist())
    assert merged.tolist() == pytest.approx([2.0 ** (2 * i + 0.5) for i in range(7)] + [2.0**15])


def test_any_number_of_rounds_has_its_interval():
    """A fast model gives more rounds than 2^n in float64 allows, and more pairs than memory holds."""
    rng = np.random.default_rng(5)
    few, many = rng.exponential(size=1500), rng.exponential(size=60_000)
    found = median_interval(few)
    expected = np.sort(few)[[711, 788]]  # (n -+ 1.96 sqrt(n)) / 2, from one
    assert [found.low, found.high] == pytest.approx(expected, abs=0.01)
    assert 500 <= len(blocks(many.tolist())) <= 1000
    row = row_interval(many.tolist(), float(np.median(many)))
    ratio = ratio_interval((2 * many).tolist(), many.tolist())
    assert row.low is not None
    assert row.low <= np.median(many) <= row.high
    assert ratio.low is not None
    assert 1.9 < ratio.low <= 2 <= ratio.high < 2.1


def test_false_verdicts_on_equal_rows_are_as_rare_as_stated_and_a_fifth_is_seen():
    rng = np.random.default_rng(7)
    false, missed = 0, 0
    for _ in range(400):
        a, b = np.exp(0.05 * rng.standard_normal((2, 30)))
        same, slower = ratio_interval(a, b), ratio_interval(1.2 * a, b)
        assert same.low is not None
        assert same.high is not None
        assert slower.low is not None
        false += not same.low <= 1 <= same.high
        missed += slower.low <= 1.1
    assert false / 400 <= 0.08  # 5 % stated; 400 draws of it stay below 8 % with 99.5 %
    assert missed == 0


def test_a_paired_ratio_does_not_see_the_drift_that_both_rows_share():
    drift = np.exp(np.linspace(0, 1.5, 30))
    rng = np.random.default_rng(1)
    a, b = np.exp(0.01 * rng.standard_normal((2, 30)))
    found = paired_ratio((1.5 * drift * a).tolist(), (drift * b).tolist())
    assert found.low is not None
    assert found.high is not None
    assert 1.47 < found.low < 1.5 < found.high < 1.53
    assert found.low <= found.estimate <= found.high


def test_an_interval_holds_its_estimate():
    found = row_interval([1.0, 1.1, 1.2, 1.3, 1.4, 1.5], 3.0)
    assert (found.low, found.estimate, found.high) == (1.0, 3.0, 3.0)
    assert row_interval([1.0, 2.0], 1.5).low is None


def test_wandering_is_the_furthest_quarter():
    assert wandering([1.0] * 4 + [1.1] * 4 + [1.0] * 8) == pytest.approx(math.log(1.1))
    assert wandering([1.0]) == 0.0
    assert wandering([1.0, 4.0]) == pytest.approx(math.log(2.0))


def test_warming_up_is_over_when_two_windows_agree():
    assert not settled([1.0] * 9)
    assert settled([1.0] * 10)
    assert not settled([2.0] * 5 + [1.0] * 5)
    assert settled([9.0] * 7 + [1.0] * 10)
    assert not settled([1.0] * 5 + [1.06] * 5)
