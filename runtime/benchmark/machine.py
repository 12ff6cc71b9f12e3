"""What a figure depends on besides the code: the machine, its state, the environment, versions.

Everything is read from /proc, /sys and package metadata; what a system does not tell is None. Nothing is imported that
is not imported already, so that PyTorch can be named without being loaded.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hcmen.base.errors import HcmenError

__all__ = ["CpuTime", "free_memory_mib", "machine", "machine_warnings", "same_machine", "versions", "waited_ns"]

_PACKAGES = ("hcmen", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13-bindings", "numpy")
_VECTORS = ("sse2", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_fp16", "asimd", "asimddp", "sve")
_ENVIRONMENT = ("OMP_", "HCMEN_", "MKL_", "OPENBLAS_", "KMP_", "GOMP_", "ORT_", "MALLOC_", "LD_PRELOAD", "CUDA_VISIBLE")
_CPU = Path("/sys/devices/system/cpu")
_HOT = 85.0  # degrees Celsius; boards begin to lower their clocks at 85 to 95
_BUSY = 0.25  # load per core above which something else is running


def machine(packages: Sequence[str] = ()) -> dict[str, Any]:
    """The machine as it is now.

    Args:
        packages: whose versions to give besides those the runtime uses.
    """
    from hcmen.runtime.backends.ort import physical_cores

    return {
        "cpu": _cpu(),
        "architecture": platform.machine(),
        "vector_extensions": _vector_extensions(),
        "logical_cores": os.cpu_count(),
        "usable_cores": _usable_cores(),
        "physical_cores": physical_cores(),
        "quota_cores": _quota(),
        "governor": _text(_CPU / "cpu0/cpufreq/scaling_governor"),
        "mhz": _mhz(),
        "max_mhz": _thousandth(_text(_CPU / "cpu0/cpufreq/cpuinfo_max_freq")),
        "hottest_celsius": _hottest(),
        "on_battery": _on_battery(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        **_memory(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "kernels_isa": _isa(),
        "versions": versions((*_PACKAGES, *packages)),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_ENVIRONMENT)},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def machine_warnings(found: Mapping[str, Any], threads: int) -> list[str]:
    """What about the machine makes figures doubtful, one line each.

    Args:
        found: from `machine`. threads: the most that a row uses.
    """
    lines = []
    cores = found["usable_cores"] or 1
    load = found["load_average_1min"]
    if load > _BUSY * cores:
        lines.append(f"the load average is {load:g} on {cores} cores: something else is running")
    if found["governor"] not in (None, "performance"):
        lines.append(
            f"the CPU governor is '{found['governor']}', not 'performance': the clock follows the load "
            "(cpupower frequency-set -g performance)"
        )
    if found["quota_cores"] is not None and found["quota_cores"] < threads:
        lines.append(
            f"this container may use {found['quota_cores']:g} cores and a row has {threads} threads: it is throttled"
        )
    if threads > cores:
        lines.append(f"a row has {threads} threads and this process may use {cores} cores: threads wait for each other")
    if found["on_battery"]:
        lines.append("the machine runs on its battery, where clocks are often lowered")
    if found["hottest_celsius"] is not None and found["hottest_celsius"] >= _HOT:
        lines.append(f"a sensor shows {found['hottest_celsius']:.0f} degrees Celsius: clocks may be lowered")
    return lines


def same_machine(new: Mapping[str, Any], old: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(what makes two machines two, what differs besides): one phrase each, "cpu A, was B"."""
    other = [
        f"{key.replace('_', ' ')} {new.get(key)}, was {old.get(key)}"
        for key in ("cpu", "architecture", "logical_cores", "usable_cores", "quota_cores", "governor")
        if new.get(key) != old.get(key)
    ]
    besides = [
        f"{key.replace('_', ' ')} {new.get(key)}, was {old.get(key)}"
        for key in ("system", "python", "kernels_isa")
        if new.get(key) != old.get(key)
    ]
    for what in ("versions", "environment"):
        a, b = new.get(what) or {}, old.get(what) or {}
        besides += [f"{k} {a.get(k, 'none')}, was {b.get(k, 'none')}" for k in sorted({*a, *b}) if a.get(k) != b.get(k)]
    return other, besides


