"""A TensorRT or TensorRT-RTX in Python, for tests on machines without one: ONNX Runtime computes.

It is honest about what the code under test must cope with: failures come back as None or False with the reason in the
logger; the parser keeps its errors; a plugin exists once its library is loaded; what is executed runs when the stream
is waited for; the first execution after a change of sizes cannot be captured. RTX has no
plugins; its engines run on the GPUs they name; kernels are compiled at a size's first run, which a runtime cache of the
same environment spares. All that is called is in
`module.recorded`, which tests/runtime/test_tensorrt_signatures.py holds against the real bindings. Nothing of this says
that TensorRT builds these graphs: that takes TensorRT.
"""

from __future__ import annotations

import enum
import hashlib
import importlib.machinery
import json
import sys
import types
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import hcmen.runtime.backends.cuda
import hcmen.runtime.backends.flavour
import hcmen.runtime.backends.tensorrt_rtx
from hcmen.base.library import library_path
from hcmen.base.op import OPERATORS
from hcmen.export.commands.compile import main as compile_main
from helpers.command import Outcome, run
from helpers.fake_cuda import FakeCuda

OPS = tuple(OPERATORS)
MAGIC = b"fake plan\0"
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx_bindings"}
VERSIONS = {"tensorrt": "10.3.0", "tensorrt-rtx": "1.7.1.116"}
TARGETS = (75, 80, 86, 89, 120, 121)


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    born = False

    def __init__(self) -> None:
        self.born = True


class IHostMemory(bytearray):
    pass


def told(value: Any) -> str:
    """The type of an argument, as the real bindings would name it."""
    return (
        str(value._kind)
        if isinstance(value, Thing)
        else ILogger.__name__
        if isinstance(value, ILogger)
        else type(value).__name__
    )


class Thing:
    """An object of TensorRT's, of class `_kind`: what of it is called, read and set is in `_recorded`."""

    def __init__(self, kind: str, recorded: list[dict[str, Any]], **members: Any):
        vars(self).update(members, _kind=kind, _recorded=recorded)

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name.startswith("_"):
            return value
        if not callable(value):
            self._recorded.append({"class": self._kind, "property": name, "set": False})
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            given = {"args": [told(a) for a in args], "kwargs": {k: told(v) for k, v in kwargs.items()}}
            self._recorded.append({"class": self._kind, "method": name, **given})
            return value(*args, **kwargs)

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        self._recorded.append({"class": self._kind, "property": name, "set": True})
        vars(self)[name] = value


