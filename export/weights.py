"""A variant's graph as one message with its weights inside, from verified bytes: for parsers that take memory.

TensorRT's parser would open the weights file itself, by the path that the graph names; here no path is followed, so
what was hashed is what is parsed. Needs onnx and NumPy, no PyTorch, as it runs on the device.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from hcmen.base.bundle import Bundle
from hcmen.base.errors import CorruptFileError, InputError
from hcmen.runtime.backends.graph import read_graph

__all__ = ["embedded", "embedded_model"]

# A protobuf message ends at 2 GiB; the rest is room for the graph.
_MOST_BYTES = (1 << 31) - (1 << 24)


def embedded_model(bundle: Bundle, variant: str, weights: NDArray[np.uint8] | None = None) -> ModelProto:
    """The graph of `variant` with every weight in it.

    Args:
        bundle: the bundle. variant: one of its variants.
        weights: the content of its weights file, from `Bundle.read`, to read it once for several variants.

    Raises:
        InputError: the bundle lacks the variant, or the whole is too large for one message.
        CorruptFileError: a file is damaged, or the graph reaches outside the bundle.
    """
    record = bundle.variant(variant)
    where = str(bundle.path / record.graph.file)
    content = bundle.read(record.graph).tobytes()
    weights = bundle.read(bundle.manifest.weights) if weights is None else weights
    return embedded(content, weights, bundle.manifest.weights.file, where)


def embedded(content: bytes, weights: NDArray[np.uint8], weights_file: str, where: str) -> ModelProto:
    """The graph in `content`, of an .onnx file, with every weight in it.

    Args:
        weights: the content of its weights file. weights_file: what the graph calls that. where: for messages.

    Raises:
        InputError: the whole is too large for one message.
        CorruptFileError: the file is damaged, or the graph reaches outside.
    """
    graph = read_graph(content, weights_file, len(weights), where)
    external = {t.name: t for t in graph.external}
    needed = sum(t.view(weights).nbytes for t in external.values())
    if needed > _MOST_BYTES:
        raise InputError(f"{where}: {needed} bytes of weights, a parser takes at most {_MOST_BYTES} in one message")
    model = ModelProto()
    try:
        model.ParseFromString(graph.model)
    except Exception as error:  # protobuf's own class, which differs between its implementations
        raise CorruptFileError("not an ONNX file", fix="export the bundle again", where=where) from error
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            values = external[tensor.name].view(weights)
            del tensor.external_data[:]
            tensor.ClearField("data_location")
            tensor.raw_data = values.tobytes()
    return model
