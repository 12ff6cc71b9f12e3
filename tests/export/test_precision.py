"""Float16 written into a graph: what stays float32, that the types fit, and that the scores stay within their bound."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from hcmen.base.bundle import Bundle, read_bundle
from hcmen.base.errors import CorruptFileError, InputError
from hcmen.base.library import library_path
from hcmen.base.modalities import VARIANTS
from hcmen.export.float16 import to_float16
from hcmen.export.weights import embedded_model
from hcmen.mamba.functions import add_functions, strip_functions
from hcmen.runtime.backends.tensorrt import TOLERANCES
from hcmen.runtime.golden import golden_test

NAMES = [v.name for v in VARIANTS]


@pytest.fixture
def opened(micro_bundle) -> Bundle:
    return read_bundle(micro_bundle)


class Session:
    """A model in ONNX Runtime, on the kernels or on the model's own functions."""

    tolerance = TOLERANCES["fp16"]
    kernels = "native"

    def __init__(self, model: onnx.ModelProto, *, library: bool = True):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        # As the graph says it, no cast moved or merged: what is checked is the graph.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if library:
            options.register_custom_ops_library(str(library_path()))
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def run(self, inputs):
        names = [o.name for o in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))


def types(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    found = {v.name: v.type.tensor_type.elem_type for v in (*inferred.input, *inferred.value_info, *inferred.output)}
    return found | {t.name: t.data_type for t in inferred.initializer}


@pytest.mark.parametrize("variant", NAMES)
@pytest.mark.parametrize("library", [True, False], ids=["kernels", "functions"])
def test_scores_stay_within_the_bound(opened, variant, library):
    """Every variant, on its golden set, against the eager float32 model."""
    model = to_float16(embedded_model(opened, variant))
    test = golden_test(opened, variant, Session(model, library=library))
    assert test.passed, {n: c.line() for n, c in test.outputs.items()}
    # And it is float16 that ran: float32 would be a thousand times nearer.
    assert test.outputs["score"].max_abs > 3e-4


@pytest.mark.parametrize("variant", NAMES)
def test_every_type_is_the_one_of_the_rule(opened, variant):
    before = embedded_model(opened, variant)
    model = to_float16(before)
    onnx.checker.check_model(model, full_check=True)  # the checker's own view of types, strongly typed
    of = types(model)
    half, single = TensorProto.FLOAT16, TensorProto.FLOAT
    wide = {"LayerNormalization", "Softmax", "ReduceMean", "ReduceSum", "ReduceMax", "Pow", "Sqrt", "Reciprocal"}
    counts = {"scan": 0, "conv": 0, "product": 0, "wide": 0}
    for node in model.graph.node:
        inputs = [of[name] for name in node.input if name]
        if node.op_type == "SelectiveScan":
            assert inputs == [half, half, single, half, half, single, single, half]
            assert of[node.output[0]] == half
            counts["scan"] += 1
        elif node.op_type == "CausalConv1d":
            assert inputs == [half, single, single]
            assert of[node.output[0]] == half
            counts["conv"] += 1
        elif node.op_type in ("MatMul", "Gemm", "Conv"):
            assert len(set(inputs)) == 1
            counts["product"] += inputs[0] == half
        elif node.op_type in wide:
            assert half not in inputs
            counts["wide"] += 1
    assert min(counts.values()) > 0
    assert [(v.name, v.type.tensor_type.elem_type) for v in (*model.graph.input, *model.graph.output)] == [
        (v.name, v.type.tensor_type.elem_type) for v in (*before.graph.input, *before.graph.output)
    ]


def test_products_that_stay_float32(opened):
    """The head and the gate, which the outputs come from, and products of two activations; no other."""
    model = to_float16(embedded_model(opened, "full"))
    of = types(model)
    weights = {t.name for t in model.graph.initializer}
    products = [n for n in model.graph.node if n.op_type in ("MatMul", "Gemm", "Conv")]
    stayed = [n for n in products if of[n.input[0]] != TensorProto.FLOAT16]
    with_weights = {name for n in stayed for name in n.input if name in weights}
    assert any("head" in name for name in with_weights)
    shapes = {t.name: list(t.dims) for t in model.graph.initializer}
    width = opened.manifest.model.config["width"]
    for n in stayed:
        for name in n.input:
            if len(shapes.get(name, [])) == 2:
                assert shapes[name] in ([1, width], [width, 1], [width, 3], [3, width])


def test_weights_are_stored_once_and_half_as_large(opened):
    before = embedded_model(opened, "full")
    model = to_float16(before)
    size = {t.name: numpy_helper.to_array(t).nbytes for t in before.graph.initializer}
    after = sum(numpy_helper.to_array(t).nbytes for t in model.graph.initializer)
    assert after < 0.75 * sum(size.values())
    used = {name for n in model.graph.node for name in n.input}
    assert all(t.name in used for t in model.graph.initializer)


def test_the_model_given_is_left_as_it_was(opened):
    model = embedded_model(opened, "full")
    before = model.SerializeToString(deterministic=True)
    to_float16(model)
    assert model.SerializeToString(deterministic=True) == before


def test_the_embedded_model_is_the_exported_one(opened, micro_bundle):
    """Bit by bit, against onnx's own reading of the files."""
    for variant in NAMES:
        whole = onnx.load(str(micro_bundle / f"{variant}.onnx"))
        got, want = embedded_model(opened, variant).graph, whole.graph
        assert [n.SerializeToString() for n in got.node] == [n.SerializeToString() for n in want.node]
        for a, b in zip(got.initializer, want.initializer, strict=True):
            assert a.name == b.name
            np.testing.assert_array_equal(numpy_helper.to_array(a), numpy_helper.to_array(b))


def test_embedding_reads_no_other_file(opened, micro_bundle):
    model = onnx.load(str(micro_bundle / "full.onnx"), load_external_data=False)
    content = (micro_bundle / "full.onnx").read_bytes().replace(b"weights.bin", b"weights.xin")
    (micro_bundle / "full.onnx").write_bytes(content)
    with pytest.raises(CorruptFileError, match="sha256"):
        embedded_model(opened, "full")
    with pytest.raises(InputError, match="embed the weights first"):
        to_float16(model)


# --- small graphs by hand ---------------------------------------------------------------------------------------------


def graph(nodes, weights, *, x=(1, 5, 4), output="y", inputs=()) -> onnx.ModelProto:
    made = helper.make_graph(
        nodes,
        "hand",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x), *inputs],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [None] * 3)],
        [numpy_helper.from_array(np.asarray(v), name) for name, v in weights.items()],
    )
    model = helper.make_model(
        made, opset_imports=[helper.make_opsetid("", 19), helper.make_opsetid("hcmen", 1)], ir_version=9
    )
    return model


