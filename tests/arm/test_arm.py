"""64-bit ARM: the kernels by the cross compiler and under qemu, where those are; the runner of tests/arm anywhere.

tests/arm/run.py (`make arm`) does the rest: Debian's Python with ONNX Runtime, the wheel, every size.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from helpers.scripts import loaded

ROOT = Path(__file__).resolve().parents[2]
ARM = ROOT / "tests" / "arm"


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    path = list(sys.path)
    try:
        return loaded(ARM / "run.py", "arm_run")
    finally:
        sys.path[:] = path
        for name in ("build", "sysroot"):  # names that other folders of tests have too
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def program(runner: ModuleType) -> Path:
    """The kernels' own test for aarch64, beside the library."""
    for name, package in runner.PROGRAMS.items():
        if shutil.which(name) is None:
            pytest.skip(
                f"{name} is not installed: apt-get install {package}, as `make test-all` does where root runs it"
            )

    def run(command: list[str | Path]) -> None:
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    # Kept between runs, where make rebuilds only what changed.
    folder = runner.cross_build(ROOT / "build" / "arm" / "cmake", werror=True, run=run)
    return Path(folder) / "hcmen_ops_test"


@pytest.mark.parametrize("mode", [("grid",), ("ulp", "20011")], ids=lambda mode: mode[0])
def test_kernels_under_emulation(runner, program, mode):
    """Scan, convolution and gradients against plain double loops, every float16, the caller's rounding mode."""
    command = [str(c) for c in runner.emulated(program, *mode)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "instruction set: neon\n" in done.stdout
    assert done.stdout.endswith("0 failures\n")


def test_hot_loops_are_vectors(runner, program):
    """Conversions of float16 by their own instructions, and nothing computed lane by lane in a tile of the scan."""
    command = ["aarch64-linux-gnu-objdump", "-dC", "--no-show-raw-insn", str(program)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = {b.splitlines()[0]: b for b in listing.split("\n\n") if ">:" in b.splitlines()[0]}
    tiles = [body for head, body in functions.items() if re.search(r"baseline::scan_tile<.*false>", head)]
    assert len(tiles) >= 3
    for body in tiles:
        assert body.count("fmla") > 6
        # Arithmetic on one lane has registers s0 to s31; so has a load, which puts in place what a product takes.
        assert not re.search(r"\t(fadd|fsub|fmul|fmadd|fneg|fcmp\w*|umov|smov)\t[swx]\d", body)
        assert "\tbl\t" not in body
    assert re.search(r"\tfcvtl\tv\d+\.4s, v\d+\.4h", listing)
    assert re.search(r"\tfcvtn\tv\d+\.4h, v\d+\.4s", listing)


def test_other_instruction_sets_are_refused_by_name(runner, program):
    command = [str(c) for c in runner.emulated(program, "grid")]
    command[1:1] = ["-E", "HCMEN_ISA=avx2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "HCMEN_ISA is 'avx2', expected one of neon: unset it\n"


# --- the runner -----------------------------------------------------------------------------------------------------


def test_a_step_brings_what_it_needs(runner):
    assert [s.name for s in runner.with_needs(["grid"])] == ["wheel", "environment", "grid"]
    names = [s.name for s in runner.STEPS]
    assert len(set(names)) == len(names)
    for index, step in enumerate(runner.STEPS):
        assert set(step.needs) <= set(names[:index])


def test_an_unknown_step_is_named(runner, capsys):
    with pytest.raises(SystemExit):
        runner.main(["--only", "build,nonsense"])
    assert "no step 'nonsense': choose from build" in capsys.readouterr().err


def test_without_the_compiler_nothing_is_run(runner, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "PROGRAMS", {"no-such-compiler": "g++"})
    assert runner.main(["--folder", str(tmp_path / "work"), "--out", str(tmp_path / "arm.json")]) == 3
    assert "no-such-compiler is not on the path: apt-get install g++" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_results_are_sorted_and_written(runner, tmp_path, monkeypatch, capsys):
    Step, Failure, Skip = runner.Step, runner.Failure, runner.Skip

    def raises(error):
        def step(work):
            raise error

        return step

    steps = [
        Step("right", "", lambda work: {"self_test": {"full": 1e-6}}),
        Step("wrong", "", raises(Failure("it broke"))),
        Step("absent", "", raises(Skip("no such thing"))),
        Step("after", "", lambda work: {}, ("wrong",)),
        Step("slow", "", lambda work: {"said": work.run(["sleep", "60"], timeout_s=1)}),
    ]
    monkeypatch.setattr(runner, "STEPS", steps)
    monkeypatch.setattr(runner, "PROGRAMS", {})
    for name in ("COMPILER", "EMULATOR"):
        monkeypatch.setattr(runner, name, sys.executable)
    out = tmp_path / "arm.json"
    assert runner.main(["--folder", str(tmp_path / "work"), "--out", str(out)]) == 1
    data = json.loads(out.read_text())
    found = {name: r["status"] for name, r in data["steps"].items()}
    assert found == {"right": "passed", "wrong": "FAILED", "absent": "skipped", "after": "skipped", "slow": "FAILED"}
    assert data["steps"]["after"]["reason"] == "needs wrong"
    assert not data["passed"]
    shown = capsys.readouterr()
    assert "1 variants, largest score error 1.0e-06" in shown.out
    assert "1 passed, 2 failed, 2 skipped" in shown.out
    assert "it broke" in shown.err
    assert "stopped after 1 s" in shown.err
