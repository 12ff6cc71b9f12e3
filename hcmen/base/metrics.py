"""The measures of multimodal sentiment analysis, as the field's toolkit MMSA defines them (its `metricsTop`).

Argument order is (truth, prediction) everywhere, F1 included: swapped, a constant predictor looks 20 points better.
Accuracies and F1 are fractions. Two families, by the range of the labels:

    mosi   MOSI and MOSEI, labels in [-3, 3]: MAE, Corr; Acc-7, Acc-5, Acc-3 by rounding (half to even) after clipping;
           Acc-2 and F1 twice: has0 (negative / not negative, every sample) and non0 (negative / positive, the
           samples whose label is not zero)
    sims   SIMS and SIMSv2, labels in [-1, 1]: all measures on clipped values; Acc-2, Acc-3, Acc-5 by bins that are
           closed on the right, so that zero counts as negative; F1 of the two classes

Classes are judged in float32, the type of labels and predictions in MMSA: there 0.1 lies on the edge 0.1, while its
float32 value widened to float64 lies above. MAE and Corr are computed in float64.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hcmen.base.errors import InputError, unknown_name

__all__ = ["HEADLINE_ACC2", "family_for", "floor", "mae", "pearson", "scores", "weighted_f1"]

Array = npt.NDArray[np.float64]
Single = npt.NDArray[np.float32]
Classes = npt.NDArray[np.int64]

HEADLINE_ACC2 = {"mosi": "acc2_non0", "sims": "acc2"}
"""The two-class accuracy that each family quotes first."""

_SIMS_EDGES = {"acc2": (0.0,), "acc3": (-0.1, 0.1), "acc5": (-0.7, -0.1, 0.1, 0.7)}


def family_for(label_min: float, label_max: float) -> str:
    """The family of measures for labels in [label_min, label_max]: "mosi" or "sims".

    Raises:
        InputError: the range is neither [-3, 3] nor [-1, 1].
    """
    found = {(-3.0, 3.0): "mosi", (-1.0, 1.0): "sims"}.get((label_min, label_max))
    if found is None:
        raise InputError(f"label range is [{label_min:g}, {label_max:g}], expected [-3, 3] or [-1, 1]")
    return found


def scores(truth: npt.ArrayLike, prediction: npt.ArrayLike, family: str = "mosi") -> dict[str, float]:
    """Every measure of `family` for `prediction` against `truth`, both [samples].

    A measure that has no sample to stand on (non0 where every label is zero) is NaN.

    Raises:
        InputError: no samples, shapes disagree, a value is NaN or infinite, or the family is unknown.
    """
    y, p = _checked(truth, prediction)
    if family == "mosi":
        return _mosi(y, p)
    if family == "sims":
        return _sims(y, p)
    raise unknown_name("family of measures", family, ("mosi", "sims"))


def floor(truth: npt.ArrayLike, training_labels: npt.ArrayLike, family: str = "mosi") -> dict[str, float]:
    """What each measure is worth when nothing is known of the sample: the bar that a score has to clear.

    MAE and Corr are those of the mean of the training labels. Each accuracy and F1 is that of always naming the class
    that is commonest in `truth` (the best constant answer, and the floor that published tables are read against).

    Raises:
        InputError: as `scores`.
    """
    y, constant = _checked(truth, np.full(np.shape(truth), np.asarray(training_labels, np.float64).mean()))
    best = scores(y, constant, family)
    # Every constant answer that falls in another class of any of the measures.
    candidates = np.arange(-3.0, 3.5, 1.0) if family == "mosi" else np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    tried = [scores(y, np.full_like(y, c), family) for c in candidates]
    for name in best:
        if name.startswith("acc"):
            best[name] = max(s[name] for s in tried)
            f1 = name.replace("acc2", "f1")
            if f1 in best:
                best[f1] = max(tried, key=lambda s: s[name])[f1]
    return best


def mae(truth: npt.ArrayLike, prediction: npt.ArrayLike) -> float:
    """Mean absolute error."""
    y, p = _checked(truth, prediction)
    return float(np.abs(p - y).mean())


def pearson(truth: npt.ArrayLike, prediction: npt.ArrayLike) -> float:
    """Pearson correlation; 0 where either side is constant, since it then explains nothing (the formula gives 0/0)."""
    y, p = _checked(truth, prediction)
    y, p = y - y.mean(), p - p.mean()
    # A constant side leaves rounding noise after its mean is taken off; that noise correlates with anything.
    if np.ptp(y) <= 1e-12 or np.ptp(p) <= 1e-12:
        return 0.0
    return float(np.clip((y @ p) / np.sqrt((y @ y) * (p @ p)), -1.0, 1.0))


def weighted_f1(truth: npt.ArrayLike, prediction: npt.ArrayLike) -> float:
    """F1 of each class, averaged with the class's share of `truth` as its weight (scikit-learn's average="weighted").

    Args:
        truth, prediction: [samples], integers or booleans. The order matters.
    """
    y, p = np.asarray(truth), np.asarray(prediction)
    if y.ndim != 1 or y.shape != p.shape or not y.size:
        raise InputError(f"truth has shape {list(y.shape)} and prediction {list(p.shape)}, expected [samples] of both")
    total = 0.0
    for c in np.unique(y):
        support, named = np.sum(y == c), np.sum(p == c)
        total += support * 2 * np.sum((y == c) & (p == c)) / (support + named)
    return float(total / y.size)


def _mosi(truth: Array, prediction: Array) -> dict[str, float]:
    result = {"mae": mae(truth, prediction), "corr": pearson(truth, prediction)}
    y, p = _single(truth), _single(prediction)
    for name, bound in (("acc7", 3.0), ("acc5", 2.0), ("acc3", 1.0)):
        # np.round is half to even, as in MMSA: 0.5 belongs to class 0, 1.5 to class 2.
        result[name] = float(np.mean(np.round(np.clip(y, -bound, bound)) == np.round(np.clip(p, -bound, bound))))
    result["acc2_has0"], result["f1_has0"] = _two_classes(y >= 0, p >= 0)
    kept = y != 0
    result["acc2_non0"], result["f1_non0"] = _two_classes(y[kept] > 0, p[kept] > 0)
    return result


def _sims(truth: Array, prediction: Array) -> dict[str, float]:
    truth, prediction = np.clip(truth, -1.0, 1.0), np.clip(prediction, -1.0, 1.0)
    result = {"mae": mae(truth, prediction), "corr": pearson(truth, prediction)}
    y, p = _single(truth), _single(prediction)
    for name, edges in _SIMS_EDGES.items():
        result[name] = float(np.mean(_bins(y, edges) == _bins(p, edges)))
    result["f1"] = weighted_f1(_bins(y, _SIMS_EDGES["acc2"]), _bins(p, _SIMS_EDGES["acc2"]))
    return result


def _single(x: Array) -> Single:
    with np.errstate(over="ignore", under="ignore"):
        return x.astype(np.float32)


def _bins(x: Single, edges: tuple[float, ...]) -> Classes:
    """The bin of each value; a value on an edge belongs to the bin below it."""
    # digitize takes the edges to float64 otherwise, and the values with them.
    return np.digitize(x, np.array(edges, np.float32), right=True).astype(np.int64)


def _two_classes(y: npt.NDArray[np.bool_], p: npt.NDArray[np.bool_]) -> tuple[float, float]:
    if not y.size:
        return float("nan"), float("nan")
    return float(np.mean(y == p)), weighted_f1(y, p)


def _checked(truth: npt.ArrayLike, prediction: npt.ArrayLike) -> tuple[Array, Array]:
    y, p = np.asarray(truth, dtype=np.float64), np.asarray(prediction, dtype=np.float64)
    if y.ndim != 1 or y.shape != p.shape or not y.size:
        raise InputError(f"truth has shape {list(y.shape)} and prediction {list(p.shape)}, expected [samples] of both")
    for name, x in (("truth", y), ("prediction", p)):
        bad = int(np.sum(~np.isfinite(x)))
        if bad:
            raise InputError(f"{name} holds {bad} of {x.size} values that are NaN or infinite, expected finite numbers")
    return y, p
