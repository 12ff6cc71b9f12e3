"""The model-local functions: the reference's numbers with no library, any number of nodes served by one body."""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from helpers.dual_cases import DualCase, dual_arrays, dual_model_of, dual_oracle
from helpers.op_cases import (
    ConvCase,
    ScanCase,
    assert_close,
    assert_scan,
    conv_arrays,
    conv_oracle,
    model_of,
    scan_arrays,
    scan_oracle,
)
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from hcmen.base.errors import InputError
from hcmen.base.library import library_path
from hcmen.base.op import OPERATORS, SELECTIVE_SCAN
from hcmen.base.selfcheck import CONV_MODEL, DUAL_MODEL, MODEL, selfcheck_inputs
from hcmen.mamba.functions import add_functions, strip_functions
from hcmen.mamba.one_node import (
    conv_model,
    scan_model,
    selfcheck_conv_model,
    selfcheck_dual_model,
    selfcheck_model,
)
from hcmen.mamba.scan import causal_conv1d, causal_conv1d_ref, implementation, selective_scan, selective_scan_ref


def run(model, feeds, threads=1, library=False):
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if library:
        options.register_custom_ops_library(str(library_path()))
    made = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return made.run(None, feeds)


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_softplus_neither_overflows_nor_underflows():
    case = ScanCase(1, 8, 4, 3, None, gated=False)
    feeds = scan_arrays(case)
    feeds["delta"][0, :, 0] = [-1e30, -1e4, -104, -20, 19.9999, 20.0001, 89, 1e4]
    feeds["delta_bias"][0] = 0
    assert_scan(case, feeds, run(scan_model(4, 3, delta_softplus=True, stateful=True), feeds))


@pytest.mark.parametrize("reverse", [False, True])
def test_another_runtime_agrees_on_the_convolution(reverse):
    """The onnx package has an evaluator of its own; its Scan knows neither axes nor directions."""
    rng = np.random.default_rng(1)
    feeds = [rng.normal(size=size).astype(np.float32) for size in ((2, 6, 4), (4, 3), (4,))]
    want = causal_conv1d_ref(*map(torch.from_numpy, feeds), reverse=reverse).numpy()
    model = conv_model(4, 3, reverse=reverse)
    assert_close(ReferenceEvaluator(model).run(None, dict(zip(("x", "weight", "bias"), feeds, strict=True))), [want])


@pytest.mark.parametrize("opset", [15, 17, 18, 19, 20, 21, 23, 25])
def test_body_is_written_for_the_opset_of_the_model(opset):
    case = ScanCase(2, 5, 6, 3, None, gated=False, stateful=False, reverse=True)
    scan, conv = scan_model(6, 3, delta_softplus=True, reverse=True, functions=False), conv_model(6, 3, functions=False)
    feeds = scan_arrays(case)
    inputs = {"x": feeds["u"], "weight": feeds["A"], "bias": feeds["D"]}
    convolved = causal_conv1d_ref(*map(torch.from_numpy, inputs.values())).numpy()
    for model, given, want in ((scan, feeds, scan_oracle(case, feeds)), (conv, inputs, [convolved])):
        model.opset_import[0].version = opset
        add_functions(model)
        assert model.functions[0].opset_import[0].version == opset
        assert_close(run(model, given), want)


# --- one body for many nodes ------------------------------------------------------------------------------------------


def join(*models):
    """One model of the nodes of several, whose names get a number; the functions are made anew."""
    merged = onnx.ModelProto()
    merged.CopyFrom(models[0])
    strip_functions(merged)
    merged.graph.ClearField("node")
    for side in (merged.graph.input, merged.graph.output, merged.graph.initializer):
        del side[:]
    for i, model in enumerate(models):
        graph = copy.deepcopy(model.graph)
        for value in (*graph.input, *graph.output, *graph.initializer):
            value.name = f"{value.name}{i}"
        for node in graph.node:
            node.name = f"{node.name}{i}"
            node.input[:] = [f"{x}{i}" for x in node.input]
            node.output[:] = [f"{x}{i}" for x in node.output]
            merged.graph.node.append(node)
        merged.graph.input.extend(graph.input)
        merged.graph.output.extend(graph.output)
        merged.graph.initializer.extend(graph.initializer)
    return merged


