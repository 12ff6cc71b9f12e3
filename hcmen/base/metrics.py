"""The measures of multimodal sentiment analysis, as the field's toolkit MMSA defines them (its `metricsTop`).

Argument order is (truth, prediction) everywhere, F1 included: swapped, a constant predictor looks 20 points better.
Accuracies and F1 are fractions. Three families, by the range of the labels:

    mosi   MOSI and MOSEI, labels in [-3, 3]: MAE, Corr; Acc-7, Acc-5, Acc-3 by rounding (half to even) after clipping;
           Acc-2 and F1 twice: has0 (negative / not negative, every sample) and non0 (negative / positive, the
           samples whose label is not zero)
    sims   SIMS and SIMSv2, labels in [-1, 1]: all measures on clipped values; Acc-2, Acc-3, Acc-5 by bins that are
           closed on the right, so that zero counts as negative; F1 of the two classes
    range  any other range: MAE, Corr; Acc-2 and F1 twice, as of mosi, about the neutral point of the range. That is 0
           where 0 lies within (VADER's -4 to 4), else the middle (3 of 1 to 5 stars). non0 leaves neutral labels out,
           as the polarity sets of star ratings do (Blitzer et al., ACL 2007; Zhang et al., NIPS 2015). Acc-7, Acc-5
           and Acc-3 are left out: their bounds are those of [-3, 3], and elsewhere would merge or leave out classes

Classes are judged in float32, the type of labels and predictions in MMSA: there 0.1 lies on the edge 0.1, while its
float32 value widened to float64 lies above. MAE and Corr are computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hcmen.base.errors import InputError, unknown_name
from hcmen.base.inputs import neutral_label

__all__ = [
    "HEADLINE_ACC2",
    "Family",
    "family_for",
    "floor",
    "mae",
    "pearson",
    "plain",
    "scores",
    "spread",
    "weighted_f1",
]

Array = npt.NDArray[np.float64]
Single = npt.NDArray[np.float32]
Classes = npt.NDArray[np.int64]

HEADLINE_ACC2 = {"mosi": "acc2_non0", "sims": "acc2", "range": "acc2_non0"}
"""The two-class accuracy that each family quotes first, by its name."""

_SIMS_EDGES = {"acc2": (0.0,), "acc3": (-0.1, 0.1), "acc5": (-0.7, -0.1, 0.1, 0.7)}


@dataclass(frozen=True)
class Family:
    """A family of measures. name: "mosi", "sims" or "range". neutral: the label that is neither of its two classes."""

    name: str
    neutral: float = 0.0

    @property
    def acc2(self) -> str:
        """The two-class accuracy that the family quotes first."""
        return HEADLINE_ACC2[self.name]


def family_for(label_min: float, label_max: float) -> Family:
    """The family of measures for labels in [label_min, label_max].

    Raises:
        InputError: the two are no range, finite numbers in rising order.
    """
    if not (np.isfinite(label_min) and np.isfinite(label_max) and label_min < label_max):
        raise InputError(f"label range is [{label_min:g}, {label_max:g}], expected two finite numbers in rising order")
    name = {(-3.0, 3.0): "mosi", (-1.0, 1.0): "sims"}.get((label_min, label_max), "range")
    return Family(name, neutral_label(label_min, label_max))


def scores(truth: npt.ArrayLike, prediction: npt.ArrayLike, family: Family | str = "mosi") -> dict[str, float]:
    """Every measure of `family` for `prediction` against `truth`, both [samples].

    A measure that has no sample to stand on (non0 where every label is zero) is NaN.

    Args:
        truth, prediction: labels and scores. family: of `family_for`, or a name, whose neutral label is then 0.

    Raises:
        InputError: no samples, shapes disagree, a value is NaN or infinite, or the family is unknown.
    """
    y, p = _checked(truth, prediction)
    family = Family(family) if isinstance(family, str) else family
    if family.name == "mosi":
        return _mosi(y, p)
    if family.name == "sims":
        return _sims(y, p)
    if family.name == "range":
        return {"mae": mae(y, p), "corr": pearson(y, p), **_polarity(_single(y), _single(p), family.neutral)}
    raise unknown_name("family of measures", family.name, HEADLINE_ACC2)


def floor(truth: npt.ArrayLike, training_labels: npt.ArrayLike, family: Family | str = "mosi") -> dict[str, float]:
    """What each measure is worth when nothing is known of the sample: the bar that a score has to clear.

    MAE and Corr are those of the mean of the training labels. Each accuracy and F1 is that of always naming the class
    that is commonest in `truth` (the best constant answer, and the floor that published tables are read against).

    Raises:
        InputError: as `scores`.
    """
    y, constant = _checked(truth, np.full(np.shape(truth), np.asarray(training_labels, np.float64).mean()))
    family = Family(family) if isinstance(family, str) else family
    best = scores(y, constant, family)
    # Every constant answer that falls in another class of any of the measures.
    candidates = {
        "mosi": np.arange(-3.0, 3.5, 1.0),
        "sims": np.array([-1.0, -0.5, 0.0, 0.5, 1.0]),
        "range": family.neutral + max(1.0, abs(family.neutral)) * np.array([-0.5, 0.0, 0.5]),
    }[family.name]
    tried = [scores(y, np.full_like(y, c), family) for c in candidates]
    for name in best:
        if name.startswith("acc"):
            best[name] = max(s[name] for s in tried)
            f1 = name.replace("acc2", "f1")
            if f1 in best:
                best[f1] = max(tried, key=lambda s: s[name])[f1]
    return best


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation (n - 1; None for one value) of several runs' `values`, and the values."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "deviation": deviation, "runs": [float(v) for v in values]}


def plain(value: Any) -> Any:
    """`value` with NaN (a measure without samples) as None, which JSON can say, and tuples as lists."""
    if isinstance(value, Mapping):
        return {key: plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(x) for x in value]
    return None if isinstance(value, float) and math.isnan(value) else value


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
    return {**result, **_polarity(y, p, 0.0)}


def _polarity(y: Single, p: Single, neutral: float) -> dict[str, float]:
    """The two classes below and above `neutral`, which belongs to the upper one (has0) or is left out (non0)."""
    middle = np.float32(neutral)
    result: dict[str, float] = {}
    result["acc2_has0"], result["f1_has0"] = _two_classes(y >= middle, p >= middle)
    kept = y != middle
    result["acc2_non0"], result["f1_non0"] = _two_classes(y[kept] > middle, p[kept] > middle)
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
