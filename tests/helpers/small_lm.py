"""Language models of some thousand weights that call hcmen.mamba.scan, as a fork of Mamba would."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcmen.mamba import scan


class RMSNorm(nn.Module):
    """Root mean square normalisation over the last axis."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class Mamba1(nn.Module):
    """The mixer of Mamba-1."""

    def __init__(self, size: int, state: int = 6, width: int = 4):
        super().__init__()
        inner, rank = 2 * size, max(1, size // 8)
        self.in_proj = nn.Linear(size, 2 * inner, bias=False)
        self.conv_weight = nn.Parameter(torch.randn(inner, width) / 2)
        self.conv_bias = nn.Parameter(torch.randn(inner) / 10)
        self.sizes = [rank, state, state]
        self.x_proj = nn.Linear(inner, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, state + 1)).repeat(inner, 1))
        self.D = nn.Parameter(torch.rand(inner))
        self.out_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(x).chunk(2, -1)
        u = scan.causal_conv1d(u, self.conv_weight, self.conv_bias)
        step, B, C = self.x_proj(u).split(self.sizes, -1)
        delta = F.linear(step, self.dt_proj.weight)
        A = -torch.exp(self.A_log)
        y = scan.selective_scan(u, delta, A, B, C, self.D, self.dt_proj.bias, z, delta_softplus=True)
        return self.out_proj(y)


class Mamba2(nn.Module):
    """The mixer of Mamba-2, its normalisation left out."""

    def __init__(self, size: int, state: int = 5, width: int = 4, head_dim: int = 4):
        super().__init__()
        self.inner, self.state, self.head_dim = 2 * size, state, head_dim
        self.head = self.inner // head_dim
        channel = self.inner + 2 * state
        self.in_proj = nn.Linear(size, self.inner + channel + self.head, bias=False)
        self.conv_weight = nn.Parameter(torch.randn(channel, width) / 2)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, self.head + 1)))
        self.D = nn.Parameter(torch.rand(self.head))
        self.dt_bias = nn.Parameter(torch.rand(self.head))
        self.out_proj = nn.Linear(self.inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z, xBC, dt = self.in_proj(x).split([self.inner, self.inner + 2 * self.state, self.head], -1)
        xBC = scan.causal_conv1d(xBC, self.conv_weight)
        u, B, C = xBC.split([self.inner, self.state, self.state], -1)
        heads = u.reshape(*u.shape[:2], self.head, self.head_dim)
        A = -torch.exp(self.A_log)
        y = scan.state_space_dual(heads, dt, A, B[:, :, None], C[:, :, None], self.D, self.dt_bias, delta_softplus=True)
        return self.out_proj(y.reshape(u.shape) * F.silu(z))


class Layer(nn.Module):
    """A mixer behind its normalisation, added to its input."""

    def __init__(self, mixer: nn.Module, size: int):
        super().__init__()
        self.norm, self.mixer = RMSNorm(size), mixer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


class SmallLM(nn.Module):
    """Token ids [batch, time] -> logits [batch, time, vocabulary]. mixers: one a layer."""

    def __init__(self, *mixers: type[nn.Module], size: int = 12, vocabulary: int = 29, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(vocabulary, size)
        self.layers = nn.ModuleList(Layer(mixer(size), size) for mixer in mixers)
        self.norm = RMSNorm(size)
        self.head = nn.Linear(size, vocabulary, bias=False)
        self.eval()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))
