"""How many physical cores this process may use, which is how many threads a session gets by default.

Hyperthreads of one core share its vector units, so a second thread there gains nothing in a matrix product; the CPU
affinity (taskset, cpusets, Slurm, `docker --cpuset-cpus`) leaves some cores out; and a quota (systemd's CPUQuota,
`docker --cpus`, Kubernetes limits) stops the threads that are too many for the rest of each period, all at once.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

__all__ = ["count_cores", "physical_cores"]


@functools.cache
def physical_cores() -> int:
    """How many physical cores this process may use: its CPU affinity and its cgroup's quota are respected."""
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return count_cores(affinity)


def count_cores(allowed: Iterable[int], root: Path = Path("/")) -> int:
    """The same for the logical CPUs `allowed` and for what `root`'s sys and proc tell; at least 1."""
    cores = set()
    for cpu in allowed:
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        try:
            cores.add(((topology / "physical_package_id").read_text(), (topology / "core_id").read_text()))
        except OSError:
            cores.add((str(cpu), ""))
    return max(1, min([len(cores), *_quotas(root)]))


def _quotas(root: Path) -> Iterator[int]:
    """The CPUs, rounded up, that each cgroup which this process is in may use, for those that have a quota."""
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        memberships = []
    mounts = root / "sys/fs/cgroup"
    v1, v2 = "/", "/"
    for line in memberships:  # "4:cpu,cpuacct:/docker/1f2e" in version 1, "0::/system.slice/x.service" in version 2
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "cpu" in controllers.split(","):
            v1 = path
        elif number == "0" and not controllers:
            v2 = path
    for folder in _upwards(mounts, v2):
        yield from _quota(_words(folder / "cpu.max"))
    for name in ("cpu", "cpu,cpuacct"):
        for folder in _upwards(mounts / name, v1):
            yield from _quota([*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")])


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """The cgroup's folder and those above it. The path may be one that only the host has: the mount counts."""
    parts = [p for p in PurePosixPath(path).parts if p not in ("/", "..")]
    for length in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:length])


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except (OSError, ValueError):
        return []


def _quota(words: list[str]) -> Iterator[int]:
    """From [quota, period] in microseconds; there is none if the quota is "max" or -1."""
    try:
        quota, period = (int(word) for word in words)
    except ValueError:
        return
    if quota > 0 and period > 0:
        yield -(-quota // period)
