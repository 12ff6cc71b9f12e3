"""Everything for 64-bit ARM, from a checkout: cross-compiled, run under qemu. Says by name what was not run and why.

    python tests/arm/run.py                       everything; docs/results/arm_qemu.json; some minutes
    python tests/arm/run.py --only build,kernels  some steps, and those they need
    python tests/arm/run.py --list

It needs g++-aarch64-linux-gnu and qemu-user of Debian or Ubuntu (apt-get), CMake, a package index, and an interpreter
with the packages of `pip install -e '.[dev]'`: `make arm` has that. Nothing is installed on the machine: the other
side's Python and wheels go to build/arm. Exit code 1 if anything failed, 3 if the compiler or the emulator is missing.

Emulation says whether the code is right, and how many instructions it takes. It says nothing about time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "wheel"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import build as wheels
from sysroot import Unavailable, make_sysroot

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
# program: the package of Debian or Ubuntu that has it.
PROGRAMS = {COMPILER: "g++-aarch64-linux-gnu", EMULATOR: "qemu-user", "cmake": "cmake"}
TOOLCHAIN = ROOT / "runtime" / "csrc" / "aarch64-linux-gnu.cmake"
COMPILER_ROOT = "/usr/aarch64-linux-gnu"
# The oldest core of a 64-bit Raspberry Pi, which has armv8-a and nothing more: another instruction ends the program.
CPU = "cortex-a53"
PASSED, FAILED, SKIPPED = "passed", "FAILED", "skipped"


class Failure(Exception):
    """A step that ran and was not right; the message ends its output."""


class Skip(Exception):
    """A step that cannot run here, and why."""


@dataclass
class Work:
    """Where things are, and what the steps hand on."""

    folder: Path
    bundle: Path
    ulp_stride: int
    python: str = ""
    scripts: Path = Path()
    wheel: Path = Path()

    def run(self, command: Sequence[str | Path], timeout_s: int = 3600, **environment: str) -> str:
        """What a command prints on stdout. Raises Failure."""
        text = [str(c) for c in command]
        try:
            done = subprocess.run(
                text, capture_output=True, text=True, timeout=timeout_s, cwd=ROOT, env={**os.environ, **environment}
            )
        except subprocess.TimeoutExpired:
            raise Failure(f"{' '.join(text)[:300]}\nstopped after {timeout_s} s") from None
        if done.returncode != 0:
            raise Failure(f"{' '.join(text)[:300]}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.stdout


# --- the steps ------------------------------------------------------------------------------------------------------


def step_build(work: Work) -> dict[str, Any]:
    folder = cross_build(work.folder / "cmake", werror=True, run=work.run)
    library = folder / "libhcmen_ops.so"
    listing = work.run(["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", library])
    counts = {name: len(re.findall(rf"\t{name}\t[^\n]*\.4[sh]", listing)) for name in ("fmla", "fcvtl", "fcvtn", "bsl")}
    if not all(counts[name] for name in ("fmla", "fcvtl", "fcvtn")):
        raise Failure(f"the library has no vector instructions of some kind: {counts}")
    return {**wheels.library_needs(library, "aarch64-linux-gnu-objdump"), "instructions": counts}


def cross_build(folder: Path, *, werror: bool, run: Callable[..., str]) -> Path:
    """The library and its test, for aarch64, in `folder`."""
    flags = ["-DCMAKE_CXX_FLAGS=-Werror"] if werror else []
    source = ROOT / "runtime" / "csrc"
    run(["cmake", "-S", source, "-B", folder, f"-DCMAKE_TOOLCHAIN_FILE={TOOLCHAIN}", "-DHCMEN_TESTS=ON", *flags])
    run(["cmake", "--build", folder, "--parallel", str(len(os.sched_getaffinity(0)))])
    return folder


def emulated(*command: str | Path) -> list[str | Path]:
    """`command`, a program of the cross compiler, under the emulator."""
    return [EMULATOR, "-cpu", CPU, "-L", COMPILER_ROOT, *command]


def _cases_of(output: str) -> str:
    if "instruction set: neon\n" not in output or not output.endswith("\n0 failures\n"):
        raise Failure(output[-2000:])
    return output


def step_kernels(work: Work) -> dict[str, Any]:
    _cases_of(work.run(emulated(work.folder / "cmake" / "hcmen_ops_test", "grid")))
    return {"instruction_set": "neon"}


def step_ulp(work: Work) -> dict[str, Any]:
    program = work.folder / "cmake" / "hcmen_ops_test"
    output = _cases_of(work.run(emulated(program, "ulp", str(work.ulp_stride)), timeout_s=14400))
    found = re.findall(r"^(.+): at most ([\d.]+) units", output, re.MULTILINE)
    worst = {name.removeprefix("neon "): float(error) for name, error in found}
    return {"stride": work.ulp_stride, "units_in_the_last_place": worst}


def step_wheel(work: Work) -> dict[str, Any]:
    try:
        work.wheel = wheels.build_wheel(
            work.folder / "wheel", work.folder.parent / "auditwheel", platform="linux-aarch64", toolchain=TOOLCHAIN
        )
        return wheels.describe_wheel(work.wheel, "aarch64-linux-gnu-objdump")
    except RuntimeError as error:
        raise Failure(str(error)) from error


def step_environment(work: Work) -> dict[str, Any]:
    sysroot, site = work.folder / "sysroot", work.folder / "site"
    try:
        python = make_sysroot(sysroot)
    except (Unavailable, subprocess.SubprocessError, OSError) as error:
        raise Skip(str(error)) from error
    own = re.search(r"manylinux_\d+_\d+_aarch64", work.wheel.name)
    if own is None:
        raise Failure(f"{work.wheel.name} has no manylinux tag")
    newer = [f"manylinux_2_{minor}_aarch64" for minor in range(28, 16, -1)]
    version = python.name.removeprefix("python")
    try:
        wheels.install(work.wheel, site, version, [own[0], *newer, "manylinux2014_aarch64"])
    except RuntimeError as error:
        raise Skip(f"pip: {error}") from error
    # The emulator's variable sets the other side's environment, and leaves this side's alone.
    work.python = f"{EMULATOR} -cpu {CPU} -L {sysroot} -E PYTHONPATH={site} {python}"
    work.scripts = site / "bin"
    code = "import platform, onnxruntime; print(platform.machine(), platform.python_version(), onnxruntime.__version__)"
    machine, *versions = work.run([*work.python.split(), "-c", code]).split()
    if machine != "aarch64":
        raise Failure(f"the interpreter runs on {machine}")
    return dict(zip(("python", "onnxruntime"), versions, strict=True))


def _check(work: Work, *more: str | Path) -> dict[str, Any]:
    command = [sys.executable, ROOT / "tests" / "wheel" / "check.py", "--timeout", "1800"]
    output = work.run([*command, "--python", work.python, "--scripts", work.scripts, *more])
    return dict(json.loads(output))


def step_self_test(work: Work) -> dict[str, Any]:
    return _check(work)


def step_demo_bundle(work: Work) -> dict[str, Any]:
    if not (work.bundle / "manifest.json").is_file():
        raise Skip(f"{work.bundle} is no bundle: run `make demo`, or name one with --bundle")
    return _check(work, "--bundle", work.bundle)


def step_grid(work: Work) -> dict[str, Any]:
    output = work.run([sys.executable, HERE / "grid.py", "--python", work.python, work.folder / "grid"])
    found = dict(json.loads(output))
    if found.pop("said") != "instruction set: neon":
        raise Failure(output)
    return found


def step_instructions(work: Work) -> dict[str, Any]:
    if not shutil.which("valgrind"):
        raise Skip("valgrind is not on the path, for the counts of x86 beside those of ARM")
    work.run([sys.executable, "benchmarks/instructions.py"])
    return {"table": "docs/results/instruction_counts.json"}


@dataclass(frozen=True)
class Step:
    """`run` gives facts, or raises Failure or Skip."""

    name: str
    what: str
    run: Callable[[Work], dict[str, Any]]
    needs: Sequence[str] = ()


STEPS = [
    Step("build", "the library and its C++ test, warnings being errors", step_build),
    Step("kernels", "that test: scan, convolution, gradients, every float16, against double", step_kernels, ("build",)),
    Step("ulp", "exp, softplus, silu, sigmoid over the float32 numbers", step_ulp, ("build",)),
    Step("wheel", "the wheel for aarch64, and what auditwheel calls it", step_wheel),
    Step("environment", "Debian's Python for arm64 with that wheel, NumPy, ONNX Runtime", step_environment, ("wheel",)),
    Step(
        "self-test",
        "hcmen-doctor, hcmen-run, --self-test on the bundle of tests/files",
        step_self_test,
        ("environment",),
    ),
    Step("demo-bundle", "the same on the bundle of `make demo`", step_demo_bundle, ("environment",)),
    Step("grid", "the grid of the tests through ONNX Runtime and the C interface", step_grid, ("environment",)),
    Step("instructions", "instructions per exponential and element, ARM and x86", step_instructions, ("build",)),
]


def with_needs(names: Sequence[str]) -> list[Step]:
    """The named steps and all they need, in order."""
    wanted = set(names)
    for step in reversed(STEPS):
        if step.name in wanted:
            wanted |= set(step.needs)
    return [s for s in STEPS if s.name in wanted]


def run_step(step: Step, work: Work, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What became of a step: status, seconds, its facts, and the end of its output if it failed."""
    missing = [n for n in step.needs if results[n]["status"] != PASSED]
    if missing:
        return {"status": SKIPPED, "reason": f"needs {missing[0]}"}
    started = time.monotonic()
    try:
        result: dict[str, Any] = {"status": PASSED, **step.run(work)}
    except Skip as skip:
        result = {"status": SKIPPED, "reason": str(skip)}
    except Failure as failure:
        result = {"status": FAILED, "output_tail": str(failure)[-3000:]}
    return {**result, "seconds": round(time.monotonic() - started, 1)}


