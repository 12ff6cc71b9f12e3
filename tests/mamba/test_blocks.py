"""The bodies for what compiles a model: blocks of steps and written-out taps, with the numbers of the other ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from helpers.op_cases import (
    Arrays,
    ConvCase,
    ScanCase,
    assert_close,
    assert_scan,
    conv_arrays,
    conv_oracle,
    model_of,
    scan_arrays,
    scan_oracle,
)
from onnx import AttributeProto, inliner

from hcmen.mamba.functions import MOST_TAPS, add_functions


def run(model: onnx.ModelProto, feeds: Arrays) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    made = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = made.run(None, feeds)
    return found


def in_blocks(case: ScanCase | ConvCase) -> onnx.ModelProto:
    """The model of `case`, sound and with its shapes inferred, also when the functions are put in their places."""
    model = add_functions(model_of(case), "blocks")
    onnx.checker.check_model(model, full_check=True)
    onnx.checker.check_model(inliner.inline_local_functions(model), full_check=True)
    return model


def scanned(case: ScanCase, arrays: Arrays | None = None) -> None:
    arrays = scan_arrays(case) if arrays is None else arrays
    got = run(in_blocks(case), arrays)
    assert all(np.isfinite(x).all() for x in got)
    assert_scan(case, arrays, got)


# --- the scan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
def test_any_length_is_right(reverse: bool) -> None:
    """Around the blocks, and far beyond: one body, in which no length stands."""
    case = ScanCase(2, 1, 3, 3, None, reverse=reverse)
    model = in_blocks(case)
    for time in (1, 2, 15, 16, 17, 31, 32, 33, 48, 500, 4096):
        for mean in (-4.0, 3.0):
            longer = replace(case, time=time, mean=mean, seed=time)
            arrays = scan_arrays(longer)
            assert_scan(longer, arrays, run(model, arrays))


@pytest.mark.parametrize("state", [1, 3, 12, 16, 512])
def test_any_state_size_is_right(state: int) -> None:
    for group in (None, 2):
        scanned(ScanCase(1, 37, 4, state, group, reverse=group is None))


@pytest.mark.parametrize("reverse", [False, True])
def test_decays_that_underflow_are_zero(reverse: bool) -> None:
    """Steps of a hundred and more between small ones: what came before is forgotten, and nothing is divided by it."""
    case = ScanCase(2, 45, 4, 3, 2, softplus=False, reverse=reverse)
    arrays = scan_arrays(case)
    arrays["delta"][:, ::7] = 150.0
    arrays["delta"][:, 20:40] = 1e4
    decays = np.exp(np.float32(arrays["delta"][..., None] + arrays["delta_bias"][:, None]) * arrays["A"])
    assert (decays == 0).any()
    assert (decays > 0.9).any()
    scanned(case, arrays)


def test_states_that_grow_are_right() -> None:
    """Rates above zero, by 1e26 in 16 steps: no model has them, and docs/op.md says how far they may go."""
    case = ScanCase(1, 33, 2, 2, None, softplus=False, gated=False)
    arrays = scan_arrays(case)
    arrays["A"] = np.float32([[1.0, 0.5], [0.25, 2.0]])
    arrays["delta"][:] = 1.9
    arrays["delta_bias"][:] = 0.0
    want = scan_oracle(case, arrays)
    for got, exact in zip(run(in_blocks(case), arrays), want, strict=True):
        finite = np.abs(exact) < 3e38
        assert finite.sum() > finite.size // 2
        np.testing.assert_allclose(got[finite], exact[finite], rtol=1e-4)


def test_masked_steps_leave_the_state_alone_bit_for_bit() -> None:
    """Steps of zero at the end change nothing, which is what fills the last block."""
    case = ScanCase(1, 5, 4, 3, None)
    arrays = scan_arrays(case)
    longer = dict(arrays)
    for name in ("u", "delta", "B", "C", "z"):
        longer[name] = np.concatenate([arrays[name], np.ones((1, 30, *arrays[name].shape[2:]), np.float32)], 1)
    longer["delta"][:, 5:] = -1e4
    model = in_blocks(case)
    (y, last), (more, after) = run(model, arrays), run(model, longer)
    np.testing.assert_array_equal(last, after)
    np.testing.assert_array_equal(y, more[:, :5])


def test_a_long_scan_in_parts_is_the_long_scan() -> None:
    case = ScanCase(2, 100, 6, 5, 2)
    arrays = scan_arrays(case)
    model = in_blocks(case)
    parts, state = [], arrays["initial_state"]
    for start, end in ((0, 1), (1, 20), (20, 84), (84, 100)):
        part = {n: x[:, start:end] if n in ("u", "delta", "B", "C", "z") else x for n, x in arrays.items()}
        y, state = run(model, {**part, "initial_state": state})
        parts.append(y)
    assert_close([np.concatenate(parts, 1), state], scan_oracle(case, arrays))


# --- the convolution --------------------------------------------------------------------------------------------------


def kinds(function: onnx.FunctionProto) -> set[str]:
    return {node.op_type for node in function.node}


def test_a_convolution_is_channels_last_unless_it_is_very_wide() -> None:
    for width, conv in ((1, False), (4, False), (MOST_TAPS, False), (MOST_TAPS + 1, True)):
        (function,) = in_blocks(ConvCase(width=width)).functions
        assert ("Conv" in kinds(function), "Transpose" in kinds(function)) == (conv, conv)


# --- one model --------------------------------------------------------------------------------------------------------


def test_one_body_serves_nodes_of_every_direction_and_size() -> None:
    """Widths from 1 to 7 and lengths from 3 to 40 in one model, of both directions and types."""
    scans = [
        ScanCase(2, 40, 6, 3, None, reverse=True, stateful=False),
        ScanCase(1, 3, 4, 12, 2, "float16", stateful=False),
        ScanCase(1, 16, 3, 1, 3, stateful=False),
    ]
    convs = [ConvCase(2, 9, 6, 4), ConvCase(1, 2, 3, 7, reverse=True), ConvCase(3, 5, 4, 1, "float16")]
    merged = onnx.ModelProto()
    feeds, wanted = {}, []
    for i, case in enumerate([*scans, *convs]):
        own = onnx.compose.add_prefix(model_of(case), f"{i}/", rename_functions=False)
        merged = own if i == 0 else onnx.compose.merge_models(merged, own, io_map=[])
        scan = isinstance(case, ScanCase)
        arrays = scan_arrays(case) if scan else conv_arrays(case)
        feeds.update({f"{i}/{name}": x for name, x in arrays.items()})
        wanted.append(scan_oracle(case, arrays)[0] if scan else conv_oracle(case, arrays)[0])
    add_functions(merged, "blocks")
    assert sorted(f.name for f in merged.functions) == ["CausalConv1d", "SelectiveScan"]
    for model in (merged, inliner.inline_local_functions(merged)):
        for got, want in zip(run(model, feeds), wanted, strict=True):
            assert_close([got], [want])


def test_the_body_is_one_that_compilers_take() -> None:
    """No product of matrices in the loop, no name there that stands outside, and nothing bound but the direction."""
    (function,) = in_blocks(ScanCase()).functions
    assert list(function.attribute) == ["reverse"]
    (scan,) = (node for node in function.node if node.op_type == "Scan")
    (block,) = (a.g for a in scan.attribute if a.type == AttributeProto.GRAPH)
    assert not {"MatMul", "Gemm"} & {node.op_type for node in block.node}
    outer = {*function.input, *(name for node in function.node for name in node.output)}
    inner = {name for node in block.node for name in node.output} | {value.name for value in block.input}
    assert not inner & outer
    (function,) = in_blocks(ConvCase()).functions
    assert list(function.attribute) == ["reverse"]


def test_bundles_carry_the_other_one() -> None:
    """What runs operator by operator is three times as slow in blocks: they are chosen by those who compile."""
    for case in (ScanCase(), ConvCase()):
        assert (
            add_functions(model_of(case)).SerializeToString()
            == add_functions(model_of(case), "scan").SerializeToString()
        )
        assert add_functions(model_of(case)).functions != add_functions(model_of(case), "blocks").functions
