"""mamba_ssm's Mamba-2 functions and the single step of either kind, on `hcmen.mamba.scan`; time before channels.

Shapes: x, z [batch, time, head, p]; dt [batch, time, head]; A, dt_bias [head]; D [head] or [head, p];
B, C [batch, time, group, state]; states [batch, head, p, state].
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hcmen.base.errors import InputError
from hcmen.mamba.scan import selective_scan, state_space_dual
from hcmen.mamba.stand_ins.arguments import cast, not_served, real, widest
from hcmen.mamba.stand_ins.causal_conv import causal_conv1d_fn
from hcmen.mamba.stand_ins.norms import rmsnorm_fn

__all__ = ["mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined", "selective_state_update", "swiglu"]


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 0,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Any:
    """mamba_ssm's `mamba_chunk_scan_combined`: y as x, or (y, final states in float32). `chunk_size` changes nothing.

    Raises:
        InputError: shapes disagree; A is complex; seq_idx, cu_seqlens or return_varlen_states came.
    """
    real(A=A)
    for name, value in (
        ("seq_idx", seq_idx),
        ("cu_seqlens", cu_seqlens),
        ("return_varlen_states", return_varlen_states),
    ):
        not_served(name, value)
    dtype = widest(x, dt, B, C, z)
    found = state_space_dual(
        cast(x, dtype),
        cast(dt, dtype),
        A,
        cast(B, dtype),
        cast(C, dtype),
        D,
        dt_bias,
        None if z is None else cast(z, dtype),
        initial_states,
        delta_softplus=dt_softplus,
        dt_min=float(dt_limit[0]),
        dt_max=float(dt_limit[1]),
        return_last_state=return_final_states,
    )
    return (cast(found[0], x.dtype), found[1]) if isinstance(found, tuple) else cast(found, x.dtype)


def swiglu(xy: Tensor) -> Tensor:
    """silu(x) y of the halves of xy [..., 2 x width]."""
    x, y = xy.chunk(2, dim=-1)
    return F.silu(x) * y


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int = 0,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Any:
    """mamba_ssm's `mamba_split_conv1d_scan_combined`, a Mamba-2 mixer between its projections and with its last one.

    zxbcdt: [batch, time, 2 x extra + 2 x width + 2 x group x state + head], width head x headdim; what is extra is a
    gated linear unit beside the mixer. conv1d_weight: [width + 2 x group x state, taps].

    Returns:
        [batch, time, extra + width], or the width of the last projection; with `return_final_states` also these.

    Raises:
        InputError: shapes disagree, headdim is missing, A is complex, or seq_idx came.
    """
    if D.dim() == 2:
        headdim = D.shape[1]
    if headdim is None:
        raise InputError("headdim is None", "the channels of a head, since D has one number a head")
    head, channel = D.shape[0], conv1d_weight.shape[0]
    width = head * headdim
    state = (channel - width) // (2 * ngroups)
    extra = (zxbcdt.shape[-1] - width - channel - head) // 2
    if extra < 0 or width + 2 * ngroups * state != channel or 2 * extra + width + channel + head != zxbcdt.shape[-1]:
        want = f"at least {width + channel + head} = width {width} + convolved {channel} + heads {head}"
        raise InputError(f"zxbcdt has {zxbcdt.shape[-1]} channels", want)
    beside, z, xBC, dt = torch.split_with_sizes(zxbcdt, [2 * extra, width, channel, head], dim=-1)
    xBC = causal_conv1d_fn(xBC.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation=activation).transpose(
        1, 2
    )
    x, B, C = torch.split_with_sizes(xBC, [width, ngroups * state, ngroups * state], dim=-1)
    gate = torch.unflatten(z, -1, (head, headdim)) if rmsnorm_weight is None else None
    found = mamba_chunk_scan_combined(
        torch.unflatten(x, -1, (head, headdim)),
        dt,
        A,
        torch.unflatten(B, -1, (ngroups, state)),
        torch.unflatten(C, -1, (ngroups, state)),
        D=D,
        z=gate,
        dt_bias=dt_bias,
        initial_states=initial_states,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
    )
    y, last = found if return_final_states else (found, None)
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        y = rmsnorm_fn(y, rmsnorm_weight, None, z, rmsnorm_eps, width // ngroups, norm_before_gate)
    if extra:
        y = torch.cat((swiglu(beside), y), dim=-1)
    if outproj_weight is not None:
        y = F.linear(cast(y, outproj_weight.dtype), outproj_weight, outproj_bias)
    return (y, last) if return_final_states else y


def _tied(x: Tensor | None, dims: int) -> bool:
    """Whether the last dimensions are one number, repeated: mamba_ssm tells it by the strides too."""
    return x is None or all(x.stride(-i) == 0 or x.shape[-i] == 1 for i in range(1, dims + 1))


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """mamba_ssm's `selective_state_update`, one step: y as x. The state is changed in place.

    Args:
        state: [batch, channel, state] with x, dt, z [batch, channel], A [channel, state], D, dt_bias [channel] and B, C
            [batch, state]; or [batch, head, p, state] with x, dt, z [batch, head, p], A [head, p, state], D, dt_bias
            [head, p] and B, C [batch, group, state]. Then dt and A that are expanded over a head run as Mamba-2.

    Raises:
        InputError: shapes disagree, A is complex, or state_batch_indices came.
    """
    real(A=A, state=state)
    not_served("state_batch_indices", state_batch_indices, "pass the states of these batch elements alone")
    dtype = widest(x, dt, B, C, z)
    if B.dim() == 2:
        B, C = B[:, None], C[:, None]
    steps = [None if v is None else cast(v, dtype)[:, None] for v in (x, dt, B, C, z)]
    series, step, inputs, outputs, gate = steps
    assert series is not None
    assert step is not None
    assert inputs is not None
    assert outputs is not None
    if state.dim() == 4 and _tied(dt, 1) and _tied(A, 2) and _tied(dt_bias, 1):
        found = state_space_dual(
            series,
            step[..., 0],
            A[:, 0, 0],
            inputs,
            outputs,
            D,
            None if dt_bias is None else dt_bias[:, 0],
            gate,
            state,
            delta_softplus=dt_softplus,
            return_last_state=True,
        )
    else:
        found = selective_scan(
            series.flatten(2),
            step.flatten(2),
            A.reshape(-1, A.shape[-1]),
            inputs,
            outputs,
            None if D is None else D.reshape(-1),
            None if dt_bias is None else dt_bias.reshape(-1),
            None if gate is None else gate.flatten(2),
            state.reshape(state.shape[0], -1, state.shape[-1]),
            delta_softplus=dt_softplus,
            return_last_state=True,
        )
    y, last = found
    state.copy_(last.reshape(state.shape))
    return cast(y.reshape(x.shape), x.dtype)
