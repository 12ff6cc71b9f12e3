"""Nodes of one operator brought to one signature, for hosts that find a function by the name of its operator alone.

What makes a node another function's is taken out of it, into standard operators before and behind it: its gate, its
activation, its softplus. What cannot be taken out is given to all: a node without a state gets zeros, and nothing reads
its last state. So each call stays one node, which the library's kernel runs, and one body serves them all.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, MutableSequence
from typing import Any

from onnx import AttributeProto, ModelProto, NodeProto, helper

from hcmen.base.op import DOMAIN, OPERATORS, Operator
from hcmen.mamba.scan_bodies import Body, silu, softplus

__all__ = ["COMMON", "unify"]

COMMON: Mapping[str, int | str] = {"gated": 0, "stateful": 1, "delta_softplus": 0, "activation": "none"}
"""Attribute -> what nodes have that differ in it: the value which every node can be brought to."""
_STEPS = {"delta": "delta_bias", "dt": "dt_bias"}
"""Step sizes -> what is added to them before the softplus."""


def unify(model: ModelProto, wanted: Mapping[str, Mapping[str, Any]], opset: int) -> None:
    """Rewrites nodes of `model`, in place, until all of an operator have the attributes that are wanted of them.

    Args:
        model: its nodes have all their attributes.
        wanted: operator -> attribute -> value, the node's own or that of `COMMON`.
        opset: of standard operators, for functions that have none so far.
    """
    names = set(_names(model.graph.node)).union(*(_names(function.node) for function in model.functions))
    names |= {value.name for value in (*model.graph.input, *model.graph.initializer)}
    mark = next(m for i in itertools.count() if not any((m := f"_one{i}_") in name for name in names))
    counter = itertools.count()
    _unify_nodes(model.graph.node, wanted, mark, counter)
    for function in model.functions:
        changed = _unify_nodes(function.node, wanted, mark, counter)
        if changed and all(entry.domain not in ("", "ai.onnx") for entry in function.opset_import):
            function.opset_import.append(helper.make_opsetid("", opset))


def _inner(node: NodeProto) -> list[Any]:
    graphs = [g for attribute in node.attribute for g in attribute.graphs]
    return graphs + [attribute.g for attribute in node.attribute if attribute.type == AttributeProto.GRAPH]


def _names(nodes: Any) -> Any:
    for node in nodes:
        yield from (*node.input, *node.output)
        for graph in _inner(node):
            yield from (value.name for value in (*graph.input, *graph.initializer))
            yield from _names(graph.node)


def _unify_nodes(
    nodes: MutableSequence[NodeProto], wanted: Mapping[str, Mapping[str, Any]], mark: str, counter: Any
) -> bool:
    """Whether any of `nodes`, or of what is inside them, was rewritten."""
    made: list[NodeProto] = []
    changed = False
    for node in nodes:
        inner = [_unify_nodes(graph.node, wanted, mark, counter) for graph in _inner(node)]
        values = {a.name: helper.get_attribute_value(a) for a in node.attribute} if node.domain == DOMAIN else {}
        values = {name: v.decode() if isinstance(v, bytes) else v for name, v in values.items()}
        own = wanted.get(node.op_type, {}) if node.domain == DOMAIN else {}
        apart = {
            name: value
            for name, value in own.items()
            if values.get(name, OPERATORS[node.op_type].defaults[name]) != value
        }
        made += _rewritten(node, values, apart, f"{mark}{next(counter)}_") if apart else [node]
        changed = changed or bool(apart) or any(inner)
    if changed:
        made = [_copy(node) for node in made]  # what is taken out of the list is gone
        del nodes[:]
        nodes.extend(made)
    return changed


def _copy(node: NodeProto) -> NodeProto:
    copied = NodeProto()
    copied.CopyFrom(node)
    return copied


def _rewritten(node: NodeProto, values: dict[str, Any], apart: Mapping[str, Any], suffix: str) -> list[NodeProto]:
    """The node with the attributes `apart`, and what goes before and behind it: its outputs stay what they are."""
    op = OPERATORS[node.op_type]
    inputs = dict(zip((t.name for t in op.inputs_with(values)), node.input, strict=True))
    outputs = dict(zip((t.name for t in op.outputs_with(values)), node.output, strict=True))
    before = Body(suffix)
    behind, y = Body(suffix, used=before.used), outputs["y"]
    if "delta_softplus" in apart:
        step = next(name for name in inputs if name in _STEPS)
        bias = inputs[_STEPS[step]]
        soft = softplus(before, before.op("Add", before.float32(inputs[step]), bias, name="step"))
        inputs[_STEPS[step]] = before.op("ConstantOfShape", before.op("Shape", bias), name="no_bias")
        inputs[step] = before.op("CastLike", soft, inputs[step], name="softplus")
    if "stateful" in apart:
        state = next(t for t in op.inputs if t.only_with == "stateful")
        sizes = [_size(before, op, inputs, name) for name in state.sizes]
        shape = before.op("Concat", *sizes, axis=0, name="state_shape")
        inputs[state.name] = before.op("ConstantOfShape", shape, name="first_state")
        outputs[next(t.name for t in op.outputs if t.only_with == "stateful")] = before.fresh("last_state")
    if "gated" in apart or "activation" in apart:
        outputs["y"] = before.fresh("y")
        wide = behind.float32(outputs["y"])
        if "gated" in apart:
            found = behind.op("Mul", wide, silu(behind, behind.float32(inputs.pop("z"))), name="gated")
        else:
            found = silu(behind, wide)
        behind.nodes.append(helper.make_node("CastLike", [found, outputs["y"]], [y]))
    made = _copy(node)
    values = {**values, **apart}
    made.input[:] = [inputs[t.name] for t in op.inputs_with(values)]
    made.output[:] = [outputs[t.name] for t in op.outputs_with(values)]
    kept = [attribute for attribute in node.attribute if attribute.name not in apart]
    del made.attribute[:]
    made.attribute.extend(kept)
    made.attribute.extend(helper.make_attribute(name, value) for name, value in apart.items())
    return [*before.nodes, made, *behind.nodes]


def _size(body: Body, op: Operator, inputs: Mapping[str, str], name: str) -> str:
    """The size called `name` of a node with these inputs, as a tensor of one integer."""
    base, _, less = name.partition(" - ")
    for tensor in op.inputs:
        if tensor.only_with is None and base in tensor.sizes:
            axis = tensor.sizes.index(base)
            if "group" not in tensor.sizes[:axis]:
                size = body.sizes(inputs[tensor.name], axis, axis + 1)
            elif axis == len(tensor.sizes) - 1:
                size = body.op("Shape", inputs[tensor.name], start=-1, name="sizes")
            else:
                continue
            return body.op("Sub", size, body.ints(int(less)), name="size") if less else size
    raise AssertionError(f"{op.name}: no input says how large {name} is")
