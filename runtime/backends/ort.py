"""The ONNX Runtime backend: sessions on the CPU provider, with the kernels of libhcmen_ops.so when they are found.

onnxruntime is imported when the first backend is made and not before. Without the kernel library a graph still gives
the right numbers, through the function of standard ops that every model carries, only many times slower; the backend
then warns and `kernels` says so.

A graph is loaded from memory that was verified, and refers to no file but the weights, which were verified as well.

Weights. ONNX Runtime from 1.23 on is told the folder they lie in and maps them, so that all sessions of all processes
share one copy in the page cache. From 1.24 on (seen up to 1.31) it refuses a link that leads out of that folder, so it
is told where the file really lies, and the graph is given the name that it has there. Older ones are given arrays of
one verified buffer (`SessionOptions.add_external_initializers`), each of which they copy once per session.
(`add_initializer` copies nothing, but there constant folding reads the values from the file after all, seen in 1.17 and
1.20.)

Packing. ONNX Runtime can lay the weights of matrix products out for its kernels when a session is made, in memory of
that session alone. On the MOSI model that brings 2 % at 500 steps and 9 % at 50, and makes seven sessions cost six
times as much memory as one; where the weights are those of a BERT, a run without it would copy hundreds of megabytes.
So small float32 models share, and others pack; `prepack` says otherwise.

Buffers. All sessions of a process take their working memory from one arena, which grows to what the largest run needs.
ONNX Runtime's memory patterns are off: they would save some tenth of a millisecond a run by one allocation in place of
many, and keep 9 kB for every new combination of input lengths, for ever, of which the MOSI preset has nine million.

Telemetry. From 1.29 on, ONNX Runtime's builds start a thread when they are imported that reports their use, and whose
end hangs a forked child at its exit. It is off unless ORT_DISABLE_TELEMETRY=0 is set.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hcmen.base.errors import BackendError, CorruptFileError, HcmenError, reason_of
from hcmen.base.inputs import TensorSpec
from hcmen.base.interrupts import deaf, stoppable
from hcmen.base.library import library_path
from hcmen.base.manifest import OP_DOMAIN, VariantRecord
from hcmen.base.shared_file import SharedFile
from hcmen.runtime.backends.cores import physical_cores
from hcmen.runtime.backends.forks import keep_for_ever, watch
from hcmen.runtime.backends.graph import read_graph
from hcmen.runtime.backends.limits import within
from hcmen.runtime.backends.options import Ort
from hcmen.runtime.compare import SCORE_ATOL, SCORE_RTOL

__all__ = [
    "FUNCTIONS",
    "LEFT_OUT",
    "NATIVE",
    "STANDARD",
    "OrtBackend",
    "OrtSession",
    "import_onnxruntime",
    "physical_cores",
]

NATIVE = "native"
"""The hcmen ops ran on the kernels of libhcmen_ops.so."""
FUNCTIONS = "functions"
"""The hcmen ops ran through the model's own functions of standard ops: right, and slow."""
LEFT_OUT = "left out on request"
"""Why there is no kernel library where nobody wanted one."""
STANDARD = "standard"
"""The graph uses no hcmen op."""

_MAPS_FROM = (1, 23)
_FREE_FROM = (1, 31)
"""From here on, seen, Python's other threads run while a session is made. Up to 1.24 they stand still."""
_ORT_NAMES = {"float32": "float", "float64": "double"}
_SHARE_BYTES = 64 << 20
"""Up to this size weights are shared rather than packed by each session."""


