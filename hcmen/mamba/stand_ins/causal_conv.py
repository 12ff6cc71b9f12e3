"""causal_conv1d's functions on `hcmen.mamba.scan`, and the compiled module below them: channels before time.

Every argument list that causal_conv1d 1.0 to 1.6 had is served: they are told apart by their number of arguments, and
`causal_conv1d_fn` of 1.0 and 1.1 by where the activation's name stands.

Shapes: x, dout [batch, channel, time]; weight [channel, width]; bias [channel]; states [batch, channel, width - 1], and
of `causal_conv1d_update` [batch, channel, at least width - 1].
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hcmen.base.errors import InputError, shown
from hcmen.mamba.scan import causal_conv1d
from hcmen.mamba.stand_ins.arguments import PACKED, cast, not_served

__all__ = ["CUDA", "causal_conv1d_bwd_function", "causal_conv1d_fn", "causal_conv1d_fwd_function"]
__all__ += ["causal_conv1d_ref", "causal_conv1d_update", "causal_conv1d_update_function", "causal_conv1d_update_ref"]
__all__ += ["causal_conv1d_varlen_states"]


def _activation(name: Any) -> str:
    if name not in (None, False, True, "silu", "swish"):
        raise InputError(f"activation is {shown(name)}", "None, 'silu' or 'swish'")
    return "silu" if name else "none"


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, states: Tensor | None, activation: Any, last: bool
) -> tuple[Tensor, Tensor | None]:
    """y [batch, channel, time] in the dtype of x, and the last width - 1 inputs [batch, channel, width - 1]."""
    found = causal_conv1d(
        x.transpose(1, 2),
        weight,
        bias,
        None if states is None else states.transpose(1, 2),
        activation=_activation(activation),
        return_last_state=last,
    )
    y, state = found if isinstance(found, tuple) else (found, None)
    return y.transpose(1, 2), None if state is None else cast(state.transpose(1, 2), x.dtype)


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Any = None,
    initial_states: Any = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Any:
    """causal_conv1d's `causal_conv1d_fn`: y [batch, channel, time], or (y, final states).

    Raises:
        InputError: shapes disagree, or seq_idx came.
    """
    if isinstance(seq_idx, (str, bool)):  # 1.0: x, weight, bias, activation
        seq_idx, activation = None, seq_idx or None
    if isinstance(initial_states, (str, bool)):  # 1.1: x, weight, bias, seq_idx, activation
        initial_states, activation = None, initial_states or None
    not_served("seq_idx", seq_idx)
    y, last = _convolved(x, weight, bias, initial_states, activation, return_final_states)
    if not return_final_states:
        return y
    assert last is not None
    return y, last if final_states_out is None else final_states_out.copy_(last)


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Any = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Any:
    """As `causal_conv1d_fn`, whose order of arguments it has but for seq_idx."""
    return causal_conv1d_fn(x, weight, bias, None, initial_states, return_final_states, final_states_out, activation)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Any = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """causal_conv1d's `causal_conv1d_update`: one step or a few, x [batch, channel] or [batch, channel, time].

    `conv_state` has the inputs before, the last of them nearest; it is changed in place.

    Raises:
        InputError: shapes disagree, or cache_seqlens or conv_state_indices came.
    """
    not_served("cache_seqlens", cache_seqlens, "keep the last inputs in order, the newest last")
    not_served("conv_state_indices", conv_state_indices, "pass the states of these batch elements alone")
    past = weight.shape[1] - 1
    kept = conv_state.shape[-1]
    if conv_state.dim() != 3 or kept < past:
        want = f"[batch, channel, at least {past}], for {past + 1} taps"
        raise InputError(f"conv_state has shape {list(conv_state.shape)}", want)
    series = x[..., None] if x.dim() == 2 else x
    y, _ = _convolved(series, weight, bias, conv_state[..., kept - past :], activation, False)
    conv_state.copy_(torch.cat((conv_state, cast(series, conv_state.dtype)), dim=-1)[..., -kept:])
    return y[..., 0] if x.dim() == 2 else y


causal_conv1d_update_ref = causal_conv1d_update


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """Refuses: packed sequences are not served.

    Raises:
        InputError: always.
    """
    raise InputError("cu_seqlens came", "none, since packed sequences are not served", PACKED)


# --- the compiled module, and cpp_functions of 1.5 and later ----------------------------------------------------------


def causal_conv1d_fwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    final_states_out: Tensor | None,
    silu_activation: bool,
) -> Tensor:
    """y; the final states are written to the tensor that came for them."""
    not_served("seq_idx", seq_idx)
    y, last = _convolved(x, weight, bias, initial_states, silu_activation, final_states_out is not None)
    if final_states_out is not None:
        assert last is not None
        final_states_out.copy_(last)
    return y


def causal_conv1d_bwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    dfinal_states: Tensor | None,
    dx: Tensor | None,
    return_dinitial_states: bool,
    silu_activation: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias, dinitial_states), the last two None where there is nothing; dx is also written to `dx`."""
    not_served("seq_idx", seq_idx)
    with torch.enable_grad():
        leaves = [None if v is None else v.detach().requires_grad_() for v in (x, weight, bias, initial_states)]
        series, taps, shift, states = leaves
        assert series is not None
        assert taps is not None
        y, last = _convolved(series, taps, shift, states, silu_activation, dfinal_states is not None)
        outputs, outer = [y], [dout.to(y.dtype)]
        if dfinal_states is not None:
            assert last is not None
            outputs, outer = [y, last], [*outer, dfinal_states.to(last.dtype)]
        found = iter(torch.autograd.grad(outputs, [v for v in leaves if v is not None], outer))
        grads = [None if v is None else next(found) for v in leaves]
    assert grads[0] is not None
    assert grads[1] is not None
    first = grads[0] if dx is None else dx.copy_(grads[0])
    return first, grads[1], grads[2], grads[3] if return_dinitial_states else None


