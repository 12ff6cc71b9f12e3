r"""The tables of a robustness report for a paper: LaTeX with booktabs, one table per protocol.

    \usepackage{booktabs}
    \input{results.tex}

A table has the measures that the field quotes first, the floor in its last row, and what others published below our own
row. There the best of each column is bold. Names are escaped, so that any file name compiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hcmen.evaluation.robustness import HEADLINES, LABELS, number

__all__ = ["escaped", "latex"]

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "±": r"$\pm$",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}
_NO_GLYPH = set("ÐÞðþĄąĐđĘęĦħĮįĸĿŀŉŊŋŦŧŲųſ")
"""Latin letters that LaTeX's first encoding, which a page has unless it says another, cannot set."""
_LOWER_IS_BETTER = {"mae"}
_OURS = "ours"


def escaped(text: str) -> str:
    """`text` as LaTeX prints it. What pdflatex has no glyph for becomes a question mark."""

    def shown(c: str) -> str:
        latin = c.isalpha() and c < "\u0180" and c not in _NO_GLYPH
        return _SPECIAL.get(c, c if " " <= c <= "~" or latin else "?")

    return "".join(map(shown, text))


def latex(report: Mapping[str, Any]) -> str:
    """The tables of `report`, as the file results.tex holds them."""
    tables = [_table(report, name) for name in report["protocols"]]
    return "\n\n".join(["% Written by hcmen-eval. It needs \\usepackage{booktabs}.", *tables]) + "\n"


def _table(report: Mapping[str, Any], name: str) -> str:
    protocol, measures = report["protocols"][name], HEADLINES[report["dataset"]["family"]]
    published = [row for row in report["published"] if row["protocol"] == name]
    sources: dict[tuple[str, str, str], int] = {}
    body: list[str] = []
    for block in (protocol["settings"], protocol["averages"]):
        if body and block:
            body.append(r"\midrule")
        for point in block:
            rivals = [row for row in published if row["point"] == point["name"]]
            body += _rows(point, rivals, measures, sources, bool(published))
    models = ["model"] if published else []
    floor = [r"\emph{floor}", *[""] * len(models), *(number(m, report["floor"][m]) for m in measures)]
    arrows = (rf"{escaped(LABELS[m])} $\{'downarrow' if m in _LOWER_IS_BETTER else 'uparrow'}$" for m in measures)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_caption(report, name, protocol)}}}",
        rf"\label{{tab:{name.replace('_', '-')}}}",
        rf"\begin{{tabular}}{{{'l' * (1 + len(models))}{'r' * len(measures)}}}",
        r"\toprule",
        _line(["setting", *models, *arrows]),
        r"\midrule",
        *body,
        r"\midrule",
        _line(floor),
        r"\bottomrule",
        r"\end{tabular}",
        *_notes(sources),
        r"\end{table}",
    ]
    return "\n".join(lines)


def _rows(
    point: Mapping[str, Any],
    rivals: Sequence[Mapping[str, Any]],
    measures: Sequence[str],
    sources: dict[tuple[str, str, str], int],
    with_models: bool,
) -> list[str]:
    """Our row of a setting or average, and those of others below it."""
    values = [{m: point["scores"][m]["mean"] for m in measures}, *(row["scores"] for row in rivals)]
    best = {m: _best(m, [v.get(m) for v in values]) if rivals else None for m in measures}
    rows = []
    for i, found in enumerate(values):
        cells = []
        for m in measures:
            shown = number(m, found.get(m))
            cell = shown
            if i == 0 and point["scores"][m]["deviation"] is not None:
                cell += rf" $\pm$ {number(m, point['scores'][m]['deviation'])}"
            cells.append(rf"\textbf{{{cell}}}" if best[m] is not None and shown == best[m] else cell)
        if i:
            row = rivals[i - 1]
            note = sources.setdefault((row["source"], row["selection"], row["features"]), len(sources) + 1)
            label = ["", rf"{escaped(row['model'])}$^{{{note}}}$"]
        else:
            label = [escaped(point.get("about", point["name"])), *([_OURS] if with_models else [])]
        rows.append(_line([*label, *cells]))
    return rows


def _best(measure: str, values: Sequence[float | None]) -> str | None:
    """The best of the values as it is shown, since what is shown alike is equally good; None where there is none."""
    shown = [number(measure, value) for value in values]
    numbers = [float(text) for text in shown if text != "-"]
    if len(numbers) < 2:
        return None
    best = min(numbers) if measure in _LOWER_IS_BETTER else max(numbers)
    return next(text for text in shown if text != "-" and float(text) == best)


def _caption(report: Mapping[str, Any], name: str, protocol: Mapping[str, Any]) -> str:
    dataset, runs = report["dataset"], report["source"]["runs"]
    parts = [
        f"{name}: {protocol['about']}. {dataset['name']}, {report['split']} split, {dataset['samples']} samples",
        *([f"mean ± standard deviation of {len(runs)} runs"] if len(runs) > 1 else []),
    ]
    return escaped("; ".join(parts) + ".")


def _notes(sources: Mapping[tuple[str, str, str], int]) -> list[str]:
    """Below the table: where each published row comes from, and what it can be compared with."""
    lines = []
    for (source, selection, features), note in sources.items():
        told = escaped(f"{source}; checkpoint chosen on: {selection}; features: {features}")
        lines.append(rf"\par\footnotesize $^{{{note}}}$ {told}")
    return lines


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"
