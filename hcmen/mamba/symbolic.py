"""What torch.onnx.export is shown: one node hcmen::SelectiveScan or hcmen::CausalConv1d for each call (docs/op.md)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["OP_DOMAIN", "OP_VERSION", "symbolic_conv", "symbolic_scan"]

OP_DOMAIN = "hcmen"
OP_VERSION = 1


def _plugin_attributes(reverse: bool) -> dict[str, Any]:
    """Attributes of both ops; see docs/op.md."""
    return {"reverse": int(reverse), "plugin_namespace": OP_DOMAIN, "plugin_version": str(OP_VERSION)}


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
    delta_softplus: bool,
    reverse: bool,
    return_last_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """One hcmen::SelectiveScan node. A stateful node has both initial_state and last_state, any other has neither."""
    batch, _, channel = u.shape
    stateful = initial_state is not None or return_last_state
    inputs = [u, delta, A, B, C]
    inputs += [torch.zeros(channel) if x is None else x for x in (D, delta_bias)]
    if z is not None:
        inputs.append(z)
    if stateful:
        zeros = torch.zeros(batch, channel, A.shape[1])
        inputs.append(zeros if initial_state is None else initial_state)
    attributes = {
        **_plugin_attributes(reverse),
        "delta_softplus": int(delta_softplus),
        "gated": int(z is not None),
        "stateful": int(stateful),
    }
    # Scan's per-input directions, one for each of its four scanned inputs and its one scanned output; see
    # functions.py, whose body binds them by reference.
    attributes["scan_input_directions"] = [int(reverse)] * 4
    attributes["scan_output_directions"] = [int(reverse)]
    op = f"{OP_DOMAIN}::SelectiveScan"
    if not stateful:
        return torch.onnx.ops.symbolic(op, inputs, attributes, dtype=u.dtype, shape=u.shape, version=OP_VERSION)
    y, last_state = torch.onnx.ops.symbolic_multi_out(
        op,
        inputs,
        attributes,
        dtypes=(u.dtype, torch.float32),
        shapes=(u.shape, (batch, channel, A.shape[1])),
        version=OP_VERSION,
    )
    return (y, last_state) if return_last_state else y


def symbolic_conv(x: Tensor, weight: Tensor, bias: Tensor, *, activation: str, reverse: bool) -> Tensor:
    """One hcmen::CausalConv1d node for a call of `causal_conv1d`."""
    taps = weight.shape[1]
    attributes = {
        **_plugin_attributes(reverse),
        "activation": activation,
        # As Conv wants them: its attributes in the model-local function are bound to these by reference.
        "group": x.shape[2],
        "pads": [0, taps - 1] if reverse else [taps - 1, 0],
    }
    return torch.onnx.ops.symbolic(
        f"{OP_DOMAIN}::CausalConv1d",
        (x, weight, bias),
        attributes,
        dtype=x.dtype,
        shape=x.shape,
        version=OP_VERSION,
    )
