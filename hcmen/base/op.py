"""The operators of docs/op.md as tables: names, order, types, shapes, attributes, and what makes a tensor be there.

Every face of an operator in Python reads them: PyTorch ops, ONNX nodes, function bodies, the C structures, AOT plugins,
self-checks. runtime/csrc/op_table.h is the same in C++; tests/base/test_op_table.py holds both and docs/op.md together.

They are NamedTuples since every cold start defines them: 0.2 ms each, where a frozen dataclass takes 0.9.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

__all__ = [
    "CAUSAL_CONV1D",
    "DERIVED_SIZES",
    "DOMAIN",
    "IR_VERSION",
    "LATER_ATTRIBUTES",
    "OPERATORS",
    "OPSET",
    "PARSER_ATTRIBUTES",
    "SELECTIVE_SCAN",
    "STATE_SPACE_DUAL",
    "VERSION",
    "Attribute",
    "Operator",
    "Tensor",
]

DOMAIN = "hcmen"
VERSION = 1
OPSET = 19
"""The opset of ONNX that models are written in, which ONNX Runtime 1.17 reads."""
IR_VERSION = 9
"""The newest version of the file format that ONNX Runtime 1.17 reads."""
PARSER_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}
"""Attributes that every node has for TensorRT's parser, with their values."""
DERIVED_SIZES = {"width - 1": ("width", -1)}
"""Sizes that follow from another one: name -> (that one, what is added to it)."""


class Attribute(NamedTuple):
    """words: what a string may be, the default first. number: the default of a float, which may be any number but NaN.
    Neither: an integer, 0 (the default) or 1."""

    name: str
    words: tuple[str, ...] = ()
    number: float | None = None

    @property
    def choices(self) -> tuple[int, ...] | tuple[str, ...]:
        """What it may be, the default first; not for a float."""
        return self.words or (0, 1)

    @property
    def default(self) -> int | str | float:
        """What it is where a node does not have it."""
        return self.choices[0] if self.number is None else self.number

    @property
    def flag(self) -> str:
        """What says that it is not its default: the name of that, as the kernels have it."""
        return self.words[-1] if self.words else self.name


class Tensor(NamedTuple):
    """An input or output.

    sizes: what its dimensions are called; "group" may be left out of a shape, which means one group. shared: float32 or
    float16, the same for all tensors of a node that are marked so; else float32. only_with: the attribute that is 1
    exactly if the tensor is there. spread: a shape may lack the last size, which means the same for all of it.
    """

    name: str
    sizes: tuple[str, ...]
    shared: bool = False
    only_with: str | None = None
    spread: bool = False


