"""The CUDA sources by nvcc, for one architecture: no warning, no spilled register, and a library that loads, exports
what it should and reports errors on a machine without a GPU. `make cuda-architectures` compiles for all of them.
What tests/gpu/build.py takes, makes and refuses is tried with a compiler that only writes down what it was asked.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.op_cases import ConvCase, ScanCase, address, conv_structure, scan_arrays, scan_structure
from helpers.ort_registration import check_registration
from helpers.scripts import loaded

from hcmen.base import cuda_library
from hcmen.base.cuda_library import CudaLaunch, call, cuda_library_path, declare, device_problem, load_cuda_library
from hcmen.base.errors import BackendError

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURE = 90


build = loaded(ROOT / "tests" / "gpu" / "build.py", "build")
needs_nvcc = pytest.mark.skipif(build.find_nvcc() is None, reason="there is no nvcc on the path, nor in CUDACXX")


@pytest.fixture(scope="module")
def built():
    # Kept between runs: nvcc takes half a minute. A space in the path, as people have in theirs, must not stop nvcc.
    return build.build(ROOT / "build" / "cuda test", [ARCHITECTURE])


@needs_nvcc
def test_no_kernel_spills(built):
    kernels = {k.name: k for k in built[1]}
    for dtype in ("float", "half"):
        for states in (4, 8, 12, 16):
            for mode in (0, 1):
                kernel = kernels[f"scan_forward_kernel<{dtype}, {states}, 1, {mode}>"]
                # Three blocks of 128 threads fit a multiprocessor, and four of most kernels.
                assert kernel.registers <= (168 if states == 12 else 128)
        for states in (4, 8, 16):
            for mode in (0, 1):
                # Three blocks of 128 threads, or two where a lane has 64 states.
                kernel = kernels[f"dual_forward_kernel<{dtype}, {states}, {mode}>"]
                assert kernel.registers <= (255 if states == 16 else 168)
    assert kernels["dual_backward_kernel"].registers <= 128  # for up to 16 warps of a block
    assert len(kernels) == len(built[1]) == 84
    assert {k.architecture for k in kernels.values()} == {ARCHITECTURE}
    assert [k.name for k in kernels.values() if k.spill_bytes or k.stack_bytes] == []


SPILLED = """ptxas info    : Compiling entry function '_ZN5hcmen4cuda9my_kernelIfLi16ELi4EEEv' for 'sm_80'
ptxas info    : Function properties for _ZN5hcmen4cuda9my_kernelIfLi16ELi4EEEv
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 8 bytes cumulative stack size, 568 bytes cmem[0]
"""
IN_CALLS = SPILLED.replace("8 bytes stack", "0 bytes stack").replace("4 bytes spill", "0 bytes spill")
FINE = IN_CALLS.replace("12 bytes", "0 bytes").replace(", 8 bytes cumulative stack size", "")
FAKE_NVCC = """#!/bin/sh
if test "$1" = --list-gpu-arch; then echo compute_80; echo compute_90; exit; fi
echo "$*" >> "$ASKED"
cat "$ASKED.says"
for last; do :; done
echo "$*" > "$last"
case "$*" in *-shared*|*probe*) exit "$(cat "$ASKED.status")";; esac
"""


class Compiler:
    """A false nvcc and C++ compiler."""

    def __init__(self, path: Path):
        self.asked = path / "asked"
        self.program = path / "nvcc"
        self.program.write_text(FAKE_NVCC)
        self.program.chmod(0o755)
        self.behave(FINE)

    def behave(self, says: str, links: bool = True) -> None:
        """What it says of each source; whether it can link."""
        self.asked.with_suffix(".says").write_text(says)
        self.asked.with_suffix(".status").write_text(str(int(not links)))

    def calls(self) -> int:
        """Since the last time."""
        lines = self.asked.read_text().splitlines() if self.asked.exists() else []
        self.asked.unlink(missing_ok=True)
        return len(lines)


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    made = Compiler(tmp_path)
    for name in ("CUDACXX", "CXX"):
        monkeypatch.setenv(name, str(made.program))
    monkeypatch.setenv("ASKED", str(made.asked))
    return made


def _without_nvcc(monkeypatch):
    monkeypatch.setenv("CUDACXX", "/none/nvcc")


FROM_SOURCES, ALL_STEPS = len(build.CUDA_SOURCES), len(build.CUDA_SOURCES) + 2


def test_local_memory_is_refused(compiler, tmp_path, capsys):
    arguments = ["--architectures", "80", "--out", str(tmp_path / "out")]
    for says, bytes_used in ((SPILLED, "16 bytes spilled, 8 of stack"), (IN_CALLS, "12 bytes spilled, 8 of stack")):
        compiler.behave(says)
        with pytest.raises(RuntimeError, match=rf"my_kernel<float, 16, 4> on sm_80 \({bytes_used}\)"):
            build.build(tmp_path / "out", [80])
        assert build.main(arguments) == 1
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.count("\n") == 1
        shutil.rmtree(tmp_path / "out")
    # tests/gpu/run.py has its own words for it.
    assert build.build(tmp_path / "out", [80], strict=False)[1][0].spill_bytes == 12
    compiler.behave(FINE.replace("Used 128", "Takes 128"))
    with pytest.raises(RuntimeError, match="words that build"):
        build.build(tmp_path / "new", [80])
    compiler.behave(FINE)
    assert build.main([*arguments, "--out", str(tmp_path / "fine")]) == 0


@needs_nvcc
def test_nvcc_says_what_is_refused(tmp_path, monkeypatch, capsys):
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "local.cu").write_text(
        "__global__ void local_kernel(float* x, int n) {\n  float kept[64];\n"
        "  for (int i = 0; i < n; ++i) kept[i] = x[i] * x[n - i];\n  x[0] = kept[n / 3] + kept[n / 5];\n}\n"
    )
    monkeypatch.setattr(build, "CSRC", sources)
    monkeypatch.setattr(build, "CUDA_SOURCES", ("local.cu",))
    assert build.main(["--architectures", str(ARCHITECTURE), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert (
        said == f"no kernel may use local memory: local_kernel on sm_{ARCHITECTURE} (0 bytes spilled, 256 of stack)\n"
    )


def test_what_is_there_is_taken(compiler, tmp_path, monkeypatch):
    out = tmp_path / "out"
    built, kernels = build.build(out, [80, 90])
    assert compiler.calls() == ALL_STEPS
    assert len(kernels) == FROM_SOURCES
    _without_nvcc(monkeypatch)
    assert build.build(out, [80, 90]) == (built, kernels)
    assert build.build(out, [80], strict=False) == (built, kernels)
    assert build.build(out, [90]) == (built, [])  # the compiler spoke of sm_80 alone
    with pytest.raises(RuntimeError, match="nvcc and a C"):
        build.build(out, [75, 80])
    # Brought elsewhere: its stamp goes along, the logs need not.
    for log in out.glob("*.log"):
        log.unlink()
    moved = out.rename(tmp_path / "moved")
    assert build.build(moved, [80]) == (moved / built.name, [])
    (moved / built.name).write_text("another library")
    with pytest.raises(RuntimeError, match="nvcc and a C"):
        build.build(moved, [80])


def test_what_is_there_is_not_taken_for_more_than_it_is(compiler, tmp_path, monkeypatch):
    sources = tmp_path / "csrc"
    shutil.copytree(build.CSRC, sources)
    monkeypatch.setattr(build, "CSRC", sources)
    build.build(tmp_path / "out", [80], strict=False)
    compiler.calls()
    for wanted, strict in (([80], True), ([80, 90], True)):
        build.build(tmp_path / "out", wanted, strict=strict)
        assert compiler.calls() == ALL_STEPS
    with (sources / "checks.h").open("a") as header:
        header.write("\n")
    # A build that fails while it links leaves no stamp, also where the next one has the sources of the one before.
    compiler.behave(FINE, links=False)
    with pytest.raises(RuntimeError, match="-shared"):
        build.build(tmp_path / "out", [80, 90])
    assert not (tmp_path / "out" / "libhcmen_ops_cuda.stamp").exists()
    compiler.behave(FINE)
    compiler.calls()
    build.build(tmp_path / "out", [80, 90])
    assert compiler.calls() == 2


def test_the_probe_is_taken(compiler, tmp_path, monkeypatch):
    compiler.behave(FINE, links=False)
    with pytest.raises(RuntimeError, match=r"probe\.cu"):
        build.build_probe(tmp_path / "out", 80)
    compiler.behave(FINE)
    probe = build.build_probe(tmp_path / "out", 80)
    _without_nvcc(monkeypatch)
    assert build.build_probe(tmp_path / "out", 80) == probe
    with pytest.raises(RuntimeError, match="nvcc is needed"):
        build.build_probe(tmp_path / "out", 90)
    probe.write_text("another program")
    with pytest.raises(RuntimeError, match="nvcc is needed"):
        build.build_probe(tmp_path / "out", 80)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--architectures", "abc"], 2, "--architectures is 'abc', expected all, or numbers like 87,90"),
        (["--architectures", ""], 2, "--architectures is '', expected"),
        (["--architectures", "90,"], 2, "--architectures is '90,', expected"),
        (["--architectures", "42"], 2, "architecture 42 is not known: expected one of 80, 90"),
        (["--architectures", "80,120"], 3, "does not compile for 120, only for 80, 90"),
        (["--architectures", "80", "--jobs", "0"], 2, "--jobs is 0, expected at least 1"),
        (["--architectures", "80", "--out", "{file}/out"], 2, "cannot be written (Not a directory): name another"),
        (["--architectures", "80", "--out", "{file}"], 2, "cannot be written (File exists): name another"),
    ],
)
def test_what_cannot_be_built(compiler, tmp_path, capsys, arguments, code, said):
    (tmp_path / "file").write_text("")
    given = [a.format(file=tmp_path / "file") for a in arguments]
    assert build.main([*(["--out", str(tmp_path / "out")] if "--out" not in given else []), *given]) == code
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.count("\n") == 1
    assert compiler.calls() == 0


def test_tools_that_are_missing(compiler, tmp_path, capsys, monkeypatch):
    arguments = ["--architectures", "all", "--out", str(tmp_path / "out")]
    monkeypatch.setenv("CUDACXX", "true")  # a program, but no nvcc
    assert build.main(arguments) == 3
    assert "names no architecture" in capsys.readouterr().err
    _without_nvcc(monkeypatch)
    assert build.main(arguments) == 3
    assert capsys.readouterr().err == (
        "nvcc and a C++ compiler are needed: put them on the path, or name them in CUDACXX, CXX\n"
    )


@needs_nvcc
def test_only_the_interface_is_exported(built):
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm (binutils) is not installed")
    listing = subprocess.run([nm, "-D", "--defined-only", str(built[0])], capture_output=True, text=True, check=True)
    names = {line.split()[-1].split("@")[0] for line in listing.stdout.splitlines()}
    assert names == {*cuda_library._FUNCTIONS, "RegisterCustomOps"}
    needed = subprocess.run([nm, "-D", "--undefined-only", str(built[0])], capture_output=True, text=True, check=True)
    # The CUDA runtime is inside, and asks for the driver only when it is first used.
    assert "cuda" not in needed.stdout.lower()


@needs_nvcc
def test_what_is_registered(built):
    check_registration(built[0])


@needs_nvcc
@pytest.mark.skipif(device_problem() is None, reason="there is a device, and tests/gpu uses it")
def test_without_a_device_a_call_says_what_cuda_says(built):
    library = declare(ctypes.CDLL(str(built[0])))
    arrays = {**scan_arrays(ScanCase()), "y": np.empty((2, 9, 5), np.float32)}
    with pytest.raises(BackendError, match="hcmen_cuda_selective_scan_forward: CUDA failed: cudaError"):
        call(library, "selective_scan_forward", scan_structure(ScanCase(), arrays, address), CudaLaunch())
    x = {"x": np.empty((2, 9, 5)), "y": np.empty((2, 9, 5)), "weight": np.empty((5, 4)), "bias": np.empty(5)}
    with pytest.raises(BackendError, match="CUDA failed"):
        call(library, "causal_conv1d_forward", conv_structure(ConvCase(), x, address), CudaLaunch())
    with pytest.raises(BackendError, match="CUDA failed"):
        call(library, "nothing", CudaLaunch())


# As much of a driver as the runtime inside the library asks before it says that this one is too old.
OLD_DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 12020, 0; }
static int other(void) { return 801; }
int cuGetProcAddress_v2(const char* name, void** function, int version, unsigned long long flags, int* found);
int cuGetProcAddress(const char* name, void** function, int version, unsigned long long flags) {
  *function = other;
  if (!strcmp(name, "cuInit")) *function = cuInit;
  if (!strcmp(name, "cuDriverGetVersion")) *function = cuDriverGetVersion;
  if (!strcmp(name, "cuGetProcAddress")) *function = version < 12000 ? (void*)cuGetProcAddress : cuGetProcAddress_v2;
  return 0;
}
int cuGetProcAddress_v2(const char* name, void** function, int version, unsigned long long flags, int* found) {
  return cuGetProcAddress(name, function, version, flags);
}
"""
CALL = """
import ctypes, sys
from hcmen.base.cuda_library import CudaLaunch, call, declare
call(declare(ctypes.CDLL(sys.argv[1])), "nothing", CudaLaunch())
"""


