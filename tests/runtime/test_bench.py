"""`hcmen-bench`: rows are right before they are timed, take turns, and are called slower only beyond the noise."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers.command import open_folder, run, without_privileges
from helpers.small_bundle import clip_arrays, make_bundle

import hcmen.runtime.benchmark.cold as cold
import hcmen.runtime.benchmark.machine as machine
import hcmen.runtime.benchmark.rows as rows
from hcmen.base.bundle import read_bundle
from hcmen.base.clip import write_clip
from hcmen.base.errors import BackendError, CorruptFileError, InputError
from hcmen.runtime.benchmark.command import main
from hcmen.runtime.benchmark.judge import FASTER, SAME, SLOWER, UNSURE, compare_documents
from hcmen.runtime.benchmark.measure import Probe, Settings, measure, round_orders, warm_up
from hcmen.runtime.benchmark.page import page
from hcmen.runtime.benchmark.plan import labels
from hcmen.runtime.benchmark.plots import Scale, nice_ticks
from hcmen.runtime.benchmark.report import read_document
from hcmen.runtime.benchmark.rows import Measured, Row, golden_inputs, make_work
from hcmen.runtime.benchmark.text import milliseconds, tables

QUICK = ("--rounds", "3", "--calls", "2", "--warmup", "1", "--loads", "1", "--threads", "1")


@pytest.fixture(scope="session")
def report(shared_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON of a whole run on the small bundle: two batches, plain ONNX Runtime beside it, fresh processes."""
    path = tmp_path_factory.mktemp("bench") / "new" / "report.json"
    done = run(
        main,
        *(shared_bundle, "--variant", "full", "--variant", "text_only", "--batch", 1, "--batch", 3),
        *("--against", "functions", "--cold", "--cold-rounds", 1, "--out", path, *QUICK, "--rounds", "8"),
    )
    assert done.code == 0, done.err
    return path


def document(report: Path, **p50: float) -> dict:
    """The report of `report` as if each row had been measured quietly, in 30 rounds, p50[variant] milliseconds each."""
    data = json.loads(report.read_text())
    rng = np.random.default_rng(int(1e6 * sum(p50.values())))
    for row in data["rows"]:
        for figure in ("run", "call"):
            if row[figure]:
                noise = np.exp(0.02 * rng.standard_normal((30, 4)))
                row[figure]["rounds_ms"] = (p50.get(row["variant"], 1.0) * noise).tolist()
        row["waited_share"] = 0.0
    data["probe"]["rounds_ms"] = data["probe"]["memory_rounds_ms"] = [1.0] * 30
    data["cpu_time_of_others"] = {"others_share": 0.0, "stolen_share": 0.0}
    return data


# --- measuring ------------------------------------------------------------------------------------------------------


class Recorder:
    """A runner that notes when its turn is and takes one nanosecond more each time."""

    def __init__(self, name: str, turns: list[str], fail_in: int | None = None):
        self.measured = Measured(Row("", name, "ort", "fp32", 1, 1))
        self.turns, self.fail_in, self.count, self.pid = turns, fail_in, 0, None

    def check(self):
        return {}

    def load(self):
        return 2.0, 1.0

    def time_runs(self, settle, calls):
        self.count += 1
        if settle:
            self.turns.append(self.measured.row.variant)
            if self.fail_in is not None and len(self.measured.run_ns) == self.fail_in:
                raise BackendError("gone")
        return [1000 + self.count] * calls

    def time_calls(self, settle, calls):
        return [5000] * calls


def test_rows_take_turns_in_an_order_drawn_anew_each_round():
    turns: list[str] = []
    runners = [Recorder(name, turns) for name in "abcd"]
    probe = Probe(2)
    measure(runners, Settings(rounds=40, calls=3, warm_up=2, loads=1, seed=5), probe)
    probe.close()
    rounds = [turns[i : i + 4] for i in range(0, len(turns), 4)]
    assert len(rounds) == 40
    assert all(sorted(r) == list("abcd") for r in rounds)
    assert len({tuple(r) for r in rounds}) > 10
    assert len(probe.ns) == len(probe.memory_ns) == 40
    for runner in runners:
        assert [len(turn) for turn in runner.measured.run_ns] == [3] * 40
        assert (runner.measured.status, runner.measured.warm_up, runner.measured.load_ms) == ("ok", 2, [2.0])
    assert round_orders(4, 40, 5) == round_orders(4, 40, 5) != round_orders(4, 40, 6)


