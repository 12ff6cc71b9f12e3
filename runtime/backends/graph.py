"""Reads an .onnx file, without the onnx package, to load it safely.

ONNX Runtime would look for external data itself, under whatever path the graph names. Versions before 1.24 open any
file of the device (seen from 1.17 to 1.23), later ones any that lies in the bundle's folder. `read_graph` finds every
tensor that is stored outside the file and refuses all but those of the main graph that lie inside the one weights file,
so that the runtime can hand verified memory to ONNX Runtime and no path of the graph's is ever followed. What is handed
on is not the file but `Graph.model`, which the reader wrote again from what it read.

A graph may also be small and cost hours or all memory: functions that call each other twice, constants whose shape is a
number in the file. Both are counted here, since ONNX Runtime cannot be stopped while it makes a session.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hcmen.base.errors import CorruptFileError
from hcmen.runtime.backends.onnx_wire import MOST_DEPTH, MOST_NODES, Message, not_onnx, rewritten

__all__ = ["ExternalTensor", "Graph", "read_graph"]

_DTYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64"}
_MOST_CONSTANT = 1 << 28
"""Elements of all tensors that a graph makes of constants alone: 1 GiB of float32."""
_MOST_KNOWN = 64
"""Numbers of a tensor that are looked at; a shape has fewer."""

# Operator -> the input that says how large the output is, and whether it says so in sizes of the first input.
_SHAPED_BY = {
    b"ConstantOfShape": (0, False),
    b"Expand": (1, False),
    b"Tile": (1, True),
    b"Pad": (1, False),
    b"Resize": (3, False),
    b"Upsample": (1, True),
    b"OneHot": (1, True),
    b"HannWindow": (0, False),
    b"HammingWindow": (0, False),
    b"BlackmanWindow": (0, False),
}
_SAME = frozenset((b"Identity", b"Cast", b"Squeeze", b"Unsqueeze", b"Reshape"))
_OF_CONSTANTS = frozenset(
    (*_SHAPED_BY, *_SAME, b"Constant", b"Concat", b"Range", b"Mul", b"Add", b"RandomNormal", b"RandomUniform")
)


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
    """What `read_graph` found: the external initializers, the domains of the main graph's nodes, the file as written
    again. tables: input -> rows of the smallest table in the file that it looks up rows of (Gather).
    """

    external: list[ExternalTensor] = field(default_factory=list)
    domains: set[str] = field(default_factory=set)
    model: bytes = b""
    tables: dict[str, int] = field(default_factory=dict)


def read_graph(
    model: bytes | memoryview, weights_file: str, weights_bytes: int, where: str, real_name: bytes | None = None
) -> Graph:
    """Finds the external tensors of an .onnx file, and writes the file again.

    Args:
        model: the content of the file.
        weights_file: the only file that external data may lie in; weights_bytes: its size.
        where: what to call the file in messages.
        real_name: under which the weights file lies where ONNX Runtime will look for it; None for `weights_file`.

    Raises:
        CorruptFileError: not an ONNX file, its external data is out of range or elsewhere, or it is larger than any
            graph is once its functions and constants are written out.
    """
    known = weights_file.encode()
    content, message = rewritten(bytes(model), where, (known, known if real_name is None else real_name))
    graph = Graph(model=content)
    for main in message.get(7, []):
        for tensor in main.get(5, []):
            if _is_external(tensor):
                graph.external.append(_located(tensor, weights_file, weights_bytes, where))
        graph.domains = {_text(domain, where) for node in main.get(1, []) for domain in node.get(7, [])}
        graph.tables = {_text(name, where): rows for name, rows in _tables(main).items()}
    for place in _places(message):
        nested = () if place.is_main else place.tensors
        if any(map(_is_external, [*nested, *place.sparse_tensors, *place.tensors_of_nodes])):
            raise CorruptFileError(f"{where}: a nested tensor has external data", fix="export the bundle again")
    _check_nodes(message, where)
    _check_constants(message, where)
    return graph


# --- what lies in a model -------------------------------------------------------------------------------------------


class _Place:
    """A graph or a function: its nodes and tensors, and the attributes of its nodes."""

    def __init__(self, message: Message, *, is_main: bool = False, is_function: bool = False):
        self.is_main = is_main
        self.nodes: list[Message] = message.get(7 if is_function else 1, [])
        self.tensors: list[Message] = [] if is_function else message.get(5, [])
        self.sparse: list[Message] = [] if is_function else message.get(15, [])
        self.attributes: list[Message] = message.get(11, [])[:] if is_function else []
        for node in self.nodes:
            self.attributes += node.get(5, ())

    @property
    def graphs(self) -> list[Message]:
        """The graphs within."""
        return [graph for attribute in self.attributes for n in (6, 11) for graph in attribute.get(n, ())]

    @property
    def tensors_of_nodes(self) -> Iterator[Message]:
        for attribute in self.attributes:
            for n in (5, 10):
                yield from attribute.get(n, ())
            for n in (22, 23):
                for sparse in attribute.get(n, ()):
                    yield from _halves(sparse)

    @property
    def sparse_tensors(self) -> Iterator[Message]:
        for sparse in self.sparse:
            yield from _halves(sparse)


def _places(message: Message) -> Iterator[_Place]:
    """Every graph and function of a model, also those in attributes."""
    waiting = [_Place(graph, is_main=True) for graph in message.get(7, [])]
    waiting += [_Place(graph) for each in message.get(20, []) for n in (1, 2) for graph in each.get(n, [])]
    waiting += [_Place(function, is_function=True) for function in message.get(25, [])]
    while waiting:
        place = waiting.pop()
        yield place
        waiting += map(_Place, place.graphs)


def _halves(sparse: Message) -> list[Message]:
    return [*sparse.get(1, []), *sparse.get(2, [])]


def _tables(main: Message) -> dict[bytes, int]:
    """Input of the graph -> the fewest rows of a table that it, as it is or cast, looks up rows of."""
    sources = {value.get(1, [b""])[0]: value.get(1, [b""])[0] for value in main.get(11, [])}
    rows = {t.get(8, [b""])[0]: _signed(t.get(1, []))[0] for t in main.get(5, []) if t.get(1)}
    found: dict[bytes, int] = {}
    for node in main.get(1, []):
        op, given = node.get(4, [b""])[0], node.get(1, [])
        if op in (b"Cast", b"Identity") and given and given[0] in sources:
            sources.update(dict.fromkeys(node.get(2, []), sources[given[0]]))
        if op == b"Gather" and len(given) == 2 and given[0] in rows and given[1] in sources:
            axis = [a for a in node.get(5, []) if a.get(1) == [b"axis"] and _signed(a.get(3, [])) != [0]]
            if not axis:
                name = sources[given[1]]
                found[name] = min(rows[given[0]], found.get(name, rows[given[0]]))
    return found


# --- external data --------------------------------------------------------------------------------------------------


def _is_external(tensor: Message) -> bool:
    return 13 in tensor or tensor.get(14) == [1]


def _located(tensor: Message, weights_file: str, weights_bytes: int, where: str) -> ExternalTensor:
    """Where in the weights file the tensor lies, its place and size checked."""
    title = _text(tensor.get(8, [b""])[0], where)
    name = f"{where}: tensor {title[:100]!r}"
    entries: dict[str, str] = {}
    for entry in tensor.get(13, []):
        key, value = (_text(entry.get(n, [b""])[0], where) for n in (1, 2))
        if key in entries:
            raise CorruptFileError(f"{where}: external data names its {key[:100]!r} twice, expected once")
        entries[key] = value
    location = entries.get("location", "")
    if location != weights_file:
        raise CorruptFileError(
            f"{name} lies in {location[:200]!r}, expected {weights_file!r} alone", fix="export the bundle again"
        )
    data_type = tensor.get(2, [0])[0]
    dtype = _DTYPES.get(data_type)
    if dtype is None:
        raise CorruptFileError(f"{name} has data type {data_type}, expected one of {', '.join(_DTYPES.values())}")
    shape = tuple(tensor.get(1, []))
    if len(shape) > 8:
        raise CorruptFileError(f"{name} has {len(shape)} dimensions, expected at most 8", fix="export the bundle again")
    needed = math.prod(shape) * np.dtype(dtype).itemsize
    if math.prod(max(n, 1) for n in shape) >> 59:  # NumPy has no array of such sizes, even of no element
        raise CorruptFileError(f"{name} has sizes that no tensor has: export it again")
    offset, length = entries.get("offset", "0"), entries.get("length", str(needed))
    digits = offset.isascii() and offset.isdigit() and length.isascii() and length.isdigit()
    fits = digits and max(len(offset), len(length)) < 19 and int(length) == needed
    if not fits or int(offset) + needed > weights_bytes:
        raise CorruptFileError(
            f"{name} of shape {shape} is at offset {offset[:20]!r} with length {length[:20]!r}, "
            f"expected {needed} bytes within {weights_bytes}",
            fix="export the bundle again",
        )
    return ExternalTensor(title, dtype, shape, int(offset))


# --- size -----------------------------------------------------------------------------------------------------------

Name = tuple[bytes, bytes, bytes]


def _name(message: Message, *numbers: int) -> Name:
    """(domain, name, overload) of a function, or of the one that a node calls."""
    domain, name, overload = (message.get(n, [b""])[0] for n in numbers)
    return (b"" if domain == b"ai.onnx" else domain, name, overload)


def _check_nodes(message: Message, where: str) -> None:
    """Refuses functions that call themselves, and a model of too many nodes once calls are written out."""
    functions = {_name(function, 10, 1, 13): function for function in message.get(25, [])}
    counted: dict[Name, int] = {}
    under_way: list[Name] = []

    def count(place: _Place) -> int:
        total = len(place.nodes) + sum(count(_Place(graph)) for graph in place.graphs)
        for node in place.nodes:
            called = _name(node, 7, 4, 8)
            if called in functions:
                total += counted[called] if called in counted else count_function(called)
        return total

    def count_function(called: Name) -> int:
        if called in under_way or len(under_way) >= MOST_DEPTH:
            title = called[1][:100].decode("utf-8", "replace")
            why = "calls itself" if called in under_way else f"is called {MOST_DEPTH} functions deep"
            raise CorruptFileError(f"function {title!r} {why}", "a graph written by export", where=where)
        under_way.append(called)
        counted[called] = count(_Place(functions[called], is_function=True))
        under_way.pop()
        return counted[called]

    total = max([sum(count(_Place(graph)) for graph in message.get(7, [])), *(map(count_function, functions))])
    if total > MOST_NODES:
        about = str(total) if total < 1 << 40 else "over a million million"
        raise CorruptFileError(
            f"{about} nodes with its functions written out",
            f"at most {MOST_NODES}",
            "export the bundle again",
            where=where,
        )


def _check_constants(message: Message, where: str) -> None:
    """Refuses a model that makes more than `_MOST_CONSTANT` elements of the numbers in it."""
    total = sum(_Constants(place).made for place in _places(message))
    if total > _MOST_CONSTANT:
        raise CorruptFileError(
            f"its constants have {total if total < 1 << 64 else 'over 2**64'} elements once they are written out",
            f"at most {_MOST_CONSTANT}",
            "export the bundle again",
            where=where,
        )


class _Constants:
    """What a graph's nodes make of its constants, as far as their shapes are plain numbers in the file.

    made: elements of all tensors whose size is a value, as of ConstantOfShape.
    """

    def __init__(self, place: _Place):
        self._values: dict[bytes, list[float] | None] = {}
        self._sizes: dict[bytes, int] = {}
        self._tensors = {tensor.get(8, [b""])[0]: tensor for tensor in place.tensors}
        self.made = sum(_elements(_signed(sparse.get(3, []))) for sparse in place.sparse)
        for node in place.nodes:
            op = node.get(4, [b""])[0]
            if op in _OF_CONSTANTS and 2 in node and node.get(7, [b""])[0] in (b"", b"ai.onnx"):
                self._node(op, node)

    def _value(self, name: bytes) -> list[float] | None:
        if name not in self._values:
            tensor = self._tensors.get(name)
            self._values[name] = None if tensor is None else _values(tensor)
        return self._values[name]

    def _elements(self, name: bytes) -> int | None:
        tensor = self._tensors.get(name)
        return self._sizes.get(name) if tensor is None else _elements(_signed(tensor.get(1, [])))

    def _node(self, op: bytes, node: Message) -> None:
        output = node[2][0]
        attributes = {a.get(1, [b""])[0]: a for a in node.get(5, [])}
        if op == b"Constant":
            for attribute in attributes.values():
                for tensor in attribute.get(5, []):
                    self._tensors[output] = tensor
                for sparse in attribute.get(22, []):
                    self.made += _elements(_signed(sparse.get(3, [])))
                plain = _signed(attribute.get(3, []) + attribute.get(8, []))
                if plain:
                    self._values[output] = list(plain[:_MOST_KNOWN])
            return
        given = node.get(1, [])
        known = [self._value(name) for name in given]
        size = self._size(op, known, [self._elements(name) for name in given], attributes)
        if size is not None:
            self._sizes[output] = size
            self.made += size
        values = _computed(op, known)
        if values is not None:
            self._values[output] = values

    def _size(
        self,
        op: bytes,
        known: Sequence[list[float] | None],
        sizes: Sequence[int | None],
        attributes: dict[bytes, Message],
    ) -> int | None:
        """Elements of a tensor whose size is a value that is known."""

        def value(i: int) -> list[float] | None:
            return known[i] if i < len(known) else None

        first = (sizes[0] if sizes else None) or 1
        if op in (b"RandomNormal", b"RandomUniform"):
            return _elements(_signed(attributes.get(b"shape", {}).get(8, [])))
        if op == b"Concat" and all(n is not None for n in sizes):
            return sum(n for n in sizes if n is not None)
        if op in _SAME and sizes and sizes[0] is not None:
            return sizes[0]
        if op == b"Range" and all(value(i) for i in range(3)):
            start, limit, delta = (known[i][0] for i in range(3))  # type: ignore[index]
            return max(0, int(min((limit - start) / delta, 2.0**80))) if delta else None
        place, by_first = _SHAPED_BY.get(op, (-1, False))
        if op == b"Resize" and value(3) is None:
            place, by_first = 2, True
        times = first if by_first else 1
        shape = value(place) if place >= 0 else None
        if shape is None:
            return None
        if op == b"Pad":
            half = len(shape) // 2
            shape = [1 + before + after for before, after in zip(shape[:half], shape[half:], strict=False)]
        return times * _elements(shape)


def _elements(shape: Sequence[float]) -> int:
    """How many elements a tensor of `shape` has; a size that is no number counts as 1."""
    return math.prod(int(n) if 0 <= n < 2.0**64 else 1 for n in shape[:_MOST_KNOWN])


def _signed(values: Sequence[int]) -> list[int]:
    return [n - (1 << 64) if n >> 63 else n for n in values]


def _values(tensor: Message) -> list[float] | None:
    """The numbers in a small tensor; None for a large one, or one that is stored elsewhere."""
    if _is_external(tensor):
        return None
    numbers = [n for field_ in (5, 7, 11) for n in tensor.get(field_, [])]
    if numbers:
        return list(_signed(numbers)) if len(numbers) <= _MOST_KNOWN else None
    dtype = _DTYPES.get(tensor.get(2, [0])[0])
    raw = b"".join(tensor.get(9, []) or tensor.get(4, []) or tensor.get(10, []))
    if dtype is None or not raw:
        return None
    count = len(raw) // np.dtype(dtype).itemsize
    return np.frombuffer(raw, dtype, count).tolist() if count <= _MOST_KNOWN else None


def _computed(op: bytes, known: Sequence[list[float] | None]) -> list[float] | None:
    """What the small nodes between a constant and a shape make of it."""
    given = [values for values in known if values is not None]
    if not given or given[0] != known[0]:
        return None
    if op in _SAME:
        return given[0]
    if len(given) != len(known):
        return None
    if op == b"Concat":
        joined = [n for values in given for n in values]
        return joined if len(joined) <= _MOST_KNOWN else None
    if op in (b"Mul", b"Add") and len(given) == 2:
        left, right = given
        left, right = (left * len(right), right) if len(left) == 1 else (left, right * len(left))
        return [a * b if op == b"Mul" else a + b for a, b in zip(left, right, strict=False)]
    return None


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_onnx(where) from error
