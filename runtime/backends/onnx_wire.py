"""The messages of an .onnx file, read and written again without the onnx package.

ONNX Runtime's protobuf reader is more lenient than any reader of ours: it keeps 32 bits of a field's tag and of an
enumeration, takes the last of two values, merges two messages, and skips what it does not know. So what we check is
never what it reads. `rewritten` therefore knows every field of onnx.proto with its one wire type, refuses all else, and
writes each value again in protobuf's shortest form: ONNX Runtime is given that and nothing that we did not read.
"""

from __future__ import annotations

from typing import Any

from hcmen.base.errors import CorruptFileError

__all__ = ["MOST_DEPTH", "MOST_NODES", "Message", "not_onnx", "rewritten"]

MOST_DEPTH = 32
MOST_NODES = 50_000
"""Nodes of a graph with its functions put in the place of their calls. A BERT with ours on top has 2,000."""
_MOST_FIELDS = 1_000_000
_MOST_REMEMBERED = 64

Message = dict[int, list[Any]]
"""Field number -> its values in order: int, bytes, or the `Message` in it."""

# Per message: number:kind, * for a field that may come again. i is an integer of 64 bits, e one of 32, f and d are four
# and eight bytes, s is text or bytes; a capital is another message. A repeated number may come packed, too.
_ONNX = {
    "Model": "1:i 2:s 3:s 4:s 5:i 6:s 7:Graph 8:Opset* 14:Entry* 20:Training* 25:Function* 26:Devices*",
    "Opset": "1:s 2:i",
    "Entry": "1:s 2:s",
    "Training": "1:Graph 2:Graph 3:Entry* 4:Entry*",
    "Graph": "1:Node* 2:s 5:Tensor* 10:s 11:Value* 12:Value* 13:Value* 14:Quantised* 15:Sparse* 16:Entry*",
    "Function": "1:s 4:s* 5:s* 6:s* 7:Node* 8:s 9:Opset* 10:s 11:Attribute* 12:Value* 13:s 14:Entry*",
    "Node": "1:s* 2:s* 3:s 4:s 5:Attribute* 6:s 7:s 8:s 9:Entry* 10:Placed*",
    "Attribute": "1:s 2:f 3:i 4:s 5:Tensor 6:Graph 7:f* 8:i* 9:s* 10:Tensor* 11:Graph* 13:s 14:Type 15:Type* 20:e 21:s "
    "22:Sparse 23:Sparse*",
    "Tensor": "1:i* 2:e 3:Segment 4:f* 5:e* 6:s* 7:i* 8:s 9:s 10:d* 11:i* 12:s 13:Stored* 14:e 16:Entry*",
    "Stored": "1:s 2:s",
    "Segment": "1:i 2:i",
    "Sparse": "1:Tensor 2:Tensor 3:i*",
    "Value": "1:s 2:Type 3:s 4:Entry*",
    "Type": "1:TensorType 4:Element 5:Map 6:s 7:Opaque 8:TensorType 9:Element",
    "TensorType": "1:e 2:Shape",
    "Shape": "1:Dim*",
    "Dim": "1:i 2:s 3:s",
    "Element": "1:Type",
    "Map": "1:e 2:Type",
    "Opaque": "1:s 2:s",
    "Quantised": "1:s 2:Entry*",
    "Devices": "1:s 2:e 3:s*",
    "Placed": "1:s 2:Sharding* 3:e",
    "Sharding": "1:s 2:i* 3:Group* 4:Sharded*",
    "Group": "1:i 2:i*",
    "Sharded": "1:i 2:Pieces*",
    "Pieces": "1:i 2:s 3:i",
}
_WIRES = {"i": 0, "e": 0, "f": 5, "d": 1}
_SIZES = {5: 4, 1: 8}


