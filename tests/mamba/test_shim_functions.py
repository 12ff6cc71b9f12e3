"""Every function of the stand-ins against loops in float64, gradients against autograd through these, form by form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.mamba_loops import agree, conv, dual, norm, scan, silu, softplus
from torch import Tensor

from hcmen.base.errors import BackendError, InputError
from hcmen.mamba.stand_ins import causal_conv, norms, packages, selective_scan, ssd, triton

BATCH, TIME, CHANNEL, STATE, WIDTH = 2, 7, 6, 5, 4
HEAD, DIM, GROUP = 4, 3, 2


def made(*shape: int, low: float | None = None) -> Tensor:
    """Random numbers, uniform between `low` and 0 if it is given."""
    x = torch.randn(shape) if low is None else low * torch.rand(shape)
    return x.requires_grad_()


def twice(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.detach().double().requires_grad_() for x in tensors]


def gradients(outputs: list[Tensor], inputs: list[Tensor | None]) -> list[Tensor]:
    weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape) for x in outputs]
    whole = sum((x * w).sum() for x, w in zip(outputs, weights, strict=True))
    there = [x for x in inputs if x is not None]
    return list(torch.autograd.grad(whole, there, allow_unused=True, materialize_grads=True))


def same(
    ours: Callable[..., Any], loops: Callable[..., Any], inputs: list[Tensor | None], within: float = 3e-6
) -> None:
    """Both functions give lists of tensors; these and all gradients agree."""
    found = ours(*inputs)
    wide = twice(*inputs)
    wanted = loops(*wide)
    agree(found, wanted, within=within)
    agree(gradients(found, inputs), gradients(wanted, wide), within=within)


FORMS = {"plain": (BATCH, STATE, TIME), "groups": (BATCH, GROUP, STATE, TIME), "constant": (CHANNEL, STATE)}


def of_scan(form: str = "plain", *, gated: bool = True, parameters: bool = True) -> list[Tensor | None]:
    """u, delta, A, B, C, D, z, delta_bias."""
    torch.manual_seed(0)
    series = (BATCH, CHANNEL, TIME)
    D, bias = (made(CHANNEL), made(CHANNEL)) if parameters else (None, None)
    z = made(*series) if gated else None
    return [
        made(*series),
        made(*series),
        made(CHANNEL, STATE, low=-1),
        made(*FORMS[form]),
        made(*FORMS[form]),
        D,
        z,
        bias,
    ]


@pytest.mark.parametrize("parameters", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_selective_scan_fn(form: str, gated: bool, parameters: bool) -> None:
    inputs = of_scan(form, gated=gated, parameters=parameters)
    same(
        lambda *x: list(selective_scan.selective_scan_fn(*x, delta_softplus=True, return_last_state=True)),
        lambda *x: list(scan(*x, delta_softplus=True)[1:]),
        inputs,
    )
    y = selective_scan.selective_scan_fn(*inputs)
    assert isinstance(y, Tensor)
    agree([y], [scan(*twice(*inputs))[1]])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_the_compiled_scan_forward_and_backward(form: str, gated: bool) -> None:
    inputs = of_scan(form, gated=gated)
    with torch.no_grad():
        found = selective_scan.CUDA.fwd(*inputs[:6], inputs[6], inputs[7], True)
    wide = twice(*inputs)
    before, after, last = scan(*wide, delta_softplus=True)
    agree([found[0], found[1][:, :, -1, 1::2]], [before, last], within=3e-6)
    agree(found[2:], [after] if gated else [], within=3e-6)

    dout = torch.randn(BATCH, CHANNEL, TIME)
    dz = torch.full((BATCH, 2 * CHANNEL, TIME), 7.0).chunk(2, dim=1)[1] if gated else None
    u, delta, A, B, C, D, z, bias = inputs
    grads = selective_scan.CUDA.bwd(u, delta, A, B, C, D, z, bias, dout, found[1], found[0], dz, True, True)
    order = [wide[i] for i in (0, 1, 2, 3, 4, 5, 7, 6) if wide[i] is not None]
    wanted = torch.autograd.grad(after, order, dout.double())
    agree(grads[:-1], wanted, within=3e-6)
    agree(grads[-1:], [after], within=3e-6)
    if gated:
        assert grads[7] is dz, "the gradient of z belongs into the caller's tensor"


@pytest.mark.parametrize("name", ["selective_scan_cuda_core", "selective_scan_cuda_oflex"])
def test_the_compiled_scans_of_vmamba(name: str) -> None:
    u, delta, A, B, C, D, _, bias = inputs = of_scan("groups", gated=False)
    functions = packages.COMPILED[name]
    more = (1, True) if name.endswith("oflex") else (1,)
    out, x = functions.fwd(u, delta, A, B, C, D, bias, True, *more)
    wide = twice(*inputs)
    y, _, last = scan(*wide, delta_softplus=True)
    agree([out, x[:, :, -1, 1::2]], [y, last])
    dout = torch.randn_like(out)
    grads = functions.bwd(u, delta, A, B, C, D, bias, dout, x, True, 1)
    order = [wide[i] for i in (0, 1, 2, 3, 4, 5, 7)]
    agree(grads, torch.autograd.grad(y, order, dout.double()), within=3e-6)
    halves = [v.half() for v in (u, delta)] + [A] + [v.half() for v in (B, C)]
    kept = functions.fwd(*halves, D, bias, True, *more)[0]
    assert kept.dtype == (torch.float32 if name.endswith("oflex") else torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    u, delta, A, B, C, D, z, bias = of_scan()
    halves = [v.detach().to(dtype) for v in (u, delta, B, C, z)]
    u, delta, B, C, z = halves
    wanted = scan(*twice(u, delta, A, B, C, D, z, bias), delta_softplus=True)
    found = selective_scan.CUDA.fwd(u, delta, A, B, C, D, z, bias, True)
    assert found[0].dtype == found[2].dtype == dtype
    step = torch.finfo(dtype).eps
    agree([found[0], found[2]], wanted[:2], within=step)
    assert selective_scan.selective_scan_fn(u, delta, A, B, C, D, z, bias, True).dtype == dtype


def test_mixed_dtypes_are_computed_in_the_widest() -> None:
    u, delta, A, B, C, *_ = of_scan()
    assert u is not None
    found = selective_scan.selective_scan_fn(u.bfloat16(), delta, A, B, C)
    assert found.dtype == torch.bfloat16
    wanted = scan(*twice(u.bfloat16(), delta, A, B, C))[1]
    agree([found], [wanted], within=2**-8)


# --- the convolution --------------------------------------------------------------------------------------------------


def of_conv(bias: bool = True) -> list[Tensor | None]:
    torch.manual_seed(0)
    return [made(BATCH, CHANNEL, TIME), made(CHANNEL, WIDTH), made(CHANNEL) if bias else None]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_causal_conv1d_fn(activation: str | None, bias: bool) -> None:
    def ours(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> list[Tensor]:
        y, last = causal_conv.causal_conv1d_fn(
            x, weight, bias, None, state, return_final_states=True, activation=activation
        )
        return [y, last]

    def loops(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> list[Tensor]:
        y, series = conv(x, weight, bias, state, activation is not None)
        return [y, series[..., -(WIDTH - 1) :]]

    same(ours, loops, [*of_conv(bias), made(BATCH, CHANNEL, WIDTH - 1)])


def test_causal_conv1d_fn_has_the_order_of_every_generation() -> None:
    x, weight, bias = of_conv()
    wanted = [conv(*twice(x, weight, bias), activated=True)[0]]
    agree([causal_conv.causal_conv1d_fn(x, weight, bias, "silu")], wanted)  # 1.0
    agree([causal_conv.causal_conv1d_fn(x, weight, bias, None, "silu")], wanted)  # 1.1
    agree([causal_conv.causal_conv1d_fn(x, weight, bias, None, None, False, None, "silu")], wanted)  # 1.2
    out = torch.empty(BATCH, CHANNEL, WIDTH - 1)
    _, last = causal_conv.causal_conv1d_fn(x, weight, bias, None, None, True, out, "silu")
    assert last is out
    assert x is not None
    torch.testing.assert_close(out, x[..., -(WIDTH - 1) :].detach())
    with pytest.raises(InputError, match="activation is 'gelu', expected None, 'silu' or 'swish'"):
        causal_conv.causal_conv1d_fn(x, weight, bias, activation="gelu")


def test_the_compiled_convolution_has_the_arguments_of_every_generation() -> None:
    x, weight, bias = inputs = of_conv()
    wide = twice(*inputs)
    y = conv(*wide, activated=True)[0]
    forward, backward = packages.COMPILED["causal_conv1d_cuda"].causal_conv1d_fwd, causal_conv.CUDA.causal_conv1d_bwd
    out = torch.empty_like(y, dtype=torch.float32)
    assert forward(x, weight, bias, None, None, out, None, True) is None
    for found in (forward(x, weight, bias, True), forward(x, weight, bias, None, True), out):
        agree([found], [y])
    final = torch.empty(BATCH, CHANNEL, WIDTH - 1)
    agree([forward(x, weight, bias, None, None, final, True)], [y])
    assert x is not None
    torch.testing.assert_close(final, x[..., -(WIDTH - 1) :].detach())

    dout = torch.randn(BATCH, CHANNEL, TIME)
    wanted = torch.autograd.grad(y, wide, dout.double())
    dx = torch.empty(BATCH, 2 * CHANNEL, TIME).chunk(2, dim=1)[0]
    found = backward(x, weight, bias, dout, dx, True)
    assert found[0] is dx
    agree(found, wanted, within=3e-6)
    agree(backward(x, weight, bias, dout, None, None, True), wanted, within=3e-6)
    *found, initial = backward(x, weight, bias, dout, None, None, None, None, False, True)
    assert initial is None
    agree(found, wanted, within=3e-6)
    into = [torch.empty_like(v) for v in inputs]
    assert backward(x, weight, bias, dout, None, None, None, *into, None, True) is None
    agree(into, wanted, within=3e-6)
    with pytest.raises(InputError, match=r"causal_conv1d_fwd was called with 3 arguments, expected 4, 5, 7 or 8"):
        forward(x, weight, True)


def test_the_compiled_convolution_gives_states_their_gradients() -> None:
    inputs = [*of_conv(), made(BATCH, CHANNEL, WIDTH - 1)]
    wide = twice(*inputs)
    x, weight, bias, state = inputs
    y, series = conv(*wide, activated=False)
    dout, dfinal = torch.randn(BATCH, CHANNEL, TIME), torch.randn(BATCH, CHANNEL, WIDTH - 1)
    found = causal_conv.causal_conv1d_bwd_function(x, weight, bias, dout, None, state, dfinal, None, True, False)
    wanted = torch.autograd.grad(
        [y, series[..., -(WIDTH - 1) :]],
        wide,
        [dout.double(), dfinal.double()],
    )
    agree(found, wanted, within=3e-6)


@pytest.mark.parametrize("kept", [WIDTH - 1, WIDTH, WIDTH + 3])
def test_causal_conv1d_update_changes_the_state_in_place(kept: int) -> None:
    x, weight, bias = of_conv()
    assert x is not None
    before = torch.randn(BATCH, CHANNEL, kept)
    state = before.clone()
    with torch.no_grad():
        steps = [causal_conv.causal_conv1d_update(x[..., t], state, weight, bias, "silu") for t in range(3)]
        steps.append(causal_conv.CUDA.causal_conv1d_update(x[..., 3], state, weight, bias, True))
        rest = causal_conv.causal_conv1d_update(x[..., 4:], state, weight, bias, "silu", None, None)
    wide_x, wide_weight, wide_bias = twice(x, weight, bias)
    wanted, _ = conv(wide_x, wide_weight, wide_bias, before[..., kept - WIDTH + 1 :].double(), True)
    agree([torch.cat((torch.stack(steps, dim=2), rest), dim=2)], [wanted])
    torch.testing.assert_close(state, torch.cat((before, x.detach()), dim=2)[..., -kept:])


# --- Mamba-2 and single steps -----------------------------------------------------------------------------------------


def of_dual(*, gated: bool = True, of_D: int = 1) -> list[Tensor | None]:
    """x, dt, A, B, C, D, z, dt_bias, states."""
    torch.manual_seed(0)
    series, projection = (BATCH, TIME, HEAD, DIM), (BATCH, TIME, GROUP, STATE)
    D = made(HEAD) if of_D == 1 else made(HEAD, DIM)
    rest = [made(*series) if gated else None, made(HEAD), made(BATCH, HEAD, DIM, STATE)]
    return [made(*series), made(BATCH, TIME, HEAD), made(HEAD, low=-1), made(*projection), made(*projection), D, *rest]


@pytest.mark.parametrize("limits", [(0.0, math.inf), (0.4, 1.0)])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("of_D", [1, 2])
def test_mamba_chunk_scan_combined(of_D: int, gated: bool, limits: tuple[float, float]) -> None:
    def ours(x, dt, A, B, C, D, z, dt_bias, states):
        found = ssd.mamba_chunk_scan_combined(
            *(x, dt, A, B, C, 4, D, z, dt_bias, states, None, None, True, limits, True)
        )
        return list(found)

    def loops(x, dt, A, B, C, D, z, dt_bias, states):
        return list(dual(x, dt, A, B, C, D, z, dt_bias, states, True, limits))

    same(ours, loops, of_dual(gated=gated, of_D=of_D), within=5e-6)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("extra", [0, 2])
def test_mamba_split_conv1d_scan_combined(extra: int, normed: bool, first: bool) -> None:
    torch.manual_seed(0)
    width = HEAD * DIM
    convolved, out = width + 2 * GROUP * STATE, 5
    inputs = [
        made(BATCH, TIME, 2 * extra + width + convolved + HEAD),
        *(made(convolved, WIDTH), made(convolved), made(HEAD), made(HEAD, low=-1), made(HEAD)),
        *(made(width) if normed else None, made(out, extra + width), made(out)),
    ]

    def ours(zxbcdt, weight, bias, dt_bias, A, D, rms, proj, shift):
        return [
            ssd.mamba_split_conv1d_scan_combined(
                *(zxbcdt, weight, bias, dt_bias, A, D, 4),
                rmsnorm_weight=rms,
                rmsnorm_eps=1e-5,
                outproj_weight=proj,
                outproj_bias=shift,
                headdim=DIM,
                ngroups=GROUP,
                norm_before_gate=first,
            )
        ]

    def loops(zxbcdt, weight, bias, dt_bias, A, D, rms, proj, shift):
        left, right = zxbcdt[..., :extra], zxbcdt[..., extra : 2 * extra]
        rest = zxbcdt[..., 2 * extra :]
        z, xBC, dt = rest[..., :width], rest[..., width : width + convolved], rest[..., width + convolved :]
        xBC = conv(xBC.transpose(1, 2), weight, bias, activated=True)[0].transpose(1, 2)
        x = xBC[..., :width].reshape(BATCH, TIME, HEAD, DIM)
        B = xBC[..., width : width + GROUP * STATE].reshape(BATCH, TIME, GROUP, STATE)
        C = xBC[..., width + GROUP * STATE :].reshape(BATCH, TIME, GROUP, STATE)
        y = dual(x, dt, A, B, C, D, None, dt_bias, None, True)[0].reshape(BATCH, TIME, width)
        if rms is None:
            y = y * silu(z)
        elif first:
            y = norm(y, rms, None, 1e-5, True, width // GROUP) * silu(z)
        else:
            y = norm(y * silu(z), rms, None, 1e-5, True, width // GROUP)
        y = torch.cat((silu(left) * right, y), dim=-1)
        return [y @ proj.T + shift]

    same(ours, loops, inputs, within=5e-6)


@pytest.mark.parametrize("gated", [True, False])
def test_selective_state_update_of_mamba(gated: bool) -> None:
    inputs = of_scan(gated=gated)
    u, delta, A, B, C, D, z, bias = inputs
    state = torch.zeros(BATCH, CHANNEL, STATE)
    steps = []
    with torch.no_grad():
        for t in range(TIME):
            gate = None if z is None else z[..., t]
            steps.append(
                ssd.selective_state_update(
                    *(state, u[..., t], delta[..., t], A, B[..., t], C[..., t], D, gate, bias, True)
                )
            )
    _, wanted, last = scan(*twice(*inputs), delta_softplus=True)
    agree([torch.stack(steps, dim=2), state], [wanted, last])


@pytest.mark.parametrize("tied", [True, False])
def test_selective_state_update_with_heads(tied: bool) -> None:
    x, dt, A, B, C, D, z, dt_bias, first = inputs = of_dual()
    assert first is not None
    state = first.detach().clone()
    steps = []
    with torch.no_grad():
        for t in range(TIME):
            wide = [
                dt[:, t, :, None].expand(-1, -1, DIM),
                A[:, None, None].expand(-1, DIM, STATE),
                dt_bias[:, None].expand(-1, DIM),
                D[:, None].expand(-1, DIM),
            ]
            wide = wide if tied else [v.contiguous() for v in wide]
            steps.append(
                ssd.selective_state_update(
                    *(state, x[:, t], wide[0], wide[1], B[:, t], C[:, t], wide[3], z[:, t], wide[2], True)
                )
            )
    wanted = dual(*twice(*inputs), dt_softplus=True)
    agree([torch.stack(steps, dim=1), state], wanted)


# --- norms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rms", [True, False])
def test_layer_norm_fn(rms: bool) -> None:
    torch.manual_seed(0)
    function = norms.rms_norm_fn if rms else norms.layer_norm_fn
    inputs = [made(3, 4, 6), made(6), made(6), made(3, 4, 6), made(3, 4, 6), made(6), made(6)]

    def loops(x, weight, bias, residual, x1, weight1, bias1):
        whole = x + x1 + residual
        return [norm(whole, weight, bias, 1e-5, rms), norm(whole, weight1, bias1, 1e-5, rms), whole]

    same(lambda *x: list(function(*x, eps=1e-5, prenorm=True)), loops, inputs, within=5e-6)
    x, weight, bias = inputs[:3]
    rows = torch.rand(3, 4)
    found = function(x, weight, bias, rowscale=rows)
    agree([found], [norm((x * rows[..., None]).double(), weight, bias, rms=rms)], within=5e-6)
    y, whole = function(x.half(), weight, bias, prenorm=True, residual_in_fp32=True)
    assert (y.dtype, whole.dtype) == (torch.float16, torch.float32)
    y, whole = function(x.half(), weight, bias, inputs[3], prenorm=True)
    assert (y.dtype, whole.dtype) == (torch.float16, torch.float32), "the residual keeps its dtype"


def test_dropout_of_layer_norm_fn_is_told_by_its_mask() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 32), torch.rand(32)
    y, whole, mask, second = norms.rms_norm_fn(x, weight, None, dropout_p=0.25, prenorm=True, return_dropout_mask=True)
    assert second is None
    assert abs(float(mask.float().mean()) - 0.75) < 0.05
    wanted = torch.where(mask, x / 0.75, torch.zeros(()))
    torch.testing.assert_close(whole, wanted)
    agree([y], [norm(wanted.double(), weight, rms=True)], within=5e-6)


@pytest.mark.parametrize("group", [None, 6, 3])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("rms", [True, False])
def test_norms_with_a_gate(rms: bool, first: bool, group: int | None) -> None:
    torch.manual_seed(0)
    inputs = [made(3, 4, 6), made(6), made(6), made(3, 4, 6)]

    def ours(x, weight, bias, z):
        return [(norms.rmsnorm_fn if rms else norms.layernorm_fn)(x, weight, bias, z, 1e-5, group, first)]

    def loops(x, weight, bias, z):
        if first:
            return [norm(x, weight, bias, 1e-5, rms, group) * silu(z)]
        return [norm(x * silu(z), weight, bias, 1e-5, rms, group)]

    same(ours, loops, inputs, within=5e-6)
    layer = (norms.RMSNormGated if rms else norms.LayerNormGated)(6, 1e-5, group, first)
    assert (layer.bias is None) == rms
    x, _, _, z = inputs
    assert x is not None
    agree([layer(x, z)], loops(x.double(), torch.ones(6), None, z.double()), within=5e-6)


def test_layer_norm_linear_fn_and_statistics() -> None:
    torch.manual_seed(0)
    inputs = [made(4, 6), made(6), made(6), made(3, 6), made(3), made(4, 6)]
    same(
        lambda *x: list(norms.layer_norm_linear_fn(*x, prenorm=True)),
        lambda x, w, b, lw, lb, r: [norm(x + r, w, b) @ lw.T + lb, x + r],
        inputs,
        within=5e-6,
    )
    x, weight, bias = (v.detach() for v in inputs[:3])
    y, _, mean, rstd, *_ = norms.normed_with_statistics(x, weight, bias, 1e-5)
    agree(
        [y, mean, rstd],
        [norm(x.double(), weight, bias, 1e-5), x.mean(1), 1 / torch.sqrt(x.double().var(1, unbiased=False) + 1e-5)],
        within=5e-6,
    )


# --- the whole mixer --------------------------------------------------------------------------------------------------


def of_mixer() -> list[Tensor | None]:
    """xz; weight, bias of the convolution; x_proj, delta_proj; weight, bias of the last; A, A_b, D, delta_bias."""
    torch.manual_seed(0)
    rank, out = 2, 3
    weights = [made(CHANNEL, 1, WIDTH), made(CHANNEL), made(rank + 2 * STATE, CHANNEL), made(CHANNEL, rank)]
    ends = [made(out, CHANNEL), made(out), made(CHANNEL, STATE, low=-1), made(CHANNEL, STATE, low=-1)]
    return [made(BATCH, 2 * CHANNEL, TIME), *weights, *ends, made(CHANNEL), made(CHANNEL)]


def parts_of_mixer(xz, taps, shift, x_proj, dt_proj):
    x, z = xz[:, :CHANNEL], xz[:, CHANNEL:]
    x = conv(x, taps[:, 0], shift, activated=True)[0]
    low = torch.einsum("bct,rc->brt", x, x_proj)
    rank = dt_proj.shape[1]
    delta = torch.einsum("brt,cr->bct", low[:, :rank], dt_proj)
    return x, delta, low[:, rank : rank + STATE], low[:, -STATE:], z


def test_mamba_inner_fn() -> None:
    def loops(xz, taps, shift, x_proj, dt_proj, out, bias, A, _, D, dt_bias):
        x, delta, B, C, z = parts_of_mixer(xz, taps, shift, x_proj, dt_proj)
        y = scan(x, delta, A, B, C, D, z, dt_bias, True)[1]
        return [torch.einsum("bct,oc->bto", y, out) + bias]

    same(lambda *x: [selective_scan.mamba_inner_fn(*x[:8], None, None, x[9], x[10])], loops, of_mixer(), within=1e-5)


def test_bimamba_inner_fn_scans_from_both_ends() -> None:
    def loops(xz, taps, shift, x_proj, dt_proj, out, bias, A, A_b, D, dt_bias):
        x, delta, B, C, z = parts_of_mixer(xz, taps, shift, x_proj, dt_proj)
        y = scan(x, delta, A, B, C, D, z, dt_bias, True)[1]
        turned = (v.flip(-1) for v in (x, delta))
        back = scan(*turned, A_b, B.flip(-1), C.flip(-1), D, z.flip(-1), dt_bias, True)[1].flip(-1)
        return [torch.einsum("bct,oc->bto", y + back, out) + bias]

    same(lambda *x: [selective_scan.bimamba_inner_fn(*x[:9], None, None, x[9], x[10])], loops, of_mixer(), within=1e-5)


def test_mamba_inner_fn_with_norms_of_B_C_and_delta() -> None:
    torch.manual_seed(1)
    rms = [made(STATE), made(STATE), made(CHANNEL)]

    def ours(*x):
        named = dict(zip(("b_rms_weight", "c_rms_weight", "dt_rms_weight"), x[11:], strict=True))
        return [selective_scan.mamba_inner_fn(*x[:8], None, None, x[9], delta_bias=x[10], **named)]

    def loops(xz, taps, shift, x_proj, dt_proj, out, bias, A, _, D, dt_bias, b, c, d):
        x, delta, B, C, z = parts_of_mixer(xz, taps, shift, x_proj, dt_proj)
        normed = [norm(v.transpose(1, 2), w, rms=True).transpose(1, 2) for v, w in ((B, b), (C, c), (delta, d))]
        y = scan(x, normed[2], A, normed[0], normed[1], D, z, dt_bias, True)[1]
        return [torch.einsum("bct,oc->bto", y, out) + bias]

    same(ours, loops, [*of_mixer(), *rms], within=2e-5)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_is_not_served_is_refused_in_one_line() -> None:
    u, delta, A, B, C, *_ = of_scan()
    assert A is not None
    complex_A = torch.complex(A.detach(), A.detach())
    x, weight, bias = of_conv()
    heads = of_dual()
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: selective_scan.selective_scan_fn(u, delta, complex_A, B, C), "A is torch.complex64"),
        (lambda: selective_scan.CUDA.fwd(u, delta, complex_A, B, C, None, None, None, True), "A is torch.complex64"),
        (lambda: causal_conv.causal_conv1d_fn(x, weight, bias, torch.zeros(2, 7)), "seq_idx came"),
        (lambda: causal_conv.CUDA.causal_conv1d_fwd(x, weight, bias, torch.zeros(2, 7), True), "seq_idx came"),
        (lambda: causal_conv.causal_conv1d_update(x, x, weight, bias, None, torch.zeros(2)), "cache_seqlens came"),
        (lambda: causal_conv.causal_conv1d_varlen_states(x, x, 4), "cu_seqlens came"),
        (lambda: ssd.mamba_chunk_scan_combined(*heads[:5], seq_idx=torch.zeros(2, 7)), "seq_idx came"),
        (lambda: ssd.mamba_chunk_scan_combined(*heads[:5], return_varlen_states=True), "return_varlen_states"),
        (lambda: ssd.selective_state_update(*([x] * 6), state_batch_indices=x), "state_batch_indices came"),
    ]
    for call, what in cases:
        with pytest.raises(InputError) as error:
            call()
        line = str(error.value)
        assert what in line
        assert "expected" in line
        assert ": " in line
        assert "\n" not in line


def test_a_launched_kernel_says_which_it_is() -> None:
    fake = triton.module("triton")

    @fake.autotune(configs=[fake.Config({"BLOCK": 16}, num_warps=2)], key=["n"])
    @fake.heuristics({"HAS_Z": lambda args: True})
    @fake.jit
    def some_kernel(pointer, n, BLOCK: fake.language.constexpr):
        raise AssertionError

    assert some_kernel.configs[0].num_warps == 2
    assert some_kernel.best_config.kwargs == {"BLOCK": 16}
    with pytest.raises(BackendError, match=r"the Triton kernel some_kernel of .*test_shim_functions.* was launched"):
        some_kernel[(4,)](torch.zeros(4), 4)
    assert (fake.cdiv(7, 4), fake.next_power_of_2(5), fake.next_power_of_2(1)) == (2, 8, 1)
    assert softplus(torch.tensor(30.0)) == 30
