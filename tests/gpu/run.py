"""Runs everything that needs a GPU, from a checkout, and says by name what was not run and why.

    python3 tests/gpu/run.py                             everything; results in build/gpu/results
    python3 tests/gpu/run.py --seconds 480 --out DIR     what fits the time, in the order of what it teaches
    python3 tests/gpu/run.py --only kernels,ort          some suites
    python3 tests/gpu/run.py --list
    python3 tests/gpu/run.py --prepare                   only build, and print the environment for a program of your own

It needs a compiler, nvcc, PyTorch, ONNX, NumPy, click and pytest, and no installation of this package: a folder of
links stands for it. The kernel library is built here for the device's architecture alone, or taken from --folder where
it was built elsewhere from the same sources. DIR gets gpu.json, written again after every suite, and gpu.log. Suites of
one stage that time nothing run beside each other; a suite that hangs or crashes costs itself alone. Exit code 1 if
anything failed, 3 if there is no CUDA device.

More suites are added to SUITES.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build import ROOT, build, build_probe, device_architecture, find_nvcc

HERE = Path(__file__).resolve().parent
PASSED, FAILED, SKIPPED = "passed", "FAILED", "skipped"
# Where images of GPU machines keep tools that are not on the path.
TOOL_FOLDERS = ("/usr/local/nvidia/bin", "/usr/local/cuda/bin")
MOST_LOG_BYTES = 1 << 20
"""Of one suite's output in gpu.log; the middle goes."""


# --- what a suite may need ------------------------------------------------------------------------------------------


def _module(name: str) -> Callable[[], str | None]:
    """Whether a module is installed, without importing it."""
    return lambda: None if importlib.util.find_spec(name) is not None else f"{name} is not installed"


def _program(name: str) -> Callable[[], str | None]:
    return lambda: None if shutil.which(name) else f"{name} is not on the path"


@functools.cache
def _answers(code: str) -> bool:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).returncode == 0


def _torch_with_cuda() -> str | None:
    if _module("torch")() is not None:
        return "torch is not installed"
    code = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 9)"
    return None if _answers(code) else "PyTorch has no CUDA"


def _ort_with_cuda() -> str | None:
    code = "import onnxruntime, sys; sys.exit('CUDAExecutionProvider' not in onnxruntime.get_available_providers())"
    return None if _answers(code) else "onnxruntime with the CUDA provider (onnxruntime-gpu) is not installed"


def _library() -> str | None:
    return None if "HCMEN_CUDA_LIBRARY" in os.environ else "libhcmen_ops_cuda.so was not built"


# --- the suites -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Suite:
    """A command and what it needs. `tests`: files for pytest, whose cases are counted; or `command`, which passes or
    fails as a whole.

    stage: suites of one stage run beside each other; those that time anything have a stage of their own.
    least_s: with less time left it is not started.
    result: a JSON file that the command writes, which goes into gpu.json whatever becomes of the suite.
    """

    name: str
    what: str
    stage: int
    needs: Sequence[Callable[[], str | None]]
    tests: Sequence[str] = ()
    command: Sequence[str] = ()
    timeout_s: int = 120
    least_s: int = 10
    result: str | None = None


_PYTEST = (_library, _module("pytest"), _module("numpy"), _module("torch"))
_TORCH = (_library, _torch_with_cuda)


def _benchmark(name: str, what: str, stage: int, seconds: int, *arguments: str) -> Suite:
    file = f"{name}.json"
    command = (sys.executable, str(ROOT / "benchmarks" / "scan_cuda.py"), "--out", file)
    command += ("--seconds", str(seconds), *arguments)
    return Suite(name, what, stage, _TORCH, command=command, timeout_s=seconds + 60, least_s=20, result=file)


def _sanitizer(tool: str, what: str) -> Suite:
    needs = (_library, _program("compute-sanitizer"), _module("numpy"))
    command = ("compute-sanitizer", "--error-exitcode", "9", "--tool", tool, sys.executable, str(HERE / "sanitize.py"))
    return Suite(tool, f"compute-sanitizer: {what}", 4, needs, command=command, timeout_s=180)


