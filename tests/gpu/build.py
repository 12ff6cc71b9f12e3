"""Builds libhcmen_ops_cuda.so with nvcc and the host compiler, without CMake, and reads what ptxas says of each kernel.

    python tests/gpu/build.py                              for the device of this machine, or sm_90
    python tests/gpu/build.py --architectures all          every architecture from 75 to 120 that nvcc knows
    python tests/gpu/build.py --architectures 87,90 --out build/cuda
    python tests/gpu/build.py --architectures 90 --sass docs/results/cuda_sass.json

Warnings are errors here, and so is local memory: a kernel that spills registers or has a stack frame. Exit codes: 1 for
these, 2 for a wrong argument, 3 for a missing tool, 5 for code that --sass cannot read. Standard library only, so that
it runs on a bare machine; --sass needs this package too, for the plans of the benchmark's cases, and is in sass.py and
scan_bounds.py. Objects are kept beside the library and made again only when a source has changed. A library that is
there, of the same sources, is taken without nvcc, also one that was brought here or is for more architectures.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "TOOL_FOLDERS",
    "WANTED",
    "BuildError",
    "Kernel",
    "architectures_known",
    "build",
    "build_probe",
    "device_architecture",
    "find_nvcc",
    "readable_name",
    "refuse_local_memory",
]

ROOT = Path(__file__).resolve().parents[2]
TOOL_FOLDERS = ("/usr/local/nvidia/bin", "/usr/local/cuda/bin")
"""Where images of GPU machines keep tools that are not on the path."""
CSRC = ROOT / "runtime" / "csrc"
WANTED = (75, 80, 86, 87, 89, 90, 100, 110, 120)
"""Turing to Blackwell, Orin (87) and Thor (110) among them."""
CUDA_SOURCES = (
    "selective_scan.cu",
    "selective_scan_plan.cu",
    "selective_scan_backward.cu",
    "causal_conv1d.cu",
    "state_space_dual.cu",
    "state_space_dual_plan.cu",
    "state_space_dual_backward.cu",
    "cuda_launch.cu",
)
CUDA_FLAGS = [
    *("-std=c++17", "-O3", "-ftz=true", "-Xptxas=-v"),
    "-Xcompiler=-Wall,-Wextra,-fPIC,-fvisibility=hidden",
]
HOST_FLAGS = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-fPIC", "-fvisibility=hidden"]
STRICT_CUDA, STRICT_HOST = ["-Werror=all-warnings", "-Xcompiler=-Werror"], ["-Werror"]


class BuildError(RuntimeError):
    """Why there is no library, in words, and the exit code for it."""

    def __init__(self, code: int, words: str):
        super().__init__(words)
        self.code = code


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel for one architecture. spill_bytes: stores and loads; stack_bytes: a stack frame."""

    name: str
    architecture: int
    registers: int
    spill_bytes: int
    stack_bytes: int

    @property
    def in_local_memory(self) -> bool:
        return bool(self.spill_bytes or self.stack_bytes)


def find_nvcc() -> str | None:
    """nvcc, as CUDACXX or the path name it, or None."""
    return shutil.which(os.environ.get("CUDACXX", "nvcc"))


def architectures_known(nvcc: str) -> list[int]:
    """Those that this nvcc compiles for."""
    try:
        listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    except OSError:
        listing = ""
    known = sorted({int(number) for number in re.findall(r"compute_(\d+)\b", listing)})
    if not known:
        raise BuildError(3, f"{nvcc} names no architecture that it compiles for: put nvcc 11.1 or later on the path")
    return known


