"""The rows of a benchmark: what is run, and how it is checked, loaded and called.

A row is one variant of one bundle on one engine, with a thread count and a batch size. Every row is checked against the
eager model's golden outputs before it is timed; a row with wrong numbers is never timed.

Two times are taken of a row:

    run     the graph alone: inputs ready as arrays, outputs back as arrays (`Predictor.run`)
    call    end to end: `model(path)` with the clip's file read, checked, batched, run, and made into a `Result`
"""

from __future__ import annotations

import contextlib
import gc
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hcmen.base.bundle import Bundle
from hcmen.base.clip import Clip, batch_clips, read_clip, write_clip
from hcmen.base.console import describe_error, one_line
from hcmen.base.errors import CheckFailed, InputError
from hcmen.base.modalities import variant_named
from hcmen.base.typed import as_typed
from hcmen.runtime.backends.options import runs_engines
from hcmen.runtime.benchmark.machine import free_memory_mib
from hcmen.runtime.compare import Comparison, compare
from hcmen.runtime.golden import golden_test
from hcmen.runtime.predictor import Predictor

if TYPE_CHECKING:
    from hcmen.base.inputs import Inputs

__all__ = [
    "FUNCTIONS",
    "Measured",
    "OrtRunner",
    "Row",
    "Runner",
    "Work",
    "check_golden",
    "check_outputs",
    "failed",
    "golden_inputs",
    "judged",
    "make_work",
    "timed",
]

FUNCTIONS = "functions"
"""The engine name of plain ONNX Runtime without the kernel library: the ops as functions of standard operators."""
_SPARE = 0.8  # the share of the free memory that a batch's inputs may take

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Row:
    """What identifies a row. bundle: its label, "" for a row of the checkpoint. threads: None where an engine has none.

    batch: clips at once; 0 for all golden inputs one after the other, as ragged as they come.
    """

    bundle: str
    variant: str
    engine: str
    precision: str
    threads: int | None
    batch: int

    @property
    def name(self) -> str:
        """The row in words."""
        parts = [self.variant, self.engine, self.precision]
        parts += [f"{self.threads} thread{'s' if self.threads > 1 else ''}"] if self.threads else []
        parts += [f"batch {self.batch}" if self.batch else "golden inputs"]
        return ", ".join([*([self.bundle] if self.bundle else []), *parts])


@dataclass(frozen=True)
class Work:
    """What the rows of one variant and batch are given.

    feeds: graph inputs, one dict per graph run (one, unless these are the golden inputs). paths: the clip files of an
    end-to-end call, [] where there is none. clips: how many one run over all feeds scores. what: in words.
    """

    feeds: list[Arrays]
    paths: list[str]
    clips: int
    what: str

    @property
    def shapes(self) -> list[dict[str, list[int]]]:
        """The shape of every input of every feed: what another run must equal to be comparable."""
        return [{name: list(x.shape) for name, x in sorted(feed.items())} for feed in self.feeds]


@dataclass
class Measured:
    """What was found of a row. status: "ok", "wrong" (numbers differ from eager), "failed" or "unmeasured".

    run_ns, call_ns: per round, the calls of its turn, in nanoseconds. load_ms: creating the session with nothing of the
    bundle loaded. first_ms: the first run of a new session. warm_up: calls before timing, and whether they settled.
    turns_ns: all its turns. waited_ns: of those, how long the thread that waited longest had no core; None: not known.
    truth: what its numbers are compared with.
    """

    row: Row
    work: Work | None = None
    status: str = "unmeasured"
    reason: str = ""
    checks: dict[str, Comparison] = field(default_factory=dict)
    load_ms: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)
    warm_up: int = 0
    warm_up_settled: bool = False
    run_ns: list[list[int]] = field(default_factory=list)
    call_ns: list[list[int]] = field(default_factory=list)
    turns_ns: int = 0
    waited_ns: int | None = 0
    exit_code: int = 0
    truth: str = "eager"


class Runner(Protocol):
    """A row ready to be measured. pid: the process that it runs in, None for this one."""

    measured: Measured
    pid: int | None

    def check(self) -> dict[str, Comparison]:
        """Comparisons with the truth of `measured`, by what was compared."""
        ...

    def load(self) -> tuple[float, float] | None:
        """Milliseconds of loading from nothing and of the first run then; None where that has no meaning."""
        ...

    def time_runs(self, settle: int, calls: int) -> list[int]:
        """Nanoseconds of each of `calls` runs, after `settle` untimed ones."""
        ...

    def time_calls(self, settle: int, calls: int) -> list[int]:
        """The same for end-to-end calls; [] where there are none."""
        ...


