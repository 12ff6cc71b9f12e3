"""The CUDA kernels, run on the host: the sources of runtime/csrc/*.cu as they stand, compiled by a C++ compiler over
tests/emulation/cuda_emulation.h, against the reference in float64.

What a GPU adds to this (its compiler, its memory model, its speed) is for tests/gpu.
"""

from __future__ import annotations

import ctypes
import itertools
import random
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import emulated
from helpers.emulated import Kernels
from helpers.op_cases import (
    ConvCase,
    ScanCase,
    address,
    assert_near,
    by_reference,
    conv_arrays,
    conv_gradients_oracle,
    conv_gradients_structure,
    conv_oracle,
    conv_state_shape,
    conv_structure,
    gradient_arrays,
    scan_arrays,
    scan_gradients_oracle,
    scan_gradients_structure,
    scan_oracle,
    scan_structure,
)

from hcmen.base.cuda_library import CudaLaunch, CudaPlan, call, declare, workspace_bytes
from hcmen.base.errors import BackendError, InputError

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="there is no C++ compiler")

OK, BAD_ARGUMENT, SMALL_WORKSPACE = 0, 1, 17
ORDERS = {"ascending": 0, "descending": 1, "mixed": 2}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return emulated.kernels_library()


@pytest.fixture
def kernels(library: ctypes.CDLL) -> Kernels:
    return Kernels(library)


def check_forward(kernels: Kernels, case: ScanCase, **wish: int) -> None:
    arrays = scan_arrays(case)
    got, want = kernels.scan(case, arrays, **wish), scan_oracle(case, arrays)
    for name, g, w in zip(("y", "last_state"), got, want, strict=True):
        assert_near(f"{name} of {case} {wish}", g, w, kernels.bound)


def check_backward(kernels: Kernels, case: ScanCase, **wish: int) -> None:
    arrays = scan_arrays(case)
    rng = np.random.default_rng(1)
    dy = rng.normal(size=arrays["u"].shape).astype(np.float32)
    dlast = rng.normal(size=(case.batch, case.channel, case.state)).astype(np.float32) if case.stateful else None
    got = kernels.scan_gradients(case, arrays, dy, dlast, **wish)
    want = scan_gradients_oracle(case, arrays, dy, dlast)
    assert set(got) == set(want)
    for name in want:
        assert_near(f"{name} of {case} {wish}", got[name], want[name], kernels.gradient_bound)


# --- the scan -------------------------------------------------------------------------------------------------------

SWITCHES = list(itertools.product((False, True), repeat=4))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("gated", "stateful", "reverse", "softplus"), SWITCHES)
def test_every_attribute(
    kernels: Kernels, gated: bool, stateful: bool, reverse: bool, softplus: bool, dtype: str
) -> None:
    case = ScanCase(2, 21, 12, 12, 3, dtype, gated, stateful, reverse, softplus, masked=4)
    check_forward(kernels, case)
    check_forward(kernels, case, steps_per_chunk=8)
    if dtype == "float32":
        check_backward(kernels, case, steps_per_chunk=-1)
        check_backward(kernels, case, steps_per_chunk=8)


@pytest.mark.parametrize("state", [*range(1, 18), 24, 31, 32, 33, 48, 63, 64, 65, 100, 128, 129, 200, 256, 257, 512])
def test_every_number_of_states(kernels: Kernels, state: int) -> None:
    case = ScanCase(2, 18, 5, state, reverse=state % 2 == 0)
    check_forward(kernels, case)
    if state <= 256:
        check_backward(kernels, replace(case, time=17))


@pytest.mark.parametrize("time", [1, 2, 7, 8, 9, 15, 16, 17, 31, 64, 65, 127, 128, 129, 300])
def test_every_length(kernels: Kernels, time: int) -> None:
    for case in (ScanCase(1, time, 9, 4), ScanCase(2, time, 3, 16, reverse=True, gated=False)):
        check_forward(kernels, case)
        check_forward(kernels, case, time_warps=1)
        check_backward(kernels, case)
        check_backward(kernels, case, steps_per_chunk=-1)