def causal_conv1d_update_function(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu_activation: bool,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    return causal_conv1d_update(x, conv_state, weight, bias, silu_activation, cache_seqlens, conv_state_indices)


def _unknown(name: str, arguments: tuple[Any, ...], served: str) -> InputError:
    what = f"causal_conv1d_cuda.{name} was called with {len(arguments)} arguments"
    return InputError(what, f"{served}, as causal_conv1d 1.0 to 1.6 have it")


def _forward(*arguments: Any) -> Tensor | None:
    if len(arguments) == 8:
        x, weight, bias, seq_idx, states, out, final_states, silu = arguments
        out.copy_(causal_conv1d_fwd_function(x, weight, bias, seq_idx, states, final_states, silu))
        return None
    if len(arguments) not in (4, 5, 7):
        raise _unknown("causal_conv1d_fwd", arguments, "4, 5, 7 or 8")
    x, weight, bias, *middle, silu = arguments
    seq_idx, states, final_states = (*middle, None, None, None)[:3]
    return causal_conv1d_fwd_function(x, weight, bias, seq_idx, states, final_states, silu)


def _backward(*arguments: Any) -> tuple[Tensor | None, ...] | None:
    if len(arguments) == 12:
        x, weight, bias, dout, seq_idx, states, dfinal, dx, dweight, dbias, dinitial, silu = arguments
        found = causal_conv1d_bwd_function(
            x, weight, bias, dout, seq_idx, states, dfinal, None, dinitial is not None, silu
        )
        for given, value in zip((dx, dweight, dbias, dinitial), found, strict=True):
            if given is not None and value is not None:
                given.copy_(value)
        return None
    if len(arguments) == 10:
        return causal_conv1d_bwd_function(*arguments)
    if len(arguments) not in (6, 7):
        raise _unknown("causal_conv1d_bwd", arguments, "6, 7, 10 or 12")
    x, weight, bias, dout, *middle, dx, silu = arguments
    seq_idx = middle[0] if middle else None
    return causal_conv1d_bwd_function(x, weight, bias, dout, seq_idx, None, None, dx, False, silu)[:3]


def _update(*arguments: Any) -> Tensor | None:
    if len(arguments) == 8:
        x, conv_state, weight, bias, out, silu, *others = arguments
        out.copy_(causal_conv1d_update(x, conv_state, weight, bias, silu, *others))
        return None
    if len(arguments) not in (5, 6, 7):
        raise _unknown("causal_conv1d_update", arguments, "5 to 8")
    return causal_conv1d_update(*arguments)


CUDA = SimpleNamespace(causal_conv1d_fwd=_forward, causal_conv1d_bwd=_backward, causal_conv1d_update=_update)
"""What causal_conv1d_cuda has."""