def test_one_body_serves_nodes_that_differ_in_all_it_may():
    """Both directions, other channel and state counts, grouped or not, both dtypes."""
    rng = np.random.default_rng(3)
    kinds = [
        {"channel": 6, "state": 3, "reverse": False, "group": None, "dtype": "float32"},
        {"channel": 8, "state": 5, "reverse": True, "group": 2, "dtype": "float32"},
        {"channel": 2, "state": 1, "reverse": True, "group": None, "dtype": "float16"},
        {"channel": 6, "state": 3, "reverse": False, "group": 3, "dtype": "float16"},
    ]
    model = add_functions(
        join(*(scan_model(**kind, delta_softplus=True, gated=True, functions=False) for kind in kinds))
    )
    assert len(model.functions) == 1
    feeds, want = {}, []
    for i, kind in enumerate(kinds):
        case = ScanCase(2, 7, **kind, stateful=False)
        own = scan_arrays(case)
        feeds.update({f"{name}{i}": x for name, x in own.items()})
        want.append(scan_oracle(case, own)[0])
    for library in (False, True):
        assert_close(run(model, feeds, library=library), want)

    convs = [{"channel": 6, "width": 4}, {"channel": 3, "width": 2, "reverse": True, "dtype": "float16"}]
    model = add_functions(join(*(conv_model(**kind, functions=False) for kind in convs)))
    assert len(model.functions) == 1
    feeds, want = {}, []
    for i, kind in enumerate(convs):
        own = {
            "x": rng.normal(size=(2, 9, kind["channel"])).astype(kind.get("dtype", "float32")),
            "weight": rng.normal(size=(kind["channel"], kind["width"])).astype(np.float32),
            "bias": rng.normal(size=kind["channel"]).astype(np.float32),
        }
        feeds.update({f"{name}{i}": x for name, x in own.items()})
        wide = (torch.from_numpy(x.astype(np.float64)) for x in own.values())
        want.append(causal_conv1d_ref(*wide, reverse=kind.get("reverse", False)).numpy())
    for library in (False, True):
        assert_close(run(model, feeds, library=library), want)


PLAIN = ScanCase(2, 7, 6, 3, None, gated=False, stateful=False, softplus=False)
SIGNATURES = [
    PLAIN,
    replace(PLAIN, gated=True),
    replace(PLAIN, stateful=True),
    replace(PLAIN, softplus=True),
    replace(PLAIN, gated=True, softplus=True, group=2, reverse=True),
    replace(PLAIN, gated=True, stateful=True, softplus=True),
    replace(PLAIN, stateful=True, dtype="float16", group=3),
    replace(PLAIN, gated=True, dtype="float16"),
]


def mixed(cases):
    """A model of one scan of each case, its inputs and the outputs of the oracle."""
    model = join(*(model_of(case, functions=False) for case in cases))
    feeds, want = {}, []
    for i, case in enumerate(cases):
        own = scan_arrays(case)
        feeds.update({f"{name}{i}": x for name, x in own.items()})
        want += scan_oracle(case, own)[: 1 + case.stateful]
    return model, feeds, want


def assert_all_close(got, want):
    for g, w in zip(got, want, strict=True):
        assert np.abs(g - w).max() <= (2e-3 if g.dtype == np.float16 else 2e-6) * np.abs(w).max()


def kernels_of(model, feeds, tmp_path):
    """How often the library's kernels ran."""
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    options.register_custom_ops_library(str(library_path()))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    session.run(None, feeds)
    ran = [event.get("args", {}).get("op_name") for event in json.loads(Path(session.end_profiling()).read_text())]
    return sum(ran.count(op) for op in OPERATORS)


