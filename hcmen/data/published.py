"""Published scores under the missing-modality protocols, each with its source and how its checkpoint was chosen.

The rule of selection matters as much as the model: code in this field picks its checkpoint on the test split, one per
measure, and the same models chosen on the validation split are several points worse. Numbers under different rules are
no ranking. F1 is left out where its source swapped truth and prediction (LNLN, ALMT).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["PUBLISHED", "Published", "published_for", "real_name"]

_ON_TEST = "test split at r = 0.5, one checkpoint per measure"
_LNLN_TABLE = "not stated; the code of the table's authors selects on the test split"
_UNSTATED = "not stated"
_ON_VALIDATION = "validation split at r = 0.5"

_TEST_SAMPLES = {"mosi": 686, "mosei": 4659, "sims": 457}


@dataclass(frozen=True)
class Published:
    """One row of a paper: the average `average` of protocol `protocol` on `dataset`.

    scores: measure -> value, named and scaled as in hcmen/metrics.py (accuracies are fractions).
    selection: how the checkpoint was chosen. source: the table.
    """

    dataset: str
    protocol: str
    average: str
    model: str
    scores: Mapping[str, float]
    selection: str
    source: str


def real_name(name: str, samples: int) -> str | None:
    """ "mosi", "mosei" or "sims" if the data set `name` with so many test samples is that one, else None.

    A name is usually a path; MMSA's own files are called MOSI/Processed/unaligned_50.pkl and the like.
    """
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    found = [k for k, n in _TEST_SAMPLES.items() if k in words and n == samples]
    return found[0] if len(found) == 1 and "synthetic" not in words else None


def published_for(dataset: str) -> list[Published]:
    """The rows for "mosi", "mosei" or "sims"."""
    return [row for row in PUBLISHED if row.dataset == dataset]


_MOSI = ("acc7", "acc5", "acc2_non0", "acc2_has0", "mae", "corr")
_SIMS = ("acc5", "acc3", "acc2", "f1", "mae", "corr")

# Averages over r = 0.0 to 0.9, in percent but for MAE and Corr; None where the source prints none or a void number.
_RATES: tuple[tuple[str, str, tuple[float | None, ...], str, str], ...] = (
    ("mosi", "Self-MM", (29.55, 34.67, 70.51, 69.26, 1.070, 0.512), _LNLN_TABLE, "LNLN, table 2"),
    ("mosi", "CENET", (30.38, 33.62, 71.46, 67.73, 1.080, 0.504), _LNLN_TABLE, "LNLN, table 2, Acc-5 of corrigendum"),
    ("mosi", "ALMT", (30.30, 33.42, 70.40, 68.39, 1.083, 0.498), _LNLN_TABLE, "LNLN, table 2"),
    ("mosi", "LNLN", (34.26, 38.27, 72.55, 70.94, 1.046, 0.527), _ON_TEST, "LNLN, table 2"),
    ("mosi", "P-RMF", (34.19, 38.50, 72.81, 71.53, 1.038, 0.525), _UNSTATED, "SemMSA, table 1"),
    ("mosi", "TF-Mamba", (33.95, 37.74, None, None, 1.035, 0.548), _ON_TEST, "SemMSA, table 1 (Acc-2 order unclear)"),
    ("mosi", "TF-Mamba", (33.35, 36.21, 73.94, 73.06, 1.055, 0.541), _UNSTATED, "RECAP, table 1 (rerun)"),
    ("mosi", "TF-Mamba", (31.70, 34.54, None, None, 1.0735, None), _UNSTATED, "CMS-Mamba, README (rerun)"),
    ("mosi", "CMS-Mamba", (34.15, 38.24, None, None, 1.0562, None), _UNSTATED, "CMS-Mamba, README"),
    ("mosi", "RECAP", (36.06, 40.23, 74.60, 73.28, 1.030, 0.544), _UNSTATED, "RECAP, table 1"),
    ("mosi", "LNLN", (31.36, 34.43, 70.00, 69.51, 1.145, 0.481), _ON_VALIDATION, "TCMR, table 1 (rerun)"),
    ("mosi", "P-RMF", (28.91, 31.24, 69.91, 69.28, 1.130, 0.501), _ON_VALIDATION, "TCMR, table 1 (rerun)"),
    ("mosi", "TF-Mamba", (28.85, 31.46, 71.05, 70.73, 1.123, 0.520), _ON_VALIDATION, "TCMR, table 1 (rerun)"),
    ("mosi", "TCMR", (32.80, 36.73, 72.01, 70.93, 1.072, 0.523), _ON_VALIDATION, "TCMR, table 1"),
    ("mosei", "Self-MM", (44.70, 45.38, 73.89, 77.42, 0.695, 0.498), _LNLN_TABLE, "LNLN, table 2"),
    ("mosei", "CENET", (47.18, 47.83, 74.67, 77.34, 0.685, 0.535), _LNLN_TABLE, "LNLN, table 2"),
    ("mosei", "ALMT", (40.92, 41.64, 76.64, 77.54, 0.674, 0.481), _LNLN_TABLE, "LNLN, table 2"),
    ("mosei", "LNLN", (45.42, 46.17, 76.30, 78.19, 0.692, 0.530), _ON_TEST, "LNLN, table 2"),
    ("mosei", "P-RMF", (44.63, 45.87, 78.14, 78.83, 0.658, 0.589), _UNSTATED, "SemMSA, table 1"),
    ("mosei", "TF-Mamba", (45.66, 46.64, None, None, 0.673, 0.578), _ON_TEST, "SemMSA, table 1 (Acc-2 order unclear)"),
    ("mosei", "TF-Mamba", (45.53, 46.89, None, None, 0.6888, None), _UNSTATED, "CMS-Mamba, README (rerun)"),
    ("mosei", "CMS-Mamba", (45.68, 46.64, None, None, 0.6653, None), _UNSTATED, "CMS-Mamba, README"),
    ("mosei", "RECAP", (47.23, 48.25, 78.35, 78.28, 0.659, 0.599), _UNSTATED, "RECAP, table 1"),
    ("mosei", "LNLN", (46.36, 47.14, 77.79, 76.43, 0.670, 0.582), _ON_VALIDATION, "TCMR, table 1 (rerun)"),
    ("mosei", "P-RMF", (47.01, 47.82, 78.07, 77.18, 0.667, 0.585), _ON_VALIDATION, "TCMR, table 1 (rerun)"),
    ("mosei", "TF-Mamba", (45.11, 46.09, 76.11, 72.54, 0.689, 0.575), _ON_VALIDATION, "TCMR, table 1 (rerun)"),
    ("mosei", "TCMR", (47.27, 48.16, 77.99, 77.59, 0.661, 0.586), _ON_VALIDATION, "TCMR, table 1"),
    ("sims", "LNLN", (34.64, 57.14, 72.73, None, 0.514, 0.397), _ON_TEST, "LNLN (F1 swapped, left out)"),
    ("sims", "LNLN", (34.68, 57.32, 73.15, 69.18, 0.515, 0.387), _UNSTATED, "LNLN, README, corrected by a reader"),
    ("sims", "TF-Mamba", (34.46, 55.51, 74.68, 72.20, 0.512, 0.386), _ON_TEST, "RECAP and SemMSA agree"),
    ("sims", "LNLN", (32.17, 56.77, 71.51, 69.21, 0.542, 0.345), _ON_VALIDATION, "TCMR, table 2 (rerun)"),
    ("sims", "TF-Mamba", (33.05, 55.18, 69.88, 69.24, 0.524, 0.359), _ON_VALIDATION, "TCMR, table 2 (rerun)"),
)


def _row(dataset: str, model: str, values: tuple[float | None, ...], selection: str, source: str) -> Published:
    names = _SIMS if dataset == "sims" else _MOSI
    scores = {
        name: round(value if name in ("mae", "corr") else value / 100, 6)
        for name, value in zip(names, values, strict=True)
        if value is not None
    }
    return Published(dataset, "intra", "mean_of_rates", model, scores, selection, source)


PUBLISHED: tuple[Published, ...] = tuple(_row(*row) for row in _RATES)
"""Every row, data set by data set."""
