"""Rows of anybody's .onnx files, on random inputs: with the kernel library, and by the functions in the file.

There is no eager model to hold them to. So each row's outputs are compared with those of the other before it is timed:
the library's with the functions', and the functions' with the library's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hcmen.base.errors import BackendError, InputError
from hcmen.base.state_records import BATCH
from hcmen.base.typed import as_typed
from hcmen.runtime.backends.limits import check_time_limit
from hcmen.runtime.backends.options import Ort
from hcmen.runtime.backends.ort import NATIVE, STANDARD, OrtBackend, OrtSession, physical_cores
from hcmen.runtime.benchmark.cold import Cold
from hcmen.runtime.benchmark.measure import Probe, Settings, measure
from hcmen.runtime.benchmark.plan import labels
from hcmen.runtime.benchmark.rows import FUNCTIONS, Arrays, Measured, Row, Work, timed
from hcmen.runtime.compare import Comparison
from hcmen.runtime.foreign import ForeignGraph, apart, check_names
from hcmen.runtime.mamba import read_model

__all__ = ["ForeignPlan", "ForeignRunner"]

VARIANT = "graph"
PRECISION = "as stored"
LIBRARY = "ort"


def _backend(engine: str, threads: int | None, time_limit: float | None) -> OrtBackend:
    """Packed, as ONNX Runtime runs a graph for whoever asks for nothing."""
    backend = OrtBackend(Ort(threads=threads, prepack=True), library=engine != FUNCTIONS)
    backend.time_limit = time_limit
    return backend


class ForeignRunner:
    """A row of one file: see `Runner`.

    Args:
        measured: where findings go. session: gives the session that all rows of its kind use. anew: makes another, with
            nothing loaded. expected: gives the outputs of the other engine. tolerance: how far the two may be apart, by
            the largest number of an output.
    """

    pid: int | None = None

    def __init__(
        self,
        measured: Measured,
        session: Callable[[], OrtSession],
        anew: Callable[[], OrtSession],
        expected: Callable[[], Sequence[Arrays]],
        tolerance: float,
    ):
        self.measured = measured
        self._session, self._anew, self._expected = session, anew, expected
        self._tolerance = tolerance

    @property
    def _feed(self) -> Arrays:
        assert self.measured.work is not None
        return self.measured.work.feeds[0]

    def check(self) -> dict[str, Comparison]:
        """Against the other engine; raises BackendError where the library is not there, InputError for no operator."""
        session, engine = self._session(), self.measured.row.engine
        if session.kernels == STANDARD and engine == FUNCTIONS:
            raise InputError("it calls no operator of hcmen's", fix="leave out --against functions")
        if session.kernels not in (STANDARD, NATIVE if engine == LIBRARY else FUNCTIONS):
            raise BackendError("the kernel library is not found", fix=f"see {as_typed('hcmen-doctor')}")
        found = apart([session.run(self._feed)], self._expected(), self._tolerance)
        return {f"output {name}": comparison for name, comparison in found.items()}

    def load(self) -> tuple[float, float] | None:
        """The file read, from the page cache, and its session; and one run."""
        started = time.perf_counter_ns()
        session = self._anew()
        loaded = time.perf_counter_ns()
        session.run(self._feed)
        return (loaded - started) / 1e6, (time.perf_counter_ns() - loaded) / 1e6

    def time_runs(self, settle: int, calls: int) -> list[int]:
        """See `Runner`."""
        run, feed = self._session().run, self._feed
        return timed(lambda: run(feed), settle, calls)

    def time_calls(self, settle: int, calls: int) -> list[int]:
        """None: a file of its own has no clips."""
        return []


@dataclass
class ForeignPlan:
    """What is to be measured of some .onnx files, and, after `run`, what was found; as `Plan`.

    files: paths. sizes, ranges: from `parse_sizes` and `parse_ranges`, of all files. threads: the physical cores, where
    empty. against: FUNCTIONS or nothing. tolerance: see `ForeignRunner`.

    Raises:
        InputError: a file is not there, a size is missing or unknown, or an input is too large.
        CorruptFileError: a file is damaged.
        BackendError: ONNX Runtime is not there, or does not load a file.
    """

    files: Sequence[str]
    sizes: Mapping[str, int]
    ranges: Mapping[str, tuple[int, int]]
    threads: Sequence[int]
    against: Sequence[str]
    settings: Settings
    tolerance: float = 1e-5
    time_limit: float | None = None
    measured: list[Measured] = field(default_factory=list)
    colds: list[Cold] = field(default_factory=list)
    probe_ns: list[int] = field(default_factory=list)
    memory_probe_ns: list[int] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    packages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_time_limit(self.time_limit)
        self._sessions: dict[tuple[str, str, int], OrtSession] = {}
        self._outputs: dict[tuple[str, str], Sequence[Arrays]] = {}
        self._runners: list[ForeignRunner] = []
        self._graphs = dict(zip(labels(self.files), map(ForeignGraph, self.files), strict=True))
        counts = tuple(dict.fromkeys(self.threads)) or (physical_cores(),)
        for label in self._graphs:
            self._session(label, LIBRARY, counts[0])
        check_names(list(self._graphs.values()), self.sizes, self.ranges)
        for label, graph in self._graphs.items():
            sizes = graph.sized(self.sizes)
            feed = graph.random(sizes, self.ranges, self.settings.seed)
            told = ", ".join(f"{name} {n}" for name, n in sizes.items() if name != BATCH)
            first = next((x for x in feed.values() if x.ndim), None)
            batch = sizes.get(BATCH) or (1 if first is None else len(first))
            work = Work([feed], [], batch, f"random inputs{told and f', {told}'}")
            for engine in (LIBRARY, *dict.fromkeys(self.against)):
                for threads in counts:
                    row = Row(label if len(self._graphs) > 1 else "", VARIANT, engine, PRECISION, threads, batch)
                    other = LIBRARY if engine == FUNCTIONS else FUNCTIONS
                    measured = Measured(row, work, truth="the library" if other == LIBRARY else "the functions")
                    self.measured.append(measured)
                    self._runners.append(self._runner(measured, label, other))

    def _runner(self, measured: Measured, label: str, other: str) -> ForeignRunner:
        row, graph = measured.row, self._graphs[label]
        threads = row.threads or 1

        def anew() -> OrtSession:
            backend = _backend(row.engine, threads, self.time_limit)
            return backend.session(*read_model(graph.path), graph.weights_file, graph.path)

        def expected() -> Sequence[Arrays]:
            assert measured.work is not None
            if (label, other) not in self._outputs:
                session = self._session(label, other, threads)
                self._outputs[label, other] = [session.run(feed) for feed in measured.work.feeds]
            return self._outputs[label, other]

        def session() -> OrtSession:
            return self._session(label, row.engine, threads)

        return ForeignRunner(measured, session, anew, expected, self.tolerance)

    def _session(self, label: str, engine: str, threads: int) -> OrtSession:
        key = (label, engine, threads)
        if key not in self._sessions:
            self._sessions[key] = self._graphs[label].session(_backend(engine, threads, self.time_limit))
        return self._sessions[key]

    def described(self) -> list[dict[str, Any]]:
        """The files as the document names them, in the place of bundles."""
        return [
            {
                "label": label,
                "kind": "onnx",
                "path": os.path.abspath(graph.path),
                "manifest_sha256": graph.sha256,
                "precision": PRECISION,
                "weights_bytes": len(graph.content) + len(graph.weights),
                "sizes": graph.sized(self.sizes),
            }
            for label, graph in self._graphs.items()
        ]

    @property
    def most_threads(self) -> int:
        """The most threads that any row has."""
        return max(m.row.threads or 1 for m in self.measured)

    @property
    def steps(self) -> int:
        """How many turns there are."""
        return len(self.measured) * (1 + self.settings.rounds)

    @property
    def exit_code(self) -> int:
        """0, or that of the gravest failure of a row."""
        return max((m.exit_code for m in self.measured), default=0)

    def run(self, progress: Callable[[str], None]) -> None:
        """Measures everything; what is measured when an exception flies stays in `measured`."""
        probe = Probe(self.most_threads)
        self.probe_ns, self.memory_probe_ns = probe.ns, probe.memory_ns
        try:
            measure(self._runners, self.settings, probe, progress)
        finally:
            probe.close()
