"""The tables of hcmen-bench on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from hcmen.base.tables import aligned, fitted, folded
from hcmen.runtime.benchmark.judge import Verdict

__all__ = ["milliseconds", "tables"]

_BAR = 12
_WHO = ("variant", "bundle", "engine", "precision", "threads", "batch")
_FIGURES = ("p50", "95 % of p50", "p90", "p99", "n", "call", "load", "first", "clips/s", "ratio")
_LEAST = ("n", "first", "load", "call", "clips/s", "p90", "95 % of p50", "p99", "precision", "threads", "batch")
"""The columns that a narrow terminal can do without, the bars before them."""
_EIGHTHS = " ▏▎▍▌▋▊▉"


def milliseconds(value: float | None) -> str:
    """Three significant digits, never in powers of ten."""
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.2f}" if value >= 10 else f"{value:.3g}" if value >= 1 else f"{value:.4f}".rstrip("0") or "0"


def tables(
    data: Mapping[str, Any], verdicts: Sequence[Verdict] = (), unmatched: Sequence[str] = (), width: int | None = None
) -> str:
    """Everything that a terminal of `width` columns (None: any) gets to see."""
    parts = []
    if data["rows"]:
        parts.append("\n".join(_row_table(data, width)))
    if data["cold"]:
        parts.append("\n".join(_cold_table(data["cold"], width)))
    if verdicts or unmatched:
        parts.append("\n".join([*(_verdict_table(verdicts, width) if verdicts else []), *_lines(unmatched, width)]))
    return "\n\n".join(parts)


def _lines(lines: Sequence[str], width: int | None) -> list[str]:
    return [part for line in lines for part in folded(line, width, "  ")]


def _bar(value: float, most: float) -> str:
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower()
    length = _BAR * value / most if most else 0.0
    if not encoding.startswith("utf"):
        return ("#" * max(1, round(length))).ljust(_BAR)
    whole = int(length)
    return (
        ("█" * whole + _EIGHTHS[int(8 * (length - whole))].strip()).ljust(_BAR) if length >= 1 / 8 else "▏".ljust(_BAR)
    )


def _row_table(data: Mapping[str, Any], width: int | None) -> list[str]:
    rows = data["rows"]
    # What all rows have in common is said once, above the table.
    columns = [k for k in _WHO if k == "variant" or len({r[k] for r in rows}) > 1]
    common = [_common(k, rows[0][k]) for k in _WHO if k not in columns and (k != "bundle" or rows[0][k])]
    timed = [r["run"]["p50"] for r in rows if r["run"] is not None]
    lines = [[*columns, *_FIGURES]]
    problems = []
    for r in rows:
        who = ["golden" if k == "batch" and not r[k] else str(r[k] or "-") for k in columns]
        if r["run"] is None:
            lines.append([*who, r["status"].upper(), *["-"] * (len(_FIGURES) - 1)])
            if r["reason"]:
                problems.append(f"{r['name']}: {r['reason']}")
            continue
        t = r["run"]
        lines.append(
            [
                *who,
                milliseconds(t["p50"]) + ("" if t["enough"]["p50"] else " ?"),
                _interval(t["p50_low"], t["p50_high"]),
                *(milliseconds(t[p]) + ("" if t["enough"][p] else " ?") for p in ("p90", "p99")),
                str(t["n"]),
                milliseconds(r["call"]["p50"] if r["call"] else None),
                *(milliseconds(_middle(r[k])) for k in ("load_ms", "first_ms")),
                _count(r["clips_per_second"]),
                _ratio(r["ratio"]),
            ]
        )
    most = max(timed, default=0.0)
    bars = ["", "", *("" if r["run"] is None else _bar(r["run"]["p50"], most) for r in rows)]
    text = [f"{line}  {bar}".rstrip() for line, bar in zip(aligned(lines), bars, strict=True)]
    if width is not None and max(map(len, text)) > width:
        text = fitted(lines, width, len(columns) + 1, least=_LEAST)
    return [*_lines([f"milliseconds; {', '.join(common)}"], width), *text, *_lines(problems, width)]


def _common(key: str, value: object) -> str:
    if key == "threads":
        return f"{value} threads" if value else "threads of its own"
    if key == "batch":
        return f"batch {value}" if value else "golden inputs"
    return str(value)


def _interval(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{milliseconds(low)} - {milliseconds(high)}"


def _middle(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _count(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(ratio: Mapping[str, Any] | None) -> str:
    return (
        "-" if ratio is None else f"{ratio['estimate']:.2f}" if ratio["estimate"] < 100 else f"{ratio['estimate']:.0f}"
    )


def _cold_table(colds: Sequence[Mapping[str, Any]], width: int | None) -> list[str]:
    several = len({c["bundle"] for c in colds if c["bundle"]}) > 1
    lines = [
        [
            "fresh process",
            *(["bundle"] if several else []),
            *("first score s", "max s", "start", "import", "load", "first", "peak MiB", "settled MiB", "own MiB", "n"),
        ]
    ]
    problems = []
    for c in colds:
        name = [c["kind"], *([c["bundle"] or "-"] if several else [])]
        m = c["median"]
        if m is None:
            lines.append([*name, c["status"].upper() if c["reason"] else "-", *["-"] * 9])
            problems += [f"{c['kind']}: {c['reason']}"] if c["reason"] else []
            continue
        lines.append(
            [
                *name,
                *(f"{m['total_ms'] / 1e3:.3f}", f"{max(c['total_ms']) / 1e3:.3f}"),
                *(f"{step / 1e3:.3f}" for step in m["steps_ms"]),
                *("-" if m[k] is None else f"{m[k]:.1f}" for k in ("peak_mib", "settled_mib", "anonymous_mib")),
                str(c["n"]),
            ]
        )
    least = ("n", "max s", "start", "import", "load", "first")
    return [*fitted(lines, width, 3 if several else 2, least=least), *_lines(problems, width)]


def _verdict_table(verdicts: Sequence[Verdict], width: int | None) -> list[str]:
    lines = [["new against old", "figure", "old", "new", "new/old", "interval", "margin", "verdict"]]
    for v in verdicts:
        interval = "-" if v.low is None or v.high is None else f"{v.low:.3f} - {v.high:.3f}"
        lines.append(
            [
                v.name,
                v.figure,
                *(f"{milliseconds(x)} {v.unit}" for x in (v.old, v.new)),
                f"{v.ratio:.3f}",
                interval,
                f"{v.margin:.1%}",
                v.verdict,
            ]
        )
    return fitted(lines, width, len(lines[0]), least=("margin", "interval", "old", "new"))
