"""The CUDA kernels of the state space dual, run on the host as test_cuda_kernels.py runs the others: the sources as
they stand, over tests/emulation/cuda_emulation.h, against float64.
"""

from __future__ import annotations

import ctypes
import math
import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import emulated
from helpers.dual_cases import (
    DUALS,
    NAMES,
    DualCase,
    dual_arrays,
    dual_gradients_oracle,
    dual_gradients_structure,
    dual_oracle,
    dual_structure,
    step_sizes,
)
from helpers.emulated import Kernels
from helpers.op_cases import address, assert_near, by_reference, gradient_arrays

from hcmen.base.cuda_library import CudaLaunch, CudaPlan, call, workspace_bytes
from hcmen.base.errors import InputError

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="there is no C++ compiler")

OK, BAD_ARGUMENT, SMALL_WORKSPACE = 0, 1, 17
SWITCHES = 32
"""Cases at the head of DUALS in float32, one for each set of switches; as many in float16 follow."""


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


def check_forward(kernels: Kernels, case: DualCase, **wish: int) -> None:
    arrays = dual_arrays(case)
    for name, got, want in zip(NAMES, kernels.dual(case, arrays, **wish), dual_oracle(case, arrays), strict=True):
        assert_near(f"{name} of {case} {wish}", got, want, kernels.bound, least=1.0)


def gradient_inputs(case: DualCase) -> tuple[np.ndarray, np.ndarray | None]:
    rng = np.random.default_rng(1)
    dy = rng.normal(size=case.series).astype(np.float32)
    return dy, rng.normal(size=case.states).astype(np.float32) if case.stateful else None


def check_backward(kernels: Kernels, case: DualCase, **wish: int) -> None:
    arrays, inputs = dual_arrays(case), gradient_inputs(case)
    got, want = kernels.dual_gradients(case, arrays, *inputs, **wish), dual_gradients_oracle(case, arrays, *inputs)
    assert set(got) == set(want)
    # What is summed over all steps may cancel out; its error is that of its terms.
    most = float(np.abs(want["ddt"]).max())
    least = {"ddt_bias": most, "dA": most * float(step_sizes(case, arrays).max())}
    for name in want:
        bound = kernels.gradient_bound
        assert_near(f"{name} of {case} {wish}", got[name], want[name], bound, least=least.get(name, 0.0))


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", DUALS[: 2 * SWITCHES], ids=str)
def test_dual_with_every_attribute(kernels: Kernels, case: DualCase) -> None:
    check_forward(kernels, case)
    check_forward(kernels, case, steps_per_chunk=8)
    if case.dtype == "float32":
        check_backward(kernels, case, steps_per_chunk=-1 if case.seed % 2 else 8)


def test_dual_with_awkward_sizes(kernels: Kernels) -> None:
    for case in DUALS[2 * SWITCHES :]:
        if case.time * case.head * case.head_dim * case.state < 200_000:
            check_forward(kernels, case)


@pytest.mark.parametrize("state", [1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100, 128, 129, 200, 256, 257, 512])
def test_dual_with_every_number_of_states(kernels: Kernels, state: int) -> None:
    case = DualCase(1, 10, 2, 6, state, reverse=state % 2 == 0)
    check_forward(kernels, case)
    if state <= 256:
        check_backward(kernels, replace(case, time=9, batch=1 + (state < 32)))


@pytest.mark.parametrize("time", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 64, 65, 130])
def test_dual_with_every_length(kernels: Kernels, time: int) -> None:
    for case in (DualCase(1, time, 3, 5, 8), DualCase(2, time, 2, 3, 16, 2, reverse=True, gated=False)):
        check_forward(kernels, case)
        check_forward(kernels, case, steps_per_chunk=-1)
        check_backward(kernels, case)
        check_backward(kernels, case, steps_per_chunk=-1)


@pytest.mark.parametrize(
    ("head", "head_dim", "group"),
    [
        (1, 1, 1),
        (3, 2, 3),
        (4, 4, 1),
        (5, 7, 1),
        (8, 33, 2),
        (2, 64, 1),
        (1, 130, 1),
        (40, 1, 1),
        (6, 20, 3),
        (70, 3, 2),
    ],
)
def test_dual_with_every_head(kernels: Kernels, head: int, head_dim: int, group: int) -> None:
    """Heads of less than a row group and of several blocks; blocks of several heads, cut in the middle of one."""
    for batch, state, wide in ((1, 4, True), (2, 20, False)):
        case = DualCase(batch, 6, head, head_dim, state, group, wide=wide)
        check_forward(kernels, case)
        check_forward(kernels, replace(case, dtype="float16"), channel_warps=1)
        if head * head_dim < 200:
            check_backward(kernels, case)


