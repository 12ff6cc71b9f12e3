"""A model on the functions of this package, written three ways: fused, in parts, and step by step."""

import torch
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from torch import nn
from torch.nn import functional as F

from vendored_mamba.norms import RMSNorm
from vendored_mamba.selective_scan import CrossScan, mamba_inner, selective_scan_fn
from vendored_mamba.state_update import selective_state_update

try:
    from transformers.generation import GreedySearchDecoderOnlyOutput
except ImportError:  # without transformers
    GreedySearchDecoderOnlyOutput = None


class Mixer(nn.Module):
    def __init__(self, width, state=4, taps=4, rank=2):
        super().__init__()
        inner = 2 * width
        self.rank, self.state, self.fused = rank, state, True
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, taps, groups=inner, padding=taps - 1)
        self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1, state + 1).float().log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        A, taps = -torch.exp(self.A_log), self.conv1d.weight[:, 0]
        xz = self.in_proj(x).transpose(1, 2)
        if self.fused:
            y = mamba_inner(
                *(xz, taps, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight, A, self.D, self.dt_proj.bias)
            )
            return self.out_proj(y.transpose(1, 2))
        x, z = xz.chunk(2, dim=1)
        x = causal_conv1d_fn(x, taps, self.conv1d.bias, activation="silu")
        low, B, C = self.x_proj(x.transpose(1, 2)).split([self.rank, self.state, self.state], dim=-1)
        delta = (low @ self.dt_proj.weight.t()).transpose(1, 2)
        B, C = B.transpose(1, 2), C.transpose(1, 2)
        y, self.last = selective_scan_fn(x, delta, A, B, C, self.D, z, self.dt_proj.bias, return_last_state=True)
        return self.out_proj(y.transpose(1, 2))

    def step(self, x, conv_state, state):
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = causal_conv1d_update(x, conv_state, self.conv1d.weight[:, 0], self.conv1d.bias, "silu")
        low, B, C = self.x_proj(x).split([self.rank, self.state, self.state], dim=-1)
        dt, A = low @ self.dt_proj.weight.t(), -torch.exp(self.A_log)
        y = selective_state_update(state, x, dt, A, B, C, self.D, z, self.dt_proj.bias, dt_softplus=True)
        return self.out_proj(y)


class Cross(nn.Module):
    """Two directions over a sequence, as groups of one scan."""

    def __init__(self, width, state=3):
        super().__init__()
        self.width, self.state = width, state
        self.delta = nn.Linear(width, 2 * width)
        self.projections = nn.Linear(width, 4 * state)
        self.A_log = nn.Parameter(torch.rand(2 * width, state))
        self.D = nn.Parameter(torch.ones(2 * width))
        self.bias = nn.Parameter(torch.zeros(2 * width))

    def forward(self, x):
        batch, time, _ = x.shape
        series = torch.cat((x, x.flip(1)), dim=2).transpose(1, 2).contiguous()
        delta = self.delta(x).transpose(1, 2).contiguous()
        both = self.projections(x).reshape(batch, time, 2, 2, self.state).permute(2, 0, 3, 4, 1).contiguous()
        y = CrossScan.apply(series, delta, -torch.exp(self.A_log), both[0], both[1], self.D, self.bias)
        left, right = y.transpose(1, 2).chunk(2, dim=2)
        return left + right.flip(1)


class Classifier(nn.Module):
    def __init__(self, width=8, classes=3, layers=2):
        super().__init__()
        self.mixers = nn.ModuleList(Mixer(width) for _ in range(layers))
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(layers + 1))
        self.cross = Cross(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        residual = None
        for mixer, norm in zip(self.mixers, self.norms, strict=False):
            x, residual = norm(x, residual, prenorm=True)
            x = mixer(x)
        x = F.silu(self.cross(self.norms[-1](x, residual)))
        return self.head(x.mean(dim=1))