def test_an_error_of_one_row_ends_that_row_alone():
    turns: list[str] = []
    runners = [Recorder("a", turns, fail_in=3), Recorder("b", turns)]
    probe = Probe(1)
    measure(runners, Settings(rounds=6, calls=1, warm_up=0, loads=0), probe)
    probe.close()
    assert [r.measured.status for r in runners] == ["failed", "ok"]
    assert [len(r.measured.run_ns) for r in runners] == [3, 6]
    assert (runners[0].measured.reason, runners[0].measured.exit_code) == ("gone", 3)


def test_warming_up_ends_when_steady_or_given_up_on():
    falling = iter(1.0 / (i + 1) for i in range(1000))
    taken, steady = warm_up(lambda: next(falling), None)
    assert (len(taken), steady) == (100, False)  # 1/96 against 1/91 still differ by 5.2 %
    assert warm_up(lambda: 1.0, None) == ([1.0] * 10, True)
    assert warm_up(lambda: 1.0, 3) == ([1.0] * 3, False)
    assert warm_up(lambda: 1.0, 0) == ([], False)


def test_a_row_with_wrong_numbers_is_not_timed(tmp_path):
    wrong = make_bundle(tmp_path / "wrong", ("full", "text_only"), scale=1.01)
    done = run(main, wrong, "--format", "json", *QUICK)
    answer = json.loads(done.out)
    assert done.code == 1
    assert [r["status"] for r in answer["rows"]] == ["wrong", "wrong"]
    assert all(r["run"] is None and r["clips_per_second"] is None for r in answer["rows"])
    assert "differs from eager: FAILED" in answer["rows"][0]["reason"]
    assert "2 of 2 rows could not be timed" in done.lines[-1]
    assert "WRONG" in run(main, wrong, *QUICK).out


def test_the_row_of_functions_runs_without_the_library(micro_bundle):
    done = run(main, micro_bundle, "--variant", "audio_only", "--against", "functions", "--format", "json", *QUICK)
    answer = json.loads(done.out)
    assert done.code == 0, done.err
    assert [r["engine"] for r in answer["rows"]] == ["ort", "functions"]
    assert all(c["passed"] for r in answer["rows"] for c in r["checks"].values())
    assert {"golden score", "golden modality_weights"} == set(answer["rows"][1]["checks"])
    assert answer["rows"][1]["ratio"]["to"] == answer["rows"][0]["name"]
    assert "without the kernel library" not in done.err


def test_golden_inputs_are_those_of_the_bundle(shared_bundle, tmp_path):
    bundle = read_bundle(shared_bundle)
    feeds = golden_inputs(bundle, "full")
    with np.load(shared_bundle / "golden" / "full.npz") as stored:
        np.testing.assert_array_equal(feeds[2]["audio"], stored["002/audio"])
        assert set(feeds[0]) == {k.partition("/")[2] for k in stored.files} - {"score", "modality_weights"}
    work = make_work(bundle, "full", 0, tmp_path)
    assert (len(work.feeds), work.clips, work.paths) == (4, 10, [])
    done = run(main, shared_bundle, "--golden", "--variant", "full", "--format", "json", *QUICK)
    row = json.loads(done.out)["rows"][0]
    assert (row["batch"], row["work"]["clips"], row["call"]) == (0, 10, None)


def test_clips_are_of_full_length_or_the_ones_given(shared_bundle, tmp_path):
    bundle = read_bundle(shared_bundle)
    takes = bundle.manifest.inputs
    work = make_work(bundle, "text_missing", 3, tmp_path)
    for m in ("audio", "vision"):
        assert work.feeds[0][m].shape == (3, takes.modality(m).max_steps, takes.modality(m).features)
    assert "text" not in work.feeds[0]
    assert not np.array_equal(work.feeds[0]["audio"][0], work.feeds[0]["audio"][1])
    write_clip(tmp_path / "clip.npz", clip_arrays(3))
    given = make_work(bundle, "full", 2, tmp_path, str(tmp_path / "clip.npz"))
    np.testing.assert_array_equal(given.feeds[0]["text"][1], clip_arrays(3)["text"])
    assert given.paths == [str(tmp_path / "clip.npz")] * 2


