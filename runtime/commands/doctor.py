"""`hcmen-doctor`: what is installed and what works, by running it; one line on how to mend each failure.

Each op runs for real, once on the kernel library and once through its function of standard ops, and its numbers are
compared with NumPy's: that a file exists proves nothing.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import hcmen
from hcmen.base.console import Console, command, one_line
from hcmen.base.errors import BackendError, CheckFailed, HcmenError
from hcmen.base.library import install_advice
from hcmen.base.shipped import chosen_bundle
from hcmen.base.tables import folded, screen_width
from hcmen.runtime.backends import Ort, OrtCuda
from hcmen.runtime.commands.doctor_rows import FAILED, INFO, OK, SKIPPED, Row, failed
from hcmen.runtime.commands.model import time_limit_option, trust_engines_option

if TYPE_CHECKING:
    from hcmen.base.bundle import Bundle

__all__ = ["check_machine", "main"]

# Distributions that all install the package `onnxruntime`, each over the files of the other.
_ORT_DISTRIBUTIONS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "onnxruntime-directml",
    "onnxruntime-training",
    "ort-nightly",
)
_DETAILS_BESIDE = 100
"""So many columns let the details stand beside the names."""
_INSTRUCTION_SETS = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "neon",
    "asimd",
    "asimddp",
    "sve",
)


@command("hcmen-doctor", examples=("hcmen-doctor", "hcmen-doctor --bundle build/bundle --format json"))
@click.option(
    "--bundle", help="A bundle to verify and self-test.  [default: build/bundle if it is there, else the demo's]"
)
@time_limit_option
@trust_engines_option()
def main(console: Console, bundle: str | None, trust_engines: bool, time_limit: float | None) -> None:
    """Checks this machine: what is installed and what works. Exit code 1 if anything failed."""
    rows = []
    with console.progress("checking", 28, "rows") as bar:
        for row in check_machine(bundle, console.note, trust_engines=trust_engines, time_limit=time_limit):
            rows.append(row)
            bar.advance()
    failed = [r for r in rows if r.status == FAILED]
    data = {
        "passed": not failed,
        "rows": [{"name": r.name, "status": r.status.lower(), "detail": r.detail, "fix": r.fix} for r in rows],
    }
    console.emit(data, _table(rows, screen_width()))
    if failed:
        raise CheckFailed(f"{len(failed)} of {len(rows)} checks failed: {', '.join(r.name for r in failed)}")


def check_machine(
    bundle: str | None = None,
    note: Callable[[str], None] = lambda _: None,
    *,
    trust_engines: bool = False,
    time_limit: float | None = None,
) -> Iterator[Row]:
    """All findings, in the order in which one may be the cause of the next.

    Args:
        bundle: a bundle that must be sound; None takes build/bundle, or else the demo's, and tells `note`.
        trust_engines: run engines of others too.
        time_limit: seconds of each load and run of its graphs.
    """
    path = os.fspath(chosen_bundle(bundle, note))
    version = platform.python_version()
    python_ok = sys.version_info >= (3, 10)
    yield Row("python", OK if python_ok else FAILED, f"{version}, {sys.executable}", "" if python_ok else "use 3.10+")
    yield Row("hcmen", INFO, f"{hcmen.__version__}, {Path(hcmen.__file__).resolve().parent}")
    yield Row("system", INFO, f"{platform.system()} {platform.release()} {platform.machine()}, {_libc()}")
    yield Row("cpu", INFO, _cpu())
    yield Row("memory", INFO, _memory())
    yield _attempt("numpy", _numpy, "pip install 'numpy>=1.24'")
    ort = _onnxruntime()
    yield ort
    library = _attempt("kernel library", _library, install_advice("reinstall hcmen with a C++17 compiler present"))
    yield library
    if ort.status == FAILED:
        for op in _OPS:
            yield Row(f"{op}, function", SKIPPED, "needs onnxruntime")
            yield Row(f"{op}, kernel", SKIPPED, "needs onnxruntime")
    else:
        for op, check in _OPS.items():
            yield _attempt(
                f"{op}, function", partial(check, None), install_advice("pip install --force-reinstall hcmen")
            )
            if library.status == OK:
                fix = install_advice("reinstall hcmen on this machine")
                if platform.machine() == "x86_64":
                    fix += "; HCMEN_ISA=baseline shows whether the instruction set is the cause"
                yield _attempt(f"{op}, kernel", partial(check, _library_path()), fix)
            else:
                yield Row(f"{op}, kernel", SKIPPED, "needs the kernel library")
    yield from _cuda()
    if bundle is None and not os.path.lexists(path):
        yield Row("bundle", INFO, f"none at {path}; name one with --bundle")
    else:
        yield _bundle(path, time_limit, can_run=ort.status == OK)
    from hcmen.runtime.commands.doctor_tensorrt import tensorrt_rows

    yield from tensorrt_rows(path if os.path.isdir(path) else None, trust=trust_engines)
    torch = find_spec("torch") is not None
    torch_version = _version("torch") if torch else None
    what = f"{torch_version or 'installed'}, for hcmen-train, hcmen-export and --check" if torch else "not installed"
    yield Row("torch", INFO, what + ("" if torch else "; scoring does not need it"))
    tokenizers = _version("tokenizers")
    yield Row("tokenizers", INFO, f"{tokenizers or 'not installed'}, for raw words to a bundle with a text encoder")


def _cuda() -> Iterator[Row]:
    """The backend ort-cuda. A machine without it is sound: what is absent is told, what is there and broken fails."""
    from hcmen.base import cuda_library
    from hcmen.runtime.backends.cuda_device import describe_devices

    problem = cuda_library.device_problem()
    yield Row("cuda device", INFO if problem else OK, problem or describe_devices())
    provider = find_spec("onnxruntime") is not None and _has_cuda_provider()
    yield Row("cuda provider", OK if provider else INFO, "in onnxruntime" if provider else "not in onnxruntime")
    try:
        path: Path | None = cuda_library.cuda_library_path()
    except HcmenError as error:
        path = None
        if isinstance(error, BackendError) and not os.environ.get(cuda_library.VARIABLE):
            yield Row("cuda kernels", INFO, f"not built: {one_line(error)}")
        else:
            yield failed("cuda kernels", error, "name a library that nobody else can write: docs/cuda.md")
    else:

        def load() -> str:
            library = cuda_library.load_cuda_library()
            if not problem:
                cuda_library.call(library, "warm")
            return f"version {library.hcmen_cuda_ops_version()}, {path}"

        yield _attempt("cuda kernels", load, "build libhcmen_ops_cuda.so again: docs/cuda.md")
    missing = [what for what, there in (("a device", not problem), ("the provider", provider)) if not there]
    missing += [] if path else ["the kernels"]
    if missing or path is None:
        yield Row("SelectiveScan, cuda", SKIPPED, f"needs {' and '.join(missing)}")
    else:
        fix = "docs/cuda.md; CUDA and cuDNN must be the versions that onnxruntime-gpu was built for"
        yield _attempt("SelectiveScan, cuda", partial(_check_cuda_scan, path), fix)


def _has_cuda_provider() -> bool:
    from hcmen.runtime.backends.ort import import_onnxruntime

    try:
        return "CUDAExecutionProvider" in import_onnxruntime().get_available_providers()
    except HcmenError:
        return False  # the row of onnxruntime says why


def _check_cuda_scan(library: Path) -> str:
    """The one-node model through the backend, as a bundle's graphs run."""
    import numpy as np

    from hcmen.base.selfcheck import MODEL, TOLERANCE, selective_scan_numpy, selfcheck_inputs
    from hcmen.runtime.backends.ort_cuda import OrtCudaBackend

    backend = OrtCudaBackend(OrtCuda(threads=1))
    session = backend.session(MODEL.read_bytes(), np.zeros(0, np.uint8), "weights.bin", "the one-node model")
    inputs: dict[str, Any] = selfcheck_inputs()
    got = session.run(inputs)
    expected = selective_scan_numpy(**inputs, delta_softplus=True)
    off = max(
        float(np.abs(got[name] - want).max() / np.abs(want).max())
        for name, want in zip(("y", "last_state"), expected, strict=True)
    )
    if not off <= TOLERANCE:
        raise CheckFailed(f"off by {off:.1e} of the largest output, expected {TOLERANCE:.0e} or less, with {library}")
    return f"largest error {off:.1e} of the largest output"


