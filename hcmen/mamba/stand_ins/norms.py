"""mamba_ssm's norms, whose kernels are in Triton, in plain PyTorch: computed in float32 (float64 stays).

`layer_norm_fn` and `rms_norm_fn` are those of mamba_ssm.ops.triton.layer_norm (layernorm before 2.0), with a residual,
a second input, second weights and dropout. `layernorm_fn` and `rmsnorm_fn` are those of layernorm_gated, with a gate z
and groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcmen.mamba.stand_ins.arguments import cast

__all__ = ["LayerNormGated", "RMSNorm", "RMSNormGated", "layer_norm_fn", "layer_norm_linear_fn", "layernorm_fn"]
__all__ += ["normed_with_statistics", "rms_norm_fn", "rmsnorm_fn"]


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _normed(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, is_rms_norm: bool) -> Tensor:
    """x, already wide, over its last dimension."""
    weight, bias = cast(weight, x.dtype), None if bias is None else cast(bias, x.dtype)
    if not is_rms_norm:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight
    return y if bias is None else y + bias


def _dropped(x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    """x after dropout, and which elements are left."""
    if p <= 0.0:
        return x, None
    mask = torch.rand_like(x) > p
    return torch.where(mask, x / (1.0 - p), torch.zeros_like(x)), mask


def _summed(
    x: Tensor, residual: Tensor | None, x1: Tensor | None, dropout_p: float, rowscale: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What is normed, wide, and the two masks of dropout."""
    whole, second = _wide(x), None
    if rowscale is not None:
        whole = whole * rowscale.reshape(whole.shape[:-1])[..., None].to(whole.dtype)
    whole, first = _dropped(whole, dropout_p)
    if x1 is not None:
        other, second = _dropped(_wide(x1), dropout_p)
        whole = whole + other
    return (whole if residual is None else whole + cast(residual, whole.dtype)), first, second


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """norm(dropout(rowscale x) + dropout(x1) + residual) in the dtype of x, by `weight` and, if given, by `weight1`.

    x, x1, residual: [..., width]. With `prenorm` the sum follows, in the dtype of the residual, or float32 if there is
    none and `residual_in_fp32`; with `return_dropout_mask` the two masks follow.
    """
    whole, *masks = _summed(x, residual, x1, dropout_p, rowscale)
    found: list[Tensor | None] = [cast(_normed(whole, weight, bias, eps, is_rms_norm), x.dtype)]
    if weight1 is not None:
        found.append(cast(_normed(whole, weight1, bias1, eps, is_rms_norm), x.dtype))
    if prenorm:
        alone = torch.float32 if residual_in_fp32 else x.dtype
        found.append(cast(whole, alone if residual is None else residual.dtype))
    if return_dropout_mask:
        found += masks
    return found[0] if len(found) == 1 else tuple(found)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
    is_rms_norm: bool = True,
) -> Any:
    """As `layer_norm_fn`, without a mean; is_rms_norm, which mamba_ssm 1.0 passes, changes nothing."""
    first = (x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale)
    return layer_norm_fn(*first, prenorm, residual_in_fp32, True, return_dropout_mask)


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Any:
    """A norm and a linear layer: [..., width of the layer]; with `prenorm` also the sum that was normed."""
    y, whole = layer_norm_fn(
        x,
        norm_weight,
        norm_bias,
        residual,
        eps=eps,
        prenorm=True,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
    )
    out = F.linear(cast(y, linear_weight.dtype), linear_weight, linear_bias)
    return (out, whole) if prenorm else out


def normed_with_statistics(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> tuple[Tensor | None, ...]:
    """`_layer_norm_fwd` of mamba_ssm 2: (y, y1, mean, rstd, sum, seeds, mask, mask1) of x [rows, width]. No seeds."""
    whole, first, second = _summed(x, residual, x1, dropout_p, rowscale)
    centred = whole if is_rms_norm else whole - whole.mean(dim=-1, keepdim=True)
    dtype = out_dtype or x.dtype
    return (
        _normed(whole, weight, bias, eps, is_rms_norm).to(dtype),
        None if weight1 is None else _normed(whole, weight1, bias1, eps, is_rms_norm).to(dtype),
        None if is_rms_norm else whole.mean(dim=-1),
        torch.rsqrt(centred.square().mean(dim=-1) + eps),
        whole.to(residual.dtype if residual is not None else residual_dtype or x.dtype),
        None,
        first if return_dropout_mask else None,
        second if return_dropout_mask else None,
    )


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """norm(x) silu(z) with `norm_before_gate`, else norm(x silu(z)), in the dtype of x [..., width].

    group_size: how many elements are normed together, which divides the width; all of them if absent.
    """
    whole = _wide(x)
    gate = None if z is None else F.silu(cast(z, whole.dtype))
    if gate is not None and not norm_before_gate:
        whole = whole * gate
    if group_size is None or group_size == x.shape[-1]:
        y = _normed(whole, weight, bias, eps, is_rms_norm)
    else:
        groups = torch.unflatten(whole, -1, (-1, group_size))
        ones = weight.new_ones(group_size)
        y = _normed(groups, ones, None, eps, is_rms_norm).flatten(-2) * cast(weight, whole.dtype)
        y = y if bias is None else y + cast(bias, y.dtype)
    return cast(y * gate if gate is not None and norm_before_gate else y, x.dtype)


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """As `layernorm_fn`, without a mean."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True)


class RMSNorm(nn.Module):
    """mamba_ssm.ops.triton.layer_norm.RMSNorm."""

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, dropout_p: float = 0.0, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Any:
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )


class LayerNormGated(nn.Module):
    """mamba_ssm.ops.triton.layernorm_gated.LayerNorm."""

    _without_mean = False
    bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        bias = None if self._without_mean else nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        group, first, rms = self.group_size, self.norm_before_gate, self._without_mean
        return layernorm_fn(x, self.weight, self.bias, z, self.eps, group, first, rms)


class RMSNormGated(LayerNormGated):
    """mamba_ssm.ops.triton.layernorm_gated.RMSNorm."""

    _without_mean = True