@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("warps", [1, 2, 4])
def test_dual_with_every_plan(kernels: Kernels, lanes: int, warps: int) -> None:
    """However the work is shared out, the numbers are right; the wish is heard."""
    case = DualCase(1, 22, 3, 44, 16, reverse=True)
    for steps, chunk in ((4, -1), (12, 9), (64, 16)):
        wish = {"lanes_per_channel": lanes, "channel_warps": warps, "steps_per_warp": steps, "steps_per_chunk": chunk}
        check_forward(kernels, case, **wish)
        found = plan(kernels.library, case, **wish)
        assert found.lanes_per_channel == lanes
        assert found.states_per_lane == max(4, 16 // lanes)
        assert found.chunks == {-1: 1, 9: 3, 16: 2}[chunk]
        # As far as there are rows for so many warps.
        assert found.channel_warps == min(warps, {1: 2}.get(lanes, 4))
        assert found.steps_per_warp <= steps


@pytest.mark.parametrize("chunk", [1, 8, 9, 24, 1000])
@pytest.mark.parametrize("time", [1, 8, 9, 17, 90])
def test_dual_gradients_in_chunks(kernels: Kernels, time: int, chunk: int) -> None:
    """Lengths around those of a tile (8 steps) and of a chunk, a whole number of tiles; more than eight chunks, which
    is how many are carried at once; several warps of rows and of states."""
    check_backward(kernels, DualCase(1, time, 2, 3, 5, masked=time // 3), steps_per_chunk=chunk)
    check_backward(kernels, DualCase(1, time, 2, 34, 17, 2, reverse=True, gated=False), steps_per_chunk=chunk)


def test_dual_gradients_of_portions(kernels: Kernels) -> None:
    """The workspace holds some of the sequences; results are the same, bit for bit, however many."""
    for case in (DualCase(4, 9, 2, 3, 16), DualCase(3, 9, 1, 34, 100, gated=False, stateful=False, wide=True)):
        arrays, inputs = dual_arrays(case), gradient_inputs(case)
        for chunk in (-1, 8):
            want = kernels.dual_gradients(case, arrays, *inputs, steps_per_chunk=chunk)
            for sequences in (1, 3):
                wish = {"steps_per_chunk": chunk, "sequences_at_once": sequences}
                got = kernels.dual_gradients(case, arrays, *inputs, **wish)
                for name in want:
                    np.testing.assert_array_equal(got[name], want[name], err_msg=f"{name} of {case} {wish}")


def test_dual_with_long_steps_and_short_ones(kernels: Kernels) -> None:
    for mean in (-10.0, 0.0, 3.0, 19.5):
        case = DualCase(2, 40, 3, 5, 8, mean=mean)
        check_forward(kernels, case)
        check_forward(kernels, case, steps_per_chunk=8)
        check_backward(kernels, replace(case, mean=min(mean, 3.0)), steps_per_chunk=16)


def test_dual_steps_that_are_cut_have_no_gradient(kernels: Kernels) -> None:
    case = DualCase(2, 30, 3, 5, 8, dt_min=0.01, dt_max=0.03, mean=-4.0)
    arrays, inputs = dual_arrays(case), gradient_inputs(case)
    size = np.log1p(np.exp(arrays["dt"].astype(np.float64) + arrays["dt_bias"]))
    cut = (size < 0.01) | (size > 0.03)
    assert 0.2 < cut.mean() < 0.8
    ddt = kernels.dual_gradients(case, arrays, *inputs)["ddt"]
    assert (ddt[cut] == 0).all()
    assert (ddt[~cut] != 0).all()
    check_backward(kernels, case)
    # All steps of one size, then; and rates that let states grow.
    for least, most in ((0.02, 0.02), (-0.02, 0.0)):
        check_forward(kernels, replace(case, dt_min=least, dt_max=most, softplus=False))
    arrays["A"] = -arrays["A"]
    for got, want in zip(kernels.dual(case, arrays), dual_oracle(case, arrays), strict=True):
        assert_near("with growing states", got, want, kernels.bound)


def test_random_duals(kernels: Kernels) -> None:
    rng = random.Random(0)
    for seed in range(16):
        group = rng.choice([1, 1, 2, 3])
        case = DualCase(
            batch=rng.randint(1, 3),
            time=rng.randint(1, 50),
            head=group * rng.randint(1, 3),
            head_dim=rng.choice([1, 3, 4, 9, 32]),
            state=rng.choice([1, 4, 12, 16, 40]),
            group=group,
            dtype=rng.choice(["float32", "float16"]),
            gated=rng.random() < 0.5,
            stateful=rng.random() < 0.5,
            reverse=rng.random() < 0.5,
            softplus=rng.random() < 0.7,
            wide=rng.random() < 0.5,
            dt_max=rng.choice([math.inf, 0.05]),
            seed=seed,
        )
        check_forward(kernels, case, steps_per_chunk=rng.choice([0, 0, 5, 16, 40]))
        if case.dtype == "float32" and case.head * case.head_dim < 30:
            check_backward(kernels, case, steps_per_chunk=rng.choice([0, -1, 5, 16, 40]))


def test_dual_at_addresses_that_are_no_multiple_of_four_elements(kernels: Kernels) -> None:
    case = DualCase(2, 20, 2, 8, 16)
    arrays = dual_arrays(case)
    want = kernels.dual(case, arrays)
    for name in ("x", "dt", "z", "A", "B", "C", "initial_state"):
        memory = np.empty(arrays[name].size + 1, np.float32)
        memory[1:] = arrays[name].ravel()
        shifted = {**arrays, name: memory[1:].reshape(arrays[name].shape)}
        for got, expected in zip(kernels.dual(case, shifted), want, strict=True):
            np.testing.assert_array_equal(got, expected)


def test_what_lies_in_masked_steps_of_a_dual_does_not_matter(kernels: Kernels) -> None:
    case = DualCase(3, 40, 2, 4, 16, masked=9)
    arrays = dual_arrays(case)
    want = kernels.dual(case, arrays)
    for name in ("x", "B", "C", "z"):
        arrays[name][::2, -9:] = 1e3
    got = kernels.dual(case, arrays)
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_array_equal(got[0][::2, :-9], want[0][::2, :-9])
    np.testing.assert_array_equal(got[0][1::2], want[0][1::2])


def test_nan_of_a_dual_stays_where_it_can_reach(kernels: Kernels) -> None:
    case = DualCase(2, 30, 3, 5, 4)
    arrays = dual_arrays(case)
    want = kernels.dual(case, arrays)[0]
    arrays["dt"][1, 10, 1] = np.nan
    got = kernels.dual(case, arrays)[0]
    reached = np.zeros_like(got, dtype=bool)
    reached[1, 10:, 1] = True
    assert np.isnan(got[reached]).all()
    np.testing.assert_array_equal(got[~reached], want[~reached])


def test_duals_do_not_depend_on_the_order_of_threads_and_blocks(kernels: Kernels) -> None:
    """Bit for bit; an access that no barrier orders would come out differently."""
    cases = [
        (DualCase(2, 12, 3, 12, 16), 0),
        (DualCase(1, 20, 3, 3, 20, 3, wide=True), 9),
        (DualCase(1, 9, 1, 70, 5), -1),
    ]
    found = []
    for order in (0, 1, 2):
        kernels.library.emulation_set_order(order)
        results: list[np.ndarray] = []
        for case, chunk in cases:
            arrays, inputs = dual_arrays(case), gradient_inputs(case)
            results += kernels.dual(case, arrays, steps_per_chunk=chunk)
            results += kernels.dual_gradients(case, arrays, *inputs, steps_per_chunk=chunk).values()
        found.append(results)
    kernels.library.emulation_set_order(0)
    for others in found[1:]:
        for got, want in zip(others, found[0], strict=True):
            np.testing.assert_array_equal(got, want)


# --- plans ----------------------------------------------------------------------------------------------------------


def plan(library: ctypes.CDLL, case: DualCase, **wish: int) -> CudaPlan:
    found = CudaPlan()
    call(library, "state_space_dual_plan", dual_structure(case, {}, address), CudaLaunch(**wish), found)
    return found


def test_plans_of_duals_fit_every_device(library: ctypes.CDLL) -> None:
    """Over sizes far beyond what can be run here: what a block asks for is what any device has."""
    rng = random.Random(0)
    for _ in range(2000):
        group = rng.choice([1, 1, 1, 2, 8])
        case = DualCase(
            batch=rng.choice([1, 2, 16, 256, 5000]),
            time=rng.choice([1, 50, 375, 500, 4096, 100_000]),
            head=group * rng.choice([1, 3, 24, 80]),
            head_dim=rng.choice([1, 16, 63, 64, 128, 1000]),
            state=rng.randint(1, 512),
            group=group,
        )
        found = plan(library, case)
        assert 0 < found.shared_bytes <= 48 << 10
        assert found.time_warps == 1
        assert found.channel_warps <= 4
        assert found.lanes_per_channel * found.states_per_lane >= case.state
        assert found.chunks == -(-case.time // found.steps_per_chunk)
        # Working memory of a chunked pass stays below twice what x takes, or four chunks of few states do.
        size = workspace_bytes(library, "state_space_dual", dual_structure(case, {}, address), None, 0)
        assert (size == 0) == (found.chunks == 1)
        assert size <= 4 * case.batch * case.time * case.head * (case.head_dim * max(2.1, case.state / 32) + 1)


@pytest.mark.parametrize(
    ("case", "lanes", "states", "chunks"),
    [
        # Mamba-2 of 130 million parameters: 24 heads of 64 rows, 128 states.
        (DualCase(16, 512, 24, 64, 128), 16, 8, 1),
        (DualCase(8, 512, 24, 64, 128), 16, 8, 1),
        (DualCase(4, 512, 24, 64, 128), 32, 4, 1),
        (DualCase(1, 512, 24, 64, 128), 16, 8, 8),
        (DualCase(1, 4096, 24, 64, 128), 16, 8, 16),
        # One step: as many warps as there can be.
        (DualCase(1, 1, 24, 64, 128), 32, 4, 1),
        (DualCase(64, 512, 24, 64, 64, 8), 8, 8, 1),
        (DualCase(1, 512, 24, 64, 256), 32, 8, 4),
        (DualCase(16, 512, 24, 64, 512), 32, 16, 1),
        (DualCase(16, 512, 24, 64, 16), 2, 8, 6),
        (DualCase(32, 512, 24, 64, 16), 4, 4, 1),
        (DualCase(64, 512, 24, 64, 16), 2, 8, 1),
    ],
)
def test_plans_of_duals(library: ctypes.CDLL, case: DualCase, lanes: int, states: int, chunks: int) -> None:
    found = plan(library, case)
    assert (found.lanes_per_channel, found.states_per_lane, found.chunks) == (lanes, states, chunks)


@pytest.mark.parametrize("batch", [1, 16, 256])
def test_gradients_of_duals_take_bounded_memory(library: ctypes.CDLL, batch: int) -> None:
    """A few times what the states before every eighth step take, and less than 7 GB where that is more."""
    for time in (50, 500, 4096):
        case = DualCase(batch, time, 24, 64, 128)
        size = workspace_bytes(library, "state_space_dual", dual_structure(case, {}, address), None, 1)
        assert size < 4 * batch * (-(-time // 8)) * 24 * 64 * 128 * 6
        assert size < 7e9


# --- refusals -------------------------------------------------------------------------------------------------------


def test_impossible_sizes_of_duals_are_refused(library: ctypes.CDLL) -> None:
    size = ctypes.c_int64()
    for field in ("batch", "time", "head", "head_dim", "state", "group"):
        for value in (0, -1, -(2**63), 2**62, 2**63 - 1):
            dual = dual_structure(DualCase(), {}, address)
            setattr(dual, field, value)
            for backward in (0, 1):
                arguments = [ctypes.byref(dual), None, backward, ctypes.byref(size)]
                assert library.hcmen_cuda_state_space_dual_workspace(*arguments) == BAD_ARGUMENT
            assert library.hcmen_cuda_state_space_dual_forward(*by_reference(dual, CudaLaunch())) == BAD_ARGUMENT
    for wrong in (DualCase(head=3, group=2), DualCase(dt_min=1.0, dt_max=0.5), DualCase(dt_min=math.nan)):
        dual = dual_structure(wrong, {}, address)
        assert library.hcmen_cuda_state_space_dual_plan(*by_reference(dual, CudaLaunch(), CudaPlan())) == BAD_ARGUMENT
    for state, backward, words in ((513, 0, "at most 512 states forward"), (257, 1, "and 256 backward")):
        dual = dual_structure(DualCase(state=state), {}, address)
        with pytest.raises(InputError, match=rf"head 2, head_dim 5, state {state}, .*{words}"):
            workspace_bytes(library, "state_space_dual", dual, None, backward)
    for many in (DualCase(head=1 << 25, head_dim=1), DualCase(head=1, head_dim=1 << 26)):
        with pytest.raises(InputError, match="2\\^25"):
            workspace_bytes(library, "state_space_dual", dual_structure(many, {}, address), None, 0)


def test_null_pointers_and_odd_wishes_of_duals_are_refused(library: ctypes.CDLL) -> None:
    case = DualCase()
    arrays = {
        **dual_arrays(case),
        "y": np.empty(case.series, np.float32),
        "last_state": np.empty(case.states, np.float32),
    }
    forward = library.hcmen_cuda_state_space_dual_forward
    assert forward(*by_reference(dual_structure(case, arrays, address), CudaLaunch())) == OK
    for name in ("x", "dt", "A", "B", "C", "D", "dt_bias", "y"):
        dual = dual_structure(case, {k: x for k, x in arrays.items() if k != name}, address)
        assert forward(*by_reference(dual, CudaLaunch())) == BAD_ARGUMENT
    dual = dual_structure(case, arrays, address)
    for wish in (
        {"lanes_per_channel": 3},
        {"lanes_per_channel": 64},
        {"time_warps": 2},
        {"channel_warps": 3},
        {"channel_warps": 8},
        {"steps_per_warp": 6},
        {"steps_per_warp": 68},
        {"steps_per_chunk": -2},
    ):
        assert forward(*by_reference(dual, CudaLaunch(**wish))) == BAD_ARGUMENT
    assert forward(ctypes.byref(dual), None) == BAD_ARGUMENT
    assert forward(None, ctypes.byref(CudaLaunch())) == BAD_ARGUMENT
    dual.dtype = 2
    assert forward(*by_reference(dual, CudaLaunch())) == BAD_ARGUMENT


def test_workspaces_of_duals(library: ctypes.CDLL) -> None:
    case = DualCase(time=64)
    arrays = {**dual_arrays(case), "y": np.empty(case.series, np.float32)}
    dual = dual_structure(case, arrays, address)
    gradients = {**gradient_arrays(dual_arrays(case)), "dy": np.ones(case.series, np.float32)}
    grad = dual_gradients_structure(gradients, address)
    for backward in (0, 1):

        def run(launch: CudaLaunch, backward: int = backward) -> int:
            if backward:
                return int(library.hcmen_cuda_state_space_dual_backward(*by_reference(dual, grad, launch)))
            return int(library.hcmen_cuda_state_space_dual_forward(*by_reference(dual, launch)))

        launch = CudaLaunch(steps_per_chunk=16)
        size = workspace_bytes(library, "state_space_dual", dual, launch, backward)
        assert size > 0
        memory = np.empty(size // 4 + 4, np.float32)
        launch.workspace, launch.workspace_bytes = memory.ctypes.data, size - 1
        assert run(launch) == SMALL_WORKSPACE
        launch.workspace, launch.workspace_bytes = memory.ctypes.data + 4, size
        assert run(launch) == BAD_ARGUMENT
        launch.workspace = None
        assert run(launch) == BAD_ARGUMENT
        launch.workspace = memory.ctypes.data
        assert run(launch) == OK
    for name in ("dy", "dx", "ddt", "dA", "dB", "dC", "dD", "ddt_bias", "dz"):
        some = dual_gradients_structure({k: x for k, x in gradients.items() if k != name}, address)
        assert library.hcmen_cuda_state_space_dual_backward(*by_reference(dual, some, launch)) == BAD_ARGUMENT
    dual.dtype = 1
    assert library.hcmen_cuda_state_space_dual_backward(*by_reference(dual, grad, launch)) == BAD_ARGUMENT
