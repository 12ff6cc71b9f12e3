"""`hcmen::StateSpaceDual` in standard ONNX operators: the body of its model-local function, in two forms.

All arithmetic is float32. Sizes: b batch, t time, g groups, h heads of a group, p head_dim, n state.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import AttributeProto, helper, numpy_helper

from hcmen.mamba.scan_bodies import BLOCK, Body, over_blocks, silu, softplus

__all__ = ["DUAL_BODIES", "dual_body"]


def dual_body(scan_body: str, *, gated: int, stateful: int, delta_softplus: int) -> Body:
    """The nodes of the function; scan_body: one of `DUAL_BODIES`."""
    body = Body()
    x, dt, B, C = (body.float32(name) for name in ("x", "dt", "B", "C"))
    one, rest = body.ints(1), body.ints(-1)
    batch_time, dim = body.sizes("x", 0, 2), body.sizes("x", 3, 4)
    state = body.op("Shape", "B", start=-1, name="state_sizes")

    d = body.op("Add", dt, "dt_bias", name="step")
    if delta_softplus:
        d = softplus(body, d)
    least, most = (body.attribute(name, AttributeProto.FLOAT) for name in ("dt_min", "dt_max"))
    d = body.op("Min", body.op("Max", d, least, name="no_less"), most, name="no_more")
    B, C = (body.reshape(v, batch_time, rest, one, state) for v in (B, C))  # [b, t, g, 1, n]
    group = body.sizes(B, 2, 3)
    rate = body.reshape(body.op("Mul", d, "A", name="step_A"), batch_time, group, rest, one)  # [b, t, g, h, 1]
    driven = body.op("Mul", body.op("Unsqueeze", d, body.ints(3), name="steps"), x, name="driven")
    driven = body.reshape(driven, batch_time, group, rest, dim)  # [b, t, g, h, p]
    sizes = (body.sizes("x", 0, 1), group, body.sizes(rate, 3, 4), dim, state)
    state_shape = body.op("Concat", *sizes, axis=0, name="state_shape")
    if stateful:
        first = body.op("Reshape", "initial_state", state_shape, name="first_state")
    else:
        first = body.op("ConstantOfShape", state_shape, name="first_state")

    last, y = DUAL_BODIES[scan_body](body, first, rate, driven, B, C)

    y = body.op("Reshape", y, body.op("Shape", "x", name="y_shape"), name="scanned")
    skip = body.reshape("D", body.sizes("x", 2, 3), rest)  # [g * h, 1 or p]
    y = body.op("Add", y, body.op("Mul", x, skip, name="skip"), name="skipped")
    if gated:
        y = body.op("Mul", y, silu(body, body.float32("z")), name="gated")
    body.rename(body.op("CastLike", y, "x", name="narrowed"), "y")
    if stateful:
        shape = body.op("Shape", "initial_state", name="last_shape")
        body.rename(body.op("Reshape", last, shape, name="last"), "last_state")
    return body


def _dual_over_time(body: Body, first: str, rate: str, driven: str, B: str, C: str) -> tuple[str, str]:
    """The recurrence as one standard Scan, in the order of the steps: the same bits however a sequence is cut.

    Args:
        first: [b, g, h, p, n]. rate: d A [b, t, g, h, 1]. driven: d x [b, t, g, h, p]. B, C: [b, t, g, 1, n].

    Returns:
        The state after the last step scanned [b, g, h, p, n], and the outputs [b, t, g, h, p, 1].
    """
    nodes = [
        helper.make_node("Mul", ["decay", "state"], ["kept"]),
        helper.make_node("Mul", ["driven", "B_step"], ["added"]),
        helper.make_node("Add", ["kept", "added"], ["next_state"]),
        helper.make_node("MatMul", ["next_state", "C_step"], ["y_step"]),
    ]
    value = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * 5) for name in (
        "state", "decay", "driven", "B_step", "C_step", "next_state", "y_step"
    )]  # fmt: skip
    step = helper.make_graph(nodes, "state_space_dual_step", value[:5], value[5:])
    last, y = body.fresh("final_state"), body.fresh("outputs")
    axis = body.ints(5)
    inputs = [
        body.op("Unsqueeze", body.op("Exp", rate, name="decay"), axis, name="decays"),
        body.op("Unsqueeze", driven, axis, name="driven_steps"),
        body.op("Unsqueeze", B, body.ints(3), name="B_steps"),  # [b, t, g, 1, 1, n]
        body.op("Unsqueeze", C, axis, name="C_steps"),  # [b, t, g, 1, n, 1]
    ]
    body.nodes.append(
        helper.make_node(
            "Scan",
            [first, *inputs],
            [last, y],
            body=step,
            num_scan_inputs=4,
            scan_input_axes=[1] * 4,
            scan_output_axes=[1],
        )
    )
    body.bind("scan_input_directions", AttributeProto.INTS)
    body.bind("scan_output_directions", AttributeProto.INTS)
    return last, y


def _dual_over_blocks(body: Body, first: str, rate: str, driven: str, B: str, C: str) -> tuple[str, str]:
    """The recurrence as one standard Scan over blocks of `BLOCK` steps; arguments as in `_dual_over_time`.

    Within a block every step sees the state at its start and the steps before it, both decayed by the exponential of a
    sum of rates: nothing is divided, and where rates are below zero nothing overflows.

    Returns:
        The state after the last step scanned [b, 1, g, h, p, n], and the outputs [b, t, g, h, p].
    """
    of_dim, of_state = (driven, 2), (B, 2)
    return over_blocks(
        body, first, [(rate, (rate, 2)), (driven, of_dim), (B, of_state), (C, of_state)], of_dim, _dual_block()
    )


def _dual_block() -> onnx.GraphProto:
    """What a Scan over blocks does with one of them."""
    body = Body(suffix="_b")
    steps = np.arange(BLOCK)
    # From [t, s + 1]: whether step r lies after step s, or after the start, and not after step t.
    between = (steps > np.arange(-1, BLOCK)[:, None]) & (steps <= steps[:, None, None])

    def constant(values: np.ndarray) -> str:
        return body.op("Constant", name="mask", value=numpy_helper.from_array(values.astype(np.float32)))

    def unsqueezed(x: str, *axes: int) -> str:
        return body.op("Unsqueeze", x, body.ints(*axes), name="unsqueezed")

    def summed(x: str, y: str, axis: int) -> str:
        # Not a matrix product: TensorRT-RTX 1.7 mistakes the shape of one in a loop where the graph is float16.
        return body.op("ReduceSum", body.op("Mul", x, y, name="product"), body.ints(axis), keepdims=0, name="sum")

    # [b, t, s + 1, g, h, 1]
    rates = summed(unsqueezed("rate", 1, 2), constant(between[..., None, None, None]), 3)
    decays = body.op("Exp", rates, name="decays")
    from_start = body.op("Gather", decays, body.integer(0), axis=2, name="from_start")  # [b, t, g, h, 1]
    ends = body.ints(2**31 - 1)
    within = body.op("Slice", decays, body.ints(1), ends, body.ints(2), name="within")  # [b, t, s, g, h, 1]
    to_end = body.op("Gather", within, body.integer(BLOCK - 1), axis=1, name="to_end")  # [b, s, g, h, 1]
    whole = body.op("Slice", from_start, body.ints(BLOCK - 1), ends, body.ints(1), name="whole")  # [b, 1, g, h, 1]

    scores = unsqueezed(summed(unsqueezed("C_step", 2), unsqueezed("B_step", 1), 5), 5)  # [b, t, s, g, 1, 1]
    seen = body.op("Mul", scores, constant(np.tri(BLOCK)[..., None, None, None]), name="seen")
    y = summed(body.op("Mul", seen, within, name="weights"), unsqueezed("driven", 1), 2)  # [b, t, g, h, p]
    before = summed("state", unsqueezed("C_step", 4), 5)  # [b, t, g, h, p]
    y = body.op("Add", y, body.op("Mul", from_start, before, name="from_state"), name="outputs")
    left = unsqueezed(body.op("Mul", to_end, "driven", name="left"), 5)  # [b, s, g, h, p, 1]
    added = unsqueezed(summed(left, unsqueezed("B_step", 4), 1), 1)  # [b, 1, g, h, p, n]
    kept = body.op("Mul", unsqueezed(whole, 5), "state", name="kept")
    body.nodes += [
        helper.make_node("Add", [kept, added], ["next_state"]),
        helper.make_node("Identity", [y], ["y_step"]),
    ]
    ranks = {"state": 6, "rate": 5, "driven": 5, "B_step": 5, "C_step": 5, "next_state": 6, "y_step": 5}
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * r) for name, r in ranks.items()]
    return helper.make_graph(body.nodes, "state_space_dual_block", values[:5], values[5:])


# name -> writer(body, first_state, rate, driven, B, C) -> (last state, outputs); shapes as in `_dual_over_time`.
DUAL_BODIES: dict[str, Callable[..., tuple[str, str]]] = {"scan": _dual_over_time, "blocks": _dual_over_blocks}
