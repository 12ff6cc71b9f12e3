"""The kernels' own C++ test, built with AddressSanitizer and UndefinedBehaviorSanitizer, over the grid of sizes.

Every array there is a heap block of exactly its size, so that a read or write past an end is seen.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "runtime" / "csrc"


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hcmen_ops_test` with sanitizers."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed")
    folder = tmp_path_factory.mktemp("sanitize")
    probe = folder / "probe.cc"
    probe.write_text("int main() { return 0; }\n")
    flags = "-fsanitize=address,undefined"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no C++ compiler {compiler}")
    built = run([compiler, flags, str(probe), "-o", str(folder / "probe")])
    if built.returncode != 0 or run([str(folder / "probe")]).returncode != 0:
        pytest.skip(f"{compiler} has no sanitizer runtime here")
    # Kept between runs, where make rebuilds only what changed.
    build = SOURCES.parents[1] / "build" / "sanitize"
    options = ["-DHCMEN_SANITIZE=ON", "-DHCMEN_TESTS=ON"]
    configured = run([cmake, "-S", str(SOURCES), "-B", str(build), *options])
    assert configured.returncode == 0, configured.stdout[-2000:] + configured.stderr[-2000:]
    made = run([cmake, "--build", str(build), "--target", "hcmen_ops_test", "--parallel", "2"])
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
    return build / "hcmen_ops_test"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline", "neon"])
@pytest.mark.parametrize("mode", [("grid",), ("ulp", "4099"), ("allocations",)], ids=lambda mode: mode[0])
def test_sanitized_kernels(program: Path, isa: str, mode: tuple[str, ...]) -> None:
    result = run([str(program), *mode], HCMEN_ISA=isa, UBSAN_OPTIONS="print_stacktrace=1")
    if result.stdout.startswith("HCMEN_ISA"):
        assert isa != ("neon" if platform.machine() == "aarch64" else "baseline")
        pytest.skip(f"{isa} is not of this processor; tests/arm/test_arm.py emulates one with neon")
    assert result.stderr == ""
    assert result.returncode == 0, result.stdout[-3000:]
    assert f"instruction set: {isa}" in result.stdout
    assert result.stdout.endswith("0 failures\n")


def test_wide_instructions_stay_in_their_files(program: Path) -> None:
    """A symbol that the linker may merge, compiled with wide instructions, could end up in code for every machine."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm (binutils) is not installed")
    objects = [p for p in program.parent.rglob("kernels-*.cc.o") if "baseline" not in p.name]
    if not objects:
        pytest.skip("the wide kernels are not built on this architecture")
    for file in objects:
        listing = run([nm, "--defined-only", str(file)]).stdout
        defined = [line.split() for line in listing.splitlines()]
        shared = [name for _, kind, name in defined if kind in "WwVvu"]
        # Sanitizers mark their own bookkeeping so.
        assert [name for name in shared if "asan" not in name and "ubsan" not in name] == []


def test_no_instruction_beyond_the_level_of_its_file(program: Path) -> None:
    """A machine with AVX2 alone runs all but kernels-avx512.cc, an older one all but the two wide files."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump (binutils) is not installed")
    objects = {p.name.removesuffix(".cc.o"): p for p in program.parent.rglob("hcmen_kernels.dir/*.o")}
    if "kernels-avx512" not in objects:
        pytest.skip("the wide kernels are not built on this architecture")

    def registers(name: str) -> set[str]:
        listing = run([objdump, "--disassemble", "--no-show-raw-insn", str(objects[name])]).stdout
        return set(re.findall(r"%(?:[xyz]mm\d+|k[0-7])\b", listing))

    for name in objects.keys() - {"kernels-avx2", "kernels-avx512"}:
        assert {r for r in registers(name) if not r.startswith("%xmm")} == set(), name
    old = {f"%{kind}{i}" for kind in ("xmm", "ymm") for i in range(16)}
    assert registers("kernels-avx2") <= old
    assert "%ymm0" in registers("kernels-avx2")
    assert "%zmm0" in registers("kernels-avx512")
