"""The robustness tables: every measure under every setting of the missing-modality protocols, for one or several runs.

    run_scores   one run (a checkpoint or a bundle) -> its measures per protocol and setting
    summarise    the runs -> mean and standard deviation, the protocols' averages, the floor: plain data for JSON
    text, markdown, csv_text   that data for the terminal, a page, a spreadsheet

NumPy alone, so that a device can make its own tables. The picture of a table is drawn by hcmen/evaluation/plots.py.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hcmen.base import metrics
from hcmen.base.errors import CheckFailed
from hcmen.base.modalities import MODALITIES
from hcmen.base.tables import fitted, folded
from hcmen.data.protocols import Masks, Protocol
from hcmen.data.published import Published

__all__ = [
    "HEADLINES",
    "LABELS",
    "Run",
    "csv_text",
    "markdown",
    "number",
    "published_rows",
    "run_scores",
    "summarise",
    "text",
]

Array = npt.NDArray[np.float64]
Scores = dict[str, float]

LABELS = {
    "mae": "MAE",
    "corr": "Corr",
    "acc7": "Acc-7",
    "acc5": "Acc-5",
    "acc3": "Acc-3",
    "acc2_has0": "Acc-2 Has0",
    "f1_has0": "F1 Has0",
    "acc2_non0": "Acc-2 Non0",
    "f1_non0": "F1 Non0",
    "acc2": "Acc-2",
    "f1": "F1",
}
"""Measures as tables head them. All but MAE and Corr are shown in percent."""

HEADLINES = {
    "mosi": ("mae", "corr", "acc7", "acc2_non0", "f1_non0"),
    "sims": ("mae", "corr", "acc5", "acc2", "f1"),
    "range": ("mae", "corr", "acc2_has0", "acc2_non0", "f1_non0"),
}
"""The measures that the field quotes first, by the name of their family."""
_FLOOR_NOTE = "in parentheses the floor: the mean training label for MAE and Corr, the commonest class for Acc and F1"
_OUR_SELECTION = "validation split, one checkpoint for all measures"


@dataclass(frozen=True)
class Run:
    """One run's measures: {protocol: {setting: scores}}, the floor of its split, and what its masks hid."""

    scores: dict[str, dict[str, Scores]]
    floor: Scores
    hidden: dict[str, dict[str, dict[str, Any]]]


def run_scores(
    score: Callable[[Masks], Array],
    masks: Mapping[str, Mapping[str, Masks]],
    truth: npt.ArrayLike,
    training_labels: npt.ArrayLike,
    family: metrics.Family | str,
    name: str,
) -> Run:
    """Every measure of one run.

    Args:
        score: the scores [samples] of what masks leave.
        masks: {protocol: {setting: masks}}. truth: [samples]. training_labels: what the floor of MAE is made of.
        family: of measures, see hcmen/base/metrics.py. name: of the run, for errors.

    Raises:
        CheckFailed: a score is NaN or infinite.
    """
    found: dict[str, dict[str, Scores]] = {}
    hidden: dict[str, dict[str, dict[str, Any]]] = {}
    for protocol, settings in masks.items():
        found[protocol], hidden[protocol] = {}, {}
        for setting, mask in settings.items():
            prediction = score(mask)
            bad = int(np.count_nonzero(~np.isfinite(prediction)))
            if bad:
                raise CheckFailed(
                    f"{name}: {bad} of {len(prediction)} scores are NaN or infinite in protocol {protocol}, setting "
                    f"{setting}, expected finite numbers: train again, or export again"
                )
            found[protocol][setting] = metrics.scores(truth, prediction, family)
            hidden[protocol][setting] = {
                "missing_rate": mask.missing_rate,
                "missing_shares": mask.missing_shares,
                "dropped_steps": mask.dropped_steps,
                "digest": mask.digest,
            }
    return Run(found, metrics.floor(truth, training_labels, family), hidden)


