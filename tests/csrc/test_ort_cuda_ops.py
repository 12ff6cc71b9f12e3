"""The ONNX Runtime operators of libhcmen_ops_cuda.so, as far as a machine without a GPU can have them.

Two builds of runtime/csrc/ort_cuda_ops.cc over the emulated kernels: one under the CPU provider's name, which a real
ONNX Runtime then runs on malformed nodes and on numbers, and one under its own name, whose registration is looked at.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
from helpers import emulated
from helpers.dual_cases import DualCase, assert_dual, dual_arrays, dual_model_of
from helpers.op_cases import ScanCase, assert_scan, scan_arrays
from helpers.ort_registration import check_registration

from hcmen.base.library import library_path
from hcmen.mamba.one_node import scan_model

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="there is no C++ compiler")

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def library() -> Path:
    """Under the name of the CPU provider."""
    return emulated.operators_library('-DHCMEN_ORT_PROVIDER="CPUExecutionProvider"')


@pytest.fixture(scope="module")
def cuda_library() -> Path:
    """Under its own name."""
    return emulated.operators_library()


def session(model: Any, library: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


# --- in a real runtime ----------------------------------------------------------------------------------------------


def test_a_long_sequence_takes_memory_once_and_keeps_it(library):
    """Chunks over blocks need a workspace; a node gets it at the first run that needs so much."""
    control = ctypes.CDLL(str(library))
    control.emulation_launches.restype = ctypes.c_uint64
    run = session(scan_model(4, 4, stateful=True, delta_softplus=True, functions=False), library)
    for time, launches in ((50, 1), (1100, 3), (1100, 3), (2100, 3), (1500, 3)):
        case = ScanCase(1, time, 4, 4, None, gated=False)
        feeds = scan_arrays(case)
        before = control.emulation_launches()
        got = run.run(None, feeds)
        assert control.emulation_launches() - before == launches
        assert_scan(case, feeds, got)
    run = session(dual_model_of(DualCase(1, 4, 1, 3, 4, None, gated=False)), library)
    for time, launches in ((50, 1), (150, 3), (200, 3), (130, 3)):
        dual = DualCase(1, time, 1, 3, 4, None, gated=False)
        feeds = dual_arrays(dual)
        before = control.emulation_launches()
        got = run.run(None, feeds)
        assert control.emulation_launches() - before == launches
        assert_dual(dual, feeds, got)


def test_malformed_nodes_get_the_errors_that_the_cpu_operators_give(library):
    """Word for word, but for states beyond what the CUDA kernels serve."""

    def answers(path: Path) -> dict[str, tuple[str, str]]:
        command = [sys.executable, str(HERE / "ort_cases.py"), "malformed", "--library", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        return {line["case"]: (line["stage"], line["error"]) for line in lines}

    got, want = answers(library), answers(library_path())
    assert len(want) > 30
    assert got == want


def test_random_shapes_never_crash(library):
    command = [sys.executable, str(HERE / "ort_cases.py"), "fuzz", "--library", str(library), "--count", "200"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    outcome = json.loads(done.stdout)
    assert outcome["errors"] > 20
    assert outcome["right"] > 20


def test_more_states_than_the_kernels_serve_are_refused(library):
    feeds = scan_arrays(ScanCase(1, 2, 1, 513, None, gated=False, stateful=False, softplus=False))
    with pytest.raises(Exception, match="SelectiveScan: the kernel refuses these sizes"):
        session(scan_model(1, 513, functions=False), library).run(None, feeds)
    dual = DualCase(1, 2, 1, 1, 513, None)
    with pytest.raises(Exception, match="StateSpaceDual: the kernel refuses these sizes"):
        session(dual_model_of(dual), library).run(None, dual_arrays(dual))


def test_options_hold_one_of_the_two_libraries(cuda_library):
    for first, second in ((cuda_library, library_path()), (library_path(), cuda_library)):
        options = ort.SessionOptions()
        options.register_custom_ops_library(str(first))
        options.register_custom_ops_library(str(first))
        with pytest.raises(Exception, match=f"options hold {first.name} already: .* {second.name}.*, not both"):
            options.register_custom_ops_library(str(second))


def test_without_the_cuda_provider_a_session_says_so(cuda_library):
    with pytest.raises(Exception, match=r"Could not find an implementation for SelectiveScan\(1\)"):
        session(scan_model(4, 4), cuda_library)


# --- what is registered ---------------------------------------------------------------------------------------------


def test_what_is_registered(cuda_library):
    check_registration(cuda_library)
