"""Selective scan and causal convolution for PyTorch: one meaning, several implementations.

Glossary (sizes: batch b, time t, channel c, state n, group g; the layout is channels last throughout)
    u       [b, t, c]       input of the scan                    (paper: x)
    delta   [b, t, c]       step size before bias and softplus   (paper: Delta)
    A       [c, n]          decay, negative                      (paper: A)
    B, C    [b, t, n]       input and output projections, or [b, t, g, n]: channel i uses group i // (c / g)
    D       [c]             skip connection
    z       [b, t, c]       gate: y is multiplied by silu(z)

`selective_scan_ref` and `causal_conv1d_ref` are plain PyTorch in the precision of their inputs, float64 included: the
oracle of every other implementation. `selective_scan` and `causal_conv1d` are what models call. They pick

    native      the C++ kernels of libhcmen_ops.so, through torch.library custom ops with autograd (CPU tensors), and
                those of libhcmen_ops_cuda.so where it was built (CUDA tensors; hcmen/scan_cuda.py)
    mamba_ssm   the CUDA kernels of the packages mamba_ssm and causal_conv1d, where they are installed (CUDA tensors)
    ref         the reference above (any device, any dtype)
    onnx        while torch.onnx.export traces: one node hcmen::SelectiveScan or hcmen::CausalConv1d

On CUDA mamba_ssm's kernels come first, then ours. Without either, or with arguments that none takes, the reference
runs: one small operation after the other, which is slow, and which a warning says once. `implementation(...)` overrides
the choice, so that tests and benchmarks run each on purpose; what is named is never replaced by another.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hcmen.errors import BackendError, InputError, reason_of, unknown_name
from hcmen.runtime.library import ConvArguments, ConvGradients, ScanArguments, ScanGradients, load_library

__all__ = [
    "causal_conv1d",
    "causal_conv1d_ref",
    "implementation",
    "selective_scan",
    "selective_scan_ref",
]

OP_DOMAIN = "hcmen"
OP_VERSION = 1
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


# --- reference ------------------------------------------------------------------------------------------------------


def selective_scan_ref(
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
    """Selective scan (Mamba, arXiv 2312.00752, section 3; zero-order hold for A, Euler for B), step by step.

    The semantics are those of mamba_ssm's `selective_scan_ref` with time and channel swapped, an initial state, and a
    direction. It computes in float64 if `u` is float64, else in float32; half-precision inputs are widened first, and
    silu(z) is taken in that precision too, as mamba_ssm's CUDA kernel does (its Python reference rounds it to half).

    Args:
        u, delta, z: [batch, time, channel].
        A: [channel, state]. B, C: [batch, time, state] or [batch, time, group, state].
        D, delta_bias: [channel], zero if absent.
        initial_state: [batch, channel, state], the state before the first step scanned, zero if absent.
        delta_softplus: delta + delta_bias goes through softplus (linear above 20).
        reverse: scan from the last step to the first.
        return_last_state: also return the state after the last step scanned, [batch, channel, state].

    Returns:
        y [batch, time, channel] in the dtype of u; with `return_last_state`, (y, last_state).
    """
    work = torch.float64 if u.dtype == torch.float64 else torch.float32
    dtype, channel = u.dtype, u.shape[2]
    u, delta, A, B, C = (x.to(work) for x in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(work)
    if delta_softplus:
        delta = F.softplus(delta, beta=1.0, threshold=20.0)
    B, C = (_per_channel(x, channel) for x in (B, C))

    state = A.new_zeros(u.shape[0], channel, A.shape[1]) if initial_state is None else initial_state.to(work)
    outputs: list[Tensor] = [u] * u.shape[1]
    steps = range(u.shape[1])
    for t in reversed(steps) if reverse else steps:
        decay = torch.exp(delta[:, t, :, None] * A)
        state = decay * state + (delta[:, t] * u[:, t])[..., None] * B[:, t]
        outputs[t] = (state * C[:, t]).sum(-1)
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + u * D.to(work)
    if z is not None:
        y = y * F.silu(z.to(work))
    y = y.to(dtype)
    return (y, state) if return_last_state else y


def _per_channel(x: Tensor, channel: int) -> Tensor:
    """[b, t, n] or [b, t, g, n] -> [b, t, 1 or c, n], ready to broadcast against [b, t, c, n]."""
    if x.dim() == 3:
        return x[:, :, None]
    return x.repeat_interleave(channel // x.shape[2], dim=2)


def causal_conv1d_ref(
    x: Tensor, weight: Tensor, bias: Tensor, *, activation: str = "silu", reverse: bool = False
) -> Tensor:
    """Depthwise causal convolution over time; step t sees steps t - width + 1 .. t, or t .. t + width - 1 if `reverse`.

    Args:
        x: [batch, time, channel]. weight: [channel, width], the last tap is the current step. bias: [channel].
        activation: "silu" or "none".
        reverse: mirror time, the same as flipping x, convolving, and flipping the result.

    Returns:
        [batch, time, channel] in the dtype of x; computed in float64 if x is float64, else in float32.
    """
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    taps = weight.shape[1]
    series = x.to(work).transpose(1, 2)
    weight = weight.to(work)
    if reverse:
        weight = weight.flip(1)
        series = F.pad(series, (0, taps - 1))
    else:
        series = F.pad(series, (taps - 1, 0))
    y = F.conv1d(series, weight[:, None], bias.to(work), groups=x.shape[2]).transpose(1, 2)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)


# --- the functions models call --------------------------------------------------------------------------------------


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
    flags = {"delta_softplus": delta_softplus, "reverse": reverse, "return_last_state": return_last_state}
    if torch.onnx.is_in_onnx_export():
        return _symbolic_scan(u, delta, A, B, C, D, delta_bias, z, initial_state, **flags)
    how = _choice("scan", u, lambda: _scan_limit(u, delta, A, B, C, D, delta_bias, z, initial_state, return_last_state))
    if how == "ref":
        return selective_scan_ref(u, delta, A, B, C, D, delta_bias, z, initial_state, **flags)
    if how == "mamba_ssm":
        return _mamba_scan(u, delta, A, B, C, D, delta_bias, z, **flags)
    dtype = u.dtype
    if dtype == torch.bfloat16:
        # The C++ kernels read float32 and float16.
        u, delta, B, C = (x.float() for x in (u, delta, B, C))
        z = None if z is None else z.float()
    zeros = u.new_zeros(u.shape[2], dtype=torch.float32)
    y, last_state = torch.ops.hcmen.selective_scan(
        u,
        delta,
        A.float(),
        B if B.dim() == 4 else B[:, :, None],
        C if C.dim() == 4 else C[:, :, None],
        zeros if D is None else D.float(),
        zeros if delta_bias is None else delta_bias.float(),
        z,
        None if initial_state is None else initial_state.float(),
        delta_softplus,
        reverse,
    )
    y = y.to(dtype)
    return (y, last_state) if return_last_state else y


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, *, activation: str = "silu", reverse: bool = False
) -> Tensor:
    """The causal convolution, by the best implementation at hand; arguments and result as in `causal_conv1d_ref`.

    Raises:
        InputError: shapes or dtypes disagree, or the activation is unknown.
        BackendError: the implementation that was named cannot be had, or does not take such arguments.
    """
    if activation not in ("silu", "none"):
        raise InputError(f"activation is '{activation}', expected 'silu' or 'none'")
    _check("x", x, (None, None, None))
    channel = x.shape[2]
    _check("weight", weight, (channel, None))
    _check("bias", bias, (channel,))
    if torch.onnx.is_in_onnx_export():
        taps = weight.shape[1]
        attributes = {
            **_plugin_attributes(reverse),
            "activation": activation,
            # As Conv wants them: its attributes in the model-local function are bound to these by reference.
            "group": channel,
            "pads": [0, taps - 1] if reverse else [taps - 1, 0],
        }
        return torch.onnx.ops.symbolic(
            f"{OP_DOMAIN}::CausalConv1d",
            (x, weight, bias),
            attributes,
            dtype=x.dtype,
            shape=x.shape,
            version=OP_VERSION,
        )
    how = _choice("convolution", x, lambda: _conv_limit(weight))
    if how == "ref":
        return causal_conv1d_ref(x, weight, bias, activation=activation, reverse=reverse)
    if how == "mamba_ssm":
        return _mamba_conv(x, weight, bias, activation=activation, reverse=reverse)
    wide = x.float() if x.dtype == torch.bfloat16 else x
    y: Tensor = torch.ops.hcmen.causal_conv1d(wide, weight.float(), bias.float(), activation == "silu", reverse)
    return y.to(x.dtype)


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
    if chosen == "native" and on_cuda and fits:
        scan_cuda.demand()
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
        why = mamba_limit() or _mamba(operation)[1]
        if why:
            raise BackendError(f"mamba_ssm's {operation} cannot run: {why}; choose another implementation")
        return "mamba_ssm"
    if on_cuda and fits:
        why = mamba_limit() or _mamba(operation)[1]
        if not why:
            return "mamba_ssm"
        if scan_cuda.works():
            return "native"
        _warn_once(f"the {operation} runs on CUDA by plain PyTorch operations, which is slow: {why}")
        return "ref"
    return "native" if on_cpu and fits and _library_works() else "ref"


def _on_cuda(x: Tensor) -> bool:
    return x.device.type == "cuda"


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _library_works() -> bool:
    """`_loads`, which torch.compile does not look into: a graph break in every scan would cost it all it gains."""
    return _loads()


@functools.cache
def _loads() -> bool:
    """Whether the library loads; if not, says so once, for "auto" then means a run some 25 times slower."""
    try:
        load_library()
    except BackendError as error:
        warnings.warn(f"the native scan is unavailable, the slow reference runs instead: {error}", stacklevel=3)
        return False
    return True


def _check(name: str, x: Tensor, expected: tuple[int | None, ...]) -> None:
    """Rank and sizes of `x`; None leaves a size open. Fails with got and expected."""
    fits = x.dim() == len(expected) and all(e is None or e == s for s, e in zip(x.shape, expected, strict=True))
    if not fits:
        want = ", ".join("any" if e is None else str(e) for e in expected)
        raise InputError(f"{name} has shape {list(x.shape)}, expected [{want}]")


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
    _check("u", u, (None, None, None))
    batch, time, channel = u.shape
    _check("delta", delta, (batch, time, channel))
    _check("A", A, (channel, None))
    state = A.shape[1]
    grouped = B.dim() == 4
    shape = (batch, time, B.shape[2], state) if grouped else (batch, time, state)
    _check("B", B, shape)
    _check("C", C, shape)
    if grouped and channel % B.shape[2]:
        raise InputError(f"B has {B.shape[2]} groups, expected a divisor of the {channel} channels")
    for name, x in (("D", D), ("delta_bias", delta_bias)):
        if x is not None:
            _check(name, x, (channel,))
    if z is not None:
        _check("z", z, (batch, time, channel))
    if initial_state is not None:
        _check("initial_state", initial_state, (batch, channel, state))
    for name, x in (("delta", delta), ("B", B), ("C", C), ("z", z)):
        if x is not None and x.dtype != u.dtype:
            raise InputError(f"{name} is {x.dtype}, expected {u.dtype}, the dtype of u")


# --- ONNX -----------------------------------------------------------------------------------------------------------


def _plugin_attributes(reverse: bool) -> dict[str, Any]:
    """Attributes of both ops; see docs/op.md."""
    return {"reverse": int(reverse), "plugin_namespace": OP_DOMAIN, "plugin_version": str(OP_VERSION)}


def _symbolic_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    *,
    delta_softplus: bool,
    reverse: bool,
    return_last_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """One hcmen::SelectiveScan node. A stateful node has both initial_state and last_state, any other has neither."""
    batch, _, channel = u.shape
    stateful = initial_state is not None or return_last_state
    inputs = [u, delta, A, B, C]
    inputs += [torch.zeros(channel) if x is None else x for x in (D, delta_bias)]
    if z is not None:
        inputs.append(z)
    if stateful:
        zeros = torch.zeros(batch, channel, A.shape[1])
        inputs.append(zeros if initial_state is None else initial_state)
    attributes = {
        **_plugin_attributes(reverse),
        "delta_softplus": int(delta_softplus),
        "gated": int(z is not None),
        "stateful": int(stateful),
    }
    # Scan's per-input directions, one for each of its four scanned inputs and its one scanned output; see
    # export/scan_function.py, whose body binds them by reference.
    attributes["scan_input_directions"] = [int(reverse)] * 4
    attributes["scan_output_directions"] = [int(reverse)]
    op = f"{OP_DOMAIN}::SelectiveScan"
    if not stateful:
        return torch.onnx.ops.symbolic(op, inputs, attributes, dtype=u.dtype, shape=u.shape, version=OP_VERSION)
    y, last_state = torch.onnx.ops.symbolic_multi_out(
        op,
        inputs,
        attributes,
        dtypes=(u.dtype, torch.float32),
        shapes=(u.shape, (batch, channel, A.shape[1])),
        version=OP_VERSION,
    )
    return (y, last_state) if return_last_state else y


# --- mamba_ssm: channels before time, forward only --------------------------------------------------------------------

_MAMBA = {
    "scan": ("mamba_ssm", "mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"),
    "convolution": ("causal_conv1d", "causal_conv1d", "causal_conv1d_fn"),
}
_MAMBA_STATES = 256
_MAMBA_TAPS = (2, 3, 4)


@functools.cache
def _mamba(operation: str) -> tuple[Callable[..., Any] | None, str | None]:
    """The function of the package that has it, or why it cannot be had."""
    package, module, name = _MAMBA[operation]
    try:
        return getattr(importlib.import_module(module), name), None
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == package:
            return None, f"{package} is not installed (pip install --no-build-isolation 'hcmen[cuda]')"
        return None, f"{package} does not load: it needs {error.name}"
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        # A build for another PyTorch or CUDA shows itself as any of these.
        return None, f"{package} does not load: {reason_of(error)}"


def _scan_limit(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    return_last_state: bool,
) -> str | None:
    if initial_state is not None:
        return "mamba_ssm takes no initial state"
    if A.shape[1] > _MAMBA_STATES:
        return f"mamba_ssm takes at most {_MAMBA_STATES} states, got {A.shape[1]}"
    learns = any(x is not None and x.requires_grad for x in (u, delta, A, B, C, D, delta_bias, z))
    if return_last_state and learns and torch.is_grad_enabled():
        return "mamba_ssm gives the last state no gradient"
    return None


def _mamba_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    z: Tensor | None,
    *,
    delta_softplus: bool,
    reverse: bool,
    return_last_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan` by mamba_ssm's `selective_scan_fn`; a reverse scan is a scan of what is turned round."""
    function, _ = _mamba("scan")
    assert function is not None

    def turned(x: Tensor) -> Tensor:
        """[b, t, ...] -> [b, ..., t], in the order of the scan."""
        return (x.flip(1) if reverse else x).movedim(1, -1).contiguous()

    found = function(
        turned(u),
        turned(delta),
        A.float().contiguous(),
        turned(B),
        turned(C),
        D=None if D is None else D.float(),
        z=None if z is None else turned(z),
        delta_bias=None if delta_bias is None else delta_bias.float(),
        delta_softplus=delta_softplus,
        return_last_state=return_last_state,
    )
    y, last_state = found if return_last_state else (found, None)
    y = y.transpose(1, 2)
    y = y.flip(1) if reverse else y
    return (y, last_state) if return_last_state else y


