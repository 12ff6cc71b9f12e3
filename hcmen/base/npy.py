"""Reading .npy headers with NumPy in several threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["undisturbed"]

T = TypeVar("T")
_TRIES = 20


def undisturbed(read: Callable[..., T], *arguments: Any) -> T:
    """What `read(*arguments)` gives, which reads a header of an .npy; done again where another thread disturbed it.

    NumPy reads a header with `ast.literal_eval`. Python 3.11 counts the depth of the trees that it makes for all
    threads together. A switch half way ends in SystemError "AST constructor recursion depth mismatch": 4 of 1,000 calls
    in four threads that do nothing else and collect garbage at every allocation (3.11.7; none on 3.10, 3.12 and 3.13).
    """
    for _ in range(_TRIES):
        try:
            return read(*arguments)
        except SystemError:
            continue
    return read(*arguments)
