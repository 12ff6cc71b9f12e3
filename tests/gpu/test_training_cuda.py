"""Training on a GPU follows training on the CPU; mamba_ssm's real kernels follow the reference."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from helpers.device import NEEDS_GPU
from helpers.micro import MICRO

from hcmen.data.mmsa import dataset_from_mmsa
from hcmen.data.synthetic import make_synthetic
from hcmen.mamba.scan import causal_conv1d, causal_conv1d_ref, implementation, selective_scan, selective_scan_ref
from hcmen.training.config import TrainConfig
from hcmen.training.device import choose_device
from hcmen.training.evaluate import predict_variants
from hcmen.training.ranks import Ranks
from hcmen.training.trainer import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NEEDS_GPU)]

SAMPLES = (24, 12, 16)
TRAIN = TrainConfig(epochs=2, batch_size=10, learning_rate=1e-3, mix="manifold", aux="polarity")
STILL = dataclasses.replace(MICRO, dropout=0.0)
needs_mamba = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("mamba_ssm", "causal_conv1d")),
    reason="needs mamba_ssm, of pip install 'hcmen[cuda]'",
)


@pytest.fixture(scope="module")
def dataset():
    return dataset_from_mmsa(make_synthetic(MICRO.inputs, SAMPLES), "synthetic", MICRO.inputs)


def trained(folder: Path, dataset, device: str, config: TrainConfig = TRAIN) -> Trainer:
    folder.mkdir()
    trainer = Trainer(STILL, config, dataset, folder, ranks=Ranks(choose_device(device)))
    trainer.run()
    return trainer


def test_the_run_of_the_cpu(tmp_path: Path, dataset) -> None:
    cpu, cuda = (trained(tmp_path / device, dataset, device) for device in ("cpu", "cuda"))
    for one, other in zip(cpu.history, cuda.history, strict=True):
        for name in ("loss", "task_loss", "alignment_loss", "mix_loss", "polarity_loss", "validation_mae"):
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-3), name
    scores = [predict_variants(t.model, dataset.splits["test"]) for t in (cpu, cuda)]
    for name in scores[0]:
        assert scores[1][name] == pytest.approx(scores[0][name], abs=1e-2)
    again = Trainer(STILL, TRAIN, dataset, tmp_path / "cuda", ranks=Ranks(choose_device("cuda")))
    again.resume()
    assert {x.device.type for s in again._optimiser.state.values() for k, x in s.items() if k != "step"} == {"cuda"}


def test_bfloat16(tmp_path: Path, dataset) -> None:
    single = trained(tmp_path / "fp32", dataset, "cuda")
    half = trained(tmp_path / "bf16", dataset, "cuda", dataclasses.replace(TRAIN, precision="bf16"))
    for one, other in zip(single.history, half.history, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=5e-2)


@needs_mamba
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("group", [None, 2])
def test_mambas_scan(group: int | None, reverse: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 37, 5) if group is None else (2, 37, group, 5)
    data = {
        **{name: torch.randn(2, 37, 6, generator=generator) for name in ("u", "delta", "z")},
        **{name: torch.randn(*shape, generator=generator) for name in ("B", "C")},
        **{name: torch.randn(6, generator=generator) for name in ("D", "delta_bias")},
        "A": -torch.rand(6, 5, generator=generator),
    }
    exact = {name: x.double().requires_grad_() for name, x in data.items()}
    cuda = {name: x.cuda().requires_grad_() for name, x in data.items()}
    want = selective_scan_ref(**exact, delta_softplus=True, reverse=reverse)
    with implementation("mamba_ssm"):
        got = selective_scan(**cuda, delta_softplus=True, reverse=reverse)
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-4, atol=1e-4)
    expected = torch.autograd.grad(want.square().sum(), list(exact.values()))
    for one, other in zip(torch.autograd.grad(got.square().sum(), list(cuda.values())), expected, strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


@needs_mamba
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("channels", [8, 5])
def test_mambas_convolution(channels: int, reverse: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(*s, generator=generator) for s in ((2, 37, channels), (channels, 4), (channels,))]
    want = causal_conv1d_ref(*(x.double() for x in data), reverse=reverse)
    with implementation("mamba_ssm"):
        got = causal_conv1d(*(x.cuda() for x in data), reverse=reverse)
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-4, atol=1e-4)
