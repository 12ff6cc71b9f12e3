"""A small .onnx file as hcmen.mamba.export writes them, made without PyTorch: its weights and functions inside."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hcmen.base.selfcheck import CONV_MODEL
from hcmen.base.state_records import STATES_KEY, StateRecord, states_to_json

WORDS, CHANNEL, WIDE = 7, 8, 64


def foreign_graph(
    path: Path, *, wrong: float = 1.0, plain: bool = False, scale: float = 1.0, words: int = WORDS
) -> Path:
    """Writes tokens -> table -> CausalConv1d + series -> a wide layer -> logits [batch, time, words]; and a state.

    Args:
        wrong: what the function multiplies its result by, which the kernel does not. plain: without our operator.
        scale: of the table.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(3)
    conv = onnx.load(CONV_MODEL)
    node = conv.graph.node[0]
    del node.input[:], node.output[:]
    node.input.extend(["embedded", "weight", "bias", "tail"])
    node.output.extend(["mixed", "tail.next"])
    function = conv.functions[0]
    last = next(n for n in function.node if n.op_type == "CastLike")
    factor = helper.make_node("Constant", [], ["wrong"], value_float=wrong)
    function.node.extend([factor, helper.make_node("CastLike", ["wrong", last.output[0]], ["wrong_"])])
    ends = [helper.make_node("Mul", [function.output[0] + "_", "wrong_"], [function.output[0]])]
    for n in function.node:
        n.output[:] = [name + "_" if name == function.output[0] else name for name in n.output]
    function.node.extend(ends)
    identities = [
        helper.make_node("Identity", ["embedded"], ["mixed"], "mixed"),
        helper.make_node("Identity", ["tail"], ["tail.next"], "state"),
    ]
    nodes = [
        helper.make_node("Cast", ["ids"], ["whole"], "whole", to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "whole"], ["embedded"], "embedded"),
        *(identities if plain else [node]),
        helper.make_node("Add", ["mixed", "series"], ["both"], "both"),
        helper.make_node("MatMul", ["both", "widen"], ["wide"], "wide"),
        helper.make_node("Relu", ["wide"], ["active"], "active"),
        helper.make_node("MatMul", ["active", "mix"], ["active2"], "mixing"),
        helper.make_node("MatMul", ["active2", "head"], ["logits"], "logits"),
    ]
    state = StateRecord("tail", "conv", (3, CHANNEL))

    def value(name, kind, *shape):
        return helper.make_tensor_value_info(name, kind, shape)

    def weight(name, *shape, times=1.0):
        return numpy_helper.from_array((times * rng.standard_normal(shape)).astype(np.float32), name)

    made = helper.make_graph(
        nodes,
        "foreign",
        [
            value("ids", TensorProto.INT32, "batch", "time"),
            value("series", TensorProto.FLOAT, "batch", "time", CHANNEL),
            value("tail", TensorProto.FLOAT, "batch", 3, CHANNEL),
        ],
        [
            value("logits", TensorProto.FLOAT, "batch", "time", words),
            value("tail.next", TensorProto.FLOAT, "batch", 3, CHANNEL),
        ],
        [
            weight("table", words, CHANNEL, times=scale),
            *(weight("weight", CHANNEL, 4), weight("bias", CHANNEL), weight("widen", CHANNEL, WIDE)),
            *(weight("mix", WIDE, WIDE, times=WIDE**-0.5), weight("head", WIDE, words)),
        ],
    )
    model = helper.make_model(
        made,
        opset_imports=[helper.make_opsetid("", 19), helper.make_opsetid("hcmen", conv.opset_import[-1].version)],
        ir_version=9,
        functions=[] if plain else [function],
    )
    helper.set_model_props(model, {STATES_KEY: states_to_json([state])})
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path
