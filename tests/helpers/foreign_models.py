"""Small models as other people write them, for tests of exporting. A comment marks a line that fixes a size."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import torch
from torch import Tensor, nn

from hcmen.mamba.scan import causal_conv1d, selective_scan


def line_with(mark: str) -> str:
    """`foreign_models.py:NUMBER` of the line that ends with the comment `mark`."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    (number,) = (i for i, line in enumerate(lines, 1) if line.endswith(f"# {mark}"))
    return f"foreign_models.py:{number} "


class Mixer(nn.Module):
    """A Mamba-1 mixer, channels last."""

    def __init__(self, channel: int = 8, state: int = 4, gated: bool = True):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.sizes, self.gated = [channel, state, state, channel], gated
        self.weight = nn.Parameter(torch.randn(channel, 4, generator=generator) / 2)
        self.bias = nn.Parameter(torch.zeros(channel))
        self.project = nn.Parameter(torch.randn(channel, sum(self.sizes), generator=generator) / 4)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, state + 1)).repeat(channel, 1))
        self.D = nn.Parameter(torch.ones(channel))

    def forward(self, x: Tensor) -> Tensor:
        u = causal_conv1d(x, self.weight, self.bias)
        delta, B, C, z = (u @ self.project).split(self.sizes, -1)
        flags = {"delta_softplus": True}
        return selective_scan(u, delta, -self.A_log.exp(), B, C, self.D, None, z if self.gated else None, **flags)


class Pair(nn.Module):
    """A gated and an ungated mixer, two inputs of one batch, and outputs in a dict, a cache among them."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.embed = Mixer(), Mixer(gated=False), nn.Embedding(10, 8)

    def forward(self, x: Tensor, ids: Tensor) -> dict[str, object]:
        y = self.second(self.first(x) + self.embed(ids))
        return {"series": y, "score": y.mean(1), "nothing": None, "cache": SomeCache()}


class SomeCache:
    """What no graph can give."""


Both = namedtuple("Both", ["x", "last"])


class Named(nn.Module):
    """Outputs in a named tuple; one is called as the input is."""

    def __init__(self):
        super().__init__()
        self.mixer = Mixer()

    def forward(self, x: Tensor) -> Both:
        y = self.mixer(x)
        return Both(y, y[:, -1])


class Picture(nn.Module):
    """A picture as a series of its pixels, `[batch, channel, height, width]`."""

    def __init__(self):
        super().__init__()
        self.mixer = Mixer()

    def forward(self, picture: Tensor) -> Tensor:
        batch, channel, height, width = picture.shape
        series = picture.flatten(2).transpose(1, 2)
        return self.mixer(series).transpose(1, 2).reshape(batch, channel, height, width)


class CountedPixels(Picture):
    """As U-Mamba: the number of pixels leaves the trace as a number."""

    def forward(self, picture: Tensor) -> Tensor:
        batch, channel = picture.shape[:2]
        pixels = picture.shape[2:].numel()  # counts pixels
        series = picture.reshape(batch, channel, pixels).transpose(1, 2)
        return self.mixer(series).transpose(1, 2).reshape(picture.shape)


class DividedBatch(Picture):
    """As MambaVision: the batch comes back from a division, which torch.export lets pass."""

    def forward(self, picture: Tensor) -> Tensor:
        batch, channel, height, width = picture.shape
        windows = picture.view(batch, channel, height // 2, 2, width // 2, 2)
        windows = self.mixer(windows.permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, channel))
        batch = int(windows.shape[0] / (height * width / 2 / 2))  # divides windows
        y = windows.reshape(batch, height // 2, width // 2, 2, 2, -1)
        return y.permute(0, 5, 1, 3, 2, 4).reshape(batch, channel, height, width)


class PaddedTime(nn.Module):
    """As Mamba2 of transformers: the time is filled up to whole chunks."""

    def __init__(self):
        super().__init__()
        self.mixer = Mixer()

    def forward(self, x: Tensor) -> Tensor:
        lacking = int((4 - x.shape[1] % 4) % 4)  # fills up
        filled = nn.functional.pad(x, (0, 0, 0, lacking))
        chunks = filled.reshape(x.shape[0], -1, 4, x.shape[2])
        chunks = chunks - chunks.mean(2, keepdim=True)
        return self.mixer(chunks.flatten(1, 2))[:, : filled.shape[1] - lacking]


class Plain(nn.Module):
    """No operator of ours."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


class Text(nn.Module):
    """An output that is no tensor."""

    def forward(self, x: Tensor) -> str:
        return str(x.shape)


class Noisy(nn.Module):
    """It draws random numbers in evaluation mode, too."""

    def __init__(self):
        super().__init__()
        self.mixer = Mixer()

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x) + torch.rand_like(x)


class Stumbling(nn.Module):
    """It fails on what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 5)


def number() -> int:
    """A factory of no model."""
    return 7


def raising() -> nn.Module:
    """A factory that fails."""
    raise ValueError("no such size")


THING = 3