def _conv_limit(weight: Tensor) -> str | None:
    taps = weight.shape[1]
    return None if taps in _MAMBA_TAPS else f"causal_conv1d takes 2 to 4 taps, got {taps}"


def _mamba_conv(x: Tensor, weight: Tensor, bias: Tensor, *, activation: str, reverse: bool) -> Tensor:
    """`causal_conv1d` by causal_conv1d's `causal_conv1d_fn`."""
    function, _ = _mamba("convolution")
    assert function is not None
    # Contiguous: its other layout, channels last, wants multiples of 8 channels.
    series = (x.flip(1) if reverse else x).transpose(1, 2).contiguous()
    y: Tensor = function(
        series,
        weight.float().contiguous(),
        bias.float().contiguous(),
        activation="silu" if activation == "silu" else None,
    ).transpose(1, 2)
    return y.flip(1) if reverse else y


# --- native: torch.library custom ops over the C interface ----------------------------------------------------------


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _call(name: str, *structures: ctypes.Structure) -> None:
    status = getattr(load_library(), name)(*(ctypes.byref(s) for s in structures), torch.get_num_threads())
    if status == 2:
        raise MemoryError(f"{name}: the working memory could not be allocated")
    if status != 0:
        raise InputError(f"{name} refused its arguments (status {status}): sizes must be at least 1 and fit each other")


