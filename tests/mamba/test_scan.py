"""The selective scan: reference against an independent float64 loop, native kernels against the reference in float64.

Awkward sizes and every set of attributes are in csrc/test_op_hosts.py.

Sizes, data and bounds follow what real models do: step sizes from softplus(N(-4, 1)) and wider, decay rates to -16.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hcmen.base.errors import BackendError, InputError
from hcmen.mamba.scan import implementation, selective_scan, selective_scan_ref


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The oracles are thousands of tiny operators, which threads only slow down; tests of threads set their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


PARAMETERS = ("u", "delta", "A", "B", "C", "D", "delta_bias", "z", "initial_state")


def scan_data(
    batch: int, time: int, channel: int, state: int, *, group: int | None = None, mean: float = -4.0, seed: int = 0
) -> dict[str, Tensor]:
    """All arguments in float32; `delta` is meant to pass through softplus. B and C have no group axis if None."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    projection = (batch, time, state) if group is None else (batch, time, group, state)
    rates = (torch.arange(state) % 16 + 1.0) * (1 + 0.05 * torch.rand(channel, state, generator=generator))
    return {
        "u": normal(batch, time, channel),
        "delta": normal(batch, time, channel) + mean,
        "A": -rates,
        "B": normal(*projection),
        "C": normal(*projection),
        "D": normal(channel),
        "delta_bias": 0.1 * normal(channel),
        "z": normal(batch, time, channel),
        "initial_state": normal(batch, channel, state),
    }


def chosen(data: dict[str, Tensor], *, gated: bool, stateful: bool, softplus: bool) -> dict[str, Tensor]:
    """`data` reduced to the arguments of an attribute combination, step sizes made positive if softplus is off."""
    data = dict(data)
    if not gated:
        del data["z"]
    if not stateful:
        del data["initial_state"]
    if not softplus:
        data["delta"] = torch.nn.functional.softplus(data["delta"])
        data["delta_bias"] = 0.01 * data["delta_bias"].abs()
    return data


def in_float64(data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() for name, x in data.items()}


def assert_as_exact(got: Tensor, expected: Tensor, bound: float = 1e-6) -> None:
    """The float32 bounds: `bound` times the largest value, and elementwise."""
    largest = float(expected.abs().max())
    assert float((got - expected).abs().max()) <= bound * largest
    torch.testing.assert_close(got.double(), expected, rtol=10 * bound, atol=bound * largest)


# --- the reference --------------------------------------------------------------------------------------------------


def loop_float64(u, delta, A, B, C, D, delta_bias, z, *, softplus: bool) -> tuple[np.ndarray, np.ndarray]:
    """mamba_ssm's definition, channels first ([b, c, t]; B and C [b, g, n, t]), one scalar recurrence at a time."""
    batch, channel, time = u.shape
    y, last = np.zeros(u.shape), np.zeros((batch, channel, A.shape[1]))
    for b in range(batch):
        for c in range(channel):
            group = c // (channel // B.shape[1])
            state = np.zeros(A.shape[1])
            for t in range(time):
                step = delta[b, c, t] + delta_bias[c]
                if softplus and step <= 20:
                    step = np.log1p(np.exp(step))
                state = np.exp(step * A[c]) * state + step * B[b, group, :, t] * u[b, c, t]
                out = (state * C[b, group, :, t]).sum() + D[c] * u[b, c, t]
                y[b, c, t] = out * z[b, c, t] / (1 + np.exp(-z[b, c, t]))
            last[b, c] = state
    return y, last


