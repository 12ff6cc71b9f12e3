"""hcmen.base.metrics against numbers worked out by hand, and the traps that published tables have fallen into."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hcmen.base import metrics
from hcmen.base.errors import InputError
from hcmen.base.inputs import FeatureConfig, Inputs

# Six samples, worked out below.
TRUTH = [-2.6, -1.0, 0.0, 0.4, 1.5, 3.0]
PREDICTION = [-1.0, 0.2, -0.1, 0.6, 2.5, 2.9]


def test_mosi_by_hand() -> None:
    found = metrics.scores(TRUTH, PREDICTION)
    assert found["mae"] == pytest.approx((1.6 + 1.2 + 0.1 + 0.2 + 1.0 + 0.1) / 6)
    # Rounded half to even: truth -3 -1 0 0 2 3, prediction -1 0 0 1 2 3 (2.5 -> 2).
    assert found["acc7"] == pytest.approx(3 / 6)
    # Clipped to [-2, 2]: truth -2 -1 0 0 2 2, prediction -1 0 0 1 2 2.
    assert found["acc5"] == pytest.approx(3 / 6)
    # Clipped to [-1, 1]: truth -1 -1 0 0 1 1, prediction -1 0 0 1 1 1.
    assert found["acc3"] == pytest.approx(4 / 6)
    # Not negative: truth 0 0 1 1 1 1, prediction 0 1 0 1 1 1.
    assert found["acc2_has0"] == pytest.approx(4 / 6)
    # Class 0: precision 1/2, recall 1/2. Class 1: precision 3/4, recall 3/4. Weights 2/6 and 4/6.
    assert found["f1_has0"] == pytest.approx(2 / 6 * 0.5 + 4 / 6 * 0.75)
    # Without the zero: truth 0 0 1 1 1, prediction 0 1 1 1 1.
    assert found["acc2_non0"] == pytest.approx(4 / 5)
    # Class 0: precision 1, recall 1/2, F1 2/3. Class 1: precision 3/4, recall 1, F1 6/7.
    assert found["f1_non0"] == pytest.approx(2 / 5 * 2 / 3 + 3 / 5 * 6 / 7)


def test_correlation_by_hand() -> None:
    # Deviations (-1, 0, 1) and (-2, 1, 1): 3 / sqrt(2 * 6).
    assert metrics.pearson([1, 2, 3], [0, 3, 3]) == pytest.approx(3 / math.sqrt(12))
    assert metrics.pearson([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)


def test_sims_by_hand() -> None:
    truth = [-1.0, -0.7, -0.1, 0.0, 0.1, 0.6, 1.0]
    prediction = [-1.4, -0.6, 0.0, 0.1, 0.2, 0.8, 0.5]
    found = metrics.scores(truth, prediction, "sims")
    # -1.4 counts as -1: SIMS measures everything on clipped values.
    assert found["mae"] == pytest.approx((0.0 + 0.1 + 0.1 + 0.1 + 0.1 + 0.2 + 0.5) / 7)
    # Zero counts as negative: truth 0 0 0 0 1 1 1, prediction 0 0 0 1 1 1 1.
    assert found["acc2"] == pytest.approx(6 / 7)
    # Bins closed on the right at -0.1 and 0.1: truth 0 0 0 1 1 2 2, prediction 0 0 1 1 2 2 2.
    assert found["acc3"] == pytest.approx(5 / 7)
    # And at -0.7 and 0.7: truth 0 0 1 2 2 3 4, prediction 0 1 2 2 3 4 3.
    assert found["acc5"] == pytest.approx(2 / 7)
    # Class 0: precision 1, recall 3/4, F1 6/7. Class 1: precision 3/4, recall 1, F1 6/7.
    assert found["f1"] == pytest.approx(6 / 7)


@pytest.mark.parametrize(
    ("positives", "negatives", "accuracy", "right", "swapped"),
    [
        # MOSI's test split without zeros (facts: 57.77, F1 42.31) and with them, MOSEI's and SIMS's.
        (277, 379, 57.77, 42.31, 73.24),
        (307, 379, 55.25, 39.32, 71.17),
    ],
)
def test_swapped_f1_flatters_a_constant(
    positives: int, negatives: int, accuracy: float, right: float, swapped: float
) -> None:
    """The published trap: with its arguments exchanged, F1 of a model that always says negative gains 30 points."""
    truth = np.repeat([1, 0], [positives, negatives])
    constant = np.zeros_like(truth)
    assert 100 * np.mean(truth == constant) == pytest.approx(accuracy, abs=0.01)
    assert 100 * metrics.weighted_f1(truth, constant) == pytest.approx(right, abs=0.01)
    assert 100 * metrics.weighted_f1(constant, truth) == pytest.approx(swapped, abs=0.01)


def test_scores_take_truth_first() -> None:
    truth = np.repeat([1.0, -1.0], [277, 379])
    found = metrics.scores(truth, np.full(656, -0.3))
    assert found["f1_non0"] == pytest.approx(0.4231, abs=1e-4)
    assert found["acc2_non0"] == pytest.approx(0.5777, abs=1e-4)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e8 / 3])
def test_constant_predictions_have_no_correlation(constant: float) -> None:
    truth = np.linspace(-3, 3, 101)
    assert metrics.pearson(truth, np.full(101, constant)) == 0.0
    assert metrics.pearson(np.full(101, constant), truth) == 0.0


@pytest.mark.parametrize(("bad", "count"), [([np.nan, 0.0, np.nan], 2), ([np.inf, 0.0, 0.0], 1)])
def test_numbers_that_are_none_are_refused(bad: list[float], count: int) -> None:
    with pytest.raises(InputError, match=f"prediction holds {count} of 3 values"):
        metrics.scores([0.0, 1.0, 2.0], bad)
    with pytest.raises(InputError, match=f"truth holds {count} of 3 values"):
        metrics.scores(bad, [0.0, 1.0, 2.0])


@pytest.mark.parametrize(("truth", "prediction"), [([], []), ([1.0], [1.0, 2.0]), ([[1.0]], [[1.0]])])
def test_shapes_are_checked(truth: list, prediction: list) -> None:
    for measure in (metrics.scores, metrics.mae, metrics.pearson, metrics.weighted_f1):
        with pytest.raises(InputError, match="expected \\[samples\\] of both"):
            measure(truth, prediction)


def test_unknown_family() -> None:
    for measure in (lambda: metrics.scores([1.0], [1.0], "moso"), lambda: metrics.floor([1.0], [1.0], "moso")):
        with pytest.raises(InputError, match="choose from mosi, sims, range"):
            measure()


@pytest.mark.parametrize(
    ("label_min", "label_max", "name", "neutral"),
    [
        *((-3, 3, "mosi", 0), (-1, 1, "sims", 0), (-4, 4, "range", 0), (1, 5, "range", 3), (0, 1, "range", 0.5)),
        *((-2.9, 3.0, "range", 0), (-5, -1, "range", -3), (-3, 0, "range", -1.5)),
    ],
)
def test_every_range_has_a_family(label_min: float, label_max: float, name: str, neutral: float) -> None:
    family = metrics.family_for(label_min, label_max)
    assert (family.name, family.neutral) == (name, neutral)
    assert family.acc2 in metrics.scores([label_min, label_max], [label_max, label_max], family)
    scale = Inputs(FeatureConfig(1, 1), FeatureConfig(1, 1), FeatureConfig(1, 1), None, label_min, label_max)
    assert scale.label(neutral) == "neutral", "what a device says and what is measured have one middle"
    assert (scale.label(neutral - 0.1), scale.label(neutral + 0.1)) == ("negative", "positive")


@pytest.mark.parametrize("bad", [(1, 1), (3, -3), (float("nan"), 1), (0, float("inf"))])
def test_what_is_no_range_is_refused(bad: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="expected two finite numbers in rising order"):
        metrics.family_for(*bad)


def test_stars_by_hand() -> None:
    """Labels 1 to 5: 3 is neutral. Two negative, one neutral, three positive."""
    truth, family = [1.0, 2.0, 3.0, 4.0, 5.0, 5.0], metrics.family_for(1, 5)
    found = metrics.scores(truth, [2.0, 3.5, 2.0, 4.0, 3.0, 5.0], family)
    assert found.keys() == {"mae", "corr", "acc2_has0", "f1_has0", "acc2_non0", "f1_non0"}
    assert found["mae"] == pytest.approx((1 + 1.5 + 1 + 0 + 2 + 0) / 6)
    assert found["acc2_has0"] == pytest.approx(4 / 6)  # 3 is not negative: the scores 3.5 for 2 and 2 for 3 are wrong
    assert found["acc2_non0"] == pytest.approx(3 / 5)  # a score of 3 is not above 3
    floor = metrics.floor(truth, [4.0, 4.0], family)
    assert floor["mae"] == pytest.approx((3 + 2 + 1 + 0 + 1 + 1) / 6)
    assert floor["acc2_has0"] == pytest.approx(4 / 6)
    assert floor["acc2_non0"] == pytest.approx(3 / 5)
    assert floor["f1_non0"] == pytest.approx(3 / 5 * 2 * 3 / (3 + 5))


def test_a_range_about_zero_has_the_two_classes_of_mosi() -> None:
    rng = np.random.default_rng(0)
    truth, prediction = rng.integers(-4, 5, 50).astype(float), rng.normal(size=50)
    wide, mosi = metrics.scores(truth, prediction, metrics.family_for(-4, 4)), metrics.scores(truth, prediction)
    assert wide == {name: mosi[name] for name in wide}
    assert metrics.floor(truth, truth, metrics.family_for(-4, 4)) == {
        name: value for name, value in metrics.floor(truth, truth).items() if name in wide
    }


def test_only_zero_labels_leave_non0_open() -> None:
    found = metrics.scores([0.0, 0.0], [1.0, -1.0])
    assert math.isnan(found["acc2_non0"])
    assert math.isnan(found["f1_non0"])
    assert found["acc2_has0"] == 0.5


def test_floor_by_hand() -> None:
    truth = np.array([-2.0] * 3 + [0.0] * 2 + [1.0] * 4 + [3.0])
    found = metrics.floor(truth, np.array([0.0, 1.0]))
    assert found["mae"] == pytest.approx((3 * 2.5 + 2 * 0.5 + 4 * 0.5 + 2.5) / 10)
    assert found["corr"] == 0.0
    assert found["acc2_non0"] == pytest.approx(5 / 8)
    assert found["acc2_has0"] == pytest.approx(7 / 10)
    assert found["acc7"] == pytest.approx(4 / 10)
    assert found["acc3"] == pytest.approx(5 / 10)
    # Always positive: class 1 has precision 5/8, recall 1; class 0 has F1 0.
    assert found["f1_non0"] == pytest.approx(5 / 8 * (2 * 5 / 13))


def test_floor_of_sims() -> None:
    truth = np.array([-0.8] * 5 + [-0.4] * 2 + [0.0] * 3 + [0.5] * 4)
    found = metrics.floor(truth, truth, "sims")
    assert found["acc2"] == pytest.approx(10 / 14)
    assert found["acc3"] == pytest.approx(7 / 14)
    assert found["acc5"] == pytest.approx(5 / 14)


labels = st.lists(st.integers(-15, 15).map(lambda n: n / 5), min_size=1, max_size=40)


@given(labels, st.randoms(use_true_random=False))
def test_properties(truth: list[float], random: object) -> None:
    prediction = [float(np.clip(t + random.uniform(-2, 2), -4, 4)) for t in truth]  # type: ignore[attr-defined]
    for family in ("mosi", "sims"):
        found = metrics.scores(truth, prediction, family)
        perfect = metrics.scores(truth, truth, family)
        assert perfect["mae"] == 0.0
        assert all(v == 1.0 for k, v in perfect.items() if k.startswith(("acc", "f1")) and not math.isnan(v))
        assert all(0.0 <= v <= 1.0 for k, v in found.items() if k.startswith(("acc", "f1")) and not math.isnan(v))
        assert -1.0 <= found["corr"] <= 1.0
        order = np.random.default_rng(0).permutation(len(truth))
        shuffled = metrics.scores(np.array(truth)[order], np.array(prediction)[order], family)
        assert shuffled == pytest.approx(found, nan_ok=True, abs=1e-9)


def test_weighted_f1_from_precision_and_recall() -> None:
    """The textbook way round: precision and recall of each class, 0 where a class is never named."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        y, p = generator.integers(0, 4, (2, 25))
        expected = 0.0
        for c in set(y.tolist()):
            hits = sum(1 for a, b in zip(y, p, strict=True) if a == b == c)
            named, there = int(np.sum(p == c)), int(np.sum(y == c))
            precision, recall = (hits / named if named else 0.0), hits / there
            expected += there / len(y) * (2 * precision * recall / (precision + recall) if hits else 0.0)
        assert metrics.weighted_f1(y, p) == pytest.approx(expected)


