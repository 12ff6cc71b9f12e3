"""Published scores under the missing-modality protocols, each with its source and how its checkpoint was chosen.

The rule of selection matters as much as the model: code in this field picks its checkpoint on the test split, one per
measure, and the same models chosen on the validation split are several points worse. Numbers under different rules are
no ranking, and on other features they are not even comparable: such rows say so. Left out are F1 whose source swapped
truth and prediction (LNLN, ALMT, MMSA's older rows for SIMS, where the constant answer has an F1 of 81.91), Acc-2 and
F1 of a source that does not say which of the two it means, and r = 1.0, which no protocol here has.

published.csv has the rows: accuracies and F1 in percent, nothing where the source prints none or a void number. "intra"
is the average over r = 0.0 to 0.9. "full" is complete data, where LNLN is the model that was trained on missing steps,
at r = 0. Its own tables take text away by replacing its tokens at a rate of 1 ([CLS] and [SEP] stay); ours leaves the
modality out.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["PUBLISHED", "Published", "published_for", "real_name"]

_MEASURES = ("acc7", "acc5", "acc3", "acc2", "acc2_non0", "acc2_has0", "f1", "f1_non0", "mae", "corr")
_TEST_SAMPLES = {"mosi": 686, "mosei": 4659, "sims": 457, "simsv2": 1034}
_SCALE = dict.fromkeys(("sims", "simsv2"), (-1.0, 1.0))


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


def real_name(name: str, samples: int, label_min: float, label_max: float) -> str | None:
    """ "mosi", "mosei", "sims" or "simsv2" if the data set `name` with so many test samples is that one, else None.

    A name is usually a path; MMSA's own files are called MOSI/Processed/unaligned_50.pkl and the like. Labels on
    another scale than that of the set are not comparable with what was published on it.
    """
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    found = [
        k
        for k, n in _TEST_SAMPLES.items()
        if k in words and n == samples and _SCALE.get(k, (-3.0, 3.0)) == (label_min, label_max)
    ]
    return found[0] if len(found) == 1 and "synthetic" not in words else None


def published_for(dataset: str) -> list[Published]:
    """The rows for a data set that `real_name` knows."""
    return [row for row in PUBLISHED if row.dataset == dataset]


def _rows() -> tuple[Published, ...]:
    with (Path(__file__).parent / "published.csv").open(encoding="ascii", newline="") as file:
        return tuple(_row(row) for row in csv.DictReader(file))


def _row(row: dict[str, Any]) -> Published:
    told = {name: row.pop(name) for name in _MEASURES}
    scores = {n: float(x) if n in ("mae", "corr") else round(float(x) / 100, 6) for n, x in told.items() if x}
    return Published(scores=scores, **row)


PUBLISHED = _rows()
"""Every row, protocol by protocol."""