@pytest.mark.parametrize(("group", "softplus", "mean"), [(1, True, -1.0), (2, True, 21.0), (3, False, 0.0)])
def test_reference_is_mambas_definition(group: int, softplus: bool, mean: float) -> None:
    data = in_float64(scan_data(2, 9, 6, 5, group=group, mean=mean))
    del data["initial_state"]
    if not softplus:
        data["delta"] = data["delta"].abs()
    data["A"] = data["A"] / 16
    y, last = selective_scan_ref(**data, delta_softplus=softplus, return_last_state=True)
    a = {name: x.numpy() for name, x in data.items()}
    series = {name: a[name].transpose(0, 2, 1) for name in ("u", "delta", "z")}
    projections = {name: a[name].transpose(0, 2, 3, 1) for name in ("B", "C")}
    want, want_last = loop_float64(
        **series, **projections, A=a["A"], D=a["D"], delta_bias=a["delta_bias"], softplus=softplus
    )
    np.testing.assert_allclose(y.numpy().transpose(0, 2, 1), want, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(last.numpy(), want_last, rtol=1e-11, atol=1e-11)


def test_reference_reverse_is_flip_scan_flip() -> None:
    data = in_float64(scan_data(2, 11, 3, 4))
    y, last = selective_scan_ref(**data, delta_softplus=True, reverse=True, return_last_state=True)
    flipped = {name: x.flip(1) if name in ("u", "delta", "B", "C", "z") else x for name, x in data.items()}
    want, want_last = selective_scan_ref(**flipped, delta_softplus=True, return_last_state=True)
    torch.testing.assert_close(y, want.flip(1), rtol=0, atol=0)
    torch.testing.assert_close(last, want_last, rtol=0, atol=0)


def test_reference_state_continues_a_scan() -> None:
    data = in_float64(scan_data(2, 11, 3, 4))
    y, last = selective_scan_ref(**data, delta_softplus=True, return_last_state=True)
    split = ("u", "delta", "B", "C", "z")
    first = {name: x[:, :5] if name in split else x for name, x in data.items()}
    second = {name: x[:, 5:] if name in split else x for name, x in data.items()}
    y_first, middle = selective_scan_ref(**first, delta_softplus=True, return_last_state=True)
    second["initial_state"] = middle
    y_second, end = selective_scan_ref(**second, delta_softplus=True, return_last_state=True)
    torch.testing.assert_close(torch.cat([y_first, y_second], 1), y)
    torch.testing.assert_close(end, last)


# --- native forward -------------------------------------------------------------------------------------------------

# batch, time, channel, state, group (None: B and C without group axis): every awkward size at least once.
SIZES = [
    (1, 1, 1, 1, None),
    (3, 2, 15, 4, None),
    (1, 7, 16, 12, 2),
    (3, 33, 17, 16, None),
    (1, 500, 17, 17, None),
    (1, 32, 130, 64, 1),
    (3, 65, 30, 5, 3),
    (2, 31, 8, 3, 8),
    (1, 50, 512, 16, None),
]


@pytest.mark.parametrize("mean", [-7.0, -4.0, 0.0])
@pytest.mark.parametrize("reverse", [False, True])
def test_forward_stays_exact_over_4096_steps(mean: float, reverse: bool) -> None:
    data = scan_data(1, 4096, 17, 16, mean=mean)
    flags = {"delta_softplus": True, "reverse": reverse, "return_last_state": True}
    want, want_last = selective_scan_ref(**in_float64(data), **flags)
    with implementation("native"):
        y, last = selective_scan(**data, **flags)
    assert_as_exact(y, want)
    # At mean -7 a state remembers a thousand steps, whose rounding float32 cannot but add up.
    assert_as_exact(last, want_last, bound=3e-6)


def test_optional_arguments_may_be_absent() -> None:
    data = {name: x for name, x in scan_data(2, 9, 6, 4).items() if name in ("u", "delta", "A", "B", "C")}
    with implementation("native"):
        y = selective_scan(**data, delta_softplus=True)
    assert_as_exact(y, selective_scan_ref(**in_float64(data), delta_softplus=True))


def test_half_precision_rounds_every_value_as_the_standard_says() -> None:
    """With A = C = 0 and D = 1 the scan is a copy; every float16 must survive it, subnormals and infinities too."""
    u = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).reshape(1, 4096, 16)
    zeros = torch.zeros(1, 4096, 16, dtype=torch.float16)
    b = torch.zeros(1, 4096, 1, dtype=torch.float16)
    with implementation("native"):
        # Infinities would meet the zeros of B in the state; finite values stay out of each other's way.
        finite = torch.where(u.isfinite(), u, torch.zeros_like(u))
        y = selective_scan(finite, zeros, torch.zeros(16, 1), b, b, torch.ones(16))
        doubled = selective_scan(finite, zeros, torch.zeros(16, 1), b, b, torch.full((16,), 1.9))
        y_nan = selective_scan(u, zeros, torch.zeros(16, 1), b, b, torch.ones(16))
    # Adding the zero that the states contribute turns -0 into +0.
    assert torch.equal(y, finite + 0)
    assert torch.equal(doubled, (finite.float() * torch.tensor(1.9)).half() + 0)
    assert bool(y_nan[u.isnan()].isnan().all())


