"""The HTML report: one file that needs nothing else, in light and dark, on narrow and wide screens, on paper."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from hcmen.runtime.benchmark.judge import Verdict
from hcmen.runtime.benchmark.page_style import STYLE
from hcmen.runtime.benchmark.plots import Scale, axis, band, bars, dots, lane, line_chart, marks, polyline
from hcmen.runtime.benchmark.text import milliseconds

__all__ = ["page"]

_COLORS = 8
_FURTHEST = 2.0
_STEP_NAMES = ("Python starts", "imports", "bundle and sessions", "clip read and scored")


def page(data: Mapping[str, Any], verdicts: Sequence[Verdict] = (), unmatched: Sequence[str] = ()) -> str:
    """The report of a document of report.py, as HTML."""
    rows = [r for r in data["rows"] if r["run"] is not None]
    sections = [
        _header(data),
        _warnings(data),
        _glance(data, rows),
        _comparison(verdicts, unmatched),
        _latency(rows),
        _percentiles(rows),
        _throughput(rows),
        _cold(data["cold"]),
        _rounds(data, rows),
        _table(data),
        _about(data),
    ]
    bundles = ", ".join(b["label"] for b in data["bundles"])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>hcmen-bench: {escape(bundles)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>{''.join(s for s in sections if s)}</main></body></html>\n"
    )


def _section(title: str, body: str, note: str = "") -> str:
    """A section, or nothing where there is nothing to show. note: HTML."""
    return f"<section><h2>{escape(title)}</h2>{f'<p>{note}</p>' if note else ''}{body}</section>\n" if body else ""


def _series(row: Mapping[str, Any]) -> str:
    """What a row is called within its group: everything but variant and batch."""
    parts = [row["bundle"], row["engine"], row["precision"]]
    parts += [f"{row['threads']} thread{'s' if row['threads'] != 1 else ''}"] if row["threads"] else []
    return ", ".join(part for part in parts if part)


def _colors(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Series -> CSS class."""
    names = dict.fromkeys(_series(r) for r in rows)
    return {name: f"c{i % _COLORS}" for i, name in enumerate(names)}


