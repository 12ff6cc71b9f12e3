"""Mixers of other people's Mamba models, recognised by their attributes, and their forwards channels last.

Each forward takes the module, the sequence [batch, time, channel] and what masks padded steps, and gives what the
module's own forward gives, by way of hcmen.mamba.scan: between two projections no axis is moved. What a module computes
is in its attributes; where those leave a choice (whether two directions are added or averaged) there is one candidate
for each, and rewrite.py finds out by numbers. Known to serve:

    Mamba-1   mamba_ssm 1.0 to 2.3 and copies of it; transformers' Mamba, FalconMamba and Jamba (norms of dt, B and C);
              mambapy; Vim's and DepMamba's bimamba v1 (one convolution, two scans) and v2 (two of everything)
    heads     transformers' Zamba: x_proj and dt_proj of each head
    Mamba-2   mamba_ssm's Mamba2 and Mamba2Simple; transformers' Mamba2, Bamba, Zamba2, GraniteMoeHybrid, NemotronH and
              FalconH1 (multipliers, and a gate in place of the norm)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcmen.mamba.scan import causal_conv1d, selective_scan, state_space_dual

__all__ = ["Forward", "candidates", "family"]

Mask = Callable[[Tensor], Tensor]
Forward = Callable[[Any, Tensor, Mask], Tensor]

_SHARED = ("in_proj", "conv1d", "A_log", "D", "out_proj")
_FAMILIES = {
    "Mamba-1": ("x_proj", "dt_proj"),
    "Mamba-1 of several heads": ("x_proj_weight", "dt_proj_weight", "dt_proj_bias"),
    "Mamba-2": ("dt_bias",),
}


def family(module: nn.Module) -> str:
    """Which mixer the module is by its attributes, or an empty string."""

    def has(names: tuple[str, ...]) -> bool:
        return all(isinstance(getattr(module, name, None), (nn.Module, Tensor)) for name in names)

    return next((name for name, names in _FAMILIES.items() if has(_SHARED) and has(names)), "")


def candidates(module: Any) -> Iterator[Forward]:
    """The forwards to try on a recognised module, the likeliest first."""
    kind = family(module)
    if kind == "Mamba-2":
        yield _mamba2
    elif kind == "Mamba-1 of several heads":
        yield _mamba1_heads
    elif not hasattr(module, "A_b_log"):
        yield _mamba1
    elif not hasattr(module, "conv1d_b"):
        yield _mamba1_one_convolution
    else:
        yield _mamba1_two_directions
        yield functools.partial(_mamba1_two_directions, share=0.5)


# --- Mamba-1 --------------------------------------------------------------------------------------------------------


def _mamba1(m: Any, hidden: Tensor, mask: Mask) -> Tensor:
    x, z = m.in_proj(mask(hidden)).chunk(2, dim=-1)
    return _projected(m, _direction(m, x, z, mask))


def _mamba1_two_directions(m: Any, hidden: Tensor, mask: Mask, *, share: float = 1.0) -> Tensor:
    x, z = m.in_proj(mask(hidden)).chunk(2, dim=-1)
    y = _direction(m, x, z, mask) + _direction(m, x, z, mask, "_b", reverse=True)
    return _projected(m, y if share == 1.0 else y * share)


def _mamba1_one_convolution(m: Any, hidden: Tensor, mask: Mask) -> Tensor:
    x, z = m.in_proj(mask(hidden)).chunk(2, dim=-1)
    u = mask(_convolution(m, m.conv1d, x))
    delta, B, C = _selected(m, m.x_proj, m.dt_proj, u)
    y = _scan(u, delta, m.A_log, B, C, m.D, m.dt_proj.bias, z) + _scan(
        u, delta, m.A_b_log, B, C, m.D, m.dt_proj.bias, z, reverse=True
    )
    return _projected(m, y)


def _direction(m: Any, x: Tensor, z: Tensor, mask: Mask, suffix: str = "", *, reverse: bool = False) -> Tensor:
    """Convolution and scan in one direction; the backward direction's parts have names that end in "_b"."""
    conv, x_proj, dt_proj = (getattr(m, name + suffix) for name in ("conv1d", "x_proj", "dt_proj"))
    u = mask(_convolution(m, conv, x, reverse=reverse))
    delta, B, C = _selected(m, x_proj, dt_proj, u)
    A_log = m.A_b_log if suffix else m.A_log
    return _scan(u, delta, A_log, B, C, getattr(m, "D" + suffix), dt_proj.bias, z, reverse=reverse)


