"""The state space dual in PyTorch and ONNX Runtime: the same bits however it is cut, its gradients, its export.

Its numbers at every size are in tests/csrc/test_op_hosts.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from helpers.dual_cases import (
    DUALS,
    DualCase,
    assert_dual,
    dual_arrays,
    dual_gradients_oracle,
    dual_model_of,
    dual_oracle,
    grouped,
)
from helpers.op_cases import Arrays
from torch import Tensor

from hcmen.base.errors import BackendError, InputError
from hcmen.base.library import library_path
from hcmen.mamba.functions import add_functions
from hcmen.mamba.one_node import dual_model
from hcmen.mamba.scan import implementation, state_space_dual, state_space_dual_ref

SERIES = ("x", "dt", "B", "C", "z")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are small, and threads only slow torch down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tensors_of(arrays: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(x) for name, x in grouped(arrays).items()}


def session(model: onnx.ModelProto, *, library: bool = True, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if library:
        options.register_custom_ops_library(str(library_path()))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


# --- the same bits --------------------------------------------------------------------------------------------------

CUTS: list[Sequence[int]] = [[1] * 50, [16, 16, 16, 2], [1, 15, 17, 17], [31, 1, 1, 17], [49, 1]]
CUT_CASES = [
    DualCase(2, 50, 3, 17, 100, 1),
    DualCase(1, 50, 24, 5, 64, 8, wide=True, gated=False),
    DualCase(1, 50, 2, 64, 128, 2, dtype="float16"),
    DualCase(1, 50, 1, 3, 300, 1, softplus=False, dt_max=0.05),
]


def pieces(case: DualCase, arrays: Arrays, cut: Sequence[int]) -> Iterator[Arrays]:
    """The arrays of each call, in the order of the scan; states are for the caller to put in."""
    assert sum(cut) == case.time
    ends = list(itertools.accumulate(cut))
    for count, end in zip(cut, ends, strict=True):
        span = slice(case.time - end, case.time - end + count) if case.reverse else slice(end - count, end)
        yield {name: np.ascontiguousarray(x[:, span]) if name in SERIES else x for name, x in arrays.items()}


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("case", CUT_CASES, ids=str)
def test_a_sequence_gives_the_same_bits_however_it_is_cut(case: DualCase, reverse: bool) -> None:
    """Prefill in pieces, then single steps: what a graph with states promises."""
    case = DualCase(**{**case.__dict__, "reverse": reverse})
    arrays = dual_arrays(case)
    made = session(dual_model_of(case))
    whole, last = made.run(None, arrays)
    with implementation("native"):
        y, state = state_space_dual(**tensors_of(arrays), **case.flags, return_last_state=True)
    np.testing.assert_array_equal(y, whole)
    np.testing.assert_array_equal(state, last)
    for cut in CUTS:
        found, carried = [], arrays["initial_state"]
        for piece in pieces(case, arrays, cut):
            y, carried = made.run(None, {**piece, "initial_state": carried})
            found.append(y)
        joined = np.concatenate(found[::-1] if reverse else found, axis=1)
        np.testing.assert_array_equal(joined, whole)
        np.testing.assert_array_equal(carried, last)


def test_functions_give_the_same_bits_however_a_sequence_is_cut() -> None:
    """The body in steps, which files carry."""
    case = DualCase(1, 12, 4, 5, 17, 2)
    arrays = dual_arrays(case)
    made = session(dual_model_of(case, functions=True), library=False)
    whole, last = made.run(None, arrays)
    found, carried = [], arrays["initial_state"]
    for piece in pieces(case, arrays, [5, 1, 1, 4, 1]):
        y, carried = made.run(None, {**piece, "initial_state": carried})
        found.append(y)
    np.testing.assert_array_equal(np.concatenate(found, axis=1), whole)
    np.testing.assert_array_equal(carried, last)


@pytest.mark.parametrize("case", [*CUT_CASES, DualCase(1, 300, 1, 64, 64, 1), DualCase(3, 1, 24, 16, 64, 3)], ids=str)
def test_results_do_not_depend_on_the_thread_count(case: DualCase) -> None:
    """Neither where heads are shared out, nor where the rows of one head are."""
    arrays = dual_arrays(case)
    inputs = {name: x.float().requires_grad_() for name, x in tensors_of(arrays).items()}
    found: list[list[Tensor]] = []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        with implementation("native"):
            outputs = state_space_dual(**inputs, **case.flags, return_last_state=True)
        gradients = torch.autograd.grad(outputs[0].sum() + outputs[1].square().sum(), list(inputs.values()))
        found.append([*outputs, *gradients])
        got = session(dual_model_of(case), threads=min(count, 2)).run(None, arrays)
        if case.dtype == "float32":
            for g, want in zip(got, outputs, strict=False):
                np.testing.assert_array_equal(g, want.detach())
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("reverse", [False, True])
def test_steps_with_no_size_leave_the_state(reverse: bool) -> None:
    """dt far below zero before the softplus masks a step: what lies there changes nothing."""
    case = DualCase(2, 20, 3, 5, 17, 1, reverse=reverse)
    arrays = dual_arrays(case)
    short = {name: x[:, :6] if name in SERIES else x for name, x in arrays.items()}
    arrays["dt"][:, 6:] = -1e4
    arrays["x"][:, 6:] = 1e30
    made = session(dual_model_of(case))
    (y, last), (y_short, last_short) = made.run(None, arrays), made.run(None, short)
    np.testing.assert_array_equal(y[:, :6], y_short)
    np.testing.assert_array_equal(last, last_short)


# --- extremes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [None, "scan", "blocks"])
@pytest.mark.parametrize("rate", [0.0, 0.5, -1e-6, -1e3, -1e30])
def test_any_decay(rate: float, body: str | None) -> None:
    """States that grow, that are never forgotten, and decays that underflow to zero."""
    case = DualCase(1, 40, 2, 5, 20, 1, gated=False, mean=0.0)
    arrays = dual_arrays(case)
    arrays["A"][:] = rate
    model = dual_model_of(case)
    got = session(add_functions(model, body) if body else model, library=body is None).run(None, arrays)
    assert_dual(case, arrays, got, 2e-6)


def test_a_long_sequence_stays_exact() -> None:
    """Over 4096 steps that hardly decay, whose roundings add up, and over ones that do."""
    for rate, bound in ((-1e-3, 5e-6), (-1.0, 1e-6), (-16.0, 1e-6)):
        case = DualCase(1, 4096, 1, 16, 16, 1, gated=False)
        arrays = dual_arrays(case)
        arrays["A"][:] = rate
        with implementation("native"):
            got = state_space_dual(**tensors_of(arrays), **case.flags, return_last_state=True)
        assert_dual(case, arrays, [x.numpy() for x in got], bound)


def test_nan_and_infinity_reach_what_the_reference_sends_them_to() -> None:
    for name, value in itertools.product(("x", "dt", "B", "C", "z", "initial_state"), (np.nan, np.inf)):
        case = DualCase(1, 20, 2, 3, 16, 1)
        arrays = dual_arrays(case)
        arrays[name].flat[arrays[name].size // 2] = value
        tensors = tensors_of(arrays)
        with implementation("native"):
            got = state_space_dual(**tensors, **case.flags)
        want = state_space_dual_ref(**tensors, **case.flags)
        assert torch.equal(got.isfinite(), want.isfinite()), f"{name} = {value}"


# --- PyTorch --------------------------------------------------------------------------------------------------------


def test_reference_is_mambas_definition() -> None:
    """`state_space_dual_ref` against NumPy's recurrence, in float64, D in both forms."""
    for case in (
        DualCase(2, 9, 6, 5, 7, 3, wide=True, dt_min=0.01, dt_max=0.05),
        DualCase(1, 5, 2, 3, 4, 1, reverse=True),
    ):
        arrays = {name: x.astype(np.float64) for name, x in dual_arrays(case).items()}
        got = state_space_dual_ref(**tensors_of(arrays), **case.flags, return_last_state=True)
        for g, want in zip(got, dual_oracle(case, arrays), strict=True):
            np.testing.assert_allclose(g, want, rtol=1e-12, atol=1e-12)