def _table(rows: list[Row], screen: int | None) -> str:
    width = max(len(r.name) for r in rows)
    colors = {OK: "green", FAILED: "red", INFO: "cyan", SKIPPED: "yellow"}
    # On a narrow screen details stand below the names rather than in a narrow column.
    below = screen is not None and screen < _DETAILS_BESIDE
    indent = " " * (4 if below else 7 + 2 + width + 2)
    lines = []
    for r in rows:
        detail = r.detail.removesuffix(f": {r.fix}") if r.fix else r.detail
        texts = [detail, *([f"fix: {r.fix}"] if r.fix else [])]
        details = [indent + part for text in texts for part in folded(text, screen and screen - len(indent))]
        head = f"{r.status:7}  {r.name:{width}}  "
        first = head.rstrip() if below else head + details.pop(0).removeprefix(indent)
        lines += [click.style(first[:7], fg=colors[r.status]) + first[7:], *details]
    counts = ", ".join(f"{sum(r.status == s for r in rows)} {s}" for s in (OK, FAILED, SKIPPED))
    return "\n".join([*lines, "", counts])


def _attempt(name: str, check: Callable[[], str], fix: str) -> Row:
    """The row of a check that returns its detail, or raises."""
    try:
        return Row(name, OK, check())
    except Exception as error:  # a doctor reports what it finds, whatever it is
        return failed(name, error, fix)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _libc() -> str:
    name, version = platform.libc_ver()
    return f"{name} {version}" if name else "unknown C library"


