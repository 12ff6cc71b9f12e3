"""The few calls of the CUDA runtime that an engine needs, through ctypes on the libcudart that is on the device.

Neither PyTorch nor a Python package of CUDA's is needed: a Jetson's libcudart is its own (pip's is for servers), and
every CUDA installation brings one. Only functions whose signature is the same in CUDA 11.4 to 13 are called;
tests/runtime/test_cuda.py holds `SIGNATURES` against the header of the toolkit, where there is one.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hcmen.base.errors import BackendError, HcmenError
from hcmen.base.typed import as_typed

__all__ = ["Buffer", "Cuda", "Graph", "Stream", "driver_and_gpu", "find_driver"]

_int, _uint, _size, _pointer = ctypes.c_int, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p
_out = ctypes.POINTER

SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cudaDriverGetVersion": (_out(_int),),
    "cudaRuntimeGetVersion": (_out(_int),),
    "cudaGetDeviceCount": (_out(_int),),
    "cudaDeviceGetAttribute": (_out(_int), _int, _int),
    "cudaSetDevice": (_int,),
    "cudaGetLastError": (),
    "cudaMemGetInfo": (_out(_size), _out(_size)),
    "cudaMalloc": (_out(_pointer), _size),
    "cudaFree": (_pointer,),
    "cudaHostAlloc": (_out(_pointer), _size, _uint),
    "cudaFreeHost": (_pointer,),
    "cudaMemcpyAsync": (_pointer, _pointer, _size, _int, _pointer),
    "cudaStreamCreateWithFlags": (_out(_pointer), _uint),
    "cudaStreamSynchronize": (_pointer,),
    "cudaStreamDestroy": (_pointer,),
    "cudaStreamBeginCapture": (_pointer, _int),
    "cudaStreamEndCapture": (_pointer, _out(_pointer)),
    "cudaGraphInstantiateWithFlags": (_out(_pointer), _pointer, ctypes.c_ulonglong),
    "cudaGraphLaunch": (_pointer, _pointer),
    "cudaGraphExecDestroy": (_pointer,),
    "cudaGraphDestroy": (_pointer,),
}
"""Function -> argument types; all return a cudaError_t. cudaGetErrorName and cudaGetErrorString return text."""

# Enumerators of driver_types.h; their values are part of CUDA's binary interface.
_ERROR_MEMORY = 2
_NO_DEVICE = {35: "the driver is missing or older than this CUDA runtime", 100: "no CUDA device is there"}
_ATTRIBUTE_MAJOR, _ATTRIBUTE_MINOR = 75, 76
_STREAM_NON_BLOCKING = 1
_CAPTURE_THREAD_LOCAL = 1
_TO_DEVICE, _TO_HOST = 1, 2

_NAMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so")


class Cuda:
    """The CUDA runtime and its first visible device.

    sm: compute capability, 87 for 8.7. runtime, driver: CUDA versions such as "12.6"; the driver's is the newest CUDA
    that it serves. path: the libcudart that was loaded.

    Raises:
        BackendError: no libcudart, no driver, or no device.
    """

    def __init__(self) -> None:
        problems: list[str] = []
        for path, library in _libraries():
            problem = _unusable(library)
            if problem is None:
                self.path, self._library = path, library
                break
            problems.append(f"{path}: {problem}")
        else:
            raise BackendError(
                f"{problems[0]}: install the NVIDIA driver, or run on a machine with a GPU"
                if problems
                else "libcudart was not found: install the CUDA runtime (pip install nvidia-cuda-runtime-cu12; "
                "a Jetson has it in /usr/local/cuda)"
            )
        self.runtime = _version(self._integer("cudaRuntimeGetVersion"))
        self.driver = _version(self._integer("cudaDriverGetVersion"))
        major, minor = (self._integer("cudaDeviceGetAttribute", a, 0) for a in (_ATTRIBUTE_MAJOR, _ATTRIBUTE_MINOR))
        self.sm = 10 * major + minor

    def call(self, name: str, *arguments: Any) -> None:
        """Calls the function `name`; raises BackendError when it does not return success."""
        code = getattr(self._library, name)(*arguments)
        if code == 0:
            return
        # The error would otherwise be told again by the next call that looks for one.
        self._library.cudaGetLastError()
        if code == _ERROR_MEMORY:
            raise BackendError(f"{name}: the GPU has no memory left ({self._memory()}): close what else uses it")
        text = (self._library.cudaGetErrorString(code) or b"unknown").decode(errors="replace")
        error = (self._library.cudaGetErrorName(code) or b"?").decode(errors="replace")
        raise BackendError(f"{name} failed with {error} ({text}): see {as_typed('hcmen-doctor')}")

    def identity(self) -> dict[str, str | int]:
        """What tells this GPU under this driver from others: both their names, and what CUDA says of them."""
        driver, gpu = driver_and_gpu() or ("unknown", "unknown")
        return {"gpu": gpu, "sm": self.sm, "driver": f"{driver}, CUDA {self.driver}"}

    def free_bytes(self) -> tuple[int, int]:
        """(free, all) bytes of the device's memory."""
        free, total = _size(), _size()
        self.call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def _integer(self, name: str, *arguments: int) -> int:
        value = _int()
        self.call(name, ctypes.byref(value), *arguments)
        return value.value

    def _memory(self) -> str:
        try:
            free, total = self.free_bytes()
        except HcmenError:
            return "how much it has is unknown"
        return f"{free / 2**20:.0f} of {total / 2**20:.0f} MiB free"


