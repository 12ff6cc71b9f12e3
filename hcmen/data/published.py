"""Published scores under the missing-modality protocols, each with its source and how its checkpoint was chosen.

The rule of selection matters as much as the model: code in this field picks its checkpoint on the test split, one per
measure, and the same models chosen on the validation split are several points worse. Numbers under different rules are
no ranking, and on other features they are not even comparable: such rows say so. Left out are F1 whose source swapped
truth and prediction (LNLN, ALMT, MMSA's older rows for SIMS, where the constant answer has an F1 of 81.91), Acc-2 and
F1 of a source that does not say which of the two it means, and r = 1.0, which no protocol here has.
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
_MMSA_TABLE = "not stated; MMSA's code selects on the validation split"

_OF_MMSA = "MMSA's files"
_GLOVE = "not comparable: GloVe, COVAREP 74, FACET 35, aligned"
_IMAGEBIND = "not comparable: BERT, ImageBind"

_TEST_SAMPLES = {"mosi": 686, "mosei": 4659, "sims": 457, "simsv2": 1034}


@dataclass(frozen=True)
class Published:
    """One row of a paper: the setting or average `point` of protocol `protocol` on `dataset`.

    scores: measure -> value, named and scaled as in hcmen/base/metrics.py (accuracies and F1 are fractions).
    selection: how the checkpoint was chosen. source: the table. features: what the model was given.
    """

    dataset: str
    protocol: str
    point: str
    model: str
    scores: Mapping[str, float]
    selection: str
    source: str
    features: str


def real_name(name: str, samples: int) -> str | None:
    """ "mosi", "mosei", "sims" or "simsv2" if the data set `name` with so many test samples is that one, else None.

    A name is usually a path; MMSA's own files are called MOSI/Processed/unaligned_50.pkl and the like.
    """
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    found = [k for k, n in _TEST_SAMPLES.items() if k in words and n == samples]
    return found[0] if len(found) == 1 and "synthetic" not in words else None


def published_for(dataset: str) -> list[Published]:
    """The rows for a data set that `real_name` knows."""
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


_COMPLETE_MOSI = ("acc7", "acc2_non0", "f1_non0", "mae", "corr")
_COMPLETE_SIMS = ("acc2", "acc3", "acc5", "f1", "mae", "corr")
_TEXT_MISSING = ("acc2_non0", "acc2_has0", "mae", "corr")
_AVERAGED = ("acc7", "mae", "corr")

# Complete data: the set of all modalities. LNLN is the model that was trained on missing steps, at r = 0.
_COMPLETE: tuple[tuple[str, str, tuple[float | None, ...], str, str, str], ...] = (
    ("mosi", "MulT", (36.91, 80.98, 80.95, 0.880, 0.702), _MMSA_TABLE, "MMSA, result-stat.md", _OF_MMSA),
    ("mosi", "MISA", (41.37, 83.54, 83.58, 0.777, 0.778), _MMSA_TABLE, "MMSA, result-stat.md", _OF_MMSA),
    ("mosi", "Self-MM", (46.67, 85.46, 85.43, 0.708, 0.796), _MMSA_TABLE, "MMSA, result-stat.md", _OF_MMSA),
    ("mosi", "CENET", (44.90, 85.21, 85.22, 0.725, 0.795), _MMSA_TABLE, "MMSA, result-stat.md", _OF_MMSA),
    ("mosi", "BBFN", (45.0, 84.3, 84.3, 0.776, 0.755), _UNSTATED, "BBFN, README", _UNSTATED),
    ("mosi", "LNLN", (44.56, 84.25, None, 0.751, 0.778), _ON_TEST, "LNLN, table 9", _OF_MMSA),
    ("mosi", "ALMT", (49.42, 86.43, None, 0.683, 0.805), _UNSTATED, "ALMT, quoted in its tracker", _OF_MMSA),
    ("mosi", "ALMT", (47.08, 85.37, None, 0.721, 0.792), _UNSTATED, "a user's rerun, in ALMT's tracker", _OF_MMSA),
    ("mosi", "CMS-Mamba", (None, None, None, 0.7496, 0.7796), _UNSTATED, "CMS-Mamba, README", _UNSTATED),
    ("mosi", "AGFN", (48.69, None, None, 0.7102, None), _UNSTATED, "a third party's note on its ablations", _UNSTATED),
    ("mosi", "CyIN", (48.0, None, None, 0.712, 0.801), _UNSTATED, "CyIN, table 1", _IMAGEBIND),
    ("mosi", "LNLN", (44.0, None, None, 0.762, 0.766), _UNSTATED, "CyIN, table 1 (rerun)", _IMAGEBIND),
    ("mosi", "HRLF", (None, None, 84.15, None, None), _UNSTATED, "HRLF, table 1", _GLOVE),
    ("mosei", "MulT", (52.84, 84.63, 84.52, 0.559, 0.733), _MMSA_TABLE, "MMSA, result-stat.md", _OF_MMSA),
    ("mosei", "MISA", (52.05, 84.67, 84.66, 0.558, 0.752), _MMSA_TABLE, "MMSA, result-stat.md", _OF_MMSA),
    ("mosei", "Self-MM", (53.87, 85.15, 84.90, 0.531, 0.765), _MMSA_TABLE, "MMSA, result-stat.md", _OF_MMSA),
    ("mosei", "CENET", (54.26, 86.38, 86.32, 0.526, 0.778), _MMSA_TABLE, "MMSA, result-stat.md", _OF_MMSA),
    ("mosei", "BBFN", (54.8, 86.2, 86.1, 0.529, 0.767), _UNSTATED, "BBFN, README", _UNSTATED),
    ("mosei", "LNLN", (50.66, 84.14, None, 0.572, 0.735), _ON_TEST, "LNLN, table 9", _OF_MMSA),
    ("mosei", "CMS-Mamba", (None, None, None, 0.5536, 0.7598), _UNSTATED, "CMS-Mamba, README", _UNSTATED),
    ("mosei", "CyIN", (53.2, None, None, 0.530, 0.774), _UNSTATED, "CyIN, table 1", _IMAGEBIND),
    ("mosei", "LNLN", (52.6, None, None, 0.542, 0.772), _UNSTATED, "CyIN, table 1 (rerun)", _IMAGEBIND),
    ("mosei", "HRLF", (None, None, 82.93, None, None), _UNSTATED, "HRLF, table 1", _GLOVE),
    ("sims", "MulT", (78.56, 64.77, 37.94, None, 0.453, 0.564), _MMSA_TABLE, "MMSA, result-stat.md", _OF_MMSA),
    ("sims", "Self-MM", (80.04, 65.47, 41.53, None, 0.425, 0.595), _MMSA_TABLE, "MMSA, result-stat.md", _OF_MMSA),
    ("sims", "TETFN", (81.18, 63.24, 41.79, 80.24, 0.420, 0.577), _MMSA_TABLE, "MMSA, result-stat.md", _OF_MMSA),
    ("simsv2", "MulT", (80.68, 73.19, 54.81, 80.73, 0.291, 0.738), _MMSA_TABLE, "MMSA, result-stat.md", _OF_MMSA),
)

# Whole modalities missing: data set, protocol, point, model, measures, values, selection, source, features. LNLN's own
# tables take text away by replacing its tokens at a rate of 1 ([CLS] and [SEP] stay), ours leaves the modality out.
_WHOLE: tuple[tuple[str, str, str, str, tuple[str, ...], tuple[float | None, ...], str, str, str], ...] = (
    *(
        (dataset, "fixed", "text_missing", "LNLN", _TEXT_MISSING, values, _ON_TEST, "LNLN, table 13", _OF_MMSA)
        for dataset, values in (("mosi", (52.18, 49.03, 1.427, 0.075)), ("mosei", (62.85, 71.02, None, 0.156)))
    ),
    *(
        (dataset, "fixed", point, "HRLF", ("f1_non0",), (value,), _UNSTATED, "HRLF, table 1", _GLOVE)
        for dataset, values in (
            ("mosi", (83.36, 69.47, 64.59, 83.82, 83.56, 75.62, 76.74)),
            ("mosei", (82.05, 69.32, 64.90, 82.62, 81.09, 73.80, 75.63)),
        )
        for point, value in zip(
            (
                "text_only",
                "audio_only",
                "vision_only",
                "vision_missing",
                "audio_missing",
                "text_missing",
                "mean_of_six",
            ),
            values,
            strict=True,
        )
    ),
    *(
        (dataset, "fixed", "mean_of_six", model, ("f1_non0",), (value,), _UNSTATED, "HRLF, table 1 (rerun)", _GLOVE)
        for dataset, model, value in (
            ("mosi", "CorrKD", 74.69),
            ("mosi", "GCNet", 73.84),
            ("mosei", "CorrKD", 74.02),
            ("mosei", "GCNet", 73.54),
        )
    ),
    *(
        (
            dataset,
            protocol,
            point,
            model,
            _AVERAGED,
            values,
            _UNSTATED,
            "CyIN, table 1" + ("" if model == "CyIN" else " (rerun)"),
            _IMAGEBIND,
        )
        for dataset, protocol, point, model, values in (
            ("mosi", "fixed", "mean_of_six", "CyIN", (32.8, 1.037, 0.599)),
            ("mosi", "fixed", "mean_of_six", "IMDer", (31.4, 1.043, 0.533)),
            ("mosi", "fixed", "mean_of_six", "LNLN", (29.7, 1.102, 0.428)),
            ("mosi", "random_mr", "mean_of_seven", "CyIN", (35.0, 0.943, 0.650)),
            ("mosi", "random_mr", "mean_of_seven", "IMDer", (34.6, 0.950, 0.644)),
            ("mosi", "random_mr", "mean_of_seven", "LNLN", (34.2, 0.978, 0.627)),
            ("mosei", "fixed", "mean_of_six", "CyIN", (47.6, 0.656, 0.594)),
            ("mosei", "fixed", "mean_of_six", "IMDer", (47.1, 0.680, 0.583)),
            ("mosei", "fixed", "mean_of_six", "LNLN", (46.9, 0.663, 0.581)),
            ("mosei", "random_mr", "mean_of_seven", "CyIN", (48.3, 0.633, 0.650)),
            ("mosei", "random_mr", "mean_of_seven", "IMDer", (47.3, 0.660, 0.611)),
            ("mosei", "random_mr", "mean_of_seven", "LNLN", (47.9, 0.639, 0.642)),
        )
    ),
)


def _row(
    dataset: str,
    protocol: str,
    point: str,
    model: str,
    names: tuple[str, ...],
    values: tuple[float | None, ...],
    selection: str,
    source: str,
    features: str,
) -> Published:
    scores = {
        name: round(value if name in ("mae", "corr") else value / 100, 6)
        for name, value in zip(names, values, strict=True)
        if value is not None
    }
    return Published(dataset, protocol, point, model, scores, selection, source, features)


PUBLISHED: tuple[Published, ...] = (
    *(
        _row(dataset, "intra", "mean_of_rates", model, _SIMS if dataset == "sims" else _MOSI, *rest, _OF_MMSA)
        for dataset, model, *rest in _RATES
    ),
    *(
        _row(dataset, "fixed", "full", model, _COMPLETE_SIMS if dataset.startswith("sims") else _COMPLETE_MOSI, *rest)
        for dataset, model, *rest in _COMPLETE
    ),
    *(_row(*row) for row in _WHOLE),
)
"""Every row, protocol by protocol."""
