"""What helps against a pickle that the safe unpickler refuses: it depends on what wrote it."""

from __future__ import annotations

import re
from pathlib import PurePath

from hcmen.base.strangers import stranger

__all__ = ["advice", "no_pickle"]

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
_STARTS = (
    (re.compile(rb"\x93NUMPY"), "a single .npy array", _STORE),
    (re.compile(rb"PK\x03\x04.{26}[^\x00]{1,200}\.npy", re.DOTALL), "an .npz archive of arrays", _STORE),
    (re.compile(rb"PK\x03\x04"), "a zip archive", "unpack it first"),
    (re.compile(rb"(?:\xef\xbb\xbf)?\s*[\[{]"), "JSON", _STORE),
)
_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".txt", ".md", ".yaml", ".yml", ".xls", ".ods")


def no_pickle(head: bytes, name: str) -> tuple[str, str] | None:
    """What a file is that is no pickle, and what to do with it; None if it may be one.

    Args:
        head: its first `strangers.HEAD_BYTES` bytes. name: its name.
    """
    known = stranger(head, name) or next(((what, fix) for start, what, fix in _STARTS if start.match(head)), None)
    if known is None and PurePath(name).suffix.lower() in _TABLES:
        return "a text or table, by its name", _STORE
    return known


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
