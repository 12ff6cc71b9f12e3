"""What torch.onnx.export is shown: one node hcmen::SelectiveScan or hcmen::CausalConv1d for each call (docs/op.md)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hcmen.base.op import CAUSAL_CONV1D, DOMAIN, PARSER_ATTRIBUTES, SELECTIVE_SCAN, VERSION

__all__ = ["symbolic_conv", "symbolic_scan"]


def symbolic_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    *,
    return_last_state: bool,
    **switches: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """One hcmen::SelectiveScan node. A stateful node has both initial_state and last_state, any other has neither.

    switches: the attributes besides those that say which tensors are there.
    """
    batch, _, channel = u.shape
    stateful = initial_state is not None or return_last_state
    inputs = [u, delta, A, B, C]
    inputs += [torch.zeros(channel) if x is None else x for x in (D, delta_bias)]
    if z is not None:
        inputs.append(z)
    if stateful:
        zeros = torch.zeros(batch, channel, A.shape[1])
        inputs.append(zeros if initial_state is None else initial_state)
    attributes: dict[str, Any] = {
        "reverse": 0,  # its place alone: in this order a graph has the bytes that it always had
        **PARSER_ATTRIBUTES,
        **{name: int(on) for name, on in switches.items()},
        "gated": int(z is not None),
        "stateful": int(stateful),
    }
    # Scan's per-input directions, one for each of its four scanned inputs and its one scanned output; see
    # functions.py, whose body binds them by reference.
    attributes["scan_input_directions"] = [attributes["reverse"]] * 4
    attributes["scan_output_directions"] = [attributes["reverse"]]
    op = f"{DOMAIN}::{SELECTIVE_SCAN.name}"
    if not stateful:
        return torch.onnx.ops.symbolic(op, inputs, attributes, dtype=u.dtype, shape=u.shape, version=VERSION)
    y, last_state = torch.onnx.ops.symbolic_multi_out(
        op,
        inputs,
        attributes,
        dtypes=(u.dtype, torch.float32),
        shapes=(u.shape, (batch, channel, A.shape[1])),
        version=VERSION,
    )
    return (y, last_state) if return_last_state else y


def symbolic_conv(x: Tensor, weight: Tensor, bias: Tensor, *, activation: str, reverse: bool) -> Tensor:
    """One hcmen::CausalConv1d node for a call of `causal_conv1d`."""
    taps = weight.shape[1]
    attributes: dict[str, Any] = {
        "reverse": int(reverse),
        **PARSER_ATTRIBUTES,
        "activation": activation,
        # As Conv wants them: its attributes in the model-local function are bound to these by reference.
        "group": x.shape[2],
        "pads": [0, taps - 1] if reverse else [taps - 1, 0],
    }
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{CAUSAL_CONV1D.name}",
        (x, weight, bias),
        attributes,
        dtype=x.dtype,
        shape=x.shape,
        version=VERSION,
    )