def device_architecture() -> int | None:
    """Of the first device, from the driver, or from nvidia-smi where the driver's library is not on the loader's path;
    None without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return _architecture_by_smi()
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    for number, value in ((75, major), (76, minor)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        if driver.cuDeviceGetAttribute(ctypes.byref(value), number, device) != 0:
            return None
    return 10 * major.value + minor.value


def _architecture_by_smi() -> int | None:
    smi = shutil.which("nvidia-smi", path=os.pathsep.join([os.environ.get("PATH", ""), *TOOL_FOLDERS]))
    if smi is None:
        return None
    try:
        query = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, errors="replace", timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"(\d+)\.(\d)$", answer.partition("\n")[0].strip())
    return 10 * int(found[1]) + int(found[2]) if found else None


def build(
    folder: Path, architectures: Sequence[int], *, jobs: int = 2, strict: bool = True
) -> tuple[Path, list[Kernel]]:
    """The library for `architectures` in `folder`, and its kernels as far as their logs are kept. One that is there, of
    the same sources, for these architectures at least and as strict, is taken. strict: warnings are errors, which a
    compiler that nobody tried may have more of, and no kernel may use local memory.

    Raises:
        BuildError: a compiler is missing or refused, a kernel uses local memory, or the folder cannot be written.
    """
    target, wanted = folder / "libhcmen_ops_cuda.so", _Made(_digest(CSRC.iterdir()), frozenset(architectures), strict)
    if not wanted.by(target):
        nvcc, host = find_nvcc(), shutil.which(os.environ.get("CXX", "c++"))
        if nvcc is None or host is None:
            raise BuildError(
                3, "nvcc and a C++ compiler are needed: put them on the path, or name them in CUDACXX, CXX"
            )
        known = architectures_known(nvcc)
        for a in sorted(wanted.architectures.difference(known)):
            names = ", ".join(map(str, known))
            if a in WANTED:
                raise BuildError(3, f"{nvcc} does not compile for {a}, only for {names}: name another one in CUDACXX")
            raise BuildError(2, f"architecture {a} is not known: expected one of {names}")
        with _alone_in(folder):
            if not wanted.by(target):
                _build(target, wanted, nvcc, host, jobs)
    logs = [folder / f"{Path(name).stem}.log" for name in CUDA_SOURCES]
    if not all(log.exists() and wanted.by(log.with_suffix(".o")) for log in logs):
        return target, []  # brought here without them
    return target, [k for log in logs for k in _kernels(log.read_text()) if k.architecture in wanted.architectures]


def _build(target: Path, wanted: _Made, nvcc: str, host: str, jobs: int) -> None:
    newest = max(wanted.architectures)
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in sorted(wanted.architectures)]
    # Intermediate code of the newest, so that a later device compiles it instead of finding no kernel image.
    codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    cuda_flags, host_flags = CUDA_FLAGS + STRICT_CUDA * wanted.strict, HOST_FLAGS + STRICT_HOST * wanted.strict

    def compile_cuda(name: str) -> tuple[Path, str]:
        made = target.with_name(f"{Path(name).stem}.o")
        log = made.with_suffix(".log")
        if not (log.exists() and wanted.by(made)):
            command = [nvcc, *cuda_flags, f"--threads={jobs}", *codes, "-c", str(CSRC / name), "-o", str(made)]
            with wanted.stamping(made):
                log.write_text(_run(command))
        return made, log.read_text()

    with ThreadPoolExecutor(jobs) as pool:
        made = list(pool.map(compile_cuda, CUDA_SOURCES))
    if wanted.strict:
        refuse_local_memory(k for _, log in made for k in _kernels(log) if k.architecture in wanted.architectures)
    operators = target.with_name("ort_cuda_ops.o")
    # By a name in the folder it runs in: nvcc ends what follows -Xlinker at a space or a comma of a path.
    link = ["-Xlinker=--version-script=exports.map", "-Xlinker=--no-undefined", "-Xlinker=-z,nodelete"]
    link += ["-Xcompiler=-static-libstdc++,-static-libgcc", "-cudart=static"]
    objects = [str(path.resolve()) for path in (*(path for path, _ in made), operators)]
    with wanted.stamping(target):
        _run([host, *host_flags, "-c", str(CSRC / "ort_cuda_ops.cc"), "-o", str(operators)])
        _run([nvcc, "-shared", *link, *objects, "-o", str(target.resolve())], cwd=CSRC)


def build_probe(folder: Path, architecture: int) -> Path:
    """The program of probe.cu for `architecture`, in `folder`; made again only when a source has changed.

    Raises:
        BuildError: as `build`.
    """
    source, target = Path(__file__).with_name("probe.cu"), folder / "probe"
    wanted = _Made(_digest([source, CSRC / "scan_step.h"]), frozenset([architecture]), False)
    if not wanted.by(target):
        nvcc = find_nvcc()
        if nvcc is None:
            raise BuildError(3, "nvcc is needed: put it on the path, or name it in CUDACXX")
        code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        flags = [flag for flag in CUDA_FLAGS if not flag.startswith("-X")]
        with _alone_in(folder), wanted.stamping(target):
            _run([nvcc, *flags, code, "-I", str(CSRC), "-cudart=static", str(source), "-o", str(target)])
    return target


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """While no other build writes there: of two the second takes what the first has made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise BuildError(2, f"{folder} cannot be written ({error.strerror}): name another folder") from None


def refuse_local_memory(kernels: Iterable[Kernel]) -> None:
    """Raises:
    BuildError: one spills registers or has a stack frame; the line names every such kernel.
    """
    found = [
        f"{k.name} on sm_{k.architecture} ({k.spill_bytes} bytes spilled, {k.stack_bytes} of stack)"
        for k in kernels
        if k.in_local_memory
    ]
    if found:
        raise BuildError(1, f"no kernel may use local memory: {'; '.join(found)}")


