"""`hcmen-bench --onnx`: anybody's graph on random inputs, the library held to the functions before either is timed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.command import run
from helpers.processes import loaded_after

from hcmen.base.errors import CheckFailed, InputError
from hcmen.runtime.backends.options import Ort
from hcmen.runtime.backends.ort import OrtBackend
from hcmen.runtime.benchmark.command import main
from hcmen.runtime.foreign import ForeignGraph, apart, parse_ranges, parse_sizes

pytest.importorskip("onnx", reason="the graphs are made with onnx")
from helpers.foreign_graph import CHANNEL, WORDS, foreign_graph

QUICK = ("--rounds", "3", "--calls", "2", "--warmup", "1", "--loads", "1", "--threads", "1")
TIME = ("--size", "time=5")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return foreign_graph(tmp_path_factory.mktemp("foreign") / "model.onnx")


def test_both_ways_are_compared_timed_written_and_compared_with_later(path, tmp_path):
    out, html = tmp_path / "r.json", tmp_path / "r.html"
    words = ("--onnx", path, "--size", "batch=2", *TIME, "--against", "functions", *QUICK)
    done = run(main, *words, "--out", out, "--html", html)
    assert done.code == 0, done.err
    data = json.loads(out.read_text())
    assert [(r["engine"], r["status"], r["batch"]) for r in data["rows"]] == [("ort", "ok", 2), ("functions", "ok", 2)]
    for row in data["rows"]:
        assert row["work"]["shapes"] == [{"ids": [2, 5], "series": [2, 5, CHANNEL], "tail": [2, 3, CHANNEL]}]
        assert row["work"]["what"] == "random inputs, time 5"
        assert sorted(row["checks"]) == ["output logits", "output tail.next"]
        assert row["run"]["n"] == 6
        assert row["ratio"]["to"] == data["rows"][0]["name"]
        assert (len(row["load_ms"]), row["call"]) == (1, None)
    assert "graph model.onnx" in html.read_text()
    again = run(main, *words, "--compare", out, "--format", "json")
    assert again.code == 0, again.err
    assert len(json.loads(again.out)["comparison"]["verdicts"]) == 2
    assert run(main, "--show", out).code == 0


def test_two_files_are_measured_side_by_side(path, tmp_path):
    other = foreign_graph(tmp_path / "other.onnx", scale=0.5)
    done = run(main, "--onnx", path, "--onnx", other, *TIME, *QUICK, "--format", "json")
    rows = json.loads(done.out)["rows"]
    assert [(r["bundle"], r["engine"], r["batch"]) for r in rows] == [
        ("model.onnx", "ort", 1),
        ("other.onnx", "ort", 1),
    ]
    assert rows[1]["ratio"]["to"] == rows[0]["name"]


def test_a_graph_whose_functions_differ_is_not_timed(tmp_path):
    wrong = foreign_graph(tmp_path / "wrong.onnx", wrong=1.001)
    words = ("--onnx", wrong, *TIME, "--against", "functions", *QUICK, "--format", "json")
    done = run(main, *words)
    rows = json.loads(done.out)["rows"]
    assert done.code == 1
    assert [r["status"] for r in rows] == ["wrong", "wrong"]
    assert all(r["run"] is None for r in rows)
    assert "output logits differs from the functions: FAILED" in rows[0]["reason"]
    assert "output logits differs from the library: FAILED" in rows[1]["reason"]
    assert run(main, *words, "--tolerance", "0.01").code == 0


def test_a_graph_without_our_operators_has_no_functions(tmp_path):
    plain = foreign_graph(tmp_path / "plain.onnx", plain=True)
    assert run(main, "--onnx", plain, *TIME, *QUICK).code == 0
    done = run(main, "--onnx", plain, *TIME, *QUICK, "--against", "functions", "--format", "json")
    rows = json.loads(done.out)["rows"]
    assert (done.code, [r["status"] for r in rows]) == (2, ["ok", "failed"])
    assert "calls no operator of hcmen's" in rows[1]["reason"]


def test_inputs_are_of_the_graphs_own_types_ranges_and_states(path):
    graph = ForeignGraph(str(path))
    graph.session(OrtBackend(Ort(threads=1)))
    assert graph.open_sizes == ["batch", "time"]
    assert graph.tables == {"ids": WORDS}
    feed = graph.random(graph.sized({"time": 200}), {}, seed=0)
    assert {name: (x.dtype.name, x.shape) for name, x in feed.items()} == {
        "ids": ("int32", (1, 200)),
        "series": ("float32", (1, 200, CHANNEL)),
        "tail": ("float32", (1, 3, CHANNEL)),
    }
    assert set(np.unique(feed["ids"])) == set(range(WORDS))
    assert not feed["tail"].any()
    narrow = graph.random(graph.sized({"time": 200}), {"ids": (2, 3)}, seed=0)
    assert set(np.unique(narrow["ids"])) == {2, 3}
    assert (
        graph.random({"batch": 1, "time": 9}, {}, 0)["series"] != graph.random({"batch": 1, "time": 9}, {}, 1)["series"]
    ).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "open sizes without a number: time: say --size time=N"),
        (("--size", "tme=5"), "unknown size 'tme'"),
        (("--size", "time=0"), "--size is 'time=0', expected NAME=N with N from 1"),
        (("--size", "5"), "--size is '5', expected NAME=N, such as time=256"),
        ((*TIME, *TIME), "--size tells twice of 'time'"),
        ((*TIME, "--range", "ids=9"), "--range is 'ids=9', expected INPUT=LEAST..GREATEST"),
        ((*TIME, "--range", "x=0..9"), "unknown input 'x'"),
        ((*TIME, "--range", "series=0..9"), "--range is given for 'series', expected whole numbers, not float32"),
        ((*TIME, "--range", f"ids=0..{1 << 40}"), "expected one within int32"),
        (("--size", "time=2000000000"), "numbers, expected at most"),
        ((*TIME, "--variant", "full"), "--variant is of bundles, and --onnx names a file of its own: leave it out"),
        ((*TIME, "--clip", "c.npz"), "--clip is of bundles"),
        ((*TIME, "--golden"), "--golden is of bundles"),
        ((*TIME, "--cold"), "--cold is of bundles"),
        ((*TIME, "--checkpoint", "c"), "--checkpoint is of bundles"),
        ((*TIME, "--against", "eager"), "--against eager is of bundles"),
        ((*TIME, "--backend", "ort"), "--backend is of bundles"),
        ((*TIME, "--batch", "2"), "--batch is of bundles"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(path, words, message):
    done = run(main, "--onnx", path, *words, *QUICK)
    assert (done.code, len(done.lines)) == (2, 1)
    assert message in done.err


def test_options_of_foreign_graphs_need_one(path, tmp_path):
    for words in (TIME, ("--range", "ids=0..1"), ("--tolerance", "1e-3")):
        done = run(main, *words)
        assert (done.code, f"{words[0]} is of a foreign graph: name it with --onnx" in done.err) == (2, True)
    assert run(main, "--onnx", tmp_path / "absent.onnx", *TIME).code == 2
    (tmp_path / "bad.onnx").write_bytes(path.read_bytes()[:-50])
    assert run(main, "--onnx", tmp_path / "bad.onnx", *TIME).code == 5


def test_apart_is_by_the_largest_number_of_each_output():
    expected = {"y": np.array([100.0, 1.0]), "none": np.zeros((0, 2))}
    found = apart([{"y": np.array([100.0, 1.0009]), "none": np.zeros((0, 2))}], [expected], 1e-5)
    assert {name: c.passed for name, c in found.items()} == {"y": True}
    assert not apart([{"y": np.array([100.0, 1.0011])}], [{"y": expected["y"]}], 1e-5)["y"].passed
    assert not apart([{"y": np.array([np.nan])}], [{"y": np.array([np.nan])}], 1e-5)["y"].passed
    with pytest.raises(CheckFailed, match="shape"):
        apart([{"y": np.zeros((2, 1))}], [{"y": np.zeros((1, 2))}], 1e-5)


def test_words_of_sizes_and_ranges():
    assert parse_sizes(["a=b=3", "time=7"]) == {"a=b": 3, "time": 7}
    assert parse_ranges(["ids=-2..5"]) == {"ids": (-2, 5)}
    for text in ("ids=5..2", "ids=..2", "ids=1..2..3"):
        with pytest.raises(InputError):
            parse_ranges([text])


def test_measuring_a_foreign_graph_never_imports_torch(path):
    loaded = loaded_after(
        "from hcmen.runtime.benchmark.command import main; main()", "--onnx", str(path), *TIME, "--rounds", "2"
    )
    assert "onnxruntime" in loaded
    assert loaded.isdisjoint({"torch", "onnx"})
