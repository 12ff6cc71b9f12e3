"""Selective scan, causal convolution and state space dual for PyTorch: one meaning, several implementations.

Glossary (sizes: batch b, time t, channel c, state n, group g; the layout is channels last throughout)
    u       [b, t, c]       input of the scan                    (paper: x)
    delta   [b, t, c]       step size before bias and softplus   (paper: Delta)
    A       [c, n]          decay, negative                      (paper: A)
    B, C    [b, t, n]       input and output projections, or [b, t, g, n]: channel i uses group i // (c / g)
    D       [c]             skip connection
    z       [b, t, c]       gate: y is multiplied by silu(z)
Mamba-2 has channels in heads of p of them, x [b, t, h, p], and one decay A [h] and one step size dt [b, t, h] a head.

`selective_scan_ref`, `causal_conv1d_ref` and `state_space_dual_ref` are plain PyTorch in the precision of their inputs,
float64 included: the oracle of every other implementation. `selective_scan`, `causal_conv1d` and `state_space_dual` are
what models call. They pick

    native      the C++ kernels of libhcmen_ops.so, through torch.library custom ops with autograd (CPU tensors), and
                those of libhcmen_ops_cuda.so where it was built (CUDA tensors; native_cuda.py)
    mamba_ssm   the CUDA kernels of the packages mamba_ssm and causal_conv1d, where they are installed (CUDA tensors)
    ref         the reference above (any device, any dtype)

While torch.export or torch.onnx.export traces, each call is the custom op of `native`, wherever the tensors are: ONNX
has one node for it (lowering.py). `implementation("ref")` shows them the reference, step by step.

On CUDA mamba_ssm's kernels come first, then ours. Without either, or with arguments that none takes, the reference
runs: one small operation after the other, which is slow, and which a warning says once. `implementation(...)` overrides
the choice, so that tests and benchmarks run each on purpose; what is named is never replaced by another.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

from hcmen.base.errors import BackendError, InputError, unknown_name
from hcmen.base.library import load_library
from hcmen.mamba import (
    lowering,  # noqa: F401  (exporters find the ops by it)
    native,
    native_cuda,
)
from hcmen.mamba.mamba_ssm import conv_limit, dual_as_scan, mamba_conv, mamba_function, mamba_scan, scan_limit
from hcmen.mamba.reference import causal_conv1d_ref, selective_scan_ref, state_space_dual_ref

__all__ = [
    "call_group",
    "causal_conv1d",
    "causal_conv1d_ref",
    "collecting",
    "implementation",
    "one_call",
    "selective_scan",
    "selective_scan_ref",
    "state_space_dual",
    "state_space_dual_ref",
]

IMPLEMENTATIONS = ("auto", "native", "mamba_ssm", "ref")

_chosen: ContextVar[str] = ContextVar("hcmen_scan_implementation", default="auto")


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Within the block, `selective_scan` and `causal_conv1d` run as `name`: one of IMPLEMENTATIONS.

    Raises:
        InputError: there is no such implementation.
    """
    if name not in IMPLEMENTATIONS:
        raise unknown_name("scan implementation", name, IMPLEMENTATIONS)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


