"""What is done to an exported graph before it is written: folding, tidying, weights shared between graphs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnxscript.optimizer
from onnxscript import ir

from hcmen.base.op import IR_VERSION

__all__ = ["fold", "share_weights", "tidy"]

_FOLD_ANY_SIZE = 1 << 40

# Tensors of at least this size go to the shared file. Smaller ones (axes, scalars) stay in the graph, where shape
# inference and constant folding of every runtime find them.
EXTERNAL_MINIMUM_BYTES = 128
# ONNX Runtime maps external data by page; 64 also keeps every tensor on a cache line.
ALIGNMENT_BYTES = 64


def fold(model: ir.Model) -> None:
    """Computes now what depends on weights alone: transposes, halves and -exp(A_log), whatever their size.

    The exporter's own folding stops at tensors of 8 KiB. ONNX Runtime would do the rest at every start, and keep copies
    of its own that no other session shares.
    """
    onnxscript.optimizer.optimize(model, input_size_limit=_FOLD_ANY_SIZE, output_size_limit=_FOLD_ANY_SIZE)


def tidy(exported: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Drops what tracing leaves behind (stack traces with local paths, shapes of every inner tensor, unused weights)
    and states the versions. name: what the graph is called."""
    proto = onnx.ModelProto()
    proto.CopyFrom(exported)
    proto.ir_version = IR_VERSION
    proto.producer_name, proto.producer_version = "hcmen", ""
    proto.graph.name = name
    proto.graph.doc_string = ""
    del proto.metadata_props[:]
    del proto.graph.metadata_props[:]
    del proto.graph.value_info[:]
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]
    used = {name for node in proto.graph.node for name in node.input} | {o.name for o in proto.graph.output}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return proto


def share_weights(models: Mapping[str, onnx.ModelProto], folder: Path, weights_name: str = "weights.bin") -> None:
    """Writes `folder/<name>.onnx` for every model and one `folder/<weights_name>` that all of them refer to.

    Tensors are told apart by dtype, shape and content, so a weight that several graphs use, under whatever name, is on
    disk once. The models are changed in place: their large tensors become references.
    """
    offsets: dict[tuple[int, tuple[int, ...], bytes], int] = {}
    with (folder / weights_name).open("wb") as weights:
        for proto in models.values():
            for tensor in proto.graph.initializer:
                content = onnx.numpy_helper.to_array(tensor).tobytes()
                if len(content) < EXTERNAL_MINIMUM_BYTES:
                    continue
                key = (tensor.data_type, tuple(tensor.dims), hashlib.sha256(content).digest())
                if key not in offsets:
                    weights.write(b"\0" * (-weights.tell() % ALIGNMENT_BYTES))
                    offsets[key] = weights.tell()
                    weights.write(content)
                _refer(tensor, weights_name, offsets[key], len(content))
        if not offsets:
            weights.write(b"\0" * ALIGNMENT_BYTES)  # all is in the graphs, and no file of a bundle is empty
    for name, proto in models.items():
        (folder / f"{name}.onnx").write_bytes(proto.SerializeToString(deterministic=True))


def _refer(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Makes `tensor` a reference into the file `location`."""
    kept = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    kept.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        kept.external_data.add(key=key, value=value)
    tensor.CopyFrom(kept)
