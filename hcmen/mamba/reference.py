"""Selective scan and causal convolution in plain PyTorch, in the precision of their inputs, float64 included.

The oracle of every other implementation. Glossary and shapes: scan.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["causal_conv1d_ref", "selective_scan_ref"]


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
