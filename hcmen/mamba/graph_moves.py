"""Transposes, flips and merged axes are moved down a graph until they meet what undoes them.

Three kinds of node only say where numbers lie: a Transpose, a flip (Slice with step -1) and a Reshape that merges the
leading axes. Each commutes with most other nodes. A rule here takes one of them from above a node to below it. Models
that work channels first lose their transposes so: each scan has one above and one below, which meet between two scans.
A flip above a scan and a convolution becomes one below them and their attribute `reverse`, and meets the flip of y.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from onnxscript import ir

from hcmen.base.op import DOMAIN, OPERATORS, SELECTIVE_SCAN
from hcmen.mamba.graph_axes import Flip, Merge, Move, Permute, blocks_of, flip_axis, moved
from hcmen.mamba.graph_edit import Editor, Size, attribute, constant, is_node, shape_of

__all__ = ["BINARY", "UNARY", "again", "cancel_moves", "resized"]

UNARY = frozenset(
    (
        *("Abs", "Cast", "Clip", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu"),
        *("Log", "Neg", "Reciprocal", "Relu", "Sigmoid", "Softplus", "Sqrt", "Tanh"),
    )
)
BINARY = frozenset(("Add", "Sub", "Mul", "Div", "Pow"))
_REDUCE = frozenset(("ReduceMean", "ReduceSum", "ReduceMax"))


def cancel_moves(graph: ir.Graph) -> None:
    """Moves every transpose, flip and merge down as far as it goes; those that meet their inverse are gone."""
    editor = Editor(graph)
    for _ in range(500):
        changed = False
        for node in list(graph):
            if node.graph is graph and any(x.uses() or x.is_graph_output() for x in node.outputs):
                changed |= _sink(node, editor)
        if not changed:
            break
    _raise_above_splits(graph, editor)


def _sink(node: ir.Node, editor: Editor) -> bool:
    if node.domain == DOMAIN:
        return _one_group(node) or _operator(node, editor)
    if node.domain not in ("", "ai.onnx") or not node.inputs:
        return False
    kind = node.op_type
    if kind == "Transpose":
        return _transpose(node, editor)
    if kind == "Reshape" and _reshape(node, editor):
        return True
    if kind in ("MatMul", "Gemm"):
        return _product(node, editor)
    if kind in BINARY:
        return _binary(node, editor)
    if kind == "Concat":
        return _concat(node, editor)
    found = moved(node.inputs[0])
    if found is None:
        return False
    source, move = found
    if kind in UNARY:
        return _same(node, editor, source, move)
    if kind == "Slice":
        return _slice(node, editor, source, move)
    if kind in ("Split", "Softmax", "LogSoftmax", "LayerNormalization"):
        return _along(node, editor, source, move)
    if kind == "Conv" and isinstance(move, Flip):
        return _pointwise(node, editor, source, move)
    if kind in _REDUCE or kind in ("Gather", "Squeeze", "Unsqueeze"):
        return _rank(node, editor, source, move)
    return False


def _settle(node: ir.Node, editor: Editor, values: Sequence[ir.Value], move: Move) -> bool:
    """Puts the move below: the node's outputs are moves of the values."""
    for old, value in zip(node.outputs, values, strict=True):
        if old.uses() or old.is_graph_output():
            new = move.put(node, value, editor)
            new.type = old.type
            editor.replace(old, new)
    editor.graph.remove(node, safe=True)
    return True


def again(
    node: ir.Node,
    editor: Editor,
    inputs: Sequence[ir.Value | None],
    shapes: Sequence[Any],
    before: ir.Node | None = None,
    **changed: Any,
) -> Sequence[ir.Value]:
    """A copy of the node with other inputs and attributes; before: where it stands, if not beside the node."""
    attributes = {name: found.value for name, found in node.attributes.items()} | changed
    made = editor.node(before or node, node.op_type, inputs, attributes, shapes=shapes, domain=node.domain)
    for new, old in zip(made, node.outputs, strict=True):
        new.type = old.type
    return made


# --- nodes that work on elements ------------------------------------------------------------------------------------


def _same(node: ir.Node, editor: Editor, source: ir.Value, move: Move) -> bool:
    made = again(node, editor, [source, *node.inputs[1:]], [shape_of(source)])
    return _settle(node, editor, made, move)