def test_a_batch_that_memory_cannot_hold_is_refused_and_the_others_are_timed(shared_bundle, monkeypatch):
    monkeypatch.setattr(rows, "free_memory_mib", lambda: 1)
    arguments = (shared_bundle, "--variant", "full", "--batch", 1, "--batch", 1 << 20)
    done = run(main, *arguments, "--format", "json", *QUICK)
    answer = json.loads(done.out)
    assert done.code == 2
    assert [r["status"] for r in answer["rows"]] == ["ok", "failed"]
    assert "GiB are free: take a smaller one" in answer["rows"][1]["reason"]


# --- the report -----------------------------------------------------------------------------------------------------


def test_the_json_says_everything_and_reads_back(report, shared_bundle):
    data = read_document(report)
    assert data == json.loads(report.read_text())
    assert (data["schema_version"], data["what"], data["complete"]) == (1, "hcmen-bench", True)
    assert len(data["rows"]) == 2 * 2 * 2
    for row in data["rows"]:
        times = np.concatenate(row["run"]["rounds_ms"])
        assert row["run"]["n"] == len(times) == 16
        assert row["run"]["p50"] == pytest.approx(np.percentile(times, 50), rel=1e-3)
        assert row["run"]["p99"] == pytest.approx(np.percentile(times, 99), rel=1e-3)
        assert row["run"]["mean"] == pytest.approx(times.mean(), rel=1e-3)
        assert row["run"]["enough"] == {"p50": False, "p90": False, "p99": False}
        assert row["run"]["p50_low"] <= row["run"]["p50"] <= row["run"]["p50_high"]
        assert row["clips_per_second"] == pytest.approx(1e3 * row["batch"] / row["run"]["p50"], rel=1e-2)
        assert len(row["load_ms"]) == len(row["first_ms"]) == 1
        assert row["status"] == "ok"
    of_ort = [r for r in data["rows"] if r["engine"] == "ort"]
    assert all(r["ratio"]["estimate"] == 1 for r in of_ort)
    assert all(r["call"]["p50"] > 0 for r in of_ort)
    found = data["machine"]
    assert {"numpy", "hcmen", "onnxruntime"} <= set(found["versions"])
    assert found["logical_cores"] == os.cpu_count()
    assert found["kernels_isa"] in ("avx512", "avx2", "baseline", "neon")
    assert data["bundles"][0]["path"] == str(shared_bundle)


def test_fresh_processes_report_their_start_and_their_memory(report):
    colds = {c["kind"]: c for c in json.loads(report.read_text())["cold"]}
    assert list(colds) == ["floor", "full", "text_only", "all variants"]
    for c in colds.values():
        assert (c["status"], c["n"], len(c["steps_ms"][0])) == ("ok", 1, 4)
        assert sum(c["steps_ms"][0]) == pytest.approx(c["total_ms"][0], abs=0.01)
        # A Python with NumPy and onnxruntime: some tens of MiB, and never more than at its peak.
        assert 15 < c["settled_mib"][0] <= c["peak_mib"][0] < 500
    assert colds["full"]["steps_ms"][0][2] > 0
    assert colds["floor"]["settled_mib"][0] < colds["full"]["settled_mib"][0]


def test_a_fresh_process_that_fails_says_why(shared_bundle, tmp_path):
    kinds = cold.cold_kinds("", str(tmp_path / "none"), {"full": "clip.npz"}, 1, "ort")
    cold.measure_cold(kinds, 1, 0)
    assert (kinds[0].status, kinds[0].steps_ms) == ("failed", [])
    assert "no such folder" in kinds[0].reason


class Strict(HTMLParser):
    """Checks that tags close in order, and collects what a page would load."""

    VOID = ("meta", "br", "path", "rect", "circle", "link", "img")

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_loads_nothing(report):
    old, new = document(report, full=1.0, text_only=1.0), document(report, full=1.3, text_only=1.0)
    new["rows"][0]["name"] = '<script src="http://x">'
    html = page(new, *compare_documents(new, old))
    parser = Strict()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    assert {"script", "link", "img", "iframe", "object"}.isdisjoint(parser.tags)
    assert not [a for a in parser.attributes if a[0] in ("src", "href", "srcset") or "url(" in (a[1] or "")]
    style = html[html.index("<style>") : html.index("</style>")]
    assert "http" not in style
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme:dark" in style
    drawings = parser.tags.count("svg")
    assert drawings >= 16
    assert parser.tags.count("desc") == drawings
    words = " ".join(parser.text)
    for title in (
        "Latency, every call",
        "Throughput",
        "Cold start and memory",
        "Against the earlier run",
        "All figures",
    ):
        assert title in words
    assert not re.search(r"\bnan\b|\binf\b", html.split("</style>")[1].lower())