W = np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 4)


def operator_types(model: onnx.ModelProto) -> dict[str, list[str]]:
    of = types(model)
    short = {TensorProto.FLOAT: "32", TensorProto.FLOAT16: "16", TensorProto.BOOL: "b"}
    return {n.name: [short.get(of[i], "?") for i in n.input] for n in model.graph.node if n.op_type != "Cast"}


def test_elementwise_operators_follow_what_comes_in():
    node = helper.make_node
    model = graph(
        [
            node("MatMul", ["x", "W"], ["a"], "product"),
            node("Add", ["a", "small"], ["b"], "with a constant"),
            node("Mul", ["b", "huge"], ["c"], "with a constant beyond float16"),
            node("Mul", ["b", "tiny"], ["d"], "with a constant below float16"),
            node("Add", ["b", "x"], ["e"], "with a float32 value"),
            node("Greater", ["x", "small"], ["above"], "mask"),
            node("Cast", ["above"], ["m"], "cast", to=TensorProto.FLOAT),
            node("Mul", ["b", "m"], ["f"], "with a mask"),
            node("Where", ["above", "low", "f"], ["g"], "choice"),
            node("Softmax", ["g"], ["h"], "softmax"),
            node("Concat", ["c", "d", "e", "h"], ["i"], "join", axis=2),
            node("MatMul", ["i", "V"], ["j"], "second"),
            node("Transpose", ["j"], ["k"], "turn", perm=[0, 2, 1]),
            node("Sigmoid", ["k"], ["y"], "sigmoid"),
        ],
        {
            "W": W,
            "V": np.ones((16, 2), np.float32),
            "small": np.float32(0.5),
            "huge": np.float32(1e5),
            "tiny": np.float32(1e-7),
            "low": np.float32(-1e4),
        },
    )
    converted = to_float16(model)
    onnx.checker.check_model(converted, full_check=True)
    assert operator_types(converted) == {
        "product": ["16", "16"],
        "with a constant": ["16", "16"],
        "with a constant beyond float16": ["32", "32"],
        "with a constant below float16": ["32", "32"],
        "with a float32 value": ["32", "32"],
        "mask": ["32", "32"],
        "with a mask": ["16", "16"],
        "choice": ["b", "16", "16"],
        "softmax": ["32"],
        "join": ["32", "32", "32", "32"],
        "second": ["16", "16"],
        "turn": ["16"],
        "sigmoid": ["32"],
    }


