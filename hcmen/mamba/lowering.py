"""What exporters are shown: one node of docs/op.md for each call of a `torch.ops.hcmen` operator, by hcmen/base/op.py.

torch.onnx.export replaces operators that ONNX does not know by their decompositions. The ones registered here become
nodes, in a model exported at once and in a program of torch.export alike, also in one that was loaded from a file.
`STANDARD` holds what standard ONNX says and PyTorch's exporter lacks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from onnxscript import opset18
from torch import Tensor
from torch._decomp import decomposition_table, meta_table

from hcmen.base.op import (
    CAUSAL_CONV1D,
    DOMAIN,
    LATER_ATTRIBUTES,
    OPERATORS,
    PARSER_ATTRIBUTES,
    SELECTIVE_SCAN,
    STATE_SPACE_DUAL,
    VERSION,
    Operator,
)

# It makes the custom ops.
from hcmen.mamba import native  # noqa: F401

__all__ = ["STANDARD", "custom_op"]

_Sizes = Mapping[str, Any]


def custom_op(op: Operator) -> Any:
    """`torch.ops.hcmen`'s operator of `op`, or None where there is none: SelectiveScan is selective_scan there."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", op.name).lower()
    found = getattr(torch.ops, DOMAIN)
    return getattr(found, name).default if hasattr(found, name) else None


def _scan_directions(attributes: Mapping[str, Any], sizes: _Sizes) -> dict[str, Any]:
    # One for each scanned input and output of the standard Scan in the function's body, which binds them.
    reverse = attributes["reverse"]
    return {"scan_input_directions": [reverse] * 4, "scan_output_directions": [reverse]}


def _conv_sizes(attributes: Mapping[str, Any], sizes: _Sizes) -> dict[str, Any]:
    # As the standard Conv in the function's body wants them.
    past = sizes["width"] - 1
    return {"group": sizes["channel"], "pads": [0, past] if attributes["reverse"] else [past, 0]}


_OTHERS: dict[str, Callable[[Mapping[str, Any], _Sizes], dict[str, Any]]] = {
    SELECTIVE_SCAN.name: _scan_directions,
    STATE_SPACE_DUAL.name: _scan_directions,
    CAUSAL_CONV1D.name: _conv_sizes,
}
"""Operator -> its attributes that only the model-local function reads."""


def _sizes(op: Operator, tensors: tuple[Any, ...]) -> dict[str, Any]:
    """name -> size, as the tensors have them."""
    found: dict[str, Any] = {}
    for tensor, x in zip(op.inputs, tensors, strict=True):
        if x is not None:
            lacks_group = x.dim() == len(tensor.sizes) - 1
            names = [name for name in tensor.sizes if not (lacks_group and name == "group")]
            if len(names) == x.dim():
                found.update(zip(names, x.shape, strict=True))
    return found


def _attributes(op: Operator, tensors: tuple[Any, ...], switches: tuple[Any, ...]) -> dict[str, Any]:
    """What a node has for such a call: presence by the tensors that are there, the rest by the switches."""
    there = {t.only_with: int(x is not None) for t, x in zip(op.inputs, tensors, strict=True) if t.only_with}
    by_flag = dict(zip(op.switches, switches, strict=True))
    attributes: dict[str, Any] = {
        "reverse": 0,  # its place alone: in this order a graph has the bytes that it always had
        **PARSER_ATTRIBUTES,
    }
    for attribute in op.attributes:
        value = there[attribute.name] if attribute.name in there else by_flag[attribute.flag]
        if not value and (op.name, attribute.name) in LATER_ATTRIBUTES:
            continue
        if attribute.words:
            value = attribute.words[int(value)]
        attributes[attribute.name] = int(value) if isinstance(value, bool) else value
    return attributes


def _as_node(op: Operator, returned: int, *inputs: Any) -> Any:
    """The call as a node. An output that the node lacks is empty, and nothing reads it."""
    tensors, switches = inputs[: len(op.inputs)], inputs[len(op.inputs) :]
    first, sizes, attributes = tensors[0], _sizes(op, tensors), _attributes(op, tensors, switches)
    attributes |= _OTHERS[op.name](attributes, sizes) if op.name in _OTHERS else {}
    made = op.outputs_with(attributes)
    shapes = [tuple(sizes[name] for name in t.sizes) for t in made]
    dtypes = [first.dtype if t.shared else torch.float32 for t in made]
    named, given = f"{DOMAIN}::{op.name}", [x for x in tensors if x is not None]
    outputs: Sequence[Tensor]
    if len(made) == 1:
        y = torch.onnx.ops.symbolic(named, given, attributes, dtype=dtypes[0], shape=shapes[0], version=VERSION)
        outputs = [y]
    else:
        outputs = torch.onnx.ops.symbolic_multi_out(
            named, given, attributes, dtypes=dtypes, shapes=shapes, version=VERSION
        )
    # PyTorch takes what a node makes for a tensor on the CPU.
    outputs = [x.to(first.device) for x in outputs]
    outputs += [first.new_empty(0) for _ in range(returned - len(outputs))]
    return tuple(outputs) if returned > 1 else outputs[0]


def _register(op: Operator) -> None:
    overload = custom_op(op)
    if overload is not None:
        decomposition_table[overload] = partial(_as_node, op, len(overload._schema.returns))
        # Without this, tensors without content would be sent to the decomposition, in torch.compile too.
        meta_table[overload] = overload


for _operator in OPERATORS.values():
    _register(_operator)


def _stable_sort(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """A sort as TopK of all: of equal values it puts the lower index first, as a stable sort does, either way."""
    op: Any = opset18
    size = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
    return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)


STANDARD: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.aten.sort.stable: _stable_sort}
"""PyTorch's operator -> what makes its standard nodes, for torch.onnx.export's `custom_translation_table`.

`sort(stable=False)` is the same overload of PyTorch. Its order among equals is no one's promise: verification tells."""
