"""One run for each of several seeds: how they are asked for, and what they come to together.

NumPy is loaded by functions, so that --help is quick.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from hcmen.base.errors import shown
from hcmen.base.tables import fitted, folded
from hcmen.training.report import BASELINES
from hcmen.training.settings import MOST_SEED

__all__ = ["SeedList", "failed_line", "several_report", "several_text"]

_LEAST = [f"{name} {who}" for who in ("linear", "floor") for name in ("Acc-2", "Corr", "MAE")]
"""The columns that a narrow terminal can do without first."""


class SeedList(click.ParamType):
    """Different seeds, with commas between."""

    name = "seeds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """The seeds; a usage error where one is no seed, or is there twice."""
        if isinstance(value, tuple):
            return value
        seeds: list[int] = []
        for part in str(value).split(","):
            word = part.strip()
            # int() takes underscores, signs and any digits of Unicode, and refuses the longest numbers.
            if not (word.isascii() and word.isdigit() and len(word) <= 10 and int(word) <= MOST_SEED):
                self.fail(f"{shown(word)} is no seed, expected numbers from 0 to {MOST_SEED} such as 1111,1112,1113")
            if int(word) in seeds:
                self.fail(f"seed {int(word)} is there twice, and a run counts once: give each seed once", param, ctx)
            seeds.append(int(word))
        return tuple(seeds)


def several_report(reports: Mapping[int, Mapping[str, Any]], failed: Mapping[int, str]) -> dict[str, Any]:
    """What the runs come to together: mean, deviation (n - 1) and every run's value of each measure.

    Args:
        reports: the report of each run that came to its end, by seed; at least one. failed: why others did not.
    """
    from hcmen.base import metrics

    first, *_ = runs = list(reports.values())
    return {
        "checkpoints": [r["checkpoint"] for r in runs],
        "seeds": list(reports),
        "failed": {str(seed): reason for seed, reason in failed.items()},
        "validation_mae": metrics.spread([r["validation_mae"] for r in runs]),
        "dataset": first["dataset"],
        "test": {
            variant: {
                who: {m: metrics.spread([r["test"][variant][who][m] for r in runs]) for m in measures}
                for who, measures in models.items()
            }
            for variant, models in first["test"].items()
        },
    }


def several_text(report: Mapping[str, Any], kind: str, screen: int | None = None) -> str:
    """The table of the test split, over the seeds, of a model of the kind `kind`; `screen` columns wide (None: any)."""
    from hcmen.base import metrics
    from hcmen.models import registry

    dataset, test = report["dataset"], report["test"]
    accuracy = metrics.family_for(dataset["label_min"], dataset["label_max"]).acc2
    measures = (("MAE", "mae"), ("Corr", "corr"), ("Acc-2", accuracy))
    first = next(iter(test.values()))
    columns = [(name, measure, who) for name, measure in measures for who in first]
    rows = [["variant", *(name if who == kind else f"{name} {who}" for name, _, who in columns)]]
    for variant, models in test.items():
        rows.append([variant, *(_cell(measure, models[who][measure]) for _, measure, who in columns)])
    seeds = ", ".join(map(str, report["seeds"]))
    count = len(report["seeds"])
    lines = [
        f"test split, {dataset['samples']['test']} samples, {registry.named(kind).title}, "
        f"{count} seed{'s' if count > 1 else ''} ({seeds}), validation MAE {_cell('mae', report['validation_mae'])}"
    ]
    notes = [
        *(["mean ± standard deviation (n - 1) over the seeds"] if count > 1 else []),
        BASELINES,
    ]
    if dataset["name"] == "synthetic" and count > 1:
        notes.append("each seed has a synthetic set of its own, so the deviation is over data as well")
    notes += [f"seed {seed} is left out: {reason}" for seed, reason in report["failed"].items()]
    table = fitted(rows, screen, least=_LEAST)
    return "\n".join(
        [part for line in lines for part in folded(line, screen)]
        + table
        + [""]
        + [part for note in notes for part in folded(note, screen)]
    )


def _cell(measure: str, found: Mapping[str, Any]) -> str:
    """Mean and deviation; the mean alone where all runs have the same, as the floor on one file."""
    varies = found["deviation"] is not None and len(set(found["runs"])) > 1
    parts = [found["mean"], *([found["deviation"]] if varies else [])]
    return " ± ".join(f"{x:.3f}" if measure in ("mae", "corr") else f"{100 * x:.1f}%" for x in parts)


def failed_line(failed: Mapping[int, str], seeds: Sequence[int]) -> str:
    """What is said of the seeds that did not come to their end."""
    told = "; ".join(f"seed {seed}: {reason}" for seed, reason in failed.items())
    return f"{len(failed)} of {len(seeds)} seeds did not come to their end: {told}"
