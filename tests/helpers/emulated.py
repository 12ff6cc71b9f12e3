"""Builds the CUDA sources for the host, where tests/emulation runs their kernels, and calls them over NumPy arrays."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hcmen.base.cuda_library import CudaLaunch, declare, workspace_bytes
from helpers import dual_cases as duals
from helpers import op_cases as cases

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "runtime" / "csrc"
EMULATION = ROOT / "tests" / "emulation"
KERNELS = [
    CSRC / name
    for name in (
        "selective_scan.cu",
        "selective_scan_plan.cu",
        "selective_scan_backward.cu",
        "causal_conv1d.cu",
        "state_space_dual.cu",
        "state_space_dual_plan.cu",
        "state_space_dual_backward.cu",
        "cuda_launch.cu",
    )
]


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "c++"))


def build(target: Path, flags: Sequence[str], sources: Sequence[Path]) -> subprocess.CompletedProcess[str]:
    """Compiles `sources` for the host, over the emulation."""
    common = ["-std=c++17", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fno-strict-aliasing"]
    include = ["-DHCMEN_EMULATE", "-I", str(EMULATION), "-I", str(CSRC)]
    command = [str(compiler()), *common, *flags, *include, "-x", "c++", *map(str, sources), "-o", str(target)]
    return subprocess.run(command, capture_output=True, text=True)


def kept(name: str, flags: Sequence[str], sources: Sequence[Path] = ()) -> Path:
    """A shared library `name` of the kernels and `sources`, which is built once for as long as no source changes."""
    everything = sorted([*CSRC.iterdir(), *EMULATION.iterdir()])
    key = hashlib.sha256("\0".join([name, *flags, *map(str, sources)]).encode())
    for path in everything:
        key.update(path.read_bytes())
    folder = ROOT / "build" / "emulated" / key.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / name
    with open(folder / "lock", "w") as lock:  # against other workers of this test run
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            made = build(folder / "new.so", ["-O1", "-shared", "-fPIC", *flags], [*KERNELS, *sources])
            assert made.returncode == 0, made.stderr
            (folder / "new.so").rename(target)
    return target


def kernels_library() -> ctypes.CDLL:
    """The kernels alone."""
    return load(kept("libemulated.so", [], [EMULATION / "control.cc"]))


def operators_library(*flags: str) -> Path:
    """libhcmen_ops_cuda.so over the emulated kernels."""
    options = ["-fvisibility=hidden", "-Wl,-z,nodelete", *flags]
    return kept("libhcmen_ops_cuda.so", options, [CSRC / "ort_cuda_ops.cc", EMULATION / "control.cc"])


def load(path: Path) -> ctypes.CDLL:
    """The emulated library, with the order of its threads to choose."""
    library = declare(ctypes.CDLL(str(path)), str(path))
    library.emulation_set_order.argtypes = [ctypes.c_int]
    library.emulation_launches.restype = ctypes.c_uint64
    return library


@contextlib.contextmanager
def troubled(library: ctypes.CDLL, error: int = 0, driver: int = 13000, *, recording: bool = False) -> Iterator[None]:
    """Within the block CUDA fails with `error`, the driver serves `driver`, or a stream is being recorded.

    No kernel is loaded when it begins, nor when it ends; then all is well again.
    """
    library.emulation_set(error, driver, int(recording))
    try:
        yield
    finally:
        library.emulation_set(0, 13000, 0)


class Kernels:
    """The C functions over NumPy arrays. Workspaces are full of NaN and exactly as large as asked for.

    bound, gradient_bound: how far from float64 results may be, of their largest value.
    """

    bound, gradient_bound = 1e-6, 3e-6

    def __init__(self, library: ctypes.CDLL):
        self.library = library

    def _workspace(self, size: int, launch: CudaLaunch) -> np.ndarray:
        assert size % 4 == 0
        # Aligned to 16 bytes, as the interface asks; NumPy's own memory is.
        memory = np.full(size // 4, np.nan, np.float32)
        assert memory.ctypes.data % 16 == 0
        launch.workspace, launch.workspace_bytes = memory.ctypes.data if size else None, size
        return memory

    def scan(self, case: cases.ScanCase, arrays: cases.Arrays, **wish: int) -> tuple[np.ndarray, np.ndarray]:
        y = np.full(arrays["u"].shape, np.nan, arrays["u"].dtype)
        last = np.full((case.batch, case.channel, case.state), np.nan, np.float32)
        scan = cases.scan_structure(case, {**arrays, "y": y, "last_state": last}, cases.address)
        launch = CudaLaunch(**wish)
        memory = self._workspace(workspace_bytes(self.library, "selective_scan", scan, launch, 0), launch)
        assert self.library.hcmen_cuda_selective_scan_forward(*cases.by_reference(scan, launch)) == 0
        del memory
        return y, last

    def scan_gradients(
        self, case: cases.ScanCase, arrays: cases.Arrays, dy: np.ndarray, dlast: np.ndarray | None, **wish: int
    ) -> cases.Arrays:
        got = cases.gradient_arrays(arrays)
        inputs: dict[str, Any] = {"dy": dy, **({} if dlast is None else {"dlast_state": dlast})}
        scan = cases.scan_structure(case, arrays, cases.address)
        grad = cases.scan_gradients_structure({**got, **inputs}, cases.address)
        launch = CudaLaunch(**wish)
        memory = self._workspace(workspace_bytes(self.library, "selective_scan", scan, launch, 1), launch)
        assert self.library.hcmen_cuda_selective_scan_backward(*cases.by_reference(scan, grad, launch)) == 0
        del memory
        return got

    def conv(self, case: cases.ConvCase, arrays: cases.Arrays) -> tuple[np.ndarray, np.ndarray]:
        outputs = cases.conv_outputs(case, arrays)
        conv = cases.conv_structure(case, {**arrays, **outputs}, cases.address)
        assert workspace_bytes(self.library, "causal_conv1d", conv, 0) == 0
        assert self.library.hcmen_cuda_causal_conv1d_forward(*cases.by_reference(conv, CudaLaunch())) == 0
        return outputs["y"], outputs.get("last_state", np.empty(cases.conv_state_shape(case)))

    def conv_gradients(
        self, case: cases.ConvCase, arrays: cases.Arrays, dy: np.ndarray, dlast: np.ndarray | None = None
    ) -> cases.Arrays:
        got = cases.gradient_arrays(arrays)
        inputs: dict[str, Any] = {"dy": dy, **({} if dlast is None else {"dlast_state": dlast})}
        conv = cases.conv_structure(case, arrays, cases.address)
        grad = cases.conv_gradients_structure({**got, **inputs}, cases.address)
        launch = CudaLaunch()
        memory = self._workspace(workspace_bytes(self.library, "causal_conv1d", conv, 1), launch)
        assert self.library.hcmen_cuda_causal_conv1d_backward(*cases.by_reference(conv, grad, launch)) == 0
        del memory
        return got

    def dual(self, case: duals.DualCase, arrays: cases.Arrays, **wish: int) -> tuple[np.ndarray, np.ndarray]:
        y = np.full(case.series, np.nan, arrays["x"].dtype)
        last = np.full(case.states, np.nan, np.float32)
        dual = duals.dual_structure(case, {**arrays, "y": y, "last_state": last}, cases.address)
        launch = CudaLaunch(**wish)
        memory = self._workspace(workspace_bytes(self.library, "state_space_dual", dual, launch, 0), launch)
        assert self.library.hcmen_cuda_state_space_dual_forward(*cases.by_reference(dual, launch)) == 0
        del memory
        return y, last

    def dual_gradients(
        self, case: duals.DualCase, arrays: cases.Arrays, dy: np.ndarray, dlast: np.ndarray | None, **wish: int
    ) -> cases.Arrays:
        got = cases.gradient_arrays(arrays)
        inputs: dict[str, Any] = {"dy": dy, **({} if dlast is None else {"dlast_state": dlast})}
        dual = duals.dual_structure(case, arrays, cases.address)
        grad = duals.dual_gradients_structure({**got, **inputs}, cases.address)
        launch = CudaLaunch(**wish)
        memory = self._workspace(workspace_bytes(self.library, "state_space_dual", dual, launch, 1), launch)
        assert self.library.hcmen_cuda_state_space_dual_backward(*cases.by_reference(dual, grad, launch)) == 0
        del memory
        return got