def test_optional_arguments_may_be_absent() -> None:
    case = DualCase(2, 7, 4, 3, 5, 2, gated=False, stateful=False)
    tensors = tensors_of(dual_arrays(case))
    zeros = {"D": torch.zeros(4), "dt_bias": torch.zeros(4), "initial_state": torch.zeros(2, 4, 3, 5)}
    bare = {name: x for name, x in tensors.items() if name not in zeros}
    assert torch.equal(state_space_dual(**bare), state_space_dual(**{**tensors, **zeros}))


GRADIENT_CASES = [c for c in DUALS if c.dtype == "float32" and c.time * c.channel * c.state < 200_000][::3]


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_gradients_against_float64(case: DualCase) -> None:
    """Of every tensor argument, against autograd through the reference: D in both forms, limits that cut steps."""
    arrays, rng = dual_arrays(case), np.random.default_rng(1)
    dy, dlast = (rng.normal(size=size).astype(np.float32) for size in (case.series, case.states))
    want = dual_gradients_oracle(case, arrays, dy, dlast)
    leaves = {name: torch.from_numpy(x).requires_grad_() for name, x in arrays.items()}
    with implementation("native"):
        y, last = state_space_dual(**grouped(leaves), **case.flags, return_last_state=True)
    ((y * torch.from_numpy(dy)).sum() + (last * torch.from_numpy(dlast)).sum()).backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        wanted = want[f"d{name}"]
        # Those of parameters are sums over all steps, whose terms may cancel out.
        scale = max(float(np.abs(wanted).max()), 1.0 if name in ("A", "D", "dt_bias") else 0.1)
        off = float(np.abs(leaf.grad.numpy() - wanted).max()) / scale
        assert off <= 5e-6, f"d{name} is off by {off:.1e} of {scale:.1e}"