def _scan_arguments(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    z: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    y: Tensor | None,
    last_state: Tensor | None,
) -> ScanArguments:
    return ScanArguments(
        batch=u.shape[0],
        time=u.shape[1],
        channel=u.shape[2],
        state=A.shape[1],
        group=B.shape[2],
        dtype=int(u.dtype == torch.float16),
        delta_softplus=int(delta_softplus),
        reverse=int(reverse),
        u=_pointer(u),
        delta=_pointer(delta),
        A=_pointer(A),
        B=_pointer(B),
        C=_pointer(C),
        D=_pointer(D),
        delta_bias=_pointer(delta_bias),
        z=_pointer(z),
        initial_state=_pointer(initial_state),
        y=_pointer(y),
        last_state=_pointer(last_state),
    )


# What every library with these kernels is given: `run` takes the structures of arguments and fills what they point to.


def _scan_by(
    run: Callable[..., None], tensors: Sequence[Tensor | None], delta_softplus: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    """y and last_state of the op's `tensors` (u to initial_state), computed by `run(scan)`."""
    dense = _dense(*tensors)
    u, A = dense[0], dense[2]
    assert u is not None
    assert A is not None
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    last_state = torch.empty(u.shape[0], u.shape[2], A.shape[1], dtype=torch.float32, device=u.device)
    run(_scan_arguments(*dense, delta_softplus, reverse, y, last_state))  # type: ignore[arg-type]
    return y, last_state


def _scan_gradients_by(
    run: Callable[..., None],
    dy: Tensor,
    dlast_state: Tensor,
    originals: Sequence[Tensor | None],
    delta_softplus: bool,
    reverse: bool,
) -> list[Tensor]:
    """Gradients of the op's tensors (u to initial_state), computed by `run(scan, gradients)`; empty for absent ones."""
    # The backward kernels are float32; half-precision inputs are widened here, their gradients narrowed on return.
    wide = [None if x is None else x.float().contiguous() for x in originals]
    dy, dlast_state = dy.float().contiguous(), dlast_state.float().contiguous()
    grads = [None if x is None else torch.empty_like(x) for x in wide]
    names = ("du", "ddelta", "dA", "dB", "dC", "dD", "ddelta_bias", "dz", "dinitial_state")
    pointers = {name: _pointer(g) for name, g in zip(names, grads, strict=True)}
    run(
        _scan_arguments(*wide, delta_softplus, reverse, None, None),  # type: ignore[arg-type]
        ScanGradients(dy=_pointer(dy), dlast_state=_pointer(dlast_state), **pointers),
    )
    return [dy.new_empty(0) if g is None or x is None else g.to(x.dtype) for g, x in zip(grads, originals, strict=True)]


@torch.library.custom_op("hcmen::selective_scan", mutates_args=(), device_types="cpu")
def _selective_scan_op(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    z: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    tensors = (u, delta, A, B, C, D, delta_bias, z, initial_state)
    return _scan_by(partial(_call, "hcmen_selective_scan_forward"), tensors, delta_softplus, reverse)


@_selective_scan_op.register_fake
def _(u, delta, A, B, C, D, delta_bias, z, initial_state, delta_softplus, reverse):  # type: ignore[no-untyped-def]
    return torch.empty_like(u, memory_format=torch.contiguous_format), A.new_empty(u.shape[0], u.shape[2], A.shape[1])


@torch.library.custom_op("hcmen::selective_scan_backward", mutates_args=(), device_types="cpu")
def _selective_scan_backward_op(
    dy: Tensor,
    dlast_state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    z: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> list[Tensor]:
    """Gradients in the order of the tensor arguments; those of an absent z or initial_state are empty tensors."""
    originals = (u, delta, A, B, C, D, delta_bias, z, initial_state)
    run = partial(_call, "hcmen_selective_scan_backward")
    return _scan_gradients_by(run, dy, dlast_state, originals, delta_softplus, reverse)


@_selective_scan_backward_op.register_fake
def _(dy, dlast_state, u, delta, A, B, C, D, delta_bias, z, initial_state, delta_softplus, reverse):  # type: ignore[no-untyped-def]
    originals = (u, delta, A, B, C, D, delta_bias, z, initial_state)
    return [
        u.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in originals
    ]


def _scan_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.delta_softplus, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _scan_backward(ctx: Any, dy: Tensor, dlast_state: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    grads = torch.ops.hcmen.selective_scan_backward(dy, dlast_state, *tensors, ctx.delta_softplus, ctx.reverse)
    return (*(None if x is None else g for g, x in zip(grads, tensors, strict=True)), None, None)


_selective_scan_op.register_autograd(_scan_backward, setup_context=_scan_setup)


def _conv_arguments(
    x: Tensor, weight: Tensor, bias: Tensor, silu: bool, reverse: bool, y: Tensor | None
) -> ConvArguments:
    return ConvArguments(
        batch=x.shape[0],
        time=x.shape[1],
        channel=x.shape[2],
        width=weight.shape[1],
        dtype=int(x.dtype == torch.float16),
        silu=int(silu),
        reverse=int(reverse),
        x=_pointer(x),
        weight=_pointer(weight),
        bias=_pointer(bias),
        y=_pointer(y),
    )


def _conv_by(run: Callable[..., None], x: Tensor, weight: Tensor, bias: Tensor, silu: bool, reverse: bool) -> Tensor:
    """y, computed by `run(conv)`."""
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    y = torch.empty_like(x)
    run(_conv_arguments(x, weight, bias, silu, reverse, y))
    return y


def _conv_gradients_by(
    run: Callable[..., None], dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, computed by `run(conv, gradients)`."""
    wide, dy = x.float().contiguous(), dy.float().contiguous()
    weight, bias = weight.contiguous(), bias.contiguous()
    dx, dweight, dbias = torch.empty_like(wide), torch.empty_like(weight), torch.empty_like(bias)
    run(
        _conv_arguments(wide, weight, bias, silu, reverse, None),
        ConvGradients(dy=_pointer(dy), dx=_pointer(dx), dweight=_pointer(dweight), dbias=_pointer(dbias)),
    )
    return dx.to(x.dtype), dweight, dbias


@torch.library.custom_op("hcmen::causal_conv1d", mutates_args=(), device_types="cpu")
def _causal_conv1d_op(x: Tensor, weight: Tensor, bias: Tensor, silu: bool, reverse: bool) -> Tensor:
    return _conv_by(partial(_call, "hcmen_causal_conv1d_forward"), x, weight, bias, silu, reverse)


@_causal_conv1d_op.register_fake
def _(x, weight, bias, silu, reverse):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("hcmen::causal_conv1d_backward", mutates_args=(), device_types="cpu")
def _causal_conv1d_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _conv_gradients_by(partial(_call, "hcmen_causal_conv1d_backward"), dy, x, weight, bias, silu, reverse)


@_causal_conv1d_backward_op.register_fake
def _(dy, x, weight, bias, silu, reverse):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(a, memory_format=torch.contiguous_format) for a in (x, weight, bias))


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, ctx.silu, ctx.reverse = inputs
    ctx.save_for_backward(x, weight, bias)


def _conv_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    dx, dweight, dbias = torch.ops.hcmen.causal_conv1d_backward(dy, *ctx.saved_tensors, ctx.silu, ctx.reverse)
    return dx, dweight, dbias, None, None


_causal_conv1d_op.register_autograd(_conv_backward, setup_context=_conv_setup)


# Registers the kernels of CUDA tensors for the ops above, which it imports.
from hcmen import scan_cuda  # noqa: E402
