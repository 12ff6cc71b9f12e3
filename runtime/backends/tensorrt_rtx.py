"""What TensorRT for RTX has and TensorRT has not, over its Python module.

An engine of it holds its kernels half compiled. Those that a size needs are compiled on the GPU when an execution
context first runs it. A runtime cache keeps them from one process to the next (hcmen/runtime/backends/kept_code.py).
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hcmen.base.errors import BackendError
from hcmen.base.typed import as_typed
from hcmen.runtime.backends.kept_code import KeptCode
from hcmen.runtime.backends.options import TensorRTRTX

__all__ = ["Jit", "capabilities_of", "check_library", "refusal", "set_targets"]

_LIBRARY = "libtensorrt_rtx.so.1"
_TURING = 75
_VERSION_PARTS = ("Major", "Minor", "Patch", "Build")

# What `Runtime.get_engine_validity` names -> what it means, and what helps: None to compile the engine again, nothing
# to ask the doctor. The first of several is the likeliest cause of the others.
_REFUSALS: Mapping[str, tuple[str, str | None]] = {
    "CUDA_ERROR": ("the NVIDIA driver or CUDA does not work", ""),
    "OLD_CUDA_DRIVER": ("the NVIDIA driver is too old for it", "update the driver"),
    "OLD_CUDA_RUNTIME": ("its CUDA is too old for it", "upgrade it"),
    "INSUFFICIENT_GPU_MEMORY": ("the GPU has too little memory for it", "close what else uses the GPU"),
    "UNSUPPORTED_CC": ("it was made for other GPUs", None),
    "VERSION_MISMATCH": ("it was made by another version", None),
    "MALFORMED_ENGINE": ("it is no engine of this version", None),
}


def check_library(module: Any) -> None:
    """Holds that the library behind the module is of the module's own version, since two versions may crash.

    Raises:
        BackendError: it is of another one.
    """
    found = library_version()
    if found != module.__version__:
        raise BackendError(
            f"{module.__name__} is {module.__version__} and its library is {found or 'unknown'}",
            "the same version of both",
            f"pip install tensorrt-rtx-cu13-libs=={module.__version__}",
        )


def library_version() -> str | None:
    """The version of the library that was loaded with the module, as it tells it; None where it tells none."""
    try:
        library = ctypes.CDLL(_LIBRARY, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        return ".".join(str(getattr(library, f"getInferLib{part}Version")()) for part in _VERSION_PARTS)
    except (OSError, AttributeError):
        return None


def capabilities_of(module: Any) -> tuple[int, ...]:
    """The compute capabilities of the GPUs that the module can build these graphs for, rising, 89 for 8.9.

    Turing, 75, is left out: TensorRT-RTX has no float32 products there, and graphs of either precision have some.
    """
    names = module.ComputeCapability.__members__
    known = (int(name[2:]) for name in names if re.fullmatch(r"SM\d+", name))
    return tuple(sorted(sm for sm in known if sm > _TURING))


def set_targets(module: Any, config: Any, capabilities: Sequence[int]) -> None:
    """Makes a builder's configuration one for GPUs of these compute capabilities, each one of `capabilities_of`."""
    config.num_compute_capabilities = len(capabilities)
    for i, n in enumerate(capabilities):
        config.set_compute_capability(module.ComputeCapability.__members__[f"SM{n}"], i)


def refusal(module: Any, runtime: Any, plan: memoryview | bytes) -> tuple[str, str | None] | None:
    """Why `runtime` cannot run the engine in `plan` on this machine, and what helps; None if it can.

    The first is empty where the log alone says why. The second is None where it helps to compile the engine again.
    """
    validity, found = runtime.get_engine_validity(plan)
    if validity != module.EngineValidity.INVALID:
        return None
    bits = module.EngineInvalidityDiagnostics.__members__
    named = [_REFUSALS[name] for name in _REFUSALS if name in bits and int(found) & int(bits[name])]
    fix = named[0][1] if named else ""  # nothing is named without a driver
    return " and ".join(what for what, _ in named), f"see {as_typed('hcmen-doctor')}" if fix == "" else fix


class Jit:
    """How the kernels of one engine are compiled on the GPU, for all its execution contexts.

    Args:
        module: of TensorRT for RTX. options: of the backend. kept: where compiled kernels are kept; tried now, for
            which CUDA must be in use in this thread.
        engine: as deserialised, and called `where` in messages.

    Raises:
        BackendError: there is no configuration to be had.
    """

    def __init__(self, module: Any, options: TensorRTRTX, kept: KeptCode, where: str, engine: Any):
        self._config = engine.create_runtime_config()
        if self._config is None:
            raise BackendError("no runtime configuration", fix="see whether the GPU has memory left", where=where)
        self._engine, self._kept = engine, kept
        graphs = module.CudaGraphStrategy
        self._config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if options.cuda_graph else graphs.DISABLED
        strategies = module.DynamicShapesKernelSpecializationStrategy.__members__
        self._config.dynamic_shapes_kernel_specialization_strategy = strategies[options.specialization.upper()]
        # Memory for the profile that is run: in MOSI's sizes 72 MB for a clip and 1,027 MB for 32.
        strategy = module.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        self._config.set_execution_context_allocation_strategy(strategy)
        self._cache = self._config.create_runtime_cache()
        if self._cache is None or not self._config.set_runtime_cache(self._cache):
            self._cache = None
            return
        content = kept.read()
        if content and not self._cache.deserialize(content):
            kept.begin_anew("of another environment, or damaged")

    def context(self) -> Any:
        """An execution context; None where there is none to be had."""
        return self._engine.create_execution_context(self._config)

    def save(self) -> None:
        """Keeps what was compiled, if it is more than what is kept already."""
        content = None if self._cache is None else self._cache.serialize()
        if content is not None:
            self._kept.write(bytes(memoryview(content).cast("B")))