def test_a_step_that_is_cut_has_no_gradient() -> None:
    case = DualCase(1, 8, 2, 3, 4, 1, softplus=False, dt_min=0.1, dt_max=0.2, stateful=False, gated=False)
    tensors = tensors_of(dual_arrays(case))
    dt = torch.linspace(0.0, 0.3, 16).reshape(1, 8, 2).requires_grad_()
    tensors |= {"dt": dt, "dt_bias": torch.zeros(2)}
    with implementation("native"):
        state_space_dual(**tensors, **case.flags).sum().backward()
    assert dt.grad is not None
    cut = (dt < 0.1) | (dt > 0.2)
    assert cut.sum() == 10
    assert torch.equal(dt.grad == 0, cut)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """It computes in float32; outputs and gradients arrive in the type of the inputs."""
    case = DualCase(2, 20, 4, 5, 16, 2)
    tensors = tensors_of(dual_arrays(case))
    halves = {n: x.to(dtype) if n in SERIES else x for n, x in tensors.items()}
    wide = {name: x.float() for name, x in halves.items()}
    leaves = [halves[name].requires_grad_() for name in SERIES]
    with implementation("native"):
        y, last = state_space_dual(**halves, **case.flags, return_last_state=True)
        want, want_last = state_space_dual(**wide, **case.flags, return_last_state=True)
    assert (y.dtype, last.dtype) == (dtype, torch.float32)
    assert torch.equal(y, want.to(dtype))
    assert torch.equal(last, want_last)
    assert {x.dtype for x in torch.autograd.grad(y.sum(), leaves)} == {dtype}


def test_opcheck() -> None:
    for case in (DualCase(2, 5, 4, 3, 7, 2), DualCase(1, 3, 2, 2, 4, 1, wide=True, gated=False, stateful=False)):
        tensors = tensors_of(dual_arrays(case))
        names = ("x", "dt", "A", "B", "C", "D", "dt_bias", "z", "initial_state")
        inputs = [x if x is None else x.requires_grad_() for x in map(tensors.get, names)]
        torch.library.opcheck(torch.ops.hcmen.state_space_dual.default, (*inputs, True, False, 0.0, float("inf")))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("dt", (2, 5, 3), r"dt has shape \[2, 5, 3\], expected \[2, 5, 4\]"),
        ("C", (2, 5, 1, 7), r"C has shape \[2, 5, 1, 7\], expected \[2, 5, 2, 7\]"),
        ("D", (4, 2), r"D has shape \[4, 2\], expected \[4, 3\]"),
        ("initial_state", (2, 4, 7, 3), r"initial_state has shape .*, expected \[2, 4, 3, 7\]"),
    ],
)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...], message: str) -> None:
    tensors = tensors_of(dual_arrays(DualCase(2, 5, 4, 3, 7, 2)))
    with pytest.raises(InputError, match=message):
        state_space_dual(**{**tensors, name: torch.zeros(shape)})


def test_what_is_not_served_is_refused() -> None:
    tensors = tensors_of(dual_arrays(DualCase(1, 5, 6, 3, 7, 1)))
    with pytest.raises(InputError, match="4 groups, expected a divisor of the 6 heads"):
        state_space_dual(**{**tensors, "B": torch.zeros(1, 5, 4, 7), "C": torch.zeros(1, 5, 4, 7)})
    with pytest.raises(InputError, match=r"dt_min is 1.0 and dt_max is 0.5"):
        state_space_dual(**tensors, dt_min=1.0, dt_max=0.5)
    wide = {name: x.double() for name, x in tensors.items()}
    with implementation("native"), pytest.raises(BackendError, match="float64"):
        state_space_dual(**wide)


# --- ONNX -----------------------------------------------------------------------------------------------------------


