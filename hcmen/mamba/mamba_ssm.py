"""The CUDA kernels of the packages mamba_ssm and causal_conv1d: channels before time, forward only."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hcmen.base.errors import reason_of

__all__ = ["conv_limit", "dual_as_scan", "mamba_conv", "mamba_function", "mamba_scan", "scan_limit"]

_MAMBA = {
    "scan": ("mamba_ssm", "mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"),
    "convolution": ("causal_conv1d", "causal_conv1d", "causal_conv1d_fn"),
}
_COMPILED = {"scan": "selective_scan_cuda", "convolution": "causal_conv1d_cuda"}
_STAND_IN = "__hcmen_stand_in__"
"""What stand-in modules have (stand_ins/packages.py): below them are our own functions, and no CUDA kernels."""
_MAMBA_STATES = 256
_MAMBA_TAPS = (2, 3, 4)


@functools.cache
def mamba_function(operation: str) -> tuple[Callable[..., Any] | None, str | None]:
    """The function of the package that has it, or why it cannot be had."""
    package, module, name = _MAMBA[operation]
    try:
        found = getattr(importlib.import_module(module), name)
        if any(hasattr(sys.modules.get(part), _STAND_IN) for part in (module, _COMPILED[operation])):
            return None, f"{package} is a stand-in of hcmen.mamba.shim"
        return found, None
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == package:
            return None, f"{package} is not installed (pip install --no-build-isolation 'hcmen[cuda]')"
        return None, f"{package} does not load: it needs {error.name}"
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        # A build for another PyTorch or CUDA shows itself as any of these.
        return None, f"{package} does not load: {reason_of(error)}"


def scan_limit(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    return_last_state: bool,
) -> str | None:
    """What about these arguments of a scan mamba_ssm does not take; None if it takes them."""
    if initial_state is not None:
        return "mamba_ssm takes no initial state"
    if A.shape[1] > _MAMBA_STATES:
        return f"mamba_ssm takes at most {_MAMBA_STATES} states, got {A.shape[1]}"
    learns = any(x is not None and x.requires_grad for x in (u, delta, A, B, C, D, delta_bias, z))
    if return_last_state and learns and torch.is_grad_enabled():
        return "mamba_ssm gives the last state no gradient"
    return None


def mamba_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    z: Tensor | None,
    *,
    delta_softplus: bool,
    reverse: bool,
    return_last_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan` by mamba_ssm's `selective_scan_fn`; a reverse scan is a scan of what is turned round."""
    function, _ = mamba_function("scan")
    assert function is not None

    def turned(x: Tensor) -> Tensor:
        """[b, t, ...] -> [b, ..., t], in the order of the scan."""
        return (x.flip(1) if reverse else x).movedim(1, -1).contiguous()

    found = function(
        turned(u),
        turned(delta),
        A.float().contiguous(),
        turned(B),
        turned(C),
        D=None if D is None else D.float(),
        z=None if z is None else turned(z),
        delta_bias=None if delta_bias is None else delta_bias.float(),
        delta_softplus=delta_softplus,
        return_last_state=return_last_state,
    )
    y: Tensor = (found[0] if return_last_state else found).transpose(1, 2)
    y = y.flip(1) if reverse else y
    return (y, found[1]) if return_last_state else y


def dual_as_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    *,
    delta_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> tuple[Any, ...]:
    """A state space dual as the scan of head * head_dim channels, whose step sizes and rates are those of their heads.

    Returns:
        u, delta, A, B, C, D, delta_bias, z, initial_state of `selective_scan`; delta is whole, delta_bias None.
    """
    batch, time, head, dim = x.shape
    step = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    if delta_softplus:
        step = F.softplus(step, beta=1.0, threshold=20.0)
    step = step.clamp(dt_min, dt_max)
    return (
        x.reshape(batch, time, head * dim),
        step[..., None].expand(batch, time, head, dim).reshape(batch, time, head * dim),
        A[:, None, None].expand(head, dim, B.shape[3]).reshape(head * dim, B.shape[3]),
        B,
        C,
        None if D is None else (D if D.dim() == 2 else D[:, None].expand(head, dim)).reshape(head * dim),
        None,
        None if z is None else z.reshape(batch, time, head * dim),
        None if initial_state is None else initial_state.reshape(batch, head * dim, B.shape[3]),
    )


def conv_limit(weight: Tensor, stateful: bool) -> str | None:
    """As `scan_limit`, for a convolution."""
    if stateful:
        # Its newer versions do, of multiples of 8 channels in a layout of their own.
        return "causal_conv1d takes no state in all of its versions and layouts"
    taps = weight.shape[1]
    return None if taps in _MAMBA_TAPS else f"causal_conv1d takes 2 to 4 taps, got {taps}"


def mamba_conv(x: Tensor, weight: Tensor, bias: Tensor, *, activation: str, reverse: bool) -> Tensor:
    """`causal_conv1d` by causal_conv1d's `causal_conv1d_fn`."""
    function, _ = mamba_function("convolution")
    assert function is not None
    # Contiguous: its other layout, channels last, wants multiples of 8 channels.
    series = (x.flip(1) if reverse else x).transpose(1, 2).contiguous()
    y: Tensor = function(
        series,
        weight.float().contiguous(),
        bias.float().contiguous(),
        activation="silu" if activation == "silu" else None,
    ).transpose(1, 2)
    return y.flip(1) if reverse else y
