"""The suites of run.py, in the order of what they teach, and what each of them needs."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from running import HERE, SANITIZER_FOUND, ask

ROOT = HERE.parents[1]


# --- what a suite may need ------------------------------------------------------------------------------------------


def module(name: str) -> Callable[[], str | None]:
    """Whether a module is installed, without importing it."""
    return lambda: None if importlib.util.find_spec(name) is not None else f"{name} is not installed"


def program(name: str) -> Callable[[], str | None]:
    return lambda: None if shutil.which(name) else f"{name} is not on the path"


def variable(name: str, otherwise: str) -> Callable[[], str | None]:
    return lambda: None if name in os.environ else otherwise


@functools.cache
def _answers(code: str, otherwise: str) -> str | None:
    code_and_output = ask([sys.executable, "-c", code], 60)
    if code_and_output is None:
        return "Python did not answer within 60 s"
    return None if code_and_output[0] == 0 else otherwise


def torch_with_cuda() -> str | None:
    if module("torch")() is not None:
        return "torch is not installed"
    return _answers("import torch, sys; sys.exit(0 if torch.cuda.is_available() else 9)", "PyTorch has no CUDA")


def ort_with_cuda() -> str | None:
    code = "import onnxruntime, sys; sys.exit('CUDAExecutionProvider' not in onnxruntime.get_available_providers())"
    return _answers(code, "onnxruntime with the CUDA provider (onnxruntime-gpu) is not installed")


library = variable("HCMEN_CUDA_LIBRARY", "there is no libhcmen_ops_cuda.so")


# --- the suites -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Suite:
    """A command and what it needs. `tests`: files for pytest, whose cases are counted; or `command`, which passes or
    fails as a whole. {seconds} in it becomes the time after which it should begin nothing more.

    stage: suites of one stage run beside each other; those that time anything have a stage of their own.
    timeout_s: the most it gets.
    share: about the seconds that a slow machine takes. A stage's part of the time left is in proportion to it.
    least_s: with less time left it is not started.
    result: a JSON file that the command writes, which goes into gpu.json whatever becomes of the suite.
    refused: where a line of the output matches this, the machine has no way to run it, and it counts as skipped.
    """

    name: str
    what: str
    stage: int
    needs: Sequence[Callable[[], str | None]]
    tests: Sequence[str] = ()
    command: Sequence[str] = ()
    timeout_s: int = 120
    share: int = 60
    least_s: int = 10
    result: str | None = None
    refused: str | None = None


_PYTEST = (library, module("pytest"), module("numpy"), module("torch"))
_TORCH = (library, torch_with_cuda)


def _benchmark(name: str, what: str, stage: int, timeout_s: int, share: int, *arguments: str) -> Suite:
    command = (sys.executable, str(ROOT / "benchmarks" / "scan_cuda.py"), "--out", f"{name}.json")
    command += ("--seconds", "{seconds}", *arguments)
    return Suite(
        name, what, stage, _TORCH, (), command, timeout_s=timeout_s, share=share, least_s=20, result=f"{name}.json"
    )


_SANITIZER_REFUSED = (
    r"=========.*(Device not supported|Detected an unsupported driver version|operation is not supported on the "
    r"current system or device|Sanitizer is unable to initialize its connection)"
)


def _sanitizer(tool: str, what: str) -> Suite:
    needs = (library, program("compute-sanitizer"), module("numpy"))
    command = ("compute-sanitizer", "--error-exitcode", str(SANITIZER_FOUND), "--tool", tool)
    command += (sys.executable, str(HERE / "sanitize.py"), f"{tool}.json")
    return Suite(
        tool,
        f"compute-sanitizer: {what}",
        4,
        needs,
        command=command,
        timeout_s=180,
        result=f"{tool}.json",
        refused=_SANITIZER_REFUSED,
    )


SUITES = [
    Suite(
        "functions",
        "elementary functions at every float32 against double precision",
        1,
        (variable("HCMEN_PROBE", "the probe was not built"),),
        command=(sys.executable, "-c", "import os; os.execv(os.environ['HCMEN_PROBE'], ['probe'])"),
        timeout_s=60,
        result="functions.log",
    ),
    Suite("kernels", "kernels over the driver alone, the emulation's cases", 1, _PYTEST, ["test_kernels.py"]),
    Suite("autograd", "PyTorch: values, gradients, streams, graphs", 1, (*_PYTEST, *_TORCH), ["test_autograd.py"]),
    _benchmark("scan_float32", "the forward scan in float32, every size", 2, 180, 80, "--dtype", "float32"),
    _benchmark(
        "scan_tune",
        "other ways of sharing out beside the rule's",
        3,
        150,
        50,
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
        share=70,
    ),
    Suite(
        "ort",
        "ONNX Runtime's CUDA provider, every variant",
        4,
        (*_PYTEST, module("onnx"), ort_with_cuda),
        ["test_ort_on_gpu.py"],
    ),
    _benchmark("scan_float16", "the forward scan in float16, every size", 5, 150, 60, "--dtype", "float16"),
    _benchmark("scan_backward", "gradients in float32", 6, 150, 40, "--backward", "--dtype", "float32"),
    Suite(
        "tensorrt",
        "TensorRT engines: built, held to the eager model, run",
        7,
        (*_PYTEST, module("onnx"), module("tensorrt")),
        ["test_tensorrt.py"],
        timeout_s=3600,
        share=120,
        least_s=60,
    ),
    Suite(
        "tensorrt-rtx",
        "engines of TensorRT-RTX: built, held to the eager model, run",
        8,
        (*_PYTEST, module("onnx"), module("tensorrt_rtx_bindings")),
        ["test_tensorrt_rtx.py"],
        timeout_s=1800,
        share=120,
        least_s=60,
    ),
]
