"""Small mixers that compute what public Mamba repositories compute, in the layout and with the operations they use.

They are written from those repositories' published behaviour. Series are channels first inside, as CUDA kernels want
them, and the scan and convolution are reached through functions of that layout, as a stand-in for those kernels would.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcmen.mamba.scan import causal_conv1d, selective_scan


def conv_channels_first(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return causal_conv1d(x.transpose(1, 2), weight, bias).transpose(1, 2)


def scan_channels_first(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False) -> Tensor:
    """u, delta, z [b, c, t]; B, C [b, n, t] or [b, g, n, t]; gives [b, c, t]."""

    def time_second(x: Tensor | None) -> Tensor | None:
        return x if x is None else x.permute(0, 3, 1, 2) if x.dim() == 4 else x.transpose(1, 2)

    y = selective_scan(
        *(time_second(x) for x in (u, delta)),
        A,
        *(time_second(x) for x in (B, C)),
        D,
        delta_bias,
        time_second(z),
        delta_softplus=delta_softplus,
    )
    return y.transpose(1, 2)


class ChannelsFirstMixer(nn.Module):
    """mamba_ssm's Mamba, and what Vim (v1, v2) makes of it. averaged: both directions of v2 are halved."""

    def __init__(self, width=12, state=4, rank=3, *, directions="none", averaged=False, bias=False, scale=None):
        super().__init__()
        self.directions, self.averaged, inner = directions, averaged, 2 * width
        self.activation, self.act = "silu", nn.SiLU()
        self.in_proj = nn.Linear(width, 2 * inner, bias=bias)
        self._add("", inner, state, rank)
        if directions == "v1":
            self.A_b_log = nn.Parameter(torch.rand(inner, state))
        elif directions == "v2":
            self._add("_b", inner, state, rank)
        self.out_proj = nn.Linear(inner, width, bias=bias)
        if scale is not None:
            self.gamma = nn.Parameter(scale * torch.ones(width))

    def _add(self, suffix: str, inner: int, state: int, rank: int) -> None:
        self.add_module("conv1d" + suffix, nn.Conv1d(inner, inner, 4, groups=inner, padding=3))
        self.add_module("x_proj" + suffix, nn.Linear(inner, rank + 2 * state, bias=False))
        self.add_module("dt_proj" + suffix, nn.Linear(rank, inner))
        decay = "A_b_log" if suffix else "A_log"
        self.register_parameter(decay, nn.Parameter(torch.rand(inner, state)))
        self.register_parameter("D" + suffix, nn.Parameter(torch.randn(inner)))

    def selected(self, u: Tensor, suffix: str) -> tuple[Tensor, Tensor, Tensor]:
        x_proj, dt_proj = getattr(self, "x_proj" + suffix), getattr(self, "dt_proj" + suffix)
        batch, inner, time = u.shape
        state = self.A_log.shape[1]
        merged = x_proj(u.transpose(1, 2).reshape(batch * time, inner))
        dt, B, C = torch.split(merged, [dt_proj.in_features, state, state], dim=-1)
        delta = (dt_proj.weight @ dt.t()).reshape(inner, batch, time).permute(1, 0, 2)
        B, C = (x.reshape(batch, time, state).transpose(1, 2).contiguous() for x in (B, C))
        return delta, B, C

    def inner(self, xz: Tensor, suffix: str = "") -> Tensor:
        conv, dt_proj = getattr(self, "conv1d" + suffix), getattr(self, "dt_proj" + suffix)
        x, z = xz.chunk(2, dim=1)
        u = conv_channels_first(x, conv.weight.squeeze(1), conv.bias)
        delta, B, C = self.selected(u, suffix)
        A = -torch.exp((self.A_b_log if suffix else self.A_log).float())
        D = getattr(self, "D" + suffix)
        y = scan_channels_first(u, delta, A, B[:, None], C[:, None], D.float(), z, dt_proj.bias.float(), True)
        if suffix or self.directions != "v1":
            return y
        flipped = [x.flip([-1]) for x in (u, delta, B, C, z)]
        A_b = -torch.exp(self.A_b_log.float())
        back = scan_channels_first(*flipped[:2], A_b, *flipped[2:4], D, flipped[4], dt_proj.bias, True)
        return y + back.flip([-1])

    def forward(self, hidden_states, inference_params=None):
        batch, time, _ = hidden_states.shape
        merged = hidden_states.permute(2, 0, 1).reshape(-1, batch * time)
        xz = (self.in_proj.weight @ merged).reshape(-1, batch, time).permute(1, 0, 2)
        if self.in_proj.bias is not None:
            xz = xz + self.in_proj.bias[:, None]
        y = self.inner(xz)
        if self.directions == "v2":
            y = y + self.inner(xz.flip([-1]), "_b").flip([-1])
            y = y / 2 if self.averaged else y
        out = F.linear(y.transpose(1, 2), self.out_proj.weight, self.out_proj.bias)
        return out * self.gamma if hasattr(self, "gamma") else out


