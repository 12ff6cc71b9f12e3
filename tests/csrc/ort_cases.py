"""Malformed nodes and random shapes for the ONNX Runtime operators, run apart from the test process.

    python tests/csrc/ort_cases.py malformed --library libhcmen_ops.so     one JSON line for each case
    python tests/csrc/ort_cases.py fuzz --library libhcmen_ops.so --seed 0 --count 400
    python tests/csrc/ort_cases.py grid --library libhcmen_ops.so     what is small of the table of cases, all right

A crash ends this process and not the tests. No torch here, so that the same runs work under AddressSanitizer
(tests/csrc/ort_asan.sh) and in old environments.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.dual_cases import DUALS, assert_dual, dual_arrays, dual_model_of
from helpers.op_cases import (
    CONVS,
    SCANS,
    ConvCase,
    ScanCase,
    assert_conv,
    assert_scan,
    conv_arrays,
    model_of,
    scan_arrays,
)
from onnx import helper

from hcmen.mamba.one_node import one_node_model

Feeds = dict[str, np.ndarray]
BATCH, TIME, CHANNEL, STATE = 2, 5, 12, 4
HEAD, DIM = 6, 3


def scan_shapes(
    batch: int, time: int, channel: int, state: int, group: int | None, gated: int, stateful: int
) -> dict[str, tuple[int, ...]]:
    series = (batch, time, channel)
    projection = (batch, time, state) if group is None else (batch, time, group, state)
    shapes = {
        "u": series,
        "delta": series,
        "A": (channel, state),
        "B": projection,
        "C": projection,
        "D": (channel,),
        "delta_bias": (channel,),
    }
    if gated:
        shapes["z"] = series
    if stateful:
        shapes["initial_state"] = (batch, channel, state)
    return shapes


def conv_shapes() -> dict[str, tuple[int, ...]]:
    return {
        "x": (BATCH, TIME, CHANNEL),
        "weight": (CHANNEL, 4),
        "bias": (CHANNEL,),
        "initial_state": (BATCH, 3, CHANNEL),
    }


@dataclass(frozen=True)
class Case:
    """A node with something wrong, and what its error must say besides the name of the operator."""

    op_type: str
    says: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    attributes: dict[str, Any]
    edit: Callable[[onnx.NodeProto], None] | None = None

    def model(self) -> onnx.ModelProto:
        """Shapes are left unknown, or ONNX Runtime's own checks would answer before the kernel's."""
        inputs = {name: (self.dtypes.get(name, "float32"), None) for name in self.shapes}
        outputs = {"y": (inputs[next(iter(inputs))][0], None)}
        if self.attributes.get("stateful"):
            outputs["last_state"] = ("float32", None)
        model = one_node_model(self.op_type, inputs, outputs, self.attributes, functions=False)
        if self.edit is not None:
            self.edit(model.graph.node[0])
            kept = set(model.graph.node[0].input)
            outputs_kept = set(model.graph.node[0].output)
            for side, names in ((model.graph.input, kept), (model.graph.output, outputs_kept)):
                for i in reversed(range(len(side))):
                    if side[i].name not in names:
                        del side[i]
        return model

    def feeds(self) -> Feeds:
        names = {value.name for value in self.model().graph.input}
        kinds = {name: np.dtype(self.dtypes.get(name, "float32").replace("bfloat16", "uint16")) for name in self.shapes}
        return {name: np.ones(shape, kinds[name]) for name, shape in self.shapes.items() if name in names}


def scan(*says: str, edit: Any = None, dtypes: Any = None, gated: Any = 1, stateful: Any = 1, **changes: Any) -> Case:
    shapes = {
        **scan_shapes(BATCH, TIME, CHANNEL, STATE, None, 1, 1),
        **{k: v for k, v in changes.items() if isinstance(v, tuple)},
    }
    attributes = {"gated": gated, "stateful": stateful, "delta_softplus": 1, "reverse": 0}
    attributes.update({k: v for k, v in changes.items() if not isinstance(v, tuple)})
    if gated == 0:
        del shapes["z"]
    if stateful == 0:
        del shapes["initial_state"]
    return Case("SelectiveScan", says, shapes, dtypes or {}, attributes, edit)


def conv(*says: str, edit: Any = None, dtypes: Any = None, stateful: Any = 0, **changes: Any) -> Case:
    shapes = {**conv_shapes(), **{k: v for k, v in changes.items() if isinstance(v, tuple)}}
    attributes = {"activation": "silu", "reverse": 0, "stateful": stateful}
    attributes.update({k: v for k, v in changes.items() if not isinstance(v, tuple)})
    if stateful == 0:
        del shapes["initial_state"]
    return Case("CausalConv1d", says, shapes, dtypes or {}, attributes, edit)


def dual(*says: str, edit: Any = None, dtypes: Any = None, gated: Any = 1, stateful: Any = 1, **changes: Any) -> Case:
    series, projection = (BATCH, TIME, HEAD, DIM), (BATCH, TIME, 2, STATE)
    shapes: dict[str, tuple[int, ...]] = {
        "x": series,
        "dt": series[:3],
        "A": (HEAD,),
        "B": projection,
        "C": projection,
        "D": (HEAD,),
        "dt_bias": (HEAD,),
        "z": series,
        "initial_state": (BATCH, HEAD, DIM, STATE),
        **{k: v for k, v in changes.items() if isinstance(v, tuple)},
    }
    attributes = {"gated": gated, "stateful": stateful, "delta_softplus": 1, "reverse": 0}
    attributes.update({k: v for k, v in changes.items() if not isinstance(v, tuple)})
    for name, there in (("z", gated), ("initial_state", stateful)):
        if there == 0:
            del shapes[name]
    return Case("StateSpaceDual", says, shapes, dtypes or {}, attributes, edit)


def blank(index: int) -> Callable[[onnx.NodeProto], None]:
    def edit(node: onnx.NodeProto) -> None:
        node.input[index] = ""

    return edit


def drop(count: int) -> Callable[[onnx.NodeProto], None]:
    def edit(node: onnx.NodeProto) -> None:
        del node.input[-count:]

    return edit


def more(count: int) -> Callable[[onnx.NodeProto], None]:
    def edit(node: onnx.NodeProto) -> None:
        node.input.extend([node.input[0]] * count)

    return edit


def outputs(*names: str) -> Callable[[onnx.NodeProto], None]:
    def edit(node: onnx.NodeProto) -> None:
        del node.output[:]
        node.output.extend(names)

    return edit


def retype(name: str, value: Any) -> Callable[[onnx.NodeProto], None]:
    def edit(node: onnx.NodeProto) -> None:
        for i in reversed(range(len(node.attribute))):
            if node.attribute[i].name == name:
                del node.attribute[i]
        node.attribute.append(helper.make_attribute(name, value))

    return edit


MALFORMED: dict[str, Case] = {
    # ranks
    "u rank 2": scan("'u'", "[5, 12]", "[batch, time, channel]", u=(5, 12)),
    "u rank 4": scan("'u'", "[2, 5, 12, 1]", "[batch, time, channel]", u=(2, 5, 12, 1)),
    "u scalar": scan("'u'", "[]", "[batch, time, channel]", u=()),
    "delta rank 2": scan("'delta'", "[2, 5]", "[2, 5, 12]", delta=(2, 5)),
    "A rank 1": scan("'A'", "[12]", "[12, state]", A=(12,)),
    "A rank 3": scan("'A'", "[12, 4, 1]", "[12, state]", A=(12, 4, 1)),
    "B rank 2": scan("'B'", "[2, 4]", "[2, 5, 4]", "[2, 5, group, 4]", B=(2, 4)),
    "B rank 5": scan("'B'", "[2, 5, 1, 1, 4]", "[2, 5, 4]", B=(2, 5, 1, 1, 4)),
    "D rank 2": scan("'D'", "[12, 1]", "[12]", D=(12, 1)),
    "delta_bias scalar": scan("'delta_bias'", "[]", "[12]", delta_bias=()),
    "z rank 2": scan("'z'", "[5, 12]", "[2, 5, 12]", z=(5, 12)),
    "initial_state rank 2": scan("'initial_state'", "[12, 4]", "[2, 12, 4]", initial_state=(12, 4)),
    # sizes that disagree
    "delta time": scan("'delta'", "[2, 6, 12]", "[2, 5, 12]", delta=(2, 6, 12)),
    "delta batch": scan("'delta'", "[1, 5, 12]", "[2, 5, 12]", delta=(1, 5, 12)),
    "A channel": scan("'A'", "[11, 4]", "[12, state]", A=(11, 4)),
    "B state": scan("'B'", "[2, 5, 3]", "[2, 5, 4]", B=(2, 5, 3)),
    "B time": scan("'B'", "[2, 4, 4]", "[2, 5, 4]", B=(2, 4, 4)),
    "C state": scan("'C'", "[2, 5, 5]", "[2, 5, 4]", "'B'", C=(2, 5, 5)),
    "C rank": scan("'C'", "[2, 5, 1, 4]", "[2, 5, 4]", "'B'", C=(2, 5, 1, 4)),
    "C groups": scan("'C'", "[2, 5, 3, 4]", "[2, 5, 2, 4]", B=(2, 5, 2, 4), C=(2, 5, 3, 4)),
    "groups divide": scan("'B'", "5", "12 channels", B=(2, 5, 5, 4), C=(2, 5, 5, 4)),
    "groups exceed": scan("'B'", "24", "12 channels", B=(2, 5, 24, 4), C=(2, 5, 24, 4)),
    "D size": scan("'D'", "[13]", "[12]", D=(13,)),
    "delta_bias size": scan("'delta_bias'", "[1]", "[12]", delta_bias=(1,)),
    "z time": scan("'z'", "[2, 1, 12]", "[2, 5, 12]", z=(2, 1, 12)),
    "initial_state batch": scan("'initial_state'", "[1, 12, 4]", "[2, 12, 4]", initial_state=(1, 12, 4)),
    "initial_state swapped": scan("'initial_state'", "[2, 4, 12]", "[2, 12, 4]", initial_state=(2, 4, 12)),
    # sizes of zero
    "time zero": scan("'u'", "[2, 0, 12]", "at least 1", u=(2, 0, 12), delta=(2, 0, 12), z=(2, 0, 12)),
    "batch zero": scan("'u'", "[0, 5, 12]", "at least 1", u=(0, 5, 12), delta=(0, 5, 12)),
    "channel zero": scan("'u'", "[2, 5, 0]", "at least 1", u=(2, 5, 0), A=(0, 4)),
    "state zero": scan("'A'", "[12, 0]", "at least 1", A=(12, 0), B=(2, 5, 0), C=(2, 5, 0)),
    "group zero": scan("'B'", "[2, 5, 0, 4]", "at least 1", B=(2, 5, 0, 4), C=(2, 5, 0, 4)),
    # types
    "u float64": scan("'u'", "float64", "float32 or float16", dtypes={"u": "float64"}),
    "u int64": scan("'u'", "int64", "float32 or float16", dtypes={"u": "int64"}),
    "u bool": scan("'u'", "bool", "float32 or float16", dtypes={"u": "bool"}),
    "u bfloat16": scan("'u'", "bfloat16", "float32 or float16", dtypes={"u": "bfloat16"}),
    "u float16 alone": scan("'delta'", "float32", "float16", "'u'", dtypes={"u": "float16"}),
    "delta float16": scan("'delta'", "float16", "float32", "'u'", dtypes={"delta": "float16"}),
    "A float16": scan("'A'", "float16", "float32", dtypes={"A": "float16"}),
    "B int32": scan("'B'", "int32", "float32", dtypes={"B": "int32"}),
    "C float64": scan("'C'", "float64", "float32", dtypes={"C": "float64"}),
    "D int64": scan("'D'", "int64", "float32", dtypes={"D": "int64"}),
    "delta_bias float64": scan("'delta_bias'", "float64", "float32", dtypes={"delta_bias": "float64"}),
    "z float16": scan("'z'", "float16", "float32", "'u'", dtypes={"z": "float16"}),
    "initial_state float16": scan("'initial_state'", "float16", "float32", dtypes={"initial_state": "float16"}),
    # attributes
    "gated 2": scan("'gated'", "2", "0 or 1", gated=2),
    "reverse -1": scan("'reverse'", "-1", "0 or 1", reverse=-1),
    "stateful string": scan("'stateful'", "a string", "0 or 1", edit=retype("stateful", "1")),
    "delta_softplus float": scan("'delta_softplus'", "a float", "0 or 1", delta_softplus=1.0),
    "reverse list": scan("'reverse'", "a list of integers", "0 or 1", reverse=[1]),
    "gated floats": scan("'gated'", "a list of floats", "0 or 1", edit=retype("gated", [1.0])),
    # counts
    "six inputs": scan("6 inputs", "expected 7", "delta_bias", gated=0, stateful=0, edit=drop(1)),
    "one input": scan("1 inputs", "expected 7", "delta_bias", gated=0, stateful=0, edit=drop(6)),
    "z not announced": scan("8 inputs", "expected 7", gated=0, stateful=0, edit=more(1)),
    "z missing": scan("8 inputs", "expected 9", "initial_state", edit=drop(1)),
    "last_state missing": scan("1 outputs", "expected 2", "last_state", edit=outputs("y")),
    "last_state not announced": scan("2 outputs", "expected 1", stateful=0, edit=outputs("y", "extra")),
    "delta empty name": scan("'delta'", "absent", "expected", edit=blank(1)),
    "D empty name": scan("'D'", "absent", "expected", edit=blank(5)),
    "z empty name": scan("'z'", "absent", "expected", edit=blank(7)),
    "initial_state empty name": scan("'initial_state'", "absent", "expected", edit=blank(8)),
    "last_state empty name": scan("'last_state'", "left out", edit=outputs("y", "")),
    # ONNX Runtime itself says no to these, before the kernel is asked; that it does so in order is all that counts
    "ten inputs": scan(edit=more(1)),
    "three outputs": scan(edit=outputs("y", "last_state", "extra")),
    "u empty name": scan(edit=blank(0)),
    "y empty name": scan(edit=outputs("", "last_state")),
    # CausalConv1d
    "x rank 2": conv("'x'", "[5, 12]", "[batch, time, channel]", x=(5, 12)),
    "x time zero": conv("'x'", "[2, 0, 12]", "at least 1", x=(2, 0, 12)),
    "weight channel": conv("'weight'", "[11, 4]", "[12, width]", weight=(11, 4)),
    "weight rank 3": conv("'weight'", "[12, 1, 4]", "[12, width]", weight=(12, 1, 4)),
    "width zero": conv("'weight'", "[12, 0]", "at least 1", weight=(12, 0)),
    "bias size": conv("'bias'", "[4]", "[12]", bias=(4,)),
    "x int32": conv("'x'", "int32", "float32 or float16", dtypes={"x": "int32"}),
    "weight float16": conv("'weight'", "float16", "float32", dtypes={"weight": "float16"}),
    "bias float64": conv("'bias'", "float64", "float32", dtypes={"bias": "float64"}),
    "activation relu": conv("'activation'", '"relu"', '"none" or "silu"', activation="relu"),
    "activation strange": conv("'activation'", '"a?b', '"none" or "silu"', activation="a\nb" + "x" * 100),
    "activation number": conv("'activation'", "an integer", '"none" or "silu"', activation=1),
    "conv reverse 3": conv("'reverse'", "3", "0 or 1", reverse=3),
    "bias missing": conv("2 inputs", "expected 3", "bias", edit=drop(1)),
    "bias empty name": conv("'bias'", "absent", "expected", edit=blank(2)),
    "conv four inputs": conv("4 inputs", "expected 3 with stateful = 0", edit=more(1)),
    "conv state missing": conv("3 inputs", "expected 4", "initial_state", stateful=1, edit=drop(1)),
    "conv state empty name": conv("'initial_state'", "absent", stateful=1, edit=blank(3)),
    "conv state rank 2": conv("'initial_state'", "[3, 12]", "[2, 3, 12]", stateful=1, initial_state=(3, 12)),
    "conv state batch": conv("'initial_state'", "[1, 3, 12]", "[2, 3, 12]", stateful=1, initial_state=(1, 3, 12)),
    "conv state of the width": conv(
        "'initial_state'", "[2, 3, 12] = [batch, width - 1, channel]", stateful=1, initial_state=(2, 4, 12)
    ),
    "conv state swapped": conv("'initial_state'", "[2, 12, 3]", "[2, 3, 12]", stateful=1, initial_state=(2, 12, 3)),
    "conv state of width 1": conv(
        "'initial_state'", "[2, 0, 12]", "at least 1", stateful=1, weight=(12, 1), initial_state=(2, 0, 12)
    ),
    "conv state beside width 1": conv(
        "'initial_state'", "[2, 0, 12]", "at least 1", stateful=1, weight=(12, 1), initial_state=(2, 1, 12)
    ),
    "conv state float16": conv(
        "'initial_state'", "float16", "float32", stateful=1, dtypes={"x": "float16", "initial_state": "float16"}
    ),
    "conv stateful 2": conv("'stateful'", "2", "0 or 1", stateful=2),
    "conv stateful string": conv("'stateful'", "a string", "0 or 1", stateful=1, edit=retype("stateful", "1")),
    "conv last_state missing": conv("1 outputs", "expected 2", "last_state", stateful=1, edit=outputs("y")),
    "conv last_state not announced": conv("2 outputs", "expected 1", edit=outputs("y", "extra")),
    "conv last_state empty name": conv("'last_state'", "left out", stateful=1, edit=outputs("y", "")),
    "conv five inputs": conv(stateful=1, edit=more(1)),
    # StateSpaceDual
    "dual x rank 3": dual("'x'", "[2, 5, 18]", "[batch, time, head, head_dim]", x=(2, 5, 18)),
    "dual x time zero": dual("'x'", "[2, 0, 6, 3]", "at least 1", x=(2, 0, 6, 3)),
    "dt rank 4": dual("'dt'", "[2, 5, 6, 3]", "[2, 5, 6]", "[batch, time, head]", dt=(2, 5, 6, 3)),
    "dual A rank 2": dual("'A'", "[6, 4]", "[6]", A=(6, 4)),
    "dual B time": dual("'B'", "[2, 4, 2, 4]", "[2, 5, group, state]", B=(2, 4, 2, 4)),
    "dual C groups": dual("'C'", "[2, 5, 3, 4]", "[2, 5, 2, 4]", "'B'", C=(2, 5, 3, 4)),
    "dual groups divide": dual("'B'", "4 groups", "6 heads", B=(2, 5, 4, 4), C=(2, 5, 4, 4)),
    "dual D rank 3": dual("'D'", "[6, 3, 1]", "[6] = [head] or [6, 3] = [head, head_dim]", D=(6, 3, 1)),
    "dual D wide": dual("'D'", "[6, 4]", "[6] = [head] or [6, 3] = [head, head_dim]", D=(6, 4)),
    "dual D size": dual("'D'", "[3]", "[6] = [head] or [6, 3] = [head, head_dim]", D=(3,)),
    "dual z rank": dual("'z'", "[2, 5, 18]", "[2, 5, 6, 3]", z=(2, 5, 18)),
    "dual state swapped": dual("'initial_state'", "[2, 6, 4, 3]", "[2, 6, 3, 4]", initial_state=(2, 6, 4, 3)),
    "dual x bfloat16": dual("'x'", "bfloat16", "float32 or float16", dtypes={"x": "bfloat16"}),
    "dual dt float16": dual("'dt'", "float16", "float32", "'x'", dtypes={"dt": "float16"}),
    "dual A float16": dual("'A'", "float16", "float32", dtypes={"A": "float16"}),
    "dt_min integer": dual("'dt_min'", "an integer", "a float that is a number", edit=retype("dt_min", 1)),
    "dt_min string": dual("'dt_min'", "a string", "a float", edit=retype("dt_min", "0")),
    "dt_max list": dual("'dt_max'", "a list of floats", "a float", edit=retype("dt_max", [1.0])),
    "dt_max NaN": dual("'dt_max'", "NaN", "a float that is a number", dt_max=float("nan")),
    "dt limits": dual("'dt_min' and 'dt_max' are 1 and 0.5", "no more than dt_max", dt_min=1.0, dt_max=0.5),
    "dual softplus float": dual("'delta_softplus'", "a float", "0 or 1", delta_softplus=1.0),
    "dual z missing": dual("8 inputs", "expected 9", "initial_state", edit=drop(1)),
    "dual last_state missing": dual("1 outputs", "expected 2", "last_state", edit=outputs("y")),
    "dual D empty name": dual("'D'", "absent", "expected", edit=blank(5)),
}


def session(model: onnx.ModelProto, library: Path, threads: int = 2) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = False  # outputs straight from malloc, where AddressSanitizer sees their ends
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def answer(case: Case, library: Path) -> tuple[str, str]:
    """("load" or "run", the error), or ("none", "") if nothing was wrong with it."""
    stage = "load"
    try:
        made = session(case.model(), library)
        stage = "run"
        made.run(None, case.feeds())
    except Exception as error:  # whatever class ONNX Runtime's binding chose
        return stage, f"{type(error).__module__}.{type(error).__name__}: {error}"
    return "none", ""


# --- random shapes ----------------------------------------------------------------------------------------------------


def fuzz(library: Path, seed: int, count: int) -> dict[str, int]:
    """Random, mostly disagreeing, sizes. Each node must either fail with an error or give the right numbers."""
    rng = np.random.default_rng(seed)
    outcome = {"errors": 0, "right": 0}
    sessions: dict[tuple[Any, ...], ort.InferenceSession] = {}
    for _ in range(count):
        gated, stateful, softplus, reverse = (int(x) for x in rng.integers(0, 2, 4))
        half = rng.random() < 0.3
        dtype = "float16" if half else "float32"
        shared = dict.fromkeys(("u", "delta", "B", "C", "z"), dtype)
        base = Case("SelectiveScan", (), _random_shapes(rng, gated, stateful), shared, {
            "gated": gated, "stateful": stateful, "delta_softplus": softplus, "reverse": reverse,
        })  # fmt: skip
        key = (gated, stateful, softplus, reverse, half)
        if key not in sessions:
            sessions[key] = session(base.model(), library)
        feeds = _random_feeds(rng, base, softplus)
        try:
            got = sessions[key].run(None, feeds)
        except Exception as error:
            if "SelectiveScan: input '" not in str(error):
                raise
            outcome["errors"] += 1
            continue
        assert_scan(ScanCase(reverse=bool(reverse), softplus=bool(softplus)), feeds, got)
        outcome["right"] += 1
    return outcome


def grid(library: Path) -> dict[str, int]:
    """Every case of the table (helpers/op_cases.py) that is not long or wide must give the right numbers."""
    right = 0
    for case in DUALS:
        if case.time * case.channel <= 10_000:
            arrays = dual_arrays(case)
            assert_dual(case, arrays, session(dual_model_of(case), library, 1 + right % 2).run(None, arrays))
            right += 1
    for case in (*SCANS, *CONVS):
        if case.time * case.channel > 10_000:
            continue
        arrays = conv_arrays(case) if isinstance(case, ConvCase) else scan_arrays(case)
        got = session(model_of(case), library, 1 + right % 2).run(None, arrays)
        assert_conv(case, arrays, got) if isinstance(case, ConvCase) else assert_scan(case, arrays, got)
        right += 1
    return {"right": right}


def _random_feeds(rng: np.random.Generator, case: Case, softplus: int) -> Feeds:
    feeds = {
        name: np.asarray(rng.normal(size=shape), case.dtypes.get(name, "float32"))
        for name, shape in case.shapes.items()
    }
    feeds["A"] = np.asarray(-np.abs(feeds["A"]))
    if not softplus:
        feeds.update({name: np.asarray(np.abs(feeds[name])) for name in ("delta", "delta_bias")})
    return feeds


def _random_shapes(rng: np.random.Generator, gated: int, stateful: int) -> dict[str, tuple[int, ...]]:
    batch, time = int(rng.integers(1, 4)), int(rng.integers(1, 12))
    channel, state = int(rng.choice([1, 2, 6, 15, 16, 17, 33])), int(rng.choice([1, 3, 4, 12, 16, 17]))
    group = None
    if rng.random() < 0.4:
        group = int(rng.choice([g for g in range(1, channel + 1) if channel % g == 0]))
    shapes = scan_shapes(batch, time, channel, state, group, gated, stateful)
    for name, shape in shapes.items():
        kind = rng.random()
        if kind < 0.05 and shape:
            axis = int(rng.integers(len(shape)))
            shapes[name] = (*shape[:axis], int(rng.integers(0, 40)), *shape[axis + 1 :])
        elif kind < 0.07:
            shapes[name] = tuple(int(x) for x in rng.integers(0, 6, int(rng.integers(0, 7))))
    return shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("malformed", "fuzz", "grid"))
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=400)
    arguments = parser.parse_args()
    if arguments.what == "fuzz":
        print(json.dumps(fuzz(arguments.library, arguments.seed, arguments.count)), flush=True)
        return
    if arguments.what == "grid":
        print(json.dumps(grid(arguments.library)), flush=True)
        return
    for name, case in MALFORMED.items():
        stage, error = answer(case, arguments.library)
        print(json.dumps({"case": name, "stage": stage, "error": error}), flush=True)


if __name__ == "__main__":
    main()
