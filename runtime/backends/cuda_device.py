"""Asks the CUDA driver what devices there are, over ctypes and without any package."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Device", "describe_devices", "devices"]

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


@dataclass(frozen=True)
class Device:
    """A CUDA device. architecture: 90 for compute capability 9.0. driver: the CUDA version of the driver, as 13.0."""

    name: str
    architecture: int
    memory_bytes: int
    driver: str


def devices(load: Callable[[str], Any] = ctypes.CDLL) -> list[Device]:
    """All devices; none if the driver is missing or does not start.

    Args:
        load: opens a shared library, for tests.
    """
    try:
        driver = load("libcuda.so.1")
    except OSError:
        return []
    version, count = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    driver.cuDriverGetVersion(ctypes.byref(version))
    found = []
    for number in range(count.value):
        device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
        major, minor = ctypes.c_int(), ctypes.c_int()
        if driver.cuDeviceGet(ctypes.byref(device), number) != 0:
            continue
        driver.cuDeviceGetName(name, len(name), device)
        driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
        found.append(
            Device(
                name.value.decode(errors="replace"),
                10 * major.value + minor.value,
                memory.value,
                f"{version.value // 1000}.{version.value % 1000 // 10}",
            )
        )
    return found


def describe_devices(load: Callable[[str], Any] = ctypes.CDLL) -> str:
    """One line: every device with its architecture and memory, and the driver's CUDA version."""
    found = devices(load)
    names = ", ".join(f"{d.name} (sm_{d.architecture}, {d.memory_bytes / 2**30:.0f} GiB)" for d in found)
    return f"{names}, driver for CUDA {found[0].driver}" if found else "none"