def test_a_page_of_next_to_nothing_is_a_page(report):
    data = document(report)
    for row in data["rows"]:
        row.update(run=None, call=None, status="failed", reason="no", ratio=None, clips_per_second=None)
    data.update(cold=[], warnings=[])
    for changed in (data, {**data, "rows": []}):
        parser = Strict()
        parser.feed(page(changed))
        assert parser.open == []
        tables(changed)


def test_text_contrast_is_enough_in_both_themes():
    """WCAG 2: at least 4.5 to 1 of every text colour on the panel, by the formula of its relative luminance."""
    from hcmen.runtime.benchmark.page_style import STYLE

    def luminance(color: str) -> float:
        digits = color.lstrip("#")
        digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for theme in STYLE.split(":root{")[1:3]:
        colors = dict(pair.split(":") for pair in theme.split("}")[0].replace("\n", "").split(";"))
        for name in ("--ink", "--muted", "--bad", "--good", *(f"--c{i}" for i in range(8))):
            light, dark = sorted((luminance(colors[name]), luminance(colors["--panel"])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, name


def test_scales_and_ticks():
    scale = Scale.around([1.0, 100.0], log=True, room=0.0)
    assert [scale(v) for v in (1.0, 10.0, 100.0, 1e9)] == [0.0, 500.0, 1000.0, 1000.0]
    assert nice_ticks(Scale(0, 10)) == [0, 2, 4, 6, 8, 10]
    assert nice_ticks(Scale(0.9, 1100, log=True)) == pytest.approx([1, 3, 10, 30, 100, 300, 1000])
    for low, high in ((0.97, 1.03), (1e-3, 1.0), (5.0, 6.0)):
        ticks = nice_ticks(Scale(low, high, log=True))
        assert 2 <= len(ticks) <= 8
        assert all(low <= t <= high * (1 + 1e-9) for t in ticks)


def test_figures_have_three_digits():
    values = (None, 0.012345, 0.5, 1.23456, 12.3456, 1234.56)
    assert [milliseconds(v) for v in values] == ["-", "0.0123", "0.5", "1.23", "12.35", "1235"]


# --- comparing ------------------------------------------------------------------------------------------------------


def verdicts(new: dict, old: dict) -> dict[tuple[str, str], str]:
    return {
        (v.name, v.figure): v.verdict
        for v in compare_documents(new, old)[0]
        if v.unit == "ms" and "fresh" not in v.name
    }


def test_equal_runs_show_no_difference_and_a_fifth_is_seen(report):
    old = document(report, full=1.0, text_only=2.0)
    assert set(verdicts(document(report, full=1.001, text_only=2.0), old).values()) == {SAME}
    changed = verdicts(document(report, full=1.2, text_only=1.6), old)
    assert {v for (name, _), v in changed.items() if name.startswith("full")} == {SLOWER}
    assert {v for (name, _), v in changed.items() if name.startswith("text_only")} == {FASTER}


def test_a_difference_no_larger_than_the_drift_or_the_probe_is_none(report):
    old, new = document(report, full=1.0, text_only=1.0), document(report, full=1.2, text_only=1.2)
    slow_machine = copy.deepcopy(new)
    slow_machine["probe"]["rounds_ms"] = [1.25] * 30
    assert set(verdicts(slow_machine, old).values()) == {SAME}
    slow_memory = copy.deepcopy(new)
    slow_memory["probe"]["memory_rounds_ms"] = [1.25] * 30
    assert set(verdicts(slow_memory, old).values()) == {SAME}
    del slow_memory["probe"]["memory_rounds_ms"]  # as runs of before had it
    assert set(verdicts(slow_memory, old).values()) == {SLOWER}
    waiting = copy.deepcopy(new)
    for row in waiting["rows"]:
        row["waited_share"] = 0.3
    assert set(verdicts(waiting, old).values()) == {SAME}
    assert set(verdicts(old, waiting).values()) == {SAME}
    unknown = copy.deepcopy(new)
    unknown["cpu_time_of_others"]["others_share"] = 0.3
    assert set(verdicts(unknown, old).values()) == {SLOWER}
    for row in unknown["rows"]:
        row["waited_share"] = None
    assert set(verdicts(unknown, old).values()) == {SAME}
    drifting = copy.deepcopy(new)
    for row in drifting["rows"]:
        for figure in filter(None, (row["run"], row["call"])):
            figure["rounds_ms"] = [[x * (1.4 if i < 8 else 1) for x in t] for i, t in enumerate(figure["rounds_ms"])]
    assert set(verdicts(drifting, old).values()) == {SAME}
    short = copy.deepcopy(new)
    for row in short["rows"]:
        for figure in filter(None, (row["run"], row["call"])):
            figure["rounds_ms"] = figure["rounds_ms"][:2]
    assert set(verdicts(short, old).values()) == {UNSURE}


def test_rows_without_a_counterpart_are_named(report):
    old, new = document(report), document(report)
    old["rows"] = old["rows"][1:]
    new["rows"] = new["rows"][:-1]
    new["rows"][1]["work"]["shapes"] = []
    lines = compare_documents(new, old)[1]
    assert len(lines) == 4
    assert lines[0].endswith("not in the old run")
    assert "inputs of other shapes" in lines[1]
    assert lines[2].endswith("only in the old run")
    assert "raise --rounds or --calls" in lines[3]


def test_a_brief_run_calls_no_small_difference(report):
    """12 % over the square root of the seconds: of 4 s all differences beyond 6.2 %, of 0.25 s those beyond 27 %."""
    old, new = document(report, full=1.0, text_only=1.0), document(report, full=1.2, text_only=1.2)

    def lasting(seconds: float, data: dict) -> dict:
        data = copy.deepcopy(data)
        for c in data["cold"]:
            c["total_ms"] = [ms * 1e-6 for ms in c["total_ms"]]
        times = [t for row in data["rows"] for t in (row["run"], row["call"]) if t is not None]
        timed = sum(ms for t in times for turn in t["rounds_ms"] for ms in turn) / 1e3
        for t in times:
            t["rounds_ms"] = [[ms * seconds / timed for ms in turn] for turn in t["rounds_ms"]]
        return data

    long, lines = compare_documents(lasting(4.8, new), lasting(4.0, old))
    assert {round(v.margin, 3) for v in long if v.unit == "ms" and "fresh" not in v.name} == {0.062}
    assert any("timed 4.0 s in all" in line and "below 6 %" in line for line in lines)
    brief = lasting(0.3, new), lasting(0.25, old)
    assert {v.verdict for v in compare_documents(*brief)[0] if v.unit == "ms" and "fresh" not in v.name} == {SAME}
    assert "timed" not in "".join(compare_documents(lasting(24, new), lasting(20, old))[1])


def test_fail_slower_is_an_exit_code(report, tmp_path):
    paths = {}
    for name, ms in (("old", 1.0), ("new", 1.2)):
        paths[name] = tmp_path / f"{name}.json"
        paths[name].write_text(json.dumps(document(report, full=ms, text_only=1.0)))
    slower = run(main, "--show", paths["new"], "--compare", paths["old"], "--fail-slower", 5)
    assert slower.code == 1
    # run and call of the two batches on ort; those of functions are told, and fail nothing.
    assert "error: 4 of " in slower.lines[-1]
    assert "slower by more than 5 %, most of all full, ort" in slower.lines[-1]
    assert run(main, "--show", paths["new"], "--compare", paths["old"], "--fail-slower", 30).code == 0
    assert run(main, "--show", paths["old"], "--compare", paths["new"], "--fail-slower", 5).code == 0
    answer = json.loads(run(main, "--show", paths["new"], "--compare", paths["old"], "--format", "json").out)
    assert {v["verdict"] for v in answer["comparison"]["verdicts"] if v["name"].startswith("full")} == {SLOWER}


def test_another_machine_is_refused_and_other_versions_are_told(report, shared_bundle, tmp_path):
    data = json.loads(report.read_text())
    data["machine"]["cpu"] = "Another"
    (tmp_path / "old.json").write_text(json.dumps(data))
    arguments = (shared_bundle, "--variant", "full", "--compare", tmp_path / "old.json", *QUICK)
    refused = run(main, *arguments)
    assert (refused.code, refused.out) == (2, "")
    assert "measured on another machine (cpu " in refused.err
    anyway = run(main, *arguments, "--compare-anyway")
    assert anyway.code == 0
    assert "another machine" in anyway.err
    data = json.loads(report.read_text())
    data["machine"]["versions"]["onnxruntime"] = "1.0"
    data["bundles"][0]["manifest_sha256"] = "0" * 64
    (tmp_path / "old.json").write_text(json.dumps(data))
    told = run(main, *arguments)
    assert told.code == 0
    assert "was 1.0" in told.err
    assert "another content than then" in told.err
    assert "only in the old run" in told.out


@pytest.mark.parametrize(
    ("content", "code", "word"),
    [
        (b"", 5, "give a JSON file that hcmen-bench --out wrote"),
        (b'{"what": "hcmen-bench", "schema', 5, "give a JSON file that hcmen-bench --out wrote"),
        (b"[1]", 5, "not a report"),
        (b'{"what": "hcmen-bench", "schema_version": 99}', 2, "schema_version is 99"),
        (b'{"what": "hcmen-bench", "schema_version": 1}', 5, "lacks 'machine'"),
        (b"\x80\x04\x95", 5, "give a JSON file that hcmen-bench --out wrote"),
    ],
)
def test_a_damaged_or_foreign_old_report_is_refused(shared_bundle, tmp_path, content, code, word):
    (tmp_path / "old.json").write_bytes(content)
    done = run(main, shared_bundle, "--compare", tmp_path / "old.json")
    assert (done.code, done.out, len(done.lines)) == (code, "", 1)
    assert word in done.err


def test_every_damaged_field_is_noticed_or_harmless(report, tmp_path):
    """Each value of a report replaced by nonsense: refused as corrupt, or everything still works."""
    whole = json.loads(report.read_text())
    rng = np.random.default_rng(0)

    def places(value, path=()):
        if isinstance(value, dict):
            for k, v in value.items():
                yield from places(v, (*path, k))
        elif isinstance(value, list):
            for i, v in list(enumerate(value))[:2]:
                yield from places(v, (*path, i))
        yield path

    found = [p for p in places(whole) if p]
    for index in rng.permutation(len(found))[:500]:
        damaged = copy.deepcopy(whole)
        at = damaged
        for step in found[index][:-1]:
            at = at[step]
        at[found[index][-1]] = (None, "x", -1, [], {}, 10**400, 1e-320, 1e300)[index % 8]
        (tmp_path / "old.json").write_text(json.dumps(damaged))
        try:
            data = read_document(tmp_path / "old.json")
        except (CorruptFileError, InputError):
            continue
        compare_documents(whole, data)
        tables(data)
        page(data)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (("--variant", "txt_only"), 2, "did you mean 'text_only'"),
        (("--backend", "ortt"), 2, "did you mean 'ort'"),
        (("--threads", "0"), 2, "--threads is 0, expected 1 to 1024"),
        (("--batch", "0"), 2, "--batch is 0, expected 1 to"),
        (("--rounds", "-1"), 2, "--rounds"),
        (("--rounds", "0"), 2, "measures nothing without --cold"),
        (("--fail-slower", "5"), 2, "give --compare OLD.json"),
        (("--compare", "none.json"), 2, "none.json: no such file"),
        (("--golden", "--batch", "2"), 2, "--golden brings its own"),
        (("--precision", "fp16"), 2, "name several bundles"),
        (("--clip", "none.npz"), 2, "none.npz"),
        (("--against", "eager", "--checkpoint", "nowhere"), 2, "nowhere: no checkpoint there"),
        (("--show", "x.json"), 2, "--show measures nothing"),
        (("--backend", "ort-cuda"), 3, "ort-cuda"),
    ],
)
def test_bad_arguments_get_one_line_before_anything_is_measured(shared_bundle, arguments, code, line):
    done = run(main, shared_bundle, *arguments)
    assert (done.code, done.out, len(done.lines)) == (code, "", 1)
    assert line in done.lines[0]