class Buffer:
    """A tensor's memory on the device, and page-locked memory of the same size on the host, which copies fastest.

    device: the address on the device. host: the host memory as bytes.
    """

    def __init__(self, cuda: Cuda, bytes_: int):
        self.bytes = max(bytes_, 1)
        self._cuda = cuda
        device, host = _pointer(), _pointer()
        cuda.call("cudaMalloc", ctypes.byref(device), self.bytes)
        self.device = int(device.value or 0)
        self._release = [weakref.finalize(self, _ignore_errors, cuda, "cudaFree", self.device)]
        cuda.call("cudaHostAlloc", ctypes.byref(host), self.bytes, 0)
        address = int(host.value or 0)
        self._release.append(weakref.finalize(self, _ignore_errors, cuda, "cudaFreeHost", address))
        self.host: NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_uint8 * self.bytes).from_address(address))
        self._address = address

    def upload(self, bytes_: int, stream: Stream) -> None:
        """Queues the copy of the first bytes to the device."""
        self._cuda.call("cudaMemcpyAsync", self.device, self._address, bytes_, _TO_DEVICE, stream.handle)

    def download(self, bytes_: int, stream: Stream) -> None:
        """Queues the copy of the first bytes to the host."""
        self._cuda.call("cudaMemcpyAsync", self._address, self.device, bytes_, _TO_HOST, stream.handle)

    def close(self) -> None:
        """Gives the memory back; nothing may use it any more."""
        self.host = np.empty(0, np.uint8)
        for release in self._release:
            release()


class Stream:
    """A CUDA stream that does not wait for the default one. handle: its address, as TensorRT takes it."""

    def __init__(self, cuda: Cuda):
        self._cuda = cuda
        handle = _pointer()
        cuda.call("cudaStreamCreateWithFlags", ctypes.byref(handle), _STREAM_NON_BLOCKING)
        self.handle = int(handle.value or 0)
        self._release = weakref.finalize(self, _ignore_errors, cuda, "cudaStreamDestroy", self.handle)

    def wait(self) -> None:
        """Waits until all that was queued is done; raises BackendError when something of it failed."""
        self._cuda.call("cudaStreamSynchronize", self.handle)

    def close(self) -> None:
        """Destroys the stream."""
        self._release()


