"""mamba_ssm's selective scan and what it is called by, on `hcmen.mamba.scan`: channels before time, as callers have it.

Lowest come `CUDA`, `CORE` and `OFLEX`: what is in the compiled modules selective_scan_cuda and its relatives, with a
forward and a backward function that somebody else's `torch.autograd.Function` calls. Above them are the functions of
mamba_ssm.ops.selective_scan_interface, in plain autograd.

Shapes: u, delta, z, dout [batch, channel, time]; A [channel, state]; B, C [channel, state], [batch, state, time] or
[batch, group, state, time]; D, delta_bias [channel]; a last state [batch, channel, state].
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hcmen.mamba.scan import one_call, selective_scan
from hcmen.mamba.stand_ins.arguments import cast, real, widest
from hcmen.mamba.stand_ins.causal_conv import causal_conv1d_fn
from hcmen.mamba.stand_ins.norms import rms_norm_fn

__all__ = ["CORE", "CUDA", "OFLEX", "bimamba_inner_fn", "mamba_inner_fn", "mamba_inner_fn_no_out_proj"]
__all__ += ["bimamba_inner_ref", "mamba_inner_ref", "selective_scan_fn", "selective_scan_ref", "tracing"]


def tracing() -> bool:
    """Whether an exporter watches: what nobody uses then costs nothing, and every node stays in the graph."""
    return torch.onnx.is_in_onnx_export() or torch.compiler.is_exporting()


def _time_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[b, n, t] -> [b, t, n] and [b, g, n, t] -> [b, t, g, n]; what is the same at every step stays [c, n]."""
    return x if x.dim() == 2 else cast(x.movedim(-1, 1), dtype)


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool | None = False,
    return_last_state: bool = False,
) -> Any:
    """mamba_ssm's `selective_scan_fn`: y [batch, channel, time] in the dtype of u, or (y, last_state).

    Unlike the kernel it gives the last state a gradient too.

    Raises:
        InputError: shapes disagree, or A, B or C is complex.
    """
    real(A=A, B=B, C=C)
    varying = [x for x in (B, C) if x.dim() > 2]
    dtype = widest(u, delta, z, *varying)
    found = selective_scan(
        _time_first(u, dtype),
        _time_first(delta, dtype),
        A,
        _time_first(B, dtype),
        _time_first(C, dtype),
        D,
        delta_bias,
        None if z is None else _time_first(z, dtype),
        delta_softplus=bool(delta_softplus),
        return_last_state=return_last_state,
    )
    y, state = found if isinstance(found, tuple) else (found, None)
    y = cast(y.movedim(1, -1), u.dtype)
    return (y, state) if return_last_state else y


selective_scan_ref = selective_scan_fn


# --- the compiled modules ---------------------------------------------------------------------------------------------


def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    out_float: bool = False,
) -> list[Tensor]:
    """[out, x], and out_z with a gate. The last state is x[:, :, -1, 1::2], where the kernels have it too."""
    wide = widest(u, delta)
    wide = torch.float32 if wide in (torch.float16, torch.bfloat16) else wide
    out_dtype = wide if out_float else u.dtype
    # Half precision is rounded once, after the gate, as in the kernels.
    scan = functools.partial(
        selective_scan_fn, cast(u, wide), delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=delta_softplus
    )
    if tracing():
        # Three calls: of their nodes only those are left whose outputs somebody reads.
        with one_call():
            out, (_, state) = scan(), scan(return_last_state=True)
            gated = None if z is None else scan(z=z)
    else:
        out, state = scan(return_last_state=True)
        gated = None if z is None else out * F.silu(cast(z, wide))
    x = torch.stack((torch.zeros_like(state), state), dim=-1).flatten(2)[:, :, None]
    found = [cast(out, out_dtype), x]
    return found if gated is None else [*found, cast(gated, out_dtype)]


def _into(given: Tensor | None, found: Tensor) -> Tensor:
    """`found`, written into the caller's own tensor if there is one."""
    return found if given is None else given.copy_(found)


def gradients(run: Any, inputs: Sequence[Tensor | None], outer: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """The output of `run(*inputs)` and the gradients of the inputs that are there, where `outer` is the output's."""
    with torch.enable_grad():
        leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
        out = run(*leaves)
        found = iter(torch.autograd.grad(out, [x for x in leaves if x is not None], outer.to(out.dtype)))
        return out.detach(), [None if x is None else next(found) for x in leaves]


def _backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    dz: Tensor | None,
    delta_softplus: bool,
    recompute_out_z: bool,
) -> list[Tensor | None]:
    """[du, ddelta, dA, dB, dC, dD, ddelta_bias], then dz with a gate, then out_z if it is asked for."""
    real(A=A, B=B, C=C)

    def run(*inputs: Any) -> Tensor:
        u, delta, A, B, C, D, delta_bias, z = inputs
        found: Tensor = selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        return found

    out_z, (*found, gate) = gradients(run, (u, delta, A, B, C, D, delta_bias, z), dout)
    if z is not None:
        assert gate is not None
        found.append(_into(dz, gate))
    return [*found, out_z] if recompute_out_z else found


