"""One table of cases on every host of the operators, against float64: helpers/op_cases.py has both.

    reference          `selective_scan_ref` and `causal_conv1d_ref`, themselves in float64
    pytorch            the C++ kernels, called from PyTorch
    onnxruntime        the same as operators of ONNX Runtime, on one thread and on two
    functions          ONNX Runtime without the library: the model-local functions
    cuda               the CUDA kernels, run on the host (helpers/emulated.py)
    onnxruntime-cuda   the same as operators of ONNX Runtime
    plugin             the TensorRT plugins over the C++ kernels; with its headers (helpers/trt_wheels.py)
    plugin-cuda        the TensorRT plugins over the CUDA kernels, run on the host
    plugin-gpu         libhcmen_trt.so on a GPU

A new operator, attribute or host begins here: a case in the table, or a function that computes one.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from helpers import emulated, trt_program
from helpers.dual_cases import DUALS, DualCase, dual_arrays, dual_model_of, dual_oracle, grouped
from helpers.op_cases import (
    CONVS,
    SCANS,
    Arrays,
    ConvCase,
    ScanCase,
    assert_near,
    conv_arrays,
    conv_oracle,
    model_of,
    scan_arrays,
    scan_oracle,
)
from helpers.trt_program import INCLUDES, Build
from helpers.trt_wheels import NO_HEADERS

from hcmen.base.library import library_path
from hcmen.mamba import scan
from hcmen.mamba.functions import add_functions

Case = ScanCase | ConvCase | DualCase
Run = Callable[[Case, Arrays], list[np.ndarray]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are small, and threads only slow torch down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- the hosts --------------------------------------------------------------------------------------------------------


def by_pytorch(name: str, dtype: type | None = None) -> Run:
    """The functions that models call, by one implementation, perhaps in another type."""

    def run(case: Case, arrays: Arrays) -> list[np.ndarray]:
        tensors = {key: torch.from_numpy(x if dtype is None else x.astype(dtype)) for key, x in arrays.items()}
        with scan.implementation(name):
            if isinstance(case, ConvCase):
                flags: dict[str, Any] = {"activation": case.activation, "reverse": case.reverse}
                if not case.stateful:
                    return [scan.causal_conv1d(**tensors, **flags).numpy()]
                return [x.numpy() for x in scan.causal_conv1d(**tensors, **flags, return_last_state=True)]
            if isinstance(case, DualCase):
                found = scan.state_space_dual(**grouped(tensors), **case.flags, return_last_state=True)
                return [x.numpy() for x in found]
            flags = {"delta_softplus": case.softplus, "reverse": case.reverse}
            return [x.numpy() for x in scan.selective_scan(**tensors, **flags, return_last_state=True)]

    return run


def by_onnxruntime(library: Path | None, threads: tuple[int, ...] = (1,), body: str = "scan") -> Run:
    """One node, on so many threads, which all give the same bits; None: by its model-local function, of that body."""

    def run(case: Case, arrays: Arrays) -> list[np.ndarray]:
        make = dual_model_of if isinstance(case, DualCase) else model_of
        model, found = make(case, functions=library is None), []
        data = (add_functions(model, body) if library is None else model).SerializeToString()
        for count in threads:
            options = ort.SessionOptions()
            options.log_severity_level = 3
            options.intra_op_num_threads = count
            if library is not None:
                options.register_custom_ops_library(str(library))
            session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
            found.append(session.run(None, arrays))
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                np.testing.assert_array_equal(a, b)
        return found[0]

    return run


def by_cuda() -> Run:
    kernels = emulated.Kernels(emulated.kernels_library())

    def run(case: Case, arrays: Arrays) -> list[np.ndarray]:
        if isinstance(case, DualCase):
            return list(kernels.dual(case, arrays))
        return list(kernels.conv(case, arrays) if isinstance(case, ConvCase) else kernels.scan(case, arrays))

    return run


def by_onnxruntime_cuda() -> Run:
    return by_onnxruntime(emulated.operators_library('-DHCMEN_ORT_PROVIDER="CPUExecutionProvider"'))


@functools.cache
def plugins(host: str) -> tuple[Build, Path, str]:
    """What calls the plugins, a library of them, and how it is called."""
    built = trt_program.build(INCLUDES[-1], "trt")
    if host == "plugin":
        return built, built.host, "enqueue-host"
    if host == "plugin-cuda":
        return built, trt_program.emulated_plugins(built), "enqueue-emulated"
    if built.cuda is None:
        pytest.skip("libhcmen_trt.so is not built: there is no CUDA compiler")
    return built, built.cuda, "enqueue-gpu"


def by_plugin(host: str, folder: Path) -> Run:
    """All cases of the table at once, which are then looked up."""
    cases: list[Case] = [case for case in (*SCANS, *CONVS, *DUALS) if takes(host, case)]
    found = trt_program.enqueue(*plugins(host), [(case, case) for case in cases], folder)
    results = dict(zip(cases, found, strict=True))
    return lambda case, arrays: results[case]


HOSTS: dict[str, Callable[[Path], Run]] = {
    "reference": lambda folder: by_pytorch("ref", np.float64),
    "pytorch": lambda folder: by_pytorch("native"),
    "onnxruntime": lambda folder: by_onnxruntime(library_path(), (1, 2)),
    "functions": lambda folder: by_onnxruntime(None),
    "blocks": lambda folder: by_onnxruntime(None, body="blocks"),
    "cuda": lambda folder: by_cuda(),
    "onnxruntime-cuda": lambda folder: by_onnxruntime_cuda(),
    **{name: functools.partial(by_plugin, name) for name in ("plugin", "plugin-cuda", "plugin-gpu")},
}
# Run on the host, thread after thread.
SLOW = ("cuda", "onnxruntime-cuda", "plugin-cuda")


def takes(host: str, case: Case) -> bool:
    """Whether `case` is one for `host`: it may be too slow for it, or say nothing new."""
    if host in SLOW and isinstance(case, DualCase):
        return case.time * case.channel * case.state <= 10_000
    if host in SLOW:
        return case.time * case.channel <= 300
    if host == "reference" and case.dtype != "float32":
        return False
    # PyTorch and ONNX Runtime meet the large ones; the plugins pass on what they are given.
    return host in ("pytorch", "onnxruntime", "functions", "blocks") or case.time * case.channel <= 10_000


@functools.cache
def missing(host: str) -> str | None:
    """Why there is no such host here."""
    if host in SLOW and emulated.compiler() is None:
        return "there is no C++ compiler"
    if host.startswith("plugin") and sys.platform != "linux":
        return "the plugins are for Linux"
    if host.startswith("plugin") and not INCLUDES:
        return NO_HEADERS
    if host == "plugin-gpu" and not trt_program.has_gpu():
        return "there is no NVIDIA GPU: python tests/gpu/run.py on a machine with one"
    return None


needs_host = {host: pytest.mark.skipif(missing(host) is not None, reason=str(missing(host))) for host in HOSTS}


@pytest.mark.parametrize("host", [pytest.param(host, marks=needs_host[host]) for host in HOSTS])
def test_a_host_that_is_not_here_is_told_once(host: str) -> None:
    assert missing(host) is None


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """name -> what computes a case there, made when it is first asked for."""

    @functools.cache
    def host(name: str) -> Run:
        return HOSTS[name](tmp_path_factory.mktemp(name))

    return host


@functools.lru_cache(maxsize=1)
def truth(case: Case) -> tuple[Arrays, list[np.ndarray]]:
    """Inputs and outputs of `case`; the hosts take turns, so one is remembered."""
    if isinstance(case, DualCase):
        arrays = dual_arrays(case)
        return arrays, list(dual_oracle(case, arrays))
    if isinstance(case, ConvCase):
        arrays = conv_arrays(case)
        return arrays, list(conv_oracle(case, arrays))
    arrays = scan_arrays(case)
    return arrays, list(scan_oracle(case, arrays))


def check(host: str, run: Run, case: Case) -> None:
    arrays, want = truth(case)
    got = run(case, arrays)
    assert len(got) >= (2 if case.stateful else 1)
    for name, g, w in zip(("y", "last_state"), got, want, strict=False):
        if w.size == 0:
            continue
        if host == "reference":
            np.testing.assert_allclose(g, w, rtol=1e-11, atol=1e-11, err_msg=name)
        else:
            assert g.dtype == (case.dtype if name == "y" else "float32")
            # Where the terms of a sum cancel out, its error is that of the terms. Those of y are of the order of 1.
            assert_near(name, g, w, 1e-6, least=1.0)


@pytest.mark.timeout(900)  # of a host's first case, before which it may be built
@pytest.mark.parametrize(
    ("case", "host"),
    [
        pytest.param(case, host, id=f"{host}-{case}")
        for case in (*SCANS, *CONVS, *DUALS)
        for host in HOSTS
        if takes(host, case) and missing(host) is None
    ],
)
def test_numbers(hosts: Callable[[str], Run], case: Case, host: str) -> None:
    check(host, hosts(host), case)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "host", [pytest.param(host, marks=needs_host[host]) for host in HOSTS if host.startswith("plugin")]
)
def test_a_workspace_for_the_largest_sizes_serves_smaller_ones(host: str, tmp_path: Path) -> None:
    """One context runs any sizes up to its profile's largest, in memory for those."""
    largest = ScanCase(5, 12, 6, 5, None)
    cases = [(ScanCase(b, t, 6, 5, None), largest) for b in range(1, 6) for t in range(1, 13)]
    if host == "plugin":
        # More than the plugin's budget, by the plan of the host kernels.
        wide = ScanCase(1, 6, 2048, 5, None, gated=False)
        cases.append((wide, wide))
    else:
        # Long enough, and few enough channels, to be cut into chunks of time, in a workspace for more than that.
        largest = ScanCase(16, 5001, 64, 16, None) if host == "plugin-gpu" else ScanCase(2, 1100, 3, 2, None)
        sizes = [(b, t) for b in (1, 2, largest.batch) for t in (300, 1024, largest.time)]
        cases += [(ScanCase(b, t, largest.channel, largest.state, None, reverse=True), largest) for b, t in sizes]
    # The dual is cut from 65 steps on; here D has either of its ranks.
    most = DualCase(3, 150, 2, 3, 5, 2)
    cases += [(replace(most, batch=b, time=t, wide=b == 2), most) for b in (1, 2, 3) for t in (1, 65, 150)]
    for (case, _), got in zip(cases, trt_program.enqueue(*plugins(host), cases, tmp_path), strict=True):
        for name, g, w in zip(("y", "last_state"), got, truth(case)[1], strict=True):
            assert_near(f"{name} of {case}", g, w, 1e-6, least=1.0)


@pytest.mark.parametrize("isa", ["avx2", "baseline", "neon"])
def test_other_instruction_sets(isa: str) -> None:
    """The table on the C++ kernels of a lower level."""
    environment = {**os.environ, "HCMEN_ISA": isa}
    name = "from hcmen.base.library import library_isa; print(library_isa())"
    probe = subprocess.run([sys.executable, "-c", name], env=environment, capture_output=True, text=True)
    if probe.returncode != 0:
        assert "cannot run" in probe.stderr or "expected one of" in probe.stderr
        pytest.skip(f"{isa} is not of this processor; `make arm` emulates one with neon")
    assert probe.stdout.strip() == isa
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "import csrc.test_op_hosts as of\n"
        "run, every = of.by_pytorch('native'), (*of.SCANS, *of.CONVS, *of.DUALS)\n"
        "cases = [c for c in every if c.time * c.channel <= 10_000]\n"
        "for case in cases: of.check('pytorch', run, case)\n"
        "print(len(cases))"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert int(result.stdout) > 400
