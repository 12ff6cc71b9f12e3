"""What other people's tools leave of the operators and their functions: the table of docs/op.md, tool by tool.

Each tool gets a model as somebody else would have it, and its result runs with the library and without. A tool that is
not installed is skipped; the versions that the table tells were all run once.
"""

from __future__ import annotations

import copy
import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from hcmen.base.library import library_path
from hcmen.base.op import DOMAIN, OPERATORS
from hcmen.mamba.functions import add_functions, strip_functions

ROOT = Path(__file__).resolve().parents[2]
CHANNELS, STATES = 48, 8
RNG = np.random.default_rng(7)
X = RNG.normal(size=(2, 70, CHANNELS)).astype(np.float32)
KEPT, GONE, KERNELS, FUNCTIONS, RUNS, FAILS = "kept", "gone", "kernels", "functions", "runs", "does not load"


def mixer() -> onnx.ModelProto:
    """A convolution and a scan between matrix products, with its functions."""
    rng = np.random.default_rng(3)
    nodes, weights = [], []

    def weight(name: str, array: Any) -> str:
        weights.append(numpy_helper.from_array(np.asarray(array, np.float32), name))
        return name

    def product(x: str, width: int, name: str) -> str:
        weight(f"{name}_weight", rng.normal(size=(CHANNELS, width)) / CHANNELS**0.5)
        nodes.append(helper.make_node("MatMul", [x, f"{name}_weight"], [name], name=f"{name}_product"))
        return name

    weight("kernel", rng.normal(size=(CHANNELS, 4)) / 2)
    weight("kernel_bias", rng.normal(size=CHANNELS))
    inside = product("x", CHANNELS, "inside")
    conv = helper.make_node(
        "CausalConv1d", [inside, "kernel", "kernel_bias"], ["u"], name="conv", domain=DOMAIN, activation="silu"
    )
    nodes.append(conv)
    inputs = ["u", product("u", CHANNELS, "delta")]
    inputs.append(weight("A", -np.tile(np.arange(1.0, STATES + 1), (CHANNELS, 1))))
    inputs += [product("u", STATES, "B"), product("u", STATES, "C")]
    inputs += [weight("D", rng.normal(size=CHANNELS)), weight("delta_bias", np.full(CHANNELS, -2.0))]
    nodes.append(helper.make_node("SelectiveScan", inputs, ["scanned"], name="scan", domain=DOMAIN, delta_softplus=1))
    product("scanned", CHANNELS, "y")
    shape = ["batch", "time", CHANNELS]
    graph = helper.make_graph(
        nodes,
        "mixer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        weights,
    )
    opsets = [helper.make_opsetid("", 19), helper.make_opsetid(DOMAIN, 1)]
    return add_functions(helper.make_model(graph, opset_imports=opsets, ir_version=9))


def session(model: onnx.ModelProto | Path, library: bool, **settings: Any) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    for name, value in settings.items():
        setattr(options, name, value)
    if library:
        options.register_custom_ops_library(str(library_path()))
    content = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def scores(model: onnx.ModelProto | Path, library: bool) -> np.ndarray | None:
    """The result on `X`; None where no session can be made."""
    try:
        made = session(model, library)
    except Exception:  # each kind of refusal has a class of its own
        return None
    return made.run([made.get_outputs()[0].name], {made.get_inputs()[0].name: X})[0]


