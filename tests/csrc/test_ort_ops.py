"""The ONNX Runtime operators: the reference's numbers at awkward sizes, an error for every malformed node, no crash."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from helpers.op_cases import ScanCase, assert_scan, scan_arrays
from helpers.scripts import loaded
from onnx import helper, numpy_helper

from hcmen.base import selfcheck
from hcmen.base.errors import BackendError, CheckFailed
from hcmen.base.library import library_path
from hcmen.base.selfcheck import operators_run, run_selfcheck
from hcmen.mamba.one_node import conv_model, one_node_model, scan_model

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "runtime" / "csrc"


cases = loaded(HERE / "ort_cases.py", "ort_cases")


def session(model, threads=1, library=True):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if library:
        options.register_custom_ops_library(str(library_path()))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("reverse", [False, True])
def test_steps_with_no_size_leave_the_state(reverse):
    """delta far below zero before the softplus masks a step: what lies there changes nothing."""
    feeds = scan_arrays(ScanCase(2, 9, 20, 12, None))
    model = scan_model(20, 12, delta_softplus=True, gated=True, stateful=True, reverse=reverse, functions=False)
    made = session(model)
    short = {name: x[:, :6] if x.ndim == 3 and name not in ("initial_state",) else x for name, x in feeds.items()}
    feeds["delta"][:, 6:] = -1e4
    y, last = made.run(None, feeds)
    y_short, last_short = made.run(None, short)
    np.testing.assert_array_equal(y[:, :6], y_short)
    np.testing.assert_array_equal(last, last_short)


def test_attributes_have_defaults_and_unknown_ones_are_let_pass():
    rng = np.random.default_rng(4)
    feeds = scan_arrays(ScanCase(1, 5, 6, 3, None, gated=False, stateful=False, softplus=False))
    bare = scan_model(6, 3, functions=False)
    explicit = session(bare).run(None, feeds)[0]
    node = bare.graph.node[0]
    del node.attribute[:]
    np.testing.assert_array_equal(session(bare).run(None, feeds)[0], explicit)
    node.attribute.extend(
        [helper.make_attribute("tensorrt_plugin_shape_input_indices", [1]), helper.make_attribute("x", "y")]
    )
    np.testing.assert_array_equal(session(bare).run(None, feeds)[0], explicit)

    conv = conv_model(6, 2, activation="none", functions=False)
    inputs = {"x": feeds["u"], "weight": rng.normal(size=(6, 2)).astype(np.float32), "bias": feeds["D"]}
    explicit = session(conv).run(None, inputs)[0]
    del conv.graph.node[0].attribute[:]
    np.testing.assert_array_equal(session(conv).run(None, inputs)[0], explicit)


def test_a_node_of_constants_can_be_folded():
    """ONNX Runtime runs such a node while it optimises the graph, without a thread pool."""
    case = ScanCase(2, 300, 64, 16, None, stateful=False)
    feeds = scan_arrays(case)
    model = scan_model(64, 16, delta_softplus=True, gated=True, functions=False)
    del model.graph.input[:]
    model.graph.initializer.extend(numpy_helper.from_array(x, name) for name, x in feeds.items())
    assert_scan(case, feeds, session(model, 2).run(None, {}))


# --- which implementation runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_kernel_runs_with_the_library_and_the_function_without(dtype):
    feeds = scan_arrays(ScanCase(2, 30, 16, 4, None, dtype=dtype, stateful=False))
    scan = scan_model(16, 4, dtype=dtype, delta_softplus=True, gated=True).SerializeToString()
    _, with_library = operators_run(ort, scan, feeds, library_path(), threads=2)
    assert with_library == ["SelectiveScan"]
    _, without = operators_run(ort, scan, feeds)
    assert "Scan" in without
    assert "SelectiveScan" not in without

    conv = conv_model(16, 4, dtype=dtype).SerializeToString()
    inputs = {"x": feeds["u"], "weight": feeds["A"], "bias": feeds["D"]}
    _, with_library = operators_run(ort, conv, inputs, library_path())
    assert with_library == ["CausalConv1d"]
    _, without = operators_run(ort, conv, inputs)
    assert any(name.endswith("Conv") for name in without)
    assert "CausalConv1d" not in without


@pytest.mark.parametrize("rate", [1.0, 0.0])
def test_long_scans_of_few_channels_are_the_same_on_any_number_of_threads(rate):
    """They are cut in time: with a rate of 0, where no state is ever forgotten, everything is computed twice."""
    channel, state, time = 5, 3, 20_000
    rng = np.random.default_rng(0)
    feeds = {
        **{n: rng.standard_normal((1, time, channel), np.float32) for n in ("u", "delta", "z")},
        **{n: rng.standard_normal((1, time, state), np.float32) for n in ("B", "C")},
        "A": np.full((channel, state), -rate, np.float32),
        **{n: np.ones(channel, np.float32) for n in ("D", "delta_bias")},
    }
    model = scan_model(channel, state, delta_softplus=True, gated=True)
    first, *others = (session(model, threads).run(None, feeds)[0] for threads in (1, 2, 3, 8))
    assert all(np.array_equal(first, y) for y in others)


def test_work_is_shared_by_the_threads_of_the_session(tmp_path):
    """What the session's other threads do shows in the CPU time of the process and not in that of the caller."""
    script = """
import sys, time
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = 2
options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting must not count as work
options.register_custom_ops_library(sys.argv[1])
made = ort.InferenceSession(sys.argv[2], options)
sizes = {v.name: [d if isinstance(d, int) else 1000 for d in v.shape] for v in made.get_inputs()}
draw = np.random.default_rng(0).random
feeds = {name: draw(size, np.float32) * (-1 if name == "A" else 1) for name, size in sizes.items()}
made.run(None, feeds)
seen = []
# In the first, other threads of onnxruntime and numpy still start. Where other processes have the cores, the caller may
# be done before its helpers wake up, again and again.
while sum(share > 1.05 for share in seen[1:]) < 5:
    assert len(seen) < 300, seen
    mine, process = time.thread_time(), time.process_time()
    for _ in range(20):
        made.run(None, feeds)
    seen.append((time.process_time() - process) / (time.thread_time() - mine))
    time.sleep(0.02)
"""
    model = tmp_path / "model.onnx"
    model.write_bytes(scan_model(512, 16, batch=1, functions=False).SerializeToString())
    command = [sys.executable, "-c", script, str(library_path()), str(model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1000:]


# --- sessions come and go ---------------------------------------------------------------------------------------------


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_sessions_come_and_go():
    feeds = scan_arrays(ScanCase(2, 12, 16, 4, None, gated=False))
    model = scan_model(16, 4, delta_softplus=True, stateful=True, functions=False)
    first = session(model).run(None, feeds)
    for i in range(160):
        if i == 60:
            before = resident_bytes()
        made = session(model, 1 + i % 2)
        if i % 10 == 0:
            for a, b in zip(made.run(None, feeds), first, strict=True):
                np.testing.assert_array_equal(a, b)
        del made
    assert resident_bytes() - before < 8 * 2**20


def test_two_sessions_and_many_threads():
    made = {reverse: session(scan_model(33, 12, reverse=reverse, functions=False), 2) for reverse in (False, True)}
    plain = {"gated": False, "stateful": False, "softplus": False}
    inputs = [scan_arrays(ScanCase(1 + i % 3, 1 + 40 * i, 33, 12, None, **plain)) for i in range(8)]
    want = {(r, i): made[r].run(None, feeds)[0] for r in made for i, feeds in enumerate(inputs)}

    def work(job):
        reverse, i = job
        return np.array_equal(made[reverse].run(None, inputs[i])[0], want[job])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, list(want) * 6))


