"""The document of a run: what JSON holds, what the tables and the page are made from, and what is compared later.

Times are milliseconds. Every timed call is kept, by rounds (`rounds_ms`), so that a later comparison judges the noise
of both runs itself instead of trusting a summary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hcmen.base.bundle import Bundle
from hcmen.base.errors import CorruptFileError, InputError, reason_of, shown
from hcmen.base.files import read_small, refused
from hcmen.base.records import JsonFile, parse_json
from hcmen.runtime.benchmark.cold import STEPS, Cold
from hcmen.runtime.benchmark.measure import Settings
from hcmen.runtime.benchmark.rows import Measured
from hcmen.runtime.benchmark.stats import CONFIDENCE, calls_needed, enough, paired_ratio, row_interval, wandering

__all__ = ["PERCENTILES", "SCHEMA_VERSION", "describe_bundle", "document", "document_path", "read_document", "row_key"]

SCHEMA_VERSION = 1
WHAT = "hcmen-bench"
PERCENTILES = (50, 90, 99)
_PERCENTILE_KEYS = ("p50", "p90", "p99")
_MAX_BYTES = 256 << 20
_MOST_NUMBER = 1e15  # of milliseconds, bytes and counts, far from where one number divided by another is no number
_KEY = ("bundle", "variant", "engine", "precision", "threads", "batch")


def row_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What identifies a row of a document."""
    return tuple(row[k] for k in _KEY)


def describe_bundle(label: str, bundle: Bundle) -> dict[str, Any]:
    """A bundle as the document names it; its manifest's sha256 stands for all of it, since it holds every other."""
    manifest = bundle.manifest
    content = bundle.read_manifest()
    return {
        "label": label,
        "path": str(bundle.path),
        "manifest_sha256": hashlib.sha256(content).hexdigest(),
        "checkpoint_sha256": manifest.source.get("checkpoint_sha256"),
        "precision": manifest.precision,
        "created": manifest.created,
        "weights_bytes": manifest.weights.bytes,
        "graph_bytes": {name: v.graph.bytes for name, v in manifest.variants.items()},
    }


def document(
    *,
    machine: Mapping[str, Any],
    bundles: Sequence[Mapping[str, Any]],
    settings: Settings,
    measured: Sequence[Measured],
    probe_ns: Sequence[int],
    memory_probe_ns: Sequence[int],
    probe_threads: int,
    colds: Sequence[Cold],
    warnings: Sequence[str],
    shares: Mapping[str, float] | None,
    complete: bool,
    seconds: float,
) -> dict[str, Any]:
    """The document; see docs/bench.md for its fields."""
    rows = [_row(m) for m in measured]
    for row, m in zip(rows, measured, strict=True):
        reference = _reference(m, measured)
        if m.run_ns and reference is not None and reference.run_ns:
            count = min(len(m.run_ns), len(reference.run_ns))
            found = paired_ratio(_medians(m.run_ns)[:count], _medians(reference.run_ns)[:count])
            row["ratio"] = {
                "to": reference.row.name,
                "estimate": _round(found.estimate),
                "low": _round(found.low),
                "high": _round(found.high),
            }
    return {
        "schema_version": SCHEMA_VERSION,
        "what": WHAT,
        "complete": complete,
        "seconds": round(seconds, 1),
        "machine": dict(machine),
        "cpu_time_of_others": None if shares is None else dict(shares),
        "settings": dataclasses.asdict(settings),
        "confidence": CONFIDENCE,
        "bundles": [dict(b) for b in bundles],
        "warnings": [*warnings, *_warnings(measured, probe_ns, shares)],
        "rows": rows,
        "probe": {
            "threads": probe_threads,
            "rounds_ms": [_ms(ns) for ns in probe_ns],
            "memory_rounds_ms": [_ms(ns) for ns in memory_probe_ns],
        },
        "cold": [_cold(c) for c in colds],
    }


def _row(m: Measured) -> dict[str, Any]:
    work = m.work
    row: dict[str, Any] = {
        **dataclasses.asdict(m.row),
        "name": m.row.name,
        "status": m.status,
        "reason": m.reason,
        "work": None if work is None else {"what": work.what, "clips": work.clips, "shapes": work.shapes},
        "checks": {name: {"passed": c.passed, **c.to_json()} for name, c in m.checks.items()},
        "load_ms": [round(x, 3) for x in m.load_ms],
        "first_ms": [round(x, 3) for x in m.first_ms],
        "warm_up": {"calls": m.warm_up, "settled": m.warm_up_settled},
        "run": _times(m.run_ns),
        "call": _times(m.call_ns),
        "waited_share": None if m.waited_ns is None or not m.turns_ns else _round(m.waited_ns / m.turns_ns),
        "clips_per_second": None,
        "ratio": None,
    }
    if row["run"] is not None and work is not None:
        row["clips_per_second"] = round(1e3 * work.clips / row["run"]["p50"], 2)
    return row


