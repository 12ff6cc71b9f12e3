"""The building blocks of HCMEN: CNN block, BiMamba block, attention pooling.

Glossary (sizes: batch b, time t, width d, scan channels c = expand * d, states n)
    x          [b, t, d]   tokens of one modality, or of the fused stream
    mask       [b, t]      true where a step is real; None means that all are. Padding is always at the end.
    u, z       [b, t, c]   the two halves of in_proj: input of the scan and its gate   (mamba_ssm: x, z)
    delta      [b, t, c]   step sizes, from dt_rank numbers per step                   (mamba_ssm: dt)
    A, D, B, C             as in hcmen/mamba/scan.py

Under autocast matrix products and convolutions are in bfloat16. Norms and softmaxes get float32, here rather than by
autocast's lists, which differ between CPU and GPU; the scan widens by itself (hcmen/mamba/scan.py).

Every block masks what it mixes over time (convolution, scan, pooling), so the value of a real step depends neither on
how far its clip is padded nor on the other clips of its batch.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcmen.mamba.scan import causal_conv1d, selective_scan
from hcmen.models.contract import MASKED

__all__ = ["AttentionPooling", "BiMamba", "BiMambaBlock", "CNNBlock", "Skip", "widened", "without_autocast"]


def widened(x: Tensor) -> Tensor:
    """`x` in float32 if it is in half precision, else as it is, so that a float64 model stays one."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A block in which operations on tensors like `x` keep their precision; nothing at all where autocast is off."""
    if not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


class CNNBlock(nn.Module):
    """Local detail: x + dropout(relu(norm(conv(x)))), kernel 3, after DepMamba's local block.

    LayerNorm stands where DepMamba has BatchNorm: half of the training batches hold absent modalities, which would
    shift batch statistics, and a score must not depend on its batch.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel_size=3, padding=1, bias=False)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.conv.weight)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [b, t, d], mask [b, t] -> [b, t, d]."""
        local = self.conv(_zero_padding(x, mask).transpose(1, 2)).transpose(1, 2)
        return x + self.dropout(F.relu(self.norm(widened(local))))


class BiMamba(nn.Module):
    """A bidirectional Mamba mixer: one input and one output projection, two scans ("v2" of Vision Mamba, 2401.09417).

    Weights are named as in mamba_ssm, those of the reverse direction as in Vision Mamba and DepMamba (`conv1d_b`,
    `x_proj_b`, `dt_proj_b`, `A_b_log`, `D_b`), so that checkpoints of those projects load by name.
    """

    def __init__(self, width: int, states: int, expand: int, conv_width: int) -> None:
        super().__init__()
        channels, dt_rank = expand * width, math.ceil(width / 16)
        self.states, self.dt_rank = states, dt_rank
        self.in_proj = nn.Linear(width, 2 * channels, bias=False)
        for suffix in ("", "_b"):
            conv = nn.Conv1d(channels, channels, conv_width, groups=channels, padding=conv_width - 1)
            x_proj = nn.Linear(channels, dt_rank + 2 * states, bias=False)
            setattr(self, f"conv1d{suffix}", conv)
            setattr(self, f"x_proj{suffix}", x_proj)
            setattr(self, f"dt_proj{suffix}", _step_size_projection(dt_rank, channels))
        self.A_log, self.A_b_log = (nn.Parameter(_initial_a_log(channels, states)) for _ in range(2))
        self.D, self.D_b = (nn.Parameter(torch.ones(channels)) for _ in range(2))
        self.out_proj = nn.Linear(channels, width, bias=False)
        for parameter in (self.A_log, self.A_b_log, self.D, self.D_b):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [b, t, d], mask [b, t] -> [b, t, d]."""
        x = _zero_padding(x, mask)  # u and z are zero there too, in_proj has no bias
        # Two products with half of the weight each: the halves of one would have to be copied apart for the kernels.
        channels = self.D.shape[0]
        u, z = F.linear(x, self.in_proj.weight[:channels]), F.linear(x, self.in_proj.weight[channels:])
        forward = self._scan(u, z, None, self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D, reverse=False)
        backward = self._scan(
            u, z, mask, self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b, reverse=True
        )
        # The mean of both directions; halving the weight is exact, and done once in an exported graph.
        return F.linear(forward + backward, 0.5 * self.out_proj.weight)

    def _scan(
        self,
        u: Tensor,
        z: Tensor,
        mask: Tensor | None,
        conv1d: nn.Conv1d,
        x_proj: nn.Linear,
        dt_proj: nn.Linear,
        A_log: Tensor,
        D: Tensor,
        *,
        reverse: bool,
    ) -> Tensor:
        """One direction: convolution, step sizes and projections from its output, selective scan, gate.

        A reverse scan comes through the padding first and needs `mask`: where B is zero nothing enters the state, which
        then is still zero at the first real step. A forward scan is past all real steps by then.
        """
        u = causal_conv1d(u, conv1d.weight[:, 0], conv1d.bias, activation="silu", reverse=reverse)
        dt, B, C = _zero_padding(x_proj(u), mask).split([self.dt_rank, self.states, self.states], dim=-1)
        delta = F.linear(dt, dt_proj.weight)
        A = -torch.exp(A_log)
        return selective_scan(u, delta, A, B, C, D, dt_proj.bias, z, delta_softplus=True, reverse=reverse)


class BiMambaBlock(nn.Module):
    """Global context: x + norm(mixer(x)), norm on the branch and no feed-forward part, as in DepMamba and TF-Mamba."""

    def __init__(self, width: int, states: int, expand: int, conv_width: int) -> None:
        super().__init__()
        self.mixer = BiMamba(width, states, expand, conv_width)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [b, t, d], mask [b, t] -> [b, t, d]."""
        return x + self.norm(widened(self.mixer(x, mask)))


class Skip(nn.Module):
    """Stands in the place of a block that an ablation leaves out."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x as it came."""
        return x


class AttentionPooling(nn.Module):
    """Pools a sequence of any length to a fixed number of tokens: learned queries attend to the real steps.

    The products are taken in the order that leaves out the time axis: queries with keys' weight before the steps, and
    steps summed up before values' weight. That is the same sum, and 2 t d^2 products less, a tenth of an exported
    graph's.
    """

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(tokens, width))
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [b, t, d], mask [b, t] -> [b, tokens, d]."""
        with without_autocast(x):  # in few operations, on which all else rests
            queries = self.queries @ self.key.weight / math.sqrt(x.shape[-1])
            scores = queries @ widened(x).transpose(1, 2)
            weights = scores.masked_fill(~mask[:, None], MASKED).softmax(dim=-1)
            pooled = weights @ widened(x)
        return self.value(pooled)


def _zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask[..., None].to(x.dtype)


def _initial_a_log(channels: int, states: int) -> Tensor:
    """log(1..n) for every channel: A = -(1..n), the S4D-real initialisation that mamba_ssm uses."""
    return torch.log(torch.arange(1, states + 1, dtype=torch.float32)).repeat(channels, 1)


def _step_size_projection(dt_rank: int, channels: int) -> nn.Linear:
    """dt_proj of mamba_ssm: weight uniform within dt_rank^-0.5, bias such that softplus(bias) is log-uniform in
    [1e-3, 1e-1] with a floor of 1e-4."""
    projection = nn.Linear(dt_rank, channels)
    nn.init.uniform_(projection.weight, -(dt_rank**-0.5), dt_rank**-0.5)
    low, high = math.log(1e-3), math.log(1e-1)
    step = torch.exp(torch.rand(channels) * (high - low) + low).clamp(min=1e-4)
    with torch.no_grad():
        projection.bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
    return projection
