"""Measuring: check, load, warm up, then rounds in which every row has one turn.

A round visits all rows in a random order of its own, drawn from a seed, so that a slow spell of the machine meets all
rows alike and no row always follows the same one. A turn is some untimed calls, which bring the row's weights back into
the caches and its threads back to work, then the timed ones. What a service in steady use sees is measured, not what a
call after a long pause costs; that is `--cold`.

Each round also times a probe, two fixed pieces of NumPy work on as many threads as the widest row has: one that
computes and one that moves memory. It uses nothing of what is benchmarked, so what it shows is the machine.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from hcmen.base.errors import HcmenError
from hcmen.runtime.benchmark.machine import waited_ns
from hcmen.runtime.benchmark.rows import Measured, Runner, failed, judged
from hcmen.runtime.benchmark.stats import settled

__all__ = ["Probe", "Settings", "measure", "round_orders", "warm_up"]

_MOST_WARM_UP = 100
_WARM_UP_SECONDS = 5.0
_SETTLE_SECONDS = 0.002
_TURN_SECONDS = 0.5


@dataclass(frozen=True)
class Settings:
    """rounds: turns of each row. calls: timed calls of a turn at most; a turn of slow calls has fewer, to take about
    0.5 s. warm_up: calls before timing, None for until they settle. loads: how often each session is made anew. seed:
    of the orders and the random clips.
    """

    rounds: int = 30
    calls: int = 10
    warm_up: int | None = None
    loads: int = 3
    seed: int = 0


class Probe:
    """Fixed work on `threads` threads at once: exponentials over 1 MiB each, four times, about a millisecond or two.

    And copies of 8 MiB each, twice, since caches and memory are shared with more than cores are: on a virtual machine
    whose cores were its own (no time stolen, others 0.2 % busy), a model's time went up and down by 16 % within 75
    seconds, with a correlation of 0.8 to either piece of work.

    A time is that of the slowest thread, from a common start, so a core that is busy with something else shows.
    """

    def __init__(self, threads: int):
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="probe")
        self._start = threading.Barrier(threads)
        self._arrays = [np.linspace(-4.0, 4.0, 1 << 18, dtype=np.float32) for _ in range(threads)]
        self._results = [np.empty_like(x) for x in self._arrays]
        self._long = [np.ones(1 << 21, np.float32) for _ in range(threads)]
        self._copies = [x.copy() for x in self._long]
        self.ns: list[int] = []
        self.memory_ns: list[int] = []

    def _compute(self, i: int) -> int:
        self._start.wait()
        started = time.perf_counter_ns()
        for _ in range(4):
            np.exp(self._arrays[i], out=self._results[i])
        return time.perf_counter_ns() - started

    def _copy(self, i: int) -> int:
        self._start.wait()
        started = time.perf_counter_ns()
        for _ in range(2):
            np.copyto(self._copies[i], self._long[i])
        return time.perf_counter_ns() - started

    def turn(self, *, keep: bool = True) -> None:
        """One sample of each piece of work, after one untimed one."""
        for work, taken in ((self._compute, self.ns), (self._copy, self.memory_ns)):
            for kept in (False, keep):
                slowest = max(self._pool.map(work, range(self.threads)))
                if kept:
                    taken.append(slowest)

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def round_orders(rows: int, rounds: int, seed: int) -> list[list[int]]:
    """Per round, the order of `rows` turns."""
    rng = np.random.default_rng(seed)
    return [rng.permutation(rows).tolist() for _ in range(rounds)]


def warm_up(once: Callable[[], float], count: int | None) -> tuple[list[float], bool]:
    """Calls `once`, which gives its seconds, `count` times, or until two windows of five calls agree within 5 %.

    Returns the seconds, and whether they settled; they are given up on after 100 calls or five seconds.
    """
    taken: list[float] = []
    started = time.monotonic()
    while count is None or len(taken) < count:
        taken.append(once())
        if count is None:
            if settled(taken):
                return taken, True
            if len(taken) >= _MOST_WARM_UP or (len(taken) >= 2 and time.monotonic() - started > _WARM_UP_SECONDS):
                return taken, False
    return taken, settled(taken)


def measure(
    runners: Sequence[Runner], settings: Settings, probe: Probe, progress: Callable[[str], None] = lambda name: None
) -> None:
    """Checks and measures all rows, into their `measured`; what is there when an exception flies is kept.

    Args:
        runners: the rows. probe: of the machine. progress: told the name of each row whose turn is over: once when it
            is checked, once per round.

    An error of one row ends that row and no other.
    """
    plans: dict[int, tuple[int, int]] = {}
    for i, runner in enumerate(runners):
        if runner.measured.status == "unmeasured":
            _guarded(runner.measured, lambda i=i, runner=runner: plans.update({i: _prepare(runner, settings)}))  # type: ignore[misc]
        progress(runner.measured.row.name)
    for order in round_orders(len(runners) + 1, settings.rounds, settings.seed):
        for place in order:
            if place == len(runners):
                probe.turn()
                continue
            runner = runners[place]
            if runner.measured.status == "ok":
                settle, calls = plans[place]
                _guarded(runner.measured, lambda r=runner, s=settle, c=calls: _turn(r, s, c))  # type: ignore[misc]
            progress(runner.measured.row.name)


def _guarded(measured: Measured, action: Callable[[], object]) -> None:
    try:
        action()
    except (HcmenError, MemoryError, OSError) as error:
        failed(measured, error)


def _prepare(runner: Runner, settings: Settings) -> tuple[int, int]:
    """Checks, loads and warms up one row; how many calls of a turn go untimed, and how many are timed."""
    measured = runner.measured
    judged(measured, runner.check())
    if measured.status == "wrong":
        return 0, 0
    for _ in range(settings.loads):
        times = runner.load()
        if times is not None:
            measured.load_ms.append(times[0])
            measured.first_ms.append(times[1])
    taken, measured.warm_up_settled = warm_up(lambda: runner.time_runs(0, 1)[0] / 1e9, settings.warm_up)
    measured.warm_up = len(taken)
    measured.status = "ok"
    usual = statistics.median(taken[-5:]) if taken else runner.time_runs(1, 1)[0] / 1e9
    settle = min(50, max(1 if usual > 0.05 else 2, round(_SETTLE_SECONDS / max(usual, 1e-9))))
    return settle, max(1, min(settings.calls, round(_TURN_SECONDS / max(usual, 1e-9))))


def _turn(runner: Runner, settle: int, calls: int) -> None:
    """Both measurements of a turn, kept together or not at all, so that the rounds of the two stay paired."""
    measured = runner.measured
    before, started = waited_ns(runner.pid), time.perf_counter_ns()
    runs = runner.time_runs(settle, calls)
    ends = runner.time_calls(1, calls)
    measured.turns_ns += time.perf_counter_ns() - started
    after = waited_ns(runner.pid)
    waits = [after[thread] - before[thread] for thread in after.keys() & before.keys()]
    measured.waited_ns = measured.waited_ns + max(waits) if waits and measured.waited_ns is not None else None
    measured.run_ns.append(runs)
    if ends:
        measured.call_ns.append(ends)