def summarise(runs: Sequence[Run], protocols: Sequence[Protocol]) -> dict[str, Any]:
    """{"floor": {measure: value}, "protocols": {name: {"about", "settings": [...], "averages": [...]}}}.

    An average is taken over the settings of each run first, then over the runs. The floor is the mean over the runs,
    which differ in it only if they were judged on different data. What stands by modality is of those of the data.
    """
    measures = list(runs[0].floor)
    there = next(hidden["dropped_steps"] for settings in runs[0].hidden.values() for hidden in settings.values())

    def of_data(values: Sequence[Any]) -> dict[str, Any]:
        """What a setting says of each modality, for those that the data has."""
        return {m: value for m, value in zip(MODALITIES, values, strict=True) if m in there}

    result: dict[str, Any] = {}
    for protocol in protocols:
        settings = []
        for setting in protocol.settings:
            of_runs = [run.scores[protocol.name][setting.name] for run in runs]
            hidden = [run.hidden[protocol.name][setting.name] for run in runs]
            settings.append(
                {
                    "name": setting.name,
                    "rates": of_data(setting.rates),
                    "present": [m for m, there in of_data(setting.present).items() if there],
                    "missing_rate_asked": setting.missing_rate,
                    "missing_rates_asked": of_data(setting.missing_rates),
                    "missing_rate": float(np.mean([h["missing_rate"] for h in hidden])),
                    "missing_shares": {m: float(np.mean([h["missing_shares"][m] for h in hidden])) for m in there},
                    "dropped_steps": {m: float(np.mean([h["dropped_steps"][m] for h in hidden])) for m in there},
                    "mask_sha256": [h["digest"] for h in hidden],
                    "scores": {m: metrics.spread([s[m] for s in of_runs]) for m in measures},
                }
            )
        averages = [
            {
                "name": average.name,
                "about": average.about,
                "settings": list(average.settings),
                "scores": {
                    m: metrics.spread(
                        [float(np.mean([run.scores[protocol.name][s][m] for s in average.settings])) for run in runs]
                    )
                    for m in measures
                },
            }
            for average in protocol.averages
        ]
        result[protocol.name] = {
            "about": protocol.about,
            "mask_sha256": [_digest(run.hidden[protocol.name]) for run in runs],
            "settings": settings,
            "averages": averages,
        }
    floor = {m: float(np.mean([run.floor[m] for run in runs])) for m in measures}
    return {"floor": floor, "protocols": result}