def test_an_output_keeps_its_type_and_its_readers():
    """The value is an output and goes on; the last product is not the last node."""
    node = helper.make_node
    model = graph(
        [
            node("MatMul", ["x", "W"], ["y"], "product"),
            node("Sigmoid", ["y"], ["s"], "sigmoid"),
            node("MatMul", ["s", "W"], ["t"], "second"),
            node("LayerNormalization", ["t", "scale"], ["z"], "norm"),
        ],
        {"W": W, "scale": np.ones(4, np.float32)},
    )
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 5, 4]))
    converted = to_float16(model)
    onnx.checker.check_model(converted, full_check=True)
    assert operator_types(converted) == {
        "product": ["32", "32"],  # the last before an output
        "sigmoid": ["32"],
        "second": ["16", "16"],
        "norm": ["32", "32"],
    }


def test_a_half_precision_output_is_widened():
    """A value that no rule keeps float32: one of the custom op, straight to the output."""
    node = helper.make_node
    conv = node("CausalConv1d", ["x", "W", "b"], ["y"], "conv", domain="hcmen")
    model = graph([conv], {"W": W, "b": np.zeros(4, np.float32)})
    add_functions(model)
    converted = to_float16(model)
    onnx.checker.check_model(converted, full_check=True)
    x = np.random.default_rng(0).normal(size=(1, 5, 4)).astype(np.float32)
    got, want = (Session(m).run({"x": x})["y"] for m in (converted, model))
    assert got.dtype == np.float32
    assert 0 < np.abs(got - want).max() < 2e-3


@pytest.mark.parametrize("stateful", [0, 1])
@pytest.mark.parametrize("gated", [0, 1])
def test_states_stay_float32(gated, stateful):
    node = helper.make_node
    names = ["p", "p", "A", "B", "B", "D", "bias", *(["p"] if gated else []), *(["state"] if stateful else [])]
    weights = {"W": W, "A": -np.ones((4, 3), np.float32), "V": np.ones((4, 3), np.float32)}
    model = graph(
        [
            node("MatMul", ["x", "W"], ["p"], "product"),
            node("MatMul", ["x", "V"], ["B"], "projection"),
            node(
                "SelectiveScan",
                names,
                ["scanned", "last"] if stateful else ["scanned"],
                "scan",
                domain="hcmen",
                gated=gated,
                stateful=stateful,
            ),
            node("Sigmoid", ["scanned"], ["y"], "sigmoid"),
        ],
        weights
        | {"D": np.zeros(4, np.float32), "bias": np.zeros(4, np.float32), "state": np.ones((1, 4, 3), np.float32)},
    )
    if stateful:
        model.graph.output.append(helper.make_tensor_value_info("last", TensorProto.FLOAT, [1, 4, 3]))
    add_functions(model)
    converted = to_float16(model)
    onnx.checker.check_model(converted, full_check=True)
    half = ["16", "16", "32", "16", "16", "32", "32"]
    assert operator_types(converted)["scan"] == [*half, *["16"] * gated, *["32"] * stateful]
    assert not strip_functions(converted).functions


def test_a_weight_beyond_float16_is_refused():
    model = graph(
        [helper.make_node("MatMul", ["x", "W"], ["a"], "wide"), helper.make_node("Sigmoid", ["a"], ["y"])],
        {"W": W * 1e5},
    )
    with pytest.raises(InputError, match=r"weight 'W' of MatMul 'wide' holds 1e\+05, float16 ends at 65504: .*fp32"):
        to_float16(model)


def test_a_subgraph_is_refused():
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["r"])],
        "b",
        [],
        [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)],
    )
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    model = graph(
        [helper.make_node("If", ["c"], ["y"], "branches", then_branch=branch, else_branch=branch)],
        {},
        inputs=[condition],
    )
    with pytest.raises(InputError, match="'branches'"):
        to_float16(model)