@pytest.mark.parametrize(("channel", "group"), [(1, 1), (3, 3), (4, 1), (31, 1), (32, 4), (33, 1), (130, 2), (260, 1)])
def test_every_number_of_channels(kernels: Kernels, channel: int, group: int) -> None:
    for batch, state in ((1, 4), (2, 16)):
        case = ScanCase(batch, 10, channel, state, group)
        check_forward(kernels, case)
        check_forward(kernels, replace(case, dtype="float16"), lanes_per_channel=1)
        check_backward(kernels, case)


@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("warps", [1, 2, 4, 8, 16])
def test_every_plan(kernels: Kernels, lanes: int, warps: int) -> None:
    """However the work is shared out, the numbers are right; the wish is heard."""
    case = ScanCase(1, 140, 10, 16, reverse=True)
    for chunk in (-1, 1, 50, 128):
        if chunk == 1:
            check_forward(kernels, replace(case, time=12), lanes_per_channel=lanes, time_warps=warps, steps_per_chunk=1)
        else:
            check_forward(kernels, case, lanes_per_channel=lanes, time_warps=warps, steps_per_chunk=chunk)
    found = plan(kernels.library, case, lanes_per_channel=lanes, time_warps=warps, steps_per_chunk=50)
    assert (found.lanes_per_channel, found.chunks) == (lanes, 3)
    assert found.time_warps <= warps


@pytest.mark.parametrize("warps", [1, 2, 4])
@pytest.mark.parametrize("steps", [4, 8, 12, 64])
def test_every_shape_of_blocks(kernels: Kernels, warps: int, steps: int) -> None:
    """Tiles that threads read in one go, in several, in less than one; the wish is heard as far as memory allows."""
    for state, lanes, dtype in ((16, 1, "float32"), (16, 2, "float16"), (3, 1, "float16"), (72, 8, "float32")):
        case = ScanCase(1, 70, 140, state, reverse=state == 3, dtype=dtype)
        wish = {"lanes_per_channel": lanes, "channel_warps": warps, "steps_per_warp": steps, "time_warps": 1}
        check_forward(kernels, case, steps_per_chunk=-1, **wish)
        check_forward(kernels, case, steps_per_chunk=32, **wish)
        found = plan(kernels.library, case, steps_per_chunk=-1, **wish)
        assert found.channel_warps == warps
        assert found.steps_per_warp <= steps
        assert state == 72 or found.steps_per_warp == steps


