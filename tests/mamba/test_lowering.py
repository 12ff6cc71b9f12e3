"""What exporters are shown: one node for each call, at once, by way of torch.export, and from a file alike."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import helper
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from hcmen.base.errors import InputError
from hcmen.base.library import library_path
from hcmen.base.op import OPERATORS
from hcmen.mamba.functions import add_functions
from hcmen.mamba.lowering import custom_op
from hcmen.mamba.scan import causal_conv1d, implementation, selective_scan

pytestmark = pytest.mark.filterwarnings("ignore")
ROADS = ("at once", "by torch.export")


class Mixer(torch.nn.Module):
    """Both operators. rank: of B and C. state: "", "given", "kept" (the last one is returned) or both."""

    def __init__(self, *, gated=True, softplus=True, reverse=False, rank=3, state="", dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.nn.Parameter(torch.randn(*shape, generator=generator) / 2)

        self.weight, self.bias, self.projection = normal(6, 4), normal(6), normal(6, 6 + 8 + 6)
        self.A, self.D = normal(6, 2), normal(6)
        self.gated, self.rank, self.state = gated, rank, state
        self.flags = {"delta_softplus": softplus, "reverse": reverse, "return_last_state": "kept" in state}

    def forward(self, x):
        u = causal_conv1d(x, self.weight, self.bias, reverse=self.flags["reverse"])
        delta, B, C, z = (u @ self.projection.to(x.dtype)).split([6, 4, 4, 6], -1)
        if self.rank == 4:
            B, C = B.unflatten(-1, (2, 2)), C.unflatten(-1, (2, 2))
        else:
            B, C = B[..., :2], C[..., :2]
        first = x.new_zeros(x.shape[0], 6, 2, dtype=torch.float32) + 0.5 if "given" in self.state else None
        return selective_scan(
            u, delta, -self.A.exp(), B, C, self.D, None, z if self.gated else None, first, **self.flags
        )


def exported(model, road, x=None, dims=True):
    x = torch.zeros(2, 5, 6) if x is None else x
    dynamic = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("time")},) if dims else None
    program = model.eval()
    shapes = {"dynamic_shapes": dynamic}
    if road != "at once":
        program, shapes = torch.export.export(model, (x,), strict=False, dynamic_shapes=dynamic), {}
    if road == "from a file":
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        program = torch.export.load(file)
    with contextlib.redirect_stdout(io.StringIO()):
        made = torch.onnx.export(program, (x,), dynamo=True, opset_version=19, verbose=False, **shapes).model_proto
    made.ir_version = 9
    return made


def nodes(model):
    return [
        (n.op_type, len(n.input), len(n.output), {a.name: helper.get_attribute_value(a) for a in n.attribute})
        for n in model.graph.node
        if n.domain == "hcmen"
    ]


def ran(model, x, library):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if library:
        options.register_custom_ops_library(str(library_path()))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {model.graph.input[0].name: x.numpy()})


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"gated": False, "softplus": False, "rank": 4, "state": "given"},
        {"state": "kept"},
        {"rank": 4, "state": "given kept", "reverse": True},
    ],
    ids=str,
)
def test_every_road_gives_the_same_nodes_and_the_numbers_of_the_reference(kind):
    """Held to float64, with and without the library, at sizes of which none is the example's."""
    model = Mixer(**kind)
    found = {road: exported(model, road) for road in ("at once", "from a file")}
    direct = nodes(found["at once"])
    assert [n[0] for n in direct] == ["CausalConv1d", "SelectiveScan"]
    stateful = bool(kind.get("state"))
    assert direct[1][1:3] == (7 + kind.get("gated", True) + stateful, 1 + stateful)
    assert nodes(found["from a file"]) == direct
    x = torch.randn(3, 11, 6, generator=torch.Generator().manual_seed(1))
    with implementation("ref"), torch.no_grad():
        want = model.double()(x.double())
    want = want if isinstance(want, tuple) else (want,)
    for proto in found.values():
        add_functions(proto)
        for library in (False, True):
            got = ran(proto, x, library)
            assert len(got) == len(want)
            for g, w in zip(got, want, strict=True):
                assert np.abs(g - w.numpy()).max() <= 2e-6 * w.abs().max()


def test_a_program_of_torch_export_still_runs_as_one():
    """With the kernels of the machine, and trains."""
    model = Mixer(state="kept").eval()
    x = torch.randn(2, 5, 6)
    program = torch.export.export(model, (x,), strict=False)
    for got, want in zip(program.module()(x), model(x), strict=True):
        torch.testing.assert_close(got, want)
    targets = [str(n.target) for n in program.graph.nodes if "hcmen" in str(n.target)]
    assert targets == ["hcmen.causal_conv1d.default", "hcmen.selective_scan.default"]


@pytest.mark.parametrize("road", ROADS)
def test_half_precision_becomes_a_node_of_half_precision(road):
    model = exported(Mixer(), road, torch.zeros(2, 5, 6, dtype=torch.float16))
    assert [n[0] for n in nodes(model)] == ["CausalConv1d", "SelectiveScan"]
    kinds = {i.name: i.type.tensor_type.elem_type for i in (*model.graph.output, *model.graph.value_info)}
    for node in model.graph.node:
        if node.domain == "hcmen":
            assert kinds[node.output[0]] == 10


@pytest.mark.parametrize("road", ROADS)
def test_float64_is_refused_and_the_reference_can_be_asked_for(road):
    x = torch.zeros(2, 3, 6)
    with pytest.raises(Exception, match=r"exported in torch\.float64, expected float32") as error:
        exported(Mixer().double(), road, x.double(), dims=False)
    causes = [error.value]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    assert any(isinstance(cause, InputError) for cause in causes)
    with implementation("ref"):
        assert not nodes(exported(Mixer(), road, x, dims=False))


def test_every_operator_of_the_table_has_its_lowering():
    for op in OPERATORS.values():
        assert custom_op(op) in torch._decomp.decomposition_table, op.name
        assert custom_op(op) in torch._decomp.meta_table, op.name


def test_tensors_without_content_keep_their_device():
    """Where sizes are symbols PyTorch asks decompositions for shapes, and a node's tensors are on the CPU."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode:
        real = torch.empty(2, 5, 6, device="meta")
    x = mode.from_tensor(torch.empty(2, 5, 6, device="meta"))
    assert real.shape == x.shape
    with mode:
        args = [x, x, x.new_empty(6, 3), x.new_empty(2, 5, 3), x.new_empty(2, 5, 3), x.new_empty(6), x.new_empty(6)]
        y, last = torch.ops.hcmen.selective_scan(*args, None, None, True, False)
    assert (y.device, last.device) == (x.device, x.device)
    assert tuple(y.shape) == (2, 5, 6)
    assert tuple(last.shape) == (2, 6, 3)