@needs_nvcc
def test_a_driver_that_is_older_than_the_library(built, tmp_path):
    (tmp_path / "driver.c").write_text(OLD_DRIVER)
    compiler = shutil.which(os.environ.get("CC", "cc"))
    assert compiler is not None, "nvcc does not work without a host compiler"
    command = [compiler, "-shared", "-fPIC", str(tmp_path / "driver.c"), "-o", str(tmp_path / "libcuda.so.1")]
    subprocess.run(command, check=True)
    done = subprocess.run(
        [sys.executable, "-c", CALL, str(built[0])],
        capture_output=True,
        text=True,
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
    )
    assert re.fullmatch(
        r"hcmen\.base\.errors\.BackendError: hcmen_cuda_nothing: CUDA failed: cudaErrorInsufficientDriver \(.*\): "
        r"the driver serves CUDA 12\.2, the library was built with \d+\.\d: update the driver, or build the library "
        r"with an older nvcc",
        done.stderr.splitlines()[-1],
    )


@needs_nvcc
def test_the_library_is_found_by_name(built, monkeypatch):
    monkeypatch.setenv("HCMEN_CUDA_LIBRARY", str(built[0]))
    load_cuda_library.cache_clear()
    assert cuda_library_path() == built[0].resolve()
    assert load_cuda_library().hcmen_cuda_ops_version() == cuda_library.LIBRARY_VERSION
    load_cuda_library.cache_clear()