def test_padding_steps_change_nothing() -> None:
    """A step whose delta is very negative before softplus leaves the state alone, wherever it stands."""
    data = scan_data(2, 70, 33, 12)
    valid = 41
    data["delta"][:, valid:] = -1e9
    series = ("u", "delta", "B", "C", "z")
    short = {name: x[:, :valid].contiguous() if name in series else x for name, x in data.items()}
    for reverse in (False, True):
        flags = {"delta_softplus": True, "reverse": reverse, "return_last_state": True}
        with implementation("native"):
            y, last = selective_scan(**data, **flags)
            y_short, last_short = selective_scan(**short, **flags)
        assert torch.equal(y[:, :valid], y_short)
        assert torch.equal(last, last_short)


def test_not_contiguous_arguments() -> None:
    data = scan_data(2, 21, 18, 6)
    strided = {name: torch.stack([x, x], -1)[..., 0] for name, x in data.items()}
    assert not strided["u"].is_contiguous()
    with implementation("native"):
        assert torch.equal(selective_scan(**strided, delta_softplus=True), selective_scan(**data, delta_softplus=True))


# --- gradients ------------------------------------------------------------------------------------------------------


def gradients(arguments: dict[str, Tensor], flags: dict[str, bool], stateful: bool, name: str) -> dict[str, Tensor]:
    """Gradients of a fixed random weighting of the outputs, by the implementation called `name`."""
    leaves = {key: x.detach().clone().requires_grad_() for key, x in arguments.items()}
    with implementation(name):
        y, last = selective_scan(**leaves, **flags, return_last_state=True)
    generator = torch.Generator().manual_seed(7)
    loss = (y * torch.randn(y.shape, generator=generator).to(y.dtype)).sum()
    if stateful:
        loss = loss + (last * torch.randn(last.shape, generator=generator).to(last.dtype)).sum()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def assert_gradients(arguments: dict[str, Tensor], flags: dict[str, bool], stateful: bool) -> None:
    want = gradients(in_float64(arguments), flags, stateful, "ref")
    got = gradients(arguments, flags, stateful, "native")
    assert set(got) == set(want)
    for key in want:
        largest = float(want[key].abs().max())
        error = float((got[key] - want[key]).abs().max())
        assert error <= 3e-6 * largest, f"{key}: {error / largest:.2e} of the largest gradient"


@pytest.mark.parametrize("mean", [-4.0, 3.0])
@pytest.mark.parametrize("size", SIZES[:-1], ids=str)
def test_gradients_against_float64(size: tuple[int, int, int, int, int | None], mean: float) -> None:
    batch, time, channel, state, group = size
    data = scan_data(batch, time, channel, state, group=group, mean=mean)
    combinations = [(g, s, r, p) for g in (0, 1) for s in (0, 1) for r in (0, 1) for p in (0, 1)]
    for index, (gated, stateful, reverse, softplus) in enumerate(combinations):
        if time * channel * state > 20000 and index % 4 != 1:
            continue
        if time * channel * state == 1 and not stateful:
            continue  # the gradient of A is zero there: see test_gradient_of_a_single_step
        arguments = chosen(data, gated=bool(gated), stateful=bool(stateful), softplus=bool(softplus))
        assert_gradients(arguments, {"reverse": bool(reverse), "delta_softplus": bool(softplus)}, bool(stateful))


