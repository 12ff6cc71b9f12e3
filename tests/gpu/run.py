"""Runs everything that needs a GPU, from a checkout, and says by name what was not run and why.

    python3 tests/gpu/run.py                             everything; results in build/gpu/results
    python3 tests/gpu/run.py --seconds 480 --out DIR     what fits the time, in the order of what it teaches
    python3 tests/gpu/run.py --only kernels,ort          some suites
    python3 tests/gpu/run.py --library FILE              a libhcmen_ops_cuda.so that was built elsewhere, without nvcc
    python3 tests/gpu/run.py --list
    python3 tests/gpu/run.py --prepare                   only build, and print the environment for a program of your own

It needs a compiler, nvcc, PyTorch, ONNX, NumPy, click and pytest, and no installation of this package: a folder of
links stands for it. The kernel library is built here for the device's architecture alone, or taken from --folder where
it was built elsewhere from the same sources. DIR gets gpu.json and gpu.log, written again after every suite and every
case. Suites of one stage that time nothing run beside each other; a suite that hangs or crashes costs itself alone, and
none takes more than its part of the time. The table is complete before --seconds are over. Exit code 1 if anything
failed, 2 for wrong options, 3 if there is no CUDA device, 130 or 143 if a signal stopped it.

More suites are added to SUITES in suites.py.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

# Where the folder build/ is, ruff sorts the module of that name in another place.
# isort: split
from running import FAILED, HERE, PASSED, SKIPPED, STOP, State, ask, run_stage, say, table
from suites import SUITES, Suite, library

# isort: split
from build import ROOT, TOOL_FOLDERS, device_architecture, find_nvcc

RESERVE_S = 4.0
"""In hand for the end: processes that die slowly, and the last writing."""


def lay_out(folder: Path) -> Path:
    """A folder in which `hcmen`, `hcmen.export` and `hcmen.runtime` are one package, as the build installs them."""
    package = folder / "hcmen"
    package.mkdir(parents=True, exist_ok=True)
    for source in [*(ROOT / "hcmen").iterdir(), ROOT / "export", ROOT / "runtime"]:
        link = package / source.name
        if source.name == "__pycache__":
            continue
        link.unlink(missing_ok=True)
        link.symlink_to(source)
    return folder


def describe() -> dict[str, Any]:
    """The device, the driver and the versions."""
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader"]
    if shutil.which("nvidia-smi"):
        answer = ask(query, 20)
        found["devices"] = answer[1].strip().splitlines() if answer else ["nvidia-smi did not answer within 20 s"]
    nvcc = find_nvcc()
    version = ask([nvcc, "--version"], 20) if nvcc else None
    if version:
        found["nvcc"] = version[1].split("release ")[-1][:12]
    found["versions"] = {}
    for package in (
        "torch",
        "onnxruntime-gpu",
        "onnxruntime",
        "onnx",
        "numpy",
        "mamba-ssm",
        "tensorrt",
        "tensorrt-rtx-cu13-libs",
    ):
        try:
            found["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def find_more(environment: MutableMapping[str, str]) -> None:
    """Puts what NVIDIA's Python packages hold behind what is on the paths: ONNX Runtime searches libraries of CUDA and
    cuDNN there only, and compute-sanitizer is one of the packages."""
    for variable, folders, pattern in (
        ("PATH", TOOL_FOLDERS, "nvidia/*/bin"),
        ("LD_LIBRARY_PATH", (), "nvidia/*/lib"),
    ):
        found = [str(folder) for site in sys.path if site for folder in sorted(Path(site).glob(pattern))]
        paths = [*environment.get(variable, "").split(os.pathsep), *folders, *found]
        environment[variable] = os.pathsep.join(dict.fromkeys(path for path in paths if path))


def prepare(options: argparse.Namespace, state: State, architecture: int) -> None:
    """Builds the library and the probe, or takes the library that was named, and names both in the environment."""
    arguments = [str(options.folder), str(architecture)]
    named = [str(options.library)] if options.library else []

    def part(name: str, what: str, result: str, *more: str, refused: str | None = None) -> Suite:
        command = (sys.executable, str(HERE / "prepare.py"), result, *arguments, *more)
        file = f"{result}.json"
        return Suite(name, what, 0, (), command=command, timeout_s=3600, least_s=0, result=file, refused=refused)

    suites = [
        part("build", "the kernel library", "library", *named),
        part("probe", "the program of elementary functions", "probe", refused="nvcc is needed.*"),
    ]
    run_stage(suites, state, os.environ)
    for name, variable in (("build", "HCMEN_CUDA_LIBRARY"), ("probe", "HCMEN_PROBE")):
        row = state.results[name]
        row |= row.pop("result", {})
        if row["status"] == PASSED:
            os.environ[variable] = row["path"]
    if state.results["build"]["status"] == SKIPPED:
        state.results["build"]["status"] = FAILED  # no time even for it: nothing is run, which is no success


def parts(suites: Sequence[Suite]) -> dict[int, float]:
    """Stage -> its part of the time that is left when it begins. What one leaves over goes to all that follow."""
    stages = sorted({s.stage for s in suites})
    shares = {stage: max(s.share for s in suites if s.stage == stage) for stage in stages}
    return {stage: shares[stage] / sum(shares[s] for s in stages if s >= stage) for stage in stages}


def run(wanted: Sequence[Suite], state: State) -> None:
    """Stage after stage. What is missing is asked first, so that no time is kept for suites that cannot be run."""
    runnable = []
    for suite in wanted:
        reason = next((r for need in suite.needs if (r := need()) is not None), None)
        if STOP.number:
            reason = STOP.reason
        if reason is None:
            runnable.append(suite)
        else:
            state.results[suite.name] = {"status": SKIPPED, "reason": reason}
            say(table({suite.name: state.results[suite.name]}))
    for stage, part in parts(runnable).items():
        run_stage([s for s in runnable if s.stage == stage], state, os.environ, part)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"run.py: {message}\n")


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"'{text}' is no number of seconds above 0")


def _options(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[Suite]]:
    """The options, with folders that are there and can be written, and the suites that were named."""
    parser = _Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="names of suites, with commas between them")
    parser.add_argument("--list", action="store_true", help="name the suites and leave")
    parser.add_argument("--prepare", action="store_true", help="build the library, print the environment, and leave")
    parser.add_argument("--seconds", type=_seconds, default=3600.0, help="time for everything, the build included")
    parser.add_argument("--out", type=Path, help="for gpu.json and gpu.log; by default results/ in --folder")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "gpu", help="for the library, links and logs")
    parser.add_argument("--library", type=Path, help="a libhcmen_ops_cuda.so that was built elsewhere; none is built")
    options = parser.parse_args(arguments)
    names = [s.name for s in SUITES]
    wanted = names if options.only is None else options.only.split(",")
    for name in wanted:
        if name not in names:
            parser.error(f"no suite '{name}': choose from {', '.join(names)}")
    if options.library is not None and not options.library.is_file():
        parser.error(f"--library is '{options.library}', which is no file")
    options.folder = options.folder.absolute()
    options.out = (options.out or options.folder / "results").absolute()
    options.library = options.library and options.library.absolute()
    return options, [s for s in SUITES if s.name in wanted]


def main(arguments: Sequence[str] | None = None) -> int:
    options, wanted = _options(arguments)
    if options.list:
        say("\n".join(f"{s.name:<14} {s.what}" for s in SUITES))
        return 0
    started = time.monotonic()
    architecture = device_architecture()
    if architecture is None:
        say("the driver shows no CUDA device: nothing was run", error=True)
        return 3
    for name, folder in (("--folder", options.folder), ("--out", options.out)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "gpu.json.part").write_bytes(b"")
        except OSError as error:
            say(f"run.py: {name} is '{folder}', expected a folder to write into: {error.strerror}", error=True)
            return 2
        (folder / "gpu.json.part").unlink()
    with STOP.noticed(started + options.seconds - RESERVE_S):
        return _run(options, wanted, architecture)


def _run(options: argparse.Namespace, wanted: Sequence[Suite], architecture: int) -> int:
    for variable in ("HCMEN_CUDA_LIBRARY", "HCMEN_PROBE"):
        os.environ.pop(variable, None)
    find_more(os.environ)
    paths = [str(lay_out(options.folder / "site")), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    state = State(None if options.prepare else options.out, options.folder, describe())
    prepare(options, state, architecture)
    if options.prepare:
        named = os.environ.get("HCMEN_CUDA_LIBRARY", "")
        say(f"export PYTHONPATH={os.pathsep.join(paths[:2])} HCMEN_CUDA_LIBRARY={named}")
        return 0 if library() is None else 1
    run(wanted, state)
    state.results = {name: state.results[name] for name in ("build", "probe", *(s.name for s in wanted))}
    state.write(complete=not STOP.number)
    failed, skipped = state.named(FAILED), state.named(SKIPPED)
    for name in failed:
        say(f"\n--- {name} ---\n{state.results[name].get('output_tail', '')}", error=True)
    passed = len(state.results) - len(failed) - len(skipped)
    counts = f"{passed} passed, {len(failed)} failed, {len(skipped)} skipped"
    say(f"\n{table(state.results)}\n\n{counts}: {options.out / 'gpu.json'}")
    if STOP.number:
        return 128 + STOP.number
    return 1 if failed or state.problem else 0


if __name__ == "__main__":
    sys.exit(main())
