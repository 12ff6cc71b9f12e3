"""Headers of .npy files, read without Python's parser.

NumPy reads them with `ast.literal_eval`, which a hostile header drives into recursion, tokenizer errors and warnings,
and which fails in threads of Python 3.11 (SystemError "AST constructor recursion depth mismatch"). What is written
there is a dict of three plain values, so a pattern for each will do.
"""

from __future__ import annotations

import re
from typing import IO, Any

import numpy as np

__all__ = ["read_header"]

_MAGIC = b"\x93NUMPY"
_MOST_BYTES = 4096
_KEYS = {"descr", "fortran_order", "shape"}
_TEXT = r"(?:'[^'\"\\]{0,99}'|\"[^'\"\\]{0,99}\")"
_FIELD = re.compile(rf"\( ?({_TEXT}) ?, ?({_TEXT}) ?\),? ?")
_SHAPE = r"\( ?(?:\d{1,20}L? ?, ?){0,64}(?:\d{1,20}L?)? ?\)"
_VALUE = rf"{_TEXT}|True|False|{_SHAPE}|\[(?:{_FIELD.pattern}){{1,99}}\]"
_ENTRY = re.compile(rf"\s*['\"](\w+)['\"]\s*:\s*(?P<value>{_VALUE})\s*(?:,|(?=\}}))")


def read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, and dtype of an .npy array, whose bytes come next in `stream`.

    Raises:
        ValueError: no header of version 1.0 or 2.0 as NumPy writes it.
    """
    start = stream.read(8)
    if not start.startswith(_MAGIC) or len(start) < 8:
        raise ValueError("it does not begin as one")
    if start[6:] not in (b"\x01\x00", b"\x02\x00"):
        raise ValueError(f".npy version {start[6]}.{start[7]}")
    size = int.from_bytes(stream.read(2 if start[6] == 1 else 4), "little")
    if size > _MOST_BYTES:
        raise ValueError(f"it has {size} bytes, at most {_MOST_BYTES} are read")
    content = stream.read(size)
    text = content.decode("latin1").strip()
    found: dict[str, str] = {}
    at = 1 if len(content) == size and text.startswith("{") else len(text)
    while entry := _ENTRY.match(text, at):
        found[entry[1]], at = entry["value"], entry.end()
    if text[at:].strip() != "}" or set(found) != _KEYS or found["shape"][0] != "(":
        raise ValueError("not the dict that NumPy writes")
    order = {"True": True, "False": False}.get(found["fortran_order"])
    if order is None:
        raise ValueError("fortran_order is neither True nor False")
    return tuple(map(int, re.findall(r"\d+", found["shape"]))), order, _dtype(found["descr"])


def _dtype(text: str) -> np.dtype[Any]:
    try:
        if text[0] == "[":
            return np.dtype([(name[1:-1], kind[1:-1]) for name, kind in _FIELD.findall(text)])
        if text[0] in "'\"":
            return np.dtype(text[1:-1])
    except (TypeError, ValueError, SyntaxError, OverflowError, MemoryError) as error:
        raise ValueError(f"descr is {text[:100]}") from error
    raise ValueError("descr is no dtype")