def _groups(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Rows of one variant and batch, under a title."""
    found: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["variant"], row["batch"]), []).append(row)
    single = len({batch for _, batch in found}) == 1
    for (variant, batch), members in found.items():
        what = f"batch {batch}" if batch else "golden inputs"
        yield variant if single and batch == 1 else f"{variant}, {what}", members


def _lanes(rows: Sequence[tuple[str, str, str]], scale_row: str) -> str:
    """Rows of (label, drawing, figure) in three columns over an axis; a row of ("title", "", "") is a heading."""
    made = []
    for label, drawing, figure in rows:
        if not drawing:
            made.append(f'<h3 class="group">{escape(label)}</h3>')
        else:
            made.append(
                f'<div class="label">{escape(label)}</div><div class="plot">{drawing}</div>'
                f'<div class="figure">{figure}</div>'
            )
    made.append(f'<div class="label"></div><div class="plot">{scale_row}</div><div class="figure"></div>')
    return f'<div class="lanes">{"".join(made)}</div>'


def _header(data: Mapping[str, Any]) -> str:
    m, s = data["machine"], data["settings"]
    state = "" if data["complete"] else ' <strong class="bad">interrupted: what was measured until then</strong>'
    return (
        f"<header><h1>hcmen-bench</h1><p><strong>{escape(', '.join(b['label'] for b in data['bundles']))}</strong> on "
        f"{escape(str(m.get('cpu')))}, {m.get('usable_cores')} cores. {escape(str(m.get('date')))}, "
        f"{s['rounds']} rounds, {data['seconds']:.0f} s.{state}</p>"
        f"<pre>{escape(str(m.get('command')))}</pre></header>\n"
    )


def _warnings(data: Mapping[str, Any]) -> str:
    bad = [f"{r['name']}: {r['reason']}" for r in data["rows"] if r["status"] in ("wrong", "failed")]
    bad += [f"fresh process, {c['kind']}: {c['reason']}" for c in data["cold"] if c["status"] == "failed"]
    items = [f'<li class="bad">{escape(line)}</li>' for line in bad]
    items += [f"<li>{escape(line)}</li>" for line in data["warnings"]]
    if not items:
        return ""
    return f'<section class="warn"><h2>Before you trust these figures</h2><ul>{"".join(items)}</ul></section>\n'


def _glance(data: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """A few tiles with what most readers came for."""
    tiles = []
    if rows:
        first = rows[0]
        interval = _interval(first["run"])
        tiles.append((f"{milliseconds(first['run']['p50'])} ms", f"p50 of {first['name']}{interval}"))
        others = [r for r in rows if r["ratio"] is not None and r["ratio"]["to"] == first["name"] and r is not first]
        for r in others[:3]:
            tiles.append((f"{r['ratio']['estimate']:.2f} x", f"as long takes {_series(r)}, round by round"))
        best = max(rows, key=lambda r: r["clips_per_second"])
        tiles.append((f"{best['clips_per_second']:.4g} / s", f"clips, at most: {best['name']}"))
    cold = next((c for c in data["cold"] if c["median"] is not None and c["kind"] != "floor"), None)
    if cold is not None:
        tiles.append((f"{cold['median']['total_ms'] / 1e3:.2f} s", f"process start to first score, {cold['kind']}"))
        if cold["median"]["settled_mib"] is not None:
            tiles.append((f"{cold['median']['settled_mib']:.0f} MiB", f"resident, {cold['kind']}"))
    made = "".join(f"<li><strong>{escape(a)}</strong><span>{escape(b)}</span></li>" for a, b in tiles)
    return f'<section><ul class="tiles">{made}</ul></section>\n' if made else ""


def _interval(times: Mapping[str, Any]) -> str:
    if times["p50_low"] is None or times["p50_high"] is None:
        return ""
    return f" ({milliseconds(times['p50_low'])} to {milliseconds(times['p50_high'])})"


def _latency(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    calls = {id(r): [ms for turn in r["run"]["rounds_ms"] for ms in turn] for r in rows}
    every = [ms for values in calls.values() for ms in values]
    scale = Scale.around(every, log=max(every) > 4 * max(min(every), 1e-9))
    colors, height = _colors(rows), 40
    made: list[tuple[str, str, str]] = []
    for title, members in _groups(rows):
        made.append((title, "", ""))
        for r in members:
            t, color = r["run"], colors[_series(r)]
            drawing = ""
            if t["p50_low"] is not None and t["p50_high"] is not None:
                drawing += band(t["p50_low"], t["p50_high"], scale, 2, height - 4, "interval")
            drawing += dots(calls[id(r)], scale, height, color)
            drawing += marks([(t["p99"], "p99"), (t["p90"], "p90"), (t["p50"], "p50")], scale, height)
            text = f"{t['n']} calls, p50 {t['p50']:g} ms{_interval(t)}, p90 {t['p90']:g} ms, p99 {t['p99']:g} ms"
            figure = f"<strong>{milliseconds(t['p50'])}</strong> ms<small>{_interval(t)}</small>"
            made.append((_series(r), lane(drawing, height, f"Latency of {r['name']}", text, scale), figure))
    legend = (
        "Every dot is a timed run of the graph. <span class='key k50'></span> p50, in grey its 95 % interval, "
        "<span class='key k90'></span> p90, <span class='key k99'></span> p99."
    )
    return _section("Latency, every call", _lanes(made, axis(scale, "ms")), legend)


def _percentiles(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    scale, colors, height = Scale.around([r["run"]["p99"] for r in rows], log=False), _colors(rows), 22
    made: list[tuple[str, str, str]] = []
    for title, members in _groups(rows):
        made.append((title, "", ""))
        for r in members:
            t, color = r["run"], colors[_series(r)]
            parts = [
                (t["p50"], f"fill {color}"),
                (t["p90"] - t["p50"], f"fill half {color}"),
                (t["p99"] - t["p90"], f"fill faint {color}"),
            ]
            text = ", ".join(f"p{p} {t[f'p{p}']:g} ms" for p in (50, 90, 99))
            figure = " / ".join(
                f"{milliseconds(t[f'p{p}'])}{'' if t['enough'][f'p{p}'] else '<abbr title=few>?</abbr>'}"
                for p in (50, 90, 99)
            )
            made.append((_series(r), lane(bars(parts, scale, height), height, r["name"], text, scale), figure))
    note = "Full colour up to p50, then p90, then p99; from zero. '?': fewer than 10 calls lie beyond it."
    return _section("p50, p90, p99", _lanes(made, axis(scale, "ms")), note)


def _throughput(rows: Sequence[Mapping[str, Any]]) -> str:
    batched = [r for r in rows if r["batch"]]
    if len({r["batch"] for r in batched}) < 2:
        return ""
    colors, charts = _colors(rows), []
    for variant in dict.fromkeys(r["variant"] for r in batched):
        lines: dict[str, list[tuple[float, float]]] = {}
        for r in batched:
            if r["variant"] == variant:
                lines.setdefault(_series(r), []).append((r["batch"], r["clips_per_second"]))
        drawn = [(name, colors[name], sorted(points)) for name, points in lines.items()]
        chart = line_chart(drawn, f"Clips per second of {variant}", "clips at once", "clips per second")
        charts.append(f"<figure><figcaption>{escape(variant)}, clips per second</figcaption>{chart}</figure>")
    keys = "".join(f'<li><span class="key {c}"></span>{escape(name)}</li>' for name, c in colors.items())
    body = f'<ul class="legend">{keys}</ul><div class="charts">{"".join(charts)}</div>'
    return _section("Throughput", body, "Clips at once over the p50 of a run.")


def _cold(colds: Sequence[Mapping[str, Any]]) -> str:
    found = [c for c in colds if c["median"] is not None]
    if not found:
        return ""
    own = [c for c in found if not c["kind"].startswith("eager")]
    keys = "".join(f'<li><span class="key c{i}"></span>{escape(name)}</li>' for i, name in enumerate(_STEP_NAMES))
    body = f'<h3>From process start to the first score</h3><ul class="legend">{keys}</ul>{_starts(own)}'
    if len(own) < len(found):  # on a scale of its own, since PyTorch takes many times as long
        beside = [c for c in own if c["kind"] != "floor"][:1] + [c for c in found if c not in own]
        body += f"<h3>Beside PyTorch</h3>{_starts(beside)}"
    held = [c for c in found if c["median"]["peak_mib"] is not None and c["median"]["settled_mib"] is not None]
    if held:
        names = (("", "the process's own"), (" half", "mapped files"), (" faint", "more, at the peak"))
        keys = "".join(f'<li><span class="key c0{c}"></span>{name}</li>' for c, name in names)
        body += f'<h3>Resident memory</h3><ul class="legend">{keys}</ul>{_memory(held)}'
    note = f"Medians of {found[0]['n']} fresh processes of each kind, in turns; files in the page cache."
    return _section("Cold start and memory", body, note)


def _starts(colds: Sequence[Mapping[str, Any]]) -> str:
    scale, height, made = Scale.around([c["median"]["total_ms"] / 1e3 for c in colds], log=False), 22, []
    for c in colds:
        steps = [ms / 1e3 for ms in c["median"]["steps_ms"]]
        text = ", ".join(f"{name} {s:.3f} s" for name, s in zip(_STEP_NAMES, steps, strict=True))
        drawing = bars([(s, f"fill c{i}") for i, s in enumerate(steps)], scale, height)
        low, high = min(c["total_ms"]) / 1e3, max(c["total_ms"]) / 1e3
        figure = f"<strong>{c['median']['total_ms'] / 1e3:.2f}</strong> s<small> ({low:.2f} to {high:.2f})</small>"
        made.append((_kind(c), lane(drawing, height, f"Cold start, {c['kind']}", text, scale), figure))
    return _lanes(made, axis(scale, "s"))


def _memory(colds: Sequence[Mapping[str, Any]]) -> str:
    scale, height, made = Scale.around([c["median"]["peak_mib"] for c in colds], log=False), 22, []
    for c in colds:
        m = c["median"]
        own = min(m["anonymous_mib"] or 0.0, m["settled_mib"])
        parts = [
            (own, "fill c0"),
            (m["settled_mib"] - own, "fill half c0"),
            (max(0.0, m["peak_mib"] - m["settled_mib"]), "fill faint c0"),
        ]
        text = f"own {own:g}, resident {m['settled_mib']:g}, peak {m['peak_mib']:g} MiB"
        drawing = lane(bars(parts, scale, height), height, f"Memory, {c['kind']}", text, scale)
        figure = f"<strong>{m['settled_mib']:.0f}</strong> MiB<small>, peak {m['peak_mib']:.0f}</small>"
        made.append((_kind(c), drawing, figure))
    return _lanes(made, axis(scale, "MiB"))


def _kind(c: Mapping[str, Any]) -> str:
    return f"{c['bundle']} {c['kind']}".strip()


def _rounds(data: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """How every row, and the probe, went over the run, relative to its own median."""
    lines: list[tuple[str, str, list[float]]] = []
    for r in rows:
        medians = [float(np.median(turn)) for turn in r["run"]["rounds_ms"]]
        lines.append((r["name"], _colors(rows)[_series(r)], medians))
    if data["probe"]["rounds_ms"]:
        lines.append(("the probe", "probe", data["probe"]["rounds_ms"]))
    lines = [(name, color, values) for name, color, values in lines if len(values) >= 2]
    if not lines:
        return ""
    relative = [[v / float(np.median(values)) for v in values] for _, _, values in lines]
    furthest = max(1.1, *(max(max(values), 1 / min(values)) for values in relative))
    most = min(furthest, _FURTHEST)  # what goes further runs along the edge, so that the rest can be told apart
    scale, height = Scale(1 / most, most, log=True), 200
    drawing = "".join(
        f'<path class="grid" d="M0 {height * (1 - scale(v) / 1000):.1f}H1000"/>'
        for v in (1 / math.sqrt(most), 1.0, math.sqrt(most))
    )
    for (_, color, _), values in zip(lines, relative, strict=True):
        step = 1000 / (len(values) - 1)
        points = [(i * step, height * (1 - scale(v) / 1000)) for i, v in enumerate(values)]
        drawing += polyline(points, f"thin {color}" if color != "probe" else "probe")
    count = max(len(values) for values in relative)
    text = f"{len(lines)} lines over {count} rounds; the furthest from its median by a factor of {furthest:.2f}"
    plot = lane(drawing, height, "Medians of the rounds", text)
    body = (
        f'<div class="over"><span class="high">{most - 1:+.0%}</span>'
        f'<span class="low">{1 / most - 1:+.0%}</span>{plot}</div>'
        f'<div class="axis"><span class="tick first" style="left:0">first round</span>'
        f'<span class="tick last" style="left:100%">last round</span></div>'
    )
    note = (
        "Each line is a row: the median of each round over the row's own median. "
        "<span class='key probe'></span> The probe is a fixed piece of work that has nothing to do with hcmen: where "
        "it moves, the machine moved."
    )
    return _section("Round by round", body, note)


def _comparison(verdicts: Sequence[Verdict], unmatched: Sequence[str]) -> str:
    if not verdicts and not unmatched:
        return ""
    body, height = "", 26
    if verdicts:
        # Of the margins those that are small; a wide one fills its lane.
        ends = [x for v in verdicts for x in (v.low or v.ratio, v.high or v.ratio)]
        ends += [x for v in verdicts for x in (1 + min(v.margin, 0.2), 1 / (1 + min(v.margin, 0.2)))]
        scale = Scale.around(ends, log=True)
        made = []
        for v in verdicts:
            drawing = band(1 / (1 + v.margin), 1 + v.margin, scale, 0, height, "margin")
            if v.low is not None and v.high is not None:
                drawing += band(v.low, v.high, scale, height / 2 - 3, 6, f"fill v-{_slug(v.verdict)}")
            drawing += marks([(v.ratio, f"ratio v-{_slug(v.verdict)}")], scale, height)
            text = f"new over old {v.ratio:.3f}, interval {v.low} to {v.high}, margin {v.margin:.1%}: {v.verdict}"
            figure = f"<strong class='v-{_slug(v.verdict)}'>{escape(v.verdict)}</strong><small> {v.ratio:.3f}</small>"
            made.append((f"{v.name}, {v.figure}", lane(drawing, height, v.name, text, scale), figure))
        body = _lanes(made, axis(scale, "new / old"))
    body += "".join(f"<p>{escape(line)}</p>" for line in unmatched)
    note = (
        "The ratio new / old with its interval; in grey what a difference must exceed: 1 %, the drift within both "
        "runs, the difference of the probe. A verdict needs the whole interval outside of it."
    )
    return _section("Against the earlier run", body, note)


def _slug(verdict: str) -> str:
    return verdict.replace(" ", "-")


def _table(data: Mapping[str, Any]) -> str:
    header = ["row", "status", "n", "min", "p50", "95 % low", "high", "mean", "p90", "p99", "max"]
    header += [
        "call p50",
        "call p90",
        "load",
        "first run",
        "clips/s",
        "ratio",
        "low",
        "high",
        "waited",
        "largest error",
    ]
    lines = []
    for r in data["rows"]:
        t, c, q = r["run"], r["call"], r["ratio"]
        errors = [x["max_abs"] for x in r["checks"].values() if x.get("max_abs") is not None]
        cells = [r["name"], r["status"]]
        if t is None:
            cells += ["-"] * 9
        else:
            cells += [str(t["n"]), *(milliseconds(t[k]) for k in ("min", "p50", "p50_low", "p50_high", "mean"))]
            cells += [milliseconds(t[p]) + ("" if t["enough"][p] else " ?") for p in ("p90", "p99")]
            cells += [milliseconds(t["max"])]
        cells += [milliseconds(c[p]) if c else "-" for p in ("p50", "p90")]
        cells += [milliseconds(float(np.median(r[k])) if r[k] else None) for k in ("load_ms", "first_ms")]
        cells += [f"{r['clips_per_second']:.4g}" if t else "-"]
        cells += [f"{q[k]:.3f}" if q and q[k] is not None else "-" for k in ("estimate", "low", "high")]
        cells += ["-" if r["waited_share"] is None or t is None else f"{r['waited_share']:.1%}"]
        cells += [f"{max(errors):.1e}" if errors else "-"]
        first, *rest = (escape(x) for x in cells)
        lines.append(f'<tr><th scope="row">{first}</th>{"".join(f"<td>{x}</td>" for x in rest)}</tr>')
    if not lines:
        return ""
    head = "".join(f'<th scope="col">{escape(x)}</th>' for x in header)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    body = f'<div class="scroll" tabindex="0">{table}</div>'
    note = (
        "Times in milliseconds. run: the graph alone; call: end to end, the clip's file read. ratio: to the first row "
        "of the same variant and batch, paired round by round. waited: the share of its time without a free core. "
        "largest error: against eager PyTorch, of a foreign graph the library against its functions, before timing."
    )
    return _section("All figures", body, note)


def _about(data: Mapping[str, Any]) -> str:
    m = data["machine"]
    pairs: list[tuple[str, Any]] = [(k.replace("_", " "), v) for k, v in m.items() if not isinstance(v, dict)]
    pairs += [("versions", ", ".join(f"{k} {v}" for k, v in m["versions"].items()))]
    pairs += [("environment", ", ".join(f"{k}={v}" for k, v in (m.get("environment") or {}).items()) or "nothing set")]
    for b in data["bundles"]:
        size = f", weights {b['weights_bytes'] / (1 << 20):.1f} MiB" if "weights_bytes" in b else ""
        kind, digest = ("graph", "") if b.get("kind") == "onnx" else ("bundle", "manifest ")
        told = f"{b.get('path')}, {digest}sha256 {b['manifest_sha256'][:16]}{size}"
        pairs.append((f"{kind} {b['label']}", told))
    pairs += [
        (k.replace("_", " "), "until steady" if k == "warm_up" and v is None else v)
        for k, v in data["settings"].items()
    ]
    shares = data["cpu_time_of_others"] or {}
    pairs += [(f"{k.split('_')[0]}: share of the CPU time", f"{v:.1%}") for k, v in shares.items()]
    made = "".join(f"<dt>{escape(k)}</dt><dd>{escape(_plain(v))}</dd>" for k, v in pairs)
    return _section("Machine, versions, settings", f"<dl>{made}</dl>")


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "-"
    return "not told by the system" if value is None else str(value)