def test_a_place_that_cannot_be_written_is_refused_before_measuring(shared_bundle, tmp_path):
    for option in ("--html", "--out"):
        done = run(main, shared_bundle, option, tmp_path)
        assert (done.code, len(done.lines)) == (2, 1)
        assert "is a folder" in done.err
    (tmp_path / "file").write_text("")
    assert run(main, shared_bundle, "--html", tmp_path / "file" / "x.html").code == 2
    with open_folder() as folder:
        folder.chmod(0o555)
        with without_privileges():
            done = run(main, "--show", folder / "none.json", "--html", folder / "x.html")
        assert done.code == 2
        assert "may not be written" in done.err


def test_no_bundle_or_a_damaged_one(tmp_path, bundle):
    assert "no such folder" in run(main, tmp_path / "none").err
    (bundle / "manifest.json").write_text("{")
    assert run(main, bundle).code == 5


def test_several_bundles_are_told_apart(shared_bundle, tmp_path):
    other = make_bundle(tmp_path / "bundle", ("text_only",))
    done = run(main, shared_bundle, other, "--variant", "text_only", "--format", "json", *QUICK)
    answer = json.loads(done.out)
    assert [r["bundle"] for r in answer["rows"]] == labels([str(shared_bundle), str(other)])
    assert len({r["bundle"] for r in answer["rows"]}) == 2
    assert labels(["a/b", "c/d"]) == ["b", "d"]
    assert labels(["a/b", "c/b"]) == ["a/b", "c/b"]
    assert "named twice" in run(main, shared_bundle, shared_bundle).err


