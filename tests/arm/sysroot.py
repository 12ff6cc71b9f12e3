"""A folder with Debian's Python for 64-bit ARM, for qemu's -L: nothing is installed here, and nobody has to be root."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

# Of the distribution this machine runs, with all that they depend on.
PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6")

_APT = """
Dir::State "{0}/state";
Dir::State::status "{0}/status";
Dir::Cache "{0}/cache";
APT::Architecture "arm64";
APT::Architectures "arm64";
APT::Sandbox::User "";
APT::Install-Recommends "false";
Acquire::Languages "none";
"""

# qemu 7 shows a process the x86 /proc/cpuinfo of its host, in which the library `cpuinfo` inside ONNX Runtime's wheel
# for aarch64 finds no processor it knows, and the import ends in a read of address 0. With -L, files below the folder
# are seen first: these are the lines of a Raspberry Pi 4.
_CPUINFO = """processor\t: {}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3

"""


class Unavailable(Exception):
    """It cannot be had here, and why."""


def make_sysroot(target: Path) -> Path:
    """The Python in `target`, unpacked there unless a complete one is there already. Raises Unavailable."""
    done = target / "complete"
    if not done.exists():
        for program in ("apt-get", "dpkg-deb"):
            if not shutil.which(program):
                raise Unavailable(f"{program} is not on the path: the packages of Debian or Ubuntu are needed")
        shutil.rmtree(target, ignore_errors=True)
        apt = target.with_name(f"{target.name}_apt")
        for folder in (target, apt / "state/lists/partial", apt / "cache/archives/partial"):
            folder.mkdir(parents=True, exist_ok=True)
        (apt / "status").touch()
        (apt / "apt.conf").write_text(_APT.format(apt))
        environment = {**os.environ, "APT_CONFIG": str(apt / "apt.conf")}
        for command in (["update"], ["install", "--download-only", "--yes", *PACKAGES]):
            result = subprocess.run(
                ["apt-get", *command], capture_output=True, text=True, env=environment, timeout=600, check=False
            )
            if result.returncode != 0:
                raise Unavailable(f"apt-get {command[0]} for arm64: {result.stderr.strip()[-500:]}")
        for package in sorted((apt / "cache/archives").glob("*.deb")):
            subprocess.run(["dpkg-deb", "--extract", package, target], check=True, timeout=120)
        cores = len(os.sched_getaffinity(0))
        (target / "proc").mkdir()
        (target / "proc/cpuinfo").write_text("".join(_CPUINFO.format(i) for i in range(cores)))
        done.touch()
    found = sorted((target / "usr/bin").glob("python3.*[0-9]"))
    if not found:
        raise Unavailable(f"{target} has no Python: delete it, and it is made again")
    return found[0]
