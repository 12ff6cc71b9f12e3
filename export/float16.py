"""Float16 for an exported graph: the precision is written into the graph itself, as strongly typed networks want it.

TensorRT 11 knows strongly typed networks only, and 10.x has them on request: every tensor has the type that the graph
gives it, and the builder may not choose another. So the graph has to say where float16 is used. `to_float16` does that
by one rule per kind of operator, in the manner of PyTorch's autocast:

    float16   products with weights (MatMul, Gemm, Conv), and the activations of SelectiveScan and CausalConv1d
    float32   A, D, delta_bias, states and convolution weights of those two ops (docs/op.md); norms, softmax, exp,
              reductions, and everything not named here
    follow    what moves values or works element by element has the type of what comes in, float32 where both meet

and two exceptions. Products of two activations stay float32: they are small (over tokens), and cosine similarities are
scaled by up to 100 before their softmax, where half precision would cost percents. And the last product before an
output stays float32, so that scores are not rounded to float16's steps of 2e-3.

Graph inputs and outputs keep their types. The op functions in the model are left as they are, since they compute in
float32 whatever they are given.

The converters at hand do not serve: those of onnxconverter-common and onnxruntime.transformers convert a custom op's
inputs all or none, and ModelOpt, which can tell them apart, needs a GPU stack of its own. This one needs onnx and NumPy
alone, as it runs on the device.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from hcmen.base.errors import InputError, reason_of
from hcmen.base.op import DOMAIN, OPERATORS

__all__ = ["drop_unused", "half_weights", "last_products", "set_nodes", "to_float16"]

# Of these the inputs at the places named are float16; all other inputs, and all other operators, see below.
_PRODUCTS = {"MatMul": (0, 1), "Gemm": (0, 1, 2), "Conv": (0, 1, 2)}
# Values pass through unchanged: place of the inputs whose type the outputs have.
_CARRIERS = {
    **dict.fromkeys(("Transpose", "Reshape", "Split", "Slice", "Squeeze", "Unsqueeze", "Expand", "Identity"), (0,)),
    **dict.fromkeys(("Gather", "Flatten", "Tile"), (0,)),
}
# Element by element, none of which is worse in float16 than its rounded inputs make it.
_ELEMENTWISE = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Min", "Max"), (0, 1)),
    **dict.fromkeys(("Relu", "Neg"), (0,)),
    "Where": (1, 2),
}
_LARGEST = float(np.finfo(np.float16).max)
# Weights of fewer numbers stay float32: a file of them gains nothing.
_LEAST_HALVED = 64
_SMALLEST = float(np.finfo(np.float16).smallest_normal)


def to_float16(model: ModelProto) -> ModelProto:
    """A copy of `model`, an exported graph with its weights inside, that computes in float16 where that is safe.

    Raises:
        InputError: a weight is beyond float16, a weight is not in the model, or the graph is of a kind that export does
            not write (a subgraph, types that cannot be inferred).
    """
    return _Converter(model).convert()


def half_weights(model: ModelProto, keep: Collection[str] = ()) -> ModelProto:
    """A copy of `model`, its weights inside, that stores the weights of products and its tables as float16.

    It computes in float32 as before: a Cast widens each weight, which ONNX Runtime does once, when it loads the graph
    (constant folding), and of a table the rows that are looked up. Everything else keeps its float32: statistics of the
    features may be beyond float16, and the rest is small.

    Args:
        keep: names of weights that stay float32, too.

    Raises:
        InputError: a weight is beyond float16, or not in the model.
    """
    made = ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    readers: dict[str, list[tuple[NodeProto, int]]] = {}
    for node in graph.node:
        for place, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, place))
    outputs = {o.name for o in graph.output}
    casts: list[NodeProto] = []
    after: dict[str, NodeProto] = {}
    for tensor in graph.initializer:
        own = readers.get(tensor.name, [])
        multiplied = any(place in _PRODUCTS.get(node.op_type, ()) and node.domain == "" for node, place in own)
        looked_up = bool(own) and all(node.op_type == "Gather" and place == 0 for node, place in own)
        if (
            tensor.data_type != TensorProto.FLOAT
            or tensor.name in outputs
            or tensor.name in keep
            or not (multiplied or looked_up)
            or np.prod(tensor.dims) < _LEAST_HALVED
        ):
            continue
        values = _values(tensor)
        largest = float(np.abs(values).max())
        if not largest <= _LARGEST:
            raise InputError(
                f"weight '{tensor.name}' holds {largest:.3g}, float16 ends at {_LARGEST:.0f}: export with "
                "--precision fp32"
            )
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_float16"))
        if multiplied:
            casts.append(helper.make_node("Cast", [tensor.name], [name], f"{name}_float32", to=TensorProto.FLOAT))
            continue
        for node, _ in own:
            node.input[0] = tensor.name
            rows = f"{node.output[0]}_float16"
            after[rows] = helper.make_node("Cast", [rows], [node.output[0]], rows, to=TensorProto.FLOAT)
            node.output[0] = rows
    set_nodes(graph, [*casts, *(n for node in graph.node for n in (node, after.get(node.output[0])) if n is not None)])
    return made


def set_nodes(graph: onnx.GraphProto, nodes: Sequence[NodeProto]) -> None:
    """Makes `nodes`, some of which may be the graph's own, the nodes of `graph`."""
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


