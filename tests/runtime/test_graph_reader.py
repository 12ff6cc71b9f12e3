"""The reader of .onnx files against protobuf's leniency, and against graphs that are small and cost all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from google.protobuf.descriptor import FieldDescriptor
from helpers.small_bundle import clip_arrays, graph, make_bundle
from onnx import ModelProto, TensorProto, helper, numpy_helper

from hcmen.base.errors import CorruptFileError
from hcmen.runtime import load
from hcmen.runtime.backends.graph import read_graph
from hcmen.runtime.backends.onnx_wire import _FIELDS, _ONNX


def read(model: bytes | ModelProto):
    content = model if isinstance(model, bytes) else model.SerializeToString()
    return read_graph(content, "weights.bin", 52, "g")


def varint(value: int, width: int = 0) -> bytes:
    """`value` in protobuf's form, in at least `width` bytes."""
    out = bytearray()
    while value > 127 or len(out) + 1 < width:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def block(number: int, content: bytes, *, tag_width: int = 0, beyond: int = 0, size_width: int = 0) -> bytes:
    """A field of bytes. beyond: bits of the tag above the 32 that protobuf keeps."""
    return varint(number << 3 | 2 | beyond << 32, tag_width) + varint(len(content), size_width) + content


def test_every_field_of_onnx_is_known_and_of_its_kind():
    """The table beside the onnx package's own descriptors, message by message."""
    kinds = {
        FieldDescriptor.TYPE_INT64: "i",
        FieldDescriptor.TYPE_UINT64: "i",
        FieldDescriptor.TYPE_INT32: "e",
        FieldDescriptor.TYPE_ENUM: "e",
        FieldDescriptor.TYPE_FLOAT: "f",
        FieldDescriptor.TYPE_DOUBLE: "d",
        FieldDescriptor.TYPE_STRING: "s",
        FieldDescriptor.TYPE_BYTES: "s",
    }
    seen: set[str] = set()

    def compare(descriptor, name: str) -> None:
        if name in seen:
            return
        seen.add(name)
        ours = {number: (kind, again) for number, _, kind, again in _FIELDS[name].values() if " " not in kind}
        assert set(ours) == {field.number for field in descriptor.fields}, name
        for field in descriptor.fields:
            kind, again = ours[field.number]
            assert again == field.is_repeated, (name, field.name)
            if field.message_type is None:
                assert kind == kinds[field.type], (name, field.name)
            else:
                compare(field.message_type, kind)

    compare(ModelProto.DESCRIPTOR, "Model")
    assert seen == set(_ONNX)


def test_what_is_handed_on_says_the_same_to_protobuf(micro_bundle):
    for path in micro_bundle.glob("*.onnx"):
        content = path.read_bytes()
        found = read_graph(content, "weights.bin", 1 << 30, path.name)
        assert onnx.load_from_string(found.model) == onnx.load_from_string(content)
    made = graph("full")
    made.functions.append(
        helper.make_function("d", "F", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], made.opset_import)
    )
    made.graph.initializer.append(TensorProto(name="few", data_type=6, dims=[2], int32_data=[-1, 7]))
    made.graph.initializer.append(TensorProto(name="f", data_type=1, dims=[1], float_data=[0.5]))
    assert ModelProto.FromString(read(made).model) == made


def secret() -> bytes:
    """An initializer that lies in another file."""
    tensor = TensorProto(name="w", data_type=1, dims=[2], data_location=1)
    tensor.external_data.add(key="location", value="/etc/passwd")
    return tensor.SerializeToString()