def _selected(m: Any, x_proj: Any, dt_proj: Any, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """delta before its bias, B and C."""
    state = m.A_log.shape[1]
    dt, B, C = torch.split(x_proj(u), [dt_proj.weight.shape[1], state, state], dim=-1)
    dt, B, C = (_normed(m, name, x) for name, x in (("dt", dt), ("b", B), ("c", C)))
    return F.linear(dt, dt_proj.weight), B, C


def _normed(m: Any, name: str, x: Tensor) -> Tensor:
    """x after the norm that FalconMamba and Jamba (b_layernorm) or mambapy (B_layernorm) have for it, if any."""
    norm = getattr(m, f"{name}_layernorm", None) or getattr(m, f"{name.upper()}_layernorm", None)
    return x if norm is None else norm(x)


def _mamba1_heads(m: Any, hidden: Tensor, mask: Mask) -> Tensor:
    """Zamba: the heads share the convolution and have projections of their own. One scan serves all of them."""
    _, dim, state = m.A_log.shape
    # in_proj's outputs alternate: input and gate of channel 0, of channel 1, ...
    x, z = m.in_proj(mask(hidden)).unflatten(-1, (-1, 2)).unbind(-1)
    u = mask(_convolution(m, m.conv1d, x))
    sizes = [m.dt_proj_weight.shape[2], state, state]
    heads = zip(torch.split(u, dim, dim=-1), m.x_proj_weight, strict=True)
    chosen = [torch.split(F.linear(x, weight), sizes, dim=-1) for x, weight in heads]
    delta = torch.cat([F.linear(dt, w) for (dt, _, _), w in zip(chosen, m.dt_proj_weight, strict=True)], -1)
    B, C = (torch.stack([one[i] for one in chosen], 2) for i in (1, 2))
    y = _scan(u, delta, m.A_log.flatten(0, 1), B, C, m.D.flatten(), m.dt_proj_bias.flatten(), z)
    return _projected(m, y)


def _scan(
    u: Tensor,
    delta: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    bias: Tensor | None,
    z: Tensor,
    *,
    reverse: bool = False,
) -> Tensor:
    y = selective_scan(
        u, delta, _decay(A_log), B, C, _parameter(D), _parameter(bias), z, delta_softplus=True, reverse=reverse
    )
    assert isinstance(y, Tensor)
    return y


# --- Mamba-2 --------------------------------------------------------------------------------------------------------


def _mamba2(m: Any, hidden: Tensor, mask: Mask) -> Tensor:
    head = m.A_log.shape[0]
    inner = m.out_proj.weight.shape[1]
    dim = _first(m, "headdim", "head_dim") or (m.D.shape[0] // head if m.D.shape[0] > head else inner // head)
    group = _first(m, "ngroups", "n_groups") or 1
    scanned, convolved = head * dim, m.conv1d.weight.shape[0]
    state = (convolved - scanned) // (2 * group)
    x = mask(hidden)
    if (multiplier := getattr(m, "ssm_in_multiplier", None)) is not None:
        x = x * multiplier
    projected = m.in_proj(x)
    if (multipliers := getattr(m, "mup_vector", None)) is not None:
        projected = projected * multipliers
    # A gated MLP may stand beside the scan, in what the convolution leaves of the width.
    mlp = (projected.shape[-1] - scanned - convolved - head) // 2
    sizes = [mlp, mlp, scanned, convolved, head] if mlp else [scanned, convolved, head]
    *beside, z, xBC, dt = torch.split(projected, sizes, dim=-1)
    convolved_xBC = mask(_convolution(m, m.conv1d, xBC))
    u, B, C = torch.split(convolved_xBC, [scanned, group * state, group * state], dim=-1)
    normed = isinstance(getattr(m, "norm", None), nn.Module) and _first(m, "rmsnorm", "mamba_rms_norm") is not False
    first = getattr(m, "init_states", None)
    low, high = _first(m, "dt_limit", "time_step_limit") or (0.0, math.inf)
    y = state_space_dual(
        _unflat(u, head, dim),
        dt,
        _decay(m.A_log),
        _unflat(B, group, state),
        _unflat(C, group, state),
        _parameter(m.D.unflatten(0, (head, dim)) if m.D.shape[0] > head else m.D),
        _parameter(m.dt_bias),
        None if normed else _unflat(z, head, dim),
        None if first is None else first.expand(hidden.shape[0], -1, -1, -1),
        delta_softplus=True,
        dt_min=float(low),
        dt_max=float(high),
    )
    assert isinstance(y, Tensor)
    y = y.flatten(-2)
    if normed:
        y = m.norm(y, z)
    if beside:
        y = torch.cat((F.silu(beside[0]) * beside[1], y), dim=-1)
    return _projected(m, y)


# --- what both share ------------------------------------------------------------------------------------------------


def _convolution(m: Any, conv: Any, x: Tensor, *, reverse: bool = False) -> Tensor:
    weight = conv.weight[:, 0]
    silu = getattr(m, "activation", "silu") in ("silu", "swish")
    y = causal_conv1d(x, weight, conv.bias, activation="silu" if silu else "none", reverse=reverse)
    assert isinstance(y, Tensor)
    return y if silu else m.act(y)


def _projected(m: Any, y: Tensor) -> Tensor:
    out: Tensor = m.out_proj(y.to(m.out_proj.weight.dtype))
    scale = getattr(m, "gamma", None)  # Vim's init_layer_scale
    return out * scale if isinstance(scale, Tensor) else out


def _decay(A_log: Tensor) -> Tensor:
    wide = _parameter(A_log)
    assert wide is not None
    return -torch.exp(wide)


def _parameter(x: Tensor | None) -> Tensor | None:
    """In float32 at least: in half precision exp(A_log) and the sums of steps lose what the scan needs."""
    return x.float() if x is not None and x.dtype in (torch.float16, torch.bfloat16) else x


def _unflat(x: Tensor, outer: int, inner: int) -> Tensor:
    return x.reshape(*x.shape[:-1], outer, inner)


def _first(m: Any, *names: str) -> Any:
    """The first of the attributes that the module has."""
    return next((getattr(m, name) for name in names if hasattr(m, name)), None)
