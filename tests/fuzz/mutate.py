"""Mutators: each makes a hostile neighbour of a valid file, by what it knows of the format or byte by byte.

All take their choices from a `random.Random`, which Hypothesis stands behind: a finding shrinks, and comes again.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

__all__ = ["Mutator", "havoc", "json_file", "lines", "npy", "npz", "onnx", "pickled", "safetensors"]

Mutator = Callable[[Random, bytes], bytes]
_NUMBERS = (0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62, (1 << 63) - 1, 1 << 63)
_MOST_BYTES = 1 << 20


def havoc(rng: Random, data: bytes) -> bytes:
    """A few bytes flipped, set, inserted, deleted, repeated or moved, or the end cut off."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        size = min(rng.choice((1, 1, 2, 4, 8, 32)), len(out) - at)
        what = rng.randrange(7)
        if what == 0 and size:
            out[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            out[at : at + size] = rng.choice(_NUMBERS).to_bytes(8, rng.choice(("little", "big")))[:size]
        elif what == 2:
            out[at:at] = bytes(rng.choice((0, 0xFF, 0x20, 0x80, 0x41)) for _ in range(size + 1))
        elif what == 3:
            del out[at : at + size]
        elif what == 4:
            out[at:at] = out[at : at + size] * rng.choice((1, 2, 100))
        elif what == 5:
            start = rng.randrange(len(out) + 1)
            out[at : at + size] = out[start : start + size]
        else:
            del out[at:]
    return bytes(out[:_MOST_BYTES])


def _or_havoc(structural: Mutator) -> Mutator:
    """`structural`, in one case of four byte by byte instead, in one of eight on top of it."""

    def mutant(rng: Random, data: bytes) -> bytes:
        how = rng.randrange(8)
        if how < 2:
            return havoc(rng, data)
        made = structural(rng, data)
        return havoc(rng, made) if how == 2 else made

    return mutant


# --- JSON -----------------------------------------------------------------------------------------------------------


class _Raw(str):
    """What stands in JSON as it is, valid or not."""


class _Pairs(list[Any]):
    """An object as [key, value] lists, so that a key may come twice."""


_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e308, 5e-324, 1 << 31, 1 << 63, 1 << 64, 10**18, -(10**18), 10**400),
    *(-(10**400), 10**9, 1.5e9, 3.4e38, [], [[]], _Pairs(), "", "0", ".", "..", "../../etc/passwd", "/etc/passwd"),
    *("a/b/c", "a\\b", "\0", "\n", "\x1b[31m", "\ud800", "\udcff", "\u202e", "ﬁ", "é" * 300, "x" * 1001, "x" * 100_000),
    *map(
        _Raw, ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "1" * 4299, "", "{", "'a'", "// a", "0x1")
    ),
    *(_Raw("[" * n + "]" * n) for n in (31, 33, 2000, 100_000)),
    *(_Raw('{"a":' * n + "1" + "}" * n) for n in (31, 33, 2000)),
    _Raw("[" + "0," * 5000 + "0]"),
)


def _slots(value: Any) -> list[tuple[list[Any], int]]:
    """Every place of a value in the tree: the list that it lies in, and its index there."""
    found: list[tuple[list[Any], int]] = []
    waiting = [value]
    while waiting:
        current = waiting.pop()
        inner = list(current) if isinstance(current, _Pairs) else [current]
        for holder in inner:
            if isinstance(holder, list):
                first = 1 if isinstance(current, _Pairs) else 0
                found += [(holder, i) for i in range(first, len(holder))]
                waiting += holder[first:]
    return found


def _written(value: Any) -> str:
    if isinstance(value, _Raw):
        return str(value)
    if isinstance(value, _Pairs):
        return "{" + ", ".join(f"{_written(key)}: {_written(x)}" for key, x in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_written, value)) + "]"
    return json.dumps(value)