class CrossScan(nn.Module):
    """VMamba's and MambaIR's scan of a picture [b, c, h, w] in four directions.

    copies: "slices" (written into an empty tensor) or "stack"; products: "einsum" or "conv" (grouped, of one tap).
    """

    def __init__(self, channel=6, state=3, rank=2, *, copies="slices", products="einsum"):
        super().__init__()
        self.copies, self.products, self.rank, self.state = copies, products, rank, state
        self.x_proj_weight = nn.Parameter(torch.randn(4, rank + 2 * state, channel) / channel)
        self.dt_projs_weight = nn.Parameter(torch.randn(4, channel, rank))
        self.dt_projs_bias = nn.Parameter(torch.randn(4, channel) - 3)
        self.A_logs = nn.Parameter(torch.rand(4 * channel, state))
        self.Ds = nn.Parameter(torch.randn(4 * channel))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        if self.copies == "slices":
            xs = x.new_empty((b, 4, c, h * w))
            xs[:, 0] = x.flatten(2, 3)
            xs[:, 1] = x.transpose(2, 3).flatten(2, 3)
            xs[:, 2:4] = torch.flip(xs[:, 0:2], dims=[-1])
        else:
            two = torch.stack([x.view(b, -1, h * w), x.transpose(2, 3).contiguous().view(b, -1, h * w)], dim=1)
            xs = torch.cat([two, two.flip([-1])], dim=1)
        sizes = [self.rank, self.state, self.state]
        if self.products == "einsum":
            chosen = torch.einsum("b k d l, k c d -> b k c l", xs, self.x_proj_weight)
            dts, B, C = torch.split(chosen, sizes, dim=2)
            dts = torch.einsum("b k r l, k d r -> b k d l", dts, self.dt_projs_weight)
        else:
            weight = self.x_proj_weight.view(-1, c, 1)
            chosen = F.conv1d(xs.view(b, -1, h * w), weight, groups=4).view(b, 4, -1, h * w)
            dts, B, C = torch.split(chosen, sizes, dim=2)
            weight = self.dt_projs_weight.view(4 * c, -1, 1)
            dts = F.conv1d(dts.contiguous().view(b, -1, h * w), weight, groups=4)
        y = scan_channels_first(
            xs.reshape(b, -1, h * w),
            dts.reshape(b, -1, h * w),
            -torch.exp(self.A_logs),
            B.contiguous(),
            C.contiguous(),
            self.Ds,
            None,
            self.dt_projs_bias.view(-1),
            True,
        ).view(b, 4, c, h, w)
        y = y.view(b, 4, c, -1)
        y = y[:, 0:2] + y[:, 2:4].flip([-1]).view(b, 2, c, -1)
        return y[:, 0] + y[:, 1].view(b, -1, w, h).transpose(2, 3).contiguous().view(b, c, -1)
