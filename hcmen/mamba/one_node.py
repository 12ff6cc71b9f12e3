"""Models of one hcmen node: for tests, and as the smallest example of how the operators are written down.

`python -m hcmen.mamba.one_node` writes hcmen/base/selfcheck*.onnx, which `hcmen-doctor` runs on machines without
`onnx`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx import ModelProto, TensorProto, helper

from hcmen.base.files import write_file
from hcmen.base.op import (
    CAUSAL_CONV1D,
    DERIVED_SIZES,
    DOMAIN,
    IR_VERSION,
    OPSET,
    PARSER_ATTRIBUTES,
    SELECTIVE_SCAN,
    STATE_SPACE_DUAL,
    VERSION,
    Operator,
    Tensor,
)
from hcmen.mamba.functions import add_functions

__all__ = [
    "conv_model",
    "dual_model",
    "one_node_model",
    "scan_model",
    "selfcheck_conv_model",
    "selfcheck_dual_model",
    "selfcheck_model",
]

Size = int | str
_ELEMENT = {
    name: TensorProto.DataType.Value(name.upper().replace("FLOAT32", "FLOAT").replace("FLOAT64", "DOUBLE"))
    for name in ("float32", "float16", "float64", "bfloat16", "int32", "int64", "uint8", "bool", "string")
}


def scan_model(
    channel: int,
    state: int,
    *,
    group: int | None = None,
    dtype: str = "float32",
    batch: Size = "batch",
    time: Size = "time",
    functions: bool = True,
    **switches: bool,
) -> ModelProto:
    """One SelectiveScan node whose inputs and outputs are the graph's, under the names of docs/op.md.

    Args:
        group: None gives B and C rank 3, a number gives them rank 4.
        batch, time: a number, or the name of a dynamic size.
        functions: carry the model-local function.
        switches: attributes of docs/op.md; those that are left out have their default.
    """
    sizes: dict[str, Size] = {"batch": batch, "time": time, "channel": channel, "state": state}
    if group is not None:
        sizes["group"] = group
    attributes: dict[str, Any] = {**SELECTIVE_SCAN.defaults, **{name: int(on) for name, on in switches.items()}}
    reverse = attributes["reverse"]
    attributes |= {"scan_input_directions": [reverse] * 4, "scan_output_directions": [reverse]}
    return _model(SELECTIVE_SCAN, sizes, dtype, attributes, functions)


def dual_model(
    head: int,
    head_dim: int,
    state: int,
    *,
    group: int | None = 1,
    wide_D: bool = False,
    dtype: str = "float32",
    batch: Size = "batch",
    time: Size = "time",
    functions: bool = True,
    **attributes: float,
) -> ModelProto:
    """One StateSpaceDual node; arguments as in `scan_model`. wide_D: D is [head, head_dim]."""
    sizes: dict[str, Size] = {"batch": batch, "time": time, "head": head, "head_dim": head_dim, "state": state}
    if group is not None:
        sizes["group"] = group
    op = STATE_SPACE_DUAL
    values: dict[str, Any] = {
        **op.defaults,
        **{name: float(v) if name in op.numbers else int(v) for name, v in attributes.items()},
    }
    reverse = values["reverse"]
    values |= {"scan_input_directions": [reverse] * 4, "scan_output_directions": [reverse]}
    return _model(op, sizes, dtype, values, functions, () if wide_D else op.spread)


def conv_model(
    channel: int,
    width: int,
    *,
    dtype: str = "float32",
    activation: str = "silu",
    reverse: bool = False,
    stateful: bool = False,
    batch: Size = "batch",
    time: Size = "time",
    functions: bool = True,
) -> ModelProto:
    """One CausalConv1d node; arguments as in `scan_model`."""
    attributes: dict[str, Any] = {
        "activation": activation,
        "reverse": int(reverse),
        **({"stateful": 1} if stateful else {}),
        "group": channel,
        "pads": [0, width - 1] if reverse else [width - 1, 0],
    }
    sizes: dict[str, Size] = {"batch": batch, "time": time, "channel": channel, "width": width}
    return _model(CAUSAL_CONV1D, sizes, dtype, attributes, functions)


def _model(
    op: Operator,
    sizes: Mapping[str, Size],
    dtype: str,
    attributes: Mapping[str, Any],
    functions: bool,
    spread: Sequence[str] = (),
) -> ModelProto:
    """One node of `op`; a size that `sizes` lacks is left out of the shapes, and the last one of tensors `spread`."""

    known = dict(sizes)
    for name, (of, plus) in DERIVED_SIZES.items():
        size = sizes.get(of)
        if isinstance(size, int):
            known[name] = size + plus

    def shape(tensor: Tensor) -> list[Size]:
        names = tensor.sizes[:-1] if tensor.name in spread else tensor.sizes
        return [known[name] for name in names if name in known]

    inputs, outputs = (
        {t.name: (dtype if t.shared else "float32", shape(t)) for t in tensors}
        for tensors in (op.inputs_with(attributes), op.outputs_with(attributes))
    )
    return one_node_model(op.name, inputs, outputs, attributes, functions=functions)


def one_node_model(
    op_type: str,
    inputs: Mapping[str, tuple[str, Sequence[Size] | None]],
    outputs: Mapping[str, tuple[str, Sequence[Size] | None]],
    attributes: Mapping[str, Any],
    *,
    functions: bool = True,
) -> ModelProto:
    """One node of this domain named `node`.

    Args:
        inputs, outputs: name -> (dtype, shape), in the order of the node; None for a shape: unknown, rank included.
        attributes: those that both operators have in common are added.
    """
    values: dict[str, Any] = {**PARSER_ATTRIBUTES, **attributes}
    node = helper.make_node(op_type, list(inputs), list(outputs), name="node", domain=DOMAIN, **values)
    given, made = (
        [helper.make_tensor_value_info(name, _ELEMENT[dtype], shape) for name, (dtype, shape) in side.items()]
        for side in (inputs, outputs)
    )
    graph = helper.make_graph([node], op_type, given, made)
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=IR_VERSION,
        producer_name="hcmen",
    )
    return add_functions(model) if functions else model


def selfcheck_model() -> ModelProto:
    """The model of base/selfcheck.onnx: softplus, gate and state on, dynamic batch and time, with its function."""
    return scan_model(8, 4, delta_softplus=True, gated=True, stateful=True)


def selfcheck_conv_model() -> ModelProto:
    """The model of base/selfcheck_conv.onnx: width 4, silu and state on, dynamic batch and time, with its function."""
    return conv_model(8, 4, stateful=True)


def selfcheck_dual_model() -> ModelProto:
    """The model of base/selfcheck_dual.onnx: softplus, gate and state on, two groups, dynamic batch and time."""
    return dual_model(4, 3, 5, group=2, delta_softplus=True, gated=True, stateful=True)


if __name__ == "__main__":
    models = {
        "selfcheck.onnx": selfcheck_model(),
        "selfcheck_conv.onnx": selfcheck_conv_model(),
        "selfcheck_dual.onnx": selfcheck_dual_model(),
    }
    for name, model in models.items():
        target = Path(__file__).resolve().parents[1] / "base" / name
        write_file(target, model.SerializeToString(deterministic=True))
        print(f"wrote {target} ({target.stat().st_size} bytes)")