@pytest.mark.parametrize("cases", [*([PLAIN, case] for case in SIGNATURES[1:4]), SIGNATURES[4:6], SIGNATURES], ids=len)
def test_nodes_of_several_signatures_share_one_function_and_each_has_its_kernel(cases, tmp_path):
    model, feeds, want = mixed(cases)
    names = [[*side] for side in ((v.name for v in model.graph.input), (v.name for v in model.graph.output))]
    add_functions(model)
    assert [[v.name for v in side] for side in (model.graph.input, model.graph.output)] == names
    assert len(model.functions) == 1
    once = model.SerializeToString(deterministic=True)
    for library in (False, True):
        assert_all_close(run(model, feeds, library=library), want)
    assert kernels_of(model, feeds, tmp_path) == len(cases)
    assert add_functions(model).SerializeToString(deterministic=True) == once
    assert_all_close(run(add_functions(model, "blocks"), feeds), want)


def test_nodes_of_the_dual_may_differ_too(tmp_path):
    """In what is taken out of a node, in the limits of its steps, and in the rank of D and the groups of B."""
    plain = DualCase(2, 7, 6, 5, 4, 1, gated=False, stateful=False, softplus=False)
    cases = [
        plain,
        replace(plain, gated=True, softplus=True, group=3, dt_min=0.01, dt_max=0.05),
        replace(plain, stateful=True, wide=True, reverse=True),
        replace(plain, gated=True, stateful=True, softplus=True, wide=True, dt_max=0.02),
    ]
    feeds, want = {}, []
    for i, case in enumerate(cases):
        own = dual_arrays(case)
        feeds.update({f"{name}{i}": x for name, x in own.items()})
        want += dual_oracle(case, own)[: 1 + case.stateful]
    model = add_functions(join(*(dual_model_of(case, functions=False) for case in cases)))
    for library in (False, True):
        assert_all_close(run(model, feeds, library=library), want)
    assert kernels_of(model, feeds, tmp_path) == len(cases)


def test_activations_may_differ(tmp_path):
    rng = np.random.default_rng(6)
    model = add_functions(join(*(conv_model(4, 3, activation=a, functions=False) for a in ("silu", "none", "silu"))))
    feeds, want = {}, []
    for i, activation in enumerate(("silu", "none", "silu")):
        own = [rng.normal(size=size).astype(np.float32) for size in ((2, 6, 4), (4, 3), (4,))]
        feeds.update({f"{name}{i}": x for name, x in zip(("x", "weight", "bias"), own, strict=True)})
        want.append(causal_conv1d_ref(*(torch.from_numpy(x).double() for x in own), activation=activation).numpy())
    for library in (False, True):
        assert_all_close(run(model, feeds, library=library), want)
    assert kernels_of(model, feeds, tmp_path) == 3


