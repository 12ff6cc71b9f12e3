"""Rewrites of exported graphs: the numbers of the graph, other sizes included, and what is gone from it."""

from __future__ import annotations

import warnings
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxscript import ir

from hcmen.base.op import OPERATORS
from hcmen.mamba import graph_rewrites, one_node
from hcmen.mamba.graph_axes import blocks_of
from hcmen.mamba.graph_directions import count_flips
from hcmen.mamba.graph_edit import Editor, sweep
from hcmen.mamba.graph_moves import cancel_moves
from hcmen.mamba.graph_rewrites import rewrite_graph
from tests.helpers.mamba_forks import ChannelsFirstMixer, CrossScan, scan_channels_first

Dim = torch.export.Dim


def export(module, x, dynamic):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            (x,),
            dynamo=True,
            opset_version=19,
            dynamic_shapes=({axis: Dim(name) for axis, name in dynamic.items()},),
            input_names=["x"],
            output_names=["y"],
            verbose=False,
        )
    return program.model_proto


def kinds(model):
    return Counter(node.op_type for node in model.graph.node)


def agree(module, model, *inputs):
    for x in inputs:
        with torch.no_grad():
            expected = module(x).numpy()
        (found,) = graph_rewrites._run(model, {"x": x.numpy()})
        np.testing.assert_allclose(found, expected, atol=3e-6 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize(("directions", "scans"), [("v1", 2), ("v2", 2)])
def test_a_fork_loses_its_transposes_and_flips(directions, scans):
    torch.manual_seed(0)
    module = ChannelsFirstMixer(directions=directions, bias=True)
    model = export(module, torch.randn(2, 7, 12), {0: "batch", 1: "time"})
    rewritten, report = rewrite_graph(model, {"x": np.random.default_rng(0).normal(size=(2, 7, 12)).astype(np.float32)})
    assert all(one.kept for one in report), report
    assert kinds(model)["Transpose"] >= 8
    left = kinds(rewritten)
    assert left["SelectiveScan"] == scans
    assert not {"Transpose", "Slice", "Reshape", "Concat"} & set(left)
    ways = [one.i for node in rewritten.graph.node for one in node.attribute if one.name == "reverse"]
    assert sum(ways) == {"v1": 1, "v2": 2}[directions]
    agree(module, rewritten, *(torch.randn(b, t, 12) for b, t in ((2, 7), (1, 1), (3, 20))))


@pytest.mark.parametrize(("copies", "products"), [("slices", "einsum"), ("stack", "conv")])
def test_a_scan_of_pictures(copies, products):
    torch.manual_seed(0)
    module = CrossScan(copies=copies, products=products)
    model = export(module, torch.randn(2, 6, 4, 5), {0: "batch", 2: "height", 3: "width"})
    rewritten, report = rewrite_graph(model, {"x": np.ones((2, 6, 4, 5), np.float32)})
    assert all(one.kept for one in report), report
    left = kinds(rewritten)
    assert not {"ScatterElements", "ScatterND", "Einsum", "Expand", "Range", "ConstantOfShape"} & set(left)
    assert copies == "stack" or sum(left.values()) < sum(kinds(model).values())
    assert "Slice" not in left
    assert ways_of(rewritten) == [0, 1]
    agree(module, rewritten, *(torch.randn(b, 6, h, w) for b, h, w in ((2, 4, 5), (1, 3, 2), (2, 7, 7))))


class Directions(torch.nn.Module):
    """A scan of x [b, 3, t] in as many groups as there are ways, 1 for a flipped one; y is flipped back and summed up.

    read: how the groups of y are taken: one by one, from the end, as a range, or all together and not flipped back.
    """

    def __init__(self, ways, read="one by one", gated=False):
        super().__init__()
        self.ways, self.read, self.gated, k = ways, read, gated, len(ways)
        self.delta, self.B, self.C = (torch.nn.Parameter(torch.randn(k, rows, 3)) for rows in (3, 2, 2))
        self.A, self.D, self.bias = (torch.nn.Parameter(torch.randn(3 * k, *more)) for more in ((2,), (), ()))

    def forward(self, x):
        k, (b, d, t) = len(self.ways), x.shape
        xs = torch.stack([((i + 1) * x).flip([-1]) if way else (i + 1) * x for i, way in enumerate(self.ways)], dim=1)
        z = xs.tanh().reshape(b, k * d, t) if self.gated else None
        u, delta = (v.reshape(b, k * d, t) for v in (xs, self.delta @ xs))
        pair = (self.B @ xs, (self.C @ xs).tanh() + 1)
        y = scan_channels_first(u, delta, -self.A.exp(), *pair, self.D, z, self.bias, True).view(b, k, d, t)
        if self.read == "all":
            return (y * torch.arange(1.0, k + 1)[:, None, None]).sum(1)
        if self.read == "range":
            return y[:, : k // 2].sum(1) - y[:, k // 2 :].flip([-1]).mean(1)
        ones = [y[:, i - k if self.read == "from the end" else i] for i in range(k)]
        return sum(
            (i + 2) * (one.flip([-1]) if way else one) for i, (way, one) in enumerate(zip(self.ways, ones, strict=True))
        )


def ways_of(model):
    return sorted(one.i for node in model.graph.node for one in node.attribute if one.name == "reverse")


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("read", ["one by one", "from the end"])
@pytest.mark.parametrize("ways", ["01", "10", "0011", "0101", "1001", "001", "010", "10110"])
def test_directions_side_by_side_become_scans_of_their_own(ways, read, gated):
    torch.manual_seed(0)
    module = Directions([int(way) for way in ways], read, gated)
    model = export(module, torch.randn(2, 3, 7), {0: "batch", 2: "time"})
    rewritten, report = rewrite_graph(model, {"x": np.random.default_rng(0).normal(size=(2, 3, 7)).astype(np.float32)})
    assert [one.kept for one in report if one.name == "directions apart"] == [True]
    assert ways_of(model) == [0]
    assert ways_of(rewritten) == [0, 1]
    assert count_flips(ir.from_proto(rewritten).graph) == 0
    assert kinds(model)["Slice"] >= 2
    assert "Slice" not in kinds(rewritten)
    agree(module, rewritten, *(torch.randn(b, 3, t) for b, t in ((2, 7), (1, 1), (3, 20))))


def test_groups_that_are_read_as_a_range_come_from_the_scan_that_made_them():
    torch.manual_seed(0)
    module = Directions([0, 0, 1, 1], "range")
    model = export(module, torch.randn(2, 3, 7), {0: "batch", 2: "time"})
    rewritten, _ = rewrite_graph(model, {"x": np.ones((2, 3, 7), np.float32)})
    assert ways_of(rewritten) == [0, 1]
    assert "Slice" not in kinds(rewritten)
    agree(module, rewritten, torch.randn(2, 3, 7), torch.randn(1, 3, 4))


@pytest.mark.parametrize(("ways", "read"), [("01", "all"), ("000", "one by one"), ("11", "one by one")])
def test_directions_stay_together_where_no_flip_would_be_gone(ways, read):
    torch.manual_seed(0)
    module = Directions([int(way) for way in ways], read)
    model = export(module, torch.randn(2, 3, 7), {0: "batch", 2: "time"})
    rewritten, report = rewrite_graph(model, {"x": np.ones((2, 3, 7), np.float32)})
    assert not [one for one in report if one.kept and one.name == "directions apart"]
    assert len(ways_of(rewritten)) == 1
    assert count_flips(ir.from_proto(rewritten).graph) <= count_flips(ir.from_proto(model).graph)
    agree(module, rewritten, torch.randn(2, 3, 7), torch.randn(1, 3, 4))


def test_slices_that_leave_a_gap_or_are_written_twice_and_read_between():
    class Written(torch.nn.Module):
        def forward(self, x):
            gap = x.new_zeros(x.shape[0], 3, x.shape[1])
            gap[:, 0] = x
            gap[:, 2] = 2 * x
            y = x.new_empty(x.shape[0], 4, x.shape[1])
            y[:, 0] = x
            y[:, 1:3] = torch.stack([x + 1, x + 2], 1)
            between = y[:, 0:3].sum(1)
            y[:, 0] = 5 * x
            y[:, 3:] = between[:, None]
            return torch.cat([y, gap], 1)

    model = export(Written(), torch.randn(2, 5), {0: "batch", 1: "time"})
    rewritten, report = rewrite_graph(model, {"x": np.ones((2, 5), np.float32)})
    assert all(one.kept for one in report), report
    left = kinds(rewritten)
    assert left["ScatterElements"] == 2, "what leaves a gap stays"
    agree(Written(), rewritten, torch.randn(2, 5), torch.randn(1, 9))


EQUATIONS = {
    "bkdl,kcd->bkcl": ((2, 3, 4, 5), (3, 6, 4)),
    "b k r l , k d r -> b k d l": ((2, 3, 4, 5), (3, 6, 4)),
    "blkd,kcd->blkc": ((2, 5, 3, 4), (3, 6, 4)),
    "bhid,bhjd->bhij": ((2, 3, 4, 5), (2, 3, 6, 5)),
    "ij,jk->ik": ((3, 4), (4, 5)),
    "ij,kj->ki": ((3, 4), (5, 4)),
    "abi,bij->abj": ((2, 3, 4), (3, 4, 5)),
    "bdl,dn->bdln": ((2, 3, 4), (3, 5)),
    "bij,bij->b": ((2, 3, 4), (2, 3, 4)),
    "bdn,bn->bd": ((2, 3, 4), (2, 4)),
}


@pytest.mark.parametrize("equation", EQUATIONS)
def test_einsum(equation):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in EQUATIONS[equation]]
    expected = np.einsum(equation.replace(" ", ""), *arrays)
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in zip("xw", arrays, strict=True)]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, expected.shape)
    node = helper.make_node("Einsum", ["x", "w"], ["y"], equation=equation)
    model = ir.from_proto(helper.make_model(helper.make_graph([node], "g", inputs, [output]), ir_version=9))
    graph_rewrites._einsum_as_matmul(model)
    sweep(model)
    rewritten = ir.to_proto(model)
    plain = equation not in ("bdl,dn->bdln", "bij,bij->b", "bdn,bn->bd")
    assert (kinds(rewritten)["MatMul"], kinds(rewritten)["Einsum"]) == ((1, 0) if plain else (0, 1))
    (found,) = ReferenceEvaluator(rewritten).run(None, dict(zip("xw", arrays, strict=True)))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def moved(nodes, constants=(), shapes=(), size=(2, 3, 4)):
    """The graph of these nodes from x to y, with x of that size: as it was, after moves are cancelled, and outputs."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, size)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in dict(constants).items()]
    graph = helper.make_graph([helper.make_node(*n[:3], **n[3]) for n in nodes], "g", inputs, outputs, tensors)
    model = onnx.shape_inference.infer_shapes(
        helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 19)])
    )
    changed = ir.from_proto(model)
    cancel_moves(changed.graph)
    sweep(changed)
    after = ir.to_proto(changed)
    onnx.checker.check_model(after)
    x = np.random.default_rng(0).normal(size=size).astype(np.float32)
    pair = [ReferenceEvaluator(m).run(None, {"x": x})[0] for m in (model, after)]
    return model, after, pair


T, BACK = {"perm": [0, 2, 1]}, {"perm": [0, 2, 1]}
FLIP = {"first": np.array([-1]), "end": np.array([-(2**63) + 1]), "axis": np.array([2]), "step": np.array([-1])}
CASES = {
    "two": ([("Transpose", ["x"], ["a"], {"perm": [2, 0, 1]}), ("Transpose", ["a"], ["y"], {"perm": [1, 2, 0]})], {}),
    "unary": ([("Transpose", ["x"], ["a"], T), ("Tanh", ["a"], ["b"], {}), ("Transpose", ["b"], ["y"], BACK)], {}),
    "constant": (
        [("Transpose", ["x"], ["a"], T), ("Sub", ["c", "a"], ["b"], {}), ("Transpose", ["b"], ["y"], BACK)],
        {"c": np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)},
    ),
    "a column": (
        [("Transpose", ["x"], ["a"], T), ("Mul", ["a", "c"], ["b"], {}), ("Transpose", ["b"], ["y"], BACK)],
        {"c": np.arange(4, dtype=np.float32)[:, None]},
    ),
    "both": (
        [
            ("Transpose", ["x"], ["a"], T),
            ("Exp", ["a"], ["b"], {}),
            ("Add", ["a", "b"], ["c"], {}),
            ("Transpose", ["c"], ["y"], BACK),
        ],
        {},
    ),
    "product": (
        [("Transpose", ["x"], ["a"], T), ("MatMul", ["w", "a"], ["b"], {}), ("Transpose", ["b"], ["y"], BACK)],
        {"w": np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)},
    ),
    "sum": (
        [
            ("Transpose", ["x"], ["a"], {"perm": [2, 0, 1]}),
            ("ReduceSum", ["a", "axes"], ["b"], {"keepdims": 0}),
            ("Transpose", ["b"], ["y"], {"perm": [1, 0]}),
        ],
        {"axes": np.array([-1])},
    ),
    "mean": (
        [
            ("Transpose", ["x"], ["a"], {"perm": [2, 0, 1]}),
            ("ReduceMean", ["a", "axes"], ["b"], {}),
            ("Transpose", ["b"], ["y"], {"perm": [1, 2, 0]}),
        ],
        {"axes": np.array([1])},
    ),
    "split and join": (
        [
            ("Transpose", ["x"], ["a"], T),
            ("Split", ["a", "sizes"], ["b", "c"], {"axis": 1}),
            ("Concat", ["c", "b"], ["d"], {"axis": -2}),
            ("Transpose", ["d"], ["y"], BACK),
        ],
        {"sizes": np.array([1, 3])},
    ),
    "one row, and an axis more": (
        [
            ("Transpose", ["x"], ["a"], {"perm": [2, 0, 1]}),
            ("Gather", ["a", "i"], ["b"], {"axis": 1}),
            ("Unsqueeze", ["b", "at"], ["c"], {}),
            ("Transpose", ["c"], ["y"], {"perm": [2, 1, 0]}),
        ],
        {"i": np.array(1), "at": np.array([1])},
    ),
    "merged and split": (
        [
            ("Transpose", ["x"], ["a"], {"perm": [2, 0, 1]}),
            ("Reshape", ["a", "flat"], ["b"], {}),
            ("MatMul", ["w", "b"], ["c"], {}),
            ("Reshape", ["c", "wide"], ["d"], {}),
            ("Transpose", ["d"], ["y"], {"perm": [1, 2, 0]}),
        ],
        {
            "flat": np.array([4, -1]),
            "wide": np.array([5, 2, 3]),
            "w": np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32),
        },
    ),
    "flips": (
        [
            ("Slice", ["x", "first", "end", "axis", "step"], ["a"], {}),
            ("Transpose", ["a"], ["b"], {"perm": [1, 0, 2]}),
            ("MatMul", ["b", "w"], ["c"], {}),
            ("Transpose", ["c"], ["d"], {"perm": [1, 0, 2]}),
            ("Slice", ["d", "first", "end", "axis", "step"], ["y"], {}),
        ],
        {**FLIP, "axis": np.array([0]), "w": np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32)},
    ),
}


STILL_ONE = ("sum", "one row, and an axis more")
"""What is left there would have to go above the first node, or moves an axis of size 1."""


@pytest.mark.parametrize("case", CASES)
def test_moves_that_meet_their_inverse_are_gone(case):
    before, after, (expected, found) = moved(*CASES[case])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert kinds(after)["Transpose"] < kinds(before)["Transpose"]
    assert not {"Slice", "Reshape"} & set(kinds(after))
    assert case in STILL_ONE or not kinds(after)["Transpose"]


STAY = {
    "a sum over the flipped axis": (
        [
            ("Slice", ["x", "first", "end", "axis", "step"], ["a"], {}),
            ("MatMul", ["a", "w"], ["y"], {}),
        ],
        {**FLIP, "w": np.random.default_rng(1).normal(size=(4, 2)).astype(np.float32)},
    ),
    "a constant along the flipped axis": (
        [("Slice", ["x", "first", "end", "axis", "step"], ["a"], {}), ("Add", ["a", "c"], ["y"], {})],
        {**FLIP, "c": np.arange(4, dtype=np.float32)},
    ),
    "parts of the flipped axis": (
        [
            ("Slice", ["x", "first", "end", "axis", "step"], ["a"], {}),
            ("Split", ["a"], ["y", "b"], {"axis": 2, "num_outputs": 2}),
        ],
        FLIP,
    ),
    "a reshape across a transpose": (
        [("Transpose", ["x"], ["a"], T), ("Reshape", ["a", "flat"], ["y"], {})],
        {"flat": np.array([2, -1])},
    ),
    "a norm over another axis": (
        [("Transpose", ["x"], ["a"], T), ("LayerNormalization", ["a", "w"], ["y"], {"axis": -1})],
        {"w": np.arange(1, 4, dtype=np.float32)},
    ),
}


@pytest.mark.parametrize("case", STAY)
def test_moves_that_do_not_commute_stay(case):
    before, after, (expected, found) = moved(*STAY[case])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert kinds(after) == kinds(before)


def test_groups_of_axes_that_a_reshape_keeps():
    assert blocks_of(["b", 4, 6, "h*w"], ["b", 24, "h*w"]) == [([0], [0]), ([1, 2], [1]), ([3], [2])]
    assert blocks_of([48, "b*t"], [48, "b", "t"]) == [([0], [0]), ([1], [1, 2])]
    assert blocks_of(["b", "t"], ["b", 1, "t"]) == [([0], [0]), ([1], [1, 2])]
    assert blocks_of(["b", 6], ["6*b"]) == [([0, 1], [0])]
    assert blocks_of(["a", 6], ["c", 6]) is None


def optimized(model, file):
    """The graph that ONNX Runtime makes of it and runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(file), 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(file)


