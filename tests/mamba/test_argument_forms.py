"""Forms of arguments that mamba_ssm knows beside the kernels' own: constant B and C, no bias, states; complex ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hcmen.base.errors import InputError
from hcmen.mamba.scan import (
    causal_conv1d,
    causal_conv1d_ref,
    implementation,
    selective_scan,
    selective_scan_ref,
    state_space_dual,
    state_space_dual_ref,
)

BATCH, TIME, CHANNEL, STATE = 2, 7, 6, 5
FORMS = {"constant": (CHANNEL, STATE), "plain": (BATCH, TIME, STATE)} | {
    f"{group} groups": (BATCH, TIME, group, STATE) for group in (1, 2, 3)
}


def spread(x: Tensor) -> Tensor:
    """Any form of B or C -> [b, t, c, n], element by element."""
    wide = torch.empty(BATCH, TIME, CHANNEL, STATE, dtype=x.dtype)
    for b in range(BATCH):
        for t in range(TIME):
            for c in range(CHANNEL):
                if x.dim() == 2:
                    wide[b, t, c] = x[c]
                elif x.dim() == 3:
                    wide[b, t, c] = x[b, t]
                else:
                    wide[b, t, c] = x[b, t, c // (CHANNEL // x.shape[2])]
    return wide


def scanned(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The recurrence as docs/op.md has it, in float64."""
    B, C, h = spread(B), spread(C), torch.zeros(BATCH, CHANNEL, STATE, dtype=torch.float64)
    y = torch.zeros_like(u)
    for t in range(TIME):
        h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[..., None] * B[:, t]
        y[:, t] = (C[:, t] * h).sum(-1)
    return y