def test_without_torch_the_rows_that_need_it_are_refused(shared_bundle, monkeypatch):
    import hcmen.runtime.benchmark.peers as peers

    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    done = run(main, shared_bundle, "--against", "eager", "--checkpoint", "none")
    assert (done.code, len(done.lines)) == (3, 1)
    assert "torch is not installed" in done.err


# Presses Ctrl-C once three turns are over, however long they take.
_CTRL_C = """
import os, signal
import hcmen.runtime.benchmark.measure as measure
from hcmen.runtime.benchmark.command import main
turn, turns = measure._turn, []
def counted(*arguments):
    turns.append(turn(*arguments))
    if len(turns) == 3:
        os.kill(os.getpid(), signal.SIGINT)
measure._turn = counted
main()
"""


def test_ctrl_c_keeps_what_was_measured(shared_bundle, tmp_path):
    out = tmp_path / "part.json"
    command = [sys.executable, "-c", _CTRL_C, str(shared_bundle), "--out", str(out), "--format", "json"]
    command += ["--threads", "1", "--rounds", "100000", "--warmup", "1", "--loads", "0", "--variant", "text_only"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    stdout, stderr = done.stdout, done.stderr
    assert done.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "error: interrupted"
    data = json.loads(stdout)
    assert data["complete"] is False
    assert data["rows"][0]["run"]["n"] > 0
    assert read_document(out) == json.loads(out.read_text()) == data


# --- the machine ----------------------------------------------------------------------------------------------------


def test_the_machine_is_described_and_doubted():
    found = machine.machine(("torch",))
    assert found["cpu"]
    assert found["memory_mib"] > 100
    assert 1 <= found["physical_cores"] <= found["logical_cores"]
    calm = {**found, "load_average_1min": 0.0, "governor": "performance", "quota_cores": None, "usable_cores": 4}
    calm |= {"on_battery": None, "hottest_celsius": None}
    assert machine.machine_warnings(calm, 4) == []
    for change, word in (
        ({"load_average_1min": 3.0}, "load average is 3"),
        ({"governor": "powersave"}, "'powersave'"),
        ({"quota_cores": 1.5}, "may use 1.5 cores"),
        ({"usable_cores": 2}, "this process may use 2 cores"),
        ({"on_battery": True}, "battery"),
        ({"hottest_celsius": 91.0}, "91 degrees"),
    ):
        lines = machine.machine_warnings({**calm, **change}, 4)
        assert len(lines) == 1
        assert word in lines[0]
    assert machine.same_machine(found, found) == ([], [])


def test_waiting_for_a_core_is_seen():
    if not machine.waited_ns():
        pytest.skip("this kernel keeps no accounts of its scheduler")
    cores = sorted(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, [{cores[0]}])\nwhile True: pass"
    # Two busy processes on one core: each waits about half of the time.
    pair = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    try:
        time.sleep(0.5)
        before = machine.waited_ns(pair[0].pid)
        time.sleep(1)
        after = machine.waited_ns(pair[0].pid)
    finally:
        for process in pair:
            process.kill()
            process.wait()
    assert sum(after.values()) - sum(before.values()) > 0.1e9


def test_the_cpu_time_of_others_is_what_we_did_not_take():
    start = machine.CpuTime(100.0, 40.0, 1.0, 5.0)
    end = dataclasses.replace(start, total=200.0, busy=120.0, stolen=3.0, own=65.0)
    assert end.since(start) == {"others_share": 0.2, "stolen_share": 0.02}
