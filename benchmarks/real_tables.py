"""What benchmarks/real_data.py measured, as tables in Markdown: for its own file, and for docs/real_data.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["presets", "table", "tables"]

MEASURES = {"mae": ("MAE", 1, ".3f"), "corr": ("Corr", 1, ".3f"), "acc2": ("Acc-2, %", 100, ".1f")}


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(sets: Mapping[str, Any]) -> str:
    """One table for all sets of one variant; for every other set its variants, and what each modality adds."""
    alone = {name: found for name, found in sets.items() if len(found["beside"]) == 1}
    parts = [_one_variant(alone)] if alone else []
    for name, found in sets.items():
        runs = {arm: run for arm, run in found["runs"].items() if "preset" not in arm}
        if name not in alone:
            parts += [_variants(name, found["beside"], arm, run) for arm, run in runs.items()]
            parts += [_gains(name, arm, run) for arm, run in runs.items()]
    return "\n\n".join(parts)


def presets(found: Mapping[str, Any]) -> str:
    """The runs of one set side by side: validation, the first variant's test, floors that are missed, time."""
    rows = []
    for arm, run in found["runs"].items():
        test = next(iter(run["test"].values()))
        cells = [_cell(run["validation_mae"], "mae"), *(_cell(test[m], m) for m in ("mae", "acc2"))]
        above = sum(x["mae"]["mean"] > found["beside"][v]["floor"]["mae"] for v, x in run["test"].items())
        minutes = run["seconds"] / len(run["epochs"]) / 60
        rows.append([arm, str(len(run["epochs"])), *cells, f"{above} of {len(run['test'])}", f"{minutes:.1f}"])
    header = ["model", "seeds", "validation MAE", "test MAE", "Acc-2, %", "variants above the floor", "minutes a seed"]
    return table(header, rows)


def _one_variant(sets: Mapping[str, Any]) -> str:
    rows = []
    for name, found in sets.items():
        (variant,) = found["beside"]
        low, high = (f"{end:g}" for end in found["label_range"])
        first = [f"{name}, {low} to {high}", " / ".join(f"{n:,}" for n in found["samples"].values())]
        shown = dict(found["beside"][variant])
        for arm, run in found["runs"].items():
            shown |= {f"{arm}, raw": run["test_raw"][variant], arm: run["test"][variant]}
        for row, x in shown.items():
            rows.append([*first, row, *(_cell(x[m], m) for m in MEASURES)])
            first = ["", ""]
    header = ["set, labels", "train / valid / test", "model", *(title for title, _, _ in MEASURES.values())]
    return table(header, rows)


def _variants(name: str, beside: Mapping[str, Any], arm: str, run: Mapping[str, Any]) -> str:
    rows = []
    for variant, rest in beside.items():
        columns = {**rest, f"{arm}, raw": run["test_raw"][variant], arm: run["test"][variant]}
        rows.append([variant, *(f"{_cell(x['mae'], 'mae')} / {_cell(x['acc2'], 'acc2')}" for x in columns.values())])
    return f"{name}, MAE / Acc-2 in %:\n\n{table(['variant', *columns], rows)}"


def _gains(name: str, arm: str, run: Mapping[str, Any]) -> str:
    """The MAE's change by each modality that is given as well, and the modalities that variants do not listen to."""
    rows = []
    for gain in run["gains"]:
        low, high = gain["interval"]
        rows.append([f"{gain['given']} to {gain['of']}", f"{gain['change']:+.3f}", f"{low:+.3f} to {high:+.3f}"])
    unheard = "; ".join(f"{what}, {n} of {len(run['epochs'])} seeds" for what, n in run["unheard"].items())
    return (
        f"{name}, {arm}:\n\n{table(['given as well', 'change of MAE', '95 %'], rows)}\n\n"
        f"Not listened to: {unheard or 'nothing'}."
    )


def _cell(found: Any, measure: str) -> str:
    """A measure, with its deviation where it is one over several seeds."""
    _, factor, form = MEASURES[measure]
    if not isinstance(found, Mapping):
        return format(factor * found, form)
    deviation = "" if found["deviation"] is None else f" ± {factor * found['deviation']:{form}}"
    return f"{factor * found['mean']:{form}}{deviation}"