def _binary(node: ir.Node, editor: Editor) -> bool:
    first, second = node.inputs
    found = [moved(first), moved(second)]
    if found[0] is not None and found[1] is not None and found[0][1] == found[1][1]:
        (x, move), (y, _) = found[0], found[1]
        left, right = shape_of(x) or [], shape_of(y) or []
        same = move.count if isinstance(move, Merge) else 0
        if len(left) != len(right) or left[:same] != right[:same]:
            return False
        return _settle(node, editor, again(node, editor, [x, y], [_broadcast(left, right)]), move)
    for i in (0, 1):
        one, other = found[i], node.inputs[1 - i]
        if one is None:
            continue
        source, move = one
        operand = _operand(other, move, shape_of(node.inputs[i]), editor)
        if operand is not None:
            pair = [source, operand] if i == 0 else [operand, source]
            sizes = _broadcast(shape_of(source) or [], shape_of(operand) or [])
            return _settle(node, editor, again(node, editor, pair, [sizes]), move)
    return False


def _broadcast(x: list[Size], y: list[Size]) -> list[Size]:
    rank = max(len(x), len(y))
    pairs = zip([1] * (rank - len(x)) + x, [1] * (rank - len(y)) + y, strict=True)
    return [b if a == 1 else a for a, b in pairs]


def _operand(value: ir.Value | None, move: Move, shape: list[Size] | None, editor: Editor) -> ir.Value | None:
    """The other operand of a node where the move is gone from the first, which had the shape; None: it has to stay."""
    sizes = shape_of(value)
    if value is None or sizes is None or shape is None or len(sizes) > len(shape):
        return None
    if prod(size if isinstance(size, int) else 2 for size in sizes) == 1 and len(sizes) <= 1:
        return value
    if isinstance(move, Permute):
        array = constant(value)
        return None if array is None else editor.constant(move.operand(array))
    at = (move.flipped if isinstance(move, Flip) else 0) - (len(shape) - len(sizes))
    if at >= 0 and (sizes[at] != 1 or isinstance(move, Merge)):
        return None
    return value if isinstance(move, Flip) or constant(value) is not None else None


def _concat(node: ir.Node, editor: Editor) -> bool:
    found = [moved(x) for x in node.inputs]
    moves = {one[1] for one in found if one is not None}
    if None in found or len(moves) != 1:
        return False
    move, rank = moves.pop(), len(shape_of(node.outputs[0]) or [])
    axis = move.axis(attribute(node, "axis", 0) % rank) if rank else None
    sources = [one[0] for one in found if one is not None]
    if axis is None or isinstance(move, Merge):
        return False
    shape = list(shape_of(sources[0]) or [])
    total = [(shape_of(x) or [])[axis] for x in sources]
    shape[axis] = sum(total) if all(isinstance(size, int) for size in total) else "+".join(map(str, total))  # type: ignore[arg-type]
    return _settle(node, editor, again(node, editor, sources, [shape], axis=axis), move)


# --- nodes that work along axes -------------------------------------------------------------------------------------


def _along(node: ir.Node, editor: Editor, source: ir.Value, move: Move) -> bool:
    """Split, Softmax, LayerNormalization: the attribute `axis` says where."""
    rank, inner, split = len(shape_of(node.inputs[0]) or []), shape_of(source) or [], node.op_type == "Split"
    outer = attribute(node, "axis", 0 if split else -1) % rank
    axis = move.axis(outer)
    if axis is None:
        return False
    if node.op_type == "LayerNormalization" and (axis != len(inner) - 1 or any(x.uses() for x in node.outputs[1:])):
        return False
    sizes = [(shape_of(output) or [])[outer : outer + 1] if split else [inner[axis]] for output in node.outputs]
    shapes = [[*inner[:axis], *size, *inner[axis + 1 :]] if size else None for size in sizes]
    if None in shapes:
        return False
    return _settle(node, editor, again(node, editor, [source, *node.inputs[1:]], shapes, axis=axis), move)


def _slice(node: ir.Node, editor: Editor, source: ir.Value, move: Move) -> bool:
    shape, inner = shape_of(node.outputs[0]), shape_of(source) or []
    axes = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    if shape is None or axes is None:
        return False
    mine = flip_axis(node.outputs[0])
    if isinstance(move, Flip) and mine is not None:
        if mine == move.flipped:
            editor.replace(node.outputs[0], source)
            return True
        return False  # two flips in a row stay in their order
    within = [move.axis(int(axis) % len(shape)) for axis in axes]
    if any(axis is None for axis in within):
        return False
    sizes = list(inner)
    for axis, outer in zip(within, axes, strict=True):
        sizes[axis] = shape[int(outer) % len(shape)]  # type: ignore[index]
    inputs = [source, *node.inputs[1:3], editor.constant(within, np.int64), *node.inputs[4:]]
    return _settle(node, editor, again(node, editor, inputs, [sizes]), move)


