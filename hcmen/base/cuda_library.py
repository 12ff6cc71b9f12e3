"""Finds and loads `libhcmen_ops_cuda.so`, the CUDA kernels: for ONNX Runtime (as a path) and for PyTorch (ctypes).

The library is built only when asked for, with CMake's HCMEN_CUDA=ON and nvcc; see docs/cuda.md. It carries the CUDA
runtime inside and loads on a machine without a GPU, where its functions report what CUDA says. The environment variable
HCMEN_CUDA_LIBRARY names another file, by an absolute path on whose way nobody but its user and root may write.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hcmen.base.errors import BackendError, InputError
from hcmen.base.library import (
    ConvArguments,
    ConvGradients,
    DualArguments,
    DualGradients,
    ScanArguments,
    ScanGradients,
    library_folders,
)
from hcmen.base.trust import library_from_environment

__all__ = [
    "BACKWARD_STATES",
    "FORWARD_STATES",
    "CudaLaunch",
    "CudaPlan",
    "call",
    "cuda_library_path",
    "declare",
    "device_problem",
    "load_cuda_library",
    "workspace_bytes",
]

LIBRARY_NAME = "libhcmen_ops_cuda.so"
LIBRARY_VERSION = 4
"""HCMEN_CUDA_OPS_VERSION of runtime/csrc/cuda_ops.h."""
FORWARD_STATES, BACKWARD_STATES = 512, 256
"""The most states of a channel, forward and backward."""
VARIABLE = "HCMEN_CUDA_LIBRARY"
"""What a user sets to another library; whoever set it is told where it leads to none."""
_FIX = "build it with `pip install --config-settings=cmake.define.HCMEN_CUDA=ON .` in a checkout, with nvcc on the path"

_i32, _i64, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_CUDA_FAILED, _TOO_LARGE = 16, 18


class CudaLaunch(ctypes.Structure):
    """`hcmen_cuda_launch` of runtime/csrc/cuda_ops.h."""

    _fields_ = [
        ("stream", _pointer),
        ("workspace", _pointer),
        ("workspace_bytes", _i64),
        ("steps_per_chunk", _i64),
        ("lanes_per_channel", _i32),
        ("time_warps", _i32),
        ("channel_warps", _i32),
        ("steps_per_warp", _i32),
        ("sequences_at_once", _i64),
    ]


class CudaPlan(ctypes.Structure):
    """`hcmen_cuda_plan` of runtime/csrc/cuda_ops.h."""

    _fields_ = [
        *((name, _i64) for name in ("steps_per_chunk", "chunks", "blocks")),
        *((name, _i32) for name in ("lanes_per_channel", "states_per_lane", "time_warps", "channel_warps")),
        *((name, _i32) for name in ("steps_per_warp", "shared_bytes")),
    ]


_scan, _conv, _launch = (ctypes.POINTER(s) for s in (ScanArguments, ConvArguments, CudaLaunch))
_scan_grad, _conv_grad = (ctypes.POINTER(s) for s in (ScanGradients, ConvGradients))
_dual, _dual_grad = (ctypes.POINTER(s) for s in (DualArguments, DualGradients))
_bytes = ctypes.POINTER(_i64)
_FUNCTIONS: dict[str, tuple[Sequence[Any], Any]] = {
    "hcmen_cuda_selective_scan_workspace": ((_scan, _launch, ctypes.c_int, _bytes), ctypes.c_int),
    "hcmen_cuda_selective_scan_forward": ((_scan, _launch), ctypes.c_int),
    "hcmen_cuda_selective_scan_backward": ((_scan, _scan_grad, _launch), ctypes.c_int),
    "hcmen_cuda_selective_scan_plan": ((_scan, _launch, ctypes.POINTER(CudaPlan)), ctypes.c_int),
    "hcmen_cuda_causal_conv1d_workspace": ((_conv, ctypes.c_int, _bytes), ctypes.c_int),
    "hcmen_cuda_causal_conv1d_forward": ((_conv, _launch), ctypes.c_int),
    "hcmen_cuda_causal_conv1d_backward": ((_conv, _conv_grad, _launch), ctypes.c_int),
    "hcmen_cuda_state_space_dual_workspace": ((_dual, _launch, ctypes.c_int, _bytes), ctypes.c_int),
    "hcmen_cuda_state_space_dual_forward": ((_dual, _launch), ctypes.c_int),
    "hcmen_cuda_state_space_dual_backward": ((_dual, _dual_grad, _launch), ctypes.c_int),
    "hcmen_cuda_state_space_dual_plan": ((_dual, _launch, ctypes.POINTER(CudaPlan)), ctypes.c_int),
    "hcmen_cuda_ops_version": ((), ctypes.c_int),
    "hcmen_cuda_warm": ((), ctypes.c_int),
    "hcmen_cuda_problem": ((), ctypes.c_char_p),
    "hcmen_cuda_fix": ((), ctypes.c_char_p),
    "hcmen_cuda_nothing": ((_launch,), ctypes.c_int),
}


def cuda_library_path() -> Path:
    """The absolute path of the shared library.

    Raises:
        BackendError: it is in none of the places searched; the message lists them.
        InputError, CorruptFileError: HCMEN_CUDA_LIBRARY names it in a way that is not safe.
    """
    named = library_from_environment(VARIABLE, _FIX)
    if named is not None:
        return named
    places = [folder / LIBRARY_NAME for folder in library_folders()]
    for place in places:
        if place.is_file():
            return place.resolve()
    tried = ", ".join(str(p.parent) for p in places)
    raise BackendError(f"{LIBRARY_NAME} was not found in {tried}: {_FIX}")


def declare(library: ctypes.CDLL, name: str = LIBRARY_NAME) -> ctypes.CDLL:
    """`library` with the signatures of its C functions.

    Raises:
        BackendError: one is missing, or it is of another version; the message calls it `name`.
    """
    for function_name, (arguments, result) in _FUNCTIONS.items():
        try:
            function = getattr(library, function_name)
        except AttributeError:
            raise BackendError(f"{name} has no {function_name}: it is from another version, build it again") from None
        function.argtypes = arguments
        function.restype = result
    version = library.hcmen_cuda_ops_version()
    if version != LIBRARY_VERSION:
        raise BackendError(f"{name} has version {version}, expected {LIBRARY_VERSION}: build it again")
    return library


@functools.cache
def load_cuda_library() -> ctypes.CDLL:
    """The library with its signatures declared, and its kernels on the current device if there is one.

    Raises:
        BackendError: it is missing, cannot be loaded, or is of another version of this package.
    """
    path = cuda_library_path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendError(f"{path} cannot be loaded ({error}): build it on this machine") from error
    declare(library, str(path))
    # Else every kernel's first launch waits for it. Where there is no device this fails, and so will the first call,
    # which has words for it.
    library.hcmen_cuda_warm()
    return library


def workspace_bytes(library: ctypes.CDLL, name: str, *structures: Any) -> int:
    """What `hcmen_cuda_<name>_workspace` asks for; `structures` are its arguments before the result.

    Raises:
        InputError: the function refused its arguments.
    """
    size = _i64()
    _raise(library, f"{name}_workspace", *structures, size)
    return size.value


def call(library: ctypes.CDLL, name: str, *structures: ctypes.Structure) -> None:
    """`hcmen_cuda_<name>` over `structures`.

    Raises:
        InputError: it refused its arguments.
        BackendError: CUDA failed; the message has its words.
    """
    _raise(library, name, *structures)


_SIZES = ("batch", "time", "channel", "head", "head_dim", "state", "width", "group")


def _raise(library: ctypes.CDLL, name: str, *arguments: Any) -> None:
    given = [ctypes.byref(a) if isinstance(a, (ctypes.Structure, _i64)) else a for a in arguments]
    status = getattr(library, f"hcmen_cuda_{name}")(*given)
    if status == 0:
        return
    problem, fix = (getattr(library, f"hcmen_cuda_{part}")().decode(errors="replace") for part in ("problem", "fix"))
    if status == _CUDA_FAILED:
        raise BackendError(f"hcmen_cuda_{name}: CUDA failed: {problem}", fix=fix)
    first = arguments[0] if arguments else None
    sizes = ", ".join(f"{size} {getattr(first, size)}" for size in _SIZES if hasattr(first, size)) or "its arguments"
    if status == _TOO_LARGE:
        raise InputError(f"hcmen_cuda_{name}: {sizes} make {problem}", fix=fix)
    raise InputError(
        f"hcmen_cuda_{name} refused {sizes} (status {status})",
        "sizes of at least 1 that fit each other and what is wished, "
        f"at most {FORWARD_STATES} states forward and {BACKWARD_STATES} backward, 2^28 channels (of all heads less "
        "than 2^25) and 2^31 - 1 steps",
    )


def device_problem(load: Callable[[str], Any] = ctypes.CDLL) -> str | None:
    """Why no CUDA device can be used here, or None if one can: asked of the driver, without any package.

    Args:
        load: opens a shared library, for tests.
    """
    try:
        driver = load("libcuda.so.1")
    except OSError:
        return "there is no CUDA driver (libcuda.so.1)"
    status = driver.cuInit(0)
    if status != 0:
        return f"the CUDA driver does not start (error {status}, 100 means no device)"
    count = ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value < 1:
        return "the CUDA driver sees no device"
    return None
