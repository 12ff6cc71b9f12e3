"""Model-local functions: what `hcmen::SelectiveScan` and `hcmen::CausalConv1d` mean in standard ONNX operators.

A model that carries these functions runs in any ONNX runtime: with the operator library its kernels are used, without
it the runtime puts the function body in the node's place. The operators are specified in docs/op.md.

A function is found by its operator name alone, so one body serves every node of that operator in a model. What may
differ between nodes (the direction, the channel count, the groups of B and C, float32 or float16) is bound by
attribute reference or taken from shapes and types. Nodes that differ in what may not (`gated`, `stateful`,
`delta_softplus`, `activation`) are brought to one signature first: signatures.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, helper

from hcmen.base.errors import InputError, shown, unknown_name
from hcmen.base.op import (
    CAUSAL_CONV1D,
    DOMAIN,
    LATER_ATTRIBUTES,
    PARSER_ATTRIBUTES,
    SELECTIVE_SCAN,
    STATE_SPACE_DUAL,
    VERSION,
    Operator,
)
from hcmen.mamba.dual_bodies import dual_body
from hcmen.mamba.scan_bodies import SCAN_BODIES, Body, silu, softplus
from hcmen.mamba.signatures import COMMON, unify

__all__ = ["SCAN_BODIES", "add_functions", "nodes_of", "strip_functions"]

# CastLike, and Shape with start and end, came with opset 15; functions with IR version 8.
OLDEST_OPSET = 15
OLDEST_IR_VERSION = 8
# A convolution of more taps is not written out tap by tap. Mamba has 2 to 4.
MOST_TAPS = 32


def add_functions(model: ModelProto, scan_body: str = "scan") -> ModelProto:
    """Gives `model` the functions its hcmen nodes need, in place; functions of an earlier call are replaced.

    Nodes are completed on the way: attributes that docs/op.md gives a default, and those the bodies bind (`group` and
    `pads`, the scan directions), are written out where they are missing. Where nodes of an operator differ in what one
    function cannot serve, such as the gate, it is taken out of them, into standard operators beside the node.

    Args:
        model: any model; nodes inside subgraphs and inside other functions count too.
        scan_body: how the bodies are written, one of `SCAN_BODIES`: "scan" for what runs operators one by one, "blocks"
            for what compiles them.

    Returns:
        `model`.

    Raises:
        InputError: a node is not as docs/op.md says, or the model's opset is too old; the message names the node.
    """
    if scan_body not in SCAN_BODIES:
        raise unknown_name("scan body", scan_body, SCAN_BODIES)
    opset = _opset(model)
    signatures: dict[str, dict[str, Any]] = {}
    differ = False
    width, narrow = 1, ""
    for node, shape_of in _nodes(model):
        if node.domain != DOMAIN:
            continue
        if node.op_type not in _COMPLETE:
            raise InputError(
                f"{_label(node)}: unknown operator, expected {' or '.join(_COMPLETE)} in domain '{DOMAIN}'"
            )
        signature = _COMPLETE[node.op_type](node, shape_of)
        own = 1 + sum(n for a in node.attribute if a.name == "pads" for n in a.ints)
        width = max(width, own)
        if node.op_type == CAUSAL_CONV1D.name and own == 1:
            narrow = _label(node)
        common = signatures.setdefault(node.op_type, signature)
        apart = {name: COMMON[name] for name, value in signature.items() if value != common[name]}
        signatures[node.op_type] = common | apart
        differ = differ or bool(apart)
    if narrow and signatures[CAUSAL_CONV1D.name]["stateful"]:
        raise InputError(f"{narrow} has width 1, expected at least 2 in a model with stateful convolutions")
    strip_functions(model)
    if differ:
        unify(model, signatures, opset)
    for op_type, signature in signatures.items():
        model.functions.append(
            _scan_function(opset, scan_body, **signature)
            if op_type == SELECTIVE_SCAN.name
            else _dual_function(opset, scan_body, **signature)
            if op_type == STATE_SPACE_DUAL.name
            else _conv_function(opset, scan_body, width, **signature)
        )
    if signatures:
        model.ir_version = max(model.ir_version, OLDEST_IR_VERSION)
        for holder in (model, *(f for f in model.functions if any(n.domain == DOMAIN for n in _flat(f.node)))):
            if all(entry.domain != DOMAIN for entry in holder.opset_import):
                holder.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    return model


def strip_functions(model: ModelProto) -> ModelProto:
    """Removes the functions of this domain from `model`, in place: a runtime must then have the operator library.

    TensorRT before 10.7 prefers a function to a plugin of the same name; a model for it goes through here.

    Returns:
        `model`.
    """
    for i in reversed(range(len(model.functions))):
        if model.functions[i].domain == DOMAIN:
            del model.functions[i]
    return model


# --- walking a model --------------------------------------------------------------------------------------------------

_Shape = tuple[int | None, ...]
_ShapeOf = Callable[[str], "_Shape | None"]


def _opset(model: ModelProto) -> int:
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if not versions or versions[0] < OLDEST_OPSET:
        got = versions[0] if versions else "none"
        raise InputError(f"the model's opset is {got}, expected {OLDEST_OPSET} or later: export it with a newer opset")
    return int(versions[0])


def nodes_of(model: ModelProto) -> Iterator[NodeProto]:
    """Every node of `model`, those of subgraphs and of functions included."""
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        yield from _flat(nodes)


def _nodes(model: ModelProto) -> Iterator[tuple[NodeProto, _ShapeOf]]:
    """Every node with a look-up of the shapes known where it stands."""
    yield from _graph_nodes(model.graph, {})
    for function in model.functions:
        if function.domain != DOMAIN:
            for node in _flat(function.node):
                yield node, lambda name: None


def _graph_nodes(graph: GraphProto, outer: dict[str, _Shape]) -> Iterator[tuple[NodeProto, _ShapeOf]]:
    shapes = dict(outer)
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.tensor_type.HasField("shape"):
            shapes[value.name] = tuple(
                d.dim_value if d.HasField("dim_value") else None for d in value.type.tensor_type.shape.dim
            )
    shapes.update({tensor.name: tuple(tensor.dims) for tensor in graph.initializer})
    for node in graph.node:
        yield node, shapes.get
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.type == AttributeProto.GRAPH else [])):
                yield from _graph_nodes(inner, shapes)


def _flat(nodes: Any) -> Iterator[NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.type == AttributeProto.GRAPH else [])):
                yield from _flat(inner.node)


# --- completing the nodes ---------------------------------------------------------------------------------------------


def _label(node: NodeProto) -> str:
    return f"{node.op_type} node '{node.name or (node.output[0] if node.output else '')}'"


def _attributes(node: NodeProto, defaults: dict[str, Any]) -> dict[str, Any]:
    """The node's attributes with the defaults of the absent ones; these are written into the node too."""
    values: dict[str, Any] = {}
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            raise InputError(f"{_label(node)}: attribute '{attribute.name}' is bound by reference, expected a value")
        value = helper.get_attribute_value(attribute)
        values[attribute.name] = value.decode(errors="replace") if isinstance(value, bytes) else value
    for name, default in defaults.items():
        if name not in values:
            node.attribute.append(helper.make_attribute(name, default))
            values[name] = default
    return values