class Graph:
    """What was queued on a stream within `with Graph(...) as graph`, as one launch.

    Raises:
        BackendError: at the end of the block, if something queued cannot be part of a graph.
    """

    def __init__(self, cuda: Cuda, stream: Stream):
        self._cuda, self._stream = cuda, stream
        self._release: weakref.finalize[Any, Any] | None = None
        self._handle = 0

    def __enter__(self) -> Graph:
        # Thread-local: what other threads do with CUDA meanwhile does not break the capture.
        self._cuda.call("cudaStreamBeginCapture", self._stream.handle, _CAPTURE_THREAD_LOCAL)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        graph, executable = _pointer(), _pointer()
        try:
            self._cuda.call("cudaStreamEndCapture", self._stream.handle, ctypes.byref(graph))
        except BackendError:
            if error is None:
                raise
            return
        try:
            if error is None:
                self._cuda.call("cudaGraphInstantiateWithFlags", ctypes.byref(executable), graph, 0)
        finally:
            if graph.value:
                _ignore_errors(self._cuda, "cudaGraphDestroy", graph.value)
        if executable.value:
            self._handle = int(executable.value)
            self._release = weakref.finalize(self, _ignore_errors, self._cuda, "cudaGraphExecDestroy", self._handle)

    def launch(self) -> None:
        """Queues all of it on the stream."""
        self._cuda.call("cudaGraphLaunch", self._handle, self._stream.handle)

    def close(self) -> None:
        """Destroys the graph."""
        if self._release is not None:
            self._release()


def find_driver() -> str | None:
    """The version of the NVIDIA driver and the name of the first GPU, on one line; None where there is no driver."""
    found = driver_and_gpu()
    return None if found is None else ", ".join(found)


def driver_and_gpu() -> tuple[str, str] | None:
    """(version of the NVIDIA driver, name of the first GPU, or why it has none); None where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    try:
        found = re.search(r"Module\D*([\d.]+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    version = found[1] if found else "of unknown version"
    name, device = ctypes.create_string_buffer(256), _int()
    for function, arguments in (
        ("cuInit", (0,)),
        ("cuDeviceGet", (ctypes.byref(device), 0)),
        ("cuDeviceGetName", (name, len(name), device)),
    ):
        code = getattr(driver, function)(*arguments)
        if code:
            return version, f"{function} gave error {code}"
    return version, name.value.decode(errors="replace")


def _libraries() -> Iterator[tuple[str, Any]]:
    """(where it was found, the library) of every libcudart, the system's before pip's."""
    places = [*_NAMES, *(str(folder / name) for folder in _folders() for name in _NAMES)]
    for place in places:
        try:
            library = ctypes.CDLL(place)
            for name, arguments in SIGNATURES.items():
                function = getattr(library, name)
                function.argtypes, function.restype = arguments, _int
            for name in ("cudaGetErrorName", "cudaGetErrorString"):
                function = getattr(library, name)
                function.argtypes, function.restype = (_int,), ctypes.c_char_p
        except (OSError, AttributeError):
            continue
        yield place, library


def _folders() -> Iterator[Path]:
    yield from (Path(p) for p in ("/usr/local/cuda/lib64", "/usr/local/cuda/lib"))
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        yield from sorted(Path(root).glob("c*/lib"), reverse=True)  # cu13/lib, cuda_runtime/lib


def _unusable(library: Any) -> str | None:
    """Why no device can be used through `library`; None if one can."""
    count = _int()
    code = library.cudaGetDeviceCount(ctypes.byref(count))
    if code == 0 and count.value > 0:
        return None
    library.cudaGetLastError()
    if code in (0, *_NO_DEVICE):
        return _NO_DEVICE.get(code, _NO_DEVICE[100])
    return str((library.cudaGetErrorString(code) or b"unknown error").decode(errors="replace"))


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _ignore_errors(cuda: Cuda, name: str, *arguments: Any) -> None:
    """A call whose failure nobody can mend: giving something back, perhaps when the driver is already gone."""
    with contextlib.suppress(HcmenError):
        cuda.call(name, *arguments)
