"""From a bundle's ONNX graphs to engines: of TensorRT on the device that will run them, of TensorRT-RTX anywhere.

Needs TensorRT 10.3 or TensorRT-RTX 1.4, onnx and NumPy; PyTorch is never imported. One engine a variant and precision:

    graph with its weights, from verified bytes  (hcmen/export/weights.py; no path of the graph's is followed)
    -> float16 written into it                   (hcmen/export/float16.py, with --precision fp16)
    -> op functions taken out, or put in place   (the plugin runs the ops, or with plugin "function" the functions do)
    -> strongly typed network, optimisation profiles, build
    -> the golden set through the very runtime that will score clips; beyond the bound, nothing is written
       (a portable flavour has no GPU here: each device runs the golden set when it first opens the engine)
    -> engines/ beside the bundle                (hcmen/base/engines.py)

The functions are taken out whenever a plugin is to run, not only for TensorRT before 10.7, which prefers functions to
plugins: without them a plugin that is not found is an error instead of an engine many times slower.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import platform
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hcmen
from hcmen.base.bundle import Bundle
from hcmen.base.console import Console, one_line
from hcmen.base.engines import EngineRecord, read_engines, write_engine, write_whole
from hcmen.base.errors import BackendError, CheckFailed, CorruptFileError, InputError, shown
from hcmen.base.files import read_small, refused
from hcmen.base.interrupts import deaf
from hcmen.base.manifest import OP_DOMAIN, VariantRecord
from hcmen.base.records import FileRecord
from hcmen.base.trust import made_key
from hcmen.export.engine_options import Options, profile_shapes
from hcmen.runtime.backends.cuda import Cuda
from hcmen.runtime.backends.flavour import PLUGIN_OPS, TENSORRT, Flavour, TrtModule
from hcmen.runtime.backends.tensorrt import TOLERANCES, TrtSession
from hcmen.runtime.backends.tensorrt_rtx import set_targets
from hcmen.runtime.golden import SelfTest, golden_test_twice

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["Built", "Compiler", "GraphCompiler"]

Profile = Mapping[str, tuple[tuple[int, ...], ...]]
"""Input -> its (least, best, largest) shape."""

_HEARTBEAT_SECONDS = 30.0
_OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemory|insufficient memory|cudaErrorMemoryAllocation|bad_alloc", re.I)


@dataclass(frozen=True)
class Built:
    """One engine that was accepted.

    seconds: the build. fresh: whether it was built now, or was there already. weights_bytes: the weights in its graph.
    """

    record: EngineRecord
    test: SelfTest | None
    seconds: float
    fresh: bool
    weights_bytes: int


class GraphCompiler:
    """Builds engines of graphs, whosever they are.

    cuda: the GPU that they are for, None for a portable flavour, which touches no library of CUDA's.
    capabilities: the compute capabilities that they are for, rising.

    Raises:
        InputError: the flavour lacks what an option asks for, or no such target.
        BackendError: TensorRT, the GPU, onnx or the plugin is missing, or too old for the options.
    """

    def __init__(self, options: Options, console: Console | None = None, flavour: Flavour = TENSORRT):
        self.options = options
        self.console = console or Console(verbosity=-1)
        self.flavour = flavour
        self._check_options()
        _require_onnx()
        self.tensorrt = TrtModule(flavour)
        self.plugin = options.plugin or next(iter(flavour.plugins))
        flavour.require_plugin(self.plugin, self.tensorrt.version)
        self.profiles = options.profiles or flavour.profiles
        self.tensorrt.logger.sink = lambda severity, text: self.console.detail(f"{flavour.title} {severity}: {text}")
        self._trt = self.tensorrt.module
        self.cuda = None if flavour.portable else Cuda()
        self.capabilities = (self.cuda.sm,) if self.cuda else self._targets()
        if options.hardware_compatible and self.capabilities[0] < 80:
            raise BackendError(
                f"the GPU has sm {self.capabilities[0]}, hardware-compatible engines start at 80: "
                "leave out --hardware-compatible"
            )
        self._plugin_path: Path | None = None

    def engine_of(self, model: ModelProto, profiles: Sequence[Profile], where: str) -> tuple[Any, str]:
        """The serialised engine of `model`, weights inside, as TensorRT's host memory; and what runs its hcmen ops.

        Raises:
            InputError, BackendError: TensorRT refuses the graph or the build.
        """
        model, plugin = self._prepared(model, where)
        self._take(plugin)
        return self._build(model, plugin, profiles, where), plugin

    def _check_options(self) -> None:
        for option, why in self.flavour.lacks.items():
            if getattr(self.options, option):
                raise InputError(f"--{option.replace('_', '-')} with --backend {self.flavour.name}: {why}")
        if self.options.targets and not self.flavour.portable:
            raise InputError(
                f"--target with --backend {self.flavour.name}, whose engines are for the GPU that is here: leave it out"
            )

    def _targets(self) -> tuple[int, ...]:
        known = self.flavour.served(self._trt)
        for target in self.options.targets:
            if target not in known:
                raise InputError(
                    f"--target has {target}, and {self.flavour.title} {self.tensorrt.version} does not build for it",
                    ", ".join(map(str, known)),
                    f"leave {target} out, or compile on such a GPU with --backend {TENSORRT.name}",
                )
        return tuple(sorted(set(self.options.targets))) or known

    def _prepared(self, model: ModelProto, where: str) -> tuple[ModelProto, str]:
        """The model as the parser shall have it, and how its hcmen ops will run."""
        from hcmen.mamba.functions import nodes_of, strip_functions

        ops = any(node.domain == OP_DOMAIN for node in nodes_of(model))
        if self.plugin == "function":
            return _written_out(model, where), "function" if ops else "none"
        if not ops:
            return model, "none"
        strip_functions(model)
        if self.plugin == "aot":
            from hcmen.mamba.trt_aot import prepare

            prepare(model)
        return model, self.plugin

    def _take(self, plugin: str) -> None:
        """Makes known to TensorRT what will run the hcmen ops."""
        if plugin == "library":
            self._load_plugins()
        elif plugin == "aot":
            from hcmen.mamba.trt_aot import register

            register(*self.capabilities)

    def _load_plugins(self) -> None:
        if self._plugin_path is None:
            path = self.flavour.plugin_library()
            self.tensorrt.load_plugins(path)
            self._plugin_path = path

    # --- the build --------------------------------------------------------------------------------------------------

    def _build(self, model: ModelProto, plugin: str, profiles: Sequence[Profile], where: str) -> Any:
        """The serialised engine, as TensorRT's host memory."""
        trt = self._trt
        mark = self.tensorrt.logger.count
        builder = trt.Builder(self.tensorrt.logger)
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(flags)
        parser = trt.OnnxParser(network, self.tensorrt.logger)
        with deaf():  # it logs while it works, and drops what a signal raises there
            parsed = parser.parse(model.SerializeToString())
        if not parsed:
            raise self._refused(where, "cannot take the graph", _parser_error(parser))
        config = builder.create_builder_config()
        # TF32 keeps 10 bits of a product's inputs: a float32 engine would miss its bound.
        config.clear_flag(trt.BuilderFlag.TF32)
        if self.options.workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, self.options.workspace_bytes)
        if self.options.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
            if plugin == "library":
                config.plugins_to_serialize = [str(self._plugin_path)]
        if self.options.hardware_compatible:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if self.flavour.portable:
            set_targets(trt, config, self.capabilities)
        for shapes in profiles:
            profile = builder.create_optimization_profile()
            for name, (low, best, high) in shapes.items():
                profile.set_shape(name, low, best, high)
            if config.add_optimization_profile(profile) < 0:
                raise BackendError(f"{where}: {self.flavour.title} refused the profile {shapes}: {self._why(mark)}")
        before = self._read_timing_cache(config)
        with _heartbeat(self.console), deaf():
            plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise self._refused(where, "could not build the engine", self._why(mark))
        self._write_timing_cache(config, before)
        return plan

    def _refused(self, where: str, what: str, why: str) -> BackendError:
        if _OUT_OF_MEMORY.search(why):
            free, total = self.cuda.free_bytes() if self.cuda else (0, 0)
            room = f"{free >> 20} of {total >> 20} MiB of the GPU are free; " if total else ""
            return BackendError(
                f"{where}: the build ran out of memory ({room}{why}): "
                "close what else uses it, or lower --workspace or --max-batch"
            )
        return BackendError(f"{where}: {self.flavour.title} {self.tensorrt.version} {what}: {why}")

    def _why(self, mark: int) -> str:
        return self.tensorrt.errors(mark) or "it gave no reason (-v shows what it said)"

    # --- timing cache -----------------------------------------------------------------------------------------------

    def _read_timing_cache(self, config: Any) -> bytes:
        """Gives the build the timings of the file, if there is one; returns its content."""
        path = self.options.timing_cache
        if path is None:
            return b""
        with refused(path, fix="name another file"):
            content = read_small(path) if path.exists() else b""
        cache = config.create_timing_cache(content)
        if cache is None or not config.set_timing_cache(cache, False):
            self.console.warn(f"{path}: not a timing cache of this GPU and TensorRT, a new one is begun")
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)
        return content

    def _write_timing_cache(self, config: Any, before: bytes) -> None:
        path = self.options.timing_cache
        if path is None:
            return
        content = bytes(memoryview(config.get_timing_cache().serialize()).cast("B"))
        if content != before:
            write_whole(path, content)


