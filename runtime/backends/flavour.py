"""Which TensorRT: what tells one flavour from another, and its Python module as the backend and hcmen-compile use it.

TensorRT-RTX has the API of TensorRT in another module, with another numbering, without plugins, and with engines that
fit other devices. All of that is in a `Flavour`; the sessions and the compiler ask it and name no flavour themselves.
"""

from __future__ import annotations

import ctypes
import importlib
import platform
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hcmen.base.engines import EngineRecord
from hcmen.base.errors import BackendError, InputError, reason_of
from hcmen.base.library import library_folders
from hcmen.base.manifest import OP_DOMAIN, OP_VERSION
from hcmen.base.op import OPERATORS
from hcmen.runtime.backends import tensorrt_rtx as rtx

__all__ = ["FLAVOUR_OF", "PLUGIN_OPS", "TENSORRT", "TENSORRT_RTX", "Flavour", "TrtModule", "parsed_version"]

PLUGIN_OPS = tuple(OPERATORS)
_MOST_LINES = 1000


@dataclass(frozen=True)
class Flavour:
    """One kind of TensorRT.

    name: as backends and engine records call it, one of hcmen.base.engines.FLAVOURS. title: as messages call it.
    module: its Python module. oldest: the first version that serves. install: what to do where it is missing.
    library: the file with the plugins that are built for it, empty where it takes none.
    plugins: those of hcmen.base.engines.PLUGINS that it builds with -> the first version that does; the default first.
    lacks: options of hcmen.export.tensorrt.Options that it cannot serve -> why, and what to do.
    portable: it builds without a GPU, for GPUs of the named compute capabilities.
    profiles: optimisation profiles of an engine if nothing else is asked: 2 has one for single clips.
    """

    name: str
    title: str
    module: str
    oldest: tuple[int, ...]
    install: str
    library: str
    plugins: Mapping[str, tuple[int, ...]]
    lacks: Mapping[str, str] = field(default_factory=dict)
    portable: bool = False
    profiles: int = 2

    def load_module(self) -> Any:
        """Its Python module; raises BackendError where it is missing, damaged or too old."""
        try:
            module = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            raise BackendError(
                f"{error.name} is not installed, and {self.title} engines need it: {self.install}"
            ) from error
        except ImportError as error:
            what = f"{self.module} does not load ({reason_of(error, 400)})"
            raise BackendError(what, fix=f"install it again: {self.install}") from error
        if parsed_version(module.__version__) < self.oldest:
            raise BackendError(
                f"{self.title} is {module.__version__}, expected {_dotted(self.oldest)} or later: upgrade it"
            )
        if self.portable:
            rtx.check_library(module)
        return module

    def plugin_library(self) -> Path:
        """The absolute path of the plugin library.

        Raises:
            BackendError: it is in none of the places searched; the message lists them.
        """
        places = [folder / self.library for folder in library_folders()]
        for place in places:
            if place.is_file():
                return place.resolve()
        tried = ", ".join(str(p.parent) for p in places)
        raise BackendError(
            f"{self.library} was not found in {tried}: build it on this device with nvcc and the {self.title} headers "
            "(docs/jetson.md), or compile with --plugin function"
        )

    def require_plugin(self, plugin: str, version: str) -> None:
        """Holds that `version` can build an engine whose hcmen ops run as `plugin` says.

        Raises:
            InputError: no version can. BackendError: later ones can.
        """
        first = self.plugins.get(plugin)
        if first is not None and parsed_version(version) >= first:
            return
        what = f"{self.title} {version} has no {plugin.upper() if plugin == 'aot' else plugin} plugins"
        fix = f"use --plugin {next(iter(self.plugins))}"
        raise InputError(what, fix=fix) if first is None else BackendError(what, f"{_dotted(first)} or later", fix)

    @property
    def again(self) -> str:
        """What helps against an engine that cannot be used, for messages."""
        return f"compile it again {self.place}"

    @property
    def place(self) -> str:
        """Where its engines are compiled, for messages."""
        return "on any machine" if self.portable else "on this device"

    @property
    def chosen(self) -> list[str]:
        """What hcmen-compile is told to take it."""
        return [] if self is TENSORRT else ["--backend", self.name]

    def served(self, module: Any) -> tuple[int, ...]:
        """The compute capabilities of the GPUs that the module has kernels for, rising; of a portable flavour."""
        return rtx.capabilities_of(module)

    def require_device(self, module: Any, sm: int) -> None:
        """Holds that the module has kernels for a GPU of compute capability `sm`; raises BackendError."""
        if self.portable and sm not in (served := self.served(module)):
            raise BackendError(
                f"{self.title} {module.__version__} has no kernels for this GPU, of sm {sm}",
                f"one of sm {', '.join(map(str, served))}",
                f"use --backend {TENSORRT.name}, or ort-cuda",
            )

    def unfit(self, record: EngineRecord, sm: int, version: str) -> str | None:
        """Why a GPU of compute capability `sm` under `version` cannot run the engine; None if it can."""
        if self.portable:
            if sm not in record.capabilities:
                made = ", ".join(map(str, record.capabilities))
                return f"made for GPUs of sm {made}, this one has sm {sm}"
        else:
            (made_on,) = record.capabilities
            if record.machine != platform.machine():
                return f"made on {record.machine}, this machine is {platform.machine()}"
            if made_on != sm and not (record.hardware_compatible and min(sm, made_on) >= 80):
                return f"made for a GPU of sm {made_on}, this one has sm {sm}"
        if record.tensorrt != version:
            newer = parsed_version(version) >= parsed_version(record.tensorrt)
            if not (record.version_compatible and newer):
                return f"made by {self.title} {record.tensorrt}, this machine has {version}"
        return None


