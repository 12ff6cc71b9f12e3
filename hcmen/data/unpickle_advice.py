"""What helps against a pickle that the safe unpickler refuses: it depends on what wrote it."""

from __future__ import annotations

__all__ = ["advice"]

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
    ("UnicodeDecodeError", "Python 2 wrote it: load it with pickle.load(file, encoding='latin1') and dump it again"),
)


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
