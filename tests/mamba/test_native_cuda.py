"""hcmen/mamba/native_cuda.py over kernels emulated on the host: CPU tensors stand for CUDA tensors, everything else is
as it would be, and the choice between implementations is looked at with the library there and not.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import emulated
from helpers.dual_cases import DualCase, dual_arrays, grouped
from torch import Tensor

from hcmen.base import cuda_library
from hcmen.base.errors import BackendError, InputError
from hcmen.base.op import STATE_SPACE_DUAL
from hcmen.mamba import native, native_cuda, scan
from hcmen.mamba.scan import causal_conv1d_ref, selective_scan_ref, state_space_dual_ref


@pytest.fixture(scope="module")
def library() -> Any:
    if emulated.compiler() is None:
        pytest.skip("there is no C++ compiler")
    return emulated.kernels_library()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread for the oracles, nothing remembered of the library."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    native_cuda.works.cache_clear()
    yield
    native_cuda.works.cache_clear()
    torch.set_num_threads(before)


class Scan(torch.autograd.Function):
    """The custom op's own autograd, over the functions that are registered for CUDA."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        native._scan_setup(ctx, inputs, None)
        return native_cuda._scan_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        grads = native_cuda._scan_backward(dy, dlast, *tensors, *ctx.switches)
        return (*(None if x is None else g for g, x in zip(grads, tensors, strict=True)), None, None)


class Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        native._conv_setup(ctx, inputs, None)
        return native_cuda._conv_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dlast: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        grads = native_cuda._conv_backward(dy, dlast, *tensors, *ctx.switches)
        return (*(None if x is None else g for g, x in zip(grads, tensors, strict=True)), None, None)


class Dual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        native._dual_setup(ctx, inputs, None)
        return native_cuda._dual_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        grads = native_cuda._dual_backward(dy, dlast, *tensors, *ctx.switches)
        return (*(None if x is None else g for g, x in zip(grads, tensors, strict=True)), *(None for _ in ctx.switches))


def scan_inputs(dtype: torch.dtype, gated: bool, stateful: bool) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    u, delta, z = normal(2, 11, 6), normal(2, 11, 6) - 4, normal(2, 11, 6)
    A, D, bias, initial = -torch.arange(1.0, 6.0).repeat(6, 1), normal(6), 0.1 * normal(6), normal(2, 6, 5)
    B, C = normal(2, 11, 3, 5), normal(2, 11, 3, 5)
    u, delta, z, B, C = (x.to(dtype) for x in (u, delta, z, B, C))
    return [u, delta, A, B, C, D, bias, z if gated else None, initial if stateful else None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("gated", "stateful", "reverse"), [(True, True, False), (False, False, True)])
def test_scan_and_its_gradients(library, monkeypatch, dtype, gated, stateful, reverse):
    monkeypatch.setattr(native_cuda, "load_cuda_library", lambda: library)
    inputs = [None if x is None else x.requires_grad_() for x in scan_inputs(dtype, gated, stateful)]
    exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    y, last = Scan.apply(*inputs, True, reverse)
    want_y, want_last = selective_scan_ref(*exact, delta_softplus=True, reverse=reverse, return_last_state=True)
    half = dtype == torch.float16
    torch.testing.assert_close(y.double(), want_y, rtol=1e-3 if half else 1e-5, atol=1e-4 if half else 1e-5)
    torch.testing.assert_close(last.double(), want_last, rtol=1e-5, atol=1e-5)
    (y.float().square().sum() + last.square().sum()).backward()
    (want_y.square().sum() + want_last.square().sum()).backward()
    for x, e in zip(inputs, exact, strict=True):
        if x is None:
            continue
        assert x.grad.dtype == x.dtype
        bound = (5e-3 if half else 1e-5) * float(e.grad.abs().max())
        torch.testing.assert_close(x.grad.double(), e.grad, rtol=0, atol=bound)


def test_scan_of_views(library, monkeypatch):
    """Inputs that are not dense are made so."""
    monkeypatch.setattr(native_cuda, "load_cuda_library", lambda: library)
    inputs = scan_inputs(torch.float32, True, False)
    views = [x if x is None else torch.stack([x, x], -1)[..., 0] for x in inputs]
    want = native_cuda._scan_forward(*inputs, True, False)
    for got, expected in zip(native_cuda._scan_forward(*views, True, False), want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("width", "silu", "reverse"), [(4, True, False), (3, False, True), (6, True, True), (1, 1, 0)])