def test_gradient_of_a_single_step() -> None:
    """One step from a zero state does not see A."""
    data = chosen(scan_data(1, 1, 3, 2), gated=True, stateful=False, softplus=True)
    assert float(gradients(data, {"delta_softplus": True}, False, "native")["A"].abs().max()) == 0.0


@pytest.mark.parametrize(("time", "channel"), [(4096, 3), (40, 512)])
def test_gradients_of_long_and_wide_scans(time: int, channel: int) -> None:
    data = scan_data(1, time, channel, 16)
    assert_gradients(data, {"delta_softplus": True, "reverse": False}, True)


def test_half_precision_gradients_arrive_in_half_precision() -> None:
    data = scan_data(2, 9, 17, 4)
    for name in ("u", "delta", "B", "C", "z"):
        data[name] = data[name].half()
    want = gradients(in_float64(data), {"delta_softplus": True}, True, "ref")
    got = gradients(data, {"delta_softplus": True}, True, "native")
    for name in PARAMETERS:
        assert got[name].dtype == data[name].dtype
        largest = float(want[name].abs().max())
        torch.testing.assert_close(got[name].double(), want[name], rtol=1e-3, atol=1e-3 * largest)


def test_opcheck() -> None:
    data = scan_data(2, 9, 6, 4, group=2)
    arguments = [x.requires_grad_() for x in data.values()]
    torch.library.opcheck(torch.ops.hcmen.selective_scan.default, (*arguments, True, False))
    plain = [*arguments[:7], None, None]
    torch.library.opcheck(torch.ops.hcmen.selective_scan.default, (*plain, True, True))


# --- mamba_ssm's own test grid --------------------------------------------------------------------------------------


def channels_first_scan(u, delta, A, B, C, D, z, delta_bias) -> tuple[Tensor, Tensor]:
    """Definition in mamba_ssm's layout ([b, c, t]; B, C [b, n, t] or [b, g, n, t]), all options on, differentiable."""
    step = torch.nn.functional.softplus(delta + delta_bias[:, None])
    if B.dim() == 3:
        B, C = B[:, None], C[:, None]
    repeats = u.shape[1] // B.shape[1]
    B, C = B.repeat_interleave(repeats, 1), C.repeat_interleave(repeats, 1)
    decay = torch.exp(step[:, :, None] * A[:, :, None])
    driven = (step * u)[:, :, None] * B
    state, outputs = torch.zeros_like(decay[..., 0]), []
    for t in range(u.shape[2]):
        state = decay[..., t] * state + driven[..., t]
        outputs.append((state * C[..., t]).sum(-1))
    y = torch.stack(outputs, -1) + D[:, None] * u
    return y * z * torch.sigmoid(z), state


