"""A TensorRT in Python, for tests on machines without one: it keeps the documented contract, and ONNX Runtime computes.

What it is honest about, since the code under test must cope with it: failures come back as None or False with the
reason in the logger; the parser keeps its errors; a plugin exists once its library is loaded and not before; networks
are strongly typed; shapes outside a profile are refused; an engine is refused by another version or GPU, or when a byte
of it changed; what is executed runs when the stream is waited for; the first execution after a change of sizes cannot
be captured. TF32 is on unless the builder is told otherwise, and then costs the precision that it costs.

Everything that is called is recorded in `module.recorded`, so that tests/runtime/test_tensorrt_signatures.py can hold
each call against the real bindings. Nothing of this says that TensorRT builds these graphs: that takes TensorRT.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import importlib.machinery
import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

import hcmen.runtime.backends.cuda
import hcmen.runtime.backends.flavour
from hcmen.base.library import library_path
from hcmen.export.commands.compile import main as compile_main
from helpers.command import Outcome, run
from helpers.fake_cuda import FakeCuda

OPS = ("SelectiveScan", "CausalConv1d")
MAGIC = b"fake plan\0"


def make(version: str = "10.3.0", cuda: FakeCuda | None = None) -> Any:
    """A module like `tensorrt`, of that version, over that CUDA. Its knobs:

    noise: added to every output. bias_of: output name -> what is added to it alone. build_error: a build fails with it.
    context_error, execute_error: these calls fail. allow_capture: whether executions can be captured.
    libraries: what a path given to load_library holds: names of ops.
    """
    cuda = cuda or FakeCuda()
    trt: Any = types.ModuleType("tensorrt")
    trt.__version__ = version
    trt.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
    trt.recorded = []
    numbers = tuple(int(n) for n in version.split(".")[:2])
    trt.noise, trt.bias_of = 0.0, {}
    trt.build_error = trt.context_error = trt.execute_error = None
    trt.allow_capture = True
    trt.libraries = {}
    trt.built = []

    # --- recording --------------------------------------------------------------------------------------------------

    def told(value: Any) -> str:
        """The type of an argument, as the real bindings would name it."""
        if isinstance(value, enum.Enum):
            return str(type(value).__qualname__)
        for base in type(value).__mro__:
            if base.__module__ == "tensorrt":
                return str(base.__qualname__)
        return type(value).__name__

    def recorded(function: Any) -> Any:
        name = function.__name__

        @functools.wraps(function)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = function(self, *args, **kwargs)
            trt.recorded.append(
                {
                    "class": class_of(self),
                    "method": name,
                    "args": [told(a) for a in args],
                    "kwargs": {k: told(v) for k, v in kwargs.items()},
                    "returned": told(result),
                }
            )
            return result

        return wrapper

    def class_of(instance: Any) -> str:
        return next(c.__qualname__ for c in type(instance).__mro__ if c.__module__ == "tensorrt")

    class Recording:
        """Records the properties that are read and set."""

        _properties: tuple[str, ...] = ()

        def __getattribute__(self, name: str) -> Any:
            if not name.startswith("_") and name in type(self)._properties:
                trt.recorded.append({"class": class_of(self), "property": name, "set": False})
            return object.__getattribute__(self, name)

        def __setattr__(self, name: str, value: Any) -> None:
            if not name.startswith("_"):
                assert name in type(self)._properties, f"{class_of(self)} has no {name}"
                trt.recorded.append({"class": class_of(self), "property": name, "set": True, "value": told(value)})
            object.__setattr__(self, name, value)

    def public(cls: type) -> type:
        cls.__module__ = "tensorrt"
        cls.__qualname__ = cls.__name__
        setattr(trt, cls.__name__, cls)
        return cls

    def enumeration(name: str, members: Sequence[str]) -> Any:
        made = enum.IntEnum(name, {m: i for i, m in enumerate(members)})  # type: ignore[misc]
        made.__module__, made.__qualname__ = "tensorrt", name
        setattr(trt, name, made)
        return made

    new = numbers >= (11, 0)
    BuilderFlag = enumeration("BuilderFlag", ["TF32", "VERSION_COMPATIBLE", *([] if new else ["FP16"])])
    CreationFlag = enumeration(
        "NetworkDefinitionCreationFlag",
        [
            *([] if new else ["EXPLICIT_BATCH"]),
            "STRONGLY_TYPED",
        ],
    )
    enumeration("HardwareCompatibilityLevel", ["NONE", "AMPERE_PLUS"])
    enumeration("MemoryPoolType", ["WORKSPACE"])
    TensorIOMode = enumeration("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
    DataType = enumeration("DataType", ["FLOAT", "HALF", "INT8", "INT32", "BOOL", "INT64"])
    kinds = {TensorProto.FLOAT: DataType.FLOAT, TensorProto.FLOAT16: DataType.HALF, TensorProto.INT64: DataType.INT64}
    kinds |= {TensorProto.INT32: DataType.INT32}

    # --- logger, host memory, registry ------------------------------------------------------------------------------

    class Severity(enum.IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    @public
    class ILogger:
        def __init__(self) -> None:
            self._born = True

        def log(self, severity: Any, msg: str) -> None:
            raise NotImplementedError

    ILogger.Severity = Severity  # type: ignore[attr-defined]

    def say(logger: Any, severity: Any, text: str) -> None:
        assert isinstance(logger, ILogger)
        assert logger._born, "ILogger.__init__ was not called"
        logger.log(severity, text)

    @public
    class IHostMemory(bytearray):
        pass

    @public
    class IPluginRegistry:
        def __init__(self) -> None:
            self._creators: dict[tuple[str, str, str], Any] = {}

        @recorded
        def load_library(self, plugin_path: str) -> Any:
            ops = trt.libraries.get(plugin_path)
            if ops is None:
                for logger in trt.loggers:
                    say(logger, Severity.ERROR, f"cannot open {plugin_path}")
                return None
            for op in ops:
                self._creators[(op, "1", "hcmen")] = object()
            return object()

        @recorded
        def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> Any:
            return self._creators.get((type, version, plugin_namespace))

    trt.loggers = []
    trt.registry = IPluginRegistry()

    def get_plugin_registry() -> Any:
        trt.recorded.append({"class": "", "method": "get_plugin_registry", "args": [], "kwargs": {}})
        return trt.registry

    trt.get_plugin_registry = get_plugin_registry

    def have_plugin(op: str) -> bool:
        return (op, "1", "hcmen") in trt.registry._creators

    # --- build ------------------------------------------------------------------------------------------------------

    @public
    class ITensor:
        def __init__(self, value: Any):
            self._name = value.name
            self._type = value.type.tensor_type.elem_type
            self._shape = tuple(
                d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim
            )

    @public
    class INetworkDefinition:
        def __init__(self) -> None:
            self._model: Any = None
            self._plugins: set[str] = set()

    @public
    class ParserError:
        def __init__(self, text: str, node: int, name: str, operator: str):
            self._text, self._node, self._name, self._operator = text, node, name, operator

        @recorded
        def desc(self) -> str:
            return self._text

        @recorded
        def node(self) -> int:
            return self._node

        @recorded
        def node_name(self) -> str:
            return self._name

        @recorded
        def node_operator(self) -> str:
            return self._operator

    @public
    class OnnxParser(Recording):
        _properties = ("num_errors",)

        def __init__(self, network: Any, logger: Any):
            trt.recorded.append(constructed("OnnxParser", network, logger))
            self._network, self._logger, self._errors = network, logger, []

        @property
        def num_errors(self) -> int:
            return len(self._errors)

        @recorded
        def get_error(self, index: int) -> Any:
            return self._errors[index]

        @recorded
        def parse(self, model: bytes, path: str | None = None) -> bool:
            parsed = onnx.ModelProto()
            try:
                parsed.ParseFromString(model)
            except Exception:
                self._errors.append(ParserError("Failed to parse the ONNX model", -1, "", ""))
                return False
            if any(t.data_location == TensorProto.EXTERNAL for t in parsed.graph.initializer):
                self._errors.append(ParserError("Failed to open weights file", -1, "", ""))
                return False
            functions = {f.name for f in parsed.functions}
            used: set[str] = set()
            for i, node in enumerate(parsed.graph.node):
                if node.domain != "hcmen":
                    continue
                plugin = have_plugin(node.op_type)
                by_function = node.op_type in functions and (numbers < (10, 7) or not plugin)
                if by_function:
                    continue
                if not plugin:
                    self._errors.append(
                        ParserError(
                            f"Plugin not found, are the plugin name, version, and namespace correct? {node.op_type}",
                            i,
                            node.name,
                            node.op_type,
                        )
                    )
                    return False
                used.add(node.op_type)
            self._network._model, self._network._plugins = parsed, used
            return True

    @public
    class IOptimizationProfile:
        def __init__(self) -> None:
            self._shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

        @recorded
        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            if not len(min) == len(opt) == len(max):
                raise ValueError("Dimensions do not have the same length")
            self._shapes[input] = (tuple(min), tuple(opt), tuple(max))

    @public
    class ITimingCache:
        def __init__(self, content: bytes):
            self._content = content

        @recorded
        def serialize(self) -> Any:
            return IHostMemory(self._content)

    @public
    class IBuilderConfig(Recording):
        _properties = ("hardware_compatibility_level", "plugins_to_serialize")

        def __init__(self) -> None:
            self._flags = {BuilderFlag.TF32}
            self._profiles: list[Any] = []
            self._cache: Any = None
            self._limits: dict[Any, int] = {}
            self._sealed = True

        @recorded
        def set_flag(self, flag: Any) -> None:
            self._flags.add(flag)

        @recorded
        def clear_flag(self, flag: Any) -> None:
            self._flags.discard(flag)

        @recorded
        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            self._limits[pool] = pool_size

        @recorded
        def add_optimization_profile(self, profile: Any) -> int:
            for low, best, high in profile._shapes.values():
                if not all(a <= b <= c for a, b, c in zip(low, best, high, strict=True)):
                    return -1
            self._profiles.append(profile)
            return len(self._profiles) - 1

        @recorded
        def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
            content = bytes(serialized_timing_cache)
            return None if content.startswith(b"broken") else ITimingCache(content)

        @recorded
        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            if cache._content and not cache._content.startswith(f"timings {version} sm{cuda.sm}".encode()):
                return ignore_mismatch
            self._cache = cache
            return True

        @recorded
        def get_timing_cache(self) -> Any:
            return self._cache

    @public
    class Builder:
        def __init__(self, logger: Any):
            trt.recorded.append(constructed("Builder", logger))
            self._logger = logger
            trt.loggers.append(logger)

        @recorded
        def create_network(self, flags: int = 0) -> Any:
            assert new or flags & (1 << int(CreationFlag.STRONGLY_TYPED)), "precision would be the builder's choice"
            return INetworkDefinition()

        @recorded
        def create_builder_config(self) -> Any:
            return IBuilderConfig()

        @recorded
        def create_optimization_profile(self) -> Any:
            return IOptimizationProfile()

        @recorded
        def build_serialized_network(self, network: Any, config: Any) -> Any:
            if trt.build_error:
                say(self._logger, Severity.ERROR, trt.build_error)
                return None
            model = network._model
            for value in model.graph.input:
                tensor = ITensor(value)
                if -1 in tensor._shape and not all(value.name in p._shapes for p in config._profiles):
                    say(self._logger, Severity.ERROR, f"dynamic input {value.name} is in no optimization profile")
                    return None
            if config._cache is not None:
                config._cache._content = f"timings {version} sm{cuda.sm} {model.graph.name}".encode()
            level = config.__dict__.get("hardware_compatibility_level")
            plan = {
                "version": version,
                "sm": cuda.sm,
                "version_compatible": BuilderFlag.VERSION_COMPATIBLE in config._flags,
                "any_ampere": level is not None and level.name == "AMPERE_PLUS",
                "plugins": sorted(network._plugins),
                "embedded": bool(config.__dict__.get("plugins_to_serialize")),
                "tf32": BuilderFlag.TF32 in config._flags,
                "workspace": config._limits.get(trt.MemoryPoolType.WORKSPACE),
                "profiles": [p._shapes for p in config._profiles],
            }
            trt.built.append((model, plan))
            content = json.dumps(plan).encode() + b"\0" + model.SerializeToString()
            say(self._logger, Severity.INFO, "Engine generation completed")
            return IHostMemory(MAGIC + hashlib.sha256(content).digest() + content)

    def constructed(name: str, *args: Any) -> dict[str, Any]:
        return {"class": name, "method": "__init__", "args": [told(a) for a in args], "kwargs": {}}

    # --- run --------------------------------------------------------------------------------------------------------

    @public
    class Runtime(Recording):
        _properties = ("engine_host_code_allowed",)

        def __init__(self, logger: Any):
            trt.recorded.append(constructed("Runtime", logger))
            self._logger = logger
            trt.loggers.append(logger)

        @recorded
        def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
            content = bytes(serialized_engine)
            digest, body = content[len(MAGIC) : len(MAGIC) + 32], content[len(MAGIC) + 32 :]

            def refuse(why: str) -> None:
                say(self._logger, Severity.ERROR, why)

            if not content.startswith(MAGIC) or hashlib.sha256(body).digest() != digest:
                return refuse("Magic tag does not match")
            head, _, graph = body.partition(b"\0")
            plan = json.loads(head)
            if plan["version_compatible"] and not self.__dict__.get("engine_host_code_allowed"):
                return refuse("engine host code is not allowed")
            if plan["version"] != version and not plan["version_compatible"]:
                return refuse(f"the engine plan file is not compatible with this version of TensorRT, {version}")
            if plan["sm"] != cuda.sm and not (plan["any_ampere"] and cuda.sm >= 80):
                return refuse("the engine plan file is generated on an incompatible device")
            if not plan["embedded"] and not all(have_plugin(op) for op in plan["plugins"]):
                return refuse(
                    f"Cannot deserialize plugin since corresponding IPluginCreator not found: {plan['plugins']}"
                )
            return ICudaEngine(self._logger, plan, onnx.ModelProto.FromString(graph))

    @public
    class ICudaEngine(Recording):
        _properties = ("num_io_tensors", "num_optimization_profiles")

        def __init__(self, logger: Any, plan: Any, model: Any):
            self._logger, self._plan = logger, plan
            self._tensors = [(TensorIOMode.INPUT, ITensor(v)) for v in model.graph.input]
            self._tensors += [(TensorIOMode.OUTPUT, ITensor(v)) for v in model.graph.output]
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            if any(node.domain == "hcmen" for node in model.graph.node):
                options.register_custom_ops_library(str(library_path()))
            self._session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )

        @property
        def num_io_tensors(self) -> int:
            return len(self._tensors)

        @property
        def num_optimization_profiles(self) -> int:
            return len(self._plan["profiles"])

        def _tensor(self, name: str) -> Any:
            return next(t for _, t in self._tensors if t._name == name)

        @recorded
        def get_tensor_name(self, index: int) -> str:
            return str(self._tensors[index][1]._name)

        @recorded
        def get_tensor_mode(self, name: str) -> Any:
            return next(mode for mode, t in self._tensors if t._name == name)

        @recorded
        def get_tensor_dtype(self, name: str) -> Any:
            return kinds[self._tensor(name)._type]

        @recorded
        def get_tensor_shape(self, name: str) -> Any:
            return self._tensor(name)._shape

        @recorded
        def get_tensor_profile_shape(self, name: str, profile_index: int) -> Any:
            return [tuple(shape) for shape in self._plan["profiles"][profile_index][name]]

        @recorded
        def create_execution_context(self) -> Any:
            if trt.context_error:
                say(self._logger, Severity.ERROR, trt.context_error)
                return None
            return IExecutionContext(self)

    @public
    class IExecutionContext:
        def __init__(self, engine: Any):
            self._engine = engine
            self._profile: int | None = None
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}
            self._fresh = True  # since the last change of sizes, nothing was executed

        @recorded
        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            self._profile = profile_index
            self._shapes.clear()
            return 0 <= profile_index < len(self._engine._plan["profiles"])

        @recorded
        def set_input_shape(self, name: str, shape: Any) -> bool:
            assert self._profile is not None
            low, _, high = self._engine._plan["profiles"][self._profile][name]
            shape = tuple(shape)
            if len(shape) != len(low) or not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
                say(self._engine._logger, Severity.ERROR, f"{name}: {shape} is outside the profile {low} to {high}")
                return False
            self._fresh |= self._shapes.get(name) != shape
            self._shapes[name] = shape
            return True

        @recorded
        def set_tensor_address(self, name: str, memory: int) -> bool:
            self._engine._tensor(name)
            self._addresses[name] = memory
            return memory != 0

        @recorded
        def infer_shapes(self) -> list[str]:
            return [t._name for m, t in self._engine._tensors if m.name == "INPUT" and t._name not in self._shapes]

        @recorded
        def get_tensor_shape(self, name: str) -> Any:
            if name in self._shapes:
                return self._shapes[name]
            batch = next(iter(self._shapes.values()))[0]
            return tuple(batch if n == -1 else n for n in self._engine._tensor(name)._shape)

        @recorded
        def execute_async_v3(self, stream_handle: int) -> bool:
            if trt.execute_error:
                say(self._engine._logger, Severity.ERROR, trt.execute_error)
                return False
            if cuda.capturing.get(stream_handle) is not None and (self._fresh or not trt.allow_capture):
                say(self._engine._logger, Severity.ERROR, "operation not permitted when stream is capturing")
                return False
            self._fresh = False
            shapes, addresses = dict(self._shapes), dict(self._addresses)
            cuda.queue(stream_handle, lambda: self._compute(shapes, addresses))
            return True

        def _compute(self, shapes: Any, addresses: Any) -> None:
            feeds = {}
            session = self._engine._session
            for name, shape in shapes.items():
                dtype = onnx.helper.tensor_dtype_to_np_dtype(self._engine._tensor(name)._type)
                size = int(np.prod(shape)) * dtype.itemsize
                raw = bytes(cuda.on_device(addresses[name], size))
                feeds[name] = np.frombuffer(raw, dtype).reshape(shape)
            names = [o.name for o in session.get_outputs()]
            for name, value in zip(names, session.run(names, feeds), strict=True):
                if self._engine._plan["tf32"]:
                    value = value * np.float32(1 + 2e-3)
                value = (value + trt.noise + trt.bias_of.get(name, 0.0)).astype(value.dtype)
                cuda.on_device(addresses[name], value.nbytes)[:] = value.tobytes()

    return trt


def plugin_file(folder: Path, trt: Any, ops: Sequence[str] = OPS) -> Path:
    """A file that the fake's load_library takes for the plugin library with those ops."""
    path = folder / "libhcmen_trt.so"
    path.write_bytes(b"not really")
    trt.libraries[str(path.resolve())] = tuple(ops)
    return path


def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, cuda: FakeCuda) -> Any:
    """A machine with that TensorRT, that GPU and the plugin library in `tmp_path`; the module `tensorrt`."""
    module = make(version, cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(hcmen.runtime.backends.cuda, "_libraries", lambda: iter([("libcudart.so.12", cuda)]))
    library = plugin_file(tmp_path, module)
    monkeypatch.setattr(hcmen.runtime.backends.flavour, "library_folders", lambda: [library.parent])
    return module


def compiled(bundle: Path, *arguments: object) -> Outcome:
    """What hcmen-compile says to `bundle` with `arguments`."""
    return run(compile_main, bundle, *arguments)