HOSTILE = {
    "initializer under a tag of 33 bits": lambda: block(7, block(5, secret(), beyond=1)),
    "initializer under a tag of 35 bits": lambda: block(7, block(5, secret(), beyond=4)),
    "graph under a tag of 33 bits": lambda: block(7, block(5, secret()), beyond=1),
    "initializer under a long tag": lambda: block(7, block(5, secret(), tag_width=5)),
    "initializer under the longest tag": lambda: block(7, block(5, secret(), tag_width=10)),
    "initializer of a long size": lambda: block(7, block(5, secret(), size_width=5)),
    "location of 33 bits": lambda: block(7, block(5, b"\x08\x02\x10\x01\x70" + varint(1 << 32 | 1))),
    "location of 64 bits": lambda: block(7, block(5, b"\x08\x02\x10\x01\x70" + varint(1 << 63 | 1))),
    "type of 33 bits": lambda: block(7, block(5, b"\x08\x02\x10" + varint(1 << 32 | 1) + b"\x70\x01")),
    "two graphs": lambda: block(7, b"") + block(7, block(5, secret())),
    "two names": lambda: block(7, block(5, b"\x42\x01a\x42\x01b")),
    "two locations": lambda: block(7, block(5, b"\x70\x01\x70\x00")),
    "a group": lambda: b"\x3b" + block(5, secret()) + b"\x3c",
    "a group within": lambda: block(7, b"\x2b" + secret() + b"\x2c"),
    "end of no group": lambda: b"\x3c",
    "field 0": lambda: b"\x02\x00",
    "unknown field": lambda: block(99, b"x"),
    "initializer as a number": lambda: block(7, b"\x28\x01"),
    "name of eight bytes": lambda: block(7, b"\x11" + bytes(8)),
    "number of 11 bytes": lambda: b"\x08" + b"\x80" * 10 + b"\x00",
    "number of 70 bits": lambda: b"\x08" + b"\xff" * 9 + b"\x7f",
    "packed number cut": lambda: block(7, block(5, b"\x0a\x01\x80")),
    "ONNX Runtime's own format": lambda: b"\x12\x0c\x00\x00ORTM" + bytes(6),
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=[name.replace(" ", "_") for name in HOSTILE])
def test_what_protobuf_would_read_otherwise_is_refused(make: Callable[[], bytes]):
    with pytest.raises(CorruptFileError) as caught:
        read(b"\x08\x09" * (make is not HOSTILE["ONNX Runtime's own format"] and make()[:1] != b"\x08") + make())
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_long_forms_are_written_short():
    proto = helper.make_model(helper.make_graph([], "g", [], []), ir_version=9)
    proto.opset_import[0].version = 19
    plain = proto.SerializeToString()
    inner = proto.graph.SerializeToString()
    head = plain[: plain.index(block(7, inner))]
    long = head + block(7, inner, tag_width=5, size_width=4) + plain[len(head) + len(block(7, inner)) :]
    assert len(long) == len(plain) + 7
    assert read(long).model == plain
    assert read(b"\x08\x89\x80\x00" + plain[2:]).model == plain


def test_a_bundle_of_a_hostile_graph_reads_no_file(tmp_path):
    """The whole way: an initializer of another file, under a tag that only protobuf takes for one."""

    class Forged:
        def SerializeToString(self) -> bytes:
            proto = graph("text_only")
            proto.graph.node[-3].input[1] = "w"
            inner = proto.graph.SerializeToString() + block(5, secret(), beyond=1)
            proto.ClearField("graph")
            return proto.SerializeToString() + block(7, inner)

    made = make_bundle(tmp_path / "b", ("text_only",), graphs={"text_only": Forged()})
    with pytest.raises(CorruptFileError, match="not an ONNX file"):
        load(made)(clip_arrays(0, ("text",)))