class OrtRunner:
    """A row of the runtime itself: a `Predictor` in this process.

    Args:
        measured: where findings go. bundle: opened. shared: the predictor that all rows of this bundle, engine and
            thread count use. make: makes another like it, with nothing loaded.
    """

    pid: int | None = None

    def __init__(self, measured: Measured, bundle: Bundle, shared: Predictor, make: Callable[[], Predictor]):
        self.measured = measured
        self._bundle, self._model, self._make = bundle, shared, make
        self.reference: Sequence[Arrays] | None = None

    def check(self) -> dict[str, Comparison]:
        """Against the golden outputs; on the timed inputs, against the eager model where `reference` is set."""
        row, work = self.measured.row, self.measured.work
        assert work is not None
        with _quiet(row.engine == FUNCTIONS):
            bound = self._model.tolerance(row.variant)
        kernels = self._model.kernels(row.variant)
        # An engine runs as it was compiled; the row is called by its backend.
        named = runs_engines(row.engine) or kernels == "standard"
        if not named and (kernels == FUNCTIONS) != (row.engine == FUNCTIONS):
            raise InputError(
                f"the ops of '{row.engine}' run as {kernels}, which is not what the row is called: "
                f"see {as_typed('hcmen-doctor')}"
            )
        checks = check_golden(self._bundle, row.variant, bound, lambda feed: self._model.run(row.variant, feed))
        if self.reference is not None:
            outputs = [self._model.run(row.variant, feed) for feed in work.feeds]
            checks |= check_outputs(outputs, self.reference, bound)
        return checks

    def load(self) -> tuple[float, float] | None:
        """A new predictor, its session, and one run; the files are in the page cache, the modules imported."""
        row, work = self.measured.row, self.measured.work
        assert work is not None
        with _quiet(row.engine == FUNCTIONS):
            started = time.perf_counter_ns()
            model = self._make()
            model.kernels(row.variant)
            loaded = time.perf_counter_ns()
        model.run(row.variant, work.feeds[0])
        return (loaded - started) / 1e6, (time.perf_counter_ns() - loaded) / 1e6

    def time_runs(self, settle: int, calls: int) -> list[int]:
        """See `Runner`."""
        assert self.measured.work is not None
        run, variant, feeds = self._model.run, self.measured.row.variant, self.measured.work.feeds

        def once() -> None:
            for feed in feeds:
                run(variant, feed)

        return timed(once, settle, calls)

    def time_calls(self, settle: int, calls: int) -> list[int]:
        """See `Runner`."""
        assert self.measured.work is not None
        paths, variant = self.measured.work.paths, self.measured.row.variant
        if not paths or self.measured.row.engine == FUNCTIONS:
            return []
        model, clips = self._model, paths[0] if len(paths) == 1 else paths
        return timed(lambda: model(clips, variant=variant), settle, calls)


def timed(once: Callable[[], object], settle: int, calls: int) -> list[int]:
    """Nanoseconds of each of `calls` calls of `once`, after `settle` untimed ones; the garbage collector waits."""
    clock = time.perf_counter_ns
    taken = [0] * calls
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(settle):
            once()
        for i in range(calls):
            started = clock()
            once()
            taken[i] = clock() - started
    finally:
        if collecting:
            gc.enable()
    return taken


@contextlib.contextmanager
def _quiet(wanted: bool) -> Iterator[None]:
    """Without the warning of a missing kernel library, where the slow way is the point of the row."""
    with warnings.catch_warnings():
        if wanted:
            warnings.simplefilter("ignore", RuntimeWarning)
        yield


@dataclass
class _Checked:
    """What `golden_test` takes for a session: it runs, and remembers the inputs it was given."""

    tolerance: tuple[float, float]
    runs: Callable[[Mapping[str, NDArray[Any]]], Arrays]
    kernels: str = ""
    seen: list[Arrays] = field(default_factory=list)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        self.seen.append(dict(inputs))
        return self.runs(inputs)


def check_golden(
    bundle: Bundle,
    variant: str,
    bound: tuple[float, float],
    run: Callable[[Mapping[str, NDArray[Any]]], Arrays],
) -> dict[str, Comparison]:
    """The golden inputs of `variant` through `run`, compared with the eager model's outputs in the bundle.

    Raises:
        CorruptFileError: the golden file is damaged. CheckFailed: an output of another shape.
    """
    test = golden_test(bundle, variant, _Checked(bound, run))
    return {f"golden {name}": comparison for name, comparison in test.outputs.items()}