def test_signatures_meet_inside_subgraphs_and_functions():
    """A gated node in a branch, one in a function of the user's, and an ungated one beside them."""
    gated = scan_model(4, 2, gated=True, functions=False)
    node = gated.graph.node[0]
    inner, outer, plain = copy.deepcopy(node), copy.deepcopy(node), scan_model(4, 2, functions=False).graph.node[0]
    inner.output[0], outer.output[0], plain.output[0] = "branch", "called", "plain"
    value = helper.make_tensor_value_info("branch", TensorProto.FLOAT, ["batch", "time", 4])
    same = helper.make_node("Identity", ["u"], ["branch"])
    branches = [helper.make_graph([n], name, [], [value]) for name, n in (("a", inner), ("b", same))]
    names = [*node.input]
    wrapper = helper.make_function("mine", "Wrapped", names, ["called"], [outer], [helper.make_opsetid("hcmen", 1)])
    graph = helper.make_graph(
        [
            helper.make_node("If", ["flag"], ["chosen"], then_branch=branches[0], else_branch=branches[1]),
            helper.make_node("Wrapped", names, ["wrapped"], domain="mine"),
            plain,
            helper.make_node("Sum", ["chosen", "wrapped", "plain"], ["out"]),
        ],
        "g",
        [*gated.graph.input, helper.make_tensor_value_info("flag", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", "time", 4])],
    )
    opsets = [helper.make_opsetid("", 19), helper.make_opsetid("mine", 1)]
    model = add_functions(helper.make_model(graph, functions=[wrapper], ir_version=9, opset_imports=opsets))
    case = ScanCase(2, 5, 4, 2, None, gated=True, stateful=False, softplus=False)
    feeds = scan_arrays(case)
    ungated = {name: x for name, x in feeds.items() if name != "z"}
    wide = [torch.from_numpy(ungated[t.name]).double() for t in SELECTIVE_SCAN.inputs[:7]]
    z = torch.from_numpy(feeds["z"]).double()
    y = selective_scan_ref(*wide)
    for library in (False, True):
        got = run(model, {**feeds, "flag": np.array(True)}, library=library)
        assert_close(got, [(y + 2 * y * z * torch.sigmoid(z)).numpy()])


@pytest.mark.parametrize("body", ["scan", "blocks"])
def test_one_body_serves_convolutions_with_states(body):
    """Of other widths, directions and types, over fewer steps than the widest one remembers."""
    kinds = [(6, 4, False, "float32"), (3, 2, True, "float16"), (5, 7, True, "float32")]
    models = [
        conv_model(channel, width, reverse=reverse, dtype=dtype, stateful=True, functions=False)
        for channel, width, reverse, dtype in kinds
    ]
    model = add_functions(join(*models), body)
    (function,) = model.functions
    assert (list(function.input)[3:], list(function.output)) == (["initial_state"], ["y", "last_state"])
    for time in (1, 2, 9):
        feeds, want = {}, []
        for i, (channel, width, reverse, dtype) in enumerate(kinds):
            case = ConvCase(2, time, channel, width, dtype, True, reverse, stateful=True)
            own = conv_arrays(case)
            feeds.update({f"{name}{i}": x for name, x in own.items()})
            want += conv_oracle(case, own)
        for library in (False, True):
            got = run(model, feeds, library=library)
            for g, w in zip(got, want, strict=True):
                assert_close([g], [w])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("width", [2, 4, 6])
def test_a_convolution_in_pieces_is_the_whole(width, reverse):
    """Bit for bit, by the kernel and by the function."""
    case = ConvCase(2, 11, 19, width, reverse=reverse, stateful=True)
    feeds, model = conv_arrays(case), conv_model(19, width, reverse=reverse, stateful=True)
    scanned = feeds["x"][:, ::-1] if reverse else feeds["x"]
    for library in (True, False):
        whole, last = run(model, feeds, library=library)
        state, pieces = feeds["initial_state"], []
        for start, end in itertools.pairwise((0, 1, 2, 7, 11)):
            x = np.ascontiguousarray(scanned[:, start:end][:, :: -1 if reverse else 1])
            y, state = run(model, {**feeds, "x": x, "initial_state": state}, library=library)
            pieces.append(y[:, :: -1 if reverse else 1])
        joined = np.concatenate(pieces, 1)[:, :: -1 if reverse else 1]
        np.testing.assert_array_equal(state, last)
        np.testing.assert_array_equal(joined, whole)


@pytest.mark.parametrize("body", ["scan", "blocks"])
def test_convolutions_with_states_and_without_share_one_function(body):
    """The ones without get zeros; of a width of 1 there are none to give."""
    cases = [ConvCase(2, 5, 6, 4, stateful=True), ConvCase(2, 5, 3, 2, silu=False, reverse=True), ConvCase(2, 5, 4, 7)]
    model, feeds, want = join(*(model_of(case, functions=False) for case in cases)), {}, []
    for i, case in enumerate(cases):
        own = conv_arrays(case)
        feeds.update({f"{name}{i}": x for name, x in own.items()})
        want += conv_oracle(case, own)[: 1 + case.stateful]
    add_functions(model, body)
    assert len(model.functions) == 1
    for library in (False, True):
        assert_all_close(run(model, feeds, library=library), want)
    narrow = join(*(model_of(case, functions=False) for case in (cases[0], ConvCase(2, 5, 4, 1))))
    with pytest.raises(InputError, match=r"node 'node1' has width 1, expected at least 2 in a model"):
        add_functions(narrow)


def test_functions_are_made_anew_and_stripped():
    model = scan_model(4, 2)
    other = helper.make_function(
        "other", "Twice", ["x"], ["y"], [helper.make_node("Add", ["x", "x"], ["y"])], [helper.make_opsetid("", 19)]
    )
    model.functions.append(other)
    before = model.SerializeToString(deterministic=True)
    assert sorted(f.name for f in add_functions(model).functions) == ["SelectiveScan", "Twice"]
    again = add_functions(copy.deepcopy(model))
    assert again.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)
    assert len(before) == len(model.SerializeToString(deterministic=True))
    assert [f.name for f in strip_functions(model).functions] == ["Twice"]
    assert [e.domain for e in model.opset_import] == ["", "hcmen"]
    assert model.graph.node[0].op_type == "SelectiveScan"


def test_a_model_of_no_such_node_stays_as_it_is():
    node = helper.make_node("Relu", ["x"], ["y"])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    model = helper.make_model(
        helper.make_graph([node], "g", values[:1], values[1:]), opset_imports=[helper.make_opsetid("", 19)]
    )
    before = model.SerializeToString(deterministic=True)
    assert add_functions(model).SerializeToString(deterministic=True) == before


def test_the_body_uses_what_every_runtime_reads():
    """One Scan, its axes counted from the front; standard operators alone; no value used before it is made."""
    (function,) = scan_model(8, 4, delta_softplus=True, gated=True, stateful=True).functions
    assert {node.domain for node in function.node} == {""}
    (scan,) = (node for node in function.node if node.op_type == "Scan")
    attributes = {a.name: a for a in scan.attribute}
    for name in ("scan_input_axes", "scan_output_axes"):
        assert min(attributes[name].ints) >= 0
    for name in ("scan_input_directions", "scan_output_directions"):
        assert attributes[name].ref_attr_name == name
    known = {*function.input}
    for node in function.node:
        assert known.issuperset(node.input), node
        known.update(node.output)
    assert known.issuperset(function.output)


# --- completing nodes -------------------------------------------------------------------------------------------------


def test_missing_attributes_are_written_out():
    model = scan_model(4, 2, reverse=True, functions=False)
    node = model.graph.node[0]
    full = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("reverse", 1))
    add_functions(model)
    assert {a.name: helper.get_attribute_value(a) for a in node.attribute} == full