def _expect(node: NodeProto, values: dict[str, Any], name: str, allowed: tuple[Any, ...]) -> None:
    if values[name] not in allowed or isinstance(values[name], float):
        want = " or ".join(repr(a) if isinstance(a, str) else str(a) for a in allowed)
        raise InputError(f"{_label(node)}: attribute '{name}' is {shown(values[name])}, expected {want}")


def _kernel_attributes(node: NodeProto, op: Operator) -> dict[str, Any]:
    """The attributes that kernels read, checked, and most of them written into the node where they are missing."""
    written = {name: value for name, value in op.defaults.items() if (op.name, name) not in LATER_ATTRIBUTES}
    values = {**op.defaults, **_attributes(node, {**written, **PARSER_ATTRIBUTES})}
    for attribute in op.attributes:
        if attribute.number is None:
            _expect(node, values, attribute.name, attribute.choices)
        elif not isinstance(values[attribute.name], float) or values[attribute.name] != values[attribute.name]:
            raise InputError(
                f"{_label(node)}: attribute '{attribute.name}' is {shown(values[attribute.name])}, "
                "expected a float that is a number"
            )
    return values


def _expect_names(node: NodeProto, op: Operator, values: dict[str, Any]) -> None:
    for kind, got, tensors in (
        ("inputs", node.input, op.inputs_with(values)),
        ("outputs", node.output, op.outputs_with(values)),
    ):
        want = [tensor.name for tensor in tensors]
        if len(got) != len(want):
            raise InputError(f"{_label(node)} has {len(got)} {kind}, expected {len(want)}: {', '.join(want)}")
        for name, value in zip(want, got, strict=True):
            if not value:
                raise InputError(f"{_label(node)}: '{name}' is left out by an empty name, which a function cannot take")