class _Converter:
    """One conversion. `half` holds the float values that are float16 in the new graph; all others are float32."""

    def __init__(self, model: ModelProto):
        self.model = ModelProto()
        self.model.CopyFrom(model)
        self.types = _types(model)
        self.weights = {t.name: t for t in self.model.graph.initializer}
        self.producer = {name: node for node in self.model.graph.node for name in node.output}
        self.half: set[str] = set()
        self.made: dict[tuple[str, int], str] = {}
        self.nodes: list[NodeProto] = []
        self.new_weights: list[TensorProto] = []
        self.exact = last_products(self.model, self.producer)

    def convert(self) -> ModelProto:
        for node in self.model.graph.node:
            if any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute):
                raise InputError(
                    f"node '{node.name}' ({node.op_type}) holds a graph of its own, which has no float16 form"
                )
            self._convert(node)
        graph = self.model.graph
        for output in graph.output:
            if output.name in self.half:
                self._restore(output.name)
        del graph.node[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend(self.new_weights)
        drop_unused(graph)
        return self.model

    def _convert(self, node: NodeProto) -> None:
        wanted = self._half_inputs(node)
        outputs_half = wanted is not None
        wanted = wanted or ()
        inputs = [
            self._as(name, half=place in wanted) if self._is_float(name) else name
            for place, name in enumerate(node.input)
        ]
        made = NodeProto()
        made.CopyFrom(node)
        del made.input[:]
        made.input.extend(inputs)
        self.nodes.append(made)
        if outputs_half:
            narrow = 1 if node.domain == DOMAIN else len(node.output)  # states stay float32
            self.half.update(name for name in node.output[:narrow] if self._is_float(name))

    def _half_inputs(self, node: NodeProto) -> tuple[int, ...] | None:
        """The places of the inputs that are float16 in the new graph; None for a node that stays float32."""
        if node.domain == DOMAIN and node.op_type in OPERATORS:
            given = OPERATORS[node.op_type].inputs_with({a.name: a.i for a in node.attribute})
            return tuple(place for place, tensor in enumerate(given) if tensor.shared)
        if node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type in _PRODUCTS:
            with_weights = any(name in self.weights for name in node.input)
            if not with_weights or node.output[0] in self.exact:
                return None
            for name in node.input:
                if name in self.weights:
                    self._check_range(node, name)
            return _PRODUCTS[node.op_type]
        places = _CARRIERS.get(node.op_type) or _ELEMENTWISE.get(node.op_type)
        if node.op_type == "Concat":
            places = tuple(range(len(node.input)))
        if places is None:
            return None
        floats = [node.input[i] for i in places if i < len(node.input) and self._is_float(node.input[i])]
        settled = [name for name in floats if not self._is_free(name)]
        return tuple(places) if settled and all(name in self.half for name in settled) else None

    def _is_float(self, name: str) -> bool:
        return bool(name) and self.types.get(name) == TensorProto.FLOAT

    def _is_free(self, name: str) -> bool:
        """Whether the value is as good in float16: a constant that it holds, or a mask made from booleans."""
        if name in self.weights:
            values = np.abs(_values(self.weights[name]))
            return bool(np.all((values == 0) | ((values >= _SMALLEST) & (values <= _LARGEST))))
        node = self.producer.get(name)
        return node is not None and node.op_type == "Cast" and self.types.get(node.input[0]) == TensorProto.BOOL

    def _check_range(self, node: NodeProto, name: str) -> None:
        largest = float(np.abs(_values(self.weights[name])).max(initial=0.0))
        if not largest <= _LARGEST:
            raise InputError(
                f"weight '{name}' of {node.op_type} '{node.name}' holds {largest:.3g}, float16 ends at {_LARGEST:.0f}: "
                "compile with --precision fp32"
            )

    def _as(self, name: str, *, half: bool) -> str:
        """The name under which the float value `name` is there in the type asked for."""
        if half == (name in self.half):
            return name
        kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        key = (name, kind)
        if key not in self.made:
            self.made[key] = self._fresh(f"{name}_{'float16' if half else 'float32'}")
            if name in self.weights:
                narrowed = _values(self.weights[name]).astype(np.float16)
                self.new_weights.append(numpy_helper.from_array(narrowed, self.made[key]))
            else:
                source = self.producer[name].input[0] if self._is_free(name) else name
                self.nodes.append(helper.make_node("Cast", [source], [self.made[key]], self.made[key], to=kind))
        return self.made[key]

    def _restore(self, output: str) -> None:
        """Gives the graph output `output`, which became float16, its name and type back."""
        inner = self._fresh(f"{output}_float16")
        for node in self.nodes:
            for names in (node.input, node.output):
                for i, name in enumerate(names):
                    if name == output:
                        names[i] = inner
        self.nodes.append(helper.make_node("Cast", [inner], [output], f"{output}_restored", to=TensorProto.FLOAT))

    def _fresh(self, name: str) -> str:
        while name in self.types:
            name += "_"
        self.types[name] = TensorProto.UNDEFINED
        return name


def _types(model: ModelProto) -> dict[str, int]:
    """The element type of every value of the main graph.

    Raises:
        InputError: one cannot be inferred.
    """
    try:
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
        reason = reason_of(error, 300)
        raise InputError(f"the types of the graph cannot be inferred ({reason}): export the bundle again") from error
    types = {t.name: t.data_type for t in inferred.initializer}
    types |= {v.name: v.type.tensor_type.elem_type for v in (*inferred.input, *inferred.value_info, *inferred.output)}
    for node in model.graph.node:
        for name in (*node.input, *node.output):
            if name and not types.get(name):
                raise InputError(f"the type of '{name}' cannot be inferred: export the bundle again")
    return types


def last_products(model: ModelProto, producer: dict[str, NodeProto]) -> set[str]:
    """The outputs of the products with nothing but simple operators between them and an output of the graph."""
    between = {*_CARRIERS, *_ELEMENTWISE, "Softmax", "Concat"}
    found, open_values = set(), [o.name for o in model.graph.output]
    seen: set[str] = set()
    while open_values:
        name = open_values.pop()
        node = producer.get(name)
        if name in seen or node is None:
            continue
        seen.add(name)
        if node.op_type in _PRODUCTS:
            found.add(name)
        elif node.op_type in between:
            open_values += node.input
    return found


def _values(tensor: TensorProto) -> np.ndarray:
    if tensor.data_location == TensorProto.EXTERNAL:
        raise InputError(f"weight '{tensor.name}' lies outside the model, expected it inside: embed the weights first")
    return numpy_helper.to_array(tensor)


def drop_unused(graph: onnx.GraphProto) -> None:
    """Removes casts and weights that nothing reads any more."""
    used = {o.name for o in graph.output}
    kept: list[NodeProto] = []
    for node in reversed(graph.node):
        if used.intersection(node.output):
            kept.append(node)
            used.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    weights = [t for t in graph.initializer if t.name in used]
    del graph.initializer[:]
    graph.initializer.extend(weights)
