"""Int8 for an exported graph: products with weights become products of integers, by ONNX Runtime's own tools.

A linear layer `x @ W` is written as ONNX's standard QuantizeLinear and DequantizeLinear around the MatMul, which every
ONNX Runtime from 1.17 on fuses into one integer product and which any other runtime can compute as it stands:

    x   uint8, one scale and zero point per tensor, from the range that `activation_ranges` saw on clips
    W   int8, one scale per column, zero point 0, in [-64, 64]

The ranges are fixed at export instead of taken from each input (ONNX Runtime's "dynamic" quantisation), because a range
taken from the input is taken from the whole batch: a clip's score would depend on its padding and on its batch mates.
The benchmark (docs/results/precision.json) has both. Weights use 7 of 8 bits because AVX2 without VNNI adds two
products of uint8 and int8 in 16 bits, which saturate: ONNX Runtime's kernel is then wrong by as much as the largest
output (seen on an emulated Haswell, tests/export/test_export_precision.py). 255 * 64 * 2 fits. Uint8 weights would need
no such care and are not faster than float32.

The convolutions of the CNN blocks are treated alike, and what they give is rounded to uint8 as well. Left in float:
products with a weight of fewer than `LEAST_DEPTH` rows (slower in int8), products of two activations, and the last
product before an output, as in float16.py. The tables of embeddings, which are looked up and not multiplied with, are
int8 with one scale per row. All other weights of products are stored as float16 (`half_weights`).

The tools are made to work beside custom ops: they get the types that they would infer from us, as their inference stops
at an op that it does not know (onnxruntime#23191); they calibrate in a session that has the kernel library; and every
product gets an input of its own, by an Identity, since they would quantise the residual stream that the same value
feeds along with it. The model-local functions stay in the model.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import tempfile
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from hcmen.base.errors import CheckFailed, HcmenError
from hcmen.base.library import library_path
from hcmen.export.float16 import drop_unused, half_weights, last_products, set_nodes

__all__ = ["LEAST_DEPTH", "activation_ranges", "linear_layers", "quantised", "weight_key", "with_layers_of"]

LEAST_DEPTH = 32
"""Rows of the weight of a product that is worth quantising: with 8 the integer product takes 1.6 times as long as the
float one, with 32 the same, with 128 half."""
_LEAST_TABLE = 64  # rows of a table that is worth quantising

# The axis of a weight along which each output has a scale of its own.
_AXIS = {"MatMul": 1, "Conv": 0}

Ranges = Mapping[str, tuple[float, float]]


def linear_layers(model: ModelProto) -> dict[str, str]:
    """{node: weight}, by name, of the products and convolutions that int8 is for, in the order of the graph."""
    weights = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
    producer = {name: node for node in model.graph.node for name in node.output}
    exact = last_products(model, producer)
    found = {}
    for node in model.graph.node:
        weight = weights.get(node.input[1]) if node.op_type in _AXIS and node.domain == "" else None
        if weight is None or node.input[0] in weights or exact.intersection(node.output):
            continue
        product = node.op_type == "MatMul"
        grouped = any(a.name == "group" and a.i != 1 for a in node.attribute)
        depth = weight.dims[0] if product else int(np.prod(weight.dims[1:]))
        if depth >= LEAST_DEPTH and not grouped and (not product or len(weight.dims) == 2):
            found[node.name] = weight.name
    return found


def weight_key(values: np.ndarray[Any, Any]) -> str:
    """What tells a weight from others, in whichever graph it is and under whatever name: a digest of its values."""
    values = np.ascontiguousarray(values)
    return hashlib.sha256(repr((values.dtype.str, values.shape)).encode() + values.tobytes()).hexdigest()[:32]


def activation_ranges(model: ModelProto, batches: Iterable[Mapping[str, np.ndarray[Any, Any]]]) -> Ranges:
    """{tensor: (least, greatest)} of what the linear layers of `model` read, and of what its convolutions give, over
    `batches` of graph inputs.

    Args:
        model: an exported float32 graph, its weights inside. batches: at least one.

    Raises:
        CheckFailed: a value is NaN or infinite.
    """
    from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions
    from onnxruntime.quantization.calibrate import CalibrationDataReader, MinMaxCalibrater

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> Any:
            return next(self.batches, None)

    class Calibrater(MinMaxCalibrater):  # type: ignore[misc]
        def create_inference_session(self) -> None:
            options = SessionOptions()
            options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_BASIC
            options.log_severity_level = 4
            with contextlib.suppress(HcmenError):  # without it the functions in the model do, at length
                options.register_custom_ops_library(str(library_path()))
            self.infer_session = InferenceSession(
                self.augmented_model_path, options, ["CPUExecutionProvider"], enable_fallback=0
            )

    with tempfile.TemporaryDirectory() as folder:
        layers = linear_layers(model)
        prepared, inputs = _with_own_inputs(model, layers)
        seen = dict(inputs)
        for output in _convolved(model, layers):
            seen[output] = f"{output}_to_quantise"
            prepared.graph.node.append(helper.make_node("Identity", [output], [seen[output]], seen[output]))
            prepared.graph.value_info.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
            prepared.graph.value_info.append(helper.make_tensor_value_info(seen[output], TensorProto.FLOAT, None))
        plain = Path(folder) / "model.onnx"
        onnx.save(prepared, plain, save_as_external_data=True, location="weights.bin")
        with _quiet():
            calibrater = Calibrater(
                plain,
                op_types_to_calibrate=["Identity"],
                augmented_model_path=str(Path(folder) / "augmented.onnx"),
                use_external_data_format=True,
            )
            calibrater.augment_graph()
            calibrater.create_inference_session()
            calibrater.collect_data(Reader())
            found = calibrater.compute_data()
    ranges = {}
    for tensor, own in seen.items():
        low, high = (float(np.ravel(x)[0]) for x in found[own].range_value)
        if not (np.isfinite(low) and np.isfinite(high)):
            raise CheckFailed(
                f"'{tensor}' ranges from {low} to {high} on the calibration clips, expected finite numbers"
            )
        ranges[tensor] = (low, high)
    return ranges


def quantised(model: ModelProto, ranges: Ranges) -> tuple[ModelProto, list[str]]:
    """A copy of `model` whose linear layers and tables are int8, and the `weight_key`s of what became it.

    Args:
        model: an exported float32 graph, its weights inside.
        ranges: from `activation_ranges`.

    Raises:
        InputError: a weight that stays in float is beyond float16.
    """
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    layers, tables = linear_layers(model), _tables(model)
    made = ModelProto()
    made.CopyFrom(model)
    if layers:
        made = _quantised_layers(model, layers, ranges)
    scales = [_quantise_table(made.graph, name, weights[name]) for name in tables]
    drop_unused(made.graph)
    return half_weights(made, scales), [
        weight_key(weights[name]) for name in dict.fromkeys([*tables, *layers.values()])
    ]


def with_layers_of(made: ModelProto, model: ModelProto, keep: Collection[str]) -> ModelProto:
    """A copy of `made`, which `quantised` made from `model`, with some of its linear layers in float32 again.

    Args:
        keep: the `weight_key`s of their weights; those of other weights are passed over.
    """
    copy = ModelProto()
    copy.CopyFrom(made)
    if not keep:
        return copy
    weights = {t.name: t for t in model.graph.initializer}
    back = {n: w for n, w in linear_layers(model).items() if weight_key(numpy_helper.to_array(weights[w])) in keep}
    inputs = {node.name: node.input for node in model.graph.node if node.name in back}
    convolved = _convolved(model, back)
    rounded = {node.output[0]: node.input[0] for node in copy.graph.node if node.op_type == "QuantizeLinear"}
    plain = {
        node.output[0]: output
        for node in copy.graph.node
        if node.op_type == "DequantizeLinear" and (output := rounded.get(node.input[0])) in convolved
    }
    for node in copy.graph.node:
        for place, name in enumerate(inputs.get(node.name, node.input)):
            node.input[place] = plain.get(name, name)
    there = {t.name for t in copy.graph.initializer}
    copy.graph.initializer.extend(weights[name] for name in dict.fromkeys(back.values()) if name not in there)
    drop_unused(copy.graph)
    return copy


def _quantised_layers(model: ModelProto, layers: Mapping[str, str], ranges: Ranges) -> ModelProto:
    """A copy of `model` with QuantizeLinear and DequantizeLinear around the nodes `layers`, {node: weight}."""
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import add_infer_metadata

    prepared, own = _with_own_inputs(model, layers)
    add_infer_metadata(prepared)  # what would be inferred is there: the types of the tensors to quantise
    convolved = _convolved(model, layers)
    for output in convolved:
        prepared.graph.value_info.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
    quantities = {**own, **{output: output for output in convolved}}
    limits = {name: tuple(np.array([x], np.float32) for x in ranges[tensor]) for tensor, name in quantities.items()}
    override = {"quant_type": QuantType.QInt8, "symmetric": True, "reduce_range": True}
    axis = {layers[node.name]: _AXIS[node.op_type] for node in model.graph.node if node.name in layers}
    with _quiet():
        quantizer = QDQQuantizer(
            prepared,
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, limits),
            nodes_to_quantize=list(layers),
            nodes_to_exclude=[],
            op_types_to_quantize=list(_AXIS),
            extra_options={
                "OpTypesToExcludeOutputQuantization": ["MatMul"],
                "TensorQuantOverrides": {weight: [{**override, "axis": axis[weight]}] for weight in axis},
            },
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
    made: ModelProto = quantizer.model.model
    del made.metadata_props[:]
    del made.graph.value_info[:]
    made.producer_name, made.producer_version = model.producer_name, model.producer_version
    _without_identities(made.graph, own)
    return made


def _tables(model: ModelProto) -> list[str]:
    """The weights [rows, columns] that are looked up by row and used for nothing else."""
    readers: dict[str, list[bool]] = {}
    for node in model.graph.node:
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        for place, name in enumerate(node.input):
            readers.setdefault(name, []).append(node.op_type == "Gather" and place == 0 and axis == 0)
    return [
        t.name
        for t in model.graph.initializer
        if t.data_type == TensorProto.FLOAT
        and len(t.dims) == 2
        and t.dims[0] >= _LEAST_TABLE
        and all(readers.get(t.name, [False]))
    ]


def _quantise_table(graph: onnx.GraphProto, name: str, values: np.ndarray[Any, Any]) -> str:
    """Makes the table `name` int8; what is looked up is widened and scaled. Returns the name of the rows' scales."""
    largest = np.abs(values).max(axis=1, keepdims=True)
    scale = np.where(largest > 0, largest, 1).astype(np.float32) / np.float32(127)
    rows = numpy_helper.from_array(np.rint(values / scale).astype(np.int8), f"{name}_quantized")
    graph.initializer.extend([rows, numpy_helper.from_array(scale, f"{name}_scale")])
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type != "Gather" or node.input[0] != name:
            nodes.append(node)
            continue
        indices, output = node.input[1], node.output[0]
        for source, target in ((rows.name, f"{output}_quantized"), (f"{name}_scale", f"{output}_scale")):
            nodes.append(helper.make_node("Gather", [source, indices], [target], target))
        wide = f"{output}_widened"
        nodes.append(helper.make_node("Cast", [f"{output}_quantized"], [wide], wide, to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", [wide, f"{output}_scale"], [output], node.name))
    set_nodes(graph, nodes)
    return f"{name}_scale"


def _convolved(model: ModelProto, layers: Collection[str]) -> list[str]:
    """The outputs of the convolutions among the nodes `layers`: an integer convolution rounds them to uint8."""
    return [node.output[0] for node in model.graph.node if node.op_type == "Conv" and node.name in layers]


def _with_own_inputs(model: ModelProto, layers: Collection[str]) -> tuple[ModelProto, dict[str, str]]:
    """A copy of `model` in which the nodes `layers` read their inputs through an Identity; {input: what it gives}."""
    made = ModelProto()
    made.CopyFrom(model)
    own: dict[str, str] = {}
    nodes: list[NodeProto] = []
    for node in made.graph.node:
        if node.name in layers:
            tensor = node.input[0]
            if tensor not in own:
                own[tensor] = f"{tensor}_to_quantise"
                nodes.append(helper.make_node("Identity", [tensor], [own[tensor]], own[tensor]))
                made.graph.value_info.append(helper.make_tensor_value_info(own[tensor], TensorProto.FLOAT, None))
            node.input[0] = own[tensor]
        nodes.append(node)
    set_nodes(made.graph, nodes)
    return made, own


def _without_identities(graph: onnx.GraphProto, own: Mapping[str, str]) -> None:
    """Takes the nodes of `_with_own_inputs` out again."""
    source = {given: tensor for tensor, given in own.items()}
    kept = [n for n in graph.node if not (n.op_type == "Identity" and n.output[0] in source)]
    for node in kept:
        for place, name in enumerate(node.input):
            node.input[place] = source.get(name, name)
    set_nodes(graph, kept)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps off stderr the tools' advice, which is about models of another kind, and NumPy's on NaN."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        logging.root.setLevel(level)