class Mixer(torch.nn.Module):
    """What a Mamba-2 layer does between its projections, with a state in and out or without."""

    def __init__(self, *, gated: bool, stateful: bool, wide: bool, reverse: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.gated, self.stateful, self.reverse = gated, stateful, reverse
        self.projection = torch.nn.Parameter(torch.randn(8, 12 + 4 + 2 * 10 + 12, generator=generator) / 3)
        self.A_log = torch.nn.Parameter(torch.rand(4, generator=generator))
        self.D = torch.nn.Parameter(torch.randn((4, 3) if wide else (4,), generator=generator))
        self.dt_bias = torch.nn.Parameter(torch.randn(4, generator=generator) - 3)

    def forward(self, u: Tensor, initial_state: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        x, dt, B, C, z = (u @ self.projection).split([12, 4, 10, 10, 12], -1)
        heads, groups = (u.shape[0], -1, 4, 3), (u.shape[0], -1, 2, 5)
        return state_space_dual(
            x.reshape(heads),
            dt,
            -torch.exp(self.A_log),
            B.reshape(groups),
            C.reshape(groups),
            self.D,
            self.dt_bias,
            z.reshape(heads) if self.gated else None,
            initial_state,
            delta_softplus=True,
            dt_max=0.5,
            reverse=self.reverse,
            return_last_state=self.stateful,
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("program", [False, True], ids=["at once", "by torch.export"])
@pytest.mark.parametrize(
    ("gated", "stateful", "wide", "reverse"),
    [(True, True, False, False), (False, False, True, True), (True, False, True, False), (False, True, False, False)],
)
def test_a_traced_model_runs_with_and_without_the_library(
    gated: bool, stateful: bool, wide: bool, reverse: bool, program: bool
) -> None:
    """Exported for any batch and time: one node, which gives PyTorch's numbers at other sizes."""
    model = Mixer(gated=gated, stateful=stateful, wide=wide, reverse=reverse).eval()
    arguments: tuple[Tensor, ...] = (torch.randn(2, 7, 8),)
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time")
    dynamic: tuple[dict[int, torch.export.Dim], ...] = ({0: batch, 1: time},)
    if stateful:
        arguments, dynamic = (*arguments, torch.randn(2, 4, 3, 5)), (*dynamic, {0: batch})
    exported = torch.export.export(model, arguments, dynamic_shapes=dynamic, strict=False) if program else model
    shapes = {} if program else {"dynamic_shapes": dynamic}
    made = torch.onnx.export(exported, arguments, dynamo=True, opset_version=19, **shapes)
    assert made is not None
    proto = made.model_proto
    proto.ir_version = 9
    assert [n.op_type for n in proto.graph.node if n.domain == "hcmen"] == ["StateSpaceDual"]
    inputs = (torch.randn(3, 33, 8), torch.randn(3, 4, 3, 5))[: len(arguments)]
    with torch.no_grad():
        want = model(*inputs)
    for body in (None, "scan", "blocks"):
        ready = add_functions(proto, body) if body else proto
        running = session(ready, library=body is None)
        got = running.run(None, {i.name: x.numpy() for i, x in zip(running.get_inputs(), inputs, strict=True)})
        for g, w in zip(got, want if stateful else [want], strict=True):
            np.testing.assert_allclose(g, w, rtol=2e-6, atol=2e-6)


def test_nodes_of_several_signatures_share_a_function() -> None:
    """Gated and not, with a softplus and without, with a state and without, limits of their own: in one model."""
    cases = [
        DualCase(2, 20, 4, 3, 7, 2, gated=True, stateful=False, dt_max=0.05),
        DualCase(2, 20, 4, 3, 7, 2, gated=False, stateful=True, softplus=False, wide=True, dt_min=0.01),
    ]
    models = [onnx.compose.add_prefix(dual_model_of(c), f"{i}_", rename_functions=False) for i, c in enumerate(cases)]
    model = onnx.compose.merge_models(*models, io_map=[])
    for body in ("scan", "blocks"):
        running = session(add_functions(model, body), library=False)
        feeds = {f"{i}_{name}": x for i, c in enumerate(cases) for name, x in dual_arrays(c).items()}
        found = dict(zip((o.name for o in running.get_outputs()), running.run(None, feeds), strict=True))
        for i, case in enumerate(cases):
            got = [found[name] for name in (f"{i}_y", f"{i}_last_state") if name in found]
            assert_dual(case, dual_arrays(case), got)


def test_functions_refuse_a_limit_that_is_no_number() -> None:
    model = dual_model(4, 3, 7, functions=False)
    for value, shown in ((1, "1"), (float("nan"), "nan")):
        node = model.graph.node[0]
        kept = [a for a in node.attribute if a.name != "dt_max"]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute("dt_max", value)])
        with pytest.raises(InputError, match=f"'dt_max' is {shown}, expected a float that is a number"):
            add_functions(model)