Collector = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Is given the kind of a call ("conv", "scan" or "dual"), the function, and its arguments; gives its result."""
_Function = TypeVar("_Function", bound=Callable[..., Any])

_collector: ContextVar[Collector | None] = ContextVar("hcmen_scan_collector", default=None)


@contextmanager
def collecting(collector: Collector | None) -> Iterator[None]:
    """Within the block, calls of the functions below go to `collector`, and those that it makes itself to them."""
    token = _collector.set(collector)
    try:
        yield
    finally:
        _collector.reset(token)


_group: ContextVar[object | None] = ContextVar("hcmen_scan_group", default=None)


@contextmanager
def one_call() -> Iterator[None]:
    """Calls within the block are one call written in several ways, of which a graph keeps what is read."""
    token = _group.set(object())
    try:
        yield
    finally:
        _group.reset(token)


def call_group() -> object | None:
    """Which block of `one_call` this is, for a collector; None outside of them."""
    return _group.get()


def _collected(kind: str) -> Callable[[_Function], _Function]:
    def around(function: _Function) -> _Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            collector = _collector.get()
            if collector is None:
                return function(*args, **kwargs)
            with collecting(None):
                return collector(kind, function, args, kwargs)

        return call  # type: ignore[return-value]

    return around


# --- the functions models call --------------------------------------------------------------------------------------


@_collected("scan")
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    z: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    reverse: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan, by the best implementation at hand; arguments and result as in `selective_scan_ref`.

    u, delta, B, C, z share one dtype (float32, float16 or bfloat16; float64 runs on the reference). Gradients flow to
    every tensor argument.

    Raises:
        InputError: shapes or dtypes disagree; the message names the argument with got and expected.
        BackendError: the implementation that was named cannot be had, or does not take such arguments.
    """
    _check_scan(u, delta, A, B, C, D, delta_bias, z, initial_state)
    B, C = _alike(B, C, u)
    flags = {"delta_softplus": delta_softplus, "reverse": reverse, "return_last_state": return_last_state}
    how = _choice("scan", u, lambda: scan_limit(u, delta, A, B, C, D, delta_bias, z, initial_state, return_last_state))
    if how == "ref":
        return selective_scan_ref(u, delta, A, B, C, D, delta_bias, z, initial_state, **flags)
    if how == "mamba_ssm":
        return mamba_scan(u, delta, A, B, C, D, delta_bias, z, **flags)
    dtype = u.dtype
    if dtype == torch.bfloat16:
        # The C++ kernels read float32 and float16.
        u, delta, B, C = (x.float() for x in (u, delta, B, C))
        z = None if z is None else z.float()
    zeros = u.new_zeros(u.shape[2], dtype=torch.float32)
    if return_last_state and initial_state is None and torch.compiler.is_exporting():
        # A node has a last state exactly if it has an initial one.
        initial_state = u.new_zeros(u.shape[0], *A.shape, dtype=torch.float32)
    y, last_state = torch.ops.hcmen.selective_scan(
        u,
        delta,
        A.float(),
        B,
        C,
        zeros if D is None else D.float(),
        zeros if delta_bias is None else delta_bias.float(),
        z,
        None if initial_state is None else initial_state.float(),
        delta_softplus,
        reverse,
    )
    y = y if y.dtype == dtype else y.to(dtype)
    return (y, last_state) if return_last_state else y