@dataclass(frozen=True)
class CpuTime:
    """CPU seconds since the start of the machine: of all cores, of those the busy ones, stolen by a host, and ours."""

    total: float
    busy: float
    stolen: float
    own: float

    @classmethod
    def now(cls) -> CpuTime | None:
        """The counters as they are; None where the system has none. Children count once they have been waited for."""
        try:
            fields = Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, idle, wait, irq, softirq, steal = (int(f) / os.sysconf("SC_CLK_TCK") for f in fields)
        busy = user + nice + system + irq + softirq
        own = sum(os.times()[:4])
        return cls(busy + idle + wait + steal, busy, steal, own)

    def since(self, start: CpuTime) -> dict[str, float]:
        """The share of all CPU time since `start` that other processes took, and that the host took away."""
        total = max(self.total - start.total, 1e-9)
        others = (self.busy - start.busy) - (self.own - start.own)
        return {
            "others_share": round(min(1.0, max(0.0, others / total)), 3),
            "stolen_share": round((self.stolen - start.stolen) / total, 3),
        }


def waited_ns(pid: int | None = None) -> dict[str, int]:
    """How long each thread of a process, by default this one, has been ready to run with no core free for it.

    Thread id -> nanoseconds since it began, from the scheduler's own accounts; empty where the system keeps none. What
    the host of a virtual machine takes away is not in it.
    """
    found = {}
    folder = f"/proc/{pid or 'self'}/task"
    try:
        for task in os.listdir(folder):
            with open(f"{folder}/{task}/schedstat", "rb") as file:
                found[task] = int(file.read().split()[1])
    except (OSError, IndexError, ValueError):  # a thread that ended meanwhile, or a kernel without accounts
        return {}
    return found


def free_memory_mib() -> int | None:
    """Memory that can be had without swapping, in MiB; None where the system does not tell."""
    return _memory()["memory_available_mib"]


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Package -> version, of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip() or None
    except OSError:
        return None


def _cpu() -> str:
    lines = (_text(Path("/proc/cpuinfo")) or "").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    board = (_text(Path("/proc/device-tree/model")) or "").strip("\0")
    return (names[0] if names else None) or board or platform.processor() or platform.machine()


def _vector_extensions() -> list[str]:
    words = set((_text(Path("/proc/cpuinfo")) or "").split())
    return [v for v in _VECTORS if v in words]


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quota() -> float | None:
    """Cores that the control group lets this process use; None without a limit."""
    try:
        quota, period = (_text(Path("/sys/fs/cgroup/cpu.max")) or "").split()
        return None if quota == "max" else int(quota) / int(period)
    except ValueError:
        pass
    old = Path("/sys/fs/cgroup/cpu")  # version 1 of control groups
    try:
        quota_us = int(_text(old / "cpu.cfs_quota_us") or "")
        return quota_us / int(_text(old / "cpu.cfs_period_us") or "") if quota_us > 0 else None
    except (ValueError, ZeroDivisionError):
        return None


def _thousandth(text: str | None) -> int | None:
    try:
        return round(int(text or "") / 1000)
    except ValueError:
        return None


def _mhz() -> int | None:
    """The clock of the first core now, as the driver or, without one, /proc/cpuinfo says."""
    found = _thousandth(_text(_CPU / "cpu0/cpufreq/scaling_cur_freq"))
    if found is None:
        for line in (_text(Path("/proc/cpuinfo")) or "").splitlines():
            if line.startswith("cpu MHz"):
                return round(float(line.partition(":")[2]))
    return found


def _hottest() -> float | None:
    try:
        values = [_thousandth(_text(p)) for p in Path("/sys/class/thermal").glob("thermal_zone*/temp")]
    except OSError:
        return None
    sane = [float(v) for v in values if v is not None and 0 < v < 150]
    return max(sane) if sane else None


def _on_battery() -> bool | None:
    try:
        states = [_text(p) for p in Path("/sys/class/power_supply").glob("BAT*/status")]
    except OSError:
        return None
    return "Discharging" in states if states else None


def _memory() -> dict[str, int | None]:
    """Memory of the machine and what of it is free for use, in MiB."""
    sizes: dict[str, int] = {}
    for line in (_text(Path("/proc/meminfo")) or "").splitlines():
        key, _, value = line.partition(":")
        if value.endswith(" kB"):
            sizes[key] = int(value.split()[0]) // 1024
    return {"memory_mib": sizes.get("MemTotal"), "memory_available_mib": sizes.get("MemAvailable")}


def _isa() -> str | None:
    from hcmen.base.library import library_isa

    try:
        return library_isa()
    except HcmenError:
        return None