def _times(rounds_ns: Sequence[Sequence[int]]) -> dict[str, Any] | None:
    """The figures of the timed calls of a row; None without any."""
    if not rounds_ns:
        return None
    calls = np.array([ns for turn in rounds_ns for ns in turn], np.float64) / 1e6
    p50 = float(np.percentile(calls, 50))
    interval = row_interval([m / 1e6 for m in _medians(rounds_ns)], p50)
    return {
        "n": len(calls),
        "min": _round(float(calls.min())),
        "mean": _round(float(calls.mean())),
        **{f"p{p}": _round(float(np.percentile(calls, p))) for p in PERCENTILES},
        "max": _round(float(calls.max())),
        "enough": {f"p{p}": enough(len(calls), p) for p in PERCENTILES},
        "p50_low": _round(interval.low),
        "p50_high": _round(interval.high),
        "blocks": interval.blocks,
        "rounds_ms": [[_ms(ns) for ns in turn] for turn in rounds_ns],
    }


def _medians(rounds_ns: Sequence[Sequence[int]]) -> list[float]:
    return [max(1.0, float(np.median(turn))) for turn in rounds_ns]


def _ms(ns: int) -> float:
    return round(ns / 1e6, 5)


def _round(value: float | None) -> float | None:
    """Five significant digits: more than any of these has."""
    return None if value is None else float(f"{value:.5g}")


def _reference(m: Measured, measured: Sequence[Measured]) -> Measured | None:
    """What the ratio of a row is to: the first row of the same variant, batch and threads, or without the threads."""
    same = [o for o in measured if (o.row.variant, o.row.batch) == (m.row.variant, m.row.batch) and o.run_ns]
    return next((o for o in same if o.row.threads == m.row.threads), same[0] if same else None)


def _cold(c: Cold) -> dict[str, Any]:
    found = {k: v for k, v in dataclasses.asdict(c).items() if k != "command"}
    total = c.total_ms
    return {
        **found,
        "n": len(total),
        "total_ms": [round(x, 3) for x in total],
        "median": None
        if not total
        else {
            "total_ms": _round(float(np.median(total))),
            "steps_ms": [_round(float(x)) for x in np.median(c.steps_ms, axis=0)],
            **{
                key: _round(float(np.median(getattr(c, key)))) if getattr(c, key) else None
                for key in ("peak_mib", "settled_mib", "anonymous_mib")
            },
        },
    }


def _warnings(measured: Sequence[Measured], probe_ns: Sequence[int], shares: Mapping[str, float] | None) -> list[str]:
    """What of the run itself makes figures doubtful."""
    lines = []
    calls = [sum(map(len, m.run_ns)) for m in measured if m.run_ns]
    if calls:
        few = [p for p in PERCENTILES if not enough(min(calls), p)]
        if few:
            marked = ", ".join(f"p{p}" for p in few)
            lines.append(
                f"{marked} marked '?' rest on a handful of calls: the smallest n is {min(calls)}, p{few[-1]} needs "
                f"{calls_needed(few[-1])} (raise --rounds or --calls)"
            )
    waits = {m.row.name: m.waited_ns / m.turns_ns for m in measured if m.waited_ns is not None and m.turns_ns}
    most = max(waits, key=lambda name: waits[name], default="")
    if most and waits[most] > 0.02:
        lines.append(f"{most}: waited for a free core {waits[most]:.0%} of its time: something else runs here")
    unsettled = [m.row.name for m in measured if m.status == "ok" and not m.warm_up_settled and m.warm_up]
    if unsettled:
        more = f" and {len(unsettled) - 1} more rows" if len(unsettled) > 1 else ""
        lines.append(f"{unsettled[0]}{more}: not steady when warming up ended")
    if len(probe_ns) >= 4:
        wandered = math.expm1(wandering([float(ns) for ns in probe_ns]))
        if wandered > 0.05:
            lines.append(f"the machine itself was not steady: a fixed piece of work went {wandered:.0%} off its median")
    if shares and shares["others_share"] > 0.1:
        lines.append(f"other processes took {shares['others_share']:.0%} of the CPU time during the run")
    if shares and shares["stolen_share"] > 0.01:
        lines.append(f"the host took away {shares['stolen_share']:.0%} of the CPU time during the run")
    return lines


# --- reading --------------------------------------------------------------------------------------------------------