def golden_inputs(bundle: Bundle, variant: str) -> list[Arrays]:
    """The golden inputs of `variant`, batch by batch; raises CorruptFileError as `check_golden`."""
    outputs = bundle.variant(variant).outputs

    def blank(inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        count = len(next(iter(inputs.values())))
        return {t.name: np.zeros([count, *(int(s) for s in t.shape[1:])]) for t in outputs}

    session = _Checked((0.0, 0.0), blank)
    golden_test(bundle, variant, session)
    return session.seen


def check_outputs(
    got: Sequence[Arrays], expected: Sequence[Arrays], bound: tuple[float, float]
) -> dict[str, Comparison]:
    """Outputs on the timed inputs against the eager model's; raises CheckFailed where shapes differ."""
    return {
        f"timed {name}": compare(
            np.concatenate([a[name] for a in got]), np.concatenate([a[name] for a in expected]), *bound
        )
        for name in expected[0]
    }


def make_work(bundle: Bundle, variant: str, batch: int, folder: Path, clip: str | None = None, seed: int = 0) -> Work:
    """The inputs of one variant at one batch size.

    Args:
        batch: clips at once; 0 for the golden inputs. folder: where clip files may be written. clip: a file, used
            `batch` times; without one, clips of the longest length that the model takes, of random features.
        seed: theirs.

    Raises:
        InputError: the clip does not fit, or the batch's inputs do not fit into the free memory.
        CorruptFileError: the clip or the golden file is damaged.
        OSError: `folder` is full.
    """
    if batch == 0:
        feeds = golden_inputs(bundle, variant)
        return Work(feeds, [], sum(len(next(iter(f.values()))) for f in feeds), "golden inputs, ragged")
    inputs, present = bundle.manifest.inputs, variant_named(variant).present
    if clip is not None:
        read = read_clip(clip, inputs)
        _check_memory(batch, sum(x.nbytes for x in read.arrays.values()))
        return Work([batch_clips([read] * batch, present)], [clip] * batch, batch, clip)
    _check_memory(batch, sum(4 * inputs.modality(m).max_steps * inputs.modality(m).features for m in present))
    rng = np.random.default_rng(seed)
    clips = [_full_length(bundle, present, rng) for _ in range(batch)]
    paths = []
    for i, made in enumerate(clips[: min(batch, 8)]):  # eight files are enough: they are read again for larger batches
        path = folder / f"{variant}-{batch}-{i}.npz"
        write_clip(path, made.arrays)
        paths.append(str(path))
    files = [paths[i % len(paths)] for i in range(batch)]
    return Work([batch_clips(clips, present)], files, batch, "full-length clips, random features")


class BatchTooLarge(InputError):
    """The batch, and not the clip, cannot be had."""


def _check_memory(batch: int, clip_bytes: int) -> None:
    # The clips, their batch, and at least as much again inside the graph.
    needed, free = 3 * batch * clip_bytes / (1 << 20), free_memory_mib()
    if free is not None and needed > _SPARE * free:
        raise BatchTooLarge(
            f"its inputs need {needed / 1024:.1f} GiB and {free / 1024:.1f} GiB are free",
            fix="take a smaller one",
            where=f"batch {batch}",
        )


def _full_length(bundle: Bundle, present: Sequence[str], rng: np.random.Generator) -> Clip:
    """A clip of the longest length, its features of the mean and deviation that the training features had."""
    inputs: Inputs = bundle.manifest.inputs
    features, tokens = {}, None
    for m in present:
        sizes = inputs.modality(m)
        if m == "text" and inputs.text_tokens is not None:
            tokens = np.ones((3, sizes.max_steps), np.int64)
            tokens[0] = rng.integers(inputs.text_tokens.vocabulary, size=sizes.max_steps)
            tokens[2] = 0
            continue
        statistics = bundle.manifest.normalisation[m]
        noise = rng.standard_normal((sizes.max_steps, sizes.features))
        features[m] = (np.array(statistics["mean"]) + np.array(statistics["std"]) * noise).astype(np.float32)
    return Clip("full length", features, text_tokens=tokens)


def failed(measured: Measured, error: Exception) -> None:
    """Notes in `measured` that the row cannot be timed, and why."""
    line, code = describe_error(error)
    measured.status = "wrong" if isinstance(error, CheckFailed) else "failed"
    measured.reason, measured.exit_code = one_line(line), code


def judged(measured: Measured, checks: dict[str, Comparison]) -> None:
    """Notes the comparisons in `measured`: wrong numbers, or nothing against timing it."""
    measured.checks = checks
    wrong = next(((name, c) for name, c in checks.items() if not c.passed), None)
    if wrong is not None:
        name, comparison = wrong
        measured.status, measured.exit_code = "wrong", 1
        measured.reason = f"{name} differs from {measured.truth}: {comparison.line()}"