class Compiler(GraphCompiler):
    """Builds the engines of one bundle; see `GraphCompiler`, whose errors it raises.

    Raises:
        InputError, CorruptFileError: the key that signs engines cannot be made or used.
    """

    def __init__(self, bundle: Bundle, options: Options, console: Console | None = None, flavour: Flavour = TENSORRT):
        super().__init__(options, console, flavour)
        self.bundle = bundle
        self._key = made_key()  # what was built for an hour and cannot be signed would be lost
        self._weights: Any = None

    def compile(self, variant: str) -> Built:
        """The engine of `variant`: built, held against the golden set and written; or as it stands, without `force`.

        Raises:
            InputError: the bundle lacks the variant, or the place cannot be written.
            CorruptFileError: a file of the bundle is damaged.
            BackendError: TensorRT refuses the graph or the build.
            CheckFailed: the engine differs from the eager model by more than the bound; nothing is written.
        """
        record = self.bundle.variant(variant)
        where = str(self.bundle.path / record.graph.file)
        name = EngineRecord.file_name(
            variant, self.options.precision, self.capabilities, self.tensorrt.version, self.flavour.name
        )
        standing = None if self.options.force else self._standing(name)
        model = self._embedded(variant)
        weights_bytes = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
        if standing is not None:
            return Built(standing, None, 0.0, fresh=False, weights_bytes=weights_bytes)
        started = time.perf_counter()
        plan, plugin = self.engine_of(model, self._profiles(record), where)
        seconds = time.perf_counter() - started
        content = memoryview(plan).cast("B")
        embedded = plugin == "library" and self.options.version_compatible
        test = self._golden_test(content, plugin, record, variant)
        made = EngineRecord(
            engine=FileRecord(name, hashlib.sha256(content).hexdigest(), len(content)),
            variant=variant,
            precision=self.options.precision,
            capabilities=self.capabilities,
            tensorrt=self.tensorrt.version,
            machine=platform.machine(),
            plugin=plugin,
            plugin_embedded=embedded,
            version_compatible=self.options.version_compatible,
            hardware_compatible=self.options.hardware_compatible,
            max_batch=self.options.max_batch,
            opt_batch=self.options.best_batch,
            graph_sha256=record.graph.sha256,
            weights_sha256=self.bundle.manifest.weights.sha256,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="microseconds"),
            parity={"measured": False} if test is None else _parity(test, self.options.precision),
            flavour=self.flavour.name,
            profiles=self.profiles,
        )
        write_engine(self.bundle, made, content, self._report(seconds, record, weights_bytes))
        return Built(made, test, seconds, fresh=True, weights_bytes=weights_bytes)

    def _golden_test(self, content: memoryview, plugin: str, record: VariantRecord, variant: str) -> SelfTest | None:
        """What the engine made of the golden set; None where there is no GPU to run it on. Raises CheckFailed."""
        if self.cuda is None:
            return None
        session = TrtSession(
            self.tensorrt,
            self.cuda,
            content,
            record,
            f"the engine of '{variant}'",
            plugin=plugin,
            precision=self.options.precision,
            host_code=self.options.version_compatible,
            graphs=plugin != "function",
        )
        try:
            test = golden_test_twice(self.bundle, variant, session)
        finally:
            session.close()
        if not test.passed:
            raise _parity_failed(variant, self.options.precision, test)
        return test

    # --- before the build -------------------------------------------------------------------------------------------

    def _standing(self, name: str) -> EngineRecord | None:
        """The engine of that name, if it is as listed, made from this export and in the way asked for."""
        for record in read_engines(self.bundle):
            if record.engine.file != name or not record.of_export(self.bundle):
                continue
            asked = self.options
            wanted = {
                "version_compatible": asked.version_compatible,
                "hardware_compatible": asked.hardware_compatible,
                "max_batch": asked.max_batch,
                "opt_batch": asked.best_batch,
                "profiles": self.profiles,
            }
            alike = all(getattr(record, part) == value for part, value in wanted.items())
            if not alike or record.plugin not in (self.plugin, "none"):
                return None
            if not record.signed_with(self._key):
                self.console.note(f"  {name} was not compiled here by this user and is built again")
                return None
            with contextlib.suppress(CorruptFileError):
                self.bundle.file(record.engine)
                return record
        return None

    def _embedded(self, variant: str) -> ModelProto:
        """The graph with its weights, in the engine's precision."""
        from hcmen.export.float16 import to_float16
        from hcmen.export.weights import embedded_model

        if self._weights is None:
            self._weights = self.bundle.read(self.bundle.manifest.weights)
        model = embedded_model(self.bundle, variant, self._weights)
        return to_float16(model) if self.options.precision == "fp16" else model

    def _profiles(self, record: VariantRecord) -> list[Profile]:
        return profile_shapes(self.bundle, record, self.options.max_batch, self.options.best_batch, self.profiles)

    def _report(self, seconds: float, record: VariantRecord, weights_bytes: int) -> dict[str, Any]:
        """How it was built, for the .json beside the engine."""
        options = self.options
        return {
            "seconds": round(seconds, 3),
            "hcmen": hcmen.__version__,
            **({"cuda_runtime": self.cuda.runtime, "cuda_driver": self.cuda.driver} if self.cuda else {}),
            "weights_bytes": weights_bytes,
            "workspace_bytes": options.workspace_bytes,
            "profiles": [
                {name: [list(shape) for shape in shapes] for name, shapes in profile.items()}
                for profile in self._profiles(record)
            ],
        }


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
    except ModuleNotFoundError as error:
        raise BackendError(
            f"{error.name} is not installed, and hcmen-compile reads graphs with it: pip install 'onnx>=1.21'"
        ) from error