@pytest.mark.parametrize("reverse", [False, True])
def test_conv_attributes_come_from_the_shape_of_the_weight(reverse):
    rng = np.random.default_rng(4)
    model = conv_model(5, 3, reverse=reverse, functions=False)
    node = model.graph.node[0]
    for i in reversed(range(len(node.attribute))):
        if node.attribute[i].name in ("group", "pads"):
            del node.attribute[i]
    weight = rng.normal(size=(5, 3)).astype(np.float32)
    unknown = copy.deepcopy(model)
    unknown.graph.input[1].type.tensor_type.ClearField("shape")
    with pytest.raises(InputError, match="'group' is missing and the shape of its weight is unknown"):
        add_functions(unknown)
    del model.graph.input[1]
    model.graph.initializer.append(numpy_helper.from_array(weight, "weight"))
    add_functions(model)
    feeds = {"x": rng.normal(size=(2, 6, 5)).astype(np.float32), "bias": rng.normal(size=5).astype(np.float32)}
    x, bias = (torch.from_numpy(feeds[name]) for name in ("x", "bias"))
    want = causal_conv1d_ref(x, torch.from_numpy(weight), bias, reverse=reverse).numpy()
    assert_close(run(model, feeds), [want])


def test_nodes_in_subgraphs_and_functions_count():
    """An If whose branches hold nodes, one of them inside another function; weights come from the outer graph."""
    rng = np.random.default_rng(5)
    inner = conv_model(4, 2, functions=False).graph.node[0]
    then_node, else_node = copy.deepcopy(inner), copy.deepcopy(inner)
    then_node.name, else_node.name = "then", "else"
    for node, flip in ((then_node, 0), (else_node, 1)):
        del node.attribute[:]
        node.attribute.extend([helper.make_attribute("reverse", flip), helper.make_attribute("activation", "silu")])
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "time", 4])
    branches = [helper.make_graph([node], name, [], [value]) for name, node in (("a", then_node), ("b", else_node))]
    choose = helper.make_node("If", ["flag"], ["y"], then_branch=branches[0], else_branch=branches[1])
    wrapped = copy.deepcopy(inner)
    wrapped.output[0], wrapped.input[0] = "twice", "once"
    wrapper = helper.make_function(
        "mine", "Wrapped", ["once", "weight", "bias"], ["twice"], [wrapped], [helper.make_opsetid("", 19)]
    )
    call = helper.make_node("Wrapped", ["y", "weight", "bias"], ["out"], domain="mine")
    values = [
        helper.make_tensor_value_info(n, t, s)
        for n, t, s in (("flag", TensorProto.BOOL, []), ("x", TensorProto.FLOAT, ["batch", "time", 4]))
    ]
    weights = [rng.normal(size=(4, 2)).astype(np.float32), rng.normal(size=4).astype(np.float32)]
    graph = helper.make_graph(
        [choose, call],
        "g",
        values,
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", "time", 4])],
        [numpy_helper.from_array(w, n) for n, w in zip(("weight", "bias"), weights, strict=True)],
    )
    model = helper.make_model(
        graph,
        functions=[wrapper],
        ir_version=9,
        opset_imports=[helper.make_opsetid("", 19), helper.make_opsetid("mine", 1)],
    )
    add_functions(model)
    assert [f.name for f in model.functions] == ["Wrapped", "CausalConv1d"]
    x = rng.normal(size=(2, 5, 4)).astype(np.float32)
    for flag, library in itertools.product((True, False), (False, True)):
        first = causal_conv1d_ref(torch.from_numpy(x), *map(torch.from_numpy, weights), reverse=not flag)
        want = causal_conv1d_ref(first, *map(torch.from_numpy, weights)).numpy()
        assert_close(run(model, {"x": x, "flag": np.array(flag)}, library=library), [want])


