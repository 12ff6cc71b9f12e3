"""The parity comparison against element-by-element loops in plain Python."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hcmen.base.errors import CheckFailed, InputError
from hcmen.runtime.compare import compare

finite = st.floats(-1e6, 1e6, allow_nan=False)


def oracle(got, expected, atol, rtol):
    """(failed, largest error, mean error, smallest atol that passes), by the definition."""
    failed, needed, errors = 0, 0.0, []
    for g, e in zip(got, expected, strict=True):
        error = abs(g - e)
        errors.append(error)
        failed += error > atol + rtol * abs(e)
        needed = max(needed, error - rtol * abs(e))
    return failed, max(errors), math.fsum(errors) / len(errors), needed


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=40), st.floats(0, 10), st.floats(0, 1))
def test_agrees_with_the_definition(pairs, atol, rtol):
    got, expected = zip(*pairs, strict=True)
    found = compare(got, expected, atol, rtol)
    failed, largest, mean, needed = oracle(got, expected, atol, rtol)
    assert (found.failed, found.elements, found.nan) == (failed, len(pairs), 0)
    assert found.passed == (failed == 0)
    assert found.max_abs == largest
    assert found.mean_abs == pytest.approx(mean, rel=1e-12, abs=1e-300)
    assert found.required_atol == pytest.approx(needed, rel=1e-12, abs=1e-300)
    assert got[found.worst_index[0]] == found.worst_got
    assert expected[found.worst_index[0]] == found.worst_expected


@pytest.mark.parametrize(("rtol", "scale"), [(0.0, 1.0), (1e-5, 1.0), (1e-2, 300.0)])
def test_required_atol_passes_and_nothing_below_it_does(rtol, scale):
    rng = np.random.default_rng(1)
    expected = rng.normal(size=(7, 3)) * scale
    got = expected + rng.normal(size=(7, 3))
    needed = compare(got, expected, 0.0, rtol).required_atol
    assert compare(got, expected, needed * (1 + 1e-12), rtol).passed
    below = compare(got, expected, needed * (1 - 1e-9), rtol)
    assert below.failed == 1
    assert below.worst_index == compare(got, expected, 0.0, rtol).worst_index


def test_the_bound_leans_on_the_expected_value_and_not_on_the_other():
    assert compare([10.0], [10.9], 0.0, 0.085).passed
    assert not compare([10.9], [10.0], 0.0, 0.085).passed


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        ([1.0, math.nan], [1.0, 2.0]),
        ([1.0, 2.0], [1.0, math.nan]),
        ([1.0, math.nan], [1.0, math.nan]),
        ([1.0, math.inf], [1.0, math.inf]),
        ([1.0, -math.inf], [1.0, math.inf]),
    ],
)
def test_nan_and_infinity_fail_on_either_side_and_on_both(got, expected):
    found = compare(got, expected, 1e9, 1e9)
    assert not found.passed
    assert (found.failed, found.nan, found.worst_index) == (1, 1, (1,))
    assert found.required_atol is None
    assert found.max_abs == 0.0  # of the pair that can be compared


def test_all_nan_leaves_no_error_to_report():
    found = compare([math.nan], [math.nan])
    assert (found.max_abs, found.mean_abs, found.p99_abs, found.cosine, found.required_atol) == (None,) * 5
    assert found.failed == 1
    assert "NaN" in found.line()


@pytest.mark.parametrize("case", ["plain", "nan", "all nan", "infinite"])
def test_the_report_is_plain_json_with_the_keys_of_the_manifest(case):
    got = {"plain": [1.0, 2.5], "nan": [1.0, math.nan], "all nan": [math.nan] * 2, "infinite": [math.inf, 0.0]}[case]
    report = compare(np.array(got, np.float32), np.array([1.0, 2.0], np.float32)).to_json()
    assert set(report) == {
        *("elements", "max_abs", "mean_abs", "p99_abs", "cosine", "nan", "worst", "required_atol", "failed")
    }
    assert set(report["worst"]) == {"index", "got", "expected"}
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_p99_and_cosine_by_hand():
    found = compare(np.arange(101.0), np.zeros(101))
    assert found.p99_abs == pytest.approx(99.0)
    assert found.cosine == 0.0
    assert compare([3.0, 4.0], [4.0, 3.0]).cosine == pytest.approx(24 / 25)
    assert compare([1e-300, 0.0], [1e-300, 0.0]).cosine == pytest.approx(1.0)
    assert compare([0.0], [0.0]).cosine == 1.0
    assert compare([-2.0, 1.0], [2.0, -1.0]).cosine == pytest.approx(-1.0)


def test_the_comparison_is_made_in_float64():
    # 1 + 2**-30 is 1 in float32.
    assert compare([1.0 + 2.0**-30], [1.0], 0.0, 0.0).max_abs == 2.0**-30


def test_another_shape_is_a_failed_check_and_nothing_to_compare_is_an_error():
    with pytest.raises(CheckFailed, match=r"\[2\], expected \[2, 1\]"):
        compare([1.0, 2.0], [[1.0], [2.0]])
    with pytest.raises(InputError, match="nothing to compare"):
        compare([], [])
    for atol, rtol in ((-1.0, 0.0), (0.0, math.nan), (math.inf, 0.0)):
        with pytest.raises(InputError, match="expected finite numbers of at least 0"):
            compare([1.0], [1.0], atol, rtol)


def test_the_line_names_the_worst_element_and_the_verdict():
    line = compare([[1.0, 2.0], [3.0, 4.5]], [[1.0, 2.0], [3.0, 4.0]], 0.1, 0.0).line()
    assert line.startswith("FAILED in 1 of 4: max 5.00e-01")
    assert "worst [1, 1] 4.5 for 4" in line
    assert "passes from atol 5.00e-01" in line
    assert "\n" not in line
