"""The operators in plain PyTorch, in the precision of their inputs, float64 included.

The oracle of every other implementation. Glossary and shapes: scan.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["causal_conv1d_ref", "selective_scan_ref", "state_space_dual_ref"]


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
        A: [channel, state]. B, C: [batch, time, state], [batch, time, group, state], or the same at every step:
            [channel, state]. Each may have a form, and groups, of its own.
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
    B, C = (_per_channel(x, u) for x in (B, C))

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


def _per_channel(x: Tensor, u: Tensor) -> Tensor:
    """[c, n], [b, t, n] or [b, t, g, n] -> [b, t, 1 or c, n], ready to broadcast against [b, t, c, n]."""
    if x.dim() == 2:
        return x.expand(u.shape[0], u.shape[1], *x.shape)
    if x.dim() == 3:
        return x[:, :, None]
    return x.repeat_interleave(u.shape[2] // x.shape[2], dim=2)


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    activation: str = "silu",
    reverse: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution over time; step t sees steps t - width + 1 .. t, or t .. t + width - 1 if `reverse`.

    Args:
        x: [batch, time, channel]. weight: [channel, width], the last tap is the current step.
        bias: [channel], zero if absent.
        initial_state: [batch, width - 1, channel], the inputs before the first step, the last of them nearest to it;
            zero if absent.
        activation: "silu" or "none".
        reverse: mirror time, the same as flipping x, convolving, and flipping the result. A state is never flipped.
        return_last_state: also return the last width - 1 inputs, `initial_state` counted, [batch, width - 1, channel].

    Returns:
        y [batch, time, channel] in the dtype of x, computed in float64 if x is float64, else in float32; with
        `return_last_state`, (y, last_state), the state in the precision of the computation.
    """
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, _, channel = x.shape
    past = weight.shape[1] - 1
    before = x.new_zeros(batch, past, channel, dtype=work) if initial_state is None else initial_state.to(work)
    series = torch.cat((before, x.to(work).flip(1) if reverse else x.to(work)), dim=1)
    y = F.conv1d(
        series.transpose(1, 2), weight.to(work)[:, None], None if bias is None else bias.to(work), groups=channel
    ).transpose(1, 2)
    y = y.flip(1) if reverse else y
    y = (F.silu(y) if activation == "silu" else y).to(x.dtype)
    return (y, series[:, series.shape[1] - past :]) if return_last_state else y


def state_space_dual_ref(
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
    """The state space dual of Mamba-2 (arXiv 2405.21060, equation 6 with a scalar decay for each head), step by step.

    h[t] = exp(d[t] A) h[t-1] + d[t] x[t] B[t]^T and y[t] = h[t] C[t] + D x[t]. The semantics are those of mamba_ssm's
    `mamba_chunk_scan_combined`, with an initial state and a direction. It computes in float64 if `x` is float64, else
    in float32.

    Args:
        x, z: [batch, time, head, head_dim].
        dt: [batch, time, head]. A, dt_bias: [head]. D: [head] or [head, head_dim]. dt_bias and D are zero if absent.
        B, C: [batch, time, group, state]; head i uses group i // (head / group).
        initial_state: [batch, head, head_dim, state], the state before the first step scanned, zero if absent.
        delta_softplus: dt + dt_bias goes through softplus (linear above 20).
        dt_min, dt_max: what the step size is cut to after that. Beyond them it has no gradient.
        reverse: scan from the last step to the first.
        return_last_state: also return the state after the last step scanned, [batch, head, head_dim, state].

    Returns:
        y [batch, time, head, head_dim] in the dtype of x; with `return_last_state`, (y, last_state).
    """
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    dtype, head = x.dtype, x.shape[2]
    x, dt, A, B, C = (v.to(work) for v in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.to(work)
    if delta_softplus:
        dt = F.softplus(dt, beta=1.0, threshold=20.0)
    dt = dt.clamp(dt_min, dt_max)
    B, C = (v.repeat_interleave(head // v.shape[2], dim=2) for v in (B, C))

    state = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[3]) if initial_state is None else initial_state.to(work)
    outputs: list[Tensor] = [x] * x.shape[1]
    steps = range(x.shape[1])
    for t in reversed(steps) if reverse else steps:
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        state = decay * state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        outputs[t] = (state * C[:, t, :, None]).sum(-1)
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + x * (D if D.dim() == 2 else D[:, None]).to(work)
    if z is not None:
        y = y * F.silu(z.to(work))
    y = y.to(dtype)
    return (y, state) if return_last_state else y