def read_document(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The document in the file `path`, as far as a comparison, the tables and the page need it checked.

    Raises:
        InputError: it cannot be read, or another version of hcmen wrote it.
        CorruptFileError: damaged, or no document of hcmen-bench.
    """
    where = os.fspath(path)
    file = JsonFile(where, "give a JSON file that hcmen-bench --out wrote, or measure again")
    with refused(where, "a JSON file that hcmen-bench --out wrote"):
        content = read_small(path, _MAX_BYTES)
    data = parse_json(content, file)
    if not isinstance(data, dict) or data.get("what") != WHAT:
        raise CorruptFileError(f"{where}: not a report of hcmen-bench, expected what hcmen-bench --out wrote")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise InputError(
            f"schema_version is {shown(data.get('schema_version'))}",
            str(SCHEMA_VERSION),
            "written by another version of hcmen, measure again",
            where=where,
        )
    try:
        _check_document(data)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else reason_of(error)
        raise CorruptFileError(f"{where}: damaged report of hcmen-bench ({what}): measure again") from error
    return data


def _check_document(data: dict[str, Any]) -> None:
    """Raises one of the errors of plain Python where a field that others rely on is not as `document` makes it."""
    kinds = {"machine": dict, "settings": dict, "rows": list, "cold": list, "bundles": list, "warnings": list}
    for key, kind in kinds.items():
        _require(isinstance(data[key], kind), key)
    _require(isinstance(data["complete"], bool) and _number(data["seconds"]), "complete")
    _require(all(isinstance(line, str) for line in data["warnings"]), "warnings")
    _require(isinstance(data["machine"]["versions"], dict), "versions")
    _require(isinstance(data["machine"]["environment"], dict), "environment")
    _require(_number(data["settings"]["rounds"]), "settings")
    shares = data["cpu_time_of_others"]
    _require(shares is None or all(_number(shares[k]) for k in ("others_share", "stolen_share")), "cpu_time_of_others")
    for bundle in data["bundles"]:
        _require(all(isinstance(bundle[k], str) for k in ("label", "path", "manifest_sha256")), "bundles")
        _require(_number(bundle["weights_bytes"]), "bundles")
    _require(data["bundles"], "bundles")
    rounds = [*data["probe"]["rounds_ms"], *data["probe"].get("memory_rounds_ms", [])]
    _require(_number(data["probe"]["threads"]) and all(map(_time, rounds)), "probe")
    for row in data["rows"]:
        _check_row(row)
    for cold in data["cold"]:
        _check_cold(cold)


def _count(value: Any) -> bool:
    """Whether `value` is a number of clips or threads, which is drawn and may have any number of digits in a file."""
    return isinstance(value, int) and 0 <= value < 1 << 31


def _check_row(row: dict[str, Any]) -> None:
    hash(row_key(row))
    _require(all(isinstance(row[k], str) for k in ("name", "reason", *_KEY[:4])), "rows")
    _require(_count(row["batch"]) and (row["threads"] is None or _count(row["threads"])), "rows")
    _require(row["status"] in ("ok", "wrong", "failed", "unmeasured"), "status")
    for times in (row["run"], row["call"]):
        if times is not None:
            _require(all(_time(times[k]) for k in ("min", "mean", *_PERCENTILE_KEYS, "max")), "run")
            _require(_number(times["n"]) and all(isinstance(times["enough"][k], bool) for k in _PERCENTILE_KEYS), "n")
            _require(all(times[k] is None or _time(times[k]) for k in ("p50_low", "p50_high")), "p50_low")
            _require(times["rounds_ms"] and all(t and all(map(_time, t)) for t in times["rounds_ms"]), "rounds_ms")
    if row["run"] is not None:
        _require(_time(row["clips_per_second"]) and isinstance(row["work"]["shapes"], list), "work")
    _require(row["waited_share"] is None or _number(row["waited_share"]), "waited_share")
    ratio = row["ratio"]
    if ratio is not None:
        _require(_time(ratio["estimate"]) and isinstance(ratio["to"], str), "ratio")
        _require(all(ratio[k] is None or _time(ratio[k]) for k in ("low", "high")), "ratio")
    _require(all(map(_time, (*row["load_ms"], *row["first_ms"]))), "load_ms")
    for check in row["checks"].values():
        _require(check["max_abs"] is None or _number(check["max_abs"]), "checks")


def _check_cold(cold: dict[str, Any]) -> None:
    _require(all(isinstance(cold[k], str) for k in ("kind", "bundle", "status", "reason")), "cold")
    hash(cold["threads"])
    _require(all(map(_time, (*cold["total_ms"], *cold["settled_mib"], *cold["peak_mib"]))), "cold")
    median = cold["median"]
    _require(_number(cold["n"]) and (median is None) == (not cold["total_ms"]), "cold")
    if median is not None:
        _require(_time(median["total_ms"]), "cold")
        _require(len(median["steps_ms"]) == len(STEPS) and all(map(_number, median["steps_ms"])), "cold")
        sizes = ("peak_mib", "settled_mib", "anonymous_mib")
        _require(all(median[k] is None or _time(median[k]) for k in sizes), "cold")


def _require(holds: object, where: str) -> None:
    if not holds:
        raise ValueError(f"'{where}' is not as it was written")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= _MOST_NUMBER


def _time(value: Any) -> bool:
    """Whether it is a number above zero that can be divided by, and of which a logarithm can be taken."""
    return _number(value) and value >= 1 / _MOST_NUMBER


def document_path(path: str) -> Path:
    """`path` as a place where a report can be written later, checked now: its folder is made if need be.

    Raises:
        InputError: it is a folder, or its folder cannot be written.
    """
    target = Path(path)
    if target.is_dir():
        raise InputError(f"{path}: is a folder, expected a file name")
    with refused(target.parent, fix="choose another place"):
        target.parent.mkdir(parents=True, exist_ok=True)
    effective = os.access in os.supports_effective_ids
    if not os.access(target.parent, os.W_OK | os.X_OK, effective_ids=effective):
        raise InputError(f"{target.parent}: may not be written: choose another place")
    return target
