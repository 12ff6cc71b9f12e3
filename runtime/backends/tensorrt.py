"""The backends of TensorRT and of TensorRT-RTX: run engines that hcmen-compile built, the former's on this very device.

tensorrt is imported when the first backend is made and not before; CUDA is called through ctypes
(hcmen/runtime/backends/cuda.py), so that neither PyTorch nor a Python package of CUDA's is needed.

An engine is native code. Only one that the bundle's engine index lists, signed with this user's key, is loaded, from
bytes whose sha256 was checked in memory, and only if it was made from this export, for this GPU and by this TensorRT;
all else is refused in one line that says how to compile it again. `trust_engines` takes engines of others too.

Data goes through page-locked host memory. A size that comes again is captured as a CUDA graph, copies included, and is
one launch from then on; sizes that come once are queued the plain way. Batches beyond the engine's are run in parts.
TensorRT-RTX captures graphs itself.

An engine that was built without a GPU runs the golden set when it is first opened on one, before it serves anything.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hcmen.base.bundle import Bundle
from hcmen.base.engines import EngineRecord, read_engines
from hcmen.base.errors import BackendError, CorruptFileError, InputError, unknown_name
from hcmen.base.interrupts import deaf
from hcmen.base.manifest import VariantRecord
from hcmen.base.trust import engine_key, key_path
from hcmen.base.typed import as_typed
from hcmen.runtime.backends.cuda import Buffer, Cuda, Graph, Stream
from hcmen.runtime.backends.first_opening import require_golden
from hcmen.runtime.backends.flavour import FLAVOUR_OF, TENSORRT, Flavour, TrtModule
from hcmen.runtime.backends.kept_code import KeptCode
from hcmen.runtime.backends.limits import within
from hcmen.runtime.backends.options import TensorRT, TensorRTRTX
from hcmen.runtime.backends.ort import FUNCTIONS, NATIVE, STANDARD
from hcmen.runtime.backends.tensorrt_rtx import Jit

__all__ = ["TOLERANCES", "TrtBackend", "TrtSession", "choose_engine"]

TOLERANCES = {"fp32": (1e-4, 1e-4), "fp16": (2e-2, 1e-2)}
"""precision -> (atol, rtol) of an engine against the eager model."""
KERNELS = {"library": NATIVE, "aot": NATIVE, "function": FUNCTIONS, "none": STANDARD}

# TensorRT's name of a type -> NumPy's; engines of this project have no others at their ends.
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64"}
_MOST_GRAPHS = 8
_MOST_COUNTED = 4096

Shapes = tuple[tuple[int, ...], ...]
Arrays = dict[str, NDArray[Any]]


class TrtSession:
    """One engine, ready to run. kernels: as of an `OrtSession`. Threads take turns.

    Args:
        tensorrt, cuda: where it runs.
        plan: the serialised engine.
        record: the variant, whose inputs and outputs the engine must have.
        where: what to call it in messages.
        plugin: how it runs the hcmen ops, one of hcmen.base.engines.PLUGINS. precision: "fp32" or "fp16".
        host_code: it is version-compatible, with code for the host inside.
        graphs: capture sizes that come again as CUDA graphs.
        jit: makes of an engine how its kernels are compiled on the GPU; None where they are compiled in it.

    Raises:
        BackendError: TensorRT or CUDA refuses it.
        CorruptFileError: it is the engine of another graph.
    """

    def __init__(
        self,
        tensorrt: TrtModule,
        cuda: Cuda,
        plan: memoryview | bytes,
        record: VariantRecord,
        where: str,
        *,
        plugin: str,
        precision: str,
        host_code: bool = False,
        graphs: bool = True,
        jit: Callable[[Any], Jit] | None = None,
    ):
        self.kernels = KERNELS[plugin]
        self.time_limit: float | None = None
        self.precision = precision
        self.tolerance = TOLERANCES[precision]
        self._tensorrt, self._cuda, self._where = tensorrt, cuda, where
        self._title = tensorrt.flavour.title
        self._contexts: dict[int, Any] = {}  # before the engine, which they must not outlive
        self._engine = tensorrt.deserialize(plan, where, host_code=host_code)
        self._inputs = {t.name: np.dtype(t.dtype) for t in record.inputs}
        self._outputs = {t.name: (np.dtype(t.dtype), t.shape[1:]) for t in record.outputs}
        self._check_signature(record)
        self.profiles = [
            {name: self._range(name, i) for name in self._inputs} for i in range(self._engine.num_optimization_profiles)
        ]
        self.max_batch = max(high[0] for profile in self.profiles for _, high in profile.values())
        self._stream = Stream(cuda)
        self._buffers = {name: Buffer(cuda, size) for name, size in self._sizes().items()}
        self._jit = None if jit is None else jit(self._engine)
        self._graphs: OrderedDict[Shapes, tuple[Any, Graph]] = OrderedDict()
        self._seen: dict[Shapes, int] = {}
        self._capture = graphs
        self._lock = threading.Lock()

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """The outputs by name.

        Raises:
            InputError: an input is missing or unknown, or of a size beyond what the engine was compiled for.
            BackendError: TensorRT or CUDA failed, or took more than `time_limit`.
        """
        return within(self.time_limit, partial(self._in_parts, inputs), self._where, "running it")

    def _in_parts(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        if set(inputs) != set(self._inputs):
            raise InputError(
                f"{self._where}: got inputs {', '.join(sorted(inputs))}, expected {', '.join(sorted(self._inputs))}"
            )
        arrays = {name: np.asarray(inputs[name]) for name in self._inputs}
        for name, dtype in self._inputs.items():
            if arrays[name].dtype != dtype:
                raise InputError(f"{self._where}: input '{name}' is {arrays[name].dtype}, expected {dtype}")
        batches = {x.shape[0] if x.ndim else 0 for x in arrays.values()}
        if len(batches) != 1:
            raise InputError(f"{self._where}: the inputs have batches of {sorted(batches)}, expected one size")
        (batch,) = batches
        parts = []
        with self._lock:
            if self._engine is None:
                raise InputError(f"{self._where}: this model was closed: load it again")
            for start in range(0, max(batch, 1), self.max_batch):
                parts.append(self._run({name: x[start : start + self.max_batch] for name, x in arrays.items()}))
        return {name: np.concatenate([part[name] for part in parts]) for name in self._outputs}

    def save(self) -> None:
        """Keeps what was compiled on the GPU for the next session."""
        if self._jit is not None:
            self._jit.save()

    def close(self) -> None:
        """Gives all memory back; the session cannot run any more. A run beyond its limit keeps it until it ends."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            self.save()
        finally:
            self._give_back()
            self._lock.release()

    def _give_back(self) -> None:
        with contextlib.suppress(BackendError):  # what an interrupted run queued still uses all of it
            self._stream.wait()
        for _, graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        self._contexts.clear()
        self._jit = self._engine = None
        for buffer in self._buffers.values():
            buffer.close()
        self._stream.close()

    def _run(self, arrays: Arrays) -> Arrays:
        shapes = tuple(x.shape for x in arrays.values())
        batch = shapes[0][0]
        profile = self._profile(arrays)
        for name, x in arrays.items():
            np.copyto(self._host(name, x.dtype, x.shape), x)
        graph = self._graph(shapes, profile, batch)
        if graph is not None:
            graph.launch()
        else:
            context = self._contexts.get(profile) or self._contexts.setdefault(profile, self._context(profile))
            self._bind(context, shapes, batch)
            self._queue(context, shapes, batch)
        self._stream.wait()
        return {name: self._host(name, dtype, (batch, *tail)).copy() for name, (dtype, tail) in self._outputs.items()}

    def _graph(self, shapes: Shapes, profile: int, batch: int) -> Graph | None:
        """The CUDA graph for these sizes; None as long as they came but once, or where capture does not work."""
        if not self._capture:
            return None
        if shapes in self._graphs:
            self._graphs.move_to_end(shapes)
            return self._graphs[shapes][1]
        if len(self._seen) >= _MOST_COUNTED:
            self._seen.clear()
        self._seen[shapes] = self._seen.get(shapes, 0) + 1
        if self._seen[shapes] < 2:
            return None
        # A context of its own: a graph holds the addresses of its context's memory.
        context = self._context(profile)
        self._bind(context, shapes, batch)
        # The first run after a change of sizes does work that cannot be captured.
        self._queue(context, shapes, batch)
        self._stream.wait()
        try:
            with Graph(self._cuda, self._stream) as graph:
                self._queue(context, shapes, batch)
        except BackendError as error:
            self._capture = False
            warnings.warn(
                f"{self._where}: runs without CUDA graphs, a little slower: {error}", RuntimeWarning, stacklevel=2
            )
            return None
        while len(self._graphs) >= _MOST_GRAPHS:
            self._graphs.popitem(last=False)[1][1].close()
        self._graphs[shapes] = (context, graph)
        return graph

    def _context(self, profile: int) -> Any:
        mark = self._tensorrt.logger.count
        context = self._engine.create_execution_context() if self._jit is None else self._jit.context()
        if context is None:
            why = self._tensorrt.errors(mark) or "no reason given"
            raise BackendError(f"{self._where}: no execution context ({why}): see whether the GPU has memory left")
        if not context.set_optimization_profile_async(profile, self._stream.handle):
            raise BackendError(f"{self._where}: {self._title} refused profile {profile}: {self._tensorrt.errors(mark)}")
        self._stream.wait()
        return context

    def _bind(self, context: Any, shapes: Shapes, batch: int) -> None:
        """Tells a context the sizes and the addresses."""
        mark = self._tensorrt.logger.count
        for name, shape in zip(self._inputs, shapes, strict=True):
            if not context.set_input_shape(name, shape):
                raise self._refused(f"shape {list(shape)} of '{name}'", mark)
        for name, buffer in self._buffers.items():
            if not context.set_tensor_address(name, buffer.device):
                raise self._refused(f"the address of '{name}'", mark)
        unknown = context.infer_shapes()
        if unknown:
            raise self._refused(f"the shapes, as {', '.join(unknown)} have none", mark)
        for name, (_, tail) in self._outputs.items():
            got = tuple(context.get_tensor_shape(name))
            if got != (batch, *tail):
                raise CorruptFileError(
                    f"output '{name}' has shape {list(got)}",
                    f"{[batch, *tail]}",
                    _compiled_again(self._where, self._tensorrt.flavour),
                    where=self._where,
                )

    def _queue(self, context: Any, shapes: Shapes, batch: int) -> None:
        """Queues copy in, run, copy out."""
        for (name, dtype), shape in zip(self._inputs.items(), shapes, strict=True):
            self._buffers[name].upload(_bytes(dtype, shape), self._stream)
        mark = self._tensorrt.logger.count
        if not context.execute_async_v3(self._stream.handle):
            raise self._refused("to run", mark)
        for name, (dtype, tail) in self._outputs.items():
            self._buffers[name].download(_bytes(dtype, (batch, *tail)), self._stream)

    def _refused(self, what: str, mark: int) -> BackendError:
        why = self._tensorrt.errors(mark) or "no reason given"
        return BackendError(f"{self._where}: {self._title} refused {what} ({why})", fix=self._tensorrt.flavour.again)

    def _host(self, name: str, dtype: np.dtype[Any], shape: Sequence[Any]) -> NDArray[Any]:
        return self._buffers[name].host[: _bytes(dtype, shape)].view(dtype).reshape(shape)

    def _profile(self, arrays: Arrays) -> int:
        """The tightest profile that serves these sizes."""

        def serves(profile: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
            return all(
                x.ndim == len(profile[name][0])
                and all(low <= n <= high for n, low, high in zip(x.shape, *profile[name], strict=True))
                for name, x in arrays.items()
            )

        fitting = [i for i, profile in enumerate(self.profiles) if serves(profile)]
        if fitting:
            return min(fitting, key=lambda i: sum(int(np.prod(high)) for _, high in self.profiles[i].values()))
        sizes = ", ".join(f"{name} {list(x.shape)}" for name, x in arrays.items())
        last = ", ".join(f"{name} {list(low)} to {list(high)}" for name, (low, high) in self.profiles[-1].items())
        raise InputError(f"{self._where}: got {sizes}, expected {last}: compile it for larger sizes, or cut the clips")

    def _range(self, name: str, profile: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        low, _, high = (tuple(int(n) for n in dims) for dims in self._engine.get_tensor_profile_shape(name, profile))
        return low, high

    def _sizes(self) -> dict[str, int]:
        """The bytes of each tensor at the largest sizes of all profiles."""
        sizes = {
            name: max(_bytes(dtype, profile[name][1]) for profile in self.profiles)
            for name, dtype in self._inputs.items()
        }
        return sizes | {name: _bytes(dtype, (self.max_batch, *tail)) for name, (dtype, tail) in self._outputs.items()}

    def _check_signature(self, record: VariantRecord) -> None:
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        got = {}
        for name in names:
            mode, dtype = self._engine.get_tensor_mode(name).name, self._engine.get_tensor_dtype(name).name
            shape = tuple(-1 if n < 0 else n for n in self._engine.get_tensor_shape(name))
            got[name] = (mode, _DTYPES.get(dtype, dtype), shape)
        expected = {
            t.name: (mode, t.dtype, tuple(-1 if isinstance(n, str) else n for n in t.shape))
            for mode, tensors in (("INPUT", record.inputs), ("OUTPUT", record.outputs))
            for t in tensors
        }
        if got != expected:
            name = next(n for n in (*expected, *got) if got.get(n) != expected.get(n))
            raise CorruptFileError(
                f"tensor '{name}' is {_signature(got.get(name))}",
                _signature(expected.get(name)),
                _compiled_again(self._where, self._tensorrt.flavour),
                where=self._where,
            )


class TrtBackend:
    """Opens the engines of bundles.

    Raises:
        InputError: no such precision.
        BackendError: TensorRT, the driver or a GPU is missing.
    """

    threads = 1

    def __init__(self, options: TensorRT | None = None):
        self.options = options or TensorRT()
        self.name = self.options.name
        self.time_limit: float | None = None
        self.precision = self.options.precision
        if self.precision is not None and self.precision not in TOLERANCES:
            raise unknown_name("precision", self.precision, TOLERANCES)
        self.tensorrt = TrtModule(FLAVOUR_OF[self.name])
        self.cuda = Cuda()
        self.tensorrt.flavour.require_device(self.tensorrt.module, self.cuda.sm)
        self.version = self.tensorrt.version

    def open(self, bundle: Bundle, variant: str) -> TrtSession:
        """The session of the engine of `variant`.

        Raises:
            InputError: the bundle lacks the variant.
            BackendError: no engine for this device is there, or it cannot be loaded.
            CorruptFileError: the engine or the index is damaged, or the engine is another's.
            CheckFailed: it was built without a GPU, and on this one it fails the golden set.
        """
        record = bundle.variant(variant)
        flavour = self.tensorrt.flavour
        trust = self.options.trust_engines
        engine = choose_engine(bundle, variant, self.precision, self.cuda.sm, self.version, flavour, trust=trust)
        if engine.plugin == "library" and not engine.plugin_embedded:
            self.tensorrt.load_plugins(flavour.plugin_library())
        where = str(bundle.path / engine.engine.file)
        here = {**self.cuda.identity(), "tensorrt": self.version} if flavour.portable else {}
        jit: Callable[[Any], Jit] | None = None
        if isinstance(self.options, TensorRTRTX):
            kept = KeptCode({**here, "engine": engine.engine.sha256})
            jit = partial(Jit, self.tensorrt.module, self.options, kept, where)
        make = partial(
            TrtSession,
            self.tensorrt,
            self.cuda,
            _read_engine(bundle, engine, flavour),
            record,
            where,
            plugin=engine.plugin,
            precision=engine.precision,
            host_code=engine.version_compatible,
            # The standard operators of a function may run as a loop that the host takes part in.
            graphs=self.options.cuda_graph and engine.plugin != "function" and jit is None,
            jit=jit,
        )
        with deaf():  # TensorRT logs while it loads and compiles, and drops what a signal raises there
            session = within(self.time_limit, make, where, "loading it")
            session.time_limit = self.time_limit
            if flavour.portable:
                try:
                    require_golden(bundle, engine, session, here, flavour.again)
                except BaseException:
                    session.close()
                    raise
        return session


def choose_engine(
    bundle: Bundle,
    variant: str,
    precision: str | None,
    sm: int,
    version: str,
    flavour: Flavour = TENSORRT,
    *,
    trust: bool = False,
) -> EngineRecord:
    """The engine of `variant` that this device can run: of its own GPU and version before a compatible one, fp16 first.

    Args:
        trust: take one that this user did not compile on this machine too.

    Raises:
        BackendError: there is none; the message says what there is and what to do.
        CorruptFileError: there are engines of others alone; or as `read_engines` and `engine_key`.
        InputError: as those.
    """
    wanted = [*(["--precision", precision] if precision else []), *flavour.chosen]
    command = as_typed("hcmen-compile", "--bundle", bundle.path, "--variant", variant, *wanted)
    compile_ = f"run {command} {flavour.place}"
    records = (r for r in read_engines(bundle) if r.flavour == flavour.name)
    all_ = [r for r in records if r.variant == variant and precision in (None, r.precision)]
    if not all_:
        kind = f" {precision}" if precision else ""
        raise BackendError(f"{bundle.path}: no{kind} engine for variant '{variant}': {compile_}")
    stale = "made from another export than the one in this bundle"
    problems = {r.engine.file: flavour.unfit(r, sm, version) if r.of_export(bundle) else stale for r in all_}
    fitting = [r for r in all_ if problems[r.engine.file] is None]
    if not fitting:
        newest = max(all_, key=lambda r: r.created)
        raise BackendError(f"{bundle.path / newest.engine.file}: {problems[newest.engine.file]}: {compile_}")
    if not trust:
        key = engine_key()
        own = [r for r in fitting if r.signed_with(key)]
        if not own:
            raise _foreign(bundle, max(fitting, key=lambda r: r.created), key, compile_)
        fitting = own
    return min(
        fitting,
        key=lambda r: (sm not in r.capabilities or r.tensorrt != version, r.precision != "fp16", r.engine.file),
    )


def _foreign(bundle: Bundle, record: EngineRecord, key: bytes | None, compile_: str) -> CorruptFileError:
    if not record.signature:
        what = "not signed"
    elif key is None:
        what = f"signed, and this user has no key to tell by whom ({key_path() or 'nor a home folder'})"
    else:
        what = "signed by another user or on another machine, or altered since"
    return CorruptFileError(
        what,
        "an engine that this user compiled here",
        f"{compile_}, or run native code of others with --trust-engines (trust_engines=True)",
        where=str(bundle.path / record.engine.file),
    )


def _read_engine(bundle: Bundle, record: EngineRecord, flavour: Flavour) -> memoryview:
    try:
        return bundle.read(record.engine).data
    except CorruptFileError as error:
        raise error.but(fix=_compiled_again(bundle.path / record.engine.file, flavour)) from error


def _compiled_again(engine: str | os.PathLike[str], flavour: Flavour) -> str:
    """What helps when the file of an engine is at fault."""
    bundle = Path(engine).parent.parent
    return f"compile it again with {as_typed('hcmen-compile', '--force', '--bundle', bundle, *flavour.chosen)}"


def _bytes(dtype: np.dtype[Any], shape: Iterable[Any]) -> int:
    return int(np.prod(list(shape), dtype=np.int64)) * dtype.itemsize


def _signature(found: tuple[str, str, tuple[int, ...]] | None) -> str:
    return "not there" if found is None else f"{found[0].lower()} {found[1]} {list(found[2])}"