# --- at the edges, against MMSA's own lines -----------------------------------------------------------------------


def mmsa_sims(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Accuracies of MMSA's __eval_sims_regression, by its own loops over float32."""
    y_p, y_t = np.clip(prediction, -1.0, 1.0), np.clip(truth, -1.0, 1.0)
    found = {}
    for name, edges in (
        ("acc2", [-1.01, 0.0, 1.01]),
        ("acc3", [-1.01, -0.1, 0.1, 1.01]),
        ("acc5", [-1.01, -0.7, -0.1, 0.1, 0.7, 1.01]),
    ):
        a, b = y_p.copy(), y_t.copy()
        for i in range(len(edges) - 1):
            a[np.logical_and(y_p > edges[i], y_p <= edges[i + 1])] = i
        for i in range(len(edges) - 1):
            b[np.logical_and(y_t > edges[i], y_t <= edges[i + 1])] = i
        found[name] = float(np.sum(a == b)) / len(b)
    return found


def mmsa_mosi(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Accuracies of MMSA's __eval_mosei_regression."""
    found = {}
    for name, bound in (("acc7", 3.0), ("acc5", 2.0), ("acc3", 1.0)):
        a, b = np.clip(prediction, -bound, bound), np.clip(truth, -bound, bound)
        found[name] = float(np.sum(np.round(a) == np.round(b))) / len(b)
    found["acc2_has0"] = float(np.mean((truth >= 0) == (prediction >= 0)))
    kept = truth != 0
    found["acc2_non0"] = float(np.mean((truth[kept] > 0) == (prediction[kept] > 0))) if kept.any() else math.nan
    return found


EDGES = {
    "sims": (mmsa_sims, [-1.0, -0.7, -0.1, 0.0, 0.1, 0.7, 1.0]),
    "mosi": (mmsa_mosi, [-3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]),
}


@pytest.mark.parametrize("widened", [False, True], ids=["float32", "as float64"])
@pytest.mark.parametrize("family", EDGES)
def test_at_every_edge_as_mmsa_does(family: str, widened: bool) -> None:
    """Each edge and its float32 neighbours, against one value of each class; float32 as it is, or handed on wider."""
    oracle, edges = EDGES[family]
    middles = np.float32([*(np.array(edges[1:]) + edges[:-1]) / 2])
    for edge in np.float32(edges):
        for value in (edge, np.nextafter(edge, np.float32(9)), np.nextafter(edge, np.float32(-9)), -edge):
            truth = np.full_like(middles, value)
            for y, p in ((truth, middles), (middles, truth)):
                expected = oracle(p, y)
                if widened:
                    y, p = y.astype(np.float64), p.tolist()
                found = metrics.scores(y, p, family)
                for name, score in expected.items():
                    assert found[name] == pytest.approx(score, nan_ok=True), (edge, value, name)


@pytest.mark.parametrize("family", EDGES)
def test_values_on_tenths_as_mmsa_does(family: str) -> None:
    oracle, edges = EDGES[family]
    generator = np.random.default_rng(0)
    truth, prediction = (
        (generator.integers(10 * edges[0], 10 * edges[-1] + 1, 400) / 10).astype(np.float32) for _ in range(2)
    )
    found = metrics.scores(truth, prediction, family)
    for name, score in oracle(prediction, truth).items():
        assert found[name] == pytest.approx(score)