@pytest.mark.parametrize("form", ["torch", "half first", "another half", "another x"])
def test_gelu_comes_in_the_order_that_onnx_runtime_has_a_kernel_for(form, tmp_path):
    class Net(torch.nn.Module):
        def forward(self, x):
            if form == "torch":
                return torch.nn.functional.gelu(x)
            cdf = 1 + torch.erf(x / 2**0.5)
            return (x + 1 if form == "another x" else x) * ((0.25 if form == "another half" else 0.5) * cdf)

    model = export(Net(), torch.randn(2, 7), {0: "batch"})
    rewritten, report = rewrite_graph(model, {"x": np.linspace(-5, 5, 14, dtype=np.float32).reshape(2, 7)})
    found = form in ("torch", "half first")
    assert [(one.name, one.kept) for one in report] == [("GELU in ONNX Runtime's order", True)] * found
    agree(Net(), rewritten, torch.randn(2, 7), 40 * torch.randn(5, 7))
    assert kinds(optimized(rewritten, tmp_path / "run.onnx"))["Gelu"] == found


@pytest.mark.parametrize("form", ["norm", "norm first", "root read twice", "no root"])
def test_an_rms_norm_is_one_that_onnx_runtime_has_a_kernel_for(form, tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(7))

        def forward(self, x):
            mean = x.pow(2).mean(-1, keepdim=True) + 1e-5
            if form == "no root":
                return self.weight * (x * mean.reciprocal())
            scale = mean.rsqrt()
            y = self.weight * (scale * x if form == "norm first" else x * scale)
            return y + torch.tanh(scale) if form == "root read twice" else y

    net = Net()
    model = export(net, torch.randn(2, 7), {0: "batch"})
    rewritten, report = rewrite_graph(model, {"x": np.linspace(-5, 5, 14, dtype=np.float32).reshape(2, 7)})
    found = form.startswith("norm")
    assert [(one.name, one.kept) for one in report] == [("RMS norm by a division", True)] * found
    agree(net, rewritten, torch.randn(2, 7), 40 * torch.randn(5, 7), torch.zeros(1, 7))
    assert kinds(optimized(rewritten, tmp_path / "run.onnx"))["SimplifiedLayerNormalization"] == found


