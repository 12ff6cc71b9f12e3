"""The parity comparison: |got - expected| <= atol + rtol * |expected| for every element, computed in float64.

NaN or infinity on either side fails, also where both sides agree on it: a score that is no number is no score. Besides
the verdict the report gives the smallest atol that would have passed, so that a failure says how far off it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hcmen.base.errors import CheckFailed, InputError

__all__ = ["GRAPH_BOUNDS", "SCORE_ATOL", "SCORE_RTOL", "Comparison", "compare"]

SCORE_ATOL = 1e-5
"""Bound for fp32 graphs in ONNX Runtime against the eager model."""
SCORE_RTOL = 1e-5
GRAPH_BOUNDS = {"fp32": (SCORE_ATOL, SCORE_RTOL), "fp16": (2e-2, 1e-2)}
"""precision of a bundle -> (atol, rtol) of its graphs in ONNX Runtime; int8 has what its export measured."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    elements: how many were compared. nan: how many pairs hold NaN or infinity; the errors leave those out and are None
    when no pair is left. worst_index: the element that needs the largest atol (the first NaN if there is one), with
    its two values. required_atol: the smallest atol that passes at this rtol, None if none does. failed: elements out
    of bounds, NaN included.
    """

    elements: int
    atol: float
    rtol: float
    max_abs: float | None
    mean_abs: float | None
    p99_abs: float | None
    cosine: float | None
    nan: int
    worst_index: tuple[int, ...]
    worst_got: float
    worst_expected: float
    required_atol: float | None
    failed: int

    @property
    def passed(self) -> bool:
        """Whether every element is finite and within the bound."""
        return self.failed == 0

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON; a NaN or infinite worst value becomes its name."""
        return {
            "elements": self.elements,
            "max_abs": self.max_abs,
            "mean_abs": self.mean_abs,
            "p99_abs": self.p99_abs,
            "cosine": self.cosine,
            "nan": self.nan,
            "worst": {
                "index": list(self.worst_index),
                "got": _json_number(self.worst_got),
                "expected": _json_number(self.worst_expected),
            },
            "required_atol": self.required_atol,
            "failed": self.failed,
        }

    def verdict(self) -> str:
        """The verdict and the largest error, in at most 60 characters."""
        told = "ok" if self.passed else f"FAILED in {self.failed} of {self.elements}"
        error = f"{self.nan} NaN or infinite" if self.nan or self.max_abs is None else f"{self.max_abs:.1e}"
        return f"{told}, largest error {error}"

    def line(self) -> str:
        """The report on one line."""
        verdict = "ok" if self.passed else f"FAILED in {self.failed} of {self.elements}"
        bound = f"bound {self.atol:g} + {self.rtol:g}*|expected|"
        if self.max_abs is None or self.required_atol is None:
            errors = f"{self.nan} NaN or infinite"
        else:
            errors = (
                f"max {self.max_abs:.2e}, mean {self.mean_abs:.2e}, p99 {self.p99_abs:.2e}, cosine {self.cosine:.7f}, "
                f"passes from atol {self.required_atol:.2e}"
            )
        place = ", ".join(str(i) for i in self.worst_index)
        return f"{verdict}: {errors}; worst [{place}] {self.worst_got:.7g} for {self.worst_expected:.7g}; {bound}"


def compare(got: ArrayLike, expected: ArrayLike, atol: float = SCORE_ATOL, rtol: float = SCORE_RTOL) -> Comparison:
    """Compares two arrays of one shape element by element.

    Args:
        got: the values to judge. expected: the reference, of the same shape.
        atol, rtol: the bound |got - expected| <= atol + rtol * |expected|.

    Raises:
        CheckFailed: the shapes differ.
        InputError: there is nothing to compare, or a tolerance is negative or not finite.
    """
    if not (0 <= atol < math.inf and 0 <= rtol < math.inf):
        raise InputError(f"atol is {atol}, rtol is {rtol}, expected finite numbers of at least 0")
    a, b = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    if a.shape != b.shape:
        raise CheckFailed(f"the output has shape {list(a.shape)}, expected {list(b.shape)}: the graph is another one")
    if a.size == 0:
        raise InputError(f"nothing to compare in shape {list(a.shape)}: give at least one element")
    finite = np.isfinite(a) & np.isfinite(b)
    nan = int(a.size - np.count_nonzero(finite))
    fa, fb = a[finite], b[finite]
    error = np.abs(fa - fb)
    needed = np.full(a.shape, np.inf)
    needed[finite] = error - rtol * np.abs(fb)
    worst = np.unravel_index(int(np.argmax(needed)), a.shape)
    failed = nan + int(np.count_nonzero(error > atol + rtol * np.abs(fb)))
    return Comparison(
        elements=int(a.size),
        atol=atol,
        rtol=rtol,
        max_abs=float(error.max()) if error.size else None,
        mean_abs=float(error.mean()) if error.size else None,
        p99_abs=float(np.quantile(error, 0.99)) if error.size else None,
        cosine=_cosine(fa, fb) if error.size else None,
        nan=nan,
        worst_index=tuple(int(i) for i in worst),
        worst_got=float(a[worst]),
        worst_expected=float(b[worst]),
        required_atol=None if nan else max(float(needed[worst]), 0.0),
        failed=failed,
    )


def _cosine(a: np.ndarray[Any, np.dtype[np.float64]], b: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    # Scaled first, so that the squares of very large or very small values neither overflow nor vanish.
    a = a / (np.abs(a).max() or 1.0)
    b = b / (np.abs(b).max() or 1.0)
    norms = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if norms == (0.0, 0.0):
        return 1.0
    if 0.0 in norms:
        return 0.0
    return float(np.clip(np.dot(a, b) / (norms[0] * norms[1]), -1.0, 1.0))


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
