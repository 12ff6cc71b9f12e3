"""The doctor's rows of CUDA: what is absent is told, what is there is tried, what is broken fails with a fix."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import emulated

import hcmen.base.cuda_library as cuda_library
import hcmen.runtime.backends.ort_cuda as ort_cuda
import hcmen.runtime.commands.doctor as doctor
from hcmen.base.selfcheck import selective_scan_numpy
from hcmen.runtime.backends.cuda_device import Device, describe_devices, devices
from hcmen.runtime.commands.doctor_rows import Row


class Driver:
    """libcuda.so.1 of a machine with two devices."""

    def cuInit(self, flags: int) -> int:
        return 0

    def _put(self, place: Any, kind: Any, value: int) -> int:
        ctypes.cast(place, ctypes.POINTER(kind))[0] = value
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = f"Device {device.value}".encode()
        return 0

    def __getattr__(self, name: str) -> Any:
        values = {
            "cuDriverGetVersion": (ctypes.c_int, lambda: 12060),
            "cuDeviceGetCount": (ctypes.c_int, lambda: 2),
            "cuDeviceGet": (ctypes.c_int, lambda number: number + 5),
            "cuDeviceTotalMem_v2": (ctypes.c_size_t, lambda device: 8 << 30),
            "cuDeviceGetAttribute": (ctypes.c_int, lambda attribute, device: {75: 8, 76: 7}[attribute]),
        }
        kind, value = values[name]
        return lambda place, *arguments: self._put(place, kind, value(*arguments))


def test_devices_are_read_from_the_driver():
    found = devices(lambda name: Driver())
    assert found == [Device(f"Device {n}", 87, 8 << 30, "12.6") for n in (5, 6)]
    line = describe_devices(lambda name: Driver())
    assert line == "Device 5 (sm_87, 8 GiB), Device 6 (sm_87, 8 GiB), driver for CUDA 12.6"

    def missing(name: str) -> Any:
        raise OSError(name)

    assert devices(missing) == []
    assert describe_devices(missing) == "none"


def rows() -> dict[str, Row]:
    return {r.name: r for r in doctor._cuda()}


def pretend(monkeypatch: pytest.MonkeyPatch, *, device: bool, provider: bool, library: Path | None) -> None:
    monkeypatch.setattr(cuda_library, "device_problem", lambda: None if device else "there is no CUDA driver")
    monkeypatch.setattr(doctor, "_has_cuda_provider", lambda: provider)
    cuda_library.load_cuda_library.cache_clear()
    if library is None:
        monkeypatch.delenv("HCMEN_CUDA_LIBRARY", raising=False)
        monkeypatch.setattr(cuda_library, "LIBRARY_NAME", "libnone.so")
    else:
        monkeypatch.setenv("HCMEN_CUDA_LIBRARY", str(library))


def test_a_machine_without_any_of_it_is_sound(monkeypatch):
    pretend(monkeypatch, device=False, provider=False, library=None)
    found = rows()
    assert [r.status for r in found.values()] == ["info", "info", "info", "skipped"]
    assert found["cuda device"].detail == "there is no CUDA driver"
    assert "HCMEN_CUDA=ON" in found["cuda kernels"].detail
    assert found["SelectiveScan, cuda"].detail == "needs a device and the provider and the kernels"


def test_a_library_that_does_not_load_fails(monkeypatch, tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    pretend(monkeypatch, device=False, provider=True, library=broken)
    found = rows()
    assert found["cuda kernels"].status == "FAILED"
    assert found["cuda kernels"].fix
    assert found["SelectiveScan, cuda"].detail == "needs a device"


def test_a_library_that_was_named_and_is_not_there_fails(monkeypatch, tmp_path):
    pretend(monkeypatch, device=False, provider=False, library=tmp_path / "none.so")
    row = rows()["cuda kernels"]
    assert row.status == "FAILED"
    assert row.detail.startswith(f"HCMEN_CUDA_LIBRARY is '{tmp_path / 'none.so'}', expected a file")
    assert row.fix.endswith("or correct or unset HCMEN_CUDA_LIBRARY")
    monkeypatch.setenv("HCMEN_CUDA_LIBRARY", "")  # as good as not set
    monkeypatch.setattr(cuda_library, "LIBRARY_NAME", "libnone.so")
    assert rows()["cuda kernels"].status == "info"


@pytest.mark.parametrize("unsafe", ["relative", "written by others"])
def test_a_library_that_may_not_be_trusted_fails(monkeypatch, tmp_path, unsafe):
    library = tmp_path / "library.so"
    library.write_bytes(b"")
    library.chmod(0o666)
    monkeypatch.chdir(tmp_path)
    pretend(monkeypatch, device=True, provider=True, library=Path("library.so") if unsafe == "relative" else library)
    found = rows()
    assert found["cuda kernels"].status == "FAILED"
    assert ("expected an absolute path" if unsafe == "relative" else "chmod go-w") in found["cuda kernels"].detail
    assert found["SelectiveScan, cuda"].detail == "needs the kernels"


@pytest.mark.skipif(emulated.compiler() is None, reason="there is no C++ compiler")
@pytest.mark.parametrize(
    ("error", "detail", "fix"),
    [
        (0, "version 4, ", ""),
        (209, "the device is sm_86, the library has code for 75, 90, 120", "build the library for 86: docs/cuda.md"),
        (35, "the driver serves CUDA 12.2, the library was built with 13.0", "update the driver, or build the library"),
    ],
)
def test_a_library_that_does_not_serve_the_device_fails(monkeypatch, error, detail, fix):
    path = emulated.operators_library()
    pretend(monkeypatch, device=True, provider=False, library=path)
    with emulated.troubled(emulated.load(path), error, 12020):
        row = rows()["cuda kernels"]
    assert row.status == ("FAILED" if error else "ok")
    assert detail in row.detail
    assert str(row.fix or "").startswith(fix)


@pytest.mark.parametrize("error", [0.0, 1e-3])
def test_the_kernel_is_run_and_its_numbers_compared(monkeypatch, tmp_path, error):
    """Over a backend that answers in NumPy: what is looked at is the comparison."""
    library = tmp_path / "library.so"
    library.write_bytes(b"")

    class Session:
        def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
            y, last = selective_scan_numpy(**inputs, delta_softplus=True)
            return {"y": (y + error).astype(np.float32), "last_state": last.astype(np.float32)}

    class Backend:
        def __init__(self, threads: int):
            pass

        def session(self, *arguments: Any) -> Session:
            return Session()

    pretend(monkeypatch, device=True, provider=True, library=library)
    monkeypatch.setattr(ort_cuda, "OrtCudaBackend", Backend)
    row = rows()["SelectiveScan, cuda"]
    assert row.status == ("FAILED" if error else "ok")
    assert ("expected 1e-06 or less" if error else "largest error") in row.detail