@pytest.mark.parametrize("slopes", [[0.25], [0.0, -1.5, 1.0, 3.0]], ids=["shared", "one a channel"])
def test_prelu_is_spelled_out_and_gives_the_same_bits(slopes):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.prelu = torch.nn.PReLU(len(slopes))
            self.prelu.weight = torch.nn.Parameter(torch.tensor(slopes))

        def forward(self, x):
            return self.prelu(x)

    model = export(Net(), torch.randn(2, 4, 3), {0: "batch"})
    x = np.linspace(-5, 5, 24, dtype=np.float32).reshape(2, 4, 3)
    rewritten, report = rewrite_graph(model, {"x": x})
    assert [(one.name, one.kept) for one in report] == [("PRelu as Relu and Min", True)]
    assert kinds(rewritten) == {"Relu": 1, "Min": 1, "Mul": 1, "Add": 1}
    extremes = np.array([0.0, -0.0, 1e38, -1e38, 1e-40, -1e-40, np.nan, np.inf, -np.inf, 1, 2, 3], np.float32)
    for given in (x, np.roll(extremes, 3).reshape(1, 4, 3)):
        expected, found = graph_rewrites._run(model, {"x": given}) + graph_rewrites._run(rewritten, {"x": given})
        np.testing.assert_array_equal(found, expected)