def _odd(rng: Random, near: Any, places: list[tuple[list[Any], int]]) -> Any:
    """A value for the place of `near`: close to it, another one of the file, or an odd one."""
    what = rng.randrange(4)
    if what == 0 and isinstance(near, (int, float)) and abs(near) < 1e100:
        return rng.choice((near + 1, near - 1, -near, near * 1_000_000, float(near), str(near)))
    if what == 1:
        holder, i = rng.choice(places)
        return copy.deepcopy(holder[i])  # shared it might come to hold itself
    return copy.deepcopy(rng.choice(_ODD))


def _json(rng: Random, data: bytes) -> bytes:
    root = [json.loads(data, object_pairs_hook=lambda pairs: _Pairs(map(list, pairs)))]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = _slots(root)
        if not places:
            break
        holder, i = rng.choice(places)
        what, value = rng.randrange(6), holder[i]
        if what == 0 and isinstance(value, list) and value:
            del value[rng.randrange(len(value))]
        elif what == 1 and isinstance(value, _Pairs) and value:
            key, inner = rng.choice(value)
            value.insert(rng.randrange(len(value) + 1), [rng.choice((key, "new", "", "\ud800")), copy.deepcopy(inner)])
        elif what == 2 and isinstance(value, _Pairs) and value:
            rng.choice(value)[0] = rng.choice(("", "\ud800", "x" * 2000, rng.choice(value)[0]))
        elif what == 3 and type(value) is list:
            value.append(_odd(rng, value, places))
        else:
            holder[i] = _odd(rng, value, places)
    return _written(root[0]).encode("utf-8", "surrogatepass")


json_file = _or_havoc(_json)


# --- NumPy ----------------------------------------------------------------------------------------------------------

_DTYPES = (
    *("'<f4'", "'>f4'", "'<f8'", "'<f2'", "'<i8'", "'|O'", "'|V0'", "'<U0'", "'<U1'", "'<U1000000000'", "'|S0'"),
    *("'<M8[ns]'", "'f4,f4'", "[('a', '<f4')]", "[('a', '|O')]", "('<f4', (2, 2))", "'<c8'", "''", "1", "None"),
)
_SHAPES = (
    *("()", "(0,)", "(1,)", "(0, 6)", "(-1, 6)", "(3, -6)", "(6, 3)", "(1, 3, 6)", "(True, 6)", "(3.0, 6)", "[3, 6]"),
    *("(9223372036854775807, 6)", "(18446744073709551616, 6)", "(0, 9223372036854775808)", "(4294967296, 4294967296)"),
    *("((3,), 6)", "(3L, 6L)", f"({'1, ' * 40})", "(" * 300, "(" + "9" * 3900 + ",)", "-" * 3900 + "1"),
)


def _npy(rng: Random, data: bytes) -> bytes:
    if len(data) < 10:  # a mutant already
        return havoc(rng, data)
    size = struct.unpack_from("<H", data, 8)[0]
    header, body, version = data[10 : 10 + size].decode("latin1").rstrip(), data[10 + size :], data[6:8]
    for _ in range(rng.choice((1, 1, 2))):
        what = rng.randrange(8)
        if what == 0:
            header = re.sub(r"'descr': [^,]*", lambda _: f"'descr': {rng.choice(_DTYPES)}", header)
        elif what == 1:
            header = re.sub(r"'shape': \([^)]*\)", lambda _: f"'shape': {rng.choice(_SHAPES)}", header)
        elif what == 2:
            header = header.replace("False", rng.choice(("True", "1", "'a'", "None", "\\d", "'\\d'")))
        elif what == 3:
            header = header.replace("}", rng.choice((", 'more': 1}", "", "} }", "}\0", "}#", " " * 5000 + "}")))
        elif what == 4:
            version = rng.choice((b"\1\0", b"\2\0", b"\3\0", b"\0\0", b"\1\1", b"\xff\xff"))
        elif what == 5:
            at = rng.randrange(len(body) + 1)
            body = body[:at] + rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\xff" * 8, b"")) + body[at + 4 :]
        elif what == 6:
            body = rng.choice((b"", body[:-1], body + b"\0", body * 2))
        else:
            header = havoc(rng, header.encode("latin1")).decode("latin1")
    text = header.encode("latin1") + b"\n"
    announced = rng.choice((len(text), len(text), len(text), len(text), 0, 1, 0xFFFF, 0xFFFFFFFF))
    wide = version != b"\1\0"
    return (
        b"\x93NUMPY" + version + struct.pack("<I" if wide else "<H", announced & (-1 if wide else 0xFFFF)) + text + body
    )