@pytest.mark.parametrize("stateful", [False, True])
def test_convolution_and_its_gradients(library, monkeypatch, dtype, width, silu, reverse, stateful):
    monkeypatch.setattr(native_cuda, "load_cuda_library", lambda: library)
    torch.manual_seed(0)
    inputs = [torch.randn(2, 13, 6).to(dtype), torch.randn(6, width), torch.randn(6), None]
    if stateful and width > 1:
        inputs[3] = torch.randn(2, width - 1, 6)
    exact = [None if x is None else x.double().requires_grad_() for x in inputs]
    inputs = [None if x is None else x.requires_grad_() for x in inputs]
    y, last = Conv.apply(*inputs, silu, reverse)
    flags = {"activation": "silu" if silu else "none", "reverse": reverse, "return_last_state": True}
    want, want_last = causal_conv1d_ref(*exact, **flags)
    half = dtype == torch.float16
    torch.testing.assert_close(y.double(), want, rtol=1e-3 if half else 1e-5, atol=1e-4 if half else 1e-5)
    torch.testing.assert_close(last.double(), want_last, rtol=0, atol=0)
    (y.float().square().sum() + last.square().sum()).backward()
    (want.square().sum() + want_last.square().sum()).backward()
    for x, e in zip(inputs, exact, strict=True):
        if x is None:
            continue
        bound = (5e-3 if half else 1e-5) * float(e.grad.abs().max())
        torch.testing.assert_close(x.grad.double(), e.grad, rtol=0, atol=bound)


DUALS = [
    DualCase(2, 11, 6, 3, 5, 3, "float32", wide=True, dt_max=0.05),
    DualCase(1, 9, 2, 5, 17, 1, "float16", gated=False, stateful=False, reverse=True),
]


@pytest.mark.parametrize("case", DUALS, ids=str)
def test_dual_and_its_gradients(library, monkeypatch, case):
    monkeypatch.setattr(native_cuda, "load_cuda_library", lambda: library)
    arrays = {name: torch.from_numpy(x) for name, x in grouped(dual_arrays(case)).items()}
    names = [tensor.name for tensor in STATE_SPACE_DUAL.inputs]
    inputs = {n: arrays[n].requires_grad_() if n in arrays else None for n in names}
    exact = {n: x.detach().double().requires_grad_() for n, x in arrays.items()}
    y, last = Dual.apply(*inputs.values(), *(case.flags[n] for n in STATE_SPACE_DUAL.switches))
    want_y, want_last = state_space_dual_ref(**exact, **case.flags, return_last_state=True)
    half = case.dtype == "float16"
    torch.testing.assert_close(y.double(), want_y, rtol=1e-3 if half else 1e-5, atol=1e-4 if half else 1e-5)
    torch.testing.assert_close(last.double(), want_last, rtol=1e-5, atol=1e-5)
    (y.float().square().sum() + last.square().sum()).backward()
    (want_y.square().sum() + want_last.square().sum()).backward()
    for name, e in exact.items():
        x = inputs[name]
        assert x.grad.dtype == x.dtype
        bound = (5e-3 if half else 1e-5) * float(e.grad.abs().max())
        torch.testing.assert_close(x.grad.double(), e.grad, rtol=0, atol=bound)


def test_the_ops_have_kernels_for_cuda_tensors():
    for name in ("selective_scan", "causal_conv1d", "state_space_dual"):
        for op in (name, f"{name}_backward"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"hcmen::{op}", "CUDA")


def test_tensors_of_two_devices_are_refused(library, monkeypatch):
    monkeypatch.setattr(native_cuda, "load_cuda_library", lambda: library)
    inputs = scan_inputs(torch.float32, True, False)
    inputs[3] = inputs[3].to("meta")
    with pytest.raises(InputError, match="B is on meta, expected cpu, the device of u"):
        native_cuda._scan_forward(*inputs, True, False)


