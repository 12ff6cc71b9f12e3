"""Packages of the index whose kernels are mamba_ssm's: under the shim they give what plain loops give."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.mamba_loops import agree, scan
from torch import Tensor

import hcmen.mamba
from hcmen.mamba.stand_ins import triton


class Nothing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """torchvision with every name and no content: its wheel of the index does not load beside PyTorch for the CPU."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return triton.module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """It is whole."""


def in_loops(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **named: Any) -> Tensor:
    """selective_scan_fn, step by step."""
    bias, softplus = named.get("delta_bias"), bool(named.get("delta_softplus"))
    y, gated, _ = scan(u, delta, A, B, C, D, named.get("z"), bias, softplus)
    return y if named.get("z") is None else gated


def brought(*names: str) -> None:
    for name in names:
        pytest.importorskip(name, reason=f"{name} is not installed: `make test-all` brings it")


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Modules of these tests are gone after them."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("mambapy", "mambavision", "timm", "torchvision"):
            del sys.modules[name]


def test_mambavision(forgotten: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    brought("einops")
    for name in ("mambavision", "timm"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: `make test-all` brings it")
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Nothing()])
    with hcmen.mamba.shim():
        vision = importlib.import_module("mambavision.models.mamba_vision")
        torch.manual_seed(0)
        model = vision.MambaVision(
            dim=8,
            in_dim=8,
            depths=[1, 1, 2, 2],
            window_size=[8, 8, 4, 2],
            mlp_ratio=2,
            num_heads=[2, 2, 2, 2],
            num_classes=5,
            drop_path_rate=0.0,
            resolution=64,
        ).eval()
        x = torch.randn(2, 3, 64, 64)
        parameters = list(model.parameters())
        found = model(x)
        grads = torch.autograd.grad(found.square().sum(), parameters)
        monkeypatch.setattr(vision, "selective_scan_fn", in_loops)
        wanted = model(x)
        agree([found], [wanted], within=1e-5)
        agree(grads, torch.autograd.grad(wanted.square().sum(), parameters), within=5e-5)


def test_mambapy(forgotten: Any) -> None:
    brought("mambapy")
    with hcmen.mamba.shim():
        package = importlib.import_module("mambapy.mamba")
        torch.manual_seed(0)
        model = package.Mamba(package.MambaConfig(d_model=16, n_layers=2, use_cuda=True))
        x = torch.randn(2, 7, 16)
        parameters = list(model.parameters())
        found = model(x)
        grads = torch.autograd.grad(found.square().sum(), parameters)
        for layer in model.modules():
            if hasattr(layer, "config"):
                layer.config.use_cuda = False
        wanted = model(x)
    agree([found], [wanted], within=1e-5)
    agree(grads, torch.autograd.grad(wanted.square().sum(), parameters), within=5e-5)