npy = _or_havoc(_npy)

_HEADS = {b"PK\x03\x04": 30, b"PK\x01\x02": 46, b"PK\x05\x06": 22}
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)


def _npz(rng: Random, data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(m.filename, archive.read(m)) for m in archive.infolist()]
    for _ in range(rng.choice((0, 1, 1, 2))):
        if not members:
            break
        i, what = rng.randrange(len(members)), rng.randrange(7)
        name, content = members[i]
        if what == 0:
            del members[i]
        elif what == 1:
            odd = (
                "",
                "a",
                "../a.npy",
                "/a.npy",
                "a.npy/",
                "x" * 300 + ".npy",
                "/",
                "000/x.npy",
                "a\0b.npy",
                "é\u202e.npy",
            )
            members[i] = (rng.choice((*odd, rng.choice(members)[0])), content)
        elif what == 2:
            members.append(members[i])
        elif what == 3:
            members[i] = (name, rng.choice(members)[1])
        elif what == 4:
            members += [(f"{n}{name}", content) for n in range(rng.choice((1, 16, 300)))]
        else:
            members[i] = (name, npy(rng, content))
    target = io.BytesIO()
    with _silent(), zipfile.ZipFile(target, "w", rng.choice(_METHODS)) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=archive.compression)
        archive.comment = rng.choice((b"", b"", b"x", b"PK\x05\x06" * 8))
    return _heads(rng, bytearray(target.getvalue())) if rng.randrange(2) else target.getvalue()


def _silent() -> contextlib.AbstractContextManager[Any]:
    import warnings

    return warnings.catch_warnings(action="ignore")  # names that are there twice