def _digest(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """One sha256 for all the masks of a protocol."""
    lines = "".join(f"{name} {hidden['digest']}\n" for name, hidden in settings.items())
    return hashlib.sha256(lines.encode()).hexdigest()


_LEAST = ("steps dropped", "modalities missing", "source", "features", "checkpoint chosen on")
"""The columns that a narrow terminal can do without before any measure."""


# --- tables ---------------------------------------------------------------------------------------------------------


def text(report: Mapping[str, Any], width: int | None = None) -> str:
    """The tables for a terminal of `width` columns (None: any): the measures the field quotes first, and floors."""
    measures = HEADLINES[report["dataset"]["family"]]
    parts = ["\n".join(folded(_title(report), width))]
    for name, protocol in report["protocols"].items():
        table = fitted(_table(report, protocol, measures), width, least=_LEAST)
        parts.append("\n".join([*folded(f"{name}: {protocol['about']}", width), *table]))
        published = _published_table(report, name, measures)
        if published:
            parts.append("\n".join([f"{name}: published beside ours", *fitted(published, width, 3, least=_LEAST)]))
    parts.append("\n".join(line for note in _notes(report) for line in folded(note, width)))
    return "\n\n".join(parts)


def markdown(report: Mapping[str, Any]) -> str:
    """The tables as a Markdown page, with every measure."""
    measures = list(report["floor"])
    parts = ["# Robustness to missing modalities", _title(report) + "."]
    for name, protocol in report["protocols"].items():
        parts += [f"## {name}: {protocol['about']}", _marked(_table(report, protocol, measures))]
        published = _published_table(report, name, measures)
        if published:
            parts += ["Published beside ours:", _marked(published)]
    parts.append("\n".join(f"- {note}" for note in _notes(report)))
    parts += [f"![{about}]({name})" for name, about in report.get("pictures", {}).items()]
    return "\n\n".join(parts) + "\n"


def csv_text(report: Mapping[str, Any]) -> str:
    """One line per protocol, setting or average, and measure."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    dropped = [f"{m}_steps_dropped" for m in MODALITIES]
    writer.writerow(
        ["protocol", "setting", "kind", "modalities_missing", *dropped, "measure", "mean", "deviation", "runs", "floor"]
    )
    for name, protocol in report["protocols"].items():
        for kind, rows in (("setting", protocol["settings"]), ("average", protocol["averages"])):
            for row in rows:
                steps = [row.get("dropped_steps", {}).get(m) for m in MODALITIES]
                start = [name, row["name"], kind, row.get("missing_rate"), *steps]
                for measure, found in row["scores"].items():
                    end = [found["mean"], found["deviation"], len(found["runs"]), report["floor"][measure]]
                    writer.writerow(["" if _absent(x) else x for x in (*start, measure, *end)])
    return stream.getvalue()


def published_rows(rows: Iterable[Published]) -> list[dict[str, Any]]:
    """The rows as plain data for a report."""
    return [
        {
            "protocol": row.protocol,
            "point": row.point,
            "model": row.model,
            "scores": dict(row.scores),
            "selection": row.selection,
            "features": row.features,
            "source": row.source,
        }
        for row in rows
    ]


def _title(report: Mapping[str, Any]) -> str:
    dataset, runs = report["dataset"], len(report["source"]["runs"])
    what = f"{runs} {report['source']['kind']}{'s' if runs > 1 else ''}"
    return (
        f"{dataset['name']}, {report['split']} split, {dataset['samples']} samples, {what}, "
        f"masks of seed {report['seed']}"
    )


def _notes(report: Mapping[str, Any]) -> list[str]:
    notes = [_FLOOR_NOTE]
    if report["dataset"]["family"] == "range":
        neutral = metrics.family_for(report["dataset"]["label_min"], report["dataset"]["label_max"]).neutral
        notes.append(
            f"Acc-2 and F1 tell labels below {neutral:g} from those above it; Non0 leaves {neutral:g} itself out"
        )
    if len(report["source"]["runs"]) > 1:
        notes.append("mean and standard deviation (n - 1) over the runs; averages are taken within each run first")
    if report["dataset"]["own_synthetic_sets"]:
        notes.append("each run is judged on the synthetic set of its own seed, so the deviation is over data as well")
    notes += [f"protocol {name} is left out: {why}" for name, why in report["left_out"].items()]
    notes.append(f"checkpoints were chosen on the {_OUR_SELECTION}")
    return notes


def _table(report: Mapping[str, Any], protocol: Mapping[str, Any], measures: Sequence[str]) -> list[list[str]]:
    rows = [["setting", "modalities missing", "steps dropped", *(f"{LABELS[m]} (floor)" for m in measures)]]
    for setting in protocol["settings"]:
        dropped, missing = setting["dropped_steps"].values(), setting["missing_shares"].values()
        uneven = any(setting["missing_rates_asked"].values())
        rows.append(
            [
                setting["name"],
                "/".join(f"{x:.0%}" for x in missing) if uneven else f"{setting['missing_rate']:.1%}",
                "/".join(f"{x:.0%}" for x in dropped) if any(dropped) else "0%",
                *(_cell(m, setting["scores"][m], report["floor"][m]) for m in measures),
            ]
        )
    for average in protocol["averages"]:
        cells = (_cell(m, average["scores"][m], report["floor"][m]) for m in measures)
        rows.append([average["about"], "", "", *cells])
    return rows


def _published_table(report: Mapping[str, Any], protocol: str, measures: Sequence[str]) -> list[list[str]]:
    """Ours and what others printed, setting by setting and then the averages; nothing where nothing is known."""
    own = report["protocols"][protocol]
    rows = [["of", "model", *(LABELS[m] for m in measures), "checkpoint chosen on", "features", "source"]]
    for point in (*own["settings"], *own["averages"]):
        found = [r for r in report["published"] if r["protocol"] == protocol and r["point"] == point["name"]]
        if not found:
            continue
        cells = [_cell(m, point["scores"][m], None) for m in measures]
        label = point.get("about", point["name"])
        rows.append([label, "hcmen (here)", *cells, _OUR_SELECTION, "of this data set", "this run"])
        for row in found:
            cells = [number(m, row["scores"].get(m)) for m in measures]
            rows.append([label, row["model"], *cells, row["selection"], row["features"], row["source"]])
    return rows if len(rows) > 1 else []


def _cell(measure: str, found: Mapping[str, Any], floor: float | None) -> str:
    deviation = "" if found["deviation"] is None else f" ± {number(measure, found['deviation'])}"
    beside = "" if floor is None else f" ({number(measure, floor)})"
    return f"{number(measure, found['mean'])}{deviation}{beside}"


def number(measure: str, value: float | None) -> str:
    """`value` as the tables show it, or - where there is none."""
    if value is None or _absent(value):
        return "-"
    return f"{value:.3f}" if measure in ("mae", "corr") else f"{100 * value:.1f}"


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _marked(rows: Sequence[Sequence[str]]) -> str:
    header, *body = rows
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
        for row in [header, ["---", *["---:"] * (len(header) - 1)], *body]
    )