def _complete_scan(op: Operator, node: NodeProto, shape_of: _ShapeOf) -> dict[str, Any]:
    values = _kernel_attributes(node, op)
    reverse = values["reverse"]
    directions = {"scan_input_directions": [reverse] * 4, "scan_output_directions": [reverse]}
    values = _attributes(node, directions)
    for name, want in directions.items():
        _expect(node, values, name, (want,))
    _expect_names(node, op, values)
    return {name: values[name] for name in ("gated", "stateful", "delta_softplus")}


def _complete_conv(node: NodeProto, shape_of: _ShapeOf) -> dict[str, Any]:
    values = _kernel_attributes(node, CAUSAL_CONV1D)
    _expect_names(node, CAUSAL_CONV1D, values)
    stateful = values["stateful"]
    weight = shape_of(node.input[1])
    if weight is not None and len(weight) == 2 and None not in weight:
        channel, width = weight
        pads = [0, width - 1] if values["reverse"] else [width - 1, 0]  # type: ignore[operator]
        values = _attributes(node, {"group": channel, "pads": pads})
        _expect(node, values, "group", (channel,))
        _expect(node, values, "pads", (pads,))
    for name in ("group", "pads"):
        if name not in values:
            raise InputError(
                f"{_label(node)}: attribute '{name}' is missing and the shape of its weight is unknown: "
                "run shape inference first, or set group to the channel count and pads as docs/op.md says"
            )
    return {"activation": values["activation"], "stateful": stateful}


_COMPLETE: dict[str, Callable[[NodeProto, _ShapeOf], dict[str, Any]]] = {
    SELECTIVE_SCAN.name: partial(_complete_scan, SELECTIVE_SCAN),
    CAUSAL_CONV1D.name: _complete_conv,
    STATE_SPACE_DUAL.name: partial(_complete_scan, STATE_SPACE_DUAL),
}


# --- writing the bodies -----------------------------------------------------------------------------------------------


def _function(op: Operator, opset: int, body: Body, attributes: dict[str, Any], doc: str) -> FunctionProto:
    inputs, outputs = ([t.name for t in side] for side in (op.inputs_with(attributes), op.outputs_with(attributes)))
    return helper.make_function(
        DOMAIN, op.name, inputs, outputs, body.nodes, [helper.make_opsetid("", opset)], body.bound, doc_string=doc
    )