@_collected("conv")
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    activation: str = "silu",
    reverse: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The causal convolution, by the best implementation at hand; arguments and result as in `causal_conv1d_ref`.

    Gradients flow to every tensor argument.

    Raises:
        InputError: shapes or dtypes disagree, the activation is unknown, or a state is asked of a weight of width 1.
        BackendError: the implementation that was named cannot be had, or does not take such arguments.
    """
    if activation not in ("silu", "none"):
        raise InputError(f"activation is '{activation}', expected 'silu' or 'none'")
    _check("x", x, (None, None, None))
    batch, _, channel = x.shape
    _check("weight", weight, (channel, None))
    past = weight.shape[1] - 1
    if bias is None:
        bias = weight.new_zeros(channel)
    _check("bias", bias, (channel,))
    if initial_state is not None:
        _check("initial_state", initial_state, (batch, past, channel))
    _expect_real({"x": x, "weight": weight, "bias": bias, "initial_state": initial_state})
    stateful = initial_state is not None or return_last_state
    if stateful and past < 1:
        raise InputError(f"weight has width {past + 1}, expected at least 2 where there is a state of width - 1 inputs")
    flags: dict[str, Any] = {"activation": activation, "reverse": reverse}
    how = _choice("convolution", x, lambda: conv_limit(weight, stateful))
    if how == "ref":
        return causal_conv1d_ref(x, weight, bias, initial_state, return_last_state=return_last_state, **flags)
    if how == "mamba_ssm":
        return mamba_conv(x, weight, bias, **flags)
    if return_last_state and initial_state is None and torch.compiler.is_exporting():
        # A node has a last state exactly if it has an initial one.
        initial_state = x.new_zeros(batch, past, channel, dtype=torch.float32)
    y, last_state = torch.ops.hcmen.causal_conv1d(
        x.float() if x.dtype == torch.bfloat16 else x,
        weight.float(),
        bias.float(),
        None if initial_state is None else initial_state.float(),
        activation == "silu",
        reverse,
    )
    y = y if y.dtype == x.dtype else y.to(x.dtype)
    return (y, last_state) if return_last_state else y


@_collected("dual")
def state_space_dual(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    z: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float = math.inf,
    reverse: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The state space dual of Mamba-2, by the best implementation at hand; arguments and result as in
    `state_space_dual_ref`.

    x, dt, B, C, z share one dtype (float32, float16 or bfloat16; float64 runs on the reference). Gradients flow to
    every tensor argument.

    Raises:
        InputError: shapes or dtypes disagree; the message names the argument with got and expected.
        BackendError: the implementation that was named cannot be had, or does not take such arguments.
    """
    batch, time, head, dim = _check("x", x, (None, None, None, None))
    _check("dt", dt, (batch, time, head))
    _check("A", A, (head,))
    _check("B", B, (batch, time, None, None))
    group, state = B.shape[2:]
    _check("C", C, (batch, time, group, state))
    if head % group:
        raise InputError(f"B has {group} groups, expected a divisor of the {head} heads")
    if D is not None:
        _check("D", D, (head, dim) if D.dim() == 2 else (head,))
    if dt_bias is not None:
        _check("dt_bias", dt_bias, (head,))
    if z is not None:
        _check("z", z, (batch, time, head, dim))
    if initial_state is not None:
        _check("initial_state", initial_state, (batch, head, dim, state))
    _expect_real({"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "initial_state": initial_state})
    _expect_dtype(x, {"dt": dt, "B": B, "C": C, "z": z}, "x")
    if not dt_min <= dt_max:
        raise InputError(f"dt_min is {dt_min} and dt_max is {dt_max}, expected no less than dt_min")
    tensors = (x, dt, A, B, C, D, dt_bias, z, initial_state)
    flags: dict[str, Any] = {"delta_softplus": delta_softplus, "dt_min": dt_min, "dt_max": dt_max}

    def limit() -> str | None:
        arguments: tuple[Any, ...] = (*dual_as_scan(*tensors, **flags), return_last_state)
        return scan_limit(*arguments)

    how = _choice("scan", x, limit)
    if how == "ref":
        return state_space_dual_ref(*tensors, **flags, reverse=reverse, return_last_state=return_last_state)
    if how == "mamba_ssm":
        scanned = dual_as_scan(*tensors, **flags)[:-1]
        found = mamba_scan(*scanned, delta_softplus=False, reverse=reverse, return_last_state=return_last_state)
        if isinstance(found, tuple):
            return found[0].reshape(x.shape), found[1].reshape(batch, head, dim, state)
        return found.reshape(x.shape)
    dtype = x.dtype
    if dtype == torch.bfloat16:
        x, dt, B, C = (v.float() for v in (x, dt, B, C))
        z = None if z is None else z.float()
    zeros = x.new_zeros(head, dtype=torch.float32)
    if return_last_state and initial_state is None and torch.compiler.is_exporting():
        # A node has a last state exactly if it has an initial one.
        initial_state = x.new_zeros(batch, head, dim, state, dtype=torch.float32)
    y, last_state = torch.ops.hcmen.state_space_dual(
        x,
        dt,
        A.float(),
        B,
        C,
        zeros if D is None else D.float(),
        zeros if dt_bias is None else dt_bias.float(),
        z,
        None if initial_state is None else initial_state.float(),
        delta_softplus,
        reverse,
        dt_min,
        dt_max,
    )
    y = y if y.dtype == dtype else y.to(dtype)
    return (y, last_state) if return_last_state else y


# --- which implementation -------------------------------------------------------------------------------------------

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _choice(operation: str, x: Tensor, mamba_limit: Callable[[], str | None]) -> str:
    """What runs the "scan" or "convolution" of tensors like `x`: "native", "mamba_ssm" or "ref".

    `mamba_limit` says what about the arguments mamba_ssm's kernel does not take, None if it takes them.
    """
    chosen = _chosen.get()
    if chosen == "ref":
        return "ref"
    on_cpu, on_cuda, fits = x.device.type == "cpu", _on_cuda(x), x.dtype in _KERNEL_DTYPES
    if torch.compiler.is_exporting():
        if not fits:
            raise InputError(
                f"the {operation} is exported in {x.dtype}, expected float32, float16 or bfloat16: "
                "convert the model with .float()"
            )
        return "native"
    if chosen == "native" and on_cuda and fits:
        native_cuda.demand()
        return "native"
    if chosen == "native":
        if not (on_cpu and fits):
            raise BackendError(
                f"the native scan takes float32, float16 or bfloat16 on the CPU or CUDA, got {x.dtype} on {x.device}: "
                "convert the tensors or choose 'ref'"
            )
        load_library()
        return "native"
    if chosen == "mamba_ssm":
        if not (on_cuda and fits):
            raise BackendError(
                f"mamba_ssm's {operation} takes float32, float16 or bfloat16 on CUDA, got {x.dtype} on {x.device}: "
                "convert the tensors or choose another implementation"
            )
        why = mamba_limit() or mamba_function(operation)[1]
        if why:
            raise BackendError(f"mamba_ssm's {operation} cannot run: {why}; choose another implementation")
        return "mamba_ssm"
    if on_cuda and fits:
        why = mamba_limit() or mamba_function(operation)[1]
        if not why:
            return "mamba_ssm"
        if native_cuda.works():
            return "native"
        _warn_once(f"the {operation} runs on CUDA by plain PyTorch operations, which is slow: {why}")
        return "ref"
    return "native" if on_cpu and fits and native.works() else "ref"


def _on_cuda(x: Tensor) -> bool:
    return x.device.type == "cuda"


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=5)


def _check(name: str, x: Tensor, expected: tuple[int | None, ...]) -> torch.Size:
    """The shape of `x`, held to `expected`; None leaves a size open. Fails with got and expected."""
    fits = x.dim() == len(expected) and all(e is None or e == s for s, e in zip(x.shape, expected, strict=True))
    if not fits:
        want = ", ".join("any" if e is None else str(e) for e in expected)
        raise InputError(f"{name} has shape {list(x.shape)}, expected [{want}]")
    return x.shape


def _expect_real(tensors: Mapping[str, Tensor | None]) -> None:
    """Complex ones would be computed as their real parts."""
    for name, x in tensors.items():
        if x is not None and x.is_complex():
            raise InputError(f"{name} is {x.dtype}, expected a real tensor: complex state spaces are not served")


def _expect_dtype(first: Tensor, tensors: Mapping[str, Tensor | None], named: str) -> None:
    for name, x in tensors.items():
        if x is not None and x.dtype != first.dtype:
            raise InputError(f"{name} is {x.dtype}, expected {first.dtype}, the dtype of {named}")


def _check_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    batch, time, channel = _check("u", u, (None, None, None))
    _check("delta", delta, (batch, time, channel))
    _check("A", A, (channel, None))
    state = A.shape[1]
    shapes: dict[int, tuple[int | None, ...]] = {2: (channel, state), 4: (batch, time, None, state)}
    for name, projection in (("B", B), ("C", C)):
        sizes = _check(name, projection, shapes.get(projection.dim(), (batch, time, state)))
        if len(sizes) == 4 and (sizes[2] < 1 or channel % sizes[2]):
            raise InputError(f"{name} has {sizes[2]} groups, expected a divisor of the {channel} channels")
    for name, x in (("D", D), ("delta_bias", delta_bias)):
        if x is not None:
            _check(name, x, (channel,))
    if z is not None:
        _check("z", z, (batch, time, channel))
    if initial_state is not None:
        _check("initial_state", initial_state, (batch, channel, state))
    _expect_real({"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "initial_state": initial_state})
    # What is the same at every step is a parameter, and has the dtype of one.
    varying = {"delta": delta, "B": B if B.dim() > 2 else None, "C": C if C.dim() > 2 else None, "z": z}
    _expect_dtype(u, varying, "u")


def _alike(B: Tensor, C: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Both [b, t, n] or both [b, t, g, n], as kernels and nodes want them."""
    if B.dim() == C.dim() == 3 or (B.dim() == C.dim() == 4 and B.shape[2] == C.shape[2]):
        return B, C

    def grouped(x: Tensor) -> Tensor:
        if x.dim() == 2:  # one group a channel
            return x.to(u.dtype).expand(u.shape[0], u.shape[1], *x.shape)
        return x[:, :, None] if x.dim() == 3 else x

    B, C = grouped(B), grouped(C)
    groups = math.lcm(B.shape[2], C.shape[2])
    return B.repeat_interleave(groups // B.shape[2], dim=2), C.repeat_interleave(groups // C.shape[2], dim=2)