def _pointwise(node: ir.Node, editor: Editor, source: ir.Value, move: Flip) -> bool:
    """A convolution of one tap does not see in which order the places come."""
    taps, shape = shape_of(node.inputs[1]), shape_of(node.outputs[0])
    plain = not any(attribute(node, "pads", ())) and set(attribute(node, "strides", (1,))) == {1}
    if move.flipped < 2 or taps is None or set(taps[2:]) != {1} or shape is None or not plain:
        return False
    return _settle(node, editor, again(node, editor, [source, *node.inputs[1:]], [shape]), move)


def _rank(node: ir.Node, editor: Editor, source: ir.Value, move: Move) -> bool:
    """Nodes that take axes away, keep one of size 1 or add one: below them a transpose has another rank."""
    if isinstance(move, Flip):
        return _flip_past(node, editor, source, move)
    if not isinstance(move, Permute):
        return False
    rank, inner, kind = len(move.perm), shape_of(source) or [], node.op_type
    if kind == "Gather":
        index = constant(node.inputs[1])
        if index is None or index.ndim:
            return False
        axis = move.perm[attribute(node, "axis", 0) % rank]
        made = again(node, editor, [source, node.inputs[1]], [_without(inner, [axis])], axis=axis)
        return _settle(node, editor, made, _permute_without(move, [axis]))
    array = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    axes = attribute(node, "axes", None) if array is None else array.reshape(-1).tolist()
    if axes is None:
        return False
    if kind == "Unsqueeze":
        if len(axes) != 1:
            return False
        at = int(axes[0]) % (rank + 1)
        place = move.perm[at] if at < rank else rank
        perm = [axis + (axis >= place) for axis in move.perm]
        perm.insert(at, place)
        made = again(node, editor, [source, editor.constant([place], np.int64)], [[*inner[:place], 1, *inner[place:]]])
        return _settle(node, editor, made, Permute(tuple(perm)))
    within = [move.perm[int(axis) % rank] for axis in axes]
    kept = kind != "Squeeze" and attribute(node, "keepdims", 1)
    shape = [1 if i in within else size for i, size in enumerate(inner)] if kept else _without(inner, within)
    if array is None:
        made = again(node, editor, [source], [shape], axes=within)
    else:
        made = again(node, editor, [source, editor.constant(within, np.int64)], [shape])
    return _settle(node, editor, made, move if kept else _permute_without(move, within))


def _flip_past(node: ir.Node, editor: Editor, source: ir.Value, move: Flip) -> bool:
    """A flip goes below a Gather of one index of another axis, and below an Unsqueeze."""
    shape, inner = shape_of(node.outputs[0]), shape_of(source) or []
    array = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if shape is None or array is None:
        return False
    if node.op_type == "Gather" and not array.ndim:
        axis = attribute(node, "axis", 0) % len(inner)
        if axis == move.flipped:
            return False
        below = move.flipped - (axis < move.flipped)
    elif node.op_type == "Unsqueeze":
        new = {int(axis) % len(shape) for axis in array.reshape(-1)}
        below = [axis for axis in range(len(shape)) if axis not in new][move.flipped]
    else:
        return False
    return _settle(node, editor, again(node, editor, [source, node.inputs[1]], [shape]), Flip(below))


def _without(items: Sequence[Size], gone: Sequence[int]) -> list[Size]:
    return [item for i, item in enumerate(items) if i not in gone]


def _permute_without(move: Permute, gone: Sequence[int]) -> Permute:
    left = [axis for axis in move.perm if axis not in gone]
    return Permute(tuple(sorted(left).index(axis) for axis in left))


# --- products, transposes, reshapes ---------------------------------------------------------------------------------


