"""Two reports of hcmen-bench: which rows became faster or slower, beyond the noise of both.

A row is called faster or slower only if the whole interval of the ratio new / old lies beyond the margin:

- the interval is `stats.ratio_interval` of the medians of the rounds, at a confidence of 1 - 0.05 / rows, so that the
  chance of any false verdict among all rows is 5 % where rounds are independent;
- the margin is the largest of
      1 %;
      12 % over the square root of the seconds that the shorter run timed: of drifts longer than itself a run shows
      nothing (docs/results/bench_noise.json);
      how far the row's own median wandered within both runs: drifts of the machine do not end with a run;
      what waiting for a core may have cost: a row that had none for a share w of its time may have taken 1 / (1 - w)
      times as long as on an idle machine, and by how much less or more the other run suffered is not known;
      how much the probe, fixed work that has nothing to do with hcmen, differs between the two runs: what it computes
      or the memory that it moves, whichever differs more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hcmen.runtime.benchmark.cold import FLOOR
from hcmen.runtime.benchmark.machine import same_machine
from hcmen.runtime.benchmark.peers import PEERS
from hcmen.runtime.benchmark.report import row_key
from hcmen.runtime.benchmark.rows import FUNCTIONS
from hcmen.runtime.benchmark.stats import ratio_interval, wandering

__all__ = ["FASTER", "MORE", "SAME", "SLOWER", "UNSURE", "Verdict", "compare_documents", "refusals"]

FASTER, SLOWER, SAME, UNSURE = "faster", "slower", "no difference", "too few rounds"
LESS, MORE = "less", "more"
_OTHERS = (*PEERS, FUNCTIONS)
_LEAST = 0.01
_UNSEEN = 0.12  # over sqrt(seconds); runs of 2.2 s on an idle virtual machine: 16 false verdicts of 2208, without it 94
_WORTH_TELLING = 0.03
_MOST_WAITED = 0.95
_FALSE_VERDICTS = 0.05


@dataclass(frozen=True)
class Verdict:
    """One figure of one row, new against old. ratio, low, high: new / old. margin: what a difference must exceed.
    own: a figure of a bundle, and not of what it is measured against.
    """

    name: str
    figure: str
    unit: str
    old: float
    new: float
    ratio: float
    low: float | None
    high: float | None
    margin: float
    verdict: str
    own: bool = True

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in vars(self).items()}


def refusals(
    new: Mapping[str, Any], new_bundles: Sequence[Mapping[str, Any]], old: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """(why the two cannot be compared, what else differs), before anything is measured.

    Args:
        new: the machine now. new_bundles: from `describe_bundle`. old: a document.
    """
    other, besides = same_machine(new, old["machine"])
    before = {b["label"]: b for b in old["bundles"]}
    for bundle in new_bundles:
        match = old["bundles"][0] if len(new_bundles) == len(old["bundles"]) == 1 else before.get(bundle["label"])
        if match is not None and match["manifest_sha256"] != bundle["manifest_sha256"]:
            what = "graph" if bundle.get("kind") == "onnx" else "bundle"
            besides.append(f"{what} {bundle['label']} has another content than then")
    if not old["complete"]:
        besides.append("the old run was interrupted")
    return other, besides


def compare_documents(new: Mapping[str, Any], old: Mapping[str, Any]) -> tuple[list[Verdict], list[str]]:
    """The verdicts, and one line for each row that has no counterpart or another input."""
    found: list[tuple[str, str, str, list[float], list[float], bool, float]] = []
    lines = []
    alone = len(new["bundles"]) == len(old["bundles"]) == 1

    def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        # With one bundle on each side its name is no part of what a row is: a new export may lie elsewhere.
        return row_key(row)[1:] if alone else row_key(row)

    before = {key(row): row for row in old["rows"]}
    for row in new["rows"]:
        then = before.pop(key(row), None)
        if then is None:
            lines.append(f"{row['name']}: not in the old run")
        elif row["run"] is None or then["run"] is None:
            which = "now" if row["run"] is None else "in the old run"
            lines.append(f"{row['name']}: has no time {which}")
        elif row["work"]["shapes"] != then["work"]["shapes"]:
            lines.append(f"{row['name']}: ran on inputs of other shapes, so there is nothing to compare")
        else:
            for figure in ("run", "call"):
                if row[figure] is not None and then[figure] is not None:
                    pair = _medians(row[figure]), _medians(then[figure])
                    waited = max(_waiting(row, new), _waiting(then, old))
                    found.append((row["name"], figure, "ms", *pair, row["engine"] not in _OTHERS, waited))
    lines += [f"{row['name']}: only in the old run" for row in before.values()]

    def cold_key(c: Mapping[str, Any]) -> tuple[Any, ...]:
        return (c["kind"], c["threads"]) if alone else (c["bundle"], c["kind"], c["threads"])

    colds = {cold_key(c): c for c in old["cold"]}
    for c in new["cold"]:
        then = colds.get(cold_key(c))
        for figure, unit in (("total_ms", "ms"), ("peak_mib", "MiB"), ("settled_mib", "MiB")):
            if then is not None and c[figure] and then[figure]:
                own = c["kind"] != FLOOR and not c["kind"].startswith("eager")
                name = f"fresh process, {c['kind']}"
                waited = 0.0 if unit == "MiB" else max(_waiting({}, new), _waiting({}, old))
                found.append((name, figure.split("_")[0], unit, c[figure], then[figure], own, waited))
    if not found:
        return [], lines
    confidence = 1 - _FALSE_VERDICTS / len(found)
    shift = _shift(new["probe"], old["probe"])
    seconds = min(_seconds(new), _seconds(old))
    unseen = _UNSEEN / math.sqrt(max(seconds, 1e-3))
    if unseen > _WORTH_TELLING:
        lines.append(
            f"the shorter run timed {seconds:.1f} s in all, too little to see the machine drift: no difference of time "
            f"below {100 * math.expm1(unseen):.0f} % is called one (raise --rounds or --calls)"
        )
    verdicts = [
        _verdict(name, figure, unit, now, then, own, confidence, 0.0 if unit == "MiB" else max(shift, wait, unseen))
        for name, figure, unit, now, then, own, wait in found
    ]
    return verdicts, lines


def _verdict(
    name: str,
    figure: str,
    unit: str,
    new: Sequence[float],
    old: Sequence[float],
    own: bool,
    confidence: float,
    least: float,
) -> Verdict:
    interval = ratio_interval(new, old, confidence)
    margin = max(_LEAST, math.hypot(wandering(new), wandering(old)), least)
    up, down = (MORE, LESS) if unit == "MiB" else (SLOWER, FASTER)
    if interval.low is None or interval.high is None:
        verdict = UNSURE
    elif interval.low > math.exp(margin):
        verdict = up
    elif interval.high < math.exp(-margin):
        verdict = down
    else:
        verdict = SAME
    return Verdict(
        name,
        figure,
        unit,
        float(np.median(old)),
        float(np.median(new)),
        interval.estimate,
        interval.low,
        interval.high,
        math.expm1(margin),
        verdict,
        own,
    )


def _waiting(row: Mapping[str, Any], data: Mapping[str, Any]) -> float:
    """The logarithm of what waiting for a core may have cost a row; by the CPU time of others where no more is told."""
    shares = data["cpu_time_of_others"] or {"others_share": 0.0, "stolen_share": 0.0}
    waited = row.get("waited_share")
    share = (shares["others_share"] if waited is None else waited) + shares["stolen_share"]
    return -math.log1p(-min(share, _MOST_WAITED))


def _shift(new: Mapping[str, Any], old: Mapping[str, Any]) -> float:
    """The logarithm of how much the probes differ; 0 where they are not the same work."""
    if new["threads"] != old["threads"]:
        return 0.0
    pairs = [(new.get(work), old.get(work)) for work in ("rounds_ms", "memory_rounds_ms")]  # the second came later
    return max((abs(math.log(np.median(a) / np.median(b))) for a, b in pairs if a and b), default=0.0)


def _seconds(data: Mapping[str, Any]) -> float:
    """For how long a run timed anything, all rows and fresh processes together."""
    timed = [times["rounds_ms"] for row in data["rows"] for times in (row["run"], row["call"]) if times is not None]
    turns = sum(ms for rounds in timed for turn in rounds for ms in turn)
    return float(turns + sum(sum(c["total_ms"] or []) for c in data["cold"])) / 1e3


def _medians(times: Mapping[str, Any]) -> list[float]:
    return [float(np.median(turn)) for turn in times["rounds_ms"]]
