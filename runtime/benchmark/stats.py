"""How figures are made of timed calls, and when two of them differ.

The calls of one turn resemble each other more than those of different rounds do, so calls are not taken for independent
observations. The unit is the round: what a row's calls in one round have as their median. Neighbouring rounds can
resemble each other too, when the machine drifts in waves longer than a round; `blocks` then merges neighbours until
they do not. Intervals are made of the blocks by ranks alone, with no assumption on the shape of the noise:

    median_interval   of the median of one row: order statistics (the sign test turned round)
    ratio_interval    of two rows that were measured apart: Mann-Whitney's test turned round, on logarithms, with its
                      exact distribution (Hodges and Lehmann 1963; Bauer 1972)

A wave longer than a run cannot be seen in intervals. `wandering` is how far a row's own median went within the run; a
difference between runs that is no larger is no difference (judge.py).

Two rows of one run took turns, so their ratio is taken round by round, where the drift of the machine cancels, and
`median_interval` of the logarithms is its interval.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CONFIDENCE",
    "LEAST_BEYOND",
    "Interval",
    "blocks",
    "calls_needed",
    "enough",
    "median_interval",
    "paired_ratio",
    "ratio_interval",
    "row_interval",
    "settled",
    "u_distribution",
    "wandering",
]

CONFIDENCE = 0.95
LEAST_BEYOND = 10
"""A percentile needs this many calls beyond it; with fewer it is marked, since a few calls decide it."""
_FEWEST_BLOCKS = 8  # merging stops here: fewer blocks could not show a difference among several rows
_MOST_BLOCKS = 1000  # more would make the intervals no better; two such rows have a million ratios
_EXACT_PAIRS = 10_000  # beyond so many pairs the normal approximation of Mann-Whitney's U is good to 0.0005

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval. low, high: None where there are too few blocks for one."""

    estimate: float
    low: float | None
    high: float | None
    blocks: int


def enough(n: int, percent: float) -> bool:
    """Whether `n` calls leave `LEAST_BEYOND` of them beyond the percentile: 20 for p50, 100 for p90, 1000 for p99."""
    return n >= calls_needed(percent)


def calls_needed(percent: float) -> int:
    """How many calls the percentile needs; see `enough`."""
    return math.ceil(round(100 * LEAST_BEYOND / (100 - percent), 6))


def settled(times: Sequence[float], window: int = 5, tolerance: float = 0.05) -> bool:
    """Whether warming up is over: the medians of the last two windows of calls differ by no more than `tolerance`."""
    if len(times) < 2 * window:
        return False
    before, after = np.median(times[-2 * window : -window]), np.median(times[-window:])
    return bool(abs(after - before) <= tolerance * before)


def blocks(values: Sequence[float]) -> Floats:
    """`values` in the order of their rounds, neighbours merged (geometric mean) while they resemble each other.

    They do when the autocorrelation at lag one of their logarithms is above 1 / sqrt(count), about one standard error
    of it under independence: merging needlessly costs little, a needed merge left out makes intervals too narrow.
    More than `_MOST_BLOCKS` are merged as well.
    """
    logs = np.log(np.maximum(np.asarray(values, np.float64), np.finfo(np.float64).tiny))
    while len(logs) >= 2 * _FEWEST_BLOCKS and (
        len(logs) > _MOST_BLOCKS or _autocorrelation(logs) > 1 / math.sqrt(len(logs))
    ):
        pairs = len(logs) // 2
        odd = logs[2 * pairs :]
        logs = logs[: 2 * pairs].reshape(pairs, 2).mean(1)
        if odd.size:  # the last round joins the last pair
            logs[-1] = (2 * logs[-1] + odd[0]) / 3
    return np.asarray(np.exp(logs), np.float64)


def _autocorrelation(x: Floats) -> float:
    centred = x - x.mean()
    total = float(centred @ centred)
    return float(centred[1:] @ centred[:-1]) / total if total > 0 else 0.0