class OrtSession:
    """One graph, ready to run. kernels: NATIVE, FUNCTIONS or STANDARD. Several threads may run it at once.

    tolerance: (atol, rtol) of its parity, that of a float32 graph until whoever knows its precision says otherwise.
    """

    tolerance: tuple[float, float] = (SCORE_ATOL, SCORE_RTOL)

    def __init__(self, ort: Any, session: Any, kernels: str, where: str):
        self.kernels = kernels
        self.time_limit: float | None = None
        self._ort = ort
        self._session = session
        self._where = where
        self._outputs = [o.name for o in session.get_outputs()]
        self._given: tuple[TensorSpec, ...] = ()
        watch(self)

    def hold_to(self, record: VariantRecord) -> None:
        """From here on, what it gives is what the manifest says, or an error.

        Raises:
            CorruptFileError: its inputs or outputs are others than the manifest's, by name, type, rank or size.
        """
        for what, found, expected in (
            ("input", self._session.get_inputs(), record.inputs),
            ("output", self._session.get_outputs(), record.outputs),
        ):
            got = {x.name: x for x in found}
            unknown = sorted({*got} ^ {t.name for t in expected})
            if unknown or len(got) != len(found):
                name = (unknown or sorted(got))[0]
                kind = "has no" if name not in got else "has an" if unknown else "has twice the"
                raise self._differs(f"{kind} {what} '{name}'", ", ".join(t.name for t in expected))
            for t in expected:
                type_, shape = got[t.name].type, list(got[t.name].shape)
                if type_ != f"tensor({_ORT_NAMES.get(t.dtype, t.dtype)})":
                    raise self._differs(f"{what} '{t.name}' is {type_}", t.dtype)
                # A rank that ONNX Runtime cannot tell is an empty shape there, as that of a scalar is.
                fits = len(shape) == len(t.shape) and all(
                    not isinstance(n, int) if isinstance(m, str) else not isinstance(n, int) or n == m
                    for n, m in zip(shape, t.shape, strict=True)
                )
                if not fits and (shape or what == "input"):
                    raise self._differs(f"{what} '{t.name}' has shape {_sizes(shape)}", _sizes(t.shape))
        self._given = record.outputs

    def _differs(self, what: str, expected: str) -> CorruptFileError:
        fix = "the graph is not that of its manifest, export the bundle again"
        return CorruptFileError(what, f"{expected} as the manifest says", fix, where=self._where)

    def after_fork(self) -> None:
        """In a forked child: lets go of the session, whose threads have stayed behind, without freeing it."""
        keep_for_ever(self._session)
        self._session = None

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs by name.

        Raises:
            BackendError: ONNX Runtime refused to run; the message has its reason. Or it took more than `time_limit`.
            CorruptFileError: an output is not of the shape or type that the manifest says.
        """
        if self._session is None:
            raise BackendError(f"{self._where}: its session belongs to the process that this one was forked from")
        options = self._ort.RunOptions()
        options.log_severity_level = 4
        work = partial(self._run, inputs, options)
        with stoppable(options):
            outputs = within(self.time_limit, work, self._where, "running it", lambda: _terminate(options))
        if self._given:
            self._check(outputs, {len(x) if np.ndim(x) else 0 for x in inputs.values()})
        return outputs

    def described(self) -> tuple[list[TensorSpec], list[TensorSpec], Mapping[str, str]]:
        """Inputs, outputs and metadata, as the file has them. A type that is no tensor's stands there as it is called.

        '?' stands for a size without a name.
        """
        names = {f"tensor({theirs})": ours for ours, theirs in _ORT_NAMES.items()}

        def specs(found: Sequence[Any]) -> list[TensorSpec]:
            return [
                TensorSpec(
                    x.name,
                    names.get(x.type) or x.type.removeprefix("tensor(").removesuffix(")"),
                    tuple("?" if n is None else n for n in x.shape),
                )
                for x in found
            ]

        meta = self._session.get_modelmeta().custom_metadata_map
        return specs(self._session.get_inputs()), specs(self._session.get_outputs()), meta

    def _run(self, inputs: Mapping[str, NDArray[Any]], options: Any) -> dict[str, NDArray[Any]]:
        try:
            values = self._session.run(self._outputs, dict(inputs), options)
        except Exception as error:
            raise BackendError(f"{self._where}: ONNX Runtime could not run it: {_reason(error)}") from error
        return dict(zip(self._outputs, values, strict=True))

    def _check(self, outputs: Mapping[str, Any], batches: set[int]) -> None:
        for t in self._given:
            value = outputs[t.name]
            if not isinstance(value, np.ndarray) or value.dtype != t.dtype:
                kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
                raise self._differs(f"output '{t.name}' came as {kind}", t.dtype)
            sizes = [{n} if isinstance(n, int) else batches if i == 0 else None for i, n in enumerate(t.shape)]
            fits = value.ndim == len(sizes) and all(
                wanted is None or n in wanted for n, wanted in zip(value.shape, sizes, strict=True)
            )
            if not fits:
                expected = [*(sorted(batches)[:1] if isinstance(t.shape[0], str) else t.shape[:1]), *t.shape[1:]]
                raise self._differs(f"output '{t.name}' came in shape {_sizes(value.shape)}", _sizes(expected))


class OrtBackend:
    """Makes sessions.

    library: use the kernel library when it is found; False leaves it out, without a warning.

    Attributes:
        maps_weights: whether `session` wants a `SharedFile`, which this ONNX Runtime maps, or the weights' content.
    """

    name = "ort"
    _providers: Sequence[Any] = ("CPUExecutionProvider",)
    _maps = True

    def __init__(self, options: Ort | None = None, *, library: bool = True):
        options = options or Ort()
        self._ort = import_onnxruntime()
        self.spin, self.prepack = options.spin, options.prepack
        self.time_limit: float | None = None
        self.maps_weights = self._maps and options.map is not False and _release(self._ort.__version__) >= _MAPS_FROM
        self.threads = options.threads or physical_cores()
        self.version: str = self._ort.__version__
        self.providers = ", ".join(self._ort.get_available_providers())
        self.library: Path | None = None
        self.library_problem: str | None = LEFT_OUT
        if library:
            try:
                self.library = self._library_path()
                self._options(self.library)
                self.library_problem = None
            except HcmenError as error:
                self.library, self.library_problem = None, str(error)

    def session(
        self, model: bytes, weights: NDArray[np.uint8] | SharedFile, weights_file: str, where: str
    ) -> OrtSession:
        """A session for one verified graph.

        Args:
            model: the content of the .onnx file. weights: the weights file, or its content; see `maps_weights`.
            weights_file: the name under which the graph knows the weights. where: what to call the graph in messages.

        Raises:
            CorruptFileError: the graph is damaged or reaches outside the bundle.
            BackendError: this ONNX Runtime is too old for it.
        """
        if not isinstance(weights, SharedFile):
            return self._made(model, weights, len(weights), weights_file, where)
        return weights.opened_by(lambda real: self._made(model, real, weights.record.bytes, weights_file, where))

    def _made(
        self, model: bytes, weights: NDArray[np.uint8] | Path, size: int, weights_file: str, where: str
    ) -> OrtSession:
        """As `session`; weights: their content, or where they lie, in `size` bytes."""
        real = os.fsencode(weights.name) if isinstance(weights, Path) else None
        graph = read_graph(model, weights_file, size, where, real)
        kernels = STANDARD
        if OP_DOMAIN in graph.domains:
            kernels = NATIVE if self.library is not None else FUNCTIONS
            if kernels == FUNCTIONS and self.library_problem != LEFT_OUT:
                warnings.warn(
                    f"running without the kernel library, right but many times slower: {self.library_problem}",
                    RuntimeWarning,
                    stacklevel=3,
                )
        options = self._options(self.library)
        if not (size > _SHARE_BYTES if self.prepack is None else self.prepack):
            options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            if isinstance(weights, Path):
                folder = "session.model_external_initializers_file_folder_path"
                options.add_session_config_entry(folder, os.fsencode(weights.parent))
            else:
                values = [self._ort.OrtValue.ortvalue_from_numpy(t.view(weights)) for t in graph.external]
                options.add_external_initializers([t.name for t in graph.external], values)
            make = partial(
                _no_fallback(self._ort.InferenceSession), graph.model, options, providers=list(self._providers)
            )
            with deaf() if _release(self.version) < _FREE_FROM else contextlib.nullcontext():
                session = within(self.time_limit, make, where, "loading it")
        except HcmenError:
            raise
        except Exception as error:
            raise _load_error(error, where, self.version) from error
        made = self._session(session, kernels, where)
        made.time_limit = self.time_limit
        return made

    def _library_path(self) -> Path:
        return library_path()

    def _session(self, session: Any, kernels: str, where: str) -> OrtSession:
        return OrtSession(self._ort, session, kernels, where)

    def _options(self, library: Path | None) -> Any:
        """Session options; raises BackendError when ONNX Runtime refuses the kernel library."""
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(self.spin)))
        options.enable_mem_pattern = False  # see above
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        if _shares_arena():
            options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.load_model_format", "ONNX")  # of two formats we read one
        options.log_severity_level = 4  # every failure comes back as an exception; the log would repeat it on stderr
        if library is not None:
            try:
                options.register_custom_ops_library(str(library))
            except Exception as error:
                raise BackendError(f"ONNX Runtime {self.version} refused {library}: {_reason(error)}") from error
        return options


@functools.cache
def _no_fallback(session: Any) -> Any:
    """The class `session`, which would print "EP Error" to stdout when it fails, and try again on the CPU."""
    return type("Session", (session,), {"_enable_fallback": property(lambda _: False, lambda *_: None)})


def _terminate(options: Any) -> None:
    options.terminate = True


def _sizes(shape: Sequence[object]) -> str:
    """A shape for a message; a size that is a name stands there by it."""
    return f"[{', '.join('?' if n is None else str(n)[:40] for n in shape[:9])}]"


@functools.cache
def _shares_arena() -> bool:
    """Whether sessions of this process take their memory from one arena; makes it at the first call.

    A fork can catch its lock held by a thread that the child does not have, so a child's sessions have their own.
    """
    if _forked:
        return False
    ort = import_onnxruntime()
    info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    # It grows by what is asked for (1), not by doubling, to no limit (0); the rest is ONNX Runtime's own choice (-1).
    with contextlib.suppress(Exception):  # somebody else's in this process serves as well
        ort.create_and_register_allocator(info, ort.OrtArenaCfg(0, 1, -1, -1))
    return True


_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True
    _shares_arena.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _release(version: str) -> tuple[int, ...]:
    """(major, minor) of a version such as 1.23.2 or 1.24.0.dev1."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def import_onnxruntime() -> Any:
    """The module onnxruntime; raises BackendError when it is missing or damaged."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise BackendError(
            f"{error.name} is not installed, and the backend 'ort' needs it: pip install 'hcmen[cpu]'"
        ) from error
    except ImportError as error:
        raise BackendError(f"onnxruntime does not load ({_reason(error)}): install it again") from error
    if not hasattr(onnxruntime, "InferenceSession"):
        raise BackendError(
            "onnxruntime is damaged, as it is when onnxruntime and onnxruntime-gpu were both installed: "
            "remove both, then install one"
        )
    return onnxruntime


# What ONNX Runtime says when the model is sound and it is itself too old, or a kernel is missing.
_TOO_OLD = re.compile(
    r"IR version|[Oo]pset \d+ is under development|is not a registered function|NOT_IMPLEMENTED"
    r"|No Op registered|Could not find an implementation"
)


# What it says when the machine is the cause: the pattern, and what helps.
_MACHINE = (
    (re.compile(r"procfs|/proc/self"), "mount /proc where this runs"),
    (
        re.compile(r"bad_alloc|[Ff]ailed to allocate|[Oo]ut of memory|Cannot allocate memory"),
        "free some memory, or take a machine with more",
    ),
    (re.compile(r"Too many open files"), "close files, or raise the limit of open ones (ulimit -n)"),
)


def _load_error(error: Exception, where: str, version: str) -> HcmenError:
    """What a graph that is as its manifest lists it was refused for."""
    reason = _reason(error)
    what = f"ONNX Runtime {version} cannot load it ({reason})"
    if _TOO_OLD.search(reason):
        return BackendError(what, fix="upgrade onnxruntime", where=where)
    for pattern, fix in _MACHINE:
        if pattern.search(reason):
            return BackendError(what, fix=fix, where=where)
    return CorruptFileError(f"ONNX Runtime refused it ({reason})", fix="export the bundle again", where=where)


def _reason(error: BaseException) -> str:
    """The error's text on one line of bearable length."""
    text = reason_of(error, 1000)
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", text)
    return text if len(text) <= 400 else text[:397] + "..."
