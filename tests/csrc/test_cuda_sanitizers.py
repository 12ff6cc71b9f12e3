"""The CUDA kernels on the host under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, and a look at
whether the emulation sees mistakes at all.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from helpers import emulated
from helpers.emulated import EMULATION, KERNELS

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="there is no C++ compiler")


def _run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=500)


def _sanitizer(tmp_path: Path, flags: list[str]) -> None:
    probe = tmp_path / "probe.cc"
    probe.write_text("int main() { return 0; }\n")
    program = tmp_path / "probe"
    built = subprocess.run([str(emulated.compiler()), *flags, str(probe), "-o", str(program)], capture_output=True)
    if built.returncode != 0 or _run(program).returncode != 0:
        pytest.skip(f"the compiler has no runtime for {' '.join(flags)} here")


ADDRESS = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
THREAD = ["-O1", "-fsanitize=thread", "-DHCMEN_EMULATE_THREADS", "-pthread"]


def test_sanitizers(tmp_path: Path) -> None:
    """No access outside an array, no undefined behaviour, no race between threads; both ways the same bits."""
    _sanitizer(tmp_path, ADDRESS[1:])
    _sanitizer(tmp_path, THREAD[1:2])
    outputs = []
    for name, flags, which in (("address", ADDRESS, "all"), ("thread", THREAD, "few")):
        program = tmp_path / name
        built = emulated.build(program, flags, [*KERNELS, EMULATION / "sanitized.cc"])
        assert built.returncode == 0, built.stderr
        done = _run(program, which)
        # On fibers AddressSanitizer says once that it may be too strict.
        said = [line for line in done.stderr.splitlines() if "doesn't fully support makecontext" not in line]
        assert said == []
        assert done.returncode == 0, done.stdout[-2000:]
        assert done.stdout.endswith("0 failures\n")
        outputs.append(done.stdout.splitlines()[:-1])
    every, some = outputs
    assert len(some) > 50
    assert every[: len(some)] == some


def test_the_emulation_sees_mistakes(tmp_path: Path) -> None:
    _sanitizer(tmp_path, ADDRESS[1:])
    _sanitizer(tmp_path, THREAD[1:2])
    programs = {}
    for name, flags in (("plain", ["-O1"]), ("address", ADDRESS), ("thread", THREAD)):
        programs[name] = tmp_path / name
        built = emulated.build(programs[name], flags, [EMULATION / "selftest.cc"])
        assert built.returncode == 0, built.stderr
    right = " ".join(str(i ^ 32) for i in range(64)) + " \n"
    lanes = " ".join(str(sum(range(w * 32, w * 32 + 32))) for w in (0, 1) for _ in range(32)) + " \n"
    for order in ("0", "1", "2"):
        assert _run(programs["plain"], "right", order).stdout == right
        assert _run(programs["plain"], "lanes", order).stdout == lanes
    assert _run(programs["plain"], "race", "0").stdout != right
    assert "not all threads come to" in _run(programs["plain"], "divergence").stderr
    assert "heap-buffer-overflow" in _run(programs["address"], "shared").stderr
    assert "data race" in _run(programs["thread"], "race").stderr
    assert _run(programs["thread"], "right").stderr == ""
