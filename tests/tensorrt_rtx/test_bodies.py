"""The real parser and builder of TensorRT-RTX take what the operators mean in standard operators, as a graph of one op.

Numbers are not compared: an engine runs on a GPU alone. tests/mamba/ holds the bodies to float64.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from helpers.dual_cases import DualCase, dual_model_of
from helpers.op_cases import ConvCase, ScanCase, model_of
from helpers.rtx import RealBuilder, needs_rtx
from onnx import inliner

from hcmen.base.op import DOMAIN
from hcmen.mamba.functions import SCAN_BODIES, add_functions, nodes_of

pytestmark = needs_rtx

SIZES = [{"batch": 1, "time": 1}, {"batch": 2, "time": 20}, {"batch": 4, "time": 40}]
# Half of all settings in float32, the others in float16: of any three switches, either type has every setting.
SCANS = [
    ScanCase(
        channel=6, state=3, group=group, dtype=("float32", "float16")[sum(on) % 2], **dict(zip(names, on, strict=True))
    )
    for names in [("gated", "stateful", "reverse", "softplus")]
    for on, group in zip(itertools.product((False, True), repeat=4), itertools.cycle((1, 3, None)))
]
DUALS = [
    DualCase(head=6, state=7, group=group, dtype=dtype, gated=a, stateful=b, reverse=c, softplus=a != b, wide=b != c)
    for (a, b, c), dtype, group in zip(
        itertools.product((False, True), repeat=3),
        itertools.cycle(("float32", "float16", "float16")),
        itertools.cycle((1, 3, None)),
        strict=False,
    )
]
CONVS = [
    ConvCase(channel=6, dtype=dtype, silu=silu, reverse=reverse, stateful=stateful)
    for dtype, silu, reverse, stateful in itertools.product(("float32", "float16"), *[(False, True)] * 3)
]


@pytest.fixture(scope="module")
def builder() -> RealBuilder:
    return RealBuilder()


def one_node(case: ScanCase | ConvCase | DualCase) -> Any:
    """A model of the node, without its function."""
    return dual_model_of(case) if isinstance(case, DualCase) else model_of(case)


@pytest.mark.parametrize("body", SCAN_BODIES)
@pytest.mark.parametrize("case", [*SCANS, *CONVS, *DUALS], ids=str)
def test_a_body_is_built(builder: RealBuilder, case: ScanCase | ConvCase | DualCase, body: str) -> None:
    model = inliner.inline_local_functions(add_functions(one_node(case), body))
    assert all(node.domain != DOMAIN for node in nodes_of(model))
    network, engine = builder.build(model, SIZES)
    inputs = {network.get_input(i).name: network.get_input(i).dtype.name for i in range(network.num_inputs)}
    half = {"float32": "FLOAT", "float16": "HALF"}[case.dtype]
    assert inputs["u" if isinstance(case, ScanCase) else "x"] == half
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    assert outputs[0].dtype.name == half
    rows = (case.head, case.head_dim) if isinstance(case, DualCase) else (case.channel,)
    assert tuple(outputs[0].shape) == (-1, -1, *rows)
    assert len(outputs) == 1 + case.stateful
    if case.stateful:
        state = (case.width - 1, case.channel) if isinstance(case, ConvCase) else (*rows, case.state)
        assert (tuple(outputs[1].shape), outputs[1].dtype.name) == ((-1, *state), "FLOAT")
    assert memoryview(engine).nbytes > 10_000


def test_a_node_whose_function_was_taken_out_is_not_parsed(builder: RealBuilder) -> None:
    for case in (ScanCase(), ConvCase(), DualCase()):
        _, _, errors = builder.parsed(one_node(case))
        assert any("Plugin not found" in error for error in errors)
