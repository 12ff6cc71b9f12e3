"""From what was asked for to rows: every combination of bundle, variant, engine, precision, threads and batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from hcmen.base.bundle import Bundle
from hcmen.base.errors import InputError
from hcmen.runtime.backends.options import runs_engines
from hcmen.runtime.benchmark.cold import Cold, cold_kinds, floor_kind, measure_cold
from hcmen.runtime.benchmark.measure import Probe, Settings, measure
from hcmen.runtime.benchmark.peers import CHILD, PEERS, PeerProcess, PeerRunner, check_checkpoint
from hcmen.runtime.benchmark.rows import (
    FUNCTIONS,
    Arrays,
    BatchTooLarge,
    Measured,
    OrtRunner,
    Row,
    Runner,
    Work,
    failed,
    make_work,
)
from hcmen.runtime.predictor import Predictor

__all__ = ["Plan", "labels"]


def labels(paths: Sequence[str]) -> list[str]:
    """A short name for each bundle folder: the last part of its path, with more of it where that is not enough.

    Raises:
        InputError: a folder is named twice.
    """
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    for i, own in enumerate(parts):
        if own in parts[:i]:
            raise InputError(f"{paths[i]}: named twice, expected different bundles")
    for count in range(1, max(map(len, parts)) + 1):
        short = ["/".join(own[-count:]) for own in parts]
        if len(set(short)) == len(short):
            return short
    return list(paths)


@dataclass
class Plan:
    """What is to be measured, and, after `run`, what was found.

    bundles: label -> opened. variants, threads: all, and the physical cores, where empty. batches: 0 is the golden set.
    against: PEERS and FUNCTIONS. folder: for clips and arrays. cold_rounds: 0 for none.
    trust_engines: as of `TensorRT`. time_limit: seconds of each load and run of a graph.

    Raises:
        InputError: a bundle lacks a variant, a clip does not fit, or the checkpoint is another one.
        BackendError: a backend, or PyTorch, is not there.
        CorruptFileError: a golden file or the clip is damaged.
    """

    bundles: Mapping[str, Bundle]
    variants: Sequence[str]
    backends: Sequence[str]
    precisions: Sequence[str]
    threads: Sequence[int]
    batches: Sequence[int]
    clip: str | None
    against: Sequence[str]
    checkpoint: str
    settings: Settings
    cold_rounds: int
    folder: Path
    trust_engines: bool = False
    time_limit: float | None = None
    measured: list[Measured] = field(default_factory=list)
    colds: list[Cold] = field(default_factory=list)
    probe_ns: list[int] = field(default_factory=list)
    memory_probe_ns: list[int] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._models: dict[tuple[str, str, str, int | None], Predictor] = {}
        self._work: dict[tuple[str, str, int], Work] = {}
        self._rows: list[tuple[Measured, Bundle]] = []
        for label, bundle in self.bundles.items():
            for variant in self.variants:
                bundle.variant(variant)
            for model in self._engines(label, bundle):
                for variant in self._variants(bundle):
                    for batch in self.batches:
                        self._add(label, bundle, variant, batch, model)
        first = next(iter(self.bundles.values()))
        if self.peers or (self.cold_rounds and "eager" in self.against):
            check_checkpoint(self.checkpoint, first)
        for engine in self.peers:
            for threads in self._threads:
                for variant in self._variants(first):
                    for batch in self.batches:
                        row = Row("", variant, engine, "fp32", threads, batch)
                        self._rows.append((self._note(row, next(iter(self.bundles)), first), first))
        if self.cold_rounds:
            self._plan_cold()

    @property
    def peers(self) -> list[str]:
        """The engines that need PyTorch."""
        return [engine for engine in PEERS if engine in self.against] if self.settings.rounds else []

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages whose versions matter besides those of the runtime."""
        return ("torch",) if set(PEERS) & set(self.against) else ()

    @property
    def most_threads(self) -> int:
        """The most threads that any row has."""
        return max((m.row.threads or 1 for m in self.measured), default=max(self._threads, default=1))

    @property
    def steps(self) -> int:
        """How many turns there are."""
        return len(self._rows) * (1 + self.settings.rounds) + len(self.colds) * (1 + self.cold_rounds)

    @property
    def exit_code(self) -> int:
        """0, or that of the gravest failure of a row of a bundle: a peer that fails is told and fails nothing."""
        codes = [m.exit_code for m in self.measured if m.row.engine not in PEERS]
        return max(
            [*codes, *(3 for c in self.colds if c.status == "failed" and not c.kind.startswith("eager"))], default=0
        )

    @property
    def _threads(self) -> tuple[int, ...]:
        from hcmen.runtime.backends.ort import physical_cores

        return tuple(dict.fromkeys(self.threads)) or (physical_cores(),)

    def _variants(self, bundle: Bundle) -> list[str]:
        return list(dict.fromkeys(self.variants)) or list(bundle.manifest.variants)

    def _engines(self, label: str, bundle: Bundle) -> list[tuple[str, str, int | None]]:
        """(engine, precision, threads) of one bundle, each with a predictor that works."""
        if not self.settings.rounds:
            return []
        found: list[tuple[str, str, int | None]] = []
        own = bundle.manifest.precision
        for engine in (*dict.fromkeys(self.backends), *((FUNCTIONS,) if FUNCTIONS in self.against else ())):
            if runs_engines(engine):
                found += [(engine, p, None) for p in dict.fromkeys(self.precisions)] or [(engine, "", None)]
            else:
                found += [(engine, own, threads) for threads in self._threads]
        made = []
        for engine, precision, threads in found:
            model = self._make(bundle, engine, precision, threads)
            if runs_engines(engine) and not precision:
                precision = getattr(model.backend, "precision", None) or "auto"
            self._models[label, engine, precision, threads] = model
            made.append((engine, precision, threads))
        return made

    def _make(self, bundle: Bundle, engine: str, precision: str, threads: int | None) -> Predictor:
        if runs_engines(engine):
            wanted = precision if precision in self.precisions else None
            return Predictor(
                bundle,
                backend=engine,
                precision=wanted,
                time_limit=self.time_limit,
                trust_engines=self.trust_engines,
            )
        from hcmen.runtime.backends.ort import LEFT_OUT

        backend = "ort" if engine == FUNCTIONS else engine
        model = Predictor(bundle, backend=backend, threads=threads, time_limit=self.time_limit)
        if engine == FUNCTIONS:
            # Before a session is made: without the library they take the functions that the graphs carry.
            model.backend.library, model.backend.library_problem = None, LEFT_OUT  # type: ignore[union-attr]
        return model

    def _add(self, label: str, bundle: Bundle, variant: str, batch: int, engine: tuple[str, str, int | None]) -> None:
        row = Row(label if len(self.bundles) > 1 else "", variant, engine[0], engine[1], engine[2], batch)
        self._rows.append((self._note(row, label, bundle), bundle))

    def _note(self, row: Row, label: str, bundle: Bundle) -> Measured:
        """A row with its inputs; one whose inputs cannot be had has failed already."""
        measured = Measured(row)
        self.measured.append(measured)
        key = (label, row.variant, row.batch)
        if key not in self._work:
            try:
                self._work[key] = make_work(bundle, row.variant, row.batch, self.folder, self.clip, self.settings.seed)
            except InputError as error:
                if self.clip is not None and not isinstance(error, BatchTooLarge):
                    raise
                failed(measured, error)
                return measured
        measured.work = self._work[key]
        return measured

    def _plan_cold(self) -> None:
        self.colds.append(floor_kind())
        for label, bundle in self.bundles.items():
            clips = {}
            for variant in self._variants(bundle):
                work = make_work(bundle, variant, 1, self.folder, self.clip, self.settings.seed)
                clips[variant] = work.paths[0]
            backend = self.backends[0]
            self.colds += cold_kinds(
                label if len(self.bundles) > 1 else "",
                str(bundle.path),
                clips,
                None if runs_engines(backend) else self._threads[0],
                backend,
                self.checkpoint if "eager" in self.against and bundle is next(iter(self.bundles.values())) else None,
                CHILD,
                trust_engines=self.trust_engines,
            )

    def run(self, progress: Callable[[str], None]) -> None:
        """Measures everything; what is measured when an exception flies stays in `measured` and `colds`."""
        if self._rows:
            self._run_rows(progress)
        if self.colds:
            measure_cold(
                self.colds, self.cold_rounds, self.settings.seed, lambda kind: progress(f"fresh process, {kind}")
            )

    def _run_rows(self, progress: Callable[[str], None]) -> None:
        probe = Probe(self.most_threads)
        self.probe_ns, self.memory_probe_ns = probe.ns, probe.memory_ns
        with ExitStack() as stack:
            stack.callback(probe.close)
            process = stack.enter_context(PeerProcess(self.checkpoint, self.folder)) if self.peers else None
            if process is not None:
                self.versions = process.versions
            references: dict[tuple[str, int], Sequence[Arrays]] = {}
            runners = [self._runner(measured, bundle, process, references) for measured, bundle in self._rows]
            measure([r for r in runners if r is not None], self.settings, probe, progress)

    def _runner(
        self,
        measured: Measured,
        bundle: Bundle,
        process: PeerProcess | None,
        references: dict[tuple[str, int], Sequence[Arrays]],
    ) -> Runner | None:
        row = measured.row
        if measured.work is None:
            return None
        key = (row.variant, row.batch)
        same = bundle.manifest.source.get("checkpoint_sha256") == next(iter(self.bundles.values())).manifest.source.get(
            "checkpoint_sha256"
        )
        if process is not None and same and key not in references:
            references[key] = process.outputs("eager", row.variant, self._threads[0], measured.work.feeds)
        if row.engine in PEERS:
            assert process is not None
            return PeerRunner(measured, process, bundle, references[key])
        label = row.bundle or next(iter(self.bundles))
        shared = self._models[label, row.engine, row.precision, row.threads]
        make = partial(self._make, bundle, row.engine, row.precision, row.threads)
        runner = OrtRunner(measured, bundle, shared, make)
        runner.reference = references.get(key) if same else None
        return runner
