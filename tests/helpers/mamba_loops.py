"""mamba_ssm's functions as loops, element by element of time, in the precision of what comes: the oracle of stand-ins.

Layouts are mamba_ssm's own: channels before time for Mamba-1 and the convolution, time before heads for Mamba-2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["agree", "conv", "dual", "norm", "scan", "softplus"]


def softplus(x: Tensor) -> Tensor:
    return torch.where(x > 20, x, torch.log1p(torch.exp(x.clamp(max=20.0))))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _of_step(x: Tensor, t: int, channel: int) -> Tensor:
    """B or C at a step, [b or 1, channel, state]."""
    if x.dim() == 2:
        return x[None]
    if x.dim() == 3:
        return x[:, None, :, t].expand(-1, channel, -1)
    return torch.stack([x[:, c // (channel // x.shape[1]), :, t] for c in range(channel)], dim=1)


def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False) -> tuple[Tensor, Tensor, Tensor]:
    """y before the gate, y, and the last state [b, c, n]."""
    steps = delta if delta_bias is None else delta + delta_bias[:, None]
    steps = softplus(steps) if delta_softplus else steps
    channel = u.shape[1]
    h = u.new_zeros(u.shape[0], channel, A.shape[1])
    found = []
    for t in range(u.shape[2]):
        d = steps[:, :, t, None]
        h = torch.exp(d * A) * h + d * _of_step(B, t, channel) * u[:, :, t, None]
        found.append((h * _of_step(C, t, channel)).sum(-1))
    y = torch.stack(found, dim=2)
    y = y if D is None else y + D[:, None] * u
    return y, (y if z is None else y * silu(z)), h


def conv(x, weight, bias=None, state=None, activated=False) -> tuple[Tensor, Tensor]:
    """y [b, c, t], and all inputs with the state before them."""
    width = weight.shape[1]
    before = x.new_zeros(*x.shape[:2], width - 1) if state is None else state
    series = torch.cat((before, x), dim=2)
    found = []
    for t in range(x.shape[2]):
        y = (series[:, :, t : t + width] * weight).sum(-1)
        found.append(y if bias is None else y + bias)
    y = torch.stack(found, dim=2)
    return (silu(y) if activated else y), series


def dual(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, state=None, dt_softplus=False, limits=(0.0, math.inf)
) -> tuple[Tensor, Tensor]:
    """y [b, t, h, p] and the last state [b, h, p, n]."""
    batch, time, head, dim = x.shape
    steps = dt if dt_bias is None else dt + dt_bias
    steps = (softplus(steps) if dt_softplus else steps).clamp(*limits)
    h = x.new_zeros(batch, head, dim, B.shape[3]) if state is None else state
    found = []
    for t in range(time):
        rows = []
        heads = []
        for k in range(head):
            g = k // (head // B.shape[2])
            d = steps[:, t, k, None, None]
            row = torch.exp(d * A[k]) * h[:, k] + d * x[:, t, k, :, None] * B[:, t, g, None, :]
            rows.append(row)
            heads.append((row * C[:, t, g, None, :]).sum(-1))
        h = torch.stack(rows, dim=1)
        found.append(torch.stack(heads, dim=1))
    y = torch.stack(found, dim=1)
    if D is not None:
        y = y + x * (D if D.dim() == 2 else D[:, None])
    return (y if z is None else y * silu(z)), h


def norm(x, weight, bias=None, eps=1e-6, rms=False, group=None) -> Tensor:
    """Row by row and group by group."""
    size = group or x.shape[-1]
    parts = []
    for start in range(0, x.shape[-1], size):
        part = x[..., start : start + size]
        centred = part if rms else part - part.mean(-1, keepdim=True)
        parts.append(centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps))
    y = torch.cat(parts, dim=-1) * weight
    return y if bias is None else y + bias


def agree(found, wanted, *, within=2e-6) -> None:
    """Each of `found` is that of `wanted`, relative to its largest element."""
    assert len(found) == len(wanted)
    for number, (got, want) in enumerate(zip(found, wanted, strict=True)):
        assert got.shape == want.shape, number
        got, want = got.detach().double(), want.detach().double()
        furthest = (got - want).abs().max()
        assert furthest <= within * max(float(want.abs().max()), 1e-3), f"{number}: {furthest}"