def silu():
    """x * sigmoid(x) for x [batch, 3]."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in "xy"]
    nodes = [helper.make_node("Sigmoid", ["x"], ["a"]), helper.make_node("Mul", ["x", "a"], ["y"])]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    return helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 19)])


def test_a_rewrite_that_changes_numbers_or_stops_the_graph_is_left_out(monkeypatch):
    def wrong(model):
        for node in model.graph:
            if node.op_type == "Mul":
                node.op_type = "Add"

    def broken(model):
        for node in model.graph:
            node.op_type = "Nothing"

    def fails(model):
        raise KeyError("a shape")

    monkeypatch.setattr(graph_rewrites, "REWRITES", {"wrong": wrong, "broken": broken, "fails": fails})
    model = silu()
    same, report = rewrite_graph(model, {"x": np.ones((2, 3), np.float32)})
    assert same.SerializeToString() == model.SerializeToString()
    assert [one.kept for one in report] == [False] * 3
    for one, words in zip(report, ("differs by", "no longer runs", "KeyError"), strict=True):
        assert words in one.reason


def test_a_graph_that_does_not_run_is_left_alone():
    model = silu()
    same, (one,) = rewrite_graph(model, {"x": np.ones((2, 4), np.float32)})
    assert same is model
    assert not one.kept
    assert "does not run" in one.reason


OPERATORS_TO_FLIP = {
    "scan": lambda: one_node.scan_model(4, 3, gated=True, stateful=True, delta_softplus=True, functions=False),
    "scan of two groups": lambda: one_node.scan_model(4, 3, group=2, functions=False),
    "dual": lambda: one_node.dual_model(4, 2, 3, group=2, gated=True, delta_softplus=True, functions=False),
    "convolution": lambda: one_node.conv_model(4, 3, functions=False),
}


@pytest.mark.parametrize("name", OPERATORS_TO_FLIP)
def test_flips_round_an_operator_become_its_direction(name):
    plain = OPERATORS_TO_FLIP[name]()
    rng = np.random.default_rng(0)
    sizes = {"batch": 2, "time": 5}
    feeds = {}
    for value in plain.graph.input:
        shape = [d.dim_value or sizes[d.dim_param] for d in value.type.tensor_type.shape.dim]
        feeds[value.name] = rng.normal(-1, 1, shape).astype(np.float32)
    flipped = ir.from_proto(plain)
    (node,) = flipped.graph
    editor = Editor(flipped.graph)
    operator = OPERATORS[node.op_type]
    for i, value in enumerate(node.inputs):
        if "time" in [str(size) for size in value.shape]:
            node.replace_input_with(i, editor.flip(node, value, 1))
    y = node.outputs[0]
    last = editor.flip(node, y, 1)
    flipped.graph.outputs[0] = last
    flipped.graph.sort()
    cancelled = ir.from_proto(ir.to_proto(flipped))
    cancel_moves(cancelled.graph)
    sweep(cancelled)
    after = ir.to_proto(cancelled)
    assert [one.op_type for one in after.graph.node] == [operator.name]
    assert next(one.i for one in after.graph.node[0].attribute if one.name == "reverse") == 1
    expected, found = (graph_rewrites._run(m, feeds) for m in (ir.to_proto(flipped), after))
    for x, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, other, atol=1e-5)
    forward = graph_rewrites._run(plain, feeds)
    assert np.abs(forward[0] - expected[0]).max() > 0.1, "a direction makes a difference"
