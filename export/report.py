"""What hcmen-export says of the parity that it measured: tables, and the line of a failure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hcmen.base.tables import fitted, folded

if TYPE_CHECKING:
    from hcmen.base.manifest import Manifest

__all__ = ["failure", "figure", "table"]


def table(manifest: Manifest, width: int | None = None) -> str:
    """The parity of every variant in `manifest`, within `width` columns (None: any)."""
    if manifest.precision != "fp32":
        return _reduced_table(manifest, width)
    header = ("variant", "graph", "cases", "max |difference|", "mean", "p99", "cosine", "NaN", "parity")
    lines = [header]
    for name, v in manifest.variants.items():
        score = v.parity["outputs"]["score"]
        lines.append(
            (
                name,
                f"{v.graph.bytes / 1024:.0f} KiB",
                str(v.parity["cases"]),
                figure(score["max_abs"]),
                figure(score["mean_abs"]),
                figure(score["p99_abs"]),
                figure(score["cosine"], ".9f"),
                str(score["nan"]),
                "ok" if v.parity["passed"] else "FAILED",
            )
        )
    weights = f"weights.bin {manifest.weights.bytes / 1024:.0f} KiB, shared by all variants"
    least = ("NaN", "cosine", "p99", "mean", "cases", "graph")
    return "\n".join([*fitted(lines, width, least=least), "", *folded(weights, width)])


def _reduced_table(manifest: Manifest, width: int | None) -> str:
    """What a precision costs and gains, beside float32."""
    header = (
        *("variant", "graph + weights", "of fp32", "latency", "of fp32", "max |difference|"),
        *("MAE eager", f"MAE {manifest.precision}", "moved", "parity"),
    )
    lines, slower = [header], []
    for name, v in manifest.variants.items():
        size, time, metric = v.parity["bytes"], v.parity["latency"], v.parity["metric"]
        if time["slower"]:
            slower.append(name)
        lines.append(
            (
                name,
                f"{size['got'] / 1024:.0f} KiB",
                f"{size['got'] / size['fp32']:.0%}",
                f"{time['got_ms']:.2f} ms",
                f"{time['ratio']:.2f} x",
                figure(v.parity["max_abs"]),
                f"{metric['eager']:.4f}",
                figure(metric["got"], ".4f"),
                figure(metric["change"], "+.2%"),
                "ok" if v.parity["passed"] else "FAILED",
            )
        )
    first = next(iter(manifest.variants.values())).parity
    kept = {name for v in manifest.variants.values() for name in v.parity["layers"]["kept_in_float"]}
    notes = [
        f"weights.bin {manifest.weights.bytes / 1024:.0f} KiB, shared by all variants",
        f"Latency: processor time of one full-length clip on one thread, medians of "
        f"{first['latency']['turns']} turns with float32. MAE: {first['metric']['clips']} validation clips.",
    ]
    if kept:
        notes.append(f"Left in float, since {manifest.precision} moved the MAE too far: {', '.join(sorted(kept))}")
    if slower:
        notes.append(f"{manifest.precision} is slower than fp32 on this machine for {', '.join(slower)}.")
    least = ("of fp32", "MAE eager", "graph + weights", "max |difference|", header[7], "latency", "moved")
    table = fitted(lines, width, least=least)
    return "\n".join([*table, "", *(part for note in notes for part in folded(note, width))])


def figure(value: float | None, form: str = ".1e") -> str:
    """A figure of a parity report; there is none where NaN left nothing to measure."""
    return "none" if value is None else format(value, form)


def failure(precision: str, parity: Mapping[str, Any]) -> str:
    """The line that tells of the worst output; NaN is worse than any difference."""
    moved_far = [v for v, p in parity.items() if not p["passed"] and not p.get("metric", {"passed": True})["passed"]]
    if moved_far:
        return _metric_failure(precision, moved_far, parity)

    def severity(place: tuple[str, str]) -> float:
        required = parity[place[0]]["outputs"][place[1]]["required_atol"]
        return math.inf if required is None else float(required)

    failed = [name for name, p in parity.items() if not p["passed"]]
    name, output = max(((v, o) for v in failed for o in parity[v]["outputs"]), key=severity)
    report = parity[name]["outputs"][output]
    where = f"parity failed for {', '.join(failed)}: {output} of '{name}' is"
    if report["nan"]:
        worst = report["worst"]
        return f"{where} {worst['got']} at {worst['index']}, expected {worst['expected']}; no bundle was written"
    return (
        f"{where} off by {report['max_abs']:.1e} at {report['worst']['index']}, "
        f"it would pass with atol {report['required_atol']:.1e}; no bundle was written"
    )


def _metric_failure(precision: str, failed: Sequence[str], parity: Mapping[str, Any]) -> str:
    """The line that tells of the variant whose mean absolute error moved furthest."""
    change = {v: parity[v]["metric"]["change"] for v in failed}
    name = max(failed, key=lambda v: math.inf if change[v] is None else abs(change[v]))
    metric = parity[name]["metric"]
    advice = "use --precision fp32" if precision == "fp16" else "use --precision fp16 or fp32"
    if metric["nan"]:
        what = f"{metric['nan']} of {metric['clips']} scores of '{name}' are NaN or infinite in {precision}"
        return f"{what}, expected numbers; no bundle was written: {advice}"
    how_far = f"{metric['change']:+.2%}, {metric['eager']:.4f} to {metric['got']:.4f}"
    return (
        f"{precision} moves the MAE of {', '.join(failed)} too far: of '{name}' by {how_far} on {metric['clips']} "
        f"validation clips, allowed {metric['bound']:.1%}; no bundle was written: {advice}"
    )