def installed(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed: `make test-all` brings it")


# --- the tools --------------------------------------------------------------------------------------------------------

Result = onnx.ModelProto | Path
Tool = Callable[[onnx.ModelProto, Path], Result]


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def loaded(path: Path) -> onnx.ModelProto:
    return onnx.load(path)


def on_files(change: Callable[[str, str], Any]) -> Tool:
    """A tool that reads one file and writes another."""

    def tool(model: onnx.ModelProto, folder: Path) -> Result:
        change(str(saved(model, folder)), str(folder / "made.onnx"))
        return loaded(folder / "made.onnx")

    return tool


def graphsurgeon(model: onnx.ModelProto, _: Path) -> Result:
    gs = installed("onnx_graphsurgeon")
    return gs.export_onnx(gs.import_onnx(model).fold_constants().cleanup().toposort())


def polygraphy(*arguments: str) -> Tool:
    def change(source: str, target: str) -> None:
        command = shutil.which("polygraphy", path=Path(sys.executable).parent) or shutil.which("polygraphy")
        if command is None:
            pytest.skip("polygraphy is not installed: `make test-all` brings it")
        subprocess.run([command, "surgeon", arguments[0], source, "-o", target, *arguments[1:]], check=True)

    return on_files(change)


def merged(model: onnx.ModelProto, _: Path) -> Result:
    from onnx import compose

    shape = ["batch", "time", CHANNELS]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("in", "out")]
    tail = helper.make_graph([helper.make_node("Identity", ["in"], ["out"])], "tail", ends[:1], ends[1:])
    second = helper.make_model(tail, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    return compose.merge_models(model, second, io_map=[("y", "in")])


def optimised(library: bool) -> Tool:
    def tool(model: onnx.ModelProto, folder: Path) -> Result:
        session(model, library, optimized_model_filepath=str(folder / "made.onnx"))
        return loaded(folder / "made.onnx")

    return tool


def preprocessed(**options: bool) -> Tool:
    def change(source: str, target: str) -> None:
        from onnxruntime.quantization.shape_inference import quant_pre_process

        quant_pre_process(source, target, skip_symbolic_shape=True, **options)

    return on_files(change)


def dynamic(source: str, target: str) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(source, target)


def static(form: str) -> Tool:
    def change(source: str, target: str) -> None:
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self.left = [{"x": X}, {"x": 0.5 * X}]

            def get_next(self) -> Any:
                return self.left.pop() if self.left else None

        quantize_static(source, target, Reader(), quant_format=QuantFormat[form])

    return on_files(change)


def halved(module: str, *, blocked: bool) -> Tool:
    def tool(model: onnx.ModelProto, _: Path) -> Result:
        float16 = installed(module)
        block = [*float16.DEFAULT_OP_BLOCK_LIST, *OPERATORS] if blocked else None
        return float16.convert_float_to_float16(model, keep_io_types=True, op_block_list=block)

    return tool


def ort_format(*arguments: str) -> Tool:
    def tool(model: onnx.ModelProto, folder: Path) -> Result:
        saved(model, folder)
        command = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort", str(folder)]
        subprocess.run([*command, "--optimization_style", "Fixed", *arguments], check=True, capture_output=True)
        return folder / "model.ort"

    return tool


def in_memory(module: str, function: str, *arguments: Any, **options: Any) -> Tool:
    def tool(model: onnx.ModelProto, _: Path) -> Result:
        made = getattr(installed(module), function)(model, *arguments, **options)
        return model if made is None else made[0] if isinstance(made, tuple) else made

    return tool


def through_ir(model: onnx.ModelProto, _: Path) -> Result:
    ir = installed("onnx_ir")
    return ir.to_proto(ir.from_proto(model))


def fused(source: str, target: str) -> None:
    from onnxruntime.transformers import optimizer

    optimizer.optimize_model(source, num_heads=0, hidden_size=0, opt_level=0).save_model_to_file(target)


def fixed(source: str, target: str) -> None:
    command = [sys.executable, "-m", "onnxruntime.tools.make_dynamic_shape_fixed", "--dim_param", "batch"]
    subprocess.run([*command, "--dim_value", "2", source, target], check=True, capture_output=True)


ORT_16, COMMON_16 = "onnxruntime.transformers.float16", "onnxconverter_common.float16"
TOOLS: dict[str, Tool] = {
    "onnxslim.slim": in_memory("onnxslim", "slim"),
    "onnxsim.simplify": in_memory("onnxsim", "simplify"),
    "onnx_graphsurgeon, fold_constants and cleanup": graphsurgeon,
    "polygraphy surgeon sanitize --fold-constants": polygraphy("sanitize", "--fold-constants", "--cleanup"),
    "polygraphy surgeon extract": polygraphy("extract", "--outputs", "y:auto"),
    "onnx.shape_inference.infer_shapes": in_memory("onnx.shape_inference", "infer_shapes", data_prop=True),
    "onnx.utils.extract_model": on_files(lambda a, b: onnx.utils.extract_model(a, b, ["x"], ["y"])),
    "onnx.compose.merge_models": merged,
    "onnx.compose.add_prefix": in_memory("onnx.compose", "add_prefix", "p_"),
    "onnx.compose.add_prefix(rename_functions=False)": in_memory(
        "onnx.compose", "add_prefix", "p_", rename_functions=False
    ),
    "onnx.version_converter.convert_version": in_memory("onnx.version_converter", "convert_version", 21),
    "onnx.inliner.inline_local_functions": in_memory("onnx.inliner", "inline_local_functions"),
    "onnx_ir.from_proto and to_proto": through_ir,
    "onnxscript.optimizer.optimize": in_memory("onnxscript.optimizer", "optimize"),
    "onnxscript.optimizer.optimize(inline=False)": in_memory("onnxscript.optimizer", "optimize", inline=False),
    "onnxscript.rewriter.rewrite": in_memory("onnxscript.rewriter", "rewrite"),
    "onnxscript.version_converter.convert_version": in_memory("onnxscript.version_converter", "convert_version", 21),
    "optimized_model_filepath, library registered": optimised(True),
    "optimized_model_filepath, no library": optimised(False),
    "onnxruntime.transformers.optimizer, opt_level=0": on_files(fused),
    "make_dynamic_shape_fixed": on_files(fixed),
    "convert_onnx_models_to_ort": ort_format(),
    "convert_onnx_models_to_ort --custom_op_library": ort_format("--custom_op_library", str(library_path())),
    "quant_pre_process": preprocessed(),
    "quant_pre_process(skip_optimization=True)": preprocessed(skip_optimization=True),
    "quantize_dynamic": on_files(dynamic),
    "quantize_static, QDQ": static("QDQ"),
    "quantize_static, QOperator": static("QOperator"),
    ORT_16: halved(ORT_16, blocked=False),
    f"{ORT_16}, op_block_list": halved(ORT_16, blocked=True),
    COMMON_16: halved(COMMON_16, blocked=False),
    f"{COMMON_16}, op_block_list": halved(COMMON_16, blocked=True),
}
COARSE = ("quantize", "float16")
"""Tools that change the numbers by what they are for."""


def documented() -> dict[str, tuple[str, ...]]:
    """Tool -> op, functions, with the library, without it, as docs/op.md says."""
    section = (ROOT / "docs" / "op.md").read_text().partition("\n## Tools\n")[2].partition("\n## ")[0]
    rows = [[cell.strip().replace("`", "") for cell in line.split("|")[1:-1]] for line in section.splitlines()]
    return {row[0]: tuple(row[2:6]) for row in rows if len(row) == 7 and row[2] in (KEPT, GONE, "-")}


def test_the_table_has_every_tool():
    assert list(documented()) == list(TOOLS)


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_leaves_what_the_table_says(name, tmp_path):
    model = mixer()
    with_library, without = scores(model, True), scores(model, False)
    assert with_library is not None
    assert without is not None
    assert 0 < np.abs(with_library - without).max() < 1e-5  # the bits tell which of the two ran
    made = TOOLS[name](copy.deepcopy(model), tmp_path)
    coarse = any(word in name for word in COARSE)
    got = [scores(made, library) for library in (True, False)]
    for result in got:
        if result is not None:
            bound = 0.1 if coarse else 1e-6
            assert np.abs(result - with_library).max() <= bound * np.abs(with_library).max()
    if isinstance(made, onnx.ModelProto):
        nodes = sum(n.domain == DOMAIN and n.op_type in OPERATORS for n in made.graph.node)
        functions = sum(f.domain == DOMAIN and f.name in OPERATORS for f in made.functions)
        assert nodes in (0, 2)
        assert functions in (0, 2)
        left = [KEPT if nodes else GONE, KEPT if functions else GONE]
        kernels = nodes > 0
    else:
        left = ["-", "-"]
        kernels = got[0] is not None and np.array_equal(got[0], with_library)
    ran = [FAILS if got[0] is None else KERNELS if kernels else FUNCTIONS, FAILS if got[1] is None else RUNS]
    assert documented()[name] == (*left, *ran)


@pytest.mark.parametrize(
    "name", ["onnx.version_converter.convert_version", "optimized_model_filepath, library registered"]
)
def test_functions_that_were_dropped_are_put_back(name, tmp_path):
    expected = scores(mixer(), False)
    made = TOOLS[name](mixer(), tmp_path)
    assert isinstance(made, onnx.ModelProto)
    assert scores(made, False) is None
    np.testing.assert_allclose(scores(add_functions(made), False), expected, atol=1e-6 * np.abs(expected).max())


def test_symbolic_shape_inference_stops_at_the_operators(tmp_path, monkeypatch):
    """With the functions and without."""
    monkeypatch.chdir(tmp_path)  # it leaves its models where it runs
    symbolic = importlib.import_module("onnxruntime.tools.symbolic_shape_infer").SymbolicShapeInference
    for model, why in ((mixer(), "NoneType"), (strip_functions(mixer()), "Incomplete symbolic shape inference")):
        with pytest.raises(Exception, match=why):
            symbolic.infer_shapes(model, auto_merge=True)


def test_versions_are_told():
    text = (ROOT / "docs" / "op.md").read_text().partition("\n## Tools\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `.*?\| ([^|]*?) \|", text, re.M)
    assert rows
    assert all(re.fullmatch(r"\d+\.\d+(\.\d+)*", version) for version in rows)