@pytest.mark.parametrize("of_C", FORMS)
@pytest.mark.parametrize("of_B", FORMS)
def test_B_and_C_have_each_a_form_of_its_own(of_B: str, of_C: str) -> None:
    torch.manual_seed(0)
    u, delta = torch.randn(BATCH, TIME, CHANNEL).double(), torch.rand(BATCH, TIME, CHANNEL).double()
    A = -torch.rand(CHANNEL, STATE).double()
    B, C = (torch.randn(FORMS[form]).double() for form in (of_B, of_C))
    wanted = scanned(u, delta, A, B, C)
    torch.testing.assert_close(selective_scan_ref(u, delta, A, B, C), wanted, rtol=1e-12, atol=1e-12)
    leaves = [x.float().requires_grad_() for x in (u, delta, A, B, C)]
    y = selective_scan(*leaves)
    torch.testing.assert_close(y.detach().double(), wanted, rtol=1e-5, atol=1e-5)
    doubles = [x.clone().requires_grad_() for x in (u, delta, A, B, C)]
    gradients = torch.autograd.grad(selective_scan_ref(*doubles).square().sum(), doubles)
    for got, want in zip(torch.autograd.grad(y.square().sum(), leaves), gradients, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["auto", "native", "ref"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_dtype_of_a_convolutions_state(dtype: torch.dtype, how: str) -> None:
    """float32, but that of the reference in float64, which loses nothing."""
    if (how, dtype) == ("native", torch.float64):
        return
    torch.manual_seed(1)
    x, weight, state = torch.randn(2, 2, 5).to(dtype), torch.randn(5, 4), torch.randn(2, 3, 5).double() / 3
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    with implementation(how):
        y, last = causal_conv1d(x, weight, None, state, return_last_state=True)
        assert (y.dtype, last.dtype) == (dtype, kept)
        assert torch.equal(last, torch.cat((state.to(kept), x.to(kept)), 1)[:, 2:])
        assert torch.equal(causal_conv1d(x, weight, None, state), y)


@pytest.mark.parametrize("how", ["native", "ref"])
@pytest.mark.parametrize("state", [None, torch.zeros(2, 0, 5)])
def test_a_convolution_of_width_1_has_no_state(state: Tensor | None, how: str) -> None:
    with (
        implementation(how),
        pytest.raises(InputError, match=r"^weight has width 1, expected at least 2 where there is a state"),
    ):
        causal_conv1d(torch.zeros(2, 3, 5), torch.zeros(5, 1), None, state, return_last_state=True)


def test_a_convolution_without_a_bias() -> None:
    torch.manual_seed(2)
    x, weight = torch.randn(2, 9, 5), torch.randn(5, 4)
    for function in (causal_conv1d, causal_conv1d_ref):
        assert torch.equal(function(x, weight), function(x, weight, torch.zeros(5)))


def dual(**forms: Any) -> dict[str, Any]:
    torch.manual_seed(3)
    batch, time, head, dim, group, state = 2, 9, 6, 5, 2, 7
    data = {
        "x": torch.randn(batch, time, head, dim),
        "dt": torch.randn(batch, time, head),
        "A": -torch.rand(head) * 4,
        "B": torch.randn(batch, time, group, state),
        "C": torch.randn(batch, time, group, state),
        "D": torch.randn(head),
        "dt_bias": torch.randn(head),
        "z": torch.randn(batch, time, head, dim),
        "initial_state": torch.randn(batch, head, dim, state),
    }
    return data | forms


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "forms",
    [
        {"delta_softplus": True},
        {"delta_softplus": True, "dt_min": 0.3, "dt_max": 0.9, "D": torch.ones(6, 5)},
        {"D": None, "dt_bias": None, "z": None, "initial_state": None},
    ],
    ids=["all", "limits", "bare"],
)
def test_the_dual_is_what_the_paper_says(forms: dict[str, Any], reverse: bool) -> None:
    """Against the sum that the recurrence unrolls to, head by head."""
    data = dual(**forms)
    given = {name: x.double() if isinstance(x, Tensor) else x for name, x in data.items()}
    flags = {name: given.pop(name) for name in ("delta_softplus", "dt_min", "dt_max") if name in given}
    x, d = given["x"], given["dt"]
    if given["dt_bias"] is not None:
        d = d + given["dt_bias"]
    if flags.get("delta_softplus"):
        d = torch.log1p(torch.exp(d))
    d = d.clamp(flags.get("dt_min", 0.0), flags.get("dt_max", float("inf")))
    steps = list(range(x.shape[1]))[:: -1 if reverse else 1]
    wanted = torch.zeros_like(x)
    for at, t in enumerate(steps):
        for h in range(6):
            g = h // 3
            for j in range(at + 1):
                decay = torch.exp(d[:, steps[j + 1 : at + 1], h].sum(1) * given["A"][h])
                seen = (given["C"][:, t, g] * given["B"][:, steps[j], g]).sum(-1)
                wanted[:, t, h] += (decay * seen * d[:, steps[j], h])[:, None] * x[:, steps[j], h]
            if given["initial_state"] is not None:
                decay = torch.exp(d[:, steps[: at + 1], h].sum(1) * given["A"][h])
                started = (given["initial_state"][:, h] * given["C"][:, t, g, None]).sum(-1)
                wanted[:, t, h] += decay[:, None] * started
    if given["D"] is not None:
        wanted += x * given["D"].reshape(6, -1)
    if given["z"] is not None:
        wanted *= given["z"] * torch.sigmoid(given["z"])
    flags["reverse"] = reverse
    torch.testing.assert_close(state_space_dual_ref(**given, **flags), wanted, rtol=1e-10, atol=1e-10)
    names = [name for name, value in data.items() if isinstance(value, Tensor)]
    leaves = {name: data[name].clone().requires_grad_() for name in names}
    y = state_space_dual(**{**data, **leaves, "reverse": reverse})
    torch.testing.assert_close(y.detach().double(), wanted, rtol=1e-4, atol=1e-4)
    doubles = {name: given[name].clone().requires_grad_() for name in names}
    reference = state_space_dual_ref(**{**given, **doubles}, **flags)
    expected = torch.autograd.grad(reference.square().sum(), list(doubles.values()))
    for name, got, want in zip(
        names, torch.autograd.grad(y.square().sum(), list(leaves.values())), expected, strict=True
    ):
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


def test_complex_tensors_are_refused() -> None:
    """They would be computed as their real parts."""
    u, B = torch.randn(1, 3, 2), torch.randn(1, 3, 4)
    with pytest.raises(InputError, match=r"A is torch.complex64, expected a real tensor: complex state spaces are not"):
        selective_scan(u, u, torch.randn(2, 4, dtype=torch.complex64), B, B)
    with pytest.raises(InputError, match=r"weight is .*complex64, expected a real tensor"):
        causal_conv1d(u, torch.randn(2, 4, dtype=torch.complex64))
    data = dual(B=torch.randn(2, 9, 2, 7, dtype=torch.complex64))
    with pytest.raises(InputError, match=r"B is .*complex64, expected a real tensor"):
        state_space_dual(**data)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(2, 9, 6)}, r"x has shape \[2, 9, 6\], expected \[any, any, any, any\]"),
        ({"A": torch.zeros(6, 7)}, r"A has shape \[6, 7\], expected \[6\]"),
        (
            {"B": torch.zeros(2, 9, 4, 7), "C": torch.zeros(2, 9, 4, 7)},
            "B has 4 groups, expected a divisor of the 6 heads",
        ),
        ({"D": torch.zeros(6, 4)}, r"D has shape \[6, 4\], expected \[6, 5\]"),
        ({"dt": torch.zeros(2, 9, 6).half()}, "dt is torch.float16, expected torch.float32, the dtype of x"),
        ({"dt_min": 2.0, "dt_max": 1.0}, "dt_min is 2.0 and dt_max is 1.0, expected no less than dt_min"),
        ({"dt_max": float("nan")}, "dt_max is nan"),
    ],
)
def test_wrong_arguments_of_the_dual(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        state_space_dual(**dual(**changed))