def edited(model, edit):
    edit(model.graph.node[0])
    return model


def put(name, value):
    def edit(node):
        for i in reversed(range(len(node.attribute))):
            if node.attribute[i].name == name:
                del node.attribute[i]
        node.attribute.append(helper.make_attribute(name, value))

    return edit


def by_reference(node):
    node.attribute[-1].Clear()
    node.attribute[-1].name, node.attribute[-1].ref_attr_name = "reverse", "other"
    node.attribute[-1].type = onnx.AttributeProto.INT


@pytest.mark.parametrize(
    ("op", "edit", "message"),
    [
        (scan_model, lambda n: n.input.pop(), r"has 6 inputs, expected 7: u, delta, A, B, C, D, delta_bias"),
        (scan_model, lambda n: n.input.append("u"), r"has 8 inputs, expected 7"),
        (scan_model, lambda n: n.output.append("last"), r"has 2 outputs, expected 1: y"),
        (scan_model, lambda n: n.input.__setitem__(5, ""), r"'D' is left out by an empty name"),
        (scan_model, put("gated", 1), r"has 7 inputs, expected 8: .*, z"),
        (scan_model, put("stateful", 1), r"has 7 inputs, expected 8: .*, initial_state"),
        (scan_model, put("reverse", 2), r"attribute 'reverse' is 2, expected 0 or 1"),
        (scan_model, put("delta_softplus", 1.0), r"attribute 'delta_softplus' is 1.0, expected 0 or 1"),
        (scan_model, put("gated", "yes"), r"attribute 'gated' is 'yes', expected 0 or 1"),
        (scan_model, put("scan_input_directions", [1] * 4), r"is \[1, 1, 1, 1\], expected \[0, 0, 0, 0\]"),
        (scan_model, put("scan_output_directions", [1]), r"'scan_output_directions' is \[1\], expected \[0\]"),
        (scan_model, by_reference, r"attribute 'reverse' is bound by reference"),
        (scan_model, lambda n: setattr(n, "op_type", "Scan"), r"unknown operator, expected SelectiveScan or Causal"),
        (conv_model, put("activation", "relu"), r"attribute 'activation' is 'relu', expected 'none' or 'silu'"),
        (conv_model, put("group", 3), r"attribute 'group' is 3, expected 4"),
        (conv_model, put("pads", [0, 1]), r"attribute 'pads' is \[0, 1\], expected \[1, 0\]"),
        (conv_model, lambda n: n.input.pop(), r"has 2 inputs, expected 3: x, weight, bias"),
        (conv_model, put("stateful", 1), r"has 3 inputs, expected 4: x, weight, bias, initial_state"),
        (conv_model, put("stateful", 2), r"attribute 'stateful' is 2, expected 0 or 1"),
        (conv_model, lambda n: n.output.append("last"), r"has 2 outputs, expected 1: y"),
    ],
)
def test_a_node_that_is_not_as_specified_is_refused(op, edit, message):
    with pytest.raises(InputError, match=message) as error:
        add_functions(edited(op(4, 2, functions=False), edit))
    assert "node 'node'" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_convolution_of_width_1_has_no_state():
    with pytest.raises(InputError, match=r"node 'node' has width 1, expected at least 2 in a model"):
        conv_model(4, 1, stateful=True)