def median_interval(values: Sequence[float] | Floats, confidence: float = CONFIDENCE) -> Interval:
    """The median of independent `values`, between two of them such that the interval holds it with `confidence`.

    The k-th smallest and k-th largest hold the median unless fewer than k values lie on one side of it, which happens
    with probability 2 P(Binomial(n, 1/2) < k); k is the largest that keeps this within 1 - confidence. Below six values
    there is none for 95 %.
    """
    ordered = np.sort(np.asarray(values, np.float64))
    n, below, k = len(ordered), 0.0, 0
    while k < n // 2:
        below += math.comb(n, k) / 2**n  # of whole numbers: no n is too large
        if 2 * below > 1 - confidence:
            break
        k += 1
    estimate = float(np.median(ordered))
    if k == 0:
        return Interval(estimate, None, None, n)
    return Interval(estimate, float(ordered[k - 1]), float(ordered[n - k]), n)


def paired_ratio(rounds: Sequence[float], reference: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The ratio of two rows of one run, from what each took in the rounds that both have, in their order."""
    ratios = np.asarray(rounds, np.float64) / np.asarray(reference, np.float64)
    found = median_interval(blocks(ratios.tolist()), confidence)
    return _holding(float(np.median(ratios)), found)


def _holding(estimate: float, found: Interval) -> Interval:
    """`found`, widened where needed to hold an estimate that was made of more than its blocks."""
    if found.low is None or found.high is None:
        return Interval(estimate, None, None, found.blocks)
    return Interval(estimate, min(found.low, estimate), max(found.high, estimate), found.blocks)


def row_interval(rounds: Sequence[float], estimate: float, confidence: float = CONFIDENCE) -> Interval:
    """The interval of a row's p50 `estimate` from the medians of its rounds."""
    return _holding(estimate, median_interval(blocks(rounds), confidence))


def wandering(values: Sequence[float]) -> float:
    """How far the median went within a run: the largest |log| between that of a quarter of the rounds and that of all.

    0.05 is about 5 %. Fewer than four rounds give their own spread.
    """
    logs = np.log(np.asarray(values, np.float64))
    parts = np.array_split(logs, min(4, len(logs)))
    return max(abs(float(np.median(part) - np.median(logs))) for part in parts)


def ratio_interval(new: Sequence[float], old: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """How much longer `new` takes than `old`, two rows measured apart: the median of all ratios of their blocks.

    The interval holds the true ratio with `confidence` if the two differ by a factor alone. Its ends are the c-th
    smallest and c-th largest ratio, c the largest number with 2 P(U < c) <= 1 - confidence under Mann-Whitney's
    distribution.
    """
    a, b = np.log(blocks(new)), np.log(blocks(old))
    ratios = np.sort((a[:, None] - b[None, :]).ravel())
    estimate = float(np.exp(np.median(ratios)))
    cumulative = u_distribution(len(a), len(b))
    c = int(np.searchsorted(cumulative, (1 - confidence) / 2, side="right"))
    if c == 0:
        return Interval(estimate, None, None, min(len(a), len(b)))
    return Interval(estimate, float(np.exp(ratios[c - 1])), float(np.exp(ratios[len(ratios) - c])), min(len(a), len(b)))


@functools.lru_cache(maxsize=64)
def u_distribution(n: int, m: int) -> Any:
    """P(U <= u) for u = 0 ... n*m, for samples of n and m values with no ties and no difference between them.

    Exact by the recursion of Mann and Whitney (1947): the largest value is one of the n, which then exceeds m, or of
    the m. For many pairs the normal approximation with continuity correction.
    """
    if n * m > _EXACT_PAIRS:
        deviation = math.sqrt(n * m * (n + m + 1) / 12)
        z = (np.arange(n * m + 1) + 0.5 - n * m / 2) / deviation
        return np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in z])
    row = [np.ones(1) for _ in range(m + 1)]  # of 0 values against 0 ... m: U is 0
    for i in range(1, n + 1):
        above = row
        row = [np.ones(1)]
        for j in range(1, m + 1):
            probabilities = np.zeros(i * j + 1)
            probabilities[j:] += above[j] * (i / (i + j))
            probabilities[: i * (j - 1) + 1] += row[j - 1] * (j / (i + j))
            row.append(probabilities)
    return np.minimum(np.cumsum(row[m]), 1.0)