def _digest(sources: Iterable[Path]) -> str:
    """Of what is compiled, and of this file, which has the flags."""
    chosen = sorted(p for p in sources if p.suffix in (".h", ".cu", ".cc", ".map"))
    return hashlib.sha256(b"".join(p.read_bytes() for p in [*chosen, Path(__file__)])).hexdigest()[:16]


@dataclass(frozen=True)
class _Made:
    """What a file is made of and for. Its stamp, a file beside it, has this and the digest of the file itself."""

    digest: str
    architectures: frozenset[int]
    strict: bool

    def by(self, target: Path) -> bool:
        """Whether `target` is there and serves: of the same sources, for these architectures at least, as strict."""
        try:
            digest, architectures, strict, content = target.with_suffix(".stamp").read_text().split()
            there = frozenset(map(int, architectures.split(",")))
            fits = digest == self.digest and there >= self.architectures and (strict == "True" or not self.strict)
            return fits and content == hashlib.sha256(target.read_bytes()).hexdigest()
        except (OSError, ValueError):
            return False

    @contextlib.contextmanager
    def stamping(self, target: Path) -> Iterator[None]:
        """Around the making of `target`: without a stamp until it is whole."""
        stamp = target.with_suffix(".stamp")
        stamp.unlink(missing_ok=True)
        yield
        architectures, content = ",".join(map(str, sorted(self.architectures))), target.read_bytes()
        stamp.write_text(f"{self.digest} {architectures} {self.strict} {hashlib.sha256(content).hexdigest()}\n")


def _run(command: list[str], cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    if done.returncode != 0:
        raise BuildError(1, f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


_REPORT = re.compile(
    r"Compiling entry function '[^']+' for 'sm_(?P<architecture>\d+)'\s+ptxas info\s+: "
    r"Function properties for (?P<name>\S+)\s+(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\s+ptxas info\s+: Used (?P<registers>\d+) registers"
    r"(?:[^\n]* (?P<calls>\d+) bytes cumulative stack size)?"
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
    found = [
        Kernel(
            readable_name(match["name"]),
            int(match["architecture"]),
            int(match["registers"]),
            int(match["stores"]) + int(match["loads"]),
            max(int(match["stack"]), int(match["calls"] or 0)),  # with what the functions that it calls have
        )
        for match in _REPORT.finditer(log)
    ]
    if len(found) != log.count("Compiling entry function"):
        raise BuildError(1, "ptxas reports its kernels in words that build.py does not know")
    return found


def _chosen(text: str | None) -> list[int]:
    nvcc = find_nvcc()
    if text is None:
        return [device_architecture() or 90]
    if text == "all":
        return [a for a in WANTED if nvcc is None or a in architectures_known(nvcc)]
    if not re.fullmatch(r"[0-9]{2,3}(,[0-9]{2,3})*", text):
        raise BuildError(2, f"--architectures is {text[:40]!r}, expected all, or numbers like 87,90")
    return list(dict.fromkeys(map(int, text.split(","))))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--architectures", help="all, or numbers like 87,90; by default that of this machine, or 90")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "cuda")
    parser.add_argument(
        "--sass", type=Path, help="count the instructions of the first architecture's kernels into this"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2)
    options = parser.parse_args(arguments)
    try:
        if options.jobs < 1:
            raise BuildError(2, f"--jobs is {options.jobs}, expected at least 1")
        chosen = _chosen(options.architectures)
        library, kernels = build(options.out, chosen, jobs=options.jobs)
        print(f"{library}: {library.stat().st_size / 2**20:.1f} MiB for sm_{', sm_'.join(map(str, chosen))}\n")
        print("registers" + " " * 31 + "".join(f"{'sm_' + str(a):>8}" for a in chosen))
        for name in dict.fromkeys(k.name for k in kernels):
            registers = {k.architecture: k.registers for k in kernels if k.name == name}
            print(f"{name:<40}" + "".join(f"{registers[a]:>8}" for a in chosen))
        print(f"\n{len(kernels)} kernels, none in local memory")
        if options.sass:
            import scan_bounds  # here, since it needs more than a bare machine has

            document = scan_bounds.report(library, chosen[0], kernels)
            try:
                options.sass.write_text(json.dumps(document, indent=1) + "\n")
            except OSError as error:
                raise BuildError(2, f"{options.sass} cannot be written: {error.strerror}") from None
            print(f"\n{scan_bounds.table(document)}")
    except BuildError as error:
        print(error, file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    import build as this  # the module that sass.py imports, so that both raise and catch one BuildError

    sys.exit(this.main())