def test_the_shipped_graphs_keep_their_bytes():
    """What add_functions makes of their nodes today is what they carry."""
    graphs = sorted((Path(CONV_MODEL).parents[1] / "demo" / "bundle").glob("*.onnx"))
    assert len(graphs) == 7
    for path in graphs:
        model = onnx.load(path)
        assert len(model.functions) == 2
        given = {f.name: f.SerializeToString(deterministic=True) for f in model.functions}
        nodes = [n.SerializeToString(deterministic=True) for n in model.graph.node]
        add_functions(model)
        assert {f.name: f.SerializeToString(deterministic=True) for f in model.functions} == given
        assert [n.SerializeToString(deterministic=True) for n in model.graph.node] == nodes


def test_an_old_opset_and_an_unknown_body_are_refused():
    model = scan_model(4, 2, functions=False)
    with pytest.raises(InputError, match="unknown scan body 'cumsum': choose from scan"):
        add_functions(model, scan_body="cumsum")
    model.opset_import[0].version = 14
    with pytest.raises(InputError, match="opset is 14, expected 15 or later"):
        add_functions(model)
    del model.opset_import[0]
    with pytest.raises(InputError, match="opset is none"):
        add_functions(model)


def test_the_committed_models_are_those_the_script_writes():
    written = MODEL.read_bytes(), CONV_MODEL.read_bytes(), DUAL_MODEL.read_bytes()
    models = (selfcheck_model(), selfcheck_conv_model(), selfcheck_dual_model())
    made = (m.SerializeToString(deterministic=True) for m in models)
    assert written == tuple(made)
    feeds = selfcheck_inputs()
    assert_scan(ScanCase(), feeds, run(selfcheck_model(), feeds))


# --- somebody else's model --------------------------------------------------------------------------------------------


