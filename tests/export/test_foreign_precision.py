"""`hcmen-export --onnx --precision`: anybody's graph in float16 and int8, its functions and states kept, and judged."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from helpers.command import run
from helpers.foreign_graph import CHANNEL, WORDS, foreign_graph

from hcmen.base.state_records import STATES_KEY
from hcmen.export.commands.export import main
from hcmen.runtime.mamba import Stepper

TIME = ("--size", "time=9")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return foreign_graph(tmp_path_factory.mktemp("foreign") / "model.onnx")


def outputs(file, feed, library=True):
    """What a file gives, its states zero."""
    stepper = Stepper(file, library=library, threads=1)
    stepper.reset(len(feed["ids"]))
    return stepper.feed(**feed)["logits"]


@pytest.mark.parametrize(("precision", "bound"), [("fp16", 2e-3), ("int8", 0.1)])
def test_a_reduced_file_is_smaller_near_and_whole(path, tmp_path, precision, bound):
    out = tmp_path / "reduced.onnx"
    done = run(main, "--onnx", path, "--precision", precision, *TIME, "--out", out, "--format", "json")
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    made, before = onnx.load(out), onnx.load(path)
    assert answer["bytes_before"] == path.stat().st_size
    assert answer["bytes_after"] == out.stat().st_size < path.stat().st_size
    assert [(f.domain, f.name) for f in made.functions] == [(f.domain, f.name) for f in before.functions]
    assert {p.key: p.value for p in made.metadata_props}[STATES_KEY] == before.metadata_props[0].value
    assert [i.name for i in made.graph.input] == ["ids", "series", "tail"]
    assert answer["int8_weights"] == (["mix"] if precision == "int8" else [])
    assert sorted(answer["outputs"]) == ["logits", "tail.next"]
    # The same by another road, on other inputs.
    rng = np.random.default_rng(11)
    feed = {
        "ids": rng.integers(WORDS, size=(2, 30)).astype(np.int32),
        "series": rng.standard_normal((2, 30, CHANNEL)).astype(np.float32),
    }
    for library in (True, False):
        expected, got = outputs(path, feed, library), outputs(out, feed, library)
        apart = np.abs(got - expected).max() / np.abs(expected).max()
        assert 0 < apart < bound
        told = answer["outputs"]["logits"]["library" if library else "functions"]
        assert 0 < told < bound


def test_int8_takes_its_ranges_from_the_arrays_given(path, tmp_path):
    rng = np.random.default_rng(1)
    feed = {
        "ids": rng.integers(WORDS, size=(2, 12)).astype(np.int32),
        "series": (50 * rng.standard_normal((2, 12, CHANNEL))).astype(np.float32),
    }
    np.savez(tmp_path / "c.npz", **feed)
    told = {}
    for name, words in (("random", TIME), ("given", ("--calibrate", tmp_path / "c.npz"))):
        out = tmp_path / f"{name}.onnx"
        done = run(main, "--onnx", path, "--precision", "int8", *words, "--out", out, "--format", "json")
        assert done.code == 0, done.err
        expected = outputs(path, feed)
        told[name] = np.abs(outputs(out, feed) - expected).max() / np.abs(expected).max()
    assert json.loads(done.out)["outputs"]["logits"]["library"] == pytest.approx(told["given"], rel=1e-3)
    assert told["given"] < 0.1 < 0.3 < told["random"]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_beyond_the_bound_there_is_no_file(path, tmp_path, precision):
    out = tmp_path / "reduced.onnx"
    done = run(main, "--onnx", path, "--precision", precision, *TIME, "--out", out, "--tolerance", "1e-7")
    assert (done.code, out.exists(), len(done.lines)) == (1, False, 1)
    assert "output 'logits' moves by" in done.err
    assert "expected at most 1e-07: nothing was written" in done.err


def test_a_weight_beyond_float16_is_refused(tmp_path):
    wide = foreign_graph(tmp_path / "wide.onnx")
    model = onnx.load(wide)
    for tensor in model.graph.initializer:
        if tensor.name == "mix":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.float32(1e7) * onnx.numpy_helper.to_array(tensor), "mix"))
    wide.write_bytes(model.SerializeToString())
    done = run(main, "--onnx", wide, "--precision", "fp16", *TIME, "--out", tmp_path / "p.onnx")
    assert (done.code, (tmp_path / "p.onnx").exists()) == (2, False)
    assert "weight 'mix' holds" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--precision", "fp16"), "--onnx without --out"),
        (("--out", "new.onnx"), "--onnx without --precision, expected fp16 or int8"),
        (("--precision", "fp16", "--out", "new.onnx"), "open sizes without a number: time"),
        (("--precision", "fp16", "--out", "there.onnx", *TIME), "there.onnx: something is there already"),
        (("--precision", "fp16", "--out", "new.onnx", "--variant", "full"), "--variant is of bundles"),
        (("--precision", "fp16", "--out", "new.onnx", "--data", "d"), "--data is of bundles"),
        (("--precision", "int8", "--out", "new.onnx", "--calibrate", "c.npz", *TIME), "brings its own inputs"),
        (("--precision", "int8", "--out", "new.onnx", "--calibrate", "c.npz"), "input 'series' is missing"),
        (("--precision", "int8", "--out", "new.onnx", "--calibrate", "d.npz"), "input 'ids' is int64 [1, 2]"),
        (("--precision", "int8", "--out", "new.onnx", "--calibrate", "e.npz"), "no .npz file of plain arrays"),
        (("--precision", "int8", "--out", "new.onnx", "--calibrate", "f.npz"), "unknown input 'x'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(path, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.onnx").touch()
    np.savez("c.npz", ids=np.zeros((1, 2), np.int32))
    np.savez("d.npz", ids=np.zeros((1, 2), np.int64))
    (tmp_path / "e.npz").write_bytes(b"nothing")
    np.savez("f.npz", x=np.zeros(1))
    done = run(main, "--onnx", path, *words)
    assert (done.code, len(done.lines)) == (5 if "e.npz" in words else 2, 1)
    assert message in done.err
    assert not (tmp_path / "new.onnx").exists()


def test_options_of_foreign_graphs_need_one():
    done = run(main, *TIME)
    assert (done.code, "--size is of a foreign graph: name it by --onnx" in done.err) == (2, True)