def _product(node: ir.Node, editor: Editor) -> bool:
    left, right = node.inputs[:2]
    weight, found = constant(right), moved(left)
    if node.op_type == "Gemm":
        plain = attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1.0 and not attribute(
            node, "transA", 0
        )
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if not plain or weight is None or found is None or not isinstance(found[1], Merge):
            return False
        if bias is not None and len(shape_of(bias) or [0, 0]) != 1:
            return False
        matrix = weight.T if attribute(node, "transB", 0) else weight
        shape = [*(shape_of(found[0]) or [])[:-1], matrix.shape[1]]
        made = editor.node(node, "MatMul", [found[0], editor.constant(np.ascontiguousarray(matrix))], shapes=[shape])
        if bias is not None:
            made = editor.node(node, "Add", [made[0], bias], shapes=[shape])
        return _settle(node, editor, made, found[1])
    if weight is not None and weight.ndim == 2 and found is not None:
        source, move = found
        inner = shape_of(source) or []
        rank = len(shape_of(left) or [])
        if rank < 2 or move.axis(rank - 1) != len(inner) - 1:
            return False
        return _settle(node, editor, again(node, editor, [source, right], [[*inner[:-1], weight.shape[1]]]), move)
    weight, found = constant(left), moved(right)
    if weight is None or weight.ndim < 2 or found is None:
        return False
    source, move = found
    inner = shape_of(source) or []
    rank = len(shape_of(right) or [])
    if isinstance(move, Permute) and move.perm[-2] == rank - 1 and weight.ndim == 2:
        matrix = editor.constant(np.ascontiguousarray(weight.T))
        made = editor.node(node, "MatMul", [source, matrix], shapes=[[*inner[:-1], weight.shape[0]]])
        return _settle(node, editor, made, move)
    if isinstance(move, Flip) and move.flipped != rank - 2 and (weight.ndim == 2 or move.flipped == rank - 1):
        shape = [*inner[:-2], weight.shape[-2], inner[-1]]
        return _settle(node, editor, again(node, editor, [left, source], [shape]), move)
    return False


def _transpose(node: ir.Node, editor: Editor) -> bool:
    perm = attribute(node, "perm", None)
    found = moved(node.inputs[0])
    if perm is not None and list(perm) == list(range(len(perm))) and node.inputs[0] is not None:
        editor.replace(node.outputs[0], node.inputs[0])
        return True
    if perm is None or found is None or not isinstance(found[1], Permute):
        return False
    editor.replace(node.outputs[0], editor.transpose(node, found[0], [found[1].perm[axis] for axis in perm]))
    return True


def _reshape(node: ir.Node, editor: Editor) -> bool:
    value, target = node.inputs
    before, after = shape_of(value), shape_of(node.outputs[0])
    if value is None or target is None or before is None or after is None:
        return False
    if before == after:
        editor.replace(node.outputs[0], value)
        return True
    sizes = constant(target)
    if sizes is not None and 0 in sizes:
        return False
    above = is_node(value, "Reshape")
    if above is not None:
        editor.replace(node.outputs[0], again(node, editor, [above.inputs[0], target], [after])[0])
        return True
    found = moved(value)
    blocks = None if found is None else blocks_of(before, after)
    if found is None or blocks is None:
        return False
    source, move = found
    if isinstance(move, Flip):
        block = next((b for b in blocks if move.flipped in b[0]), ([], []))
        if len(block[0]) != 1 or len(block[1]) != 1:
            return False
        return _settle(node, editor, again(node, editor, [source, target], [after]), Flip(block[1][0]))
    if not isinstance(move, Permute):
        return False
    places = []
    for inside, _ in blocks:
        axes = [move.perm[axis] for axis in inside]
        if axes != list(range(axes[0], axes[0] + len(axes))):
            return False
        places.append(axes[0])
    order = [axis for _, block in sorted(zip(places, blocks, strict=True)) for axis in block[1]]
    new = _reordered(node, target, order, editor)
    made = again(node, editor, [source, new], [[after[axis] for axis in order]])
    return _settle(node, editor, made, Permute(tuple(order.index(axis) for axis in range(len(order)))))


def resized(node: ir.Node, axis: int, size: int, before: ir.Node, editor: Editor) -> ir.Value | None:
    """The target of a Reshape with another size of one axis; None where it is no list of sizes."""
    target = node.inputs[1]
    sizes = constant(target)
    if sizes is not None:
        changed = sizes.copy()
        changed[axis] = size
        return None if 0 in sizes else editor.constant(changed)
    pieces, rank = is_node(target, "Concat"), len(shape_of(node.outputs[0]) or [])
    if pieces is None or len(pieces.inputs) != rank or any(shape_of(x) != [1] for x in pieces.inputs):
        return None
    inputs = [editor.constant([size], np.int64) if i == axis else x for i, x in enumerate(pieces.inputs)]
    return editor.node(before, "Concat", inputs, {"axis": 0}, shapes=[[rank]], like=target)[0]