def _cuda_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, nrows=1):  # type: ignore[no-untyped-def]
    return _forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def _cuda_backward(  # type: ignore[no-untyped-def]
    u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus, recompute_out_z, nrows=1
):
    return _backward(u, delta, A, B, C, D, z, delta_bias, dout, dz, delta_softplus, recompute_out_z)


def _core_forward(  # type: ignore[no-untyped-def]
    u, delta, A, B, C, D, delta_bias, delta_softplus, nrows=1, out_float=False
):
    return _forward(u, delta, A, B, C, D, None, delta_bias, delta_softplus, out_float)


def _core_backward(  # type: ignore[no-untyped-def]
    u, delta, A, B, C, D, delta_bias, dout, x, delta_softplus, nrows=1
):
    return _backward(u, delta, A, B, C, D, None, delta_bias, dout, None, delta_softplus, False)


CUDA = SimpleNamespace(fwd=_cuda_forward, bwd=_cuda_backward)
"""What selective_scan_cuda has, and selective_scan_cuda_nrow, whose functions take the number of rows too."""
CORE = OFLEX = SimpleNamespace(fwd=_core_forward, bwd=_core_backward)
"""What VMamba's selective_scan_cuda_core, _oflex and _ndstate have: no gate, and with oflex an output in float32."""


# --- the whole mixer --------------------------------------------------------------------------------------------------


def _inner(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    biases: Sequence[Tensor | None] = (None, None),
    norms: Sequence[Tensor | None] = (None, None, None),
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, delta, B, C and z of a mixer, ready to be scanned; x and z halves of xz [batch, 2 x channel, time]."""
    real(A=A, B=B, C=C)
    rank, state = delta_proj_weight.shape[1], A.shape[1]
    x, z = xz.chunk(2, dim=1)
    x = causal_conv1d_fn(x, conv1d_weight.flatten(1), conv1d_bias, activation="silu")
    low, *projected = torch.split_with_sizes(F.linear(x.transpose(1, 2), x_proj_weight), [rank, state, state], dim=-1)
    delta = F.linear(low, delta_proj_weight)
    made = []
    for given, own, bias, norm in zip((B, C), projected, biases, norms[:2], strict=True):
        if given is not None:
            made.append(given)
            continue
        found = own if bias is None else own + cast(bias, own.dtype)
        made.append((found if norm is None else rms_norm_fn(found, norm, None, eps=eps)).transpose(1, 2))
    if norms[2] is not None:
        delta = rms_norm_fn(delta, norms[2], None, eps=eps)
    return x, delta.transpose(1, 2), made[0], made[1], z


def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """A mixer without its last projection: [batch, channel, time]. `checkpoint_lvl` changes memory alone."""
    biases, norms = (B_proj_bias, C_proj_bias), (b_rms_weight, c_rms_weight, dt_rms_weight)
    x, delta, B, C, z = _inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, biases, norms, b_c_dt_rms_eps
    )
    y: Tensor = selective_scan_fn(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return y


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    *others: Any,
    **named: Any,
) -> Tensor:
    """mamba_ssm's `mamba_inner_fn`: [batch, time, width]. Arguments after A as of `mamba_inner_fn_no_out_proj`."""
    y = mamba_inner_fn_no_out_proj(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, *others, **named
    )
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def bimamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """Vim's `bimamba_inner_fn`: the same x, B and C scanned from both ends, with a decay for each direction."""
    real(A_b=A_b)
    x, delta, B, C, z = _inner(
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A,
        B,
        C,
        biases=(B_proj_bias, C_proj_bias),
    )
    dtype = widest(x, delta, z, *(v for v in (B, C) if v.dim() > 2))
    tensors = [_time_first(v, dtype) for v in (x, delta, B, C, z)]
    series, steps, inputs, outputs, gate = tensors

    def scanned(decay: Tensor, reverse: bool) -> Tensor:
        y = selective_scan(
            series,
            steps,
            decay,
            inputs,
            outputs,
            D,
            delta_bias,
            gate,
            delta_softplus=delta_softplus,
            reverse=reverse,
        )
        assert isinstance(y, Tensor)
        return y

    return F.linear(cast(scanned(A, False) + scanned(A_b, True), xz.dtype), out_proj_weight, out_proj_bias)


mamba_inner_ref, bimamba_inner_ref = mamba_inner_fn, bimamba_inner_fn