def make(version: str, cuda: FakeCuda, flavour: str = "tensorrt") -> Any:
    """A module like that of the flavour, of that version, over that CUDA. Its knobs:

    noise: added to every output. bias_of: output name -> what is added to it alone. build_error: a build fails with it.
    context_error, execute_error: these calls fail. allow_capture: whether executions can be captured.
    libraries: what a path given to load_library holds: names of ops. creators: of the plugins that are there.
    built: (graph, plan) of every build.
    invalid: bits of RTX's EngineInvalidityDiagnostics that hold for every engine. cache_error: no runtime cache is to
    be had. jit: (size, strategies) of every compilation of kernels that no runtime cache spared.
    """
    rtx = flavour == "tensorrt-rtx"
    trt: Any = types.ModuleType(MODULES[flavour])
    trt.__version__, trt.__spec__ = version, importlib.machinery.ModuleSpec(MODULES[flavour], None)
    trt.cuda, trt.flavour = cuda, flavour
    trt.jit, trt.invalid, trt.cache_error, validated = [], 0, False, set[bytes]()
    trt.recorded, trt.built, trt.loggers, trt.libraries, trt.creators, trt.bias_of = [], [], [], {}, {}, {}
    trt.build_error = trt.context_error = trt.execute_error = None
    trt.noise, trt.allow_capture, trt.ILogger = 0.0, True, ILogger
    new = rtx or int(version.split(".")[0]) >= 11
    for name, members in (
        ("BuilderFlag", ["TF32", "VERSION_COMPATIBLE"]),
        ("NetworkDefinitionCreationFlag", [*["EXPLICIT_BATCH"] * (not new), "STRONGLY_TYPED"]),
        ("HardwareCompatibilityLevel", ["NONE", "AMPERE_PLUS"]),
        ("MemoryPoolType", ["WORKSPACE"]),
        ("TensorIOMode", ["NONE", "INPUT", "OUTPUT"]),
        ("DataType", ["FLOAT", "HALF", "INT8", "INT32", "BOOL", "INT64"]),
    ):
        setattr(trt, name, enum.IntEnum(name, {m: i for i, m in enumerate(members)}))  # type: ignore[misc]
    if rtx:
        bits = ("VERSION_MISMATCH", "UNSUPPORTED_CC", "OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME", "INSUFFICIENT_GPU_MEMORY")
        for name, values in (
            ("ComputeCapability", {"NONE": 0, "CURRENT": 1, **{f"SM{n}": n for n in TARGETS}}),
            ("ExecutionContextAllocationStrategy", {"STATIC": 0, "ON_PROFILE_CHANGE": 1, "USER_MANAGED": 2}),
            ("CudaGraphStrategy", {"DISABLED": 0, "WHOLE_GRAPH_CAPTURE": 1}),
            ("DynamicShapesKernelSpecializationStrategy", {"LAZY": 0, "EAGER": 1, "NONE": 2}),
            ("EngineValidity", {"VALID": 0, "SUBOPTIMAL": 1, "INVALID": 2}),
            (
                "EngineInvalidityDiagnostics",
                {bit: 1 << i for i, bit in enumerate((*bits, "MALFORMED_ENGINE", "CUDA_ERROR"))},
            ),
        ):
            setattr(trt, name, enum.IntEnum(name, values))  # type: ignore[misc]
    kinds = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64", "int32": "INT32"}

    def thing(kind: str, **members: Any) -> Thing:
        return Thing(kind, trt.recorded, **members)

    def refuse(text: str) -> None:
        for logger in trt.loggers:
            assert logger.born, "ILogger.__init__ was not called"
            logger.log(Severity.ERROR, text)

    def constructor(kind: str, members: Any) -> Any:
        def construct(*args: Any) -> Thing:
            given = {"args": [told(a) for a in args], "kwargs": {}}
            trt.recorded.append({"class": kind, "method": "__init__", **given})
            trt.loggers.append(args[-1])
            return members(*args)

        return construct

    # --- plugins ----------------------------------------------------------------------------------------------------

    def load_library(path: str) -> Any:
        trt.creators |= {(op, "1", "hcmen"): object() for op in trt.libraries.get(path, ())}
        return object() if path in trt.libraries else None

    def get_plugin_registry() -> Thing:
        trt.recorded.append({"class": "", "method": "get_plugin_registry"})
        return thing("IPluginRegistry", load_library=load_library, get_creator=lambda *key: trt.creators.get(key))

    if not rtx:  # which has a registry that no library can be loaded into
        trt.get_plugin_registry = get_plugin_registry

    # --- build ------------------------------------------------------------------------------------------------------

    def parser(network: Thing, logger: ILogger) -> Thing:
        errors: list[Thing] = []

        def error(text: str, number: int = -1, name: str = "", operator: str = "") -> None:
            told = {"desc": text, "node": number, "node_name": name, "node_operator": operator}
            errors.append(thing("ParserError", **{key: lambda value=value: value for key, value in told.items()}))

        def parse(content: bytes) -> bool:
            model = onnx.ModelProto()
            try:
                model.ParseFromString(content)
            except Exception:
                error("Failed to parse the ONNX model")
            for i, node in enumerate(model.graph.node):
                if node.domain == "hcmen" and (node.op_type, "1", "hcmen") not in trt.creators:
                    error(f"Plugin not found, is its name correct? {node.op_type}", i, node.name, node.op_type)
            vars(made)["num_errors"] = len(errors)
            vars(network)["_model"] = model
            return not errors

        made = thing("OnnxParser", parse=parse, get_error=lambda index: errors[index])
        return made

    def create_network(flags: int = 0) -> Thing:
        typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        assert new or flags & typed, "precision would be the builder's choice"
        return thing("INetworkDefinition")

    def create_optimization_profile() -> Thing:
        shapes: dict[str, Any] = {}

        def set_shape(name: str, *given: Any) -> None:
            assert all(a <= b <= c for a, b, c in zip(*given, strict=True))
            shapes[name] = tuple(map(tuple, given))

        return thing("IOptimizationProfile", set_shape=set_shape, _shapes=shapes)

    def create_builder_config() -> Thing:
        flags, profiles, limits, caches, targets = {"TF32"}, [], {}, [], {}

        def set_compute_capability(capability: Any, index: int) -> bool:
            targets[index] = int(capability)
            return True

        def set_timing_cache(cache: Thing, ignore_mismatch: bool) -> bool:
            fits = not cache._content or cache._content.startswith(f"timings {version} sm{cuda.sm}".encode())
            caches.extend([cache] * fits)
            return fits

        def create_timing_cache(content: bytes) -> Thing | None:
            made = thing("ITimingCache", _content=content, serialize=lambda: IHostMemory(made._content))
            return None if content.startswith(b"broken") else made

        return thing(
            "IBuilderConfig",
            set_flag=lambda flag: flags.add(flag.name),
            clear_flag=lambda flag: flags.discard(flag.name),
            set_memory_pool_limit=lambda pool, size: limits.__setitem__(pool.name, size),
            add_optimization_profile=lambda profile: profiles.append(profile._shapes) or len(profiles) - 1,
            create_timing_cache=create_timing_cache,
            set_timing_cache=set_timing_cache,
            get_timing_cache=lambda: caches[-1],
            _caches=caches,
            _plan={"flags": flags, "profiles": profiles, "limits": limits, "version": version},
            **({"set_compute_capability": set_compute_capability, "_targets": targets} if rtx else {}),
        )

    def build(network: Thing, config: Thing) -> IHostMemory | None:
        if trt.build_error:
            return refuse(trt.build_error)
        for cache in config._caches:
            vars(cache)["_content"] = f"timings {version} sm{cuda.sm} {network._model.graph.name}".encode()
        settings, level = vars(config), vars(config).get("hardware_compatibility_level")
        plan = config._plan | {"flags": sorted(config._plan["flags"]), "level": level.name if level else None}
        plan["embedded"] = settings.get("plugins_to_serialize", [])
        if rtx:
            assert sorted(config._targets) == list(range(settings["num_compute_capabilities"])), "as many as were told"
            plan["targets"] = sorted(config._targets.values())
        trt.built.append((network._model, plan))
        content = json.dumps(plan).encode() + b"\0" + network._model.SerializeToString()
        return IHostMemory(MAGIC + hashlib.sha256(content).digest() + content)

    trt.OnnxParser = constructor("OnnxParser", parser)
    trt.Builder = constructor(
        "Builder",
        lambda logger: thing(
            "Builder",
            create_network=create_network,
            create_builder_config=create_builder_config,
            create_optimization_profile=create_optimization_profile,
            build_serialized_network=build,
        ),
    )

    # --- run --------------------------------------------------------------------------------------------------------

    def engine(plan: Any, model: Any) -> Thing:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        if any(node.domain == "hcmen" for node in model.graph.node):
            options.register_custom_ops_library(str(library_path()))
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        modes, dtypes, shapes = {}, {}, {}
        for mode, values in (("INPUT", model.graph.input), ("OUTPUT", model.graph.output)):
            for value in values:
                kind = value.type.tensor_type
                modes[value.name] = trt.TensorIOMode[mode]
                dtypes[value.name] = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
                shapes[value.name] = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)

        def compute(given: dict[str, Any], addresses: dict[str, int]) -> None:
            def memory(name: str, shape: Sequence[int]) -> Any:
                return cuda.on_device(addresses[name], int(np.prod(shape)) * dtypes[name].itemsize)

            feeds = {n: np.frombuffer(bytes(memory(n, s)), dtypes[n]).reshape(s) for n, s in given.items()}
            names = [o.name for o in session.get_outputs()]
            for name, value in zip(names, session.run(names, feeds), strict=True):
                changed = (value + trt.noise + trt.bias_of.get(name, 0.0)).astype(value.dtype)
                memory(name, value.shape)[:] = changed.tobytes()

        digest = hashlib.sha256(model.SerializeToString()).hexdigest()[:8]

        def context(config: Thing | None = None) -> Thing | None:
            if trt.context_error:
                return refuse(trt.context_error)
            return execution(plan, modes, shapes, compute, partial(compile_kernels, config, digest) if rtx else None)

        def create_runtime_cache() -> Thing | None:
            entries: set[str] = set()
            environment = f"rtx {version} sm{cuda.sm}\n"

            def deserialize_cache(content: bytes) -> bool:
                assert "stream" in cuda.alive, "no CUDA context is current"
                fits = bytes(content).startswith(environment.encode())
                entries.update(bytes(content).decode().splitlines()[1:] if fits else ())
                return fits

            def serialize_cache() -> IHostMemory:
                return IHostMemory((environment + "\n".join(sorted(entries))).encode())

            if trt.cache_error:
                return None
            return thing("IRuntimeCache", deserialize=deserialize_cache, serialize=serialize_cache, _entries=entries)

        def create_runtime_config() -> Thing:
            made = thing(
                "IRuntimeConfig",
                create_runtime_cache=create_runtime_cache,
                set_execution_context_allocation_strategy=lambda strategy: None,
                set_runtime_cache=lambda cache: vars(made).update(_cache=cache) is None,
                _cache=None,
            )
            return made

        return thing(
            "ICudaEngine",
            num_io_tensors=len(modes),
            num_optimization_profiles=len(plan["profiles"]),
            get_tensor_name=lambda index: list(modes)[index],
            get_tensor_mode=lambda name: modes[name],
            get_tensor_dtype=lambda name: trt.DataType[kinds[dtypes[name].name]],
            get_tensor_shape=lambda name: shapes[name],
            get_tensor_profile_shape=lambda name, index: plan["profiles"][index][name],
            create_execution_context=context,
            **({"create_runtime_config": create_runtime_config} if rtx else {}),
        )

    def compile_kernels(config: Thing, digest: str, given: dict[str, Any]) -> None:
        """RTX: before a size is run for the first time, unless a cache has its kernels."""
        assert not any(captured is not None for captured in cuda.capturing.values()), "RTX captures itself"
        size = f"{digest} {sorted(given.items())}"
        entries = config._cache._entries if config._cache is not None else set()
        if size not in entries:
            settings = vars(config)
            strategies = (settings["cuda_graph_strategy"], settings["dynamic_shapes_kernel_specialization_strategy"])
            trt.jit.append((size, *(strategy.name for strategy in strategies)))
            entries.add(size)

    def execution(plan: Any, modes: dict[str, Any], shapes: dict[str, Any], compute: Any, prepare: Any = None) -> Thing:
        given: dict[str, Any] = {}
        addresses: dict[str, int] = {}
        state: dict[str, Any] = {"fresh": True}  # since the last change of sizes, nothing was executed

        def set_input_shape(name: str, shape: Any) -> bool:
            low, _, high = plan["profiles"][state["profile"]][name]
            assert all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)), "not in this profile"
            state["fresh"] |= given.get(name) != shape
            given[name] = shape
            return True

        def execute_async_v3(stream: int) -> bool:
            capturing = cuda.capturing.get(stream) is not None
            if trt.execute_error or (capturing and (state["fresh"] or not trt.allow_capture)):
                refuse(trt.execute_error or "operation not permitted when stream is capturing")
                return False
            if prepare is not None and state["fresh"]:
                prepare(given)
            state["fresh"] = False
            sizes, places = dict(given), dict(addresses)
            cuda.queue(stream, lambda: compute(sizes, places))
            return True

        def get_tensor_shape(name: str) -> Any:
            return tuple(next(iter(given.values()))[0] if n == -1 else n for n in shapes[name])

        return thing(
            "IExecutionContext",
            set_optimization_profile_async=lambda index, stream: state.update(profile=index) is None,
            set_input_shape=set_input_shape,
            set_tensor_address=lambda name, memory: addresses.update({name: memory}) is None,
            infer_shapes=lambda: [n for n, mode in modes.items() if mode.name == "INPUT" and n not in given],
            get_tensor_shape=get_tensor_shape,
            execute_async_v3=execute_async_v3,
        )

    def get_engine_validity(content: Any) -> tuple[Any, int]:
        content, bits = bytes(content), trt.EngineInvalidityDiagnostics
        validated.add(content)
        found = trt.invalid
        if content.startswith(MAGIC):
            plan = json.loads(content[len(MAGIC) + 32 :].partition(b"\0")[0])
            found |= bits.VERSION_MISMATCH * (plan["version"] != version)
            found |= bits.UNSUPPORTED_CC * (cuda.sm not in plan["targets"])
        else:
            found |= bits.MALFORMED_ENGINE
        return trt.EngineValidity.INVALID if found else trt.EngineValidity.VALID, found

    def deserialize(runtime: Thing, content: bytes) -> Thing | None:
        assert not rtx or content in validated, "whether it can run here was not asked"
        digest, body = content[len(MAGIC) : len(MAGIC) + 32], content[len(MAGIC) + 32 :]
        if not content.startswith(MAGIC) or hashlib.sha256(body).digest() != digest:
            return refuse("Magic tag does not match")
        head, _, graph = body.partition(b"\0")
        plan, allowed = json.loads(head), vars(runtime).get("engine_host_code_allowed")
        assert allowed or "VERSION_COMPATIBLE" not in plan["flags"], "engine host code is not allowed"
        return engine(plan, onnx.ModelProto.FromString(graph))

    def runtime(logger: ILogger) -> Thing:
        made = thing(
            "Runtime",
            deserialize_cuda_engine=lambda plan: deserialize(made, bytes(plan)),
            **({"get_engine_validity": get_engine_validity} if rtx else {}),
        )
        return made

    trt.Runtime = constructor("Runtime", runtime)
    return trt