def short_of_memory(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """An allocator that gives at most `most` bytes; the list gets the sizes of workspaces that were asked for."""
    asked: list[int] = []
    empty = torch.empty

    def limited(*size: Any, **options: Any) -> Tensor:
        if options.get("dtype") == torch.uint8:
            asked.append(size[0])
            if size[0] > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\na lot")
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", limited)
    return asked


def test_memory_that_runs_out_in_a_workspace(library, monkeypatch):
    """Backward takes fewer sequences at once, to the same bits, and gives up when one is too many; forward at once."""
    monkeypatch.setattr(native_cuda, "load_cuda_library", lambda: library)
    torch.manual_seed(0)
    batch, time, channel, state = 7, 40, 33, 16
    u, delta, z = (torch.randn(batch, time, channel) for _ in range(3))
    B, C = (torch.randn(batch, time, 1, state) for _ in range(2))
    A, D, bias = -torch.rand(channel, state), torch.randn(channel), torch.randn(channel)
    inputs = (u, delta, A, B, C, D, bias, z, None, True, False)
    dy, dlast = torch.randn(batch, time, channel), torch.randn(batch, channel, state)
    want = native_cuda._scan_backward(dy, dlast, *inputs)
    with monkeypatch.context() as patch:
        whole = short_of_memory(patch, 2**40)
        native_cuda._scan_backward(dy, dlast, *inputs)
    with monkeypatch.context() as patch:
        asked = short_of_memory(patch, whole[0] // 2)
        got = native_cuda._scan_backward(dy, dlast, *inputs)
    assert asked[0] == whole[0]
    assert len(asked) == 3  # for 7, 4 and 2
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
    with monkeypatch.context() as patch:
        asked = short_of_memory(patch, 1000)
        with pytest.raises(BackendError) as told:
            native_cuda._scan_backward(dy, dlast, *inputs)
    assert len(asked) == 4  # for 7, 4, 2 and 1
    assert str(told.value) == (
        "hcmen_cuda_selective_scan_backward: cpu has no room for a workspace of 1 MiB: take fewer sequences at once, "
        "or end what else uses the device"
    )
    long = (*(torch.randn(1, 700, channel) for _ in range(2)), A, *(torch.randn(1, 700, 1, state) for _ in range(2)))
    with monkeypatch.context() as patch:
        short_of_memory(patch, 1000)
        with pytest.raises(
            BackendError, match="hcmen_cuda_selective_scan_forward: cpu has no room for a workspace of 1 MiB"
        ):
            native_cuda._scan_forward(*long, D, bias, None, None, True, False)


class OnCuda:
    """As much of a CUDA tensor as the choice looks at."""

    device = torch.device("cuda", 0)
    dtype = torch.float32


def choose(x: Any) -> str:
    """What the scan of `x` runs on where mamba_ssm does not take it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*runs on CUDA by plain PyTorch operations")
        return scan._choice("scan", x, lambda: "mamba_ssm is left out here")


def test_the_choice_for_cuda_tensors(monkeypatch, tmp_path):
    x: Any = OnCuda()
    monkeypatch.delenv("HCMEN_CUDA_LIBRARY", raising=False)
    monkeypatch.setattr(cuda_library, "LIBRARY_NAME", "libnone.so")
    cuda_library.load_cuda_library.cache_clear()
    # Not built: the reference; on demand, how to build it.
    assert choose(x) == "ref"
    with (
        scan.implementation("native"),
        pytest.raises(BackendError, match=r"libnone.so was not found in .*HCMEN_CUDA=ON"),
    ):
        choose(x)
    # Asked for and not there: said once.
    monkeypatch.setenv("HCMEN_CUDA_LIBRARY", str(tmp_path / "none.so"))
    native_cuda.works.cache_clear()
    with pytest.warns(
        UserWarning, match=r"the CUDA scan is unavailable: HCMEN_CUDA_LIBRARY is '.*none.so', expected a"
    ):
        assert choose(x) == "ref"
    assert choose(x) == "ref"
    # There and broken: said once.
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setenv("HCMEN_CUDA_LIBRARY", str(broken))
    native_cuda.works.cache_clear()
    with pytest.warns(UserWarning, match=r"the CUDA scan is unavailable: .*broken.so cannot be loaded"):
        assert choose(x) == "ref"
    assert choose(x) == "ref"
    # There: used, but not for what the kernels do not take; mamba_ssm comes before it.
    monkeypatch.setattr(native_cuda, "load_cuda_library", object)
    native_cuda.works.cache_clear()
    assert choose(x) == "native"
    monkeypatch.setattr(scan, "mamba_function", lambda operation: (print, None))
    assert scan._choice("scan", x, lambda: None) == "mamba_ssm"
    with scan.implementation("ref"):
        assert choose(x) == "ref"
    x.dtype = torch.float64
    assert choose(x) == "ref"
    cuda_library.load_cuda_library.cache_clear()
