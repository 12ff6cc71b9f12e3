"""PTX of the kernels of trt_aot.cu, by NVRTC or nvcc, for the GPU at hand."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hcmen.base.errors import BackendError, InputError, shown
from hcmen.base.trust import check_nobody_else_writes

__all__ = [
    "Kernel",
    "Nvcc",
    "Nvrtc",
    "PtxCompiler",
    "checked_architecture",
    "driver_version",
    "ptx_compiler",
    "sources",
]


@dataclass(frozen=True)
class Kernel:
    """One kernel of trt_aot.cu.

    name: its entry point. macros: what it is compiled for. rows: blocks for each batch element, for a convolution
    threads for each run of `STEPS` outputs.
    """

    name: str
    macros: tuple[tuple[str, int | str], ...]
    rows: int

    @property
    def options(self) -> tuple[str, ...]:
        """The macros as options of a compiler."""
        return tuple(f"-D{name}={value}" for name, value in self.macros)


class PtxCompiler(Protocol):
    """What turns trt_aot.cu into PTX.

    where: the file that does it. version: of its CUDA. architectures: the compute capabilities it knows, 87 for 8.7.
    """

    where: str
    version: tuple[int, int]
    architectures: tuple[int, ...]

    def ptx(self, kernel: Kernel, architecture: int) -> str:
        """The kernel for that compute capability and later ones; raises BackendError."""
        ...


def sources() -> tuple[Path, Path]:
    """trt_aot.cu, and the header with the arithmetic that it includes.

    Raises:
        BackendError: they are not where this package was installed.
    """
    kernel = Path(__file__).with_name("trt_aot.cu")
    # The folder `runtime` lies beside this room in an installed package, and beside `hcmen` in a checkout.
    headers = [folder / "runtime" / "csrc" / "scan_step.h" for folder in Path(__file__).parents[1:3]]
    for header in headers:
        if kernel.is_file() and header.is_file():
            return kernel, header
    raise BackendError(f"{kernel} or {headers[0]} is missing: install hcmen again, or use --plugin library")


class Nvrtc:
    """NVIDIA's run-time compiler, a library that works without a GPU.

    Args:
        path: its file; None looks for pip's nvidia-cuda-nvrtc, the dynamic loader's, and CUDA's usual folder.

    Raises:
        BackendError: there is none.
    """

    def __init__(self, path: str | None = None):
        for candidate in [path] if path else _nvrtc_candidates():
            try:
                # It looks for its other half by name alone, which finds what is loaded already.
                beside = Path(candidate).parent.glob("libnvrtc-builtins.so.*") if os.sep in candidate else ()
                for builtins in beside:
                    ctypes.CDLL(str(builtins))
                self._library = ctypes.CDLL(candidate)
                self._version = self._library.nvrtcVersion
            except (OSError, AttributeError):
                continue
            self.where = candidate
            break
        else:
            raise BackendError(f"{path or 'libnvrtc'} cannot be loaded: pip install nvidia-cuda-nvrtc")
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        known = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", known)
        self.architectures = tuple(known)

    def ptx(self, kernel: Kernel, architecture: int) -> str:
        """As `PtxCompiler` says."""
        source, header = (path.read_bytes() for path in sources())
        program = ctypes.c_void_p()
        names = (ctypes.c_char_p * 1)(b"scan_step.h")
        headers = (ctypes.c_char_p * 1)(header)
        self._call("nvrtcCreateProgram", ctypes.byref(program), source, b"trt_aot.cu", 1, headers, names)
        try:
            given = (f"--gpu-architecture=compute_{architecture}", "--std=c++17", *kernel.options)
            options = (ctypes.c_char_p * len(given))(*(option.encode() for option in given))
            if self._library.nvrtcCompileProgram(program, len(given), options) != 0:
                log = self._text(program, "ProgramLog").strip().splitlines()
                error = next((line for line in log if "error" in line), log[0] if log else "no log")
                raise BackendError(f"NVRTC {_dotted(self.version)} cannot compile {kernel.name}: {error}")
            return self._text(program, "PTX")
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _text(self, program: ctypes.c_void_p, what: str) -> str:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, text)
        return text.value.decode()

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            reason = self._library.nvrtcGetErrorString(status).decode()
            raise BackendError(f"{name} failed with {reason} ({self.where}): install another CUDA")


def _nvrtc_candidates() -> Iterator[str]:
    """Where NVRTC may be, the newest of each place first."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(root) for root in (spec.submodule_search_locations or [] if spec else [])]
    wheels = [path for root in folders for path in (*root.glob("cu[0-9]*/lib"), *root.glob("cuda_nvrtc/lib"))]
    for folder in (*wheels, _toolkit() / "lib64"):
        # Not the builtins, nor pip's alternative build.
        found = [path for path in folder.glob("libnvrtc.so.*") if re.fullmatch(r"libnvrtc\.so\.\d+", path.name)]
        yield from map(str, sorted(found, key=lambda path: int(path.suffix[1:]), reverse=True))
    yield from ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