def _reordered(node: ir.Node, target: ir.Value, order: Sequence[int], editor: Editor) -> ir.Value:
    """The target of a Reshape with its sizes in another order."""
    sizes = constant(target)
    if sizes is not None:
        return editor.constant(sizes[list(order)])
    pieces = is_node(target, "Concat")
    if pieces is not None and all(shape_of(x) == [1] for x in pieces.inputs) and len(pieces.inputs) == len(order):
        inputs = [pieces.inputs[axis] for axis in order]
        return editor.node(node, "Concat", inputs, {"axis": 0}, shapes=[[len(order)]], like=target)[0]
    return editor.node(node, "Gather", [target, editor.constant(order, np.int64)], {"axis": 0}, shapes=[[len(order)]])[
        0
    ]


# --- our operators --------------------------------------------------------------------------------------------------


def _operator(node: ir.Node, editor: Editor) -> bool:
    """A flip of all that has a time axis becomes the other direction, and a flip of what comes out."""
    operator = OPERATORS.get(node.op_type)
    if operator is None or "reverse" not in operator.defaults:
        return False
    attributes = {name: found.value for name, found in node.attributes.items()}
    inputs = list(node.inputs)
    flips: list[tuple[ir.Value, Sequence[int]] | None] = []
    for i, tensor in enumerate(operator.inputs_with(attributes)):
        if "time" in tensor.sizes:
            flips.append(_flipped(inputs[i], tensor.sizes.index("time")))
    if None in flips or not flips:
        return False
    for i, tensor in enumerate(operator.inputs_with(attributes)):
        if "time" in tensor.sizes:
            source, perm = flips.pop(0)  # type: ignore[misc]
            inputs[i] = editor.transpose(node, source, perm)
    changed: dict[str, Any] = {"reverse": 1 - int(attributes.get("reverse", 0))}
    for name in ("scan_input_directions", "scan_output_directions"):
        if name in attributes:
            changed[name] = [1 - int(way) for way in attributes[name]]
    if "pads" in attributes:
        changed["pads"] = list(reversed(attributes["pads"]))
    made = again(node, editor, inputs, [shape_of(x) for x in node.outputs], **changed)
    for tensor, old, new in zip(operator.outputs_with(attributes), node.outputs, made, strict=True):
        timed = "time" in tensor.sizes
        editor.replace(old, editor.flip(node, new, tensor.sizes.index("time")) if timed else new)
    editor.graph.remove(node, safe=True)
    return True


def _one_group(node: ir.Node) -> bool:
    """B and C [batch, time, 1, state] are [batch, time, state], where they were that before."""
    if node.op_type != SELECTIVE_SCAN.name:
        return False
    names = [tensor.name for tensor in SELECTIVE_SCAN.inputs]
    places = [names.index(name) for name in ("B", "C")]
    sources = []
    for place in places:
        shape = shape_of(node.inputs[place])
        above = is_node(node.inputs[place], "Reshape") or is_node(node.inputs[place], "Unsqueeze")
        if shape is None or len(shape) != 4 or shape[2] != 1 or above is None:
            return False
        if shape_of(above.inputs[0]) != [*shape[:2], shape[3]]:
            return False
        sources.append(above.inputs[0])
    for place, source in zip(places, sources, strict=True):
        node.replace_input_with(place, source)
    return True


def _flipped(value: ir.Value | None, axis: int) -> tuple[ir.Value, Sequence[int]] | None:
    """What the value is a flip of along the axis, and the order that its axes get; a transpose may stand between."""
    found = moved(value)
    perm: Sequence[int] = range(len(shape_of(value) or []))
    if found is not None and isinstance(found[1], Permute):
        perm, axis = found[1].perm, found[1].perm[axis]
        found = moved(found[0])
    return None if found is None or found[1] != Flip(axis) else (found[0], perm)


def _raise_above_splits(graph: ir.Graph, editor: Editor) -> None:
    """One transpose above a Split in place of one below each of its outputs."""
    for node in list(graph):
        if node.op_type != "Split" or node.domain:
            continue
        below = [use.node for output in node.outputs for use in output.uses()]
        perms = {tuple(attribute(one, "perm", ())) if one.op_type == "Transpose" else () for one in below}
        perm = next(iter(perms), ())
        if len(perms) != 1 or not perm or len(below) < 2 or any(x.is_graph_output() for x in node.outputs):
            continue
        source = node.inputs[0]
        assert source is not None
        axis = perm.index(attribute(node, "axis", 0) % len(perm))
        moved = editor.transpose(node, source, perm)
        shapes = [None if (s := shape_of(x)) is None else [s[i] for i in perm] for x in node.outputs]
        made = again(node, editor, [moved, *node.inputs[1:]], shapes, axis=axis)
        for output, new in zip(node.outputs, made, strict=True):
            for use in list(output.uses()):
                editor.replace(use.node.outputs[0], new)
        editor.graph.remove([*below, node], safe=True)