def plugin_file(folder: Path, trt: Any, ops: Sequence[str] = OPS) -> Path:
    """A file that the fake's load_library takes for the plugin library with those ops."""
    path = folder / "libhcmen_trt.so"
    path.write_bytes(b"not really")
    trt.libraries[str(path.resolve())] = tuple(ops)
    return path


def machine(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    version: str | None = None,
    cuda: FakeCuda | None = None,
    flavour: str = "tensorrt",
) -> Any:
    """A machine with that TensorRT and a GPU, of sm 87 if nothing else is said, of sm 89 for TensorRT-RTX.

    TensorRT's plugin library is in `tmp_path`; RTX has none, and its compiled code is kept in `tmp_path`.

    Gives the flavour's module, whose `cuda` is the GPU.
    """
    rtx = flavour == "tensorrt-rtx"
    cuda = cuda or FakeCuda(sm=89 if rtx else 87)
    module = make(version or VERSIONS[flavour], cuda, flavour)
    monkeypatch.setitem(sys.modules, MODULES[flavour], module)
    monkeypatch.setattr(hcmen.runtime.backends.cuda, "_libraries", lambda: iter([("libcudart.so.12", cuda)]))
    folders = [] if rtx else [plugin_file(tmp_path, module).parent]
    monkeypatch.setattr(hcmen.runtime.backends.flavour, "library_folders", lambda: folders)
    if rtx:
        monkeypatch.setattr(hcmen.runtime.backends.cuda, "driver_and_gpu", lambda: ("580.65", "Ada"))
        monkeypatch.setattr(hcmen.runtime.backends.tensorrt_rtx, "library_version", lambda: module.__version__)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return module


def compiled(bundle: Path, *arguments: object) -> Outcome:
    """What hcmen-compile says to `bundle` with `arguments`."""
    return run(compile_main, bundle, *arguments)
