"""The CUDA kernels on a real device over ctypes, with nothing but the driver and libhcmen_ops_cuda.so: no PyTorch, so
that a sanitizer sees these kernels alone. Arrays lie in allocations of exactly their size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np

from hcmen.base.cuda_library import CudaLaunch, call, load_cuda_library, workspace_bytes
from helpers import dual_cases as duals
from helpers import op_cases as cases

__all__ = ["NEEDS_GPU", "DeviceKernels"]

# Why a test of PyTorch on a GPU is skipped.
NEEDS_GPU = "PyTorch finds no NVIDIA GPU here: python tests/gpu/run.py on a machine with one"


class _Driver:
    """The first device's memory, in its primary context, which the CUDA runtime uses too."""

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._check("cuInit", 0)
        self._check("cuDeviceGet", ctypes.byref(device), 0)
        self._check("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._check("cuCtxSetCurrent", context)

    def _check(self, name: str, *arguments: Any) -> None:
        status = getattr(self._cuda, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name}: error {status}")

    def allocate(self, size: int) -> int:
        place = ctypes.c_uint64()
        self._check("cuMemAlloc_v2", ctypes.byref(place), ctypes.c_size_t(size))
        return place.value

    def upload(self, place: int, x: np.ndarray) -> None:
        self._check(
            "cuMemcpyHtoD_v2", ctypes.c_uint64(place), ctypes.c_void_p(x.ctypes.data), ctypes.c_size_t(x.nbytes)
        )

    def download(self, place: int, x: np.ndarray) -> None:
        self._check(
            "cuMemcpyDtoH_v2", ctypes.c_void_p(x.ctypes.data), ctypes.c_uint64(place), ctypes.c_size_t(x.nbytes)
        )

    def release(self, place: int) -> None:
        self._check("cuMemFree_v2", ctypes.c_uint64(place))

    def wait(self) -> None:
        self._check("cuCtxSynchronize")


class _OnDevice:
    """Copies of arrays for one call: `inputs` go there, `outputs` come back into the arrays given."""

    def __init__(self, driver: _Driver, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]):
        self.driver, self.outputs = driver, outputs
        self.places: dict[str, int] = {}
        self._allocated: list[int] = []
        for name, x in {**inputs, **outputs}.items():
            # Where an array of the host begins within 16 bytes, its copy does too; it ends where the allocation ends.
            ahead = x.ctypes.data % 16
            self.places[name] = self._allocate(ahead + x.nbytes) + ahead
            driver.upload(self.places[name], np.ascontiguousarray(x))

    def _allocate(self, size: int) -> int:
        self._allocated.append(self.driver.allocate(size))
        return self._allocated[-1]

    def workspace(self, size: int, launch: CudaLaunch) -> None:
        if size:
            # As much as was asked for and not a byte more; NaN, so that nothing is taken for zero.
            self.places["workspace"] = self._allocate(size)
            self.driver.upload(self.places["workspace"], np.full(size // 4, np.nan, np.float32))
            launch.workspace, launch.workspace_bytes = self.places["workspace"], size

    def finish(self) -> None:
        self.driver.wait()
        for name, x in self.outputs.items():
            self.driver.download(self.places[name], x)
        for place in self._allocated:
            self.driver.release(place)


class DeviceKernels:
    """As `helpers.emulated.Kernels`, on the device.

    The hardware's exp2 is off by up to 2^-22 of its value, four times as much as the host's, hence the wider bounds.
    """

    bound, gradient_bound = 3e-6, 1e-5

    def __init__(self) -> None:
        self.library = load_cuda_library()
        self._driver = _Driver()

    def scan(self, case: cases.ScanCase, arrays: cases.Arrays, **wish: int) -> tuple[np.ndarray, np.ndarray]:
        y = np.full(arrays["u"].shape, np.nan, arrays["u"].dtype)
        last = np.full((case.batch, case.channel, case.state), np.nan, np.float32)
        there = _OnDevice(self._driver, arrays, {"y": y, "last_state": last})
        scan = cases.scan_structure(case, there.places, int)
        launch = CudaLaunch(**wish)
        there.workspace(workspace_bytes(self.library, "selective_scan", scan, launch, 0), launch)
        call(self.library, "selective_scan_forward", scan, launch)
        there.finish()
        return y, last

    def scan_gradients(
        self, case: cases.ScanCase, arrays: cases.Arrays, dy: np.ndarray, dlast: np.ndarray | None, **wish: int
    ) -> cases.Arrays:
        got = cases.gradient_arrays(arrays)
        inputs = {**arrays, "dy": dy, **({} if dlast is None else {"dlast_state": dlast})}
        there = _OnDevice(self._driver, inputs, got)
        scan = cases.scan_structure(case, {n: there.places[n] for n in arrays}, int)
        names = [n for n in there.places if n not in arrays]
        grad = cases.scan_gradients_structure({n: there.places[n] for n in names}, int)
        launch = CudaLaunch(**wish)
        there.workspace(workspace_bytes(self.library, "selective_scan", scan, launch, 1), launch)
        call(self.library, "selective_scan_backward", scan, grad, launch)
        there.finish()
        return got

    def conv(self, case: cases.ConvCase, arrays: cases.Arrays) -> tuple[np.ndarray, np.ndarray]:
        outputs = cases.conv_outputs(case, arrays)
        there = _OnDevice(self._driver, arrays, outputs)
        call(self.library, "causal_conv1d_forward", cases.conv_structure(case, there.places, int), CudaLaunch())
        there.finish()
        return outputs["y"], outputs.get("last_state", np.empty(cases.conv_state_shape(case)))

    def conv_gradients(
        self, case: cases.ConvCase, arrays: cases.Arrays, dy: np.ndarray, dlast: np.ndarray | None = None
    ) -> cases.Arrays:
        got = cases.gradient_arrays(arrays)
        inputs = {**arrays, "dy": dy, **({} if dlast is None else {"dlast_state": dlast})}
        there = _OnDevice(self._driver, inputs, got)
        conv = cases.conv_structure(case, {n: there.places[n] for n in arrays}, int)
        names = [n for n in there.places if n not in arrays]
        grad = cases.conv_gradients_structure({n: there.places[n] for n in names}, int)
        launch = CudaLaunch()
        there.workspace(workspace_bytes(self.library, "causal_conv1d", conv, 1), launch)
        call(self.library, "causal_conv1d_backward", conv, grad, launch)
        there.finish()
        return got

    def dual(self, case: duals.DualCase, arrays: cases.Arrays, **wish: int) -> tuple[np.ndarray, np.ndarray]:
        y = np.full(case.series, np.nan, arrays["x"].dtype)
        last = np.full(case.states, np.nan, np.float32)
        there = _OnDevice(self._driver, arrays, {"y": y, "last_state": last})
        dual = duals.dual_structure(case, there.places, int)
        launch = CudaLaunch(**wish)
        there.workspace(workspace_bytes(self.library, "state_space_dual", dual, launch, 0), launch)
        call(self.library, "state_space_dual_forward", dual, launch)
        there.finish()
        return y, last

    def dual_gradients(
        self, case: duals.DualCase, arrays: cases.Arrays, dy: np.ndarray, dlast: np.ndarray | None, **wish: int
    ) -> cases.Arrays:
        got = cases.gradient_arrays(arrays)
        inputs = {**arrays, "dy": dy, **({} if dlast is None else {"dlast_state": dlast})}
        there = _OnDevice(self._driver, inputs, got)
        dual = duals.dual_structure(case, {n: there.places[n] for n in arrays}, int)
        names = [n for n in there.places if n not in arrays]
        grad = duals.dual_gradients_structure({n: there.places[n] for n in names}, int)
        launch = CudaLaunch(**wish)
        there.workspace(workspace_bytes(self.library, "state_space_dual", dual, launch, 1), launch)
        call(self.library, "state_space_dual_backward", dual, grad, launch)
        there.finish()
        return got