def test_sessions_made_at_once_by_many_threads():
    """In a fresh process, so that the first registrations meet."""
    script = """
import sys
from concurrent.futures import ThreadPoolExecutor
import onnxruntime as ort
from hcmen.base.library import library_path
from hcmen.base.selfcheck import MODEL, selfcheck_inputs
library, model, feeds = str(library_path()), MODEL.read_bytes(), selfcheck_inputs()
def work(_):
    options = ort.SessionOptions()
    options.register_custom_ops_library(library)
    return ort.InferenceSession(model, options).run(None, feeds)[0].tobytes()
with ThreadPoolExecutor(8) as pool:
    assert len(set(pool.map(work, range(48)))) == 1
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1000:]


def test_registering_twice_means_once():
    options = ort.SessionOptions()
    for _ in range(3):
        options.register_custom_ops_library(str(library_path()))
    model = scan_model(4, 2, functions=False)
    case = ScanCase(1, 3, 4, 2, None, gated=False, stateful=False, softplus=False)
    feeds = scan_arrays(case)
    for _ in range(2):
        made = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        assert_scan(case, feeds, made.run(None, feeds))


def test_a_runtime_too_old_is_refused_by_name():
    """RegisterCustomOps is handed a runtime of API version 15, as ONNX Runtime 1.15 would be."""
    said = []

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    def create_status(code, message):
        said.append((code, message))
        return 4096

    # One function, so that reading any other would leave the array.
    table = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p).value)

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    def get_api(version):
        return ctypes.addressof(table) if version <= 15 else None

    base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p).value, None)
    register = ctypes.CDLL(str(library_path())).RegisterCustomOps
    register.restype = ctypes.c_void_p
    register.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    assert register(None, ctypes.addressof(base)) == 4096
    assert said == [(1, b"hcmen operators need ONNX Runtime 1.16 or later")]


# --- malformed nodes --------------------------------------------------------------------------------------------------


def run_cases(*arguments):
    """The script of this folder, in a process of its own: a crash shows as its exit code."""
    command = [sys.executable, str(HERE / "ort_cases.py"), *arguments, "--library", str(library_path())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}{done.stdout[-500:]}"
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def answers():
    return {line["case"]: line for line in run_cases("malformed")}


@pytest.mark.parametrize("name", cases.MALFORMED)
def test_malformed_node_is_an_error(answers, name):
    case, answer = cases.MALFORMED[name], answers[name]
    assert answer["stage"] != "none", "it ran"
    assert answer["error"].startswith("onnxruntime.")
    if case.says:
        message = answer["error"][answer["error"].index(f"{case.op_type}: ") :]
        assert "\n" not in message.strip()
        for part in case.says:
            assert part in message


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_shapes_never_crash(seed):
    (outcome,) = run_cases("fuzz", "--seed", str(seed), "--count", "300")
    assert outcome["errors"] > 50
    assert outcome["right"] > 50


def test_a_node_of_half_the_inputs_says_which_are_missing():
    """A model written by hand, from the text of docs/op.md alone."""
    inputs = {"u": ("float32", ["b", "t", 4]), "delta": ("float32", ["b", "t", 4]), "A": ("float32", [4, 2])}
    model = one_node_model("SelectiveScan", inputs, {"y": inputs["u"]}, {}, functions=False)
    expected = (
        "SelectiveScan: got 3 inputs, expected 7 with gated = 0 and stateful = 0: u, delta, A, B, C, D, delta_bias"
    )
    with pytest.raises(Exception, match=expected):
        session(model)


# --- the one-node check -----------------------------------------------------------------------------------------------


def test_selfcheck_passes_with_and_without_the_library():
    kernel, function = run_selfcheck(library_path()), run_selfcheck(None)
    assert kernel.kernel
    assert kernel.operators == ("SelectiveScan",)
    assert not function.kernel
    assert max(kernel.error, function.error) <= 1e-6


def test_selfcheck_says_what_is_wrong(tmp_path, monkeypatch):
    broken = tmp_path / "libhcmen_ops.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(BackendError, match="cannot run the one-node model"):
        run_selfcheck(broken)
    monkeypatch.setattr(selfcheck, "TOLERANCE", 1e-12)
    with pytest.raises(CheckFailed, match="expected 1e-12 or less"):
        run_selfcheck(None)


def test_selfcheck_needs_neither_torch_nor_onnx():
    script = (
        "import sys; sys.modules['torch'] = sys.modules['onnx'] = None\n"
        "from hcmen.base.library import library_path; from hcmen.base.selfcheck import run_selfcheck\n"
        "assert run_selfcheck(library_path()).kernel"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


# --- the header -------------------------------------------------------------------------------------------------------


def test_header_agrees_with_the_official_one():
    folders = os.environ.get("HCMEN_ORT_INCLUDE_DIR")
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if not folders:
        pytest.skip(
            "HCMEN_ORT_INCLUDE_DIR names no folder with onnxruntime_c_api.h, which ONNX Runtime's release archives "
            "have and no wheel has"
        )
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = ["-std=c++17", "-fsyntax-only", "-Wno-ignored-attributes"]
    for folder in folders.split(os.pathsep):
        subprocess.run([compiler, *flags, "-isystem", folder, str(CSRC / "ort_abi_check.cc")], check=True, timeout=120)