SUITES = [
    Suite(
        "functions",
        "elementary functions at every float32 against double precision",
        1,
        (lambda: None if "HCMEN_PROBE" in os.environ else "the probe was not built",),
        command=(sys.executable, "-c", "import os; os.execv(os.environ['HCMEN_PROBE'], ['probe'])"),
        timeout_s=60,
    ),
    Suite("kernels", "kernels over the driver alone, the emulation's cases", 1, _PYTEST, ["test_kernels.py"]),
    Suite("autograd", "PyTorch: values, gradients, streams, graphs", 1, (*_PYTEST, *_TORCH), ["test_autograd.py"]),
    _benchmark("scan_float32", "the forward scan in float32, every size", 2, 120, "--dtype", "float32"),
    _benchmark(
        "scan_tune",
        "other ways of sharing out beside the rule's",
        3,
        90,
        "--tune",
        "--batch",
        "1,16",
        "--dtype",
        "float32",
    ),
    _sanitizer("memcheck", "accesses outside arrays"),
    _sanitizer("racecheck", "races in shared memory"),
    _sanitizer("synccheck", "barriers"),
    _sanitizer("initcheck", "reads of memory that nothing wrote"),
    Suite(
        "training",
        "the model and its training on CUDA",
        4,
        (*_PYTEST, *_TORCH),
        ["test_model_on_gpu.py", "test_training_cuda.py"],
    ),
    Suite(
        "ort",
        "ONNX Runtime's CUDA provider, every variant",
        4,
        (*_PYTEST, _module("onnx"), _ort_with_cuda),
        ["test_ort_on_gpu.py"],
    ),
    _benchmark("scan_float16", "the forward scan in float16, every size", 5, 90, "--dtype", "float16"),
    _benchmark("scan_backward", "gradients in float32", 6, 90, "--backward", "--dtype", "float32"),
    Suite(
        "tensorrt",
        "TensorRT engines: built, held to the eager model, run",
        7,
        (*_PYTEST, _module("onnx"), _module("tensorrt")),
        ["test_tensorrt.py"],
        timeout_s=3600,
        least_s=60,
    ),
]


