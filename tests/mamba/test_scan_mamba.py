"""mamba_ssm's and causal_conv1d's kernels as an implementation: what they are given and what becomes of their answer.

Neither package runs without a GPU. In their place stand functions that keep to their documented contract (layout,
dtypes, optional arguments, limits), refuse anything else, and compute in float64 by a definition of their own. What is
not tested here is the kernels themselves: tests/gpu does that where there is a GPU.
"""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hcmen.base.errors import BackendError
from hcmen.mamba import scan
from hcmen.mamba.mamba_ssm import mamba_function
from hcmen.mamba.scan import causal_conv1d, causal_conv1d_ref, implementation, selective_scan, selective_scan_ref

calls: list[str] = []


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """u, delta, z [b, d, l]; A [d, n]; B, C [b, n, l] or [b, g, n, l]; D, delta_bias [d]. The state has no gradient."""
    calls.append("scan")
    b, d, l = u.shape
    n = A.shape[1]
    assert n <= 256
    assert u.dtype in (torch.float32, torch.float16, torch.bfloat16)
    for x in (delta, B, C, *(() if z is None else (z,))):
        assert x.dtype == u.dtype
    for x in (A, *(x for x in (D, delta_bias) if x is not None)):
        assert x.dtype == torch.float32
    for x in (u, delta, B, C, *(() if z is None else (z,))):
        assert x.stride(-1) == 1 or x.shape[-1] == 1
    assert delta.shape == u.shape
    assert A.shape == (d, n)
    assert B.shape == C.shape
    assert B.shape in ((b, n, l), (b, B.shape[1], n, l))
    wide = {k: v.double() for k, v in {"u": u, "delta": delta, "A": A, "B": B, "C": C}.items()}
    step = wide["delta"] if delta_bias is None else wide["delta"] + delta_bias.double()[None, :, None]
    if delta_softplus:
        step = torch.where(step > 20, step, torch.log1p(torch.exp(step.clamp(max=20))))
    if B.dim() == 4:
        repeats = d // B.shape[1]
        wide["B"], wide["C"] = (wide[k].repeat_interleave(repeats, dim=1) for k in ("B", "C"))
    else:
        wide["B"], wide["C"] = (wide[k][:, None].expand(b, d, n, l) for k in ("B", "C"))
    # Unrolled: the state at t is the sum over s <= t of exp(A (S_t - S_s)) delta_s B_s u_s, with S the summed steps.
    total = step.cumsum(dim=2)
    gap = total[:, :, :, None] - total[:, :, None, :]
    causal = torch.ones(l, l, dtype=torch.bool).tril()
    decay = torch.exp(torch.where(causal, gap, 0.0)[..., None] * wide["A"][None, :, None, None, :]) * causal[..., None]
    driven = (step * wide["u"])[:, :, None] * wide["B"]
    states = torch.einsum("bdtsn,bdns->bdtn", decay, driven)
    y = torch.einsum("bdtn,bdnt->bdt", states, wide["C"])
    if D is not None:
        y = y + D.double()[:, None] * wide["u"]
    if z is not None:
        y = y * z.double() * torch.sigmoid(z.double())
    y = y.to(u.dtype)
    return (y, states[:, :, -1].float().detach()) if return_last_state else y


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """x [b, d, l], weight [d, w], bias [d]."""
    calls.append("convolution")
    d, taps = weight.shape
    assert 2 <= taps <= 4
    assert x.shape[1] == d
    assert x.stride(2) == 1 or x.shape[2] == 1
    assert activation in (None, "silu", "swish")
    assert seq_idx is initial_states is final_states_out is None
    assert not return_final_states
    assert bias is None or bias.dtype == weight.dtype
    y = torch.zeros_like(x, dtype=torch.float64)
    for back in range(min(taps, x.shape[2])):
        shifted = torch.nn.functional.pad(x.double(), (back, 0))[..., : x.shape[2]]
        y = y + weight.double()[:, taps - 1 - back, None] * shifted
    if bias is not None:
        y = y + bias.double()[:, None]
    return (y if activation is None else y * torch.sigmoid(y)).to(x.dtype)


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every tensor is taken for one on CUDA, and no answer of an earlier test is remembered."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(scan, "_on_cuda", lambda x: True)
    mamba_function.cache_clear()
    scan._warn_once.cache_clear()
    calls.clear()
    yield
    mamba_function.cache_clear()
    scan._warn_once.cache_clear()
    torch.set_num_threads(before)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface", "causal_conv1d")
    modules = {name: types.ModuleType(name) for name in names}
    modules["mamba_ssm.ops.selective_scan_interface"].selective_scan_fn = selective_scan_fn  # type: ignore[attr-defined]
    modules["causal_conv1d"].causal_conv1d_fn = causal_conv1d_fn  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mamba_ssm", "causal_conv1d"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr(sys, "meta_path", [_Missing(), *sys.meta_path])