def _scan_function(opset: int, scan_body: str, *, gated: int, stateful: int, delta_softplus: int) -> FunctionProto:
    """All arithmetic in float32; the recurrence runs on [batch, group, channel / group, state].

    B and C of rank 3 are one group of rank 4: reshaping by the state count of A makes both the same.
    """
    body = Body()
    u, delta, B, C = (body.float32(x) for x in ("u", "delta", "B", "C"))
    one, rest = body.ints(1), body.ints(-1)
    batch_time, state = body.sizes("u", 0, 2), body.sizes("A", 1, 2)

    d = body.op("Add", delta, "delta_bias", name="step")
    if delta_softplus:
        d = softplus(body, d)
    # b: batch, t: time, g: group, h: channels of a group, n: state
    B = body.reshape(B, batch_time, rest, one, state)  # [b, t, g, 1, n]
    C = body.reshape(C, batch_time, rest, state, one)  # [b, t, g, n, 1]
    group = body.sizes(B, 2, 3)
    steps = body.reshape(d, batch_time, group, rest, one)  # [b, t, g, h, 1]
    driven = body.reshape(body.op("Mul", d, u, name="driven"), batch_time, group, rest, one)  # [b, t, g, h, 1]
    A = body.reshape("A", group, rest, state)  # [g, h, n]
    state_shape = body.op("Concat", body.sizes("u", 0, 1), body.sizes(A, 0, 3), axis=0, name="state_shape")
    if stateful:
        first = body.op("Reshape", "initial_state", state_shape, name="first_state")
    else:
        first = body.op("ConstantOfShape", state_shape, name="first_state")

    last, y = SCAN_BODIES[scan_body](body, first, steps, driven, B, C, A)

    y = body.op("Reshape", y, body.op("Shape", "u", name="y_shape"), name="scanned")
    y = body.op("Add", y, body.op("Mul", u, "D", name="skip"), name="skipped")
    if gated:
        z = body.float32("z")
        y = body.op("Mul", y, silu(body, z), name="gated")
    body.rename(body.op("CastLike", y, "u", name="narrowed"), "y")
    if stateful:
        shape = body.op("Shape", "initial_state", name="last_shape")
        body.rename(body.op("Reshape", last, shape, name="last"), "last_state")
    return _function(
        SELECTIVE_SCAN,
        opset,
        body,
        {"gated": gated, "stateful": stateful},
        f"Mamba's selective scan in standard operators; gated = {gated}, stateful = {stateful}, "
        f"delta_softplus = {delta_softplus} in every node of this model.",
    )


def _dual_function(opset: int, scan_body: str, **signature: int) -> FunctionProto:
    return _function(
        STATE_SPACE_DUAL,
        opset,
        dual_body(scan_body, **signature),
        signature,
        "Mamba-2's state space dual in standard operators; "
        f"{', '.join(f'{name} = {value}' for name, value in signature.items())} in every node of this model.",
    )


def _conv_function(opset: int, scan_body: str, width: int, *, activation: str, stateful: int) -> FunctionProto:
    """All arithmetic in float32. width: the most that any node has."""
    body = Body()
    x, weight, bias = (body.float32(name) for name in ("x", "weight", "bias"))
    reverse = body.attribute("reverse")
    by_taps = scan_body == "blocks" and width <= MOST_TAPS
    if stateful:
        y = _continued(body, x, weight, bias, reverse, width if by_taps else None)
    elif by_taps:
        y = _taps(body, x, weight, bias, reverse, width)
    else:
        y = _convolved(body, x, weight, bias, reverse)
    if activation == "silu":
        y = silu(body, y)
    body.rename(body.op("CastLike", y, "x", name="narrowed"), "y")
    return _function(
        CAUSAL_CONV1D,
        opset,
        body,
        {"stateful": stateful},
        f"Depthwise causal convolution in standard operators; activation = {activation}"
        f"{', stateful = 1' * stateful} in every node of this model.",
    )


def _convolved(body: Body, x: str, weight: str, bias: str, reverse: str) -> str:
    """A depthwise Conv between two transposes; group and pads come from the node."""
    # Conv slides its kernel forward: it takes tap k, or tap width - 1 - k if reverse.
    zero, one, two = (body.integer(v) for v in (0, 1, 2))
    width = body.op("Gather", body.op("Shape", "weight", name="weight_shape"), one, name="width")
    first = body.op("Mul", reverse, body.op("Sub", width, one, name="last_tap"), name="first_tap")
    stride = body.op("Sub", one, body.op("Mul", two, reverse, name="twice"), name="stride")
    steps = body.op("Mul", stride, body.op("Range", zero, width, one), name="steps")
    taps = body.op("Add", first, steps, name="taps")
    kernel = body.op("Unsqueeze", body.op("Gather", weight, taps, axis=1, name="mirrored"), body.ints(1), name="kernel")
    series = body.op("Transpose", x, perm=[0, 2, 1], name="series")
    series = body.op("Conv", series, kernel, bias, name="convolved")
    body.bind("group", AttributeProto.INT)
    body.bind("pads", AttributeProto.INTS)
    return body.op("Transpose", series, perm=[0, 2, 1], name="channels_last")


