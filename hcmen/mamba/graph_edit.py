"""What rewrites of a graph are made of: constants and shapes of values, new nodes, and values replaced by others.

A shape is a list of sizes: an integer, or the name of a size that is not known before the graph runs. Two values whose
sizes have equal names have equal sizes: torch.onnx.export gives the names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from onnxscript import ir
from onnxscript.ir.passes.common import RemoveUnusedNodesPass

__all__ = ["Array", "Editor", "Size", "attribute", "constant", "is_node", "shape_of", "sweep"]

Size = int | str
Array = np.ndarray[Any, Any]


def shape_of(value: ir.Value | None) -> list[Size] | None:
    """Its sizes, None where its rank or one of its sizes is unknown."""
    if value is None or value.shape is None:
        return None
    sizes: list[Size] = []
    for size in value.shape:
        if isinstance(size, int):
            sizes.append(size)
        elif size.value is None:
            return None
        else:
            sizes.append(size.value)
    return sizes


def constant(value: ir.Value | None) -> Array | None:
    """What it is in every run, None if that is not known."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """The value of an attribute, the default where it is not there."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def is_node(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node of ONNX that makes the value, if it is of this type."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type and node.domain in ("", "ai.onnx") else None


def sweep(model: ir.Model) -> None:
    """Drops identities, nodes and constants that nothing reads."""
    for node in model.graph:
        same = is_node(node.outputs[0], "Identity")
        if same is not None and same.inputs[0] is not None and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(same.inputs[0])
    RemoveUnusedNodesPass()(model)


class Editor:
    """Makes nodes in a graph, before a place, and lets values take the place of others."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._count = 0
        self._constants: dict[Any, ir.Value] = {}
        self._names = {value.name for node in graph for value in node.outputs} | set(graph.initializers)
        self._names |= {node.name for node in graph} | {value.name for value in graph.inputs}

    def constant(self, content: Any, dtype: type | np.dtype[Any] | None = None) -> ir.Value:
        """A constant of the graph; equal ones are one, so that what reads them can be found to be the same."""
        array = np.asarray(content, dtype)
        key = array.dtype, array.shape, array.tobytes() if array.size <= 16 else self._count
        if key in self._constants:
            return self._constants[key]
        name = self._name("constant")
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        self._constants[key] = value
        return value

    def node(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        shapes: Sequence[Sequence[Size] | None] = (None,),
        like: ir.Value | None = None,
        domain: str = "",
    ) -> Sequence[ir.Value]:
        """The outputs of a new node that stands before another.

        shapes: of its outputs, one each. like: a value of the outputs' type, by default the first input.
        """
        made = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=len(shapes), name=self._name("node"))
        kind = (like or next(value for value in inputs if value is not None)).type
        for output, shape in zip(made.outputs, shapes, strict=True):
            output.name = self._name("value")
            output.type = kind
            output.shape = None if shape is None else ir.Shape(shape)
        self.graph.insert_before(before, made)
        return made.outputs

    def transpose(self, before: ir.Node, value: ir.Value, perm: Sequence[int]) -> ir.Value:
        """The value with its axes in the order of perm; the value itself where that is theirs."""
        if list(perm) == list(range(len(perm))):
            return value
        shape = shape_of(value)
        moved = None if shape is None else [shape[axis] for axis in perm]
        return self.node(before, "Transpose", [value], {"perm": list(perm)}, shapes=[moved])[0]

    def flip(self, before: ir.Node, value: ir.Value, axis: int) -> ir.Value:
        """The value from its last index of an axis to its first."""
        first, last, step = [-1], [np.iinfo(np.int64).min + 1], [-1]
        bounds = [self.constant(x, np.int64) for x in (first, last, [axis], step)]
        return self.node(before, "Slice", [value, *bounds], shapes=[shape_of(value)])[0]

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Lets whatever reads `old` read `new`. An output of the graph keeps its name."""
        if old.is_graph_output():
            if new.is_graph_output() or new.producer() is None:
                node = old.producer()
                assert node is not None
                new = self.node(node, "Identity", [new], shapes=[shape_of(new)])[0]
            old.name, new.name = self._name("value"), old.name
        if new.shape is None:
            new.shape = old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)

    def _name(self, kind: str) -> str:
        while True:
            self._count += 1
            name = f"rewritten_{kind}_{self._count}"
            if name not in self._names:
                return name


Rule = Callable[[ir.Node, Editor], bool]
"""Looks at one node and rewrites it and what stands around it: whether it did."""