TENSORRT = Flavour(
    name="tensorrt",
    title="TensorRT",
    module="tensorrt",
    oldest=(10, 3),
    install="pip install 'hcmen[tensorrt]'; a Jetson has it as apt package python3-libnvinfer, seen by virtual "
    "environments with --system-site-packages",
    library="libhcmen_trt.so",
    plugins={"library": (10, 3), "aot": (10, 9), "function": (10, 3)},
)

TENSORRT_RTX = Flavour(
    name="tensorrt-rtx",
    title="TensorRT-RTX",
    module="tensorrt_rtx_bindings",
    oldest=(1, 4),
    install="pip install 'hcmen[rtx]'",
    library="",
    plugins={"function": (1, 4)},
    lacks={
        "version_compatible": "its engines run on the version that built them: leave out --version-compatible",
        "hardware_compatible": "its engines run on every GPU of --target: leave out --hardware-compatible",
        "timing_cache": "it times no kernels while it builds: leave out --timing-cache",
    },
    portable=True,
    profiles=1,
)

FLAVOUR_OF: Mapping[str, Flavour] = {flavour.name: flavour for flavour in (TENSORRT, TENSORRT_RTX)}
"""name -> flavour; the names are those of the backends that run their engines."""


class TrtModule:
    """The module of a flavour with one logger, which TensorRT keeps for the whole process.

    version: as the module tells it, such as "10.3.0". sink: called with (severity name, message) of what it logs.

    Raises:
        BackendError: it is not installed, does not load, or is too old.
    """

    def __init__(self, flavour: Flavour = TENSORRT) -> None:
        self.flavour = flavour
        self.module = flavour.load_module()
        self.version: str = self.module.__version__
        self.logger = _logger(self.module)
        # An engine must not outlive its runtime; these live as long as whoever holds this object.
        self._runtimes: dict[bool, Any] = {}

    def errors(self, since: int = 0) -> str:
        """What TensorRT logged as errors since `logger.count` was `since`, on one line; empty if nothing."""
        lines = [t for i, severity, t in self.logger.lines if i >= since and severity in ("INTERNAL_ERROR", "ERROR")]
        return _shortened("; ".join(dict.fromkeys(lines)))

    def creator(self, op_type: str) -> Any:
        """The plugin creator of an hcmen op, None while no plugin library is loaded."""
        return self.module.get_plugin_registry().get_creator(op_type, str(OP_VERSION), OP_DOMAIN)

    def load_plugins(self, path: Path) -> None:
        """Loads the plugin library, once per process.

        Raises:
            BackendError: TensorRT refuses it or has no such plugins, or it is from another version of hcmen.
        """
        self.flavour.require_plugin("library", self.version)
        if all(self.creator(op) is not None for op in PLUGIN_OPS):
            return
        mark = self.logger.count
        handle = self.module.get_plugin_registry().load_library(str(path))
        missing = [op for op in PLUGIN_OPS if self.creator(op) is None]
        if missing:
            why = self.errors(mark) or (_load_problem(path) if handle is None else "it has no such creator")
            raise BackendError(
                f"{path}: no plugin {OP_DOMAIN}::{missing[0]} version {OP_VERSION} in it ({why}): "
                f"build it again with this version of hcmen, for {self.flavour.title} {self.version}"
            )

    def deserialize(self, plan: memoryview | bytes, where: str, *, host_code: bool = False) -> Any:
        """The engine in `plan`.

        Args:
            plan: its bytes. where: what to call it in messages. host_code: allow code for the host inside the engine,
                which version-compatible engines have.

        Raises:
            BackendError: TensorRT refuses it.
        """
        mark = self.logger.count
        if host_code not in self._runtimes:
            runtime = self.module.Runtime(self.logger)
            if host_code:
                runtime.engine_host_code_allowed = True
            self._runtimes[host_code] = runtime
        if self.flavour.portable and (refused := rtx.refusal(self.module, self._runtimes[host_code], plan)):
            what, fix = refused
            what = what or self.errors(mark) or "no reason given"
            what = f"{where}: {self.flavour.title} {self.version} cannot run the engine here ({what})"
            raise BackendError(what, fix=f"{fix}, or {self.flavour.again}" if fix else self.flavour.again)
        engine = self._runtimes[host_code].deserialize_cuda_engine(plan)
        if engine is None:
            why = self.errors(mark) or "no reason given"
            raise BackendError(
                f"{where}: {self.flavour.title} {self.version} refused the engine ({why}): {self.flavour.again}"
            )
        return engine


def parsed_version(version: str) -> tuple[int, ...]:
    """The numbers of a version, for comparison: "10.3.0.post1" -> (10, 3, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(n) for n in found[0].split(".")) if found else ()


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _logger(module: Any) -> Any:
    """A TensorRT logger that keeps the last of what it is told; TensorRT's own prints."""

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.count = 0
            self.lines: deque[tuple[int, str, str]] = deque(maxlen=_MOST_LINES)
            self.sink: Any = None

        def log(self, severity: Any, msg: str) -> None:
            """What TensorRT calls."""
            if severity.name == "VERBOSE":
                return
            text = " ".join(msg.split())
            self.lines.append((self.count, severity.name, text))
            self.count += 1
            if self.sink is not None:
                self.sink(severity.name, text)

    return Logger()


def _load_problem(path: Path) -> str:
    """Why the library cannot be loaded: TensorRT tells its logger, and there may be none yet."""
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        return reason_of(error, 400)
    return "TensorRT takes it for no plugin library"


def _shortened(text: str, most: int = 400) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."
