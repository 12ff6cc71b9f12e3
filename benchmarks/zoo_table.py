"""What benchmarks/mamba_zoo.py measured, as tables in Markdown for docs/mamba.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from real_tables import table

__all__ = ["tables"]

OPERATORS = ("SelectiveScan", "CausalConv1d", "StateSpaceDual")
WAYS = ("eager_reference", "eager", "scan", "library")


def tables(data: Mapping[str, Any]) -> str:
    """What came out, what was built, and what was not exported."""
    rows = data["families"]
    done = [row for row in rows if row["state"] == "done"]
    parts = [_introduction(data, done), _figures(done), _built(done)]
    failed = [row for row in rows if row["state"] == "failed"]
    if failed:
        parts.append(table(["not exported", "why"], [[_link(row), row["refused"] or row["reason"]] for row in failed]))
    return "\n\n".join(parts)


def _introduction(data: Mapping[str, Any], done: list[Any]) -> str:
    machine, found = data["machine"], data["summary"]
    slower = ", ".join(found["slower_than_scan"])
    fastest = max(row["times_scan"] for row in done)
    return (
        f"{found['done']} of {found['families']} families were built from their authors' code, exported and verified, "
        f"each within its bound. With the library they run {min(row['times_scan'] for row in done):.1f} to "
        f"{fastest:.0f} times as fast as the same file without it, {found['median_times_scan']:.1f} times in the "
        f"median{f'; slower: {slower}' if slower else ''}. Measured on an {machine['cpu']}, {machine['logical_cores']} "
        f"cores (shared), one thread, in turns, medians of milliseconds of processor time; PyTorch "
        f"{machine['versions']['torch']}, ONNX Runtime {machine['versions']['onnxruntime']}, {machine['date']}."
    )


def _figures(done: list[Any]) -> str:
    header = ["model", "scans, convolutions, duals", "nodes", "open sizes", "off by", "of", *WAYS, "times Scan"]
    names = {"eager_reference": "eager, reference", "eager": "eager, hcmen", "scan": "ONNX Scan", "library": "library"}
    rows = []
    for row in done:
        held = [str(row["operators"].get(f"hcmen.{op}", 0)) for op in OPERATORS]
        worst = max(row["errors"]["library"], row["errors"]["functions"] or 0)
        rows.append(
            [
                _link(row),
                " / ".join(held),
                str(row["nodes"]),
                ", ".join(row["open_sizes"]) or "none",
                f"{worst:.1e}",
                f"{row['errors']['bound']:.1e}",
                *(_ms(row["ms"][way]["median"]) for way in WAYS),
                f"{row['times_scan']:.1f}",
            ]
        )
    return table([names.get(name, name) for name in header], rows)


def _built(done: list[Any]) -> str:
    rows = []
    for row in done:
        fixed = [_fixed(told) for told in row["fixed"]]
        left_out = f"stand-ins for {', '.join(row['stand_ins'])}" if row["stand_ins"] else ""
        rows.append(
            [
                row["name"],
                row["what"],
                f"{row['parameters'] / 1e6:.2f} M",
                str(row["nodes_traced"]),
                "; ".join(filter(None, (row["note"], *fixed, left_out))),
            ]
        )
    return table(["model", "what was built", "parameters", "nodes as traced", ""], rows)


def _fixed(told: str) -> str:
    """Of what the export says about sizes that a model fixes: which, and by which line."""
    sizes = re.findall(r"'(\w+)' \(axis \d+ of '\w+'\) is fixed to \d+(?: by (\S+?):(\d+))?", told)
    places = {f"{Path(file).name}:{line}" for _, file, line in sizes if file}
    return f"{' and '.join(name for name, *_ in sizes)} fixed by {', '.join(sorted(places)) or 'the model'}"


def _link(row: Mapping[str, Any]) -> str:
    if row["commit"] is None:
        version = row.get("version")
        return f"{row['name']} ({row['source']} {version})" if version else row["name"]
    return f"[{row['name']}]({row['source']}/tree/{row['commit'][:10]})"


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
