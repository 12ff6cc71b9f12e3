"""Reads just enough of an .onnx file, without the onnx package, to load it safely.

ONNX Runtime would look for external data itself, under whatever path the graph names. `read_graph` finds every tensor
that is stored outside the file and refuses all but those of the main graph that lie inside the one weights file, so
that the runtime can hand verified memory to ONNX Runtime and no path of the graph's is ever followed.

Field numbers are those of onnx.proto; the wire format is that of protobuf.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hcmen.base.errors import CorruptFileError

__all__ = ["ExternalTensor", "Graph", "read_graph"]

_DTYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64"}
_MAX_DEPTH = 32

# message -> field number -> message, for the fields through which a tensor can be reached
_CHILDREN: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
}


@dataclass(frozen=True)
class ExternalTensor:
    """An initializer whose values lie in the weights file, at `offset`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def view(self, weights: NDArray[np.uint8]) -> NDArray[np.generic]:
        """Its values as a view of the content of the weights file; nothing is copied."""
        count = math.prod(self.shape)
        dtype = np.dtype(self.dtype)
        return weights[self.offset : self.offset + count * dtype.itemsize].view(dtype).reshape(self.shape)


@dataclass
class Graph:
    """What `read_graph` found: the external initializers, and the domains of the main graph's nodes."""

    external: list[ExternalTensor] = field(default_factory=list)
    domains: set[str] = field(default_factory=set)


def read_graph(model: bytes | memoryview, weights_file: str, weights_bytes: int, where: str) -> Graph:
    """Finds the external tensors of an .onnx file.

    Args:
        model: the content of the file.
        weights_file: the only file that external data may lie in; weights_bytes: its size.
        where: what to call the file in messages.

    Raises:
        CorruptFileError: not a protobuf message, or its external data is out of range or elsewhere.
    """
    graph = Graph()

    def walk(data: memoryview, path: tuple[str, ...]) -> None:
        if len(path) > _MAX_DEPTH:
            raise CorruptFileError(f"{where}: nested more than {_MAX_DEPTH} deep, expected a graph written by export")
        children = _CHILDREN[path[-1]]
        for number, value in _fields(data, where):
            if isinstance(value, int):
                continue
            child = children.get(number)
            if child == "Tensor":
                tensor = _external(value, where)
                if tensor is not None:
                    if path != ("Model", "Graph"):
                        raise CorruptFileError(f"{where}: a nested tensor has external data: export the bundle again")
                    graph.external.append(_located(tensor, weights_file, weights_bytes, where))
            elif child is not None:
                walk(value, (*path, child))
            elif number == 7 and path == ("Model", "Graph", "Node"):
                graph.domains.add(_text(value, where))

    walk(memoryview(model), ("Model",))
    return graph


@dataclass
class _Tensor:
    name: str = ""
    data_type: int = 0
    external: bool = False
    shape: list[int] = field(default_factory=list)
    entries: dict[str, str] = field(default_factory=dict)


def _external(data: memoryview, where: str) -> _Tensor | None:
    """The tensor message in `data`, if its values are stored elsewhere."""
    tensor = _Tensor()
    for number, value in _fields(data, where):
        if number == 1:
            tensor.shape += [value] if isinstance(value, int) else _packed(value, where)
        elif number == 2 and isinstance(value, int):
            tensor.data_type = value
        elif number == 8 and not isinstance(value, int):
            tensor.name = _text(value, where)
        elif number == 13 and not isinstance(value, int):
            tensor.external = True
            entry = {n: _text(v, where) for n, v in _fields(value, where) if not isinstance(v, int)}
            key = entry.get(1, "")
            if key in tensor.entries:
                raise CorruptFileError(f"{where}: external data names its {key!r} twice, expected once")
            tensor.entries[key] = entry.get(2, "")
        elif number == 14 and value == 1:
            tensor.external = True
    return tensor if tensor.external else None


def _located(tensor: _Tensor, weights_file: str, weights_bytes: int, where: str) -> ExternalTensor:
    """Where in the weights file the tensor lies, its place and size checked."""
    name = f"{where}: tensor {tensor.name[:100]!r}"
    location = tensor.entries.get("location", "")
    if location != weights_file:
        raise CorruptFileError(f"{name} lies in {location[:200]!r}, expected {weights_file!r} alone: export it again")
    dtype = _DTYPES.get(tensor.data_type)
    if dtype is None:
        raise CorruptFileError(
            f"{name} has data type {tensor.data_type}, expected one of {', '.join(_DTYPES.values())}"
        )
    needed = math.prod(tensor.shape) * np.dtype(dtype).itemsize
    offset, length = tensor.entries.get("offset", "0"), tensor.entries.get("length", str(needed))
    digits = offset.isascii() and offset.isdigit() and length.isascii() and length.isdigit()
    fits = digits and len(offset) < 19 and int(length) == needed and int(offset) + needed <= weights_bytes
    if not fits:
        raise CorruptFileError(
            f"{name} of shape {tensor.shape} is at offset {offset[:20]!r} with length {length[:20]!r}, "
            f"expected {needed} bytes within {weights_bytes}: export it again"
        )
    return ExternalTensor(tensor.name, dtype, tuple(tensor.shape), int(offset))


def _fields(data: memoryview, where: str) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a message: an int for a varint, bytes for everything else."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at, where)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at, where)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at, where)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise _not_onnx(where)
        if size > end - at:
            raise _not_onnx(where)
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int, where: str) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _not_onnx(where)


def _packed(data: memoryview, where: str) -> list[int]:
    values, at = [], 0
    while at < len(data):
        value, at = _varint(data, at, where)
        values.append(value)
    return values


def _text(data: memoryview, where: str) -> str:
    try:
        return bytes(data).decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_onnx(where) from error


def _not_onnx(where: str) -> CorruptFileError:
    return CorruptFileError(f"{where}: truncated or not an ONNX file: copy or export the bundle again")
