"""Time limits of what a backend does: making a session, and running it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import TypeVar

from hcmen.base.errors import BackendError, InputError

__all__ = ["check_time_limit", "within"]

_GRACE_SECONDS = 0.5
T = TypeVar("T")


def check_time_limit(seconds: float | None) -> float | None:
    """`seconds`; raises InputError unless it is a positive number, or None for no limit."""
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise InputError(f"time_limit is of type {type(seconds).__name__}", "seconds, or None for no limit")
    if not 0 < seconds <= threading.TIMEOUT_MAX or math.isnan(seconds):
        raise InputError(f"the time limit is {seconds:g}", f"seconds above 0 and up to {threading.TIMEOUT_MAX:g}")
    return seconds


def within(
    seconds: float | None, work: Callable[[], T], where: str, doing: str, stop: Callable[[], None] | None = None
) -> T:
    """What `work` gives, if it gives it in time. With a limit it runs in a thread of its own, for 0.1 ms more.

    Args:
        seconds: the limit; None calls `work` as it is. where: what is worked on. doing: as in "loading took ...".
        stop: asks `work` to end. Work that goes on all the same is left to its thread, which ends with the process.

    Raises:
        BackendError: it took longer. Whatever `work` raises.
    """
    if seconds is None:
        return work()
    outcome: list[T] = []
    problem: list[BaseException] = []

    def thread() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            problem.append(error)

    worker = threading.Thread(target=thread, name=f"hcmen {doing}", daemon=True)
    worker.start()
    try:
        worker.join(seconds)
    except BaseException:
        _leave()  # whether the thread lives is not to be had: an interrupted join marks it as ended up to Python 3.12
        raise
    if worker.is_alive():
        if stop is not None:
            stop()
            worker.join(_GRACE_SECONDS)
        if worker.is_alive():
            _leave()
        raise BackendError(
            f"{doing} took more than {seconds:g} s", fix="give a longer time limit, or do not use it", where=where
        )
    if problem:
        raise problem[0]
    return outcome[0]


def _leave() -> None:
    """Lets a command end its process at once: the interpreter's own end would pull the memory from under the thread."""
    from hcmen.base.console import end_at_once

    end_at_once()
