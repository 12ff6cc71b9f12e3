"""Ctrl-C and SIGTERM while a library does not let Python answer: a command ends all the same.

Python answers a signal in its main thread, between two steps of its own. While that thread is inside ONNX Runtime it is
deaf. The interpreter's C code writes the signal's number to a pipe at once, though, which another thread reads: it
tells what is running to stop, waits a little, and then ends the process with the signal's exit code.

What is raised in the main thread may also be dropped on its way up: CPython's compiler does so where it folds
constants, and some libraries that call Python back. The thread sees that by a weak reference, and signals once more.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Protocol

__all__ = ["Stoppable", "deaf", "end_by_signal", "stoppable", "told", "uninterrupted"]

_PATIENCE_SECONDS = 1.0
"""How long a signal may go unanswered."""

_LOOK_SECONDS = 0.05
"""How often the thread looks whether what was raised has been dropped."""


class Stoppable(Protocol):
    """What is running; ONNX Runtime's RunOptions are one."""

    terminate: bool


_running: set[Any] = set()
_answered = threading.Event()
_raised: weakref.ref[BaseException] | None = None  # by the last signal; None once it has been told of
_dropped: list[weakref.ref[BaseException]] = []  # it, if nothing holds it any more
_pipe: int | None = None  # where signals are written while a command is watched


@contextlib.contextmanager
def stoppable(run: Stoppable) -> Iterator[None]:
    """A block whose `run.terminate` is set when the command is to end."""
    if _pipe is None:
        yield
        return
    _running.add(run)
    try:
        yield
    finally:
        _running.discard(run)


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """A block within which a signal ends the process by itself, a shell sees 130 or 143.

    For a call during which no thread can run Python, or that calls Python back and drops what is raised there.
    """
    if _pipe is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    heard = [n for n, handler in before.items() if callable(handler)]
    for n in heard:
        signal.signal(n, signal.SIG_DFL)
    try:
        yield
    finally:
        for n in heard:
            signal.signal(n, before[n])


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Puts Ctrl-C and SIGTERM off until the block is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    late: list[int] = []

    def put_off(number: int, frame: FrameType | None) -> None:
        _answered.set()  # or the block would be cut short after the thread's patience
        late.append(number)

    before = {s: signal.signal(s, put_off) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
        for number in late:
            signal.raise_signal(number)


@contextlib.contextmanager
def end_by_signal(ends: dict[int, type[BaseException]]) -> Iterator[None]:
    """Watches a command: each signal raises in the main thread, or ends the process where that does not answer.

    What is raised and dropped is raised again, until the block ends or `told` is called.

    Args:
        ends: signal -> the class of what is raised, one that takes weak references, as no built-in exception does.
    """
    global _pipe
    if threading.current_thread() is not threading.main_thread() or _pipe is not None:
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {}
    for number, end in ends.items():
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup, or in a shell's background
            before[number] = signal.signal(number, _answering(end))
    _answered.clear()
    _pipe = writing
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watched = (reading, frozenset(before), threading.get_ident())
    thread = threading.Thread(target=_watch, args=watched, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        _pipe = None
        told()
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        os.close(writing)  # ends the thread, which closes the other end


def told() -> None:
    """Has nothing raised again: the command has said why it ends."""
    global _raised
    _raised = None
    _dropped.clear()


def _answering(end: type[BaseException]) -> Callable[[int, FrameType | None], None]:
    def answer(number: int, frame: FrameType | None) -> None:
        global _raised
        error = end()
        _raised = weakref.ref(error, _dropped.append)  # a function of C: no signal is answered within it
        _answered.set()
        try:
            raise error
        finally:
            del error  # its traceback holds this frame, which would hold it in turn

    return answer


def _watch(pipe: int, numbers: frozenset[int], main: int) -> None:
    number = 0
    with os.fdopen(pipe, "rb", buffering=0) as signals:
        while True:
            ready, _, _ = select.select([signals], [], [], None if _raised is None else _LOOK_SECONDS)
            if not ready:
                if _dropped:
                    _dropped.clear()
                    signal.pthread_kill(main, number)  # sent elsewhere it would not end a call that waits
                continue
            came = signals.read(1)
            if not came:
                return
            if came[0] not in numbers:
                continue
            number = came[0]
            for run in list(_running):
                run.terminate = True
            if not _answered.wait(_PATIENCE_SECONDS):
                _end(number)
            _answered.clear()


def _end(number: int) -> None:
    import sys

    word = "interrupted" if number == signal.SIGINT else "terminated"
    with contextlib.suppress(OSError):
        os.write(2, f"error: {word}\n".encode())
    # What was printed goes out, unless the thread that does not answer holds the stream or its reader has stopped.
    flush = threading.Thread(target=_flush, args=(sys.stdout,), daemon=True)
    with contextlib.suppress(RuntimeError, MemoryError):  # no memory is left for a thread
        flush.start()
        flush.join(0.3)
    os._exit(128 + number)


def _flush(stream: Any) -> None:
    with contextlib.suppress(ValueError, OSError, AttributeError):
        stream.flush()


def _in_child() -> None:
    """A forked child has no such thread, and its signals are not its parent's."""
    global _pipe
    if _pipe is not None:
        _pipe = None
        signal.set_wakeup_fd(-1)
    _running.clear()
    told()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