def _cpu() -> str:
    from hcmen.runtime.backends.ort import physical_cores

    model, flags = platform.processor() or platform.machine(), set()
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
        found = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
        model = found[1] if found else model
        flags = set(" ".join(re.findall(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.M)[:1]).split())
    except OSError:
        pass
    known = [f for f in _INSTRUCTION_SETS if f in flags]
    return f"{model}, {physical_cores()} usable cores, {' '.join(known) or 'instruction sets unknown'}"


def _memory() -> str:
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return f"{pages / 2**30:.1f} GiB"
    sizes = {k: int(v) for k, v in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.M)}
    return f"{sizes.get('MemTotal', 0) / 2**20:.1f} GiB, {sizes.get('MemAvailable', 0) / 2**20:.1f} GiB available"


def _numpy() -> str:
    import numpy as np

    return str(np.__version__)


def _onnxruntime() -> Row:
    name = "onnxruntime"
    installed = [(d, v) for d in _ORT_DISTRIBUTIONS if (v := _version(d)) is not None]
    if len(installed) > 1:
        both = " and ".join(f"{d} {v}" for d, v in installed)
        remove = " ".join(d for d, _ in installed)
        fix = f"pip uninstall -y {remove}, then pip install 'hcmen[cpu]'"
        return Row(name, FAILED, f"{both} are both installed and overwrite each other's files", fix)

    def check() -> str:
        from hcmen.runtime.backends.ort import OrtBackend

        backend = OrtBackend(Ort(threads=1), library=False)
        return f"{backend.version} ({installed[0][0] if installed else 'no package record'}), {backend.providers}"

    return _attempt(name, check, "pip install 'hcmen[cpu]'")


def _library_path() -> Path:
    from hcmen.base.library import library_path

    return library_path()


def _library() -> str:
    from hcmen.base.library import LIBRARY_VERSION, library_isa

    path = _library_path()
    isa = library_isa()
    return f"version {LIBRARY_VERSION}, {isa} kernels, {path.stat().st_size / 1024:.0f} KiB, {path}"


def _check_scan(library: Path | None) -> str:
    from hcmen.base.selfcheck import run_selfcheck

    check = run_selfcheck(library)
    return f"ran as {_ran(check.operators)}, largest error {check.error:.1e} of the largest output"