def _toolkit() -> Path:
    """The folder of the CUDA toolkit; what CUDA_HOME names is as safe as a library that a variable names."""
    named = os.environ.get("CUDA_HOME")
    if not named:
        return Path("/usr/local/cuda")
    if not os.path.isabs(named):
        raise InputError(f"CUDA_HOME is {shown(named)}", "an absolute path")
    folder = Path(named)
    for library in folder.glob("lib64/libnvrtc*.so*"):
        check_nobody_else_writes(library, "CUDA_HOME")
    return folder


class Nvcc:
    """nvcc on PATH.

    Raises:
        BackendError: there is none, or it does not work.
    """

    def __init__(self) -> None:
        found = shutil.which("nvcc")
        if found is None:
            raise BackendError("nvcc is not on PATH: install the CUDA toolkit, or pip install nvidia-cuda-nvrtc")
        self.where = found
        match = re.search(r"release (\d+)\.(\d+)", self._run("--version"))
        if match is None:
            raise BackendError(f"{found} does not tell its version: install the CUDA toolkit again")
        self.version = (int(match[1]), int(match[2]))
        listed = re.findall(r"compute_(\d+)\b", self._run("--list-gpu-arch"))
        self.architectures = tuple(sorted(int(number) for number in listed))

    def ptx(self, kernel: Kernel, architecture: int) -> str:
        """As `PtxCompiler` says."""
        source, header = sources()
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "kernel.ptx"
            target_option = f"-arch=compute_{architecture}"
            self._run(
                *("--ptx", "--std=c++17", target_option, f"-I{header.parent}", *kernel.options),
                *(str(source), "-o", str(target)),
            )
            return target.read_text()

    def _run(self, *arguments: str) -> str:
        done = subprocess.run([self.where, *arguments], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            error = next((line for line in lines if "error" in line), lines[0])
            raise BackendError(f"{self.where} failed: {error}")
        return done.stdout


def ptx_compiler() -> PtxCompiler:
    """NVRTC, else nvcc: the same compiler in two forms."""
    try:
        return Nvrtc()
    except BackendError as error:
        try:
            return Nvcc()
        except BackendError:
            raise error from None


def driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver here serves; None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0 or version.value == 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def checked_architecture(compiler: PtxCompiler, sm: int, driver: tuple[int, int] | None) -> int:
    """The compute capability to compile for: the GPU's own, or the newest before it that the compiler knows."""
    if driver is not None and compiler.version > driver:
        raise BackendError(
            f"{compiler.where} is of CUDA {_dotted(compiler.version)}, but the driver reads PTX up to CUDA "
            f"{_dotted(driver)}: pip install 'nvidia-cuda-nvrtc=={_dotted(driver)}.*', or use --plugin library"
        )
    older = [known for known in compiler.architectures if known <= sm]
    if not older:
        raise BackendError(
            f"{compiler.where} compiles for compute capability {min(compiler.architectures) / 10:.1f} and later, "
            f"this GPU has {sm / 10:.1f}: use an older CUDA"
        )
    return max(older)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
