"""runtime/csrc/scan_step.h, the arithmetic that the CUDA kernels are made of, compiled for the host and run as loops:
step after step, in chunks of awkward lengths, and backward, against the reference in float64.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.op_cases import (
    ScanCase,
    address,
    assert_near,
    by_reference,
    gradient_arrays,
    scan_arrays,
    scan_gradients_oracle,
    scan_gradients_structure,
    scan_oracle,
    scan_structure,
)

TESTS = Path(__file__).parents[1]
CHUNK = 64


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The header as loops, in a shared library."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no C++ compiler {compiler}")
    path = tmp_path_factory.mktemp("step") / "libstep.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    sources = ["-I", str(TESTS.parent / "runtime" / "csrc"), str(TESTS / "emulation" / "scan_step_test.cc")]
    built = subprocess.run([compiler, *flags, *sources, "-o", str(path)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    library = ctypes.CDLL(str(path))
    library.step_forward.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.step_backward.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.step_evaluate.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    for function in (library.step_forward, library.step_backward, library.step_evaluate):
        function.restype = None
    return library


def forward(loops: ctypes.CDLL, case: ScanCase, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    arrays = scan_arrays(case)
    y = np.full(arrays["u"].shape, np.nan, np.float32)
    last = np.full((case.batch, case.channel, case.state), np.nan, np.float32)
    scan = scan_structure(case, {**arrays, "y": y, "last_state": last}, address)
    loops.step_forward(*by_reference(scan), chunk)
    return y, last


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        ScanCase(),
        ScanCase(gated=False),
        ScanCase(stateful=False),
        ScanCase(softplus=False),
        ScanCase(group=5, channel=10),
        ScanCase(mean=0.0, time=200),
        ScanCase(mean=19.5, time=30),
        ScanCase(masked=4),
        ScanCase(state=1),
        ScanCase(batch=1, time=2000, channel=2, state=16),
        ScanCase(batch=1, time=2000, channel=2, state=16, mean=-7.0),
    ],
    ids=str,
)
def test_step_after_step(loops: ctypes.CDLL, case: ScanCase, reverse: bool) -> None:
    case = replace(case, reverse=reverse)
    y, last = forward(loops, case, 0)
    want_y, want_last = scan_oracle(case, scan_arrays(case))
    # At steps of 1e-3 a state remembers a thousand steps, and the roundings of each.
    bound = 1e-6 if case.mean >= -4.0 else 2e-6
    assert_near("y", y, want_y, bound)
    assert_near("last_state", last, want_last, bound)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("time", [1, CHUNK - 1, CHUNK, CHUNK + 1, 4096])
def test_chunks(loops: ctypes.CDLL, time: int, reverse: bool) -> None:
    case = ScanCase(batch=2, time=time, channel=3, state=5, reverse=reverse, masked=time // 3)
    want = scan_oracle(case, scan_arrays(case))
    for chunk in (CHUNK, 1, 7):
        if chunk == 1 and time > CHUNK + 1:
            continue
        for name, got, expected in zip(("y", "last_state"), forward(loops, case, chunk), want, strict=True):
            assert_near(f"{name} in chunks of {chunk}", got, expected, 1e-6)


def test_masked_steps_leave_a_state_as_it_was_to_the_bit(loops: ctypes.CDLL) -> None:
    short = ScanCase(batch=1, time=20, channel=3)
    arrays = scan_arrays(short)
    y, last = forward(loops, short, 0)
    padded = {
        name: np.concatenate([x, np.full_like(x[:, :7], -1e4 if name == "delta" else 3.0)], axis=1)
        if name in ("u", "delta", "B", "C", "z")
        else x
        for name, x in arrays.items()
    }
    long = replace(short, time=27)
    for chunk in (0, 4):
        got_y, got_last = np.empty_like(padded["u"]), np.empty_like(last)
        scan = scan_structure(long, {**padded, "y": got_y, "last_state": got_last}, address)
        loops.step_forward(*by_reference(scan), chunk, 0)
        if chunk == 0:
            np.testing.assert_array_equal(got_y[:, :20], y)
            np.testing.assert_array_equal(got_last, last)
        else:
            assert_near("last_state", got_last, last.astype(np.float64), 1e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        ScanCase(),
        ScanCase(gated=False),
        ScanCase(stateful=False),
        ScanCase(softplus=False),
        ScanCase(group=3, channel=6, time=40),
        ScanCase(masked=4),
        ScanCase(mean=19.5),
        ScanCase(batch=1, time=500, channel=2, state=12),
    ],
    ids=str,
)
def test_backward(loops: ctypes.CDLL, case: ScanCase, reverse: bool) -> None:
    case = replace(case, reverse=reverse)
    arrays = scan_arrays(case)
    rng = np.random.default_rng(1)
    dy = rng.normal(size=arrays["u"].shape).astype(np.float32)
    dlast = rng.normal(size=(case.batch, case.channel, case.state)).astype(np.float32) if case.stateful else None
    got = gradient_arrays(arrays)
    inputs = {"dy": dy, **({} if dlast is None else {"dlast_state": dlast})}
    loops.step_backward(
        *by_reference(scan_structure(case, arrays, address), scan_gradients_structure({**got, **inputs}, address))
    )
    want = scan_gradients_oracle(case, arrays, dy, dlast)
    assert set(got) == set(want)
    for name in want:
        assert_near(name, got[name], want[name], 3e-6)


def test_elementary_functions(loops: ctypes.CDLL) -> None:
    """Against float64, in units in the last place, where the result is a normal number."""
    x = np.concatenate([np.linspace(-87, 87, 200001), np.linspace(-2, 2, 100001), np.logspace(-30, 0, 5001)])
    x = x.astype(np.float32)
    unit = np.linspace(0, 1, 100001, dtype=np.float32)
    wide = x.astype(np.float64)
    sigmoid = 1 / (1 + np.exp(-wide))
    truths = {
        0: (x, np.logaddexp(0.0, wide), 3.0),
        1: (x, sigmoid, 4.0),
        2: (x, wide * sigmoid, 5.0),
        4: (unit, np.log1p(unit.astype(np.float64)), 2.0),
        5: (x, np.exp(-np.abs(wide)), 3.0),
    }
    for function, (inputs, want, bound) in truths.items():
        got = np.empty_like(inputs)
        loops.step_evaluate(function, address(inputs), address(got), inputs.size)
        normal = np.abs(want) > 1e-37
        units = np.abs(got - want)[normal] / np.spacing(np.abs(want[normal]).astype(np.float32))
        assert units.max() <= bound, f"function {function} at {inputs[normal][units.argmax()]}"
    slope = np.empty_like(x)
    loops.step_evaluate(3, address(x), address(slope), x.size)
    np.testing.assert_allclose(slope, sigmoid * (1 + wide * (1 - sigmoid)), atol=3e-7)


def test_elementary_functions_at_the_ends(loops: ctypes.CDLL) -> None:
    x = np.array([-np.inf, np.inf, np.nan, -1e4, 0.0, 20.0, 20.000002, 1e4], np.float32)
    y = np.empty_like(x)
    loops.step_evaluate(0, address(x), address(y), x.size)
    assert y[0] == 0.0
    assert y[1] == np.inf
    assert np.isnan(y[2])
    assert y[3] == 0.0
    np.testing.assert_array_equal(y[5:], x[5:])
    loops.step_evaluate(1, address(x), address(y), x.size)
    assert y[[0, 1, 3, 4, 7]].tolist() == [0.0, 1.0, 0.0, 0.5, 1.0]
    assert np.isnan(y[2])