class Mamba(torch.nn.Module):
    """A block as Mamba models have it, in its shortest form: both directions through one set of weights."""

    def __init__(self, channel=6, state=3, taps=4):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.nn.Parameter(torch.randn(*shape, generator=generator))

        self.sizes = [channel, state, state, channel]
        self.conv_weight, self.conv_bias = normal(channel, taps), normal(channel)
        self.projection = normal(channel, sum(self.sizes))
        self.A_log, self.D, self.dt_bias = normal(channel, state), normal(channel), normal(channel)

    def forward(self, x):
        y = 0.0
        for reverse in (False, True):
            u = causal_conv1d(x, self.conv_weight, self.conv_bias, reverse=reverse)
            delta, B, C, z = (u @ self.projection).split(self.sizes, -1)
            A = -torch.exp(self.A_log)
            y = y + selective_scan(u, delta, A, B, C, self.D, self.dt_bias - 4, z, delta_softplus=True, reverse=reverse)
        return y


@pytest.mark.filterwarnings("ignore")
def test_a_traced_model_runs_with_and_without_the_library():
    model = Mamba().eval()
    dynamic = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("time")},)
    program = torch.onnx.export(
        model, (torch.zeros(2, 5, 6),), dynamo=True, opset_version=19, dynamic_shapes=dynamic, verbose=False
    )
    exported = program.model_proto
    exported.ir_version = 9
    add_functions(exported)
    kinds = [node.op_type for node in exported.graph.node if node.domain == "hcmen"]
    assert sorted(kinds) == ["CausalConv1d", "CausalConv1d", "SelectiveScan", "SelectiveScan"]
    assert len(exported.functions) == 2
    for shape in ((2, 5, 6), (1, 1, 6), (3, 70, 6)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        with implementation("ref"), torch.no_grad():
            want = model.double()(x.double()).numpy()
        model.float()
        for library in (False, True):
            assert_close(run(exported, {exported.graph.input[0].name: x.numpy()}, library=library), [want], 2e-6)


class Continued(torch.nn.Module):
    """A convolution forward from a state, and one backward whose state nobody gives."""

    def __init__(self, channel=6):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = torch.nn.Parameter(torch.randn(2, channel, 4, generator=generator))

    def forward(self, x, state):
        y, last = causal_conv1d(x, self.weights[0], None, state, return_last_state=True)
        z, first = causal_conv1d(x, self.weights[1], reverse=True, return_last_state=True)
        return y, last, z, first, causal_conv1d(x, self.weights[1], None, state)


@pytest.mark.filterwarnings("ignore")
def test_a_traced_model_with_states():
    model, batch = Continued().eval(), torch.export.Dim("batch")
    dynamic = ({0: batch, 1: torch.export.Dim("time")}, {0: batch})
    example = (torch.zeros(2, 5, 6), torch.zeros(2, 3, 6))
    program = torch.onnx.export(model, example, dynamo=True, opset_version=19, dynamic_shapes=dynamic, verbose=False)
    exported = program.model_proto
    exported.ir_version = 9
    add_functions(exported)
    assert [len(n.output) for n in exported.graph.node if n.domain == "hcmen"] == [2, 2, 2]
    names = [value.name for value in exported.graph.input]
    for size, time in ((2, 5), (1, 1), (3, 20)):
        generator = torch.Generator().manual_seed(1)
        feeds = [torch.randn(shape, generator=generator) for shape in ((size, time, 6), (size, 3, 6))]
        with implementation("ref"), torch.no_grad():
            want = [x.numpy() for x in model.double()(*(x.double() for x in feeds))]
        model.float()
        for library in (False, True):
            got = run(exported, dict(zip(names, (x.numpy() for x in feeds), strict=True)), library=library)
            for g, w in zip(got, want, strict=True):
                assert_close([g], [w])


def test_the_examples_of_the_specification_run(tmp_path):
    """The Python of docs/op.md, block by block, each in a process of its own as a reader would."""
    text = (Path(__file__).parents[2] / "docs" / "op.md").read_text()
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    assert len(blocks) == 2
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-1000:]
    assert done.stdout == "(1, 100, 64)\n" * 2
