"""The header of a .npy file that is not trusted, read without evaluating it.

NumPy reads a header with `ast.literal_eval`. What a hostile one raises there, or warns of, is another thing in every
version of Python: 300 parentheses are a MemoryError in 3.11, the escape '\\d' is a SyntaxWarning from 3.12 on. And 3.11
counts the depth of trees for all threads together, so that threads which read sound headers end in SystemError
"AST constructor recursion depth mismatch" by chance. Every writer writes one form, which is read here by that form.
"""

from __future__ import annotations

import math
import re
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["NpyHeader", "read_npy_header"]

_MOST_BYTES = 4096
_ITEM = re.compile(
    r"""\s*(['"])(?P<key>\w+)\1\s*:\s*"""
    r"""(?:(['"])(?P<descr>[<>|=]?[A-Za-z][0-9]{0,9}(?:\[\w+\])?)\3|(?P<order>True|False)|\((?P<shape>[0-9L,\s]*)\)"""
    r"""|\[(?P<fields>[\w'<>|=(), ]*)\])"""
    r"""\s*(?:,|\Z)"""
)
_FIELD = re.compile(r"\('(\w+)', '([<>|=]?[A-Za-z][0-9]{0,9})'\)(?:, |\Z)")
_LENGTH = re.compile(r"\s*(0|[1-9][0-9]{0,17})L?\s*\Z")  # Python 2 wrote an L


class NpyHeader(NamedTuple):
    """What a .npy file holds, and where it begins: `offset` bytes from the start."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def array(self, content: bytes) -> NDArray[Any]:
        """The array in the whole of the file; raises ValueError where that is of another size."""
        if self.dtype.hasobject:
            raise ValueError("it holds Python objects")
        if len(content) != self.offset + self.nbytes:
            raise ValueError(f"{len(content)} bytes, expected {self.offset + self.nbytes}")
        values = np.frombuffer(content, self.dtype, offset=self.offset)
        return values.reshape(self.shape, order="F" if self.fortran else "C")


def read_npy_header(stream: IO[bytes]) -> NpyHeader:
    """The header at the begin of `stream`, which stands behind it then.

    Raises:
        ValueError: there is none, or none that a writer of arrays makes; the reason is short.
    """
    start = stream.read(8)
    if len(start) < 8 or start[:6] != b"\x93NUMPY":
        raise ValueError("it does not begin as an .npy does")
    if start[6:] not in (b"\x01\x00", b"\x02\x00"):
        raise ValueError(f".npy version {start[6]}.{start[7]}")
    prefix = stream.read(2 * start[6])
    length = int.from_bytes(prefix, "little")
    if length > _MOST_BYTES:
        raise ValueError(f"{length} bytes long")
    text = stream.read(length).decode("latin1")
    if len(prefix) < 2 * start[6] or len(text) < length:
        raise ValueError("it ends too early")
    found = _items(text.strip())
    try:
        dtype = np.dtype(_fields(found["fields"]) if "fields" in found else found["descr"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"no dtype {found.get('descr', 'of records')[:20]!r}") from error
    return NpyHeader(_shape(found["shape"]), found["order"] == "True", dtype, 8 + len(prefix) + length)


def _items(text: str) -> dict[str, str]:
    """descr, order and shape as they are spelt."""
    found: dict[str, str] = {}
    names = {"descr": "descr", "fortran_order": "order", "shape": "shape"}
    if text[:1] == "{" and text[-1:] == "}":
        body, at = text[1:-1].strip(), 0
        while item := _ITEM.match(body, at):
            name = "fields" if item["key"] == "descr" and item["fields"] is not None else names.get(item["key"])
            if name is None or item[name] is None or name in found:
                break
            found[name], at = item[name], item.end()
        if at == len(body) and len(found) == 3 and {"order", "shape"} < found.keys():
            return found
    raise ValueError("no dictionary of descr, fortran_order and shape")


def _fields(text: str) -> list[tuple[str, str]]:
    """The fields of records, which no array here has, so that a message can name them."""
    found = [(field[1], field[2]) for field in _FIELD.finditer(text)]
    if sum(len(name) + len(kind) for name, kind in found) + 10 * len(found) - 2 != len(text):
        raise ValueError("no fields of records")
    return found


def _shape(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not parts[-1].strip():  # a comma may end it, and must where it is one number
        parts.pop()
    elif len(parts) == 1:
        raise ValueError("its shape is a number")
    lengths = [_LENGTH.match(part) for part in parts]
    if len(parts) > 32 or not all(lengths):
        raise ValueError("its shape is no tuple of lengths")
    return tuple(int(n[1]) for n in lengths if n)