def _shortest(value: int) -> bytes:
    """`value` as a varint."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _fields_of(text: str) -> dict[int, tuple[int, bytes, str, bool]]:
    """Tag -> (field number, its tag as written, kind, whether it may come again)."""
    fields = {}
    for item in text.split():
        number, kind = item.rstrip("*").split(":")
        again = item.endswith("*")
        wire = _WIRES.get(kind, 2)
        tag = int(number) << 3 | wire
        fields[tag] = (int(number), _shortest(tag), kind, again)
        if again and wire != 2:
            tag = int(number) << 3 | 2
            fields[tag] = (int(number), _shortest(tag), f"packed {kind}", True)
    return fields


_FIELDS = {name: _fields_of(text) for name, text in _ONNX.items()}


def rewritten(model: bytes, where: str, renamed: tuple[bytes, bytes] = (b"", b"")) -> tuple[bytes, Message]:
    """The content of an .onnx file as protobuf would write it, and its fields.

    Args:
        model: the content. where: what to call the file in messages.
        renamed: the name of a file that tensors lie in, and what is written for it; the fields have the first.

    Raises:
        CorruptFileError: no ONNX model in protobuf's format, or more nodes, fields or nesting than any has.
    """
    content, message = _Reader(where, renamed).read(model, "Model", 1)
    if content[4:8] == b"ORTM":
        raise CorruptFileError("a model in ONNX Runtime's own format", "ONNX", "export it again", where=where)
    return content, message


def not_onnx(where: str, what: str = "") -> CorruptFileError:
    """The error for what no writer of ONNX files writes."""
    what = f" ({what})" if what else ""
    return CorruptFileError(f"truncated or not an ONNX file{what}", fix="export the bundle again", where=where)


class _Reader:
    def __init__(self, where: str, renamed: tuple[bytes, bytes]):
        self.where, self.renamed = where, renamed
        self.nodes = self.fields = 0
        self._read: dict[tuple[str, bytes], tuple[bytes, Message]] = {}

    def read(self, data: bytes, name: str, depth: int) -> tuple[bytes, Message]:
        if depth > MOST_DEPTH:
            raise CorruptFileError(
                f"{self.where}: nested more than {MOST_DEPTH} deep, expected a graph written by export"
            )
        known = _FIELDS[name]
        found: Message = {}
        out = bytearray()
        at, end = 0, len(data)
        while at < end:
            tag = data[at]
            at += 1
            if tag > 127:
                tag, at = self._varint(data, at - 1)
            field = known.get(tag)
            if field is None:
                raise not_onnx(self.where, f"field {tag >> 3} of wire type {tag & 7} in {name}")
            number, written, kind, again = field
            out += written
            self.fields += 1
            value: Any
            if tag & 7 == 2:
                size = data[at] if at < end else 0
                at += 1
                if size > 127:
                    size, at = self._varint(data, at - 1)
                if size > end - at:
                    raise not_onnx(self.where)
                value = content = data[at : at + size]
                at += size
                if kind in _FIELDS:
                    content, value = self._within(content, kind, depth + 1)
                    self._count(kind)
                elif kind in ("packed i", "packed e"):
                    numbers = self._packed(content, kind)
                    content = b"".join(map(_shortest, numbers))
                    found.setdefault(number, []).extend(numbers)
                size = len(content)
                out += _shortest(size) if size > 127 else bytes((size,))
                out += content
                if kind in ("packed i", "packed e"):
                    continue
            elif tag & 7 == 0:
                value, at = self._varint(data, at)
                if kind == "e":
                    self._check_32_bits(value)
                out += _shortest(value)
            else:
                size = _SIZES[tag & 7]
                if size > end - at:
                    raise not_onnx(self.where)
                value = data[at : at + size]
                at += size
                out += value
            values = found.get(number)
            if values is None:
                found[number] = [value]
            elif again:
                values.append(value)
            else:
                raise not_onnx(self.where, f"field {number} of {name} is there twice")
        if self.fields > _MOST_FIELDS:
            raise CorruptFileError(f"more than {_MOST_FIELDS} fields", "a graph written by export", where=self.where)
        if name == "Stored" and (found.get(1), found.get(2)) == ([b"location"], [self.renamed[0]]):
            out = bytearray(b"\n\x08location\x12" + _shortest(len(self.renamed[1])) + self.renamed[1])
        return bytes(out), found

    def _within(self, data: bytes, kind: str, depth: int) -> tuple[bytes, Message]:
        """As `read`, which half of the messages of a graph are spared: `axis = 1` and types come again and again."""
        if len(data) > _MOST_REMEMBERED or kind == "Node":
            return self.read(data, kind, depth)
        key = (kind, data)
        known = self._read.get(key)
        if known is None:
            known = self._read[key] = self.read(data, kind, depth)
        return known

    def _count(self, kind: str) -> None:
        self.nodes += kind == "Node"
        if self.nodes > MOST_NODES:
            raise CorruptFileError(f"more than {MOST_NODES} nodes", "a graph written by export", where=self.where)

    def _varint(self, data: bytes, at: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= len(data):
                break
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >> 64:
                    break
                return value, at
        raise not_onnx(self.where)

    def _packed(self, data: bytes, kind: str) -> list[int]:
        values, at = [], 0
        while at < len(data):
            value, at = self._varint(data, at)
            if kind == "packed e":
                self._check_32_bits(value)
            values.append(value)
            if len(values) > _MOST_FIELDS:
                raise CorruptFileError(f"more than {_MOST_FIELDS} integers in a field", where=self.where)
        return values

    def _check_32_bits(self, value: int) -> None:
        """Protobuf keeps 32 bits of these, so more of them would say another thing to it than to us."""
        if (1 << 31) <= value < (1 << 64) - (1 << 31):
            raise not_onnx(self.where, f"{value} where 32 bits are kept")