def through_ours(u, delta, A, B, C, D, z, delta_bias) -> tuple[Tensor, Tensor]:
    """mamba_ssm's layout, transposed for our scan and back."""
    B, C = (x.transpose(1, 2) if x.dim() == 3 else x.permute(0, 3, 1, 2) for x in (B, C))
    u, delta, z = (x.transpose(1, 2) for x in (u, delta, z))
    with implementation("native"):
        y, last = selective_scan(u, delta, A, B, C, D, delta_bias, z, delta_softplus=True, return_last_state=True)
    return y.transpose(1, 2), last


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("time", [128, 256, 512, 1024, 2048, 4096])
def test_grid_of_mamba_ssm(time: int, groups: int) -> None:
    """Parameters and tolerances of its tests/ops/test_selective_scan.py (float32), gradients included."""
    generator = torch.Generator().manual_seed(0)
    batch, dim, state = 2, 4, 8
    projection = (batch, state, time) if groups == 1 else (batch, groups, state, time)
    inputs = {
        "u": torch.randn(batch, dim, time, generator=generator),
        "delta": 0.5 * torch.rand(batch, dim, time, generator=generator),
        "A": -0.5 * torch.rand(dim, state, generator=generator),
        "B": torch.randn(projection, generator=generator),
        "C": torch.randn(projection, generator=generator),
        "D": torch.randn(dim, generator=generator),
        "z": torch.randn(batch, dim, time, generator=generator),
        "delta_bias": 0.5 * torch.rand(dim, generator=generator),
    }
    weights = torch.randn(batch, dim, time, generator=generator)
    results = []
    for scan, dtype in ((channels_first_scan, torch.float64), (through_ours, torch.float32)):
        leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
        y, last = scan(**leaves)
        grads = torch.autograd.grad((y * weights.to(dtype)).sum(), list(leaves.values()))
        results.append((y, last, dict(zip(leaves, grads, strict=True))))
    (want, want_last, want_grads), (y, last, grads) = results
    torch.testing.assert_close(y.double(), want, rtol=6e-4, atol=2e-3)
    torch.testing.assert_close(last.double(), want_last, rtol=6e-4, atol=2e-3)
    for name, want_grad in want_grads.items():
        rtol, atol = (6e-4, 2e-3) if inputs[name].shape[-1] == time else (1e-3, 1e-3)
        scale = 1 if inputs[name].shape[-1] == time else float(want_grad.abs().max())
        torch.testing.assert_close(grads[name].double(), want_grad, rtol=rtol, atol=atol * max(1.0, scale))


# --- threads, processes, instruction sets ---------------------------------------------------------------------------


