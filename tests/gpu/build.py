"""Builds libhcmen_ops_cuda.so with nvcc and the host compiler, without CMake, and reads what ptxas says of each kernel.

    python tests/gpu/build.py                              for the device of this machine, or sm_90
    python tests/gpu/build.py --architectures all          every architecture from 75 to 120 that nvcc knows
    python tests/gpu/build.py --architectures 87,90 --out build/cuda
    python tests/gpu/build.py --architectures 90 --sass docs/results/cuda_sass.json

Warnings are errors here. Standard library only, so that it runs on a bare machine; --sass needs this package too, for
the plans of the benchmark's cases, and is in sass.py. Objects are kept beside the library
and made again only when a source has changed.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "WANTED",
    "Kernel",
    "architectures_known",
    "build",
    "build_probe",
    "device_architecture",
    "find_nvcc",
    "readable_name",
]

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "runtime" / "csrc"
WANTED = (75, 80, 86, 87, 89, 90, 100, 110, 120)
"""Turing to Blackwell, Orin (87) and Thor (110) among them."""
CUDA_SOURCES = (
    "selective_scan.cu",
    "selective_scan_plan.cu",
    "selective_scan_backward.cu",
    "causal_conv1d.cu",
    "cuda_launch.cu",
)
CUDA_FLAGS = [
    *("-std=c++17", "-O3", "-ftz=true", "-Xptxas=-v"),
    "-Xcompiler=-Wall,-Wextra,-fPIC,-fvisibility=hidden",
]
HOST_FLAGS = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-fPIC", "-fvisibility=hidden"]
STRICT_CUDA, STRICT_HOST = ["-Werror=all-warnings", "-Xcompiler=-Werror"], ["-Werror"]


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel for one architecture. spill_bytes: stores and loads; stack_bytes: a stack frame."""

    name: str
    architecture: int
    registers: int
    spill_bytes: int
    stack_bytes: int


def find_nvcc() -> str | None:
    """nvcc, as CUDACXX or the path name it, or None."""
    return shutil.which(os.environ.get("CUDACXX", "nvcc"))


def architectures_known(nvcc: str) -> list[int]:
    """Those of WANTED that this nvcc compiles for."""
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = {int(number) for number in re.findall(r"compute_(\d+)\b", listing)}
    return [a for a in WANTED if a in known]