class Operator(NamedTuple):
    """attributes: those that kernels read, in their order. others: those of the model-local function."""

    name: str
    attributes: tuple[Attribute, ...]
    others: tuple[str, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def defaults(self) -> dict[str, int | str | float]:
        """name -> default of every attribute that kernels read."""
        return {attribute.name: attribute.default for attribute in self.attributes}

    @property
    def numbers(self) -> tuple[str, ...]:
        """The attributes that are floats, in their order."""
        return tuple(attribute.name for attribute in self.attributes if attribute.number is not None)

    @property
    def spread(self) -> tuple[str, ...]:
        """The inputs whose shape may lack the last size."""
        return tuple(tensor.name for tensor in self.inputs if tensor.spread)

    @property
    def wide(self) -> tuple[str, ...]:
        """What says in the C structures that such an input has it."""
        return tuple(f"wide_{name}" for name in self.spread)

    @property
    def switches(self) -> tuple[str, ...]:
        """What says how a kernel computes, in the order of the C structures: not what says which tensors are there."""
        presence = {tensor.only_with for tensor in (*self.inputs, *self.outputs)}
        return tuple(attribute.flag for attribute in self.attributes if attribute.name not in presence)

    @property
    def sizes(self) -> tuple[str, ...]:
        """The names of all sizes, in the order of the inputs, but of those that follow from others."""
        sizes = (size for tensor in self.inputs for size in tensor.sizes if size not in DERIVED_SIZES)
        return tuple(dict.fromkeys(sizes))

    def inputs_with(self, attributes: Mapping[str, object]) -> tuple[Tensor, ...]:
        """The inputs of a node with these attributes, in order; absent ones are 0."""
        return tuple(t for t in self.inputs if t.only_with is None or attributes.get(t.only_with))

    def outputs_with(self, attributes: Mapping[str, object]) -> tuple[Tensor, ...]:
        """The outputs of a node with these attributes, in order."""
        return tuple(t for t in self.outputs if t.only_with is None or attributes.get(t.only_with))


LATER_ATTRIBUTES = frozenset({("CausalConv1d", "stateful")})
"""(operator, attribute) that came after graphs were written: nodes have it only where it is not its default."""

_SERIES = ("batch", "time", "channel")
_PROJECTION = ("batch", "time", "group", "state")
_STATES = ("batch", "channel", "state")
_PAST = ("batch", "width - 1", "channel")

SELECTIVE_SCAN = Operator(
    "SelectiveScan",
    attributes=(Attribute("delta_softplus"), Attribute("reverse"), Attribute("gated"), Attribute("stateful")),
    others=("scan_input_directions", "scan_output_directions"),
    inputs=(
        Tensor("u", _SERIES, shared=True),
        Tensor("delta", _SERIES, shared=True),
        Tensor("A", ("channel", "state")),
        Tensor("B", _PROJECTION, shared=True),
        Tensor("C", _PROJECTION, shared=True),
        Tensor("D", ("channel",)),
        Tensor("delta_bias", ("channel",)),
        Tensor("z", _SERIES, shared=True, only_with="gated"),
        Tensor("initial_state", _STATES, only_with="stateful"),
    ),
    outputs=(
        Tensor("y", _SERIES, shared=True),
        Tensor("last_state", _STATES, only_with="stateful"),
    ),
)

CAUSAL_CONV1D = Operator(
    "CausalConv1d",
    attributes=(Attribute("activation", ("none", "silu")), Attribute("reverse"), Attribute("stateful")),
    others=("group", "pads"),
    inputs=(
        Tensor("x", _SERIES, shared=True),
        Tensor("weight", ("channel", "width")),
        Tensor("bias", ("channel",)),
        Tensor("initial_state", _PAST, only_with="stateful"),
    ),
    outputs=(
        Tensor("y", _SERIES, shared=True),
        Tensor("last_state", _PAST, only_with="stateful"),
    ),
)

_HEADS = ("batch", "time", "head", "head_dim")
_HEAD_STATES = ("batch", "head", "head_dim", "state")

STATE_SPACE_DUAL = Operator(
    "StateSpaceDual",
    attributes=(
        Attribute("delta_softplus"),
        Attribute("reverse"),
        Attribute("gated"),
        Attribute("stateful"),
        Attribute("dt_min", number=0.0),
        Attribute("dt_max", number=math.inf),
    ),
    others=("scan_input_directions", "scan_output_directions"),
    inputs=(
        Tensor("x", _HEADS, shared=True),
        Tensor("dt", ("batch", "time", "head"), shared=True),
        Tensor("A", ("head",)),
        Tensor("B", _PROJECTION, shared=True),
        Tensor("C", _PROJECTION, shared=True),
        Tensor("D", ("head", "head_dim"), spread=True),
        Tensor("dt_bias", ("head",)),
        Tensor("z", _HEADS, shared=True, only_with="gated"),
        Tensor("initial_state", _HEAD_STATES, only_with="stateful"),
    ),
    outputs=(
        Tensor("y", _HEADS, shared=True),
        Tensor("last_state", _HEAD_STATES, only_with="stateful"),
    ),
)

OPERATORS = {operator.name: operator for operator in (SELECTIVE_SCAN, CAUSAL_CONV1D, STATE_SPACE_DUAL)}
"""name -> operator."""