@pytest.fixture
def threads():
    """Sets torch's thread count, which the kernels follow, and restores it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", [(1, 70, 300, 12, 1), (5, 40, 130, 16, 2), (9, 20, 64, 4, 1)], ids=str)
def test_results_do_not_depend_on_the_thread_count(size: tuple[int, int, int, int, int], threads) -> None:
    batch, time, channel, state, group = size
    data = scan_data(batch, time, channel, state, group=group)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        with implementation("native"):
            y, last = selective_scan(**data, delta_softplus=True, return_last_state=True)
        grads = gradients(data, {"delta_softplus": True}, True, "native")
        results.append([y, last, *grads.values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_concurrent_callers(threads) -> None:
    threads(2)
    cases = [scan_data(2, 60 + i, 130, 8, seed=i) for i in range(6)]
    with implementation("native"):
        want = [selective_scan(**data, delta_softplus=True) for data in cases]
    wrong: list[int] = []

    def work(index: int) -> None:
        torch.set_num_threads(2)
        for _ in range(20):
            # The choice of implementation is per context, and so per thread.
            with implementation("native"):
                if not torch.equal(selective_scan(**cases[index], delta_softplus=True), want[index]):
                    wrong.append(index)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert not any(worker.is_alive() for worker in workers)
    assert wrong == []


@pytest.mark.parametrize("isa", ["avx2", "baseline", "neon"])
def test_other_instruction_sets(isa: str) -> None:
    """The tests above that compare numbers, with the kernels of a lower level."""
    environment = {**os.environ, "HCMEN_ISA": isa}
    name = "from hcmen.base.library import library_isa; print(library_isa())"
    probe = subprocess.run([sys.executable, "-c", name], env=environment, capture_output=True, text=True)
    if probe.returncode != 0:
        assert "cannot run" in probe.stderr or "expected one of" in probe.stderr
        pytest.skip(f"{isa} is not of this processor; `make arm` emulates one with neon")
    assert probe.stdout.strip() == isa
    tests = "half_precision or gradients_against or padding or infinities or thread_count"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", tests, str(Path(__file__))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout


# --- values out of the ordinary -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["u", "delta", "B", "C", "z"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinities_go_where_the_reference_sends_them(name: str, value: float) -> None:
    data = scan_data(2, 40, 19, 5)
    data[name][1, 7, 3] = value
    want, want_last = selective_scan_ref(**data, delta_softplus=True, return_last_state=True)
    with implementation("native"):
        y, last = selective_scan(**data, delta_softplus=True, return_last_state=True)
    for got, expected in ((y, want), (last, want_last)):
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.isposinf(), expected.isposinf())
        assert torch.equal(got.isneginf(), expected.isneginf())
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("delta", [0.0, 1e-30, 1e4, 1e30])
def test_extreme_steps(delta: float) -> None:
    data = chosen(scan_data(1, 40, 19, 5), gated=False, stateful=True, softplus=False)
    data["delta"] = torch.full_like(data["delta"], delta)
    want = selective_scan_ref(**in_float64(data))
    with implementation("native"):
        y = selective_scan(**data)
    assert_as_exact(y, want)


def test_growing_states_overflow_to_infinity() -> None:
    ones = torch.ones(1, 200, 17)
    with implementation("native"):
        y = selective_scan(ones, ones, torch.full((17, 2), 1.0), torch.ones(1, 200, 2), torch.ones(1, 200, 2))
    assert bool(y[:, :80].isfinite().all())
    assert bool(y[:, 100:].isposinf().all())


def test_silence_stays_fast_and_the_callers_arithmetic_untouched() -> None:
    """States that fade into subnormals are flushed in the kernels; the thread's own float mode is as before."""
    data = chosen(scan_data(1, 3000, 64, 4), gated=False, stateful=True, softplus=True)
    data["u"].zero_()
    subnormal = torch.full((4,), 1e-40)
    with implementation("native"):
        y, last = selective_scan(**data, delta_softplus=True, return_last_state=True)
    assert bool((y.abs() >= 0).all())
    tiny = torch.finfo(torch.float32).tiny
    assert not bool(((last != 0) & (last.abs() < tiny)).any())
    assert bool((subnormal * 0.5 > 0).all())


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("u", (2, 9), "u has shape"),
        ("delta", (2, 8, 6), "delta has shape"),
        ("A", (5, 4), "A has shape"),
        ("B", (2, 9, 5), "B has shape"),
        ("C", (2, 9, 5), "C has shape"),
        ("D", (5,), "D has shape"),
        ("delta_bias", (6, 1), "delta_bias has shape"),
        ("z", (2, 9, 5), "z has shape"),
        ("initial_state", (2, 4, 6), "initial_state has shape"),
    ],
)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...], message: str) -> None:
    data = scan_data(2, 9, 6, 4)
    data[name] = torch.zeros(shape)
    with pytest.raises(InputError, match=message):
        selective_scan(**data)


def test_groups_must_divide_the_channels() -> None:
    data = scan_data(2, 9, 6, 4, group=4)
    with pytest.raises(InputError, match="4 groups"):
        selective_scan(**data)


def test_mixed_dtypes_are_named() -> None:
    data = scan_data(2, 9, 6, 4)
    data["B"] = data["B"].half()
    with pytest.raises(InputError, match=r"B is torch\.float16, expected"):
        selective_scan(**data)


def test_native_refuses_what_it_cannot_do() -> None:
    data = in_float64(scan_data(2, 9, 6, 4))
    with implementation("native"), pytest.raises(BackendError, match="float64"):
        selective_scan(**data)
    empty = {
        name: x[:, :0] if name in ("u", "delta", "B", "C", "z") else x for name, x in scan_data(2, 9, 6, 4).items()
    }
    with implementation("native"), pytest.raises(InputError, match="at least 1"):
        selective_scan(**empty)
    with pytest.raises(InputError, match="unknown scan implementation"), implementation("fast"):
        pass
