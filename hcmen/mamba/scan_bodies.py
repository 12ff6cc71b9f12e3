"""The recurrence of `hcmen::SelectiveScan` in standard ONNX operators, in the forms that one may choose between.

functions.py writes everything around it: softplus, the skip connection, the gate. Every form gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import AttributeProto, NodeProto, TensorProto, helper

__all__ = ["BLOCK", "SCAN_BODIES", "Body", "over_blocks", "silu", "softplus"]

SOFTPLUS_THRESHOLD = 20.0
DOUBLINGS = (1, 2, 4, 8)
BLOCK = 2 * DOUBLINGS[-1]


@dataclass
class Body:
    """Collects nodes; every method returns the name of a new value.

    suffix: of those names, another one in a subgraph, whose names must not be those of the graph around it.
    bound: the attributes of the node that the function stands for which its nodes take, in the order of their taking.
    """

    suffix: str = "_v"
    nodes: list[NodeProto] = field(default_factory=list)
    used: dict[str, int] = field(default_factory=dict)
    bound: list[str] = field(default_factory=list)

    def fresh(self, stem: str) -> str:
        count = self.used[stem] = self.used.get(stem, 0) + 1
        return f"{stem}{self.suffix}{count if count > 1 else ''}"

    def op(self, op_type: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        output = self.fresh(name or op_type.lower())
        self.nodes.append(helper.make_node(op_type, inputs, [output], **attributes))
        return output

    def rename(self, value: str, name: str) -> None:
        self.nodes.append(helper.make_node("Identity", [value], [name]))

    def ints(self, *values: int) -> str:
        return self.op("Constant", name="ints", value=helper.make_tensor("", TensorProto.INT64, [len(values)], values))

    def integer(self, value: int) -> str:
        return self.op("Constant", name="scalar", value=helper.make_tensor("", TensorProto.INT64, [], [value]))

    def scalar(self, value: float) -> str:
        return self.op("Constant", name="scalar", value=helper.make_tensor("", TensorProto.FLOAT, [], [value]))

    def float32(self, x: str) -> str:
        return self.op("Cast", x, name=f"{x}_float32", to=TensorProto.FLOAT)

    def sizes(self, x: str, start: int, end: int) -> str:
        return self.op("Shape", x, name=f"{x}_sizes", start=start, end=end)

    def reshape(self, x: str, *sizes: str) -> str:
        return self.op("Reshape", x, self.op("Concat", *sizes, axis=0, name="shape"), name=f"{x}_reshaped")

    def bind(self, name: str, kind: AttributeProto.AttributeType) -> None:
        """The last node takes its attribute `name` from the node that the function stands for."""
        self._take(name, name, kind)

    def attribute(self, name: str, kind: AttributeProto.AttributeType = AttributeProto.INT) -> str:
        """The integer, or the float, that the node has as its attribute `name`, as a scalar."""
        value = self.fresh(name)
        self.nodes.append(helper.make_node("Constant", [], [value]))
        self._take("value_int" if kind == AttributeProto.INT else "value_float", name, kind)
        return value

    def directed(self, reverse: str) -> Callable[[str], str]:
        """What brings [b, t, ...] into scanning order and back: turned round in time if the scalar `reverse` is 1."""
        # Forward: from 0 to the end by 1; in reverse: from -1 to before the first by -1.
        axis, start = self.ints(1), self.op("Mul", reverse, self.ints(-1), name="start")
        stride = self.op("Add", self.op("Mul", reverse, self.ints(-2), name="twice"), self.ints(1), name="stride")
        end = self.op("Mul", stride, self.ints(2**31 - 1), name="end")
        return lambda x: self.op("Slice", x, start, end, axis, stride, name="directed")

    def _take(self, own: str, name: str, kind: AttributeProto.AttributeType) -> None:
        self.nodes[-1].attribute.append(AttributeProto(name=own, ref_attr_name=name, type=kind))
        self.bound.append(name)


def softplus(body: Body, x: str) -> str:
    """softplus, linear above the threshold as in mamba_ssm; Softplus never sees a value that could overflow in it."""
    limit = body.scalar(SOFTPLUS_THRESHOLD)
    soft = body.op("Softplus", body.op("Min", x, limit, name="limited"))
    return body.op("Where", body.op("Greater", x, limit, name="linear"), x, soft, name="step")


def silu(body: Body, x: str) -> str:
    """x times its sigmoid."""
    return body.op("Mul", x, body.op("Sigmoid", x), name="silu")


def _scan_over_time(body: Body, first: str, steps: str, driven: str, B: str, C: str, A: str) -> tuple[str, str]:
    """The recurrence as one standard Scan: exact, any length, in the order of the steps.

    exp and the state's decay stay inside, so that nothing of size time x channel x state is stored. The sum over states
    is a matrix product, measured a quarter faster in ONNX Runtime than a product and a ReduceSum.

    Returns:
        The state after the last step scanned [b, g, h, n], and the outputs [b, t, g, h, 1].
    """
    nodes = [
        helper.make_node("Mul", ["step", "A"], ["step_A"]),
        helper.make_node("Exp", ["step_A"], ["decay"]),
        helper.make_node("Mul", ["decay", "state"], ["kept"]),
        helper.make_node("Mul", ["driven", "B_step"], ["added"]),
        helper.make_node("Add", ["kept", "added"], ["next_state"]),
        helper.make_node("MatMul", ["next_state", "C_step"], ["y_step"]),
        # A goes along as a state that never changes: OpenVINO's importer takes no value of the outer graph in a Scan.
        helper.make_node("Identity", ["A"], ["same_A"]),
    ]

    # Runtimes want the rank of what a Scan carries, and a model may know no shapes.
    def value(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * (3 if name.endswith("A") else 4))

    step = helper.make_graph(
        nodes,
        "selective_scan_step",
        [value(name) for name in ("state", "A", "step", "driven", "B_step", "C_step")],
        [value(name) for name in ("next_state", "same_A", "y_step")],
    )
    last, same_A, y = body.fresh("final_state"), body.fresh("same_A"), body.fresh("outputs")
    # Axes counted from the front: TensorRT's importer misreads negative ones.
    body.nodes.append(
        helper.make_node(
            "Scan",
            [first, A, steps, driven, B, C],
            [last, same_A, y],
            body=step,
            num_scan_inputs=4,
            scan_input_axes=[1] * 4,
            scan_output_axes=[1],
        )
    )
    body.bind("scan_input_directions", AttributeProto.INTS)
    body.bind("scan_output_directions", AttributeProto.INTS)
    return last, y


def _scan_over_blocks(body: Body, first: str, steps: str, driven: str, B: str, C: str, A: str) -> tuple[str, str]:
    """The recurrence as one standard Scan over blocks of `BLOCK` steps, which a compiler runs in one sixteenth of the
    turns; arguments and what is returned as in `_scan_over_time`.

    A step is a pair (decay, added), and two of them in a row are again one: (decay * decay', decay' * added + added').
    So four doublings give every step of a block all that came before it in the block (Hillis and Steele), and the
    state at the start of the block is brought in once. Only decays are multiplied and nothing is divided: a decay that
    underflows is 0, as it should be. Steps that fill the last block have a step size of zero, so any length is right.
    """
    of_channel, of_state = (steps, 2), (B, 2)
    series = [(steps, of_channel), (driven, of_channel), (B, of_state), (C, of_state)]
    return over_blocks(body, first, series, of_channel, _block(A))


def over_blocks(
    body: Body,
    first: str,
    series: Sequence[tuple[str, tuple[str, int]]],
    output: tuple[str, int],
    block_graph: onnx.GraphProto,
) -> tuple[str, str]:
    """A standard Scan over blocks of `BLOCK` steps, whatever a block computes.

    Args:
        first: what is carried from block to block, without an axis of time.
        series: what is cut into blocks, each [b, t, ...] of rank 5. A value stands for the sizes behind time: it has
            them from the axis given with it on.
        output: the same for what comes out.
        block_graph: takes what is carried [b, 1, ...] and blocks [b, BLOCK, ...], gives both again. What fills the last
            block is zeros.

    Returns:
        What is carried in the end, and the outputs [b, t, ...].
    """
    reverse = body.attribute("reverse")
    time_axis, block = body.ints(1), body.ints(BLOCK)
    steps = series[0][0]
    batch, time = body.sizes(steps, 0, 1), body.sizes(steps, 1, 2)
    directed = body.directed(reverse)
    blocks = body.op("Div", body.op("Add", time, body.ints(BLOCK - 1), name="reach"), block, name="blocks")
    lacking = body.op("Sub", body.op("Mul", blocks, block, name="whole"), time, name="lacking")
    pads = body.op("Concat", body.ints(*[0] * 6), lacking, body.ints(*[0] * 3), axis=0, name="pads")

    def in_blocks(x: str, sizes: str) -> str:
        """[b, t, ...] -> [b, blocks, BLOCK, sizes]; turned round before it is filled up, so that the end is filled."""
        return body.reshape(body.op("Pad", directed(x), pads, name="filled"), batch, blocks, block, sizes)

    wanted = dict.fromkeys((*(sizes for _, sizes in series), output))
    shapes = {(value, axis): body.sizes(value, axis, axis + 3) for value, axis in wanted}
    inputs = [in_blocks(x, shapes[sizes]) for x, sizes in series]
    last, y = body.fresh("final_state"), body.fresh("outputs")
    body.nodes.append(
        helper.make_node(
            "Scan",
            [body.op("Unsqueeze", first, time_axis, name="first_state"), *inputs],
            [last, y],
            body=block_graph,
            num_scan_inputs=len(inputs),
            scan_input_axes=[1] * len(inputs),
            scan_output_axes=[1],
        )
    )
    y = body.reshape(y, batch, body.ints(-1), shapes[output])
    y = directed(body.op("Slice", y, body.ints(0), time, time_axis, name="cut"))
    return last, y


def _block(A: str) -> onnx.GraphProto:
    """What a Scan over blocks does with one of them. A is read from around it: handed on from block to block, it would
    be copied by a kernel of its own each time."""
    body = Body(suffix="_b")

    def shifted(x: str, by: int, filling: float) -> str:
        """x[t - by], and `filling` before the first step."""
        pads = body.ints(0, by, 0, 0, 0, 0, -by, 0, 0, 0)
        return body.op("Pad", x, pads, body.scalar(filling), name="shifted")

    decay = body.op("Exp", body.op("Mul", "step", A, name="step_A"), name="decay")
    added = body.op("Mul", "driven", "B_step", name="added")
    for by in DOUBLINGS:
        before = body.op("Mul", decay, shifted(added, by, 0.0), name="before")
        added = body.op("Add", added, before, name="added")
        decay = body.op("Mul", decay, shifted(decay, by, 1.0), name="decay")
    states = body.op("Add", body.op("Mul", decay, "state", name="kept"), added, name="states")
    # Not a matrix product: TensorRT-RTX 1.7 mistakes the shape of one in a loop where the graph around it is float16.
    seen = body.op("Mul", states, "C_step", name="seen")
    body.nodes += [
        helper.make_node("ReduceSum", [seen, body.ints(4)], ["y_step"], keepdims=1),
        helper.make_node("Gather", [states, body.ints(BLOCK - 1)], ["next_state"], axis=1),
    ]
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 5) for name in names]
        for names in (("state", "step", "driven", "B_step", "C_step"), ("next_state", "y_step"))
    )
    return helper.make_graph(body.nodes, "selective_scan_block", inputs, outputs)


# name -> writer(body, first_state, steps, driven, B, C, A) -> (last state, outputs); shapes as in `_scan_over_time`.
# A writer that uses other attributes of the node than `Scan`'s directions says so in functions.py.
SCAN_BODIES: dict[str, Callable[..., tuple[str, str]]] = {"scan": _scan_over_time, "blocks": _scan_over_blocks}
