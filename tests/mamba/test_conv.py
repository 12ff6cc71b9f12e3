"""The causal convolution: native kernels against torch's own convolution in float64, and the reference likewise."""

from __future__ import annotations

import itertools
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


@pytest.mark.parametrize("width", [2, 3, 4, 5, 7])
@pytest.mark.parametrize("time", [1, 2, 3, 5, 20])
def test_gradients_through_states(time: int, width: int) -> None:
    """Of every argument, from the output and from the last state, together and apart."""
    size = (2, time, 19)
    generator = torch.Generator().manual_seed(2)
    data = conv_data(*size, width)
    state_size = (2, width - 1, 19)
    data["initial_state"] = torch.randn(state_size, generator=generator)
    of_y, of_last = torch.randn(size, generator=generator), torch.randn(state_size, generator=generator)
    for activation, reverse, (with_y, with_last) in itertools.product(
        ("silu", "none"), (False, True), ((1, 1), (1, 0), (0, 1))
    ):
        found = []
        for convert, name in ((torch.Tensor.double, "ref"), (torch.Tensor.clone, "native")):
            leaves = {key: convert(x).requires_grad_() for key, x in data.items()}
            with implementation(name):
                y, last = causal_conv1d(**leaves, activation=activation, reverse=reverse, return_last_state=True)
            loss = (y * of_y).sum() * with_y + (last * of_last).sum() * with_last
            found.append([y, last, *torch.autograd.grad(loss, list(leaves.values()))])
        for want, got in zip(*found, strict=True):
            assert got.dtype == torch.float32
            assert largest_error(got, want) <= 3e-6


def in_pieces(data: dict[str, Tensor], cuts: list[int], **flags: Any) -> list[Tensor]:
    """The output and the last state of pieces that begin at `cuts`, in the order they are scanned."""
    x, state, found = data["x"], data.get("initial_state"), []
    x = x.flip(1) if flags["reverse"] else x
    for start, end in itertools.pairwise([0, *cuts, x.shape[1]]):
        piece = x[:, start:end].flip(1) if flags["reverse"] else x[:, start:end]
        given = {**data, "x": piece, "initial_state": state}
        y, state = causal_conv1d(**given, **flags, return_last_state=True)
        found.append(y.flip(1) if flags["reverse"] else y)
    whole = torch.cat(found, 1)
    return [whole.flip(1) if flags["reverse"] else whole, state]


@pytest.mark.parametrize("width", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_series_in_pieces_is_the_whole(dtype: torch.dtype, width: int) -> None:
    """Bit for bit, wherever it is cut, from a state and from none, with zeros of both signs among the inputs."""
    generator = torch.Generator().manual_seed(3)
    for batch, time, channel in ((1, 1, 1), (3, 2, 15), (1, 7, 16), (2, 11, 33), (1, 19, 131), (3, 67, 17)):
        data = conv_data(batch, time, channel, width)
        data["x"] = torch.where(torch.rand(batch, time, channel, generator=generator) < 0.3, -0.0, data["x"]).to(dtype)
        data["bias"][::2] = -0.0
        with_state = {**data, "initial_state": torch.randn(batch, width - 1, channel, generator=generator)}
        every = [list(range(1, time)), *([cut] for cut in range(1, time))]
        drawn = [sorted(torch.randperm(time - 1, generator=generator)[:5].add(1).tolist()) for _ in range(3)]
        for activation, reverse in itertools.product(("silu", "none"), (False, True)):
            flags: Any = {"activation": activation, "reverse": reverse}
            with implementation("native"):
                for given in (data, with_state):
                    whole = causal_conv1d(**given, **flags, return_last_state=True)
                    assert torch.equal(whole[0], causal_conv1d(**given, **flags))
                    for cuts in (every if time < 20 else every[::9]) + drawn:
                        for a, b in zip(in_pieces(given, cuts, **flags), whole, strict=True):
                            assert torch.equal(bits(a), bits(b)), (batch, time, channel, flags, cuts)


def bits(x: Tensor) -> Tensor:
    """Zeros of two signs are two things."""
    return x.view(torch.int16 if x.dtype == torch.float16 else torch.int32)


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
    data = conv_data(3, 300, 130, 4) | {"initial_state": torch.ones(3, 3, 130)}
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            leaves = {name: x.clone().requires_grad_() for name, x in data.items()}
            with implementation("native"):
                y, last = causal_conv1d(**leaves, return_last_state=True)
            loss = y.square().sum() + last.square().sum()
            results.append([y, last, *torch.autograd.grad(loss, list(leaves.values()))])
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
        if channel == 64:
            with implementation("native"):
                assert torch.equal(wholes[0], in_pieces(data, [1, 3, 30_000, 66_000], **flags)[0])
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
    tests += " or in_pieces or through_states"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", tests, str(Path(__file__))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout


def test_opcheck() -> None:
    data = conv_data(2, 9, 6, 4)
    arguments = [x.requires_grad_() for x in data.values()]
    torch.library.opcheck(torch.ops.hcmen.causal_conv1d.default, (*arguments, None, True, False))
    state = torch.randn(2, 3, 6, requires_grad=True)
    torch.library.opcheck(torch.ops.hcmen.causal_conv1d.default, (*arguments, state, False, True))


def test_not_contiguous_arguments() -> None:
    data = conv_data(2, 21, 18, 4) | {"initial_state": torch.randn(2, 3, 18)}
    strided = {name: torch.stack([x, x], -1)[..., 0] for name, x in data.items()}
    with implementation("native"):
        assert torch.equal(causal_conv1d(**strided), causal_conv1d(**data))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *(("x", (2, 9)), ("weight", (5, 4)), ("weight", (6, 1, 4)), ("bias", (5,)), ("bias", (6, 1))),
        *(("initial_state", shape) for shape in ((2, 4, 6), (2, 6, 3), (1, 3, 6), (2, 3))),
    ],
)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...]) -> None:
    data = conv_data(2, 9, 6, 4)
    data[name] = torch.zeros(shape)
    with pytest.raises(InputError, match=f"{name} has shape"):
        causal_conv1d(**data)


def test_unknown_activation() -> None:
    with pytest.raises(InputError, match="activation is 'relu'"):
        causal_conv1d(**conv_data(1, 2, 3, 4), activation="relu")
