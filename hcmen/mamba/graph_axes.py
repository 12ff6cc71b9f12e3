"""Nodes that only say where numbers lie, and what a Reshape does to the axes of a shape.

A value may be a move of another: with its axes in another order, from its last index to its first, or with its first
axes merged into one. graph_moves.py takes such moves through other nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnxscript import ir

from hcmen.mamba.graph_edit import Array, Editor, Size, attribute, constant, is_node, shape_of

__all__ = ["Flip", "Merge", "Move", "Permute", "blocks_of", "flip_axis", "moved", "perm_of"]


@dataclass(frozen=True)
class Permute:
    """value = Transpose(source, perm)."""

    perm: tuple[int, ...]

    def axis(self, axis: int) -> int | None:
        """Which axis of the source a node may work on to work on this axis of the value."""
        return self.perm[axis]

    def operand(self, array: Array) -> Array:
        """What a constant that is broadcast to the value becomes, to be broadcast to the source."""
        rank = len(self.perm)
        wide = array.reshape((1,) * (rank - array.ndim) + array.shape).transpose(np.argsort(self.perm))
        first = next((i for i, size in enumerate(wide.shape) if size != 1), rank - 1)
        found: Array = wide.reshape(wide.shape[first:])
        return found

    def put(self, before: ir.Node, value: ir.Value, editor: Editor) -> ir.Value:
        """The move of a value, as a new node before another."""
        return editor.transpose(before, value, self.perm)


@dataclass(frozen=True)
class Flip:
    """value = source from its last index of an axis to its first."""

    flipped: int

    def axis(self, axis: int) -> int | None:
        """The same axis; None: what a node does along the flipped one may depend on the order."""
        return None if axis == self.flipped else axis

    def put(self, before: ir.Node, value: ir.Value, editor: Editor) -> ir.Value:
        """The move of a value, as a new node before another."""
        return editor.flip(before, value, self.flipped)


@dataclass(frozen=True)
class Merge:
    """value = Reshape(source) that makes one axis of the first `count`."""

    count: int
    merged: Size

    def axis(self, axis: int) -> int | None:
        """The axis of the source; None: it is several there."""
        return None if axis == 0 else axis + self.count - 1

    def put(self, before: ir.Node, value: ir.Value, editor: Editor) -> ir.Value:
        """The move of a value, as a new node before another."""
        rest = (shape_of(value) or [])[self.count :]
        target = editor.constant([-1, *rest], np.int64)
        return editor.node(before, "Reshape", [value, target], shapes=[[self.merged, *rest]])[0]


Move = Permute | Flip | Merge


def moved(value: ir.Value | None) -> tuple[ir.Value, Move] | None:
    """What the value is a move of."""
    shape = shape_of(value)
    if value is None or shape is None:
        return None
    if (node := is_node(value, "Transpose")) is not None:
        source = node.inputs[0]
        return None if source is None or shape_of(source) is None else (source, Permute(perm_of(node, len(shape))))
    if (axis := flip_axis(value)) is not None:
        source = value.producer().inputs[0]  # type: ignore[union-attr]
        return None if source is None or shape_of(source) is None else (source, Flip(axis))
    if (node := is_node(value, "Reshape")) is not None:
        source, before = node.inputs[0], shape_of(node.inputs[0])
        count = 0 if before is None else len(before) - len(shape) + 1
        if source is None or before is None or count < 2 or len(shape) < 2 or before[count:] != shape[1:]:
            return None
        if all(isinstance(size, int) for size in shape[1:]):
            return source, Merge(count, shape[0])
    return None


def perm_of(node: ir.Node, rank: int) -> tuple[int, ...]:
    """The order in which a Transpose puts the axes of a value of this rank."""
    return tuple(attribute(node, "perm", range(rank)[::-1]))


def flip_axis(value: ir.Value) -> int | None:
    """The axis that the value's node flips, None if it is no flip of one whole axis."""
    node = is_node(value, "Slice")
    shape = shape_of(value)
    if node is None or shape is None or len(node.inputs) < 5:
        return None
    bounds = [constant(x) for x in node.inputs[1:5]]
    if any(x is None or x.shape != (1,) for x in bounds):
        return None
    start, stop, axis, step = (int(x[0]) for x in bounds if x is not None)
    return axis % len(shape) if start == -1 and stop < -(1 << 31) and step == -1 else None


Block = tuple[list[int], list[int]]


def blocks_of(before: Sequence[Size], after: Sequence[Size]) -> list[Block] | None:
    """The groups of axes that a Reshape makes groups of axes of, each as short as can be; None if names do not say."""
    blocks: list[Block] = []
    i = j = 0
    spare: list[int] = []  # axes of size 1 that come from nothing join the next group
    while i < len(before) or j < len(after):
        left, right = len(before) - i, len(after) - j
        spans = sorted(
            ((a, b) for a in range(left + 1) for b in range(right + 1) if a + b), key=lambda s: (s != (1, 1), sum(s))
        )
        span = next((s for s in spans if _product_of(before[i : i + s[0]]) == _product_of(after[j : j + s[1]])), None)
        if span is None:
            return None
        inside, outside = list(range(i, i + span[0])), list(range(j, j + span[1]))
        i, j = i + span[0], j + span[1]
        if not inside:
            spare += outside
            continue
        blocks.append((inside, [*spare, *outside]))
        spare = []
    if spare and blocks:
        blocks[-1] = (blocks[-1][0], [*blocks[-1][1], *spare])
    return blocks if blocks else None


def _product_of(sizes: Sequence[Size]) -> tuple[int, Counter[str]]:
    """A product of sizes as a number and the names that it is multiplied with."""
    number, names = 1, Counter[str]()
    for factor in (factor for size in sizes for factor in _factors(str(size))):
        if factor.isdigit():
            number *= int(factor)
        else:
            names[factor] += 1
    return number, names


def _factors(size: str) -> list[str]:
    """What a size is a product of: `((height - 1)//4 + 1)*width` is two factors, `height*2 + 1` is one."""
    depth, last, factors, sums = 0, 0, [], False
    for at, sign in enumerate(size):
        depth += (sign == "(") - (sign == ")")
        sums |= depth == 0 and sign in "+-/%"
        if depth == 0 and sign == "*":
            factors.append(size[last:at])
            last = at + 1
    factors = [part.strip() for part in [*factors, size[last:]]]
    if sums or not all(factors):  # also of a power: a**2 has an empty factor
        return [size]
    if len(factors) > 1:
        return [one for part in factors for one in _factors(part)]
    return _factors(size.strip()[1:-1]) if _is_wrapped(size.strip()) else [size.strip()]


def _is_wrapped(size: str) -> bool:
    """Whether its first bracket is closed by its last sign."""
    depth = 0
    for at, sign in enumerate(size):
        depth += (sign == "(") - (sign == ")")
        if depth == 0:
            return at == len(size) - 1 and at > 1
    return False
