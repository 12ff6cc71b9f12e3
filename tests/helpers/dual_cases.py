"""Cases of the state space dual, their inputs, and what float64 says of them: as op_cases.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hcmen.base.library import DualArguments, DualGradients
from helpers.op_cases import Arrays, Pointer, assert_close

NAMES = ("y", "last_state")


@dataclass(frozen=True)
class DualCase:
    """Sizes and switches of one state space dual.

    group: None gives B and C no axis of groups. wide: D has a number for every row of a head. mean: of the step sizes
    before the softplus. masked: so many steps at the end of every other sequence have a step size of zero.
    """

    batch: int = 2
    time: int = 9
    head: int = 2
    head_dim: int = 5
    state: int = 4
    group: int | None = 1
    dtype: str = "float32"
    gated: bool = True
    stateful: bool = True
    reverse: bool = False
    softplus: bool = True
    wide: bool = False
    dt_min: float = 0.0
    dt_max: float = math.inf
    mean: float = -4.0
    masked: int = 0
    seed: int = 0

    def __str__(self) -> str:
        flags = [n for n in ("gated", "stateful", "reverse", "softplus", "wide") if getattr(self, n)]
        sizes = f"{self.batch}x{self.time}x{self.head}x{self.head_dim} n{self.state} g{self.group} {self.dtype}"
        names = ("dt_min", "dt_max", "mean", "masked")
        others = [f"{n} {getattr(self, n):g}" for n in names if getattr(self, n) != getattr(DualCase, n)]
        return " ".join([sizes, *flags, *others])

    @property
    def channel(self) -> int:
        """Of a scan of as many numbers."""
        return self.head * self.head_dim

    @property
    def flags(self) -> dict[str, Any]:
        """Those of the functions of PyTorch."""
        return {
            "delta_softplus": self.softplus,
            "reverse": self.reverse,
            # As the kernels have them.
            "dt_min": float(np.float32(self.dt_min)),
            "dt_max": float(np.float32(self.dt_max)),
        }

    @property
    def attributes(self) -> dict[str, Any]:
        """Those of a node."""
        return {**self.flags, "gated": self.gated, "stateful": self.stateful}

    @property
    def series(self) -> tuple[int, ...]:
        return (self.batch, self.time, self.head, self.head_dim)

    @property
    def states(self) -> tuple[int, ...]:
        return (self.batch, self.head, self.head_dim, self.state)


def _duals() -> list[DualCase]:
    switches = list(itertools.product((False, True), repeat=5))
    # Every set of switches, in both types, with groups, masked steps and limits that cut some steps.
    cases = [
        DualCase(2, 21, 6, 6, 12, 3, dtype, *on, dt_min=0.004 * (i % 2), dt_max=0.1 if i % 3 else math.inf, masked=4)
        for dtype in ("float32", "float16")
        for i, on in enumerate(switches)
    ]
    # Awkward sizes, each with every other; the switches go round.
    sizes = itertools.product((1, 2, 7, 70), (1, 3), (1, 4, 7, 64), (1, 4, 16, 17, 128))
    for index, (time, head, rows, state) in enumerate(sizes):
        group = (None, 1, head)[index % 3]
        dtype = "float16" if index % 5 == 0 else "float32"
        cases.append(
            DualCase(1 + index % 2, time, head, rows, state, group, dtype, *switches[index * 5 % 32], seed=index)
        )
    # As real models have them, and around the blocks of the kernels: of 16 steps, of 4, 8 or 16 states, of 8 of those.
    others = [(3, 50, 24, 64, 64, 8), (1, 513, 24, 5, 128, 3), (2, 50, 3, 64, 100, 3), (1, 33, 3, 17, 300, 1)]
    for index, size in enumerate([*others, (1, 513, 3, 64, 16, None), (3, 2, 24, 1, 7, 24), (1, 1, 24, 64, 128, 1)]):
        cases += [DualCase(*size, reverse=reverse, wide=bool(index % 2), seed=index) for reverse in (False, True)]
    for mean in (-10.0, 0.0, 3.0):
        cases += [DualCase(2, 40, 4, 10, 33, 2, reverse=reverse, mean=mean) for reverse in (False, True)]
    return cases


DUALS = _duals()
"""The table."""


def dual_model_of(case: DualCase, *, functions: bool = False) -> Any:
    """As `model_of`."""
    from hcmen.mamba.one_node import dual_model

    sizes, given = (case.head, case.head_dim, case.state), {"group": case.group, "wide_D": case.wide}
    return dual_model(*sizes, **given, dtype=case.dtype, functions=functions, **case.attributes)


def dual_arrays(case: DualCase) -> Arrays:
    """Inputs of `case`, as real models have them: steps of softplus(N(mean, 1)), decay rates from -1 to -16.

    The first head has a rate of -1: where all decays are next to nothing, so are the gradients of their rates.
    """
    rng = np.random.default_rng(case.seed)
    projection = (case.batch, case.time, *([] if case.group is None else [case.group]), case.state)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    dt = rng.normal(case.mean, 1.0, case.series[:3])
    if not case.softplus:
        dt = np.logaddexp(0.0, dt)
    bias = np.abs(normal(case.head)) * np.float32(0.1 if case.softplus else 0.001)
    if case.masked:
        dt[::2, case.time - case.masked :] = -1e4 if case.softplus else 0.0
        bias *= case.softplus
    rates = rng.uniform(1.0, 16.0, case.head)
    rates[0] = 1.0
    arrays = {
        "x": normal(*case.series).astype(case.dtype),
        "dt": dt.astype(case.dtype),
        "A": -rates.astype(np.float32),
        "B": normal(*projection).astype(case.dtype),
        "C": normal(*projection).astype(case.dtype),
        "D": normal(case.head, case.head_dim) if case.wide else normal(case.head),
        "dt_bias": bias,
    }
    if case.gated:
        arrays["z"] = normal(*case.series).astype(case.dtype)
    if case.stateful:
        arrays["initial_state"] = normal(*case.states)
    return arrays


def step_sizes(case: DualCase, arrays: Arrays) -> np.ndarray:
    """[batch, time, head] in float64."""
    d = arrays["dt"].astype(np.float64) + arrays["dt_bias"]
    if case.softplus:
        d = np.where(d > 20.0, d, np.log1p(np.exp(np.minimum(d, 20.0))))
    # The limits as the kernels have them: float32.
    return np.clip(d, np.float32(case.dt_min), np.float32(case.dt_max))


def dual_oracle(case: DualCase, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """y and the last state in float64, from the inputs as they are rounded: the recurrence of docs/op.md."""
    a = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
    batch, time, head, _ = a["x"].shape
    B, C = (a[name].reshape(batch, time, -1, case.state) for name in ("B", "C"))
    group = np.arange(head) // (head // B.shape[2])
    d = step_sizes(case, arrays)
    D = a["D"] if case.wide else a["D"][:, None]
    h = a.get("initial_state", np.zeros(case.states))
    y = np.empty_like(a["x"])
    for t in range(time)[:: -1 if case.reverse else 1]:
        decay = np.exp(d[:, t] * a["A"])[..., None, None]
        h = decay * h + (d[:, t, :, None] * a["x"][:, t])[..., None] * B[:, t, group, None]
        y[:, t] = np.einsum("bhpn,bhn->bhp", h, C[:, t, group]) + D * a["x"][:, t]
    return (y * a["z"] / (1.0 + np.exp(-a["z"])) if "z" in a else y), h


def grouped(tensors: Mapping[str, Any]) -> Arrays:
    """B and C with an axis of groups, as the functions of PyTorch take them."""
    return {n: x[:, :, None] if n in ("B", "C") and x.ndim == 3 else x for n, x in tensors.items()}


def dual_gradients_oracle(case: DualCase, arrays: Arrays, dy: np.ndarray, dlast: np.ndarray | None) -> Arrays:
    """Gradients of sum(y * dy) + sum(last_state * dlast) in float64, under the names of `hcmen_dual_grad`."""
    import torch

    from hcmen.mamba.scan import state_space_dual_ref

    leaves = {name: torch.from_numpy(x.astype(np.float64)).requires_grad_() for name, x in arrays.items()}
    y, last = state_space_dual_ref(**grouped(leaves), **case.flags, return_last_state=True)
    loss = (y * torch.from_numpy(dy.astype(np.float64))).sum()
    if dlast is not None:
        loss = loss + (last * torch.from_numpy(dlast.astype(np.float64))).sum()
    loss.backward()
    # What nothing came from has a gradient of zero: B where every step size was cut to zero.
    return {f"d{n}": np.zeros(x.shape) if x.grad is None else x.grad.numpy() for n, x in leaves.items()}


def assert_dual(case: DualCase, arrays: Arrays, got: Any, bound: float = 1e-6) -> None:
    """`got`, y and where there is one the last state, against float64."""
    assert_close(got, dual_oracle(case, arrays), bound)


def dual_structure(case: DualCase, arrays: Mapping[str, Any], pointer: Pointer) -> DualArguments:
    """`hcmen_dual` over `arrays`, which may hold y and last_state."""
    return DualArguments(
        batch=case.batch,
        time=case.time,
        head=case.head,
        head_dim=case.head_dim,
        state=case.state,
        group=case.group or 1,
        dtype=int(case.dtype == "float16"),
        delta_softplus=int(case.softplus),
        reverse=int(case.reverse),
        wide_D=int(case.wide),
        dt_min=case.dt_min,
        dt_max=case.dt_max,
        **{name: pointer(x) for name, x in arrays.items()},
    )


def dual_gradients_structure(gradients: Mapping[str, Any], pointer: Pointer) -> DualGradients:
    """`hcmen_dual_grad` over `gradients`."""
    return DualGradients(**{name: pointer(x) for name, x in gradients.items()})