# --- what came of it ------------------------------------------------------------------------------------------------


def describe() -> dict[str, Any]:
    """The machine that emulates, and the versions."""

    def first_line(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()[0]

    return {
        "date": datetime.date.today().isoformat(),
        "host": f"{platform.system()} {platform.release()} {platform.machine()}",
        "compiler": first_line(COMPILER, "--version"),
        "emulator": first_line(EMULATOR, "--version"),
        "emulated_cpu": CPU,
        "command": " ".join(["python", *sys.argv]),
    }


def detail(result: Mapping[str, Any]) -> str:
    """The one thing of a step to show in its line."""
    if "reason" in result:
        return str(result["reason"])
    if "units_in_the_last_place" in result:
        worst = ", ".join(f"{name} {error:.2f}" for name, error in result["units_in_the_last_place"].items())
        return f"every {result['stride']}th number; ulp: {worst}"
    if "file" in result:
        return f"{result['file']}, {result['bytes'] / 1024:.0f} KiB"
    if "self_test" in result:
        return f"{len(result['self_test'])} variants, largest score error {max(result['self_test'].values()):.1e}"
    if "largest_errors" in result:
        counts = ", ".join(f"{count} {name}" for name, count in result["cases"].items())
        return f"{counts}; largest error {max(result['largest_errors'].values()):.1e}"
    if "onnxruntime" in result:
        return f"Python {result['python']}, onnxruntime {result['onnxruntime']}"
    return ""


def line(name: str, result: Mapping[str, Any]) -> str:
    return f"{result['status']:<8} {name:<13} {result.get('seconds', ''):>7}  {detail(result)}".rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="names of steps, with commas between them; what they need runs too")
    parser.add_argument("--list", action="store_true", help="name the steps and leave")
    parser.add_argument("--out", type=Path, help="by default docs/results/arm_qemu.json; with --only, nowhere")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "arm", help="for all that is built and fetched")
    parser.add_argument("--bundle", type=Path, default=ROOT / "build" / "bundle", help="for the step demo-bundle")
    parser.add_argument("--ulp-stride", type=int, default=397, metavar="N", help="every N-th number; 1: all, for hours")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(f"{s.name:<13} {s.what}" for s in STEPS))
        return 0
    names = options.only.split(",") if options.only else [s.name for s in STEPS]
    unknown = [n for n in names if n not in {s.name for s in STEPS}]
    if unknown:
        parser.error(f"no step '{unknown[0]}': choose from {', '.join(s.name for s in STEPS)}")
    for program, package in PROGRAMS.items():
        if not shutil.which(program):
            print(f"{program} is not on the path: apt-get install {package}. Nothing was run.", file=sys.stderr)
            return 3

    work = Work(options.folder.resolve(), options.bundle.resolve(), options.ulp_stride)
    work.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    for step in with_needs(names):
        results[step.name] = run_step(step, work, results)
        print(line(step.name, results[step.name]), flush=True)

    failed = [name for name, r in results.items() if r["status"] == FAILED]
    skipped = [name for name, r in results.items() if r["status"] == SKIPPED]
    out = options.out or (None if options.only else ROOT / "docs" / "results" / "arm_qemu.json")
    if out:
        data = {"schema_version": 1, "machine": describe(), "passed": not failed, "steps": results}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(data, indent=2) + "\n")
    passed = len(results) - len(failed) - len(skipped)
    print(f"\n{passed} passed, {len(failed)} failed, {len(skipped)} skipped" + (f": {out}" if out else ""))
    for name in failed:
        print(f"\n--- {name} ---\n{results[name].get('output_tail', '')}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