class Running:
    """A suite in a process group of its own, its output in a file."""

    def __init__(self, suite: Suite, folder: Path, environment: Mapping[str, str], seconds: float, workers: int):
        self.suite, self.folder, self.seconds = suite, folder, min(seconds, suite.timeout_s)
        self.report, self.log = folder / f"{suite.name}.xml", folder / f"{suite.name}.log"
        for old in (self.report, *([folder / suite.result] if suite.result else [])):
            old.unlink(missing_ok=True)
        command = list(suite.command)
        if suite.tests:
            files = [str(HERE / name) for name in suite.tests]
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={self.report}"]
            if workers > 1 and importlib.util.find_spec("xdist") is not None:
                command += ["-n", str(workers)]
            command += files
        self.started = time.monotonic()
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**environment, "PYTHONUNBUFFERED": "1"},
                cwd=folder,  # in the checkout itself, its folder `hcmen` would come first
                start_new_session=True,
            )

    def wait(self) -> dict[str, Any]:
        """What became of it: status, counts, seconds, its own result, and the end of its output if it failed."""
        hung = False
        try:
            self.process.wait(max(0.0, self.started + self.seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            hung = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        result: dict[str, Any] = {"seconds": round(time.monotonic() - self.started, 1)}
        output = self.log.read_bytes().decode(errors="replace")
        counted = _counts(self.report) if self.suite.tests else None
        if counted is not None:
            result |= counted
            if code == 0 and counted["passed"] == 0:
                return {**result, "status": SKIPPED, "reason": "every case was skipped: see its log"}
        written = self.folder / self.suite.result if self.suite.result else None
        if written is not None and written.exists():
            result["result"] = _json(written.read_text())
        elif self.suite.name == "functions":
            result["result"] = _json(output)
        result["status"] = PASSED if code == 0 else FAILED
        if hung:
            result["reason"] = f"stopped after {self.seconds:.0f} s"
        elif code < 0:
            result["reason"] = f"ended by {signal.Signals(-code).name}"
        if code != 0:
            result["output_tail"] = output[-3000:]
        return result


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _counts(report: Path) -> dict[str, int] | None:
    """Cases that passed, failed and were not run, from pytest's report; None where there is none or half of one."""
    try:
        cases = [c.attrib for c in ElementTree.parse(report).getroot().iter("testsuite")]
    except (OSError, ElementTree.ParseError):
        return None
    tests, failures, errors, skipped = (
        sum(int(c.get(k, 0)) for c in cases) for k in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    return {"passed": tests - failed - skipped, "failed": failed, "not_run": skipped}


def run_stage(
    suites: Sequence[Suite], folder: Path, environment: Mapping[str, str], left: Callable[[], float]
) -> dict[str, dict[str, Any]]:
    """Runs suites beside each other and gives what became of each, in their order. left: seconds until all must end."""
    results: dict[str, dict[str, Any]] = {}
    running: list[Running] = []
    with_cases = sum(1 for s in suites if s.tests)
    for suite in suites:
        reason = next((r for need in suite.needs if (r := need()) is not None), None)
        if reason is None and left() < suite.least_s:
            reason = f"{left():.0f} s are left, it takes at least {suite.least_s}"
        if reason is not None:
            results[suite.name] = {"status": SKIPPED, "reason": reason}
            continue
        workers = max(1, min(8, (os.cpu_count() or 1) // (2 * max(1, with_cases))))
        running.append(Running(suite, folder, environment, left(), workers))
    for one in running:
        results[one.suite.name] = one.wait()
    return {s.name: results[s.name] for s in suites}


# --- the machine ----------------------------------------------------------------------------------------------------


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
        found["devices"] = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()
    nvcc = find_nvcc()
    if nvcc:
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        found["nvcc"] = version.split("release ")[-1][:12]
    found["versions"] = {}
    for package in ("torch", "onnxruntime-gpu", "onnxruntime", "onnx", "numpy", "mamba-ssm", "tensorrt"):
        try:
            found["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per suite."""
    lines = []
    for name, r in results.items():
        counts = f"{r['passed']} passed, {r['failed']} failed, {r['not_run']} skipped" if "passed" in r else ""
        detail = ", ".join(part for part in (counts, r.get("reason")) if part)
        lines.append(f"{r['status']:<8} {name:<14} {r.get('seconds', ''):>7}  {detail}")
    return "\n".join(lines)


def _write(out: Path, results: Mapping[str, Mapping[str, Any]], machine: Mapping[str, Any], log: str) -> None:
    """gpu.json and gpu.log whole, so that whatever stops this run leaves the last suite's state."""
    failed = [name for name, r in results.items() if r["status"] == FAILED]
    data = {"schema_version": 2, "machine": machine, "passed": not failed, "suites": results}
    for name, text in (("gpu.json", json.dumps(data, indent=1) + "\n"), ("gpu.log", log)):
        part = out / f"{name}.part"
        part.write_text(text)
        part.replace(out / name)


def _cut(text: str) -> str:
    if len(text) <= MOST_LOG_BYTES:
        return text
    half = MOST_LOG_BYTES // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="names of suites, with commas between them")
    parser.add_argument("--list", action="store_true", help="name the suites and leave")
    parser.add_argument("--prepare", action="store_true", help="build the library, print the environment, and leave")
    parser.add_argument("--seconds", type=float, default=3600.0, help="time for everything, the build included")
    parser.add_argument("--out", type=Path, help="for gpu.json and gpu.log; by default results/ in --folder")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "gpu", help="for the library, links and logs")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(f"{s.name:<14} {s.what}" for s in SUITES))
        return 0
    options.folder = options.folder.resolve()
    out: Path = (options.out or options.folder / "results").resolve()
    names = [s.name for s in SUITES]
    wanted = options.only.split(",") if options.only else names
    unknown = [n for n in wanted if n not in names]
    if unknown:
        parser.error(f"no suite '{unknown[0]}': choose from {', '.join(names)}")
    started = time.monotonic()
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), *TOOL_FOLDERS])
    architecture = device_architecture()
    if architecture is None:
        print("the driver shows no CUDA device: nothing was run", file=sys.stderr)
        return 3

    def left() -> float:
        return float(options.seconds - (time.monotonic() - started))

    options.folder.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    for variable in ("HCMEN_CUDA_LIBRARY", "HCMEN_PROBE"):
        os.environ.pop(variable, None)
    try:
        library, kernels = build(options.folder, [architecture], jobs=os.cpu_count() or 2, strict=False)
        os.environ["HCMEN_CUDA_LIBRARY"] = str(library)
        on_stack = [k.name for k in kernels if k.spill_bytes or k.stack_bytes]
        results["build"] = {"status": PASSED, "kernels": len(kernels), "spilled_or_on_the_stack": on_stack}
        os.environ["HCMEN_PROBE"] = str(build_probe(options.folder, architecture))
    except RuntimeError as error:
        results["build"] = {"status": FAILED, "output_tail": str(error)[-3000:]}
    results["build"]["seconds"] = round(time.monotonic() - started, 1)
    print(table({"build": results["build"]}), flush=True)

    paths = [str(lay_out(options.folder / "site")), str(ROOT / "tests")]
    if options.prepare:
        print(
            f"export PYTHONPATH={os.pathsep.join(paths)} HCMEN_CUDA_LIBRARY={os.environ.get('HCMEN_CUDA_LIBRARY', '')}"
        )
        return 0 if "HCMEN_CUDA_LIBRARY" in os.environ else 1
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    machine, log = describe(), ""
    _write(out, results, machine, log)
    for stage in sorted({s.stage for s in SUITES if s.name in wanted}):
        suites = [s for s in SUITES if s.stage == stage and s.name in wanted]
        done = run_stage(suites, options.folder, environment, left)
        results |= done
        print(table(done), flush=True)
        for name, result in done.items():
            if "seconds" in result:
                text = (options.folder / f"{name}.log").read_bytes().decode(errors="replace")
                log += f"=== {name} ===\n{_cut(text)}\n"
        _write(out, results, machine, log)

    failed = [name for name, r in results.items() if r["status"] == FAILED]
    skipped = [name for name, r in results.items() if r["status"] == SKIPPED]
    for name in failed:
        print(f"\n--- {name} ---\n{results[name].get('output_tail', '')}", file=sys.stderr, flush=True)
    passed = len(results) - len(failed) - len(skipped)
    print(f"\n{table(results)}\n\n{passed} passed, {len(failed)} failed, {len(skipped)} skipped: {out / 'gpu.json'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
