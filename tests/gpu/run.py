"""Runs everything that needs a GPU, from a checkout, and says by name what was not run and why.

    python tests/gpu/run.py                       everything; docs/results/gpu.json
    python tests/gpu/run.py --only kernels,ort    some suites
    python tests/gpu/run.py --list
    python tests/gpu/run.py --prepare             only build, and print the environment for a program of your own

It needs a compiler, nvcc, PyTorch, ONNX, NumPy, click and pytest, and no installation of this package: a folder of
links stands for it, and the kernel library is built here. Exit code 1 if anything failed, 3 if there is no CUDA device.

More suites are added to SUITES.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build import ROOT, build, device_architecture, find_nvcc

HERE = Path(__file__).resolve().parent
PASSED, FAILED, SKIPPED = "passed", "FAILED", "skipped"


# --- what a suite may need ------------------------------------------------------------------------------------------


def _module(name: str) -> Callable[[], str | None]:
    def missing() -> str | None:
        done = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True)
        reason = (done.stderr.strip().splitlines() or ["it does not import"])[-1]
        return None if done.returncode == 0 else f"{name}: {reason}"

    return missing


def _program(name: str) -> Callable[[], str | None]:
    return lambda: None if shutil.which(name) else f"{name} is not on the path"


def _torch_with_cuda() -> str | None:
    code = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 9)"
    return (
        None
        if subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
        else "PyTorch has no CUDA"
    )


def _ort_with_cuda() -> str | None:
    code = "import onnxruntime, sys; sys.exit('CUDAExecutionProvider' not in onnxruntime.get_available_providers())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    return None if done.returncode == 0 else "onnxruntime with the CUDA provider (onnxruntime-gpu) is not installed"


def _library() -> str | None:
    return None if "HCMEN_CUDA_LIBRARY" in os.environ else "libhcmen_ops_cuda.so was not built"


# --- the suites -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Suite:
    """A command and what it needs. `tests`: files for pytest, whose cases are counted; or `command`, which passes or
    fails as a whole."""

    name: str
    what: str
    needs: Sequence[Callable[[], str | None]]
    tests: Sequence[str] = ()
    command: Sequence[str] = ()
    timeout_s: int = 600


_PYTEST = (_library, _module("pytest"), _module("numpy"), _module("torch"))
_SANITIZER = ("compute-sanitizer", "--error-exitcode", "9")
SUITES = [
    Suite("kernels", "kernels over the driver alone, the emulation's cases", _PYTEST, ["test_kernels.py"]),
    Suite(
        "autograd", "PyTorch: values, gradients, streams, graphs", (*_PYTEST, _torch_with_cuda), ["test_autograd.py"]
    ),
    Suite(
        "training",
        "the model and its training on CUDA",
        (*_PYTEST, _torch_with_cuda),
        ["test_model_on_gpu.py", "test_training_cuda.py"],
    ),
    Suite(
        "ort",
        "ONNX Runtime's CUDA provider, every variant",
        (*_PYTEST, _module("onnx"), _ort_with_cuda),
        ["test_ort_on_gpu.py"],
    ),
    Suite(
        "tensorrt",
        "TensorRT engines: built, held to the eager model, run",
        (*_PYTEST, _module("onnx"), _module("tensorrt")),
        ["test_tensorrt.py"],
        timeout_s=3600,
    ),
    Suite(
        "benchmark",
        "benchmarks/scan_cuda.py on two sizes, to see that it runs",
        (_library, _torch_with_cuda),
        command=(sys.executable, str(ROOT / "benchmarks" / "scan_cuda.py"), "--quick", "--rounds", "21"),
    ),
    Suite(
        "memcheck",
        "compute-sanitizer: accesses outside arrays",
        (_library, _program("compute-sanitizer"), _module("numpy")),
        command=(*_SANITIZER, "--tool", "memcheck", sys.executable, str(HERE / "sanitize.py")),
    ),
    Suite(
        "racecheck",
        "compute-sanitizer: races in shared memory",
        (_library, _program("compute-sanitizer"), _module("numpy")),
        command=(*_SANITIZER, "--tool", "racecheck", sys.executable, str(HERE / "sanitize.py")),
    ),
    Suite(
        "synccheck",
        "compute-sanitizer: barriers",
        (_library, _program("compute-sanitizer"), _module("numpy")),
        command=(*_SANITIZER, "--tool", "synccheck", sys.executable, str(HERE / "sanitize.py")),
    ),
]


def run_suite(suite: Suite, folder: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """What became of a suite: status, counts, seconds, and the end of its output if it failed."""
    for need in suite.needs:
        reason = need()
        if reason is not None:
            return {"status": SKIPPED, "reason": reason}
    report = folder / f"{suite.name}.xml"
    report.unlink(missing_ok=True)
    command = list(suite.command)
    if suite.tests:
        files = [str(HERE / name) for name in suite.tests]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *files]
    started = time.monotonic()
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            env=dict(environment),
            cwd=folder,  # in the checkout itself, its folder `hcmen` would come first
            timeout=suite.timeout_s,
        )
        output, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired:
        output, code = f"stopped after {suite.timeout_s} s", 124
    result: dict[str, Any] = {"seconds": round(time.monotonic() - started, 1)}
    (folder / f"{suite.name}.log").write_text(output)
    if suite.tests and report.exists():
        cases = ElementTree.parse(report).getroot().iter("testsuite")
        totals = [{k: int(c.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")} for c in cases]
        counts = {k: sum(t[k] for t in totals) for k in ("tests", "failures", "errors", "skipped")}
        result["failed"] = counts["failures"] + counts["errors"]
        result["passed"] = counts["tests"] - result["failed"] - counts["skipped"]
        result["not_run"] = counts["skipped"]
        if code == 0 and result["passed"] == 0:
            return {**result, "status": SKIPPED, "reason": "every case was skipped: see its log"}
    result["status"] = PASSED if code == 0 else FAILED
    if code != 0:
        result["output_tail"] = output[-3000:]
    return result


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
        found["nvcc"] = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout.split("release ")[
            -1
        ][:12]
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
        detail = r.get("reason") or counts
        lines.append(f"{r['status']:<8} {name:<12} {r.get('seconds', ''):>7}  {detail}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="names of suites, with commas between them")
    parser.add_argument("--list", action="store_true", help="name the suites and leave")
    parser.add_argument("--prepare", action="store_true", help="build the library, print the environment, and leave")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "gpu.json")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "gpu", help="for the library, links and logs")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(f"{s.name:<12} {s.what}" for s in SUITES))
        return 0
    options.folder = options.folder.resolve()
    names = [s.name for s in SUITES]
    wanted = options.only.split(",") if options.only else names
    unknown = [n for n in wanted if n not in names]
    if unknown:
        parser.error(f"no suite '{unknown[0]}': choose from {', '.join(names)}")
    architecture = device_architecture()
    if architecture is None:
        print("nvidia-smi shows no CUDA device: nothing was run", file=sys.stderr)
        return 3

    options.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    started = time.monotonic()
    try:
        library, kernels = build(options.folder, [architecture], jobs=os.cpu_count() or 2, strict=False)
        os.environ["HCMEN_CUDA_LIBRARY"] = str(library)
        spilled = [k.name for k in kernels if k.spill_bytes]
        results["build"] = {"status": PASSED, "kernels": len(kernels), "spilled": spilled}
    except RuntimeError as error:
        os.environ.pop("HCMEN_CUDA_LIBRARY", None)
        results["build"] = {"status": FAILED, "output_tail": str(error)[-3000:]}
    results["build"]["seconds"] = round(time.monotonic() - started, 1)
    print(table({"build": results["build"]}), flush=True)

    paths = [str(lay_out(options.folder / "site")), str(ROOT / "tests")]
    if options.prepare:
        library = os.environ.get("HCMEN_CUDA_LIBRARY", "")
        print(f"export PYTHONPATH={os.pathsep.join(paths)} HCMEN_CUDA_LIBRARY={library}")
        return 0 if library else 1
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    for suite in SUITES:
        if suite.name not in wanted:
            continue
        results[suite.name] = run_suite(suite, options.folder, environment)
        print(table({suite.name: results[suite.name]}), flush=True)

    failed = [name for name, r in results.items() if r["status"] == FAILED]
    data = {"schema_version": 1, "machine": describe(), "passed": not failed, "suites": results}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(data, indent=2) + "\n")
    skipped = [name for name, r in results.items() if r["status"] == SKIPPED]
    passed = len(results) - len(failed) - len(skipped)
    print(f"\n{passed} passed, {len(failed)} failed, {len(skipped)} skipped: {options.out}")
    for name in failed:
        print(f"\n--- {name} ---\n{results[name].get('output_tail', '')}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