def _heads(rng: Random, data: bytearray) -> bytes:
    """Fields of a zip's records set: sizes, offsets, methods, flags, counts, lengths of names and comments."""
    heads = [
        (found.start(), _HEADS[found[0]]) for found in re.finditer(b"PK(?:\x03\x04|\x01\x02|\x05\x06)", bytes(data))
    ]
    for _ in range(rng.choice((1, 1, 2, 3))):
        start, size = rng.choice(heads)
        at, width = start + 4 + 2 * rng.randrange((size - 4) // 2), rng.choice((2, 2, 4))
        before = int.from_bytes(data[at : at + width], "little")
        value = rng.choice((*_NUMBERS, before + 1, before - 1, before * 2, before ^ 1, before ^ 8))
        data[at : at + width] = (value & (256**width - 1)).to_bytes(width, "little")
    return bytes(data)


npz = _or_havoc(_npz)


# --- ONNX -----------------------------------------------------------------------------------------------------------

_MOST_DEPTH = 8


def _varint(value: int, width: int = 0) -> bytes:
    out = bytearray()
    while value > 127 or len(out) + 1 < width:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def _fields(data: bytes) -> list[list[Any]] | None:
    """[tag, value] of each field, the value a number or bytes; None where they are no message of protobuf's."""

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            value |= (data[at] & 127) << shift
            at += 1
            if data[at - 1] < 128:
                return value
            shift += 7

    at, found = 0, []
    try:
        while at < len(data):
            tag = number()
            size = {1: 8, 5: 4}.get(tag & 7)
            if tag & 7 not in (0, 1, 2, 5) or not 0 < tag >> 3 < 30:
                return None
            value: Any = number() if tag & 7 == 0 else None
            if value is None:
                size = number() if size is None else size
                value, at = data[at : at + size], at + size
                if len(value) < size:
                    return None
            found.append([tag, value])
    except IndexError:
        return None
    return found


def _message(fields: list[list[Any]]) -> bytes:
    out = b""
    for tag, value in fields:
        if isinstance(tag, bytes):  # as it stands
            out += tag
        out += b"" if isinstance(tag, bytes) else _varint(tag)
        if isinstance(value, int):
            out += _varint(value & (1 << 64) - 1)
        else:
            out += (_varint(len(value)) if not isinstance(tag, bytes) and tag & 7 == 2 else b"") + value
    return out


def _onnx(rng: Random, data: bytes, depth: int = 0) -> bytes:
    fields = _fields(data)
    if not fields or depth > _MOST_DEPTH:
        return havoc(rng, data)
    i = rng.randrange(len(fields))
    tag, value = fields[i]
    inner = _fields(value) if tag & 7 == 2 and len(value) > 2 else None
    if inner and rng.randrange(4):  # the way down
        fields[i][1] = _onnx(rng, value, depth + 1)
        return _message(fields)
    what = rng.randrange(12)
    if what == 0:
        del fields[i]
    elif what == 1:
        fields.insert(i, fields[i])
    elif what == 2:
        fields[i] = fields[rng.randrange(len(fields))]
    elif what == 3:
        fields[i][0] = rng.choice(
            (rng.randrange(1, 30) << 3 | tag & 7, tag ^ rng.randrange(8), tag | 1 << 32, tag | 1 << 34)
        )
    elif what == 4:
        fields[i][0] = _varint(tag, rng.choice((2, 5, 10, 11))) + (_varint(len(value)) if tag & 7 == 2 else b"")
    elif what == 5 and isinstance(value, int):
        fields[i][1] = rng.choice((*_NUMBERS, value + 1, value - 1, (1 << 64) - 1, 1 << 32 | value))
    elif what == 5 and tag & 7 == 2:
        names = [x for t, x in fields if t & 7 == 2]
        fields[i][1] = rng.choice(
            (b"", b"\xff", b"/etc/passwd", b"../a", b"Loop", b"ConstantOfShape", b"x" * 5000, *names)
        )
    elif what == 6:
        fields[i][1] = havoc(rng, value) if isinstance(value, bytes) else value ^ 1
    elif what == 7 and tag & 7 == 2:
        for _ in range(rng.choice((1, 2, 8, 40))):  # in itself
            value = _message([[tag, value]])
        fields[i][1] = value
    elif what == 8:
        fields.append(
            [rng.choice((25 << 3 | 2, 7 << 3 | 2, 5 << 3 | 2, 99 << 3, 3 << 3 | 3, 0)), b"" if tag & 7 else 0]
        )
    elif what == 9 and tag & 7 == 2:
        fields[i] = [_varint(tag) + _varint(rng.choice((*_NUMBERS, len(value) + 1, max(0, len(value) - 1)))), value]
    elif what == 10:
        fields += [fields[i]] * rng.choice((10, 1000))
    else:
        # A dimension, an offset or a type: where sizes are believed.
        fields[i] = [rng.choice((1, 2, 3, 7, 8, 13, 14, 20)) << 3, rng.choice((*_NUMBERS, (1 << 64) - 1))]
    return _message(fields)[:_MOST_BYTES]


onnx = _or_havoc(_onnx)


# --- pickles --------------------------------------------------------------------------------------------------------

# Opcodes with arguments, each as Python would escape it.
_SNIPPETS = (
    *(
        piece.decode("unicode_escape").encode("latin1")
        for piece in rb"""
        cos\nsystem\n cnumpy\nndarray\n cnumpy\ndtype\n c_codecs\nencode\n cbuiltins\nbytes\n ios\nsystem\n R b o
        ( 0 1 2 t ) \x85 \x86 \x87 ] } l d a e s u . \x8f \x90 \x91 \x81 \x92 \x93 \x97 \x98 Q Pa\n \x80\x63
        N \x88 K\x01 M\xff\xff J\xff\xff\xff\xff I99999999999999999999\n I01\n L9L\n F1e999\n Fnan\n
        \x8a\x00 \x8a\xff \x8b\xff\xff\xff\xff \x8b\x00\x00\x00\x7f G\x7f\xf8\0\0\0\0\0\0 \x82\x01 \x84\x01\0\0\0
        X\xff\xff\xff\xff X\x01\0\0\0a Vx\\ud800\n S'a'\n T\x01\0\0\0a U\x01a \x95\0\0\0\0\0\0\0\0
        q\x00 h\x00 r\xff\xff\xff\xff j\xff\xff\xff\xff \x94 p-1\n g0\n p99999999999\n
        """.split()
    ),
    *(opcode + b"\xff" * 8 for opcode in (b"\x8d", b"\x8e", b"\x95", b"\x96")),
    *(b"](" + b"h\x00" * 500 + b"e", b"\x85" * 500, b"q\x000h\x00h\x00\x86" * 40),
)


def _pickled(rng: Random, data: bytes) -> bytes:
    places: list[int] = []
    with contextlib.suppress(ValueError, pickle.UnpicklingError):
        places += [at for _, _, at in pickletools.genops(data) if at is not None]
    codes = [data[a:b] for a, b in zip(places, [*places[1:], len(data)], strict=True)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        i = rng.randrange(len(codes))
        what = rng.randrange(8)
        if what == 0 and len(codes) > 1:
            del codes[i]
        elif what == 1:
            codes.insert(i, rng.choice(codes))
        elif what == 2:
            j = rng.randrange(len(codes))
            codes[i], codes[j] = codes[j], codes[i]
        elif what == 3:
            codes[i] = rng.choice(_SNIPPETS)
        elif what == 4 and len(codes[i]) > 1:
            codes[i] = codes[i][:1] + havoc(rng, codes[i][1:])
        elif what == 5 and len(codes[i]) in (2, 3, 5):
            size = len(codes[i]) - 1
            codes[i] = codes[i][:1] + (rng.choice(_NUMBERS) & (256**size - 1)).to_bytes(size, "little")
        else:
            codes.insert(i, rng.choice(_SNIPPETS))
    return b"".join(codes)[:_MOST_BYTES]


pickled = _or_havoc(_pickled)


# --- tensors and text -----------------------------------------------------------------------------------------------


def _safetensors(rng: Random, data: bytes) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size], data[8 + size :]
    what = rng.randrange(8)
    if what < 4 and b"__metadata__" in header:  # hcmen's own JSON, as a text in that of the header
        parts = json.loads(header)
        parts["__metadata__"]["state"] = _json(rng, parts["__metadata__"]["state"].encode()).decode("utf-8", "replace")
        header = json.dumps(parts).encode()
    elif what < 7:
        header = _json(rng, header)
    else:
        body = rng.choice((b"", body[:-1], body + b"\0", b"\xff" * len(body)))
    announced = rng.choice((*[len(header)] * 6, 0, 1, len(header) + 1, 1 << 32, (1 << 64) - 1))
    return announced.to_bytes(8, "little") + header + body


safetensors = _or_havoc(_safetensors)


def lines(rng: Random, data: bytes) -> bytes:
    """Lines with others put in: paths of every kind, and what is none."""
    found = data.split(b"\n")
    for _ in range(rng.choice((1, 2, 4))):
        odd = (
            b"",
            b" ",
            b"\r",
            b"\0",
            b"\xff\xfe",
            b"/",
            b".",
            b"..",
            b"/dev/zero",
            b"x" * 5000,
            b"x" * 70_000,
            b"a\0b.npz",
        )
        found.insert(rng.randrange(len(found) + 1), rng.choice((*odd, rng.choice(found))))
    made = rng.choice((b"\n", b"\r\n")).join(found)
    return made if rng.randrange(3) else havoc(rng, made)