def device_architecture() -> int | None:
    """Of the first device, from the driver, or None."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    for number, value in ((75, major), (76, minor)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        if driver.cuDeviceGetAttribute(ctypes.byref(value), number, device) != 0:
            return None
    return 10 * major.value + minor.value


def build(
    folder: Path, architectures: Sequence[int], *, jobs: int = 2, strict: bool = True
) -> tuple[Path, list[Kernel]]:
    """The library for `architectures` in `folder`, and its kernels. strict: warnings are errors, which a compiler that
    nobody tried may have more of.

    Raises:
        RuntimeError: a compiler is missing, or refused; the message has its words.
    """
    nvcc, host = find_nvcc(), shutil.which(os.environ.get("CXX", "c++"))
    if nvcc is None or host is None:
        raise RuntimeError("nvcc and a C++ compiler are needed: put them on the path, or name them in CUDACXX and CXX")
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted(p for p in CSRC.iterdir() if p.suffix in (".h", ".cu", ".cc", ".map"))
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sources) + Path(__file__).read_bytes()).hexdigest()[:16]

    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    # Intermediate code of the newest, so that a later device compiles it instead of finding no kernel image.
    codes.append(f"-gencode=arch=compute_{max(architectures)},code=compute_{max(architectures)}")
    wanted = f"{digest} {','.join(map(str, architectures))} {strict}"
    cuda_flags, host_flags = CUDA_FLAGS + STRICT_CUDA * strict, HOST_FLAGS + STRICT_HOST * strict

    def compile_cuda(name: str) -> tuple[Path, str]:
        target = folder / f"{Path(name).stem}.o"
        log, stamp = target.with_suffix(".log"), target.with_suffix(".stamp")
        if not (target.exists() and stamp.exists() and stamp.read_text() == wanted):
            stamp.unlink(missing_ok=True)
            log.write_text(
                _run([nvcc, *cuda_flags, f"--threads={jobs}", *codes, "-c", str(CSRC / name), "-o", str(target)])
            )
            stamp.write_text(wanted)
        return target, log.read_text()

    with ThreadPoolExecutor(jobs) as pool:
        made = list(pool.map(compile_cuda, CUDA_SOURCES))
    kernels = [kernel for _, log in made for kernel in _kernels(log)]

    target, stamp = folder / "libhcmen_ops_cuda.so", folder / "stamp"
    if not (target.exists() and stamp.exists() and stamp.read_text() == wanted):
        operators = folder / "ort_cuda_ops.o"
        _run([host, *host_flags, "-c", str(CSRC / "ort_cuda_ops.cc"), "-o", str(operators)])
        # By a name in the folder it runs in: nvcc ends what follows -Xlinker at a space or a comma of a path.
        link = ["-Xlinker=--version-script=exports.map", "-Xlinker=--no-undefined", "-Xlinker=-z,nodelete"]
        link += ["-Xcompiler=-static-libstdc++,-static-libgcc", "-cudart=static"]
        objects = [str(path.resolve()) for path in (*(path for path, _ in made), operators)]
        _run([nvcc, "-shared", *link, *objects, "-o", str(target.resolve())], cwd=CSRC)
        stamp.write_text(wanted)
    return target, kernels


def build_probe(folder: Path, architecture: int) -> Path:
    """The program of probe.cu for `architecture`, in `folder`; made again only when a source has changed.

    Raises:
        RuntimeError: as `build`.
    """
    nvcc = find_nvcc()
    source, target, stamp = Path(__file__).with_name("probe.cu"), folder / "probe", folder / "probe.stamp"
    digest = hashlib.sha256(source.read_bytes() + (CSRC / "scan_step.h").read_bytes()).hexdigest()[:16]
    wanted = f"{digest} {architecture}"
    if not (target.exists() and stamp.exists() and stamp.read_text() == wanted):
        if nvcc is None:
            raise RuntimeError("nvcc is needed: put it on the path, or name it in CUDACXX")
        code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        flags = [flag for flag in CUDA_FLAGS if not flag.startswith("-X")]
        _run([nvcc, *flags, code, "-I", str(CSRC), "-cudart=static", str(source), "-o", str(target)])
        stamp.write_text(wanted)
    return target


def _run(command: list[str], cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


_REPORT = re.compile(
    r"Compiling entry function '[^']+' for 'sm_(?P<architecture>\d+)'\s+ptxas info\s+: "
    r"Function properties for (?P<name>\S+)\s+(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\s+ptxas info\s+: Used (?P<registers>\d+) registers"
)


def readable_name(mangled: str) -> str:
    """A kernel's name and template arguments, of _ZN..<length of the name><name>I<template arguments>E.."""
    match = re.search(r"\d+([a-z_]+_kernel)(I.*?E(?=E?v))?", mangled)
    if match is None:
        return mangled
    arguments = re.findall(r"6__half|(?<=I)f|Li\d+|Lb[01]", match[2] or "")
    shown = [
        {"6__half": "half", "f": "float", "Lb0": "false", "Lb1": "true"}.get(a, a.removeprefix("Li")) for a in arguments
    ]
    return match[1] + (f"<{', '.join(shown)}>" if shown else "")


def _kernels(log: str) -> list[Kernel]:
    found = []
    for match in _REPORT.finditer(log):
        found.append(
            Kernel(
                readable_name(match["name"]),
                int(match["architecture"]),
                int(match["registers"]),
                int(match["stores"]) + int(match["loads"]),
                int(match["stack"]),
            )
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--architectures", help="all, or numbers like 87,90; by default that of this machine, or 90")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "cuda")
    parser.add_argument(
        "--sass", type=Path, help="count the instructions of the first architecture's kernels into this"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2)
    options = parser.parse_args(arguments)
    nvcc = find_nvcc()
    if nvcc is None:
        print("there is no nvcc: put it on the path, or name it in CUDACXX", file=sys.stderr)
        return 3
    if options.architectures == "all":
        chosen = architectures_known(nvcc)
    elif options.architectures:
        chosen = [int(a) for a in options.architectures.split(",")]
    else:
        chosen = [device_architecture() or 90]
    try:
        library, kernels = build(options.out, chosen, jobs=options.jobs)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 3
    print(f"{library}: {library.stat().st_size / 2**20:.1f} MiB for sm_{', sm_'.join(map(str, chosen))}\n")
    names = list(dict.fromkeys(k.name for k in kernels))
    print("registers" + " " * 31 + "".join(f"{'sm_' + str(a):>8}" for a in chosen))
    for name in names:
        cells = {k.architecture: k for k in kernels if k.name == name}
        row = [f"{cells[a].registers}{'*' if cells[a].spill_bytes + cells[a].stack_bytes else ''}" for a in chosen]
        print(f"{name:<40}" + "".join(f"{cell:>8}" for cell in row))
    spilled = [k for k in kernels if k.spill_bytes + k.stack_bytes]
    print(f"\n{len(kernels)} kernels, {len(spilled)} with spills or a stack frame (*)")
    if options.sass:
        import sass  # here, since it needs more than a bare machine has

        registers = {k.name: k.registers for k in kernels if k.architecture == chosen[0]}
        try:
            document = sass.report(sass.counts(library, chosen[0]), registers, sass.benchmark_cases(library))
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 3
        options.sass.write_text(json.dumps({"architecture": chosen[0], **document}, indent=1) + "\n")
        print(f"\n{sass.table(document)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
