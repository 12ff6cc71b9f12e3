"""What helps against a pickle that the safe unpickler refuses: it depends on what wrote it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import PurePath
from typing import Any

from hcmen.base.errors import CorruptFileError, HcmenError, InputError, shown
from hcmen.base.strangers import stranger
from hcmen.base.typed import as_typed
from hcmen.data.table.reading import SUFFIXES

__all__ = ["advice", "contents", "no_pickle"]

_PLAIN = "write it again with plain dicts and NumPy arrays"
_CAUSES = (
    ("'collections.", "turn it into a plain dict, with dict(x) at every level, before pickle.dump"),
    ("'torch", "turn each tensor into a NumPy array, with x.numpy(), before pickle.dump"),
    ("'pandas", "turn each table into a NumPy array, with x.to_numpy(), before pickle.dump"),
    ("'scipy", "turn each matrix into a NumPy array, with x.toarray(), before pickle.dump"),
    ("'copy_reg.", "Python 2 wrote it: load it with pickle.load(file, encoding='latin1') and dump it again"),
    ("'__builtin__.", "Python 2 wrote it: load it with pickle.load(file, encoding='latin1') and dump it again"),
    ("'pathlib.", "turn each path into a string before pickle.dump"),
    ("'datetime.", "turn each date into a string before pickle.dump"),
)
_STORE = "store its arrays with pickle.dump, in the layout of docs/data.md"
_CONVERT = "convert that with hcmen-convert"
_STARTS = (
    (re.compile(rb"\x93NUMPY"), "a single .npy array", _STORE),
    (re.compile(rb"PK\x03\x04.{26}[^\x00]{1,200}\.npy", re.DOTALL), "an .npz archive of arrays", _STORE),
    (re.compile(rb"PK\x03\x04"), "a zip archive", "unpack it first"),
    (re.compile(rb"(?:\xef\xbb\xbf)?\s*[\[{]"), "JSON", _STORE),
)
_WORKBOOKS = (".xls", ".xlsx", ".ods")
_TEXTS = (".json", ".txt", ".md", ".yaml", ".yml")
_EXPECTED = "a pickle of MMSA's layout"
_MOST_KINDS = 5


def no_pickle(head: bytes, name: str) -> HcmenError | None:
    """The error that refuses a file that is no pickle, and says what to do with it; None if it may be one.

    Args:
        head: its first `strangers.HEAD_BYTES` bytes. name: its name.
    """
    path = PurePath(name)
    suffix = path.suffix.lower()
    known = stranger(head, name)
    if suffix in SUFFIXES and (known is None or head.startswith(b"PAR1")):
        line = as_typed("hcmen-convert", name, f"build/{path.stem}")
        return InputError("is a table", fix=f"convert it first with {line}, and give that folder", where=name)
    if suffix in _WORKBOOKS:
        return InputError("is a workbook", "a data file", f"save the sheet as CSV and {_CONVERT}", where=name)
    known = known or next(((what, fix) for start, what, fix in _STARTS if start.match(head)), None)
    if known is None and suffix in _TEXTS:
        known = "a text, by its name", _STORE
    return None if known is None else CorruptFileError(known[0], _EXPECTED, known[1], where=name)


def contents(value: Any) -> str:
    """What a pickle of another layout holds, in a few words."""
    if isinstance(value, dict):
        names = ", ".join(
            shown(key)[:40] if isinstance(key, (str, int)) else type(key).__name__ for key in [*value][:8]
        )
        return f"a dict of {len(value)}: {names}" if value else "an empty dict"
    if isinstance(value, (list, tuple)) and value:
        kinds = Counter(type(x).__name__.lower().replace("ndarray", "array") for x in value[:1000]).most_common()
        told = ", ".join(f"{count} of {kind}" for kind, count in kinds[:_MOST_KINDS])
        return f"a {type(value).__name__} of {len(value)}: {told}"
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" if shape is None else f"an array of shape {list(shape)}"


def advice(problem: str) -> str:
    """What to do about a file that cannot be unpickled.

    Args:
        problem: what was asked for, as "'module.name'", or "ErrorName: message".
    """
    for sign, fix in _CAUSES:
        if problem.startswith(sign):
            return fix
    if problem.startswith(("EOFError", "struct.error", "error:")) or "truncated" in problem:
        return "the end is missing: copy or download it again, and compare its size and SHA-256"
    if problem.startswith("'"):  # a download again would ask for the same, unless it was altered
        return f"if you made it, {_PLAIN}; if not, compare its SHA-256 with its publisher's, or ask them for that"
    return f"if you made it, {_PLAIN}; if not, get it from its publisher again and check its SHA-256"