def _written_out(model: ModelProto, where: str) -> ModelProto:
    """The model in standard operators alone.

    No node may be left that a plugin could be taken for: a process may have the plugin library loaded, whatever
    for, and TensorRT-RTX ends a process that parses a node of it.
    """
    from onnx import inliner

    from hcmen.mamba.functions import add_functions, nodes_of

    try:
        model = inliner.inline_local_functions(add_functions(model, "blocks"))
    except InputError as error:
        raise error.but(where=where) from error
    for node in nodes_of(model):
        if node.op_type in PLUGIN_OPS or node.domain == OP_DOMAIN:
            raise BackendError(
                f"node {shown(node.name)} is {shown(f'{node.domain}::{node.op_type}')}, which no function of the "
                "graph defines",
                fix="export the bundle again",
                where=where,
            )
    return model


def _parser_error(parser: Any) -> str:
    """The parser's errors on one line, each with its node."""
    errors = []
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        node = f"{error.node_operator()} node '{error.node_name()}'" if error.node_name() else f"node {error.node()}"
        errors.append(f"{node}: {one_line(error.desc())}")
    text = "; ".join(dict.fromkeys(errors)) or "it gave no reason (-v shows what it said)"
    return text if len(text) <= 600 else text[:597] + "..."


def _parity(test: SelfTest, precision: str) -> dict[str, Any]:
    """What a record says of a golden test that passed."""
    atol, rtol = TOLERANCES[precision]
    return {**test.to_json(), "atol": atol, "rtol": rtol}


def _parity_failed(variant: str, precision: str, test: SelfTest) -> CheckFailed:
    hint = "try --precision fp32" if precision == "fp16" else "see docs/jetson.md"
    return CheckFailed(
        f"parity failed for the {precision} engine of '{variant}', nothing was written: {test.first_failed()}; {hint}"
    )


@contextlib.contextmanager
def _heartbeat(console: Console) -> Iterator[None]:
    """Says every half minute that the build goes on: TensorRT is silent for minutes."""
    done = threading.Event()
    started = time.monotonic()

    def beat() -> None:
        while not done.wait(_HEARTBEAT_SECONDS):
            console.note(f"  still building, {time.monotonic() - started:.0f} s")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