def test_a_library_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("HCMEN_CUDA_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(BackendError, match=r"HCMEN_CUDA_LIBRARY is '.*none.so', expected a file: build it with"):
        cuda_library_path()
    monkeypatch.delenv("HCMEN_CUDA_LIBRARY")
    monkeypatch.setattr(cuda_library, "LIBRARY_NAME", "libnone.so")
    with pytest.raises(BackendError, match=r"libnone.so was not found in .*HCMEN_CUDA=ON"):
        cuda_library_path()
    (tmp_path / "none.so").write_bytes(b"not a library")
    monkeypatch.setenv("HCMEN_CUDA_LIBRARY", str(tmp_path / "none.so"))
    load_cuda_library.cache_clear()
    with pytest.raises(BackendError, match="cannot be loaded"):
        load_cuda_library()


def test_what_is_wrong_with_the_device_is_said():
    def missing(name: str) -> None:
        raise OSError(name)

    class Driver:
        def __init__(self, status: int, count: int):
            self.status, self.count = status, count

        def cuInit(self, flags: int) -> int:
            return self.status

        def cuDeviceGetCount(self, count: object) -> int:
            ctypes.cast(count, ctypes.POINTER(ctypes.c_int))[0] = self.count
            return 0

    assert device_problem(missing) == "there is no CUDA driver (libcuda.so.1)"
    assert "error 100" in str(device_problem(lambda name: Driver(100, 0)))
    assert device_problem(lambda name: Driver(0, 0)) == "the CUDA driver sees no device"
    assert device_problem(lambda name: Driver(0, 2)) is None


@needs_nvcc
def test_cmake_builds_it_when_asked(tmp_path):
    """Configuring alone, which finds nvcc and settles what is compiled; compiling is done above."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed")
    for wish, there in (("OFF", False), ("AUTO", True)):
        folder = tmp_path / wish
        command = [cmake, "-S", str(ROOT / "runtime" / "csrc"), "-B", str(folder), f"-DHCMEN_CUDA={wish}"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        helped = subprocess.run([cmake, "--build", str(folder), "--target", "help"], capture_output=True, text=True)
        assert ("hcmen_ops_cuda" in helped.stdout) == there
        if there:
            assert "for 75-real;80-real;86-real;87-real;89-real;90-real" in done.stdout
    bad = [cmake, "-S", str(ROOT / "runtime" / "csrc"), "-B", str(tmp_path / "bad"), "-DHCMEN_CUDA=maybe"]
    assert "expected ON, OFF or AUTO" in subprocess.run(bad, capture_output=True, text=True).stderr
    none = [cmake, "-S", str(ROOT / "runtime" / "csrc"), "-B", str(tmp_path / "none"), "-DHCMEN_CUDA=ON"]
    environment = {**os.environ, "CUDACXX": str(tmp_path / "no-nvcc"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(none, capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert "there is no nvcc" in done.stderr or "CUDACXX" in done.stderr


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("9.0", 90), ("NVIDIA H200, 580.1, 1 MiB, 9.0\n12.0", 90), ("12.1", 121), ("[N/A]", None), ("", None)],
)
def test_the_device_by_nvidia_smi(monkeypatch, tmp_path, answer, expected):
    """Where the driver's library is not on the loader's path."""

    def missing(name: str) -> None:
        raise OSError(name)

    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\ncat <<'END'\n{answer}\nEND\n")
    smi.chmod(0o755)
    monkeypatch.setattr(build.ctypes, "CDLL", missing)
    monkeypatch.setattr(build, "TOOL_FOLDERS", ())
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert build.device_architecture() == expected
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert build.device_architecture() is None
    monkeypatch.setenv("PATH", "/nowhere")
    assert build.device_architecture() is None