@pytest.mark.parametrize("warps", [1, 2, 3, 13, 16])
def test_warps_one_after_the_other(kernels: Kernels, warps: int) -> None:
    """Sequences of one tile and of several, whose last warps may have no steps at all."""
    for time in (1, 4, 50, 64, 70):
        for state, lanes in ((16, 4), (16, 2), (4, 1), (30, 8)):
            case = ScanCase(1, time, 9, state, reverse=time == 50, masked=time // 4)
            check_forward(kernels, case, lanes_per_channel=lanes, time_warps=warps, steps_per_chunk=-1)
            found = plan(kernels.library, case, lanes_per_channel=lanes, time_warps=warps, steps_per_chunk=-1)
            assert found.time_warps == warps
            assert found.steps_per_warp == 4 or warps == 1


@pytest.mark.parametrize("time", [1, 63, 64, 65, 1024, 4096])
def test_chunks_over_blocks(kernels: Kernels, time: int) -> None:
    """Lengths around a chunk's, and the plan's own chunks at the length where it makes them."""
    case = ScanCase(1, time, 2, 5, masked=time // 3)
    check_forward(kernels, case, steps_per_chunk=64)
    check_forward(kernels, case)
    assert (plan(kernels.library, case).chunks > 1) == (time > 64)


@pytest.mark.parametrize("chunk", [1, 8, 9, 16, 24, 56, 57, 1000])
@pytest.mark.parametrize("time", [1, 8, 9, 16, 17, 57, 130])
def test_gradients_in_chunks(kernels: Kernels, time: int, chunk: int) -> None:
    """Lengths around those of a tile (8 steps) and of a chunk, which is a whole number of tiles.

    More than eight chunks, which is how many are carried at once; states and channels beyond one warp's; several warps
    of a block."""
    check_backward(kernels, ScanCase(1, time, 3, 5, masked=time // 3), steps_per_chunk=chunk)
    check_backward(kernels, ScanCase(2, time, 66, 17, 2, reverse=True, gated=False), steps_per_chunk=chunk)


def test_gradients_of_portions(kernels: Kernels) -> None:
    """The workspace holds some of the sequences; results are the same, bit for bit, however many."""
    for case in (ScanCase(7, 20, 33, 16), ScanCase(5, 9, 140, 20, 2, gated=False, stateful=False)):
        arrays = scan_arrays(case)
        dy = np.random.default_rng(1).normal(size=arrays["u"].shape).astype(np.float32)
        dlast = np.ones((case.batch, case.channel, case.state), np.float32) if case.stateful else None
        for chunk in (-1, 8):
            want = kernels.scan_gradients(case, arrays, dy, dlast, steps_per_chunk=chunk)
            for sequences in (1, 2, 3, 100):
                wish = {"steps_per_chunk": chunk, "sequences_at_once": sequences}
                got = kernels.scan_gradients(case, arrays, dy, dlast, **wish)
                for name in want:
                    np.testing.assert_array_equal(got[name], want[name], err_msg=f"{name} of {case} {wish}")


def test_long_steps_and_short_ones(kernels: Kernels) -> None:
    for mean in (-10.0, 0.0, 3.0, 19.5):
        case = ScanCase(2, 40, 6, 8, mean=mean)
        check_forward(kernels, case)
        check_forward(kernels, case, steps_per_chunk=8)
        check_backward(kernels, replace(case, mean=min(mean, 3.0)), steps_per_chunk=-1)
        check_backward(kernels, replace(case, mean=min(mean, 3.0)), steps_per_chunk=16)


def test_random_cases(kernels: Kernels) -> None:
    rng = random.Random(0)
    for seed in range(30):
        group = rng.choice([1, 1, 2, 3])
        case = ScanCase(
            batch=rng.randint(1, 3),
            time=rng.randint(1, 90),
            channel=group * rng.randint(1, 20),
            state=rng.choice([1, 4, 8, 12, 16, 20, 64]),
            group=group,
            dtype=rng.choice(["float32", "float16"]),
            gated=rng.random() < 0.5,
            stateful=rng.random() < 0.5,
            reverse=rng.random() < 0.5,
            softplus=rng.random() < 0.7,
            seed=seed,
        )
        check_forward(kernels, case, steps_per_chunk=rng.choice([0, 0, 5, 16, 40]), time_warps=rng.choice([0, 1, 2]))
        if case.dtype == "float32":
            check_backward(kernels, case, steps_per_chunk=rng.choice([0, -1, 5, 16, 40]))


def test_addresses_that_are_no_multiple_of_four_elements(kernels: Kernels) -> None:
    case = ScanCase(2, 20, 8, 16)
    arrays = scan_arrays(case)
    want = kernels.scan(case, arrays)
    for name in ("u", "delta", "z", "A", "B", "C", "initial_state"):
        memory = np.empty(arrays[name].size + 1, np.float32)
        memory[1:] = arrays[name].ravel()
        shifted = {**arrays, name: memory[1:].reshape(arrays[name].shape)}
        for g, w in zip(kernels.scan(case, shifted), want, strict=True):
            np.testing.assert_array_equal(g, w)


def test_loading_every_kernel_works(library: ctypes.CDLL) -> None:
    """No kernel that a plan may ask for is missing from the table of those to load."""
    assert library.hcmen_cuda_warm() == OK


def test_what_lies_in_masked_steps_does_not_matter(kernels: Kernels) -> None:
    case = ScanCase(3, 40, 8, 16, masked=9)
    arrays = scan_arrays(case)
    want = kernels.scan(case, arrays)
    for name in ("u", "B", "C", "z"):
        arrays[name][::2, -9:] = 1e3
    got = kernels.scan(case, arrays)
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_array_equal(got[0][::2, :-9], want[0][::2, :-9])
    np.testing.assert_array_equal(got[0][1::2], want[0][1::2])


def test_nan_stays_where_it_can_reach(kernels: Kernels) -> None:
    case = ScanCase(2, 30, 8, 4)
    arrays = scan_arrays(case)
    want = kernels.scan(case, arrays)[0]
    arrays["delta"][1, 10, 3] = np.nan
    got = kernels.scan(case, arrays)[0]
    assert np.isnan(got[1, 10:, 3]).all()
    reached = np.zeros_like(got, dtype=bool)
    reached[1, 10:, 3] = True
    np.testing.assert_array_equal(got[~reached], want[~reached])


# --- the order of threads -------------------------------------------------------------------------------------------


def test_results_do_not_depend_on_the_order_of_threads_and_blocks(kernels: Kernels) -> None:
    """Bit for bit; an access that no barrier orders would come out differently."""
    cases = [
        (ScanCase(2, 50, 40, 16), {}),
        (ScanCase(1, 70, 12, 12, 3), {"steps_per_chunk": 20}),
        (ScanCase(1, 70, 12, 12, 3), {"steps_per_chunk": -1, "time_warps": 4}),
        (ScanCase(1, 40, 5, 40), {"time_warps": 1}),
    ]
    conv = ConvCase(2, 30, 130, 5)
    found = {}
    for name, order in ORDERS.items():
        kernels.library.emulation_set_order(order)
        results = []
        for case, wish in cases:
            arrays = scan_arrays(case)
            dy = np.random.default_rng(2).normal(size=arrays["u"].shape).astype(np.float32)
            results += kernels.scan(case, arrays, **wish)
            for chunk in (-1, 16):
                results += kernels.scan_gradients(case, arrays, dy, None, steps_per_chunk=chunk).values()
        dy = np.random.default_rng(3).normal(size=(2, 30, 130)).astype(np.float32)
        results += kernels.conv_gradients(conv, conv_arrays(conv), dy).values()
        found[name] = results
    kernels.library.emulation_set_order(0)
    for name in ("descending", "mixed"):
        for got, want in zip(found[name], found["ascending"], strict=True):
            np.testing.assert_array_equal(got, want)


# --- plans ----------------------------------------------------------------------------------------------------------


def plan(library: ctypes.CDLL, case: ScanCase, **wish: int) -> CudaPlan:
    found = CudaPlan()
    scan = scan_structure(case, {}, address)
    call(library, "selective_scan_plan", scan, CudaLaunch(**wish), found)
    return found


def test_plans_fit_every_device(library: ctypes.CDLL) -> None:
    """Over sizes far beyond what can be run here: what a block asks for is what any device has."""
    rng = random.Random(0)
    for _ in range(3000):
        group = rng.choice([1, 1, 1, 2, 8])
        case = ScanCase(
            batch=rng.choice([1, 2, 16, 256, 5000]),
            time=rng.choice([1, 50, 375, 500, 4096, 100_000]),
            channel=group * rng.choice([1, 7, 64, 512, 2048]),
            state=rng.randint(1, 512),
            group=group,
        )
        found = plan(library, case)
        assert 0 < found.shared_bytes <= 48 << 10
        assert found.time_warps * found.channel_warps * 32 <= 512
        assert found.lanes_per_channel * found.states_per_lane >= case.state
        assert found.chunks == -(-case.time // found.steps_per_chunk)
        # Working memory of a chunked scan stays below what the scan itself reads and writes.
        scan = scan_structure(case, {}, address)
        size = workspace_bytes(library, "selective_scan", scan, None, 0)
        assert (size == 0) == (found.chunks == 1)
        assert size <= 4 * case.batch * case.time * case.channel * max(3, case.state / 100)


@pytest.mark.parametrize(
    ("case", "lanes", "states", "warps", "chunks"),
    [
        # Many channels: one lane each, no step twice.
        (ScanCase(256, 500, 2048, 16), 1, 16, 1, 1),
        (ScanCase(256, 500, 2048, 12), 1, 12, 1, 1),
        (ScanCase(256, 500, 2048, 8), 1, 8, 1, 1),
        (ScanCase(256, 500, 2048, 64), 4, 16, 1, 1),
        (ScanCase(16, 500, 2048, 16), 1, 16, 1, 1),
        # Fewer, but warps enough once two lanes share a channel: still no step twice.
        (ScanCase(16, 4096, 1280, 16), 2, 8, 1, 1),
        (ScanCase(16, 200, 640, 16), 2, 8, 1, 1),
        # A little fewer still, and cutting is worth it, the more so the longer the sequence.
        (ScanCase(16, 200, 512, 16), 1, 16, 1, 7),
        (ScanCase(16, 500, 1024, 16), 1, 16, 1, 4),
        (ScanCase(16, 4096, 512, 16), 1, 16, 1, 16),
        # Few channels and steps: the states of a channel over four lanes, its steps over warps.
        (ScanCase(1, 50, 512, 16), 4, 4, 13, 1),
        (ScanCase(1, 64, 2048, 8), 4, 4, 16, 1),
        (ScanCase(1, 7, 33, 4), 1, 4, 2, 1),
        # Few channels and many steps, which are cut into chunks of 16 to 256.
        (ScanCase(1, 500, 512, 16), 1, 16, 1, 32),
        (ScanCase(1, 500, 2048, 16), 1, 16, 1, 32),
        (ScanCase(1, 4096, 512, 16), 1, 16, 1, 128),
        (ScanCase(1, 4096, 2048, 16), 1, 16, 1, 32),
        (ScanCase(1, 4096, 512, 100), 8, 16, 1, 16),
    ],
)
def test_plans(library: ctypes.CDLL, case: ScanCase, lanes: int, states: int, warps: int, chunks: int) -> None:
    found = plan(library, case)
    assert (found.lanes_per_channel, found.states_per_lane) == (lanes, states)
    assert (found.time_warps, found.chunks) == (warps, chunks)


@pytest.mark.parametrize("time", [50, 500, 4096])
@pytest.mark.parametrize("batch", [1, 16, 256])
def test_gradients_take_little_memory(library: ctypes.CDLL, batch: int, time: int) -> None:
    """At most twice what the caller's own arrays of a gradient take, and less than 5 GB where that is more."""
    case = ScanCase(batch, time, 2048, 16)
    size = workspace_bytes(library, "selective_scan", scan_structure(case, {}, address), None, 1)
    assert size < 2 * 4 * 7 * batch * time * 2048
    assert size < 5e9


# --- the convolution ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 7, 16])
@pytest.mark.parametrize("time", [1, 2, 3, 8, 9, 64, 130])
def test_convolution(kernels: Kernels, width: int, time: int) -> None:
    for channel, reverse, silu, stateful in itertools.product((5, 130), *[(False, True)] * 3):
        if stateful and width == 1:
            continue
        case = ConvCase(2, time, channel, width, "float32", silu, reverse, stateful)
        arrays = conv_arrays(case)
        rng = np.random.default_rng(1)
        dy = rng.normal(size=arrays["x"].shape).astype(np.float32)
        dlast = rng.normal(size=conv_state_shape(case)).astype(np.float32) if stateful else None
        want = conv_gradients_oracle(case, arrays, dy, dlast)
        for one in (case, replace(case, dtype="float16")):
            of = conv_arrays(one)
            for name, g, w in zip(("y", "last_state"), kernels.conv(one, of), conv_oracle(one, of), strict=True):
                if w.size:
                    assert_near(f"{name} of {one}", g, w, kernels.bound)
        gradients = kernels.conv_gradients(case, arrays, dy, dlast)
        assert set(gradients) == set(want)
        for name, got in gradients.items():
            assert_near(f"{name} of {case}", got, want[name], kernels.gradient_bound)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("width", [2, 3, 4, 6])
def test_a_convolution_in_pieces_is_the_whole(kernels: Kernels, width: int, reverse: bool) -> None:
    """Bit for bit, cut anywhere: pieces shorter than the state, and runs of steps at other places."""
    case = ConvCase(2, 75, 5, width, reverse=reverse, stateful=True)
    arrays = conv_arrays(case)
    whole, last = kernels.conv(case, arrays)
    scanned = arrays["x"][:, ::-1] if reverse else arrays["x"]
    state, pieces, start = arrays["initial_state"], [], 0
    for steps in (1, 1, 2, 8, 30, 3, 1, 29):
        x = scanned[:, start : start + steps]
        x = np.ascontiguousarray(x[:, ::-1] if reverse else x)
        piece = replace(case, time=steps)
        y, state = kernels.conv(piece, {**arrays, "x": x, "initial_state": state})
        pieces.append(y[:, ::-1] if reverse else y)
        start += steps
    assert start == case.time
    joined = np.concatenate(pieces, 1)
    np.testing.assert_array_equal(joined[:, ::-1] if reverse else joined, whole)
    np.testing.assert_array_equal(state, last)


def test_convolution_with_many_sequences(kernels: Kernels) -> None:
    """More sequences than the backward pass keeps partial sums for, and runs longer than 64 steps."""
    for case in (ConvCase(600, 3, 2, 4, stateful=True), ConvCase(40, 900, 4, 3)):
        arrays = conv_arrays(case)
        dy, dlast = np.random.default_rng(1).normal(size=arrays["x"].shape).astype(np.float32), None
        if case.stateful:
            dlast = np.ones(conv_state_shape(case), np.float32)
        want = conv_gradients_oracle(case, arrays, dy, dlast)
        for name, got in kernels.conv_gradients(case, arrays, dy, dlast).items():
            assert_near(f"{name} of {case}", got, want[name], kernels.gradient_bound)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_impossible_sizes_are_refused(library: ctypes.CDLL) -> None:
    case = ScanCase()
    size = ctypes.c_int64()
    for field in ("batch", "time", "channel", "state", "group"):
        for value in (0, -1, -(2**63), 2**62, 2**63 - 1):
            scan = scan_structure(case, {}, address)
            setattr(scan, field, value)
            for backward in (0, 1):
                arguments = [ctypes.byref(scan), None, backward, ctypes.byref(size)]
                assert library.hcmen_cuda_selective_scan_workspace(*arguments) == BAD_ARGUMENT
            assert library.hcmen_cuda_selective_scan_forward(*by_reference(scan, CudaLaunch())) == BAD_ARGUMENT
    for field in ("batch", "time", "channel", "width"):
        for value in (0, -1, -(2**63), 2**62, 2**63 - 1):
            conv = conv_structure(ConvCase(), {}, address)
            setattr(conv, field, value)
            arguments = [ctypes.byref(conv), 1, ctypes.byref(size)]
            assert library.hcmen_cuda_causal_conv1d_workspace(*arguments) == BAD_ARGUMENT
    # A width of 1 has no state.
    case, memory = ConvCase(width=1), np.zeros(1000, np.float32)
    arrays = {**conv_arrays(case), "y": memory[:90]}
    launch = CudaLaunch(workspace=memory.ctypes.data, workspace_bytes=memory.nbytes)
    grads = dict.fromkeys(("dy", "dx", "dweight", "dbias"), memory)
    forward, backward = (getattr(library, f"hcmen_cuda_causal_conv1d_{way}") for way in ("forward", "backward"))
    for name in ("initial_state", "last_state"):
        given = by_reference(conv_structure(case, {**arrays, name: memory}, address), launch)
        assert forward(*given) == BAD_ARGUMENT
    for name in ("dlast_state", "dinitial_state"):
        grad = conv_gradients_structure({**grads, name: memory}, address)
        assert backward(*by_reference(conv_structure(case, arrays, address), grad, launch)) == BAD_ARGUMENT


def test_null_pointers_and_odd_wishes_are_refused(library: ctypes.CDLL) -> None:
    case = ScanCase()
    arrays = {**scan_arrays(case), "y": np.empty((2, 9, 5), np.float32), "last_state": np.empty((2, 5, 4), np.float32)}
    forward = library.hcmen_cuda_selective_scan_forward
    assert forward(*by_reference(scan_structure(case, arrays, address), CudaLaunch())) == OK
    for name in ("u", "delta", "A", "B", "C", "D", "delta_bias", "y"):
        scan = scan_structure(case, {k: x for k, x in arrays.items() if k != name}, address)
        assert forward(*by_reference(scan, CudaLaunch())) == BAD_ARGUMENT
    scan = scan_structure(case, arrays, address)
    for wish in (
        {"lanes_per_channel": 3},
        {"lanes_per_channel": 64},
        {"lanes_per_channel": -1},
        {"time_warps": 17},
        {"time_warps": -1},
        {"channel_warps": 3},
        {"channel_warps": 8},
        {"steps_per_warp": 6},
        {"steps_per_warp": 68},
        {"steps_per_warp": -4},
        {"steps_per_chunk": -2},
    ):
        assert forward(*by_reference(scan, CudaLaunch(**wish))) == BAD_ARGUMENT
    assert forward(ctypes.byref(scan), None) == BAD_ARGUMENT
    assert forward(None, ctypes.byref(CudaLaunch())) == BAD_ARGUMENT
    scan.dtype = 2
    assert forward(*by_reference(scan, CudaLaunch())) == BAD_ARGUMENT
    with pytest.raises(InputError, match="at most 512 states forward"):
        workspace_bytes(library, "selective_scan", scan_structure(replace(case, state=513), {}, address), None, 0)
    with pytest.raises(InputError, match="and 256 backward"):
        workspace_bytes(library, "selective_scan", scan_structure(replace(case, state=257), {}, address), None, 1)


def test_a_workspace_must_be_large_enough_and_aligned(library: ctypes.CDLL) -> None:
    case = ScanCase(time=64)
    arrays = {**scan_arrays(case), "y": np.empty((2, 64, 5), np.float32)}
    scan = scan_structure(case, arrays, address)
    launch = CudaLaunch(steps_per_chunk=16)
    size = workspace_bytes(library, "selective_scan", scan, launch, 0)
    assert size > 0
    memory = np.empty(size // 4 + 4, np.float32)
    forward = library.hcmen_cuda_selective_scan_forward
    launch.workspace, launch.workspace_bytes = memory.ctypes.data, size - 1
    assert forward(*by_reference(scan, launch)) == SMALL_WORKSPACE
    launch.workspace, launch.workspace_bytes = memory.ctypes.data + 4, size
    assert forward(*by_reference(scan, launch)) == BAD_ARGUMENT
    launch.workspace = None
    assert forward(*by_reference(scan, launch)) == BAD_ARGUMENT
    launch.workspace = memory.ctypes.data
    assert forward(*by_reference(scan, launch)) == OK


def test_the_workspace_of_gradients_is_that_of_their_chunks(library: ctypes.CDLL) -> None:
    case = ScanCase(time=64)
    arrays = scan_arrays(case)
    scan = scan_structure(case, arrays, address)
    gradients = {**gradient_arrays(arrays), "dy": np.ones_like(arrays["u"])}
    grad = scan_gradients_structure(gradients, address)
    sizes = {c: workspace_bytes(library, "selective_scan", scan, CudaLaunch(steps_per_chunk=c), 1) for c in (8, 16, -1)}
    assert sizes[8] > sizes[16] > sizes[-1] > 0
    backward = library.hcmen_cuda_selective_scan_backward
    memory = np.empty(sizes[8] // 4, np.float32)
    for chunk, size in sizes.items():
        launch = CudaLaunch(workspace=memory.ctypes.data, workspace_bytes=size, steps_per_chunk=chunk)
        assert backward(*by_reference(scan, grad, launch)) == OK
        launch.workspace_bytes = size - 1
        assert backward(*by_reference(scan, grad, launch)) == SMALL_WORKSPACE
    for wish in ({"steps_per_chunk": -2}, {"sequences_at_once": -1}):
        launch = CudaLaunch(workspace=memory.ctypes.data, workspace_bytes=memory.nbytes, **wish)
        assert backward(*by_reference(scan, grad, launch)) == BAD_ARGUMENT


def test_gradients_are_float32_and_complete(library: ctypes.CDLL) -> None:
    case = ScanCase()
    arrays = scan_arrays(case)
    dy = np.ones_like(arrays["u"])
    memory = np.empty(100_000, np.float32)
    launch = CudaLaunch(workspace=memory.ctypes.data, workspace_bytes=memory.nbytes)
    gradients = {**gradient_arrays(arrays), "dy": dy}
    backward = library.hcmen_cuda_selective_scan_backward
    scan = scan_structure(case, arrays, address)
    assert backward(*by_reference(scan, scan_gradients_structure(gradients, address), launch)) == OK
    for name in ("dy", "du", "ddelta", "dA", "dB", "dC", "dD", "ddelta_bias", "dz"):
        some = scan_gradients_structure({k: x for k, x in gradients.items() if k != name}, address)
        assert backward(*by_reference(scan, some, launch)) == BAD_ARGUMENT
    scan.dtype = 1
    assert backward(*by_reference(scan, scan_gradients_structure(gradients, address), launch)) == BAD_ARGUMENT


def test_another_library_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "other.c"
    target = tmp_path / "libother.so"
    source.write_text("int hcmen_cuda_ops_version(void) { return 99; }\n")
    command = [str(emulated.compiler()), "-x", "c", "-shared", "-fPIC", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    with pytest.raises(BackendError, match="from another version"):
        declare(ctypes.CDLL(str(target)), "libother.so")