class _Missing:
    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] in ("mamba_ssm", "causal_conv1d"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def scan_data(group: int | None, dtype: torch.dtype = torch.float32, time: int = 11) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    projection = (2, time, 5) if group is None else (2, time, group, 5)
    return {
        "u": normal(2, time, 6),
        "delta": normal(2, time, 6) - 1,
        "A": -torch.rand(6, 5, generator=generator) - 0.2,
        "B": normal(*projection),
        "C": normal(*projection),
        "z": normal(2, time, 6),
        "D": normal(6, dtype=torch.float32),
        "delta_bias": normal(6, dtype=torch.float32),
    }


@pytest.mark.parametrize("backend", ["auto", "mamba_ssm"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("group", "without", "softplus", "time"),
    [
        (None, (), True, 11),
        (1, ("z",), True, 11),
        (2, ("D",), True, 11),
        (3, ("delta_bias",), False, 11),
        (None, ("z", "D", "delta_bias"), False, 1),
    ],
)
def test_scan_by_mamba_is_the_reference(
    group: int | None, without: tuple[str, ...], softplus: bool, time: int, reverse: bool, backend: str, installed: None
) -> None:
    """Values and every gradient, against our reference in float64."""
    data = {k: x.requires_grad_() for k, x in scan_data(group, time=time).items() if k not in without}
    if not softplus:
        data["delta"] = data["delta"].detach().abs().requires_grad_()
    exact = {k: x.detach().double().requires_grad_() for k, x in data.items()}
    flags = {"delta_softplus": softplus, "reverse": reverse}
    with implementation(backend):
        y = selective_scan(**data, **flags)
    assert calls == ["scan"]
    want = selective_scan_ref(**exact, **flags)
    torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=1e-6)
    weights = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    got = torch.autograd.grad((y * weights.float()).sum(), list(data.values()))
    expected = torch.autograd.grad((want * weights).sum(), list(exact.values()))
    for name, one, other in zip(data, got, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("reverse", [False, True])
def test_last_state_by_mamba(reverse: bool, installed: None) -> None:
    data = scan_data(2)
    y, last = selective_scan(**data, delta_softplus=True, reverse=reverse, return_last_state=True)
    assert calls == ["scan"]
    exact = {k: x.double() for k, x in data.items()}
    want, want_last = selective_scan_ref(**exact, delta_softplus=True, reverse=reverse, return_last_state=True)
    torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(last.double(), want_last, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_goes_to_mamba_as_it_is(dtype: torch.dtype, installed: None) -> None:
    data = scan_data(None, dtype)
    y = selective_scan(**data, delta_softplus=True)
    z = causal_conv1d(data["u"], torch.randn(6, 4), torch.randn(6))
    assert calls == ["scan", "convolution"]
    assert y.dtype == z.dtype == dtype
    torch.testing.assert_close(y, selective_scan_ref(**data, delta_softplus=True), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", ["auto", "mamba_ssm"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("taps", "activation", "time"), [(4, "silu", 9), (2, "none", 9), (3, "silu", 2), (4, "none", 1)]
)
def test_convolution_by_causal_conv1d_is_the_reference(
    taps: int, activation: str, time: int, reverse: bool, backend: str, installed: None
) -> None:
    generator = torch.Generator().manual_seed(5)
    # Half of a wider tensor, as in the model: not contiguous.
    x = torch.randn(2, time, 10, generator=generator).chunk(2, dim=-1)[0].requires_grad_()
    weight, bias = (torch.randn(*s, generator=generator).requires_grad_() for s in ((5, taps), (5,)))
    exact = [v.detach().double().requires_grad_() for v in (x, weight, bias)]
    with implementation(backend):
        y = causal_conv1d(x, weight, bias, activation=activation, reverse=reverse)
    assert calls == ["convolution"]
    want = causal_conv1d_ref(*exact, activation=activation, reverse=reverse)
    torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=1e-6)
    for one, other in zip(
        torch.autograd.grad(y.square().sum(), (x, weight, bias)),
        torch.autograd.grad(want.square().sum(), exact),
        strict=True,
    ):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def limits() -> dict[str, tuple[Any, str]]:
    data = scan_data(None)
    state = torch.zeros(2, 6, 5)
    wide = {**data, "A": -torch.rand(6, 257), "B": torch.randn(2, 11, 257), "C": torch.randn(2, 11, 257)}
    learns = {**data, "u": data["u"].clone().requires_grad_()}
    taps = (data["u"], torch.randn(6, 5), torch.randn(6))
    return {
        "state": (lambda: selective_scan(**data, initial_state=state), "mamba_ssm takes no initial state"),
        "states": (lambda: selective_scan(**wide), "mamba_ssm takes at most 256 states, got 257"),
        "last": (
            lambda: selective_scan(**learns, return_last_state=True),
            "mamba_ssm gives the last state no gradient",
        ),
        "taps": (lambda: causal_conv1d(*taps), "causal_conv1d takes 2 to 4 taps, got 5"),
        "past": (
            lambda: causal_conv1d(data["u"], torch.randn(6, 4), return_last_state=True),
            "causal_conv1d takes no state in all of its versions and layouts",
        ),
    }


@pytest.mark.parametrize("limit", ["state", "states", "last", "taps"])
def test_what_mamba_does_not_take_runs_on_the_reference_and_says_so(limit: str, installed: None) -> None:
    call, message = limits()[limit]
    with pytest.warns(UserWarning, match=f"by plain PyTorch operations, which is slow: {message}"):
        found = call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()  # said once
    with implementation("ref"):
        torch.testing.assert_close(found, call())
    assert calls == []
    with implementation("mamba_ssm"), pytest.raises(BackendError, match=f"cannot run: {message}"):
        call()


def test_the_last_state_without_gradients_is_mambas(installed: None) -> None:
    data = {k: x.requires_grad_() for k, x in scan_data(None).items()}
    with torch.no_grad():
        selective_scan(**data, return_last_state=True)
    assert calls == ["scan"]


def test_without_the_packages_the_reference_runs_and_says_so_once(missing: None) -> None:
    data = scan_data(None)
    weight, bias = torch.randn(6, 4), torch.randn(6)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            y = selective_scan(**data, delta_softplus=True)
            x = causal_conv1d(data["u"], weight, bias)
    first, second = (str(w.message) for w in said)
    assert "the scan runs on CUDA by plain PyTorch operations, which is slow: mamba_ssm is not installed" in first
    assert "the convolution runs on CUDA" in second
    assert "pip install --no-build-isolation 'hcmen[cuda]'" in second
    torch.testing.assert_close(y, selective_scan_ref(**data, delta_softplus=True))
    torch.testing.assert_close(x, causal_conv1d_ref(data["u"], weight, bias))
    for call in (lambda: selective_scan(**data), lambda: causal_conv1d(data["u"], weight, bias)):
        with implementation("mamba_ssm"), pytest.raises(BackendError, match=r"cannot run: \w+ is not installed"):
            call()


def test_a_package_that_does_not_load(missing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a build for another PyTorch does not, or one whose compiled part is missing."""

    class Broken:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "causal_conv1d":
                raise ImportError("undefined symbol: _ZN3c10\n in causal_conv1d_cuda.so")
            if name == "mamba_ssm":
                raise ModuleNotFoundError("No module named 'selective_scan_cuda'", name="selective_scan_cuda")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    data = scan_data(None)
    with pytest.warns(UserWarning, match="mamba_ssm does not load: it needs selective_scan_cuda"):
        selective_scan(**data)
    with pytest.warns(
        UserWarning, match="causal_conv1d does not load: undefined symbol: _ZN3c10 in causal_conv1d_cuda"
    ):
        causal_conv1d(data["u"], torch.randn(6, 4), torch.randn(6))


def test_float64_is_the_references(installed: None) -> None:
    data = {k: x.double() for k, x in scan_data(None).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(selective_scan(**data), selective_scan_ref(**data))
    assert calls == []
    with implementation("mamba_ssm"), pytest.raises(BackendError, match=r"takes float32, .* got torch.float64 on cpu"):
        selective_scan(**data)


def test_cpu_tensors_never_reach_mamba(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_on_cuda", lambda x: x.device.type == "cuda")
    data = scan_data(None)
    selective_scan(**data)
    assert calls == []
    with implementation("mamba_ssm"), pytest.raises(BackendError, match=r"on CUDA, got torch.float32 on cpu"):
        selective_scan(**data)
    with implementation("mamba_ssm"), pytest.raises(BackendError, match="mamba_ssm's convolution takes"):
        causal_conv1d(data["u"], torch.randn(6, 4), torch.randn(6))
