"""Arguments of the C functions over arrays, and the float64 oracle of everything they write.

Used for every implementation behind the structures of runtime/csrc/selective_scan.h: loops over scan_step.h, CUDA
kernels run on the host, CUDA kernels on a device. PyTorch, for the oracles, is imported when they are asked: the
sanitizers of CUDA run without it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hcmen.base.library import ConvArguments, ConvGradients, ScanArguments, ScanGradients

Arrays = dict[str, Any]


@dataclass(frozen=True)
class ScanCase:
    """Sizes and switches of one scan. mean: of the step sizes before the softplus; masked: steps at the end of every
    other sequence whose step size is zero."""

    batch: int = 2
    time: int = 9
    channel: int = 5
    state: int = 4
    group: int = 1
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
        return " ".join([sizes, *flags])


def scan_arrays(case: ScanCase) -> Arrays:
    """Inputs of `case`: steps of softplus(N(mean, 1)), decay rates down to -16."""
    rng = np.random.default_rng(case.seed)
    series, states = (case.batch, case.time, case.channel), (case.batch, case.channel, case.state)
    projection = (case.batch, case.time, case.group, case.state)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    delta = rng.normal(case.mean, 1.0, series)
    if not case.softplus:
        delta = np.logaddexp(0.0, delta)
    if case.masked:
        delta[::2, case.time - case.masked :] = -1e4 if case.softplus else 0.0
    rates = (np.arange(case.state) % 16 + 1.0) * (1 + 0.05 * rng.random((case.channel, case.state)))
    bias = 0.1 * rng.normal(size=case.channel) if case.softplus else np.zeros(case.channel)
    arrays = {
        "u": normal(*series).astype(case.dtype),
        "delta": delta.astype(case.dtype),
        "A": -rates.astype(np.float32),
        "B": normal(*projection).astype(case.dtype),
        "C": normal(*projection).astype(case.dtype),
        "D": normal(case.channel),
        "delta_bias": bias.astype(np.float32),
    }
    if case.gated:
        arrays["z"] = normal(*series).astype(case.dtype)
    if case.stateful:
        arrays["initial_state"] = normal(*states)
    return arrays


def scan_oracle(case: ScanCase, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """y and the last state in float64, from the inputs as they are rounded."""
    import torch

    from hcmen.mamba.scan import selective_scan_ref

    wide = {name: torch.from_numpy(x.astype(np.float64)) for name, x in arrays.items()}
    y, last = selective_scan_ref(**wide, delta_softplus=case.softplus, reverse=case.reverse, return_last_state=True)
    return y.numpy(), last.numpy()


def scan_gradients_oracle(case: ScanCase, arrays: Arrays, dy: np.ndarray, dlast: np.ndarray | None) -> Arrays:
    """Gradients of sum(y * dy) + sum(last_state * dlast) in float64, under the names of `hcmen_scan_grad`."""
    import torch

    from hcmen.mamba.scan import selective_scan_ref

    wide = {name: torch.from_numpy(x.astype(np.float64)).requires_grad_() for name, x in arrays.items()}
    y, last = selective_scan_ref(**wide, delta_softplus=case.softplus, reverse=case.reverse, return_last_state=True)
    loss = (y * torch.from_numpy(dy.astype(np.float64))).sum()
    if dlast is not None:
        loss = loss + (last * torch.from_numpy(dlast.astype(np.float64))).sum()
    loss.backward()
    return {f"d{name}": x.grad.numpy() for name, x in wide.items() if x.grad is not None}


Pointer = Callable[[Any], int]


def scan_structure(case: ScanCase, arrays: Mapping[str, Any], pointer: Pointer) -> ScanArguments:
    """`hcmen_scan` over `arrays`, which may hold y and last_state; `pointer` gives the address of one."""
    return ScanArguments(
        batch=case.batch,
        time=case.time,
        channel=case.channel,
        state=case.state,
        group=case.group,
        dtype=int(case.dtype == "float16"),
        delta_softplus=int(case.softplus),
        reverse=int(case.reverse),
        **{name: pointer(x) for name, x in arrays.items()},
    )


def gradient_arrays(case: ScanCase, arrays: Arrays) -> Arrays:
    """Arrays for every gradient of `case`, full of NaN, under the names of `hcmen_scan_grad`."""
    return {f"d{name}": np.full(x.shape, np.nan, np.float32) for name, x in arrays.items()}


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
    seed: int = 0


def conv_arrays(case: ConvCase) -> Arrays:
    """Inputs of `case`."""
    rng = np.random.default_rng(case.seed)
    return {
        "x": rng.normal(size=(case.batch, case.time, case.channel)).astype(case.dtype),
        "weight": rng.normal(size=(case.channel, case.width)).astype(np.float32),
        "bias": rng.normal(size=case.channel).astype(np.float32),
    }


def conv_oracle(case: ConvCase, arrays: Arrays, dy: np.ndarray | None = None) -> Arrays:
    """y, and with dy the gradients dx, dweight, dbias of sum(y * dy), in float64."""
    import torch

    from hcmen.mamba.scan import causal_conv1d_ref

    wide = {name: torch.from_numpy(x.astype(np.float64)).requires_grad_() for name, x in arrays.items()}
    y = causal_conv1d_ref(**wide, activation="silu" if case.silu else "none", reverse=case.reverse)
    out = {"y": y.detach().numpy()}
    if dy is not None:
        (y * torch.from_numpy(dy.astype(np.float64))).sum().backward()
        out |= {f"d{name}": x.grad.numpy() for name, x in wide.items() if x.grad is not None}
    return out


def conv_structure(case: ConvCase, arrays: Mapping[str, Any], pointer: Pointer) -> ConvArguments:
    """`hcmen_conv` over `arrays`, which may hold y."""
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


def assert_near(name: str, got: np.ndarray, want: np.ndarray, bound: float) -> None:
    """float32 within `bound` of the largest value; float16 within half a unit of its last place, and a little."""
    assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
    if got.dtype == np.float16:
        np.testing.assert_allclose(got.astype(np.float64), want, rtol=1e-3, atol=1e-4, err_msg=name)
        return
    scale = np.abs(want).max()
    worst = np.abs(got - want).max() / (scale if scale > 0 else 1.0)
    assert worst <= bound, f"{name}: off by {worst:.2e} of the largest value, expected {bound:.0e} or less"


def by_reference(*structures: ctypes.Structure) -> list[Any]:
    """Arguments for a call over ctypes."""
    return [ctypes.byref(s) for s in structures]
