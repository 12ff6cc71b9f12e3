"""Graphs that ONNX Runtime would read otherwise than we do, that reach for files, or that are small and cost all."""

from __future__ import annotations

from typing import Any

import numpy as np
from attacks.attack import Attack, content
from helpers.small_bundle import graph
from onnx import ModelProto, TensorProto, helper, numpy_helper

__all__ = ["GRAPHS"]


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def block(number: int, data: bytes, beyond: int = 0) -> bytes:
    """A field of bytes. beyond: bits of the tag above the 32 that protobuf keeps."""
    return varint(number << 3 | 2 | beyond << 32) + varint(len(data)) + data


def outside(location: str, **entries: str) -> TensorProto:
    tensor = TensorProto(name="w", data_type=1, dims=[2], data_location=1)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def with_tensor(tensor: TensorProto, beyond: int = 0) -> bytes:
    return b"\x08\x09" + block(7, block(5, tensor.SerializeToString(), beyond))


def sized(*dims: int) -> bytes:
    """A tensor of no byte whose sizes are believed, in the weights file."""
    tensor = outside("weights.bin", offset="0", length="0")
    tensor.dims[:] = dims
    return with_tensor(tensor)


def of_nodes(*nodes: Any, functions: Any = (), **values: Any) -> bytes:
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in values.items()]
    opsets = [helper.make_opsetid("", 19), helper.make_opsetid("z", 1)]
    made = helper.make_graph(list(nodes), "g", [], [], tensors)
    return helper.make_model(made, opset_imports=opsets, functions=functions).SerializeToString()


def doubling(times: int, last: str = "Identity") -> bytes:
    """A function that calls another one twice, and so on."""
    functions = []
    for i in range(times):
        op, domain = (f"F{i + 1}", "z") if i < times - 1 else (last, "" if last == "Identity" else "z")
        body = [helper.make_node(op, [a], [b], domain=domain) for a, b in ("am", "mr")]
        opsets = [helper.make_opsetid("", 19), helper.make_opsetid("z", 1)]
        functions.append(helper.make_function("z", f"F{i}", ["a"], ["r"], body, opsets))
    return of_nodes(helper.make_node("F0", ["x"], ["y"], domain="z"), functions=functions)


def nested(depth: int) -> bytes:
    """Ifs within Ifs."""
    data = b""
    for _ in range(depth):
        data = block(1, block(4, b"If") + block(5, block(6, data)))
    return b"\x08\x09" + block(7, data)


def endless() -> ModelProto:
    """The graph of text_only, behind a loop of 2**62 turns that starts with the input's length."""
    made = graph("text_only")
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Add", ["v", "v"], ["w"])],
        "body",
        [info("i", TensorProto.INT64, []), info("go", TensorProto.BOOL, []), info("v", TensorProto.INT64, None)],
        [info("on", TensorProto.BOOL, []), info("w", TensorProto.INT64, None)],
    )
    turns, yes = (numpy_helper.from_array(np.array(v), n) for v, n in ((1 << 62, "turns"), (True, "yes")))
    made.graph.initializer.extend([turns, yes])
    made.graph.node.insert(0, helper.make_node("Loop", ["turns", "yes", "text_length"], ["endless"], body=body))
    for node in made.graph.node[1:]:
        node.input[:] = ["endless" if name == "text_length" else name for name in node.input]
    return made


def of_another_rank(valid: bytes) -> bytes:
    made = ModelProto.FromString(valid)
    score = next(value for value in made.graph.output if value.name == "score")
    score.type.tensor_type.shape.dim.add().dim_value = 1
    next(node for node in made.graph.node if node.output[0] == "score").output[0] = "flat"
    made.graph.node.append(helper.make_node("Unsqueeze", ["flat", "axis1"], ["score"]))
    return made.SerializeToString()


_ONE = helper.make_node("Identity", ["x"], ["y"]).SerializeToString()
GRAPHS = [
    Attack(
        "graph",
        "a file outside, under a tag of 33 bits",
        5,
        "not an ONNX file",
        with_tensor(outside("/etc/passwd"), 1),
        5,
    ),
    Attack(
        "graph", "a file outside, under a tag of 35 bits", 5, "not an ONNX file", with_tensor(outside("/etc/passwd"), 4)
    ),
    Attack("graph", "a number of 70 bits", 5, "not an ONNX file", b"\x08" + b"\xff" * 9 + b"\x7f"),
    Attack(
        "graph",
        "ONNX Runtime's own format, which is not checked",
        5,
        "own format",
        b"\x12\x0c\x00\x00ORTM" + bytes(6),
        5,
    ),
    *(
        Attack("graph", f"weights in {name!r}", 5, "expected 'weights.bin'", with_tensor(outside(name)))
        for name in (
            "/etc/passwd",
            "../weights.bin",
            "./weights.bin",
            "",
            "WEIGHTS.BIN",
            "weights.bin\0",
            "/proc/self/mem",
        )
    ),
    Attack("graph", "weights beyond the file", 5, "bytes within", with_tensor(outside("weights.bin", offset="48"))),
    Attack("graph", "an offset below zero", 5, "bytes within", with_tensor(outside("weights.bin", offset="-8"))),
    Attack(
        "graph", "an offset of 1,000 digits", 5, "bytes within", with_tensor(outside("weights.bin", offset="9" * 1000))
    ),
    Attack("graph", "no element of 2**63 each", 5, "", sized(0, (1 << 63) - 1, 4)),
    Attack("graph", "sizes below zero", 5, "", sized(-1, -8)),
    Attack("graph", "nine dimensions", 5, "at most 8", sized(*[0] * 9)),
    Attack(
        "graph",
        "a file outside in a node",
        5,
        "nested tensor",
        of_nodes(helper.make_node("Constant", [], ["y"], value=outside("/etc/passwd"))),
    ),
    Attack("graph", "2**28 nodes of functions that double", 5, "functions written out", doubling(28), 5),
    Attack("graph", "a function that calls itself", 5, "calls itself", doubling(3, "F0")),
    Attack("graph", "3,000 functions in one another", 5, "functions deep", doubling(3000)),
    Attack(
        "graph",
        "200,000 nodes",
        5,
        "more than 50000 nodes",
        content(lambda _: b"\x08\x09" + block(7, block(1, _ONE) * 200_000)),
    ),
    Attack("graph", "2,000 graphs in one another", 5, "nested more than", nested(2000)),
    Attack(
        "graph",
        "a constant of 6 GB out of eight bytes",
        5,
        "elements once",
        of_nodes(helper.make_node("ConstantOfShape", ["s"], ["y"]), s=[1_600_000_000]),
        5,
    ),
    Attack(
        "graph", "an output of another rank than the manifest's", 0, "expected [batch]", content(of_another_rank), 5
    ),
    Attack(
        "graph", "a loop of 2**62 turns", 0, "took more than 2 s", content(lambda _: endless().SerializeToString()), 3
    ),
    Attack("graph", "nothing", 0, "", b"", 5),
]
