"""A repository with copies of mamba_ssm's call sites of its own runs and trains under the shim as loops would."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.mamba_loops import agree, conv, norm, scan, silu
from torch import Tensor

import hcmen.mamba
from hcmen.base.errors import BackendError

FILES = Path(__file__).resolve().parents[1] / "files"
BATCH, TIME, WIDTH = 2, 9, 8


@pytest.fixture
def vendored(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The package, imported within a shim that has ended."""
    monkeypatch.syspath_prepend(FILES)
    with hcmen.mamba.shim():
        import vendored_mamba

        yield vendored_mamba
    for name in [name for name in sys.modules if name.partition(".")[0] == "vendored_mamba"]:
        del sys.modules[name]


def in_loops(model: Any, x: Tensor) -> Tensor:
    """What the model means, in the precision of its parameters."""
    residual = None
    for mixer, layer in zip(model.mixers, model.norms, strict=False):
        residual = x if residual is None else x + residual
        inner = norm(residual, layer.weight, None, layer.eps, True) @ mixer.in_proj.weight.T
        half = inner.shape[-1] // 2
        u, z = inner[..., :half].transpose(1, 2), inner[..., half:].transpose(1, 2)
        u = conv(u, mixer.conv1d.weight[:, 0], mixer.conv1d.bias, activated=True)[0]
        low = torch.einsum("bct,rc->brt", u, mixer.x_proj.weight)
        rank, state = mixer.rank, mixer.state
        delta = torch.einsum("brt,cr->bct", low[:, :rank], mixer.dt_proj.weight)
        B, C = low[:, rank : rank + state], low[:, rank + state :]
        y = scan(u, delta, -torch.exp(mixer.A_log), B, C, mixer.D, z, mixer.dt_proj.bias, True)[1]
        x = y.transpose(1, 2) @ mixer.out_proj.weight.T
    last = model.norms[-1]
    x = norm(x + residual, last.weight, None, last.eps, True)
    cross, found = model.cross, 0
    for k in range(2):
        rows = slice(k * WIDTH, (k + 1) * WIDTH)
        series = x.flip(1) if k else x
        delta = x @ cross.delta.weight[rows].T + cross.delta.bias[rows]
        parts = (x @ cross.projections.weight.T + cross.projections.bias).reshape(BATCH, TIME, 2, 2, cross.state)
        y = scan(
            series.transpose(1, 2),
            delta.transpose(1, 2),
            -torch.exp(cross.A_log[rows]),
            *(parts[:, :, i, k].transpose(1, 2) for i in range(2)),
            cross.D[rows],
            None,
            cross.bias[rows],
            True,
        )[1].transpose(1, 2)
        found = found + (y.flip(1) if k else y)
    return silu(found).mean(1) @ model.head.weight.T + model.head.bias


@pytest.mark.parametrize("fused", [True, False])
def test_outputs_and_gradients_are_those_of_loops(vendored: Any, fused: bool) -> None:
    torch.manual_seed(0)
    model = vendored.Classifier()
    for mixer in model.mixers:
        mixer.fused = fused
    wide = copy.deepcopy(model).double()
    x = torch.randn(BATCH, TIME, WIDTH, requires_grad=True)
    wide_x = x.detach().double().requires_grad_()
    found, wanted = model(x), in_loops(wide, wide_x)
    agree([found], [wanted], within=1e-5)
    grads = torch.autograd.grad(found.square().sum(), [x, *model.parameters()])
    agree(grads, torch.autograd.grad(wanted.square().sum(), [wide_x, *wide.parameters()]), within=2e-5)


def test_it_trains_and_goes_on_after_the_shim_has_ended(vendored: Any) -> None:
    torch.manual_seed(0)
    model = vendored.Classifier(layers=1)
    x, target = torch.randn(BATCH, TIME, WIDTH), torch.tensor([0, 2])
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(model(x), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_steps_agree_with_the_sequence(vendored: Any) -> None:
    torch.manual_seed(0)
    mixer = vendored.model.Mixer(WIDTH)
    x = torch.randn(BATCH, TIME, WIDTH)
    states = torch.zeros(BATCH, 2 * WIDTH, 4), torch.zeros(BATCH, 2 * WIDTH, mixer.state)
    with torch.no_grad():
        stepped = torch.stack([mixer.step(x[:, t], *states) for t in range(TIME)], dim=1)
        fused = mixer(x)
        mixer.fused = False
        mixer(x)
    agree([stepped, states[1]], [fused, mixer.last], within=1e-5)


def test_what_it_imported_it_keeps_when_the_shim_ends(vendored: Any) -> None:
    model = vendored.Classifier(layers=1)
    x = torch.randn(BATCH, TIME, WIDTH)
    before = model(x)
    shim = hcmen.mamba.shim()
    shim.__exit__(None, None, None)
    try:
        torch.testing.assert_close(model(x), before)
        assert "triton" not in sys.modules
    finally:
        shim.__enter__()


def test_a_kernel_without_a_stand_in_says_which_it_is(vendored: Any) -> None:
    with pytest.raises(BackendError) as error:
        vendored.model.RMSNorm.forward.__globals__["scaled"](torch.zeros(4))
    line = str(error.value)
    assert "_norm_kernel of " in line
    assert "vendored_mamba" in line
    assert "norms.py was launched" in line
    assert "\n" not in line


def test_it_exports_as_nodes_of_ours(vendored: Any) -> None:
    torch.manual_seed(0)
    model = vendored.Classifier(layers=1).eval()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("time")}
    x = torch.randn(BATCH, TIME, WIDTH)
    program = torch.export.export(model, (x,), dynamic_shapes=(sizes,))
    program.graph_module.graph.eliminate_dead_code()
    named = [str(node.target) for node in program.graph_module.graph.nodes if "hcmen" in str(node.target)]
    assert sorted(named) == ["hcmen.causal_conv1d.default"] + 2 * ["hcmen.selective_scan.default"]
    other = torch.randn(BATCH + 1, TIME + 2, WIDTH)
    agree([program.module()(other)], [model(other)])
