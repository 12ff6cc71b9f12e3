"""Registers the AOT plugins with TensorRT's own Python code, and walks each of them through what a builder asks of it.

A script, run by tests/mamba/test_trt_aot.py with stubs of the libraries that the bindings are linked against; the
registry behind them is that of libnvinfer_lean. The bindings cannot make expressions without a builder, so these are
this file's own. Prints JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import tensorrt_bindings as trt


class Expression:
    """A size: a constant, or one that `evaluate` tells once the sizes of a call are known."""

    def __init__(self, evaluate: Any, constant: int | None = None):
        self.evaluate, self.constant = evaluate, constant

    def is_constant(self) -> bool:
        return self.constant is not None

    def get_constant_value(self) -> int:
        assert self.constant is not None
        return self.constant


class ExprBuilder:
    def constant(self, value: int) -> Expression:
        return Expression(lambda: value, value)

    def operation(self, operation: Any, a: Expression, b: Expression) -> Expression:
        kind = trt.DimensionOperation
        function = {
            kind.SUM: lambda x, y: x + y,
            kind.PROD: lambda x, y: x * y,
            kind.CEIL_DIV: lambda x, y: -(-x // y),
        }[operation]
        return Expression(lambda: function(a.evaluate(), b.evaluate()))


class SymExpr:
    """What a plugin hands back: a parameter of its kernel, or of the launch."""


class Setter(dict[int, Any]):
    nbSymExprs = 0  # TensorRT's own name


class Launch:
    """Takes grid_x and the rest."""


trt.IDimensionExpr = Expression
trt.ISymExpr = SymExpr
trt.DimsExprs = lambda count: [None] * count
sys.modules["tensorrt"] = trt
import tensorrt_bindings.plugin as trtp  # noqa: E402

sys.modules["tensorrt.plugin"] = trtp
from hcmen.mamba import trt_aot  # noqa: E402

SIZES = {"batch": 3, "time": 50}
CHANNEL, STATE, GROUP, WIDTH = 66, 17, 2, 4


def shapes(names: tuple[str, ...], grouped: bool) -> list[list[str | int]]:
    series: list[str | int] = ["batch", "time", CHANNEL]
    projection: list[str | int] = ["batch", "time", GROUP, STATE] if grouped else ["batch", "time", STATE]
    states: list[str | int] = ["batch", WIDTH - 1, CHANNEL] if "weight" in names else ["batch", CHANNEL, STATE]
    known: dict[str, list[str | int]] = {
        **dict.fromkeys(("u", "delta", "z", "x", "y"), series),
        **dict.fromkeys(("B", "C"), projection),
        **{name: [CHANNEL] for name in ("D", "delta_bias", "bias")},
        **dict.fromkeys(("initial_state", "last_state"), states),
        "A": [CHANNEL, STATE],
        "weight": [CHANNEL, WIDTH],
    }
    return [known[name] for name in names]


def walk(
    plugin_name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], half: bool, grouped: bool
) -> dict[str, Any]:
    """One plugin from its creator to its kernel."""
    creator = trt.get_plugin_registry().get_creator(plugin_name, "1", "hcmen")
    request = trt.QuickPluginCreationRequest.STRICT_AOT
    fields = trt.PluginFieldCollection([])
    plugin = creator.create_plugin(plugin_name, "hcmen", fields, trt.TensorRTPhase.BUILD, request)
    shared = {"u", "delta", "B", "C", "z", "x", "y"}
    types = [trt.DataType.HALF if half and name in shared else trt.DataType.FLOAT for name in (*inputs, *outputs)]
    expected = shapes((*inputs, *outputs), grouped)
    output_types = plugin.get_output_data_types(types[: len(inputs)], [len(shape) for shape in expected[: len(inputs)]])
    builder = ExprBuilder()

    def expression(size: str | int) -> Expression:
        return builder.constant(size) if isinstance(size, int) else Expression(lambda: SIZES[size])

    expressions = [[expression(size) for size in shape] for shape in expected[: len(inputs)]]
    output_shapes = plugin.get_output_shapes(expressions, [], builder)

    def description(shape: list[str | int], data_type: Any) -> Any:
        desc, dynamic = trt.PluginTensorDesc(), trt.DynamicPluginTensorDesc()
        desc.dims = [size if isinstance(size, int) else -1 for size in shape]
        desc.type, desc.format = data_type, trt.TensorFormat.LINEAR
        dynamic.desc = desc
        dynamic.min = dynamic.opt = dynamic.max = [size if isinstance(size, int) else SIZES[size] for size in shape]
        return dynamic

    both = [description(shape, data_type) for shape, data_type in zip(expected, types, strict=True)]
    combinations = plugin.get_supported_format_combinations(both, len(inputs))
    plugin.configure_plugin(both[: len(inputs)], both[len(inputs) :])
    plugin.set_tactic(0)
    launch, integers = Launch(), Setter()
    plugin.get_launch_params(expressions, both, len(inputs), launch, integers, builder)
    kernel, ptx = plugin.get_kernel([x.desc for x in both[: len(inputs)]], [x.desc for x in both[len(inputs) :]])
    return {
        "fields": len(creator.field_names),
        "output_types": [str(each) for each in output_types] == [str(each) for each in types[len(inputs) :]],
        "output_shapes": [[size.evaluate() for size in shape] for shape in output_shapes],
        "combinations": [
            [str(x.type).rpartition(".")[2] for x in combinations[i : i + len(both)]]
            for i in range(0, len(combinations), len(both))
        ],
        "linear": all(x.format == trt.TensorFormat.LINEAR for x in combinations),
        "tactics": list(plugin.get_valid_tactics()),
        "launch": {name: value.expr.evaluate() for name, value in vars(launch).items()},
        "integers": [integers[i].expr.evaluate() for i in range(integers.nbSymExprs)],
        "int32": all(str(x.dtype) == "PluginArgDataType.INT32" for x in integers.values()),
        "kernel": kernel,
        "ptx": ptx.decode(),
    }


def main() -> None:
    compiler = trt_aot.register(87)
    assert trt_aot.register(87).version == compiler.version  # once more means once
    walked = {}
    for number, (scan, name) in enumerate(trt_aot.SCAN_NAMES.items()):
        inputs = ("u", "delta", "A", "B", "C", "D", "delta_bias")
        inputs += ("z",) * scan.gated + ("initial_state",) * scan.stateful
        walked[name] = walk(name, inputs, ("y",) + ("last_state",) * scan.stateful, number % 2 == 0, number % 3 == 0)
    for number, (conv, name) in enumerate(trt_aot.CONV_NAMES.items()):
        inputs = ("x", "weight", "bias") + ("initial_state",) * conv.stateful
        walked[name] = walk(name, inputs, ("y",) + ("last_state",) * conv.stateful, number % 2 == 0, False)
    print(json.dumps({"version": trt.__version__, "numpy": np.__version__, "plugins": walked}))


main()