def _all_taps(body: Body, weight: str, width: int) -> tuple[str, str]:
    """The taps of a node, which begin with zeros if it has fewer than `width`; and how many it lacks."""
    lacking = body.op("Sub", body.ints(width), body.sizes("weight", 1, 2), name="lacking")
    channel = body.sizes("weight", 0, 1)
    zeros = body.op("ConstantOfShape", body.op("Concat", channel, lacking, axis=0, name="zeros_shape"), name="zeros")
    return body.op("Concat", zeros, weight, axis=1, name="all_taps"), lacking


def _taps(body: Body, x: str, weight: str, bias: str, reverse: str, width: int) -> str:
    """The sum of docs/op.md as it stands there, channels last: a compiler makes one kernel of it."""
    zero, axis, time = body.ints(0), body.ints(1), body.sizes("x", 1, 2)
    weight, _ = _all_taps(body, weight, width)
    behind = body.op("Mul", reverse, body.ints(width - 1), name="behind")
    before = body.op("Sub", body.ints(width - 1), behind, name="before")
    pads = body.op("Concat", zero, before, zero, zero, behind, zero, axis=0, name="pads")
    filled = body.op("Pad", x, pads, name="filled")
    y = bias
    for k in range(width):
        # Tap k sees the filled series from k on, or in reverse from width - 1 - k on.
        start = body.op("Add", body.ints(k), body.op("Mul", reverse, body.ints(width - 1 - 2 * k), name="turned"))
        seen = body.op("Slice", filled, start, body.op("Add", start, time, name="end"), axis, name="seen")
        tap = body.op("Gather", weight, body.integer(k), axis=1, name="tap")
        y = body.op("Add", y, body.op("Mul", seen, tap, name="part"), name="sum")
    return y


def _continued(body: Body, x: str, weight: str, bias: str, reverse: str, width: int | None) -> str:
    """The convolution of what the initial state and x are together, in scanning order; it writes `last_state`.

    width: None for a Conv; the number of taps to write out, for a compiler, see `_taps`.
    """
    directed, axis, time = body.directed(reverse), body.ints(1), body.sizes("x", 1, 2)
    series = body.op("Concat", "initial_state", directed(x), axis=1, name="series")
    last = body.op("Slice", series, time, body.ints(2**31 - 1), axis, name="last")
    if width is None:
        # Without padding, ONNX Runtime's Conv sums in an order that depends on the length: outputs would depend, by a
        # bit, on where a sequence is cut. What the padding adds comes before the outputs, or behind them if reverse.
        kernel = body.op("Unsqueeze", weight, axis, name="kernel")
        y = body.op("Conv", body.op("Transpose", series, perm=[0, 2, 1]), kernel, bias, name="convolved")
        body.bind("group", AttributeProto.INT)
        body.bind("pads", AttributeProto.INTS)
        ahead = body.op("Sub", body.ints(1), reverse, name="ahead")
        start = body.op("Mul", ahead, body.sizes("initial_state", 1, 2), name="start")
        end = body.op("Add", start, time, name="end")
        y = body.op("Transpose", y, perm=[0, 2, 1], name="channels_last")
        y = body.op("Slice", y, start, end, axis, name="new")
    else:
        zero, (weight, lacking) = body.ints(0), _all_taps(body, weight, width)
        pads = body.op("Concat", zero, lacking, *[zero] * 4, axis=0, name="pads")
        filled, y = body.op("Pad", series, pads, name="filled"), bias
        for k in range(width):
            start = body.ints(k)
            seen = body.op("Slice", filled, start, body.op("Add", start, time, name="end"), axis, name="seen")
            tap = body.op("Gather", weight, body.integer(k), axis=1, name="tap")
            y = body.op("Add", y, body.op("Mul", seen, tap, name="part"), name="sum")
    # A compiler does not see that the steps of `series` cancel out: it would hold the state's axis 1 for an open one.
    shape = body.op("Shape", "initial_state", name="last_shape")
    body.rename(body.op("Reshape", last, shape, name="last_steps"), "last_state")
    return directed(y)
