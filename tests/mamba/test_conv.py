"""The causal convolution: native kernels against torch's own convolution in float64, and the reference likewise."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hcmen.base.errors import InputError
from hcmen.mamba.scan import causal_conv1d, causal_conv1d_ref, implementation

SIZES = [(1, 1, 1), (3, 2, 15), (1, 7, 16), (2, 50, 17), (1, 40, 131), (2, 500, 64)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are tiny, and threads only slow torch down; the test of threads sets its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def conv_data(batch: int, time: int, channel: int, width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(batch, time, channel, generator=generator),
        "weight": torch.randn(channel, width, generator=generator),
        "bias": torch.randn(channel, generator=generator),
    }


def by_torch(x: Tensor, weight: Tensor, bias: Tensor, *, activation: str, reverse: bool) -> Tensor:
    """torch.nn.functional.conv1d on a series padded on both sides, in float64; `reverse` flips twice."""
    x, weight, bias = x.double(), weight.double(), bias.double()
    if reverse:
        x = x.flip(1)
    width = weight.shape[1]
    y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=width - 1, groups=x.shape[2])
    y = y[:, :, : x.shape[1]].transpose(1, 2)
    if activation == "silu":
        y = y * torch.sigmoid(y)
    return y.flip(1) if reverse else y


def largest_error(got: Tensor, want: Tensor) -> float:
    return float((got - want).detach().abs().max()) / max(1.0, float(want.detach().abs().max()))


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "-".join(map(str, size)))
def test_forward_and_gradients(size: tuple[int, int, int], width: int) -> None:
    data = conv_data(*size, width)
    weights = torch.randn(size, generator=torch.Generator().manual_seed(1))
    for activation in ("silu", "none"):
        for reverse in (False, True):
            exact = {name: x.double().requires_grad_() for name, x in data.items()}
            want = by_torch(**exact, activation=activation, reverse=reverse)
            want_grads = torch.autograd.grad((want * weights).sum(), list(exact.values()))
            for name, bound in (("native", 1e-6), ("ref", 1e-6)):
                leaves = {key: x.clone().requires_grad_() for key, x in data.items()}
                with implementation(name):
                    y = causal_conv1d(**leaves, activation=activation, reverse=reverse)
                assert y.dtype == torch.float32
                assert largest_error(y, want) <= bound
                grads = torch.autograd.grad((y * weights).sum(), list(leaves.values()))
                for got, expected in zip(grads, want_grads, strict=True):
                    assert largest_error(got, expected) <= 3 * bound


def test_reference_in_float64_is_torchs_convolution() -> None:
    data = {name: x.double() for name, x in conv_data(2, 30, 5, 4).items()}
    for activation in ("silu", "none"):
        for reverse in (False, True):
            flags = {"activation": activation, "reverse": reverse}
            torch.testing.assert_close(
                causal_conv1d_ref(**data, **flags), by_torch(**data, **flags), rtol=0, atol=1e-12
            )


@pytest.mark.parametrize("width", [2, 3, 4, 7])
@pytest.mark.parametrize("reverse", [False, True])
def test_half_precision(width: int, reverse: bool) -> None:
    data = conv_data(2, 33, 21, width)
    data["x"] = data["x"].half().requires_grad_()
    want = by_torch(**data, activation="silu", reverse=reverse)
    with implementation("native"):
        y = causal_conv1d(**data, reverse=reverse)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.double(), want, rtol=1e-3, atol=1e-4)
    (got,) = torch.autograd.grad(y.float().sum(), [data["x"]], retain_graph=True)
    (expected,) = torch.autograd.grad(want.sum(), [data["x"]])
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.double(), expected.double(), rtol=2e-3, atol=2e-3)


def test_a_step_sees_its_past_alone() -> None:
    data = conv_data(1, 20, 18, 4)
    changed = {**data, "x": data["x"].clone()}
    changed["x"][:, 12] += 1.0
    with implementation("native"):
        for reverse in (False, True):
            same = causal_conv1d(**data, reverse=reverse) == causal_conv1d(**changed, reverse=reverse)
            touched = slice(9, 13) if reverse else slice(12, 16)
            assert not bool(same[:, touched].any(dim=2).all())
            same[:, touched] = True
            assert bool(same.all())


def test_results_do_not_depend_on_the_thread_count() -> None:
    data = conv_data(3, 300, 130, 4)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            leaves = {name: x.clone().requires_grad_() for name, x in data.items()}
            with implementation("native"):
                y = causal_conv1d(**leaves)
            results.append([y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("reverse", [False, True])
def test_what_no_cache_holds(width: int, reverse: bool) -> None:
    """An output that is written past the caches (2 x 16 MiB), of whole vectors and not, on one thread and two.

    Its parts are 0.5 MiB, which every cache holds.
    """
    time, step = 66_001, 2_000
    for channel in (64, 72, 65):
        data = conv_data(1, time, channel, width)
        flags: Any = {"activation": "silu", "reverse": reverse}
        wholes, x, parts = [], data["x"], []
        with implementation("native"):
            for threads in (1, 2):
                torch.set_num_threads(threads)
                wholes.append(causal_conv1d(**data, **flags))
            for start in range(0, time, step):  # each with the steps that its filter reaches back to
                low = max(0, start - (0 if reverse else width - 1))
                high = min(time, start + step + (width - 1 if reverse else 0))
                y = causal_conv1d(**{**data, "x": x[:, low:high].contiguous()}, **flags)
                parts.append(y[:, start - low :][:, : min(step, time - start)])
        assert torch.equal(wholes[0], wholes[1])
        assert torch.equal(wholes[0], torch.cat(parts, dim=1))
        assert largest_error(wholes[0], by_torch(**data, **flags)) <= 1e-6


@pytest.mark.parametrize("isa", ["avx2", "baseline", "neon"])
def test_other_instruction_sets(isa: str) -> None:
    environment = {**os.environ, "HCMEN_ISA": isa}
    probe = "from hcmen.base.library import library_isa; print(library_isa())"
    found = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True)
    if found.returncode != 0:
        assert "cannot run" in found.stderr or "expected one of" in found.stderr
        pytest.skip(f"{isa} is not of this processor; `make arm` emulates one with neon")
    tests = "(forward_and and not 3-2-15 and not 2-500-64) or half_precision or past_alone or no_cache_holds"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", tests, str(Path(__file__))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout


def test_opcheck() -> None:
    data = conv_data(2, 9, 6, 4)
    arguments = [x.requires_grad_() for x in data.values()]
    torch.library.opcheck(torch.ops.hcmen.causal_conv1d.default, (*arguments, True, False))
    torch.library.opcheck(torch.ops.hcmen.causal_conv1d.default, (*arguments, False, True))


def test_not_contiguous_arguments() -> None:
    data = conv_data(2, 21, 18, 4)
    strided = {name: torch.stack([x, x], -1)[..., 0] for name, x in data.items()}
    with implementation("native"):
        assert torch.equal(causal_conv1d(**strided), causal_conv1d(**data))


@pytest.mark.parametrize(
    ("name", "shape"), [("x", (2, 9)), ("weight", (5, 4)), ("weight", (6, 1, 4)), ("bias", (5,)), ("bias", (6, 1))]
)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...]) -> None:
    data = conv_data(2, 9, 6, 4)
    data[name] = torch.zeros(shape)
    with pytest.raises(InputError, match=f"{name} has shape"):
        causal_conv1d(**data)


def test_unknown_activation() -> None:
    with pytest.raises(InputError, match="activation is 'relu'"):
        causal_conv1d(**conv_data(1, 2, 3, 4), activation="relu")
