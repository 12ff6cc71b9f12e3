"""`hcmen-compile --onnx`: the real builder of TensorRT-RTX takes anybody's graph; what it refuses."""

from __future__ import annotations

import json

import pytest
from helpers.command import run
from helpers.foreign_graph import CHANNEL, foreign_graph
from helpers.rtx import needs_rtx

from hcmen.base.errors import InputError
from hcmen.export.commands.compile import main
from hcmen.export.foreign_engine import parse_spans

SIZES = ("--size", "batch=1:2:4", "--size", "time=2:8:16")
RTX = ("--backend", "tensorrt-rtx", "--target", "89")


@needs_rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_engine_of_a_foreign_graph(tmp_path, precision):
    path, out = foreign_graph(tmp_path / "m.onnx"), tmp_path / "m.engine"
    words = ("--onnx", path, *SIZES, *RTX, "--precision", precision, "--out", out)
    done = run(main, *words, "--format", "json")
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    assert answer["bytes"] == out.stat().st_size > 10_000
    assert (answer["plugin"], answer["parity"], answer["capabilities"]) == ("function", {"measured": False}, [89])
    assert answer["profile"] == {
        "ids": [[1, 2], [2, 8], [4, 16]],
        "series": [[1, 2, CHANNEL], [2, 8, CHANNEL], [4, 16, CHANNEL]],
        "tail": [[1, 3, CHANNEL], [2, 3, CHANNEL], [4, 3, CHANNEL]],
    }
    again = run(main, *words)
    assert (again.code, "something is there already" in again.err) == (2, True)


@needs_rtx
def test_a_missing_or_unknown_size_is_refused(tmp_path):
    path, out = foreign_graph(tmp_path / "m.onnx"), tmp_path / "m.engine"
    done = run(main, "--onnx", path, "--size", "time=4", *RTX, "--out", out)
    assert (done.code, out.exists()) == (2, False)
    assert "open sizes without numbers: batch: say --size batch=LEAST:BEST:MOST" in done.err
    done = run(main, "--onnx", path, *SIZES, "--size", "tme=4", *RTX, "--out", out)
    assert (done.code, "unknown size 'tme'" in done.err) == (2, True)


def test_words_of_sizes():
    assert parse_spans(["time=16:64:512", "batch=3"]) == {"time": (16, 64, 512), "batch": (3, 3, 3)}
    for text in ("time", "time=0", "time=4:2:8", "time=2:4", "=4", "time=2:4:8:9", "time=2:9:8"):
        with pytest.raises(InputError, match="expected NAME=LEAST:BEST:MOST"):
            parse_spans([text])
    with pytest.raises(InputError, match="twice"):
        parse_spans(["time=1", "time=2"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--onnx", "m.onnx"), "--onnx without --out"),
        (("--onnx", "m.onnx", "--variant", "full"), "--variant is of bundles"),
        (("--onnx", "m.onnx", "--bundle", "b"), "--bundle is of bundles"),
        (("--onnx", "m.onnx", "--max-batch", "4"), "say --size batch=LEAST:BEST:MOST"),
        (("--size", "time=4"), "--size is of a foreign graph"),
        (("--out", "x"), "--out is of a foreign graph"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(words, message):
    done = run(main, *words)
    assert (done.code, len(done.lines), message in done.err) == (2, 1, True)