def of_nodes(nodes, functions=(), **values) -> ModelProto:
    """A model of one input x [1]; values: initializers."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in values.items()]
    opsets = [helper.make_opsetid("", 19), helper.make_opsetid("z", 1)]
    return helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], tensors), opset_imports=opsets, functions=functions
    )


def doubling(times: int, *, within: bool = False, last: str = "Identity") -> ModelProto:
    """A function that calls another one twice, and so on. within: the second call lies in the branches of an If."""
    functions = []
    for i in range(times):
        op, domain = (f"F{i + 1}", "z") if i < times - 1 else (last, "" if last == "Identity" else "z")
        call = helper.make_node(op, ["m"], ["r"], domain=domain)
        body = [helper.make_node(op, ["a"], ["m"], domain=domain), call]
        if within:
            out = [helper.make_tensor_value_info("r", TensorProto.FLOAT, [1])]
            branch = helper.make_graph([call], "b", [], out)
            body[1:] = [helper.make_node("If", ["m"], ["r"], then_branch=branch, else_branch=branch)]
        opsets = [helper.make_opsetid("", 19), helper.make_opsetid("z", 1)]
        functions.append(helper.make_function("z", f"F{i}", ["a"], ["r"], body, opsets))
    return of_nodes([helper.make_node("F0", ["x"], ["y"], domain="z")], functions)


@pytest.mark.parametrize("within", [False, True])
def test_functions_are_counted_as_often_as_they_are_called(within):
    read(doubling(8, within=within))
    with pytest.raises(CorruptFileError, match="nodes with its functions written out, expected at most 50000"):
        read(doubling(28, within=within))


@pytest.mark.parametrize("last", ["F0", "F3"])
def test_functions_that_call_themselves_are_refused(last):
    with pytest.raises(CorruptFileError, match=f"function '{last}' calls itself"):
        read(doubling(6, last=last))


def test_a_chain_of_functions_is_refused_before_the_stack_ends():
    chain = doubling(3000)
    for function in chain.functions:
        del function.node[1]
    with pytest.raises(CorruptFileError, match="functions deep"):
        read(chain)


def test_too_many_nodes_are_refused():
    node = block(1, helper.make_node("Identity", ["x"], ["y"]).SerializeToString())
    with pytest.raises(CorruptFileError, match="more than 50000 nodes"):
        read(b"\x08\x09" + block(7, node * 200_000))
    with pytest.raises(CorruptFileError, match="fields"):
        read(b"\x08\x09" + block(7, block(1, b"\x0a\x00" * 1_100_000)))


def many(*sizes: int) -> np.ndarray:
    return np.array(sizes, np.int64)


def node(op: str, *inputs: str, out: str = "y", **attributes: object):
    return helper.make_node(op, list(inputs), [out], **attributes)


GIANTS = {
    "ConstantOfShape": lambda: of_nodes([node("ConstantOfShape", "s")], s=many(40_000, 40_000)),
    "Expand": lambda: of_nodes([node("Expand", "one", "s")], s=many(1_600_000_000), one=np.ones(1, np.float32)),
    "Tile": lambda: of_nodes([node("Tile", "k", "s")], s=many(2_000_000), k=np.ones(1000, np.float32)),
    "Range": lambda: of_nodes([node("Range", "a", "b", "c")], a=many(0)[0], b=many(1 << 40)[0], c=many(1)[0]),
    "Range of floats": lambda: of_nodes(
        [node("Range", "a", "b", "c")], a=np.float32(0), b=np.float32(1), c=np.float32(1e-12)
    ),
    "Pad": lambda: of_nodes([node("Pad", "x", "p")], p=many(0, 1 << 33)),
    "Resize to sizes": lambda: of_nodes([node("Resize", "x", "", "", "s")], s=many(1 << 34)),
    "Resize by scales": lambda: of_nodes([node("Resize", "k", "", "s")], s=np.float32([1e9]), k=np.ones(4, np.float32)),
    "OneHot": lambda: of_nodes([node("OneHot", "i", "d", "v")], i=many(0), d=many(1 << 33), v=many(0, 1)),
    "window": lambda: of_nodes([node("HannWindow", "n")], n=np.int64(1 << 33)),
    "RandomNormal": lambda: of_nodes([node("RandomNormal", shape=[1 << 20, 1 << 20])]),
    "Constant": lambda: of_nodes(
        [node("Constant", out="s", value_ints=[1 << 33]), node("Expand", "x", "s")],
    ),
    "Constant of a tensor": lambda: of_nodes(
        [node("Constant", out="s", value=numpy_helper.from_array(many(1 << 33), "t")), node("Expand", "x", "s")],
    ),
    "computed": lambda: of_nodes(
        [node("Mul", "a", "a", out="b"), node("Concat", "b", "b", out="s", axis=0), node("Expand", "x", "s")],
        a=many(1 << 10),
    ),
    "many": lambda: of_nodes([node("ConstantOfShape", "s", out=f"y{i}") for i in range(40)], s=many(10_000_000)),
    "doubled": lambda: of_nodes(
        [node("Concat", f"k{i}", f"k{i}", out=f"k{i + 1}", axis=0) for i in range(40)], k0=np.ones(16, np.float32)
    ),
}


@pytest.mark.parametrize("make", GIANTS.values(), ids=[name.replace(" ", "_") for name in GIANTS])
def test_constants_that_take_all_memory_are_refused(make: Callable[[], ModelProto]):
    with pytest.raises(CorruptFileError, match="elements once they are written out, expected at most 268435456"):
        read(make())


def test_giants_within_functions_and_branches_are_seen():
    giant = GIANTS["Constant"]().graph
    function = helper.make_function("z", "G", ["x"], ["y"], giant.node, [helper.make_opsetid("", 19)])
    branch = of_nodes([node("If", "x", then_branch=giant, else_branch=giant)])
    sparse = TensorProto(name="v", data_type=1, dims=[1], float_data=[1.0])
    for made in (of_nodes([], [function]), branch):
        with pytest.raises(CorruptFileError, match="elements once"):
            read(made)
    made = of_nodes([])
    made.graph.sparse_initializer.add(values=sparse, indices=sparse, dims=[1 << 40])
    with pytest.raises(CorruptFileError, match="elements once"):
        read(made)


def test_lawful_constants_pass():
    read(of_nodes([node("ConstantOfShape", "s")], s=many(64, 500, 64)))
    read(of_nodes([node("Expand", "x", "s")], s=many(-1, 1)))
    read(of_nodes([node("Range", "a", "b", "a")], a=many(0)[0], b=many(9)[0]))
    read(of_nodes([node("Pad", "x", "p")], p=many(-1, 0)))
