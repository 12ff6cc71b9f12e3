"""What a fork leaves behind, for the objects of the runtime that hold threads.

A forked child has one thread. A session of ONNX Runtime that it inherits waits for the others for ever when it is run,
and also when it is freed, be it at the end of the process. So in the child every inherited session is kept for good and
never touched, and its owner opens another one. No session is being opened by another thread at the moment of a fork, or
a lock inside ONNX Runtime might stay locked in the child.

`os.fork` and all that is built on it are covered (multiprocessing, pre-forking servers); a `fork` called from C code is
not, unless that calls PyOS_AfterFork_Child as it should.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

__all__ = ["Forkable", "keep_for_ever", "opening", "watch"]


class Forkable(Protocol):
    """What `watch` takes."""

    def after_fork(self) -> None:
        """Called in the child, whose only thread is the caller."""
        ...


_lock = threading.RLock()
_watched: weakref.WeakSet[Any] = weakref.WeakSet()


@contextlib.contextmanager
def opening() -> Iterator[None]:
    """A block within which no other thread can fork, and which waits for forks under way."""
    with _lock:
        yield


def watch(item: Forkable) -> None:
    """Calls `item.after_fork` in every child forked from now on, as long as `item` lives."""
    with _lock:
        _watched.add(item)


def keep_for_ever(item: object) -> None:
    """Makes sure that `item` is never freed, not even when the interpreter ends."""
    import ctypes

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(item))


def _in_child() -> None:
    global _lock
    _lock = threading.RLock()
    for item in list(_watched):
        item.after_fork()


if hasattr(os, "register_at_fork"):
    # By way of lambdas: in a child of a child the lock is another one.
    os.register_at_fork(
        before=lambda: _lock.acquire(),
        after_in_parent=lambda: _lock.release(),
        after_in_child=_in_child,
    )