def _check_conv(library: Path | None) -> str:
    import numpy as np

    from hcmen.base.selfcheck import CONV_MODEL

    rng = np.random.default_rng(0)
    sizes = {"x": (2, 9, 8), "weight": (8, 4), "bias": (8,), "initial_state": (2, 3, 8)}
    inputs = {key: rng.normal(size=shape).astype(np.float32) for key, shape in sizes.items()}
    return _compared("CausalConv1d", CONV_MODEL, inputs, causal_conv1d_numpy(**inputs), library)


def _check_dual(library: Path | None) -> str:
    from hcmen.base.selfcheck import DUAL_MODEL, dual_inputs, state_space_dual_numpy

    inputs = dual_inputs()
    return _compared("StateSpaceDual", DUAL_MODEL, inputs, state_space_dual_numpy(**inputs), library)


def _compared(op: str, model: Path, inputs: dict[str, Any], expected: Sequence[Any], library: Path | None) -> str:
    """What to say of a one-node model that gives what is expected."""
    import numpy as np

    from hcmen.base.selfcheck import TOLERANCE, operators_run
    from hcmen.runtime.backends.ort import import_onnxruntime

    try:
        got, operators = operators_run(import_onnxruntime(), model.read_bytes(), inputs, library)
    except HcmenError:
        raise
    except Exception as error:
        raise BackendError(f"the one-node model does not run: {one_line(error)[:300]}") from error
    off = max(float(np.abs(g - want).max() / np.abs(want).max()) for g, want in zip(got, expected, strict=True))
    if not off <= TOLERANCE:
        raise CheckFailed(f"off by {off:.1e} of the largest output, expected {TOLERANCE:.0e} or less")
    if library is not None and op not in operators:
        raise CheckFailed(f"{library} was registered and its kernel did not run: {_ran(tuple(operators))} ran instead")
    return f"ran as {_ran(tuple(operators))}, largest error {off:.1e} of the largest output"


def causal_conv1d_numpy(x: Any, weight: Any, bias: Any, initial_state: Any) -> Any:
    """The causal convolution with silu in float64: y[t] = silu(bias + sum_k weight[k] x[t - width + 1 + k]).

    x [batch, time, channel], weight [channel, width], bias [channel]; initial_state [batch, width - 1, channel] is what
    lies before the first step. Gives y and the last state.
    """
    import numpy as np

    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    series = np.concatenate([initial_state, x], axis=1)
    y = bias + sum(series[:, k : k + x.shape[1]] * weight[:, k] for k in range(weight.shape[1]))
    return y / (1.0 + np.exp(-y)), series[:, x.shape[1] :]


_OPS: dict[str, Callable[[Path | None], str]] = {
    "SelectiveScan": _check_scan,
    "CausalConv1d": _check_conv,
    "StateSpaceDual": _check_dual,
}


def _ran(operators: tuple[str, ...]) -> str:
    return f"{operators[0]}" if len(operators) == 1 else f"{len(operators)} standard nodes"


def _bundle(path: str, time_limit: float | None, *, can_run: bool) -> Row:
    def check(bundle: Bundle) -> str:
        bundle.verify()
        size = sum(r.bytes for r in bundle.records()) / 2**20
        what = f"{path}: {len(bundle.manifest.variants)} variants, {size:.1f} MiB, every file as listed"
        if not can_run:
            return f"{what}; not run, needs onnxruntime"
        from hcmen.runtime.predictor import Predictor

        tests = list(Predictor(bundle, time_limit=time_limit).self_test())
        failed = [t for t in tests if not t.passed]
        if failed:
            raise CheckFailed(f"{what}; self-test failed for {', '.join(t.variant for t in failed)}")
        worst = max(t.outputs["score"].max_abs or 0.0 for t in tests)
        return f"{what}; self-test passed, largest score error {worst:.1e}"

    try:
        from hcmen.base.bundle import begun_again, read_bundle

        return Row("bundle", OK, begun_again(read_bundle(path), check))
    except CheckFailed as error:
        return failed("bundle", error, "export it again, with this version of hcmen")
    except HcmenError as error:
        return failed("bundle", error, "")
