"""The cases that every host of the operators has to pass, their inputs, and what float64 says of them.

A host is whatever computes the operators: PyTorch, ONNX Runtime, CUDA kernels, TensorRT plugins, loops over a header.
tests/csrc/test_op_hosts.py runs `SCANS` and `CONVS` on each; tests of one host make cases of their own.

NumPy alone, so that sanitizers and old environments run it too. PyTorch is imported where gradients are asked for.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hcmen.base.library import ConvArguments, ConvGradients, ScanArguments, ScanGradients

Arrays = dict[str, Any]


# --- cases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScanCase:
    """Sizes and switches of one scan.

    group: None gives B and C no axis of groups. mean: of the step sizes before the softplus. masked: so many steps at
    the end of every other sequence have a step size of zero.
    """

    batch: int = 2
    time: int = 9
    channel: int = 5
    state: int = 4
    group: int | None = 1
    dtype: str = "float32"
    gated: bool = True
    stateful: bool = True
    reverse: bool = False
    softplus: bool = True
    mean: float = -4.0
    masked: int = 0
    seed: int = 0

    def __str__(self) -> str:
        flags = [n for n in ("gated", "stateful", "reverse", "softplus") if getattr(self, n)]
        sizes = f"{self.batch}x{self.time}x{self.channel} n{self.state} g{self.group} {self.dtype}"
        others = [f"{n} {getattr(self, n):g}" for n in ("mean", "masked") if getattr(self, n) != getattr(ScanCase, n)]
        return " ".join([sizes, *flags, *others])

    @property
    def attributes(self) -> dict[str, Any]:
        """Those of a node."""
        names = {"delta_softplus": self.softplus, "reverse": self.reverse, "gated": self.gated}
        return {name: int(on) for name, on in {**names, "stateful": self.stateful}.items()}


@dataclass(frozen=True)
class ConvCase:
    """Sizes and switches of one causal convolution."""

    batch: int = 2
    time: int = 9
    channel: int = 5
    width: int = 4
    dtype: str = "float32"
    silu: bool = True
    reverse: bool = False
    stateful: bool = False
    seed: int = 0

    def __str__(self) -> str:
        flags = [n for n in ("silu", "reverse", "stateful") if getattr(self, n)]
        return " ".join([f"{self.batch}x{self.time}x{self.channel} w{self.width} {self.dtype}", *flags])

    @property
    def activation(self) -> str:
        return "silu" if self.silu else "none"

    @property
    def attributes(self) -> dict[str, Any]:
        """Those of a node."""
        return {"activation": self.activation, "reverse": int(self.reverse), "stateful": int(self.stateful)}


def _scans() -> list[ScanCase]:
    switches = list(itertools.product((False, True), repeat=4))
    # Every set of switches, in both types, with groups and masked steps.
    cases = [ScanCase(2, 21, 12, 12, 3, dtype, *on, masked=4) for dtype in ("float32", "float16") for on in switches]
    # Every awkward size with every other; the switches go round, so that each size meets every one of them.
    sizes = itertools.product((1, 2, 7, 500), (1, 15, 16, 17, 512), (1, 4, 12, 16, 17, 64))
    for index, (time, channel, state) in enumerate(sizes):
        for batch in (1, 3):
            gated, stateful, reverse, softplus = switches[(index * 5 + batch * 3) % len(switches)]
            group = None if channel % 2 or (index + batch) % 3 == 0 else 1 + (index + batch) % 2
            dtype = "float16" if (index + batch) % 5 == 0 else "float32"
            on = (gated, stateful, reverse, softplus)
            cases.append(ScanCase(batch, time, channel, state, group, dtype, *on, seed=index))
    # Lengths and channels around the blocks of the kernels, a group for each channel, steps short and long.
    others = [(3, 33, 17, 16, None), (1, 32, 130, 64, 1), (3, 65, 30, 5, 3), (2, 31, 8, 3, 8), (1, 50, 512, 16, None)]
    for size, mean in itertools.product(others, (-10.0, -4.0, 0.0, 3.0)):
        cases += [ScanCase(*size, reverse=reverse, mean=mean) for reverse in (False, True)]
    return cases


def _convs() -> list[ConvCase]:
    switches = list(itertools.product(("float32", "float16"), (False, True), (False, True)))
    cases = [ConvCase(2, 9, 5, width, *on) for width in (1, 2, 3, 4, 5, 7, 9) for on in switches]
    sizes = list(itertools.product((1, 2, 3, 4, 7), (1, 15, 16, 17, 131, 512), ((1, 3), (2, 1), (7, 3), (500, 1))))
    drawn = np.random.default_rng(0).integers(len(switches), size=len(sizes))
    for index, (width, channel, (time, batch)) in enumerate(sizes):
        cases.append(ConvCase(batch, time, channel, width, *switches[drawn[index]], seed=index))
    # With a state, above all where the steps are fewer than it has: every set of switches, then sizes as above.
    for index, (width, time) in enumerate(itertools.product((2, 3, 4, 5, 7), (1, 2, 3, 9))):
        cases += [ConvCase(2, time, 5, width, *on, stateful=True, seed=index) for on in switches]
    for index, (width, channel, (time, batch)) in enumerate(case for case in sizes if case[0] > 1):
        on = switches[drawn[-1 - index]]
        cases.append(ConvCase(batch, time, channel, width, *on, stateful=True, seed=index))
    return cases


SCANS, CONVS = _scans(), _convs()
"""The table."""


def model_of(case: ScanCase | ConvCase, *, functions: bool = False) -> Any:
    """A model of one node, batch and time dynamic; with its model-local function, or for the operator library alone."""
    from hcmen.mamba.one_node import conv_model, scan_model

    given: dict[str, Any] = {"dtype": case.dtype, "reverse": case.reverse, "functions": functions}
    if isinstance(case, ConvCase):
        return conv_model(case.channel, case.width, activation=case.activation, stateful=case.stateful, **given)
    given |= {"group": case.group, "gated": case.gated, "stateful": case.stateful, "delta_softplus": case.softplus}
    return scan_model(case.channel, case.state, **given)


# --- inputs -----------------------------------------------------------------------------------------------------------


def scan_arrays(case: ScanCase) -> Arrays:
    """Inputs of `case`, as real models have them: steps of softplus(N(mean, 1)), decay rates down to -16."""
    rng = np.random.default_rng(case.seed)
    series, states = (case.batch, case.time, case.channel), (case.batch, case.channel, case.state)
    projection = (case.batch, case.time, *([] if case.group is None else [case.group]), case.state)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    delta = rng.normal(case.mean, 1.0, series)
    if not case.softplus:
        delta = np.logaddexp(0.0, delta)
    bias = np.abs(normal(case.channel)) * np.float32(0.1 if case.softplus else 0.001)
    if case.masked:
        delta[::2, case.time - case.masked :] = -1e4 if case.softplus else 0.0
        bias *= case.softplus
    rates = (np.arange(case.state) % 16 + 1.0) * (1 + 0.05 * rng.random((case.channel, case.state)))
    arrays = {
        "u": normal(*series).astype(case.dtype),
        "delta": delta.astype(case.dtype),
        "A": -rates.astype(np.float32),
        "B": normal(*projection).astype(case.dtype),
        "C": normal(*projection).astype(case.dtype),
        "D": normal(case.channel),
        "delta_bias": bias,
    }
    if case.gated:
        arrays["z"] = normal(*series).astype(case.dtype)
    if case.stateful:
        arrays["initial_state"] = normal(*states)
    return arrays


def conv_arrays(case: ConvCase) -> Arrays:
    """Inputs of `case`."""
    rng = np.random.default_rng(case.seed)
    arrays = {
        "x": rng.normal(size=(case.batch, case.time, case.channel)).astype(case.dtype),
        "weight": rng.normal(size=(case.channel, case.width)).astype(np.float32),
        "bias": rng.normal(size=case.channel).astype(np.float32),
    }
    if case.stateful:
        arrays["initial_state"] = rng.normal(size=conv_state_shape(case)).astype(np.float32)
    return arrays


def conv_state_shape(case: ConvCase) -> tuple[int, int, int]:
    return case.batch, case.width - 1, case.channel


def conv_outputs(case: ConvCase, arrays: Arrays) -> Arrays:
    """Arrays full of NaN for the outputs of a kernel, which gives the last state of any width but 1."""
    outputs = {"y": np.full(arrays["x"].shape, np.nan, arrays["x"].dtype)}
    if case.width > 1:
        outputs["last_state"] = np.full(conv_state_shape(case), np.nan, np.float32)
    return outputs


# --- the oracle -------------------------------------------------------------------------------------------------------


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1.0 + np.exp(-x))


def scan_oracle(case: ScanCase, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """y and the last state in float64, from the inputs as they are rounded: the recurrence of docs/op.md."""
    a = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
    (batch, time, channel), state = a["u"].shape, a["A"].shape[1]
    B, C = (a[name].reshape(batch, time, -1, state) for name in ("B", "C"))
    group = np.arange(channel) // (channel // B.shape[2])
    d = a["delta"] + a["delta_bias"]
    if case.softplus:
        d = np.where(d > 20.0, d, np.log1p(np.exp(np.minimum(d, 20.0))))
    h = a.get("initial_state", np.zeros((batch, channel, state)))
    y = np.empty_like(a["u"])
    for t in range(time)[:: -1 if case.reverse else 1]:
        h = np.exp(d[:, t, :, None] * a["A"]) * h + (d[:, t] * a["u"][:, t])[..., None] * B[:, t, group]
        y[:, t] = np.einsum("bcn,bcn->bc", C[:, t, group], h) + a["D"] * a["u"][:, t]
    return (y * _silu(a["z"]) if "z" in a else y), h


def conv_oracle(case: ConvCase, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """y and the last state in float64: the sum of docs/op.md, tap by tap."""
    x, weight, bias = (np.asarray(arrays[name], np.float64) for name in ("x", "weight", "bias"))
    (_, time, _), width = x.shape, weight.shape[1]
    y = np.broadcast_to(bias, x.shape).copy()
    for k in range(min(width, time)):  # the tap that looks k steps back, or ahead
        seen, sees = (x[:, k:], y[:, : time - k]) if case.reverse else (x[:, : time - k], y[:, k:])
        sees += weight[:, width - 1 - k] * seen
    # What was before is seen by the first steps scanned, all taps of them that look that far.
    state = np.asarray(arrays.get("initial_state", np.zeros(conv_state_shape(case))), np.float64)
    steps = list(range(time))[:: -1 if case.reverse else 1]
    for number, t in enumerate(steps[: width - 1]):
        for k in range(width - 1 - number):
            y[:, t] += weight[:, k] * state[:, number + k]
    scanned = np.concatenate([state, x[:, steps]], axis=1)
    return _silu(y) if case.silu else y, scanned[:, time:]


def _leaves(arrays: Arrays) -> Arrays:
    import torch

    return {name: torch.from_numpy(x.astype(np.float64)).requires_grad_() for name, x in arrays.items()}


def _gradients(outputs: list[tuple[Any, np.ndarray]], leaves: Arrays) -> Arrays:
    import torch

    sum((y * torch.from_numpy(dy.astype(np.float64))).sum() for y, dy in outputs).backward()
    return {f"d{name}": x.grad.numpy() for name, x in leaves.items() if x.grad is not None}


def scan_gradients_oracle(case: ScanCase, arrays: Arrays, dy: np.ndarray, dlast: np.ndarray | None) -> Arrays:
    """Gradients of sum(y * dy) + sum(last_state * dlast) in float64, under the names of `hcmen_scan_grad`."""
    from hcmen.mamba.scan import selective_scan_ref

    leaves = _leaves(arrays)
    y, last = selective_scan_ref(**leaves, delta_softplus=case.softplus, reverse=case.reverse, return_last_state=True)
    return _gradients([(y, dy)] if dlast is None else [(y, dy), (last, dlast)], leaves)


def conv_gradients_oracle(case: ConvCase, arrays: Arrays, dy: np.ndarray, dlast: np.ndarray | None = None) -> Arrays:
    """Gradients of sum(y * dy) + sum(last_state * dlast) in float64, under the names of `hcmen_conv_grad`."""
    from hcmen.mamba.scan import causal_conv1d_ref

    leaves = _leaves(arrays)
    flags: dict[str, Any] = {"activation": case.activation, "reverse": case.reverse}
    y, last = causal_conv1d_ref(**leaves, **flags, return_last_state=True)
    return _gradients([(y, dy)] if dlast is None else [(y, dy), (last, dlast)], leaves)


def assert_near(name: str, got: np.ndarray, want: np.ndarray, bound: float, least: float = 0.0) -> None:
    """float32 within `bound` of the largest value, or of `least`; float16 within half a unit of its last place, and a
    little."""
    assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
    if got.dtype == np.float16:
        np.testing.assert_allclose(got.astype(np.float64), want, rtol=1e-3, atol=1e-4, err_msg=name)
        return
    scale = max(float(np.abs(want).max()), least)
    worst = np.abs(got - want).max() / (scale if scale > 0 else 1.0)
    assert worst <= bound, f"{name}: off by {worst:.2e} of the largest value, expected {bound:.0e} or less"


def assert_close(got: Any, want: Any, bound: float = 1e-6) -> None:
    """The outputs of a node, y first. `bound` is relative to the largest value or 1, whichever is more.

    Where the terms of a sum cancel out, its error is that of the terms, and those of y are of the order of 1.
    """
    for name, g, w in zip(("y", "last_state"), got, want, strict=False):
        assert_near(name, g, w, bound, least=1.0)


def assert_scan(case: ScanCase, arrays: Arrays, got: Any, bound: float = 1e-6) -> None:
    """`got`, y and where there is one the last state, against float64."""
    assert_close(got, scan_oracle(case, arrays), bound)


def assert_conv(case: ConvCase, arrays: Arrays, got: Any, bound: float = 1e-6) -> None:
    """`got`, y and where there is one the last state, against float64."""
    assert_close(got, conv_oracle(case, arrays), bound)


# --- the C structures -------------------------------------------------------------------------------------------------

Pointer = Callable[[Any], int]


def scan_structure(case: ScanCase, arrays: Mapping[str, Any], pointer: Pointer) -> ScanArguments:
    """`hcmen_scan` over `arrays`, which may hold y and last_state; `pointer` gives the address of one."""
    return ScanArguments(
        batch=case.batch,
        time=case.time,
        channel=case.channel,
        state=case.state,
        group=case.group or 1,
        dtype=int(case.dtype == "float16"),
        delta_softplus=int(case.softplus),
        reverse=int(case.reverse),
        **{name: pointer(x) for name, x in arrays.items()},
    )


def gradient_arrays(arrays: Arrays) -> Arrays:
    """An array for the gradient of each of `arrays`, full of NaN, under the names of the C structures."""
    return {f"d{name}": np.full(x.shape, np.nan, np.float32) for name, x in arrays.items()}


def conv_structure(case: ConvCase, arrays: Mapping[str, Any], pointer: Pointer) -> ConvArguments:
    """`hcmen_conv` over `arrays`, which may hold y and last_state."""
    return ConvArguments(
        batch=case.batch,
        time=case.time,
        channel=case.channel,
        width=case.width,
        dtype=int(case.dtype == "float16"),
        silu=int(case.silu),
        reverse=int(case.reverse),
        **{name: pointer(x) for name, x in arrays.items()},
    )


def scan_gradients_structure(gradients: Mapping[str, Any], pointer: Pointer) -> ScanGradients:
    """`hcmen_scan_grad` over `gradients`."""
    return ScanGradients(**{name: pointer(x) for name, x in gradients.items()})


def conv_gradients_structure(gradients: Mapping[str, Any], pointer: Pointer) -> ConvGradients:
    """`hcmen_conv_grad` over `gradients`."""
    return ConvGradients(**{name: pointer(x) for name, x in gradients.items()})


def address(x: np.ndarray) -> int:
    """The `pointer` of NumPy arrays; they must be dense."""
    assert x.flags.c_contiguous
    return x.ctypes.data


def by_reference(*structures: ctypes.Structure) -> list[Any]:
    """Arguments for a call over ctypes."""
    return [ctypes.byref(s) for s in structures]
