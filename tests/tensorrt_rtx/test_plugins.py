"""No node that a plugin may be taken for reaches the parser of TensorRT-RTX, which ends a process that has the plugin.

Without TensorRT's headers there is no plugin library, and the same graphs meet no plugins.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.rtx import RealBuilder, command, listed, needs_rtx
from helpers.small_bundle import graph, make_bundle
from helpers.trt_program import INCLUDES, build
from helpers.trt_wheels import NO_HEADERS, NO_LEAN, lean_folders
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from hcmen.base.errors import InputError
from hcmen.base.op import DOMAIN, VERSION
from hcmen.mamba.one_node import scan_model

pytestmark = needs_rtx

LOADING = """
    import ctypes, sys
    how, path = sys.argv[1:3]
    del sys.argv[1:3]
    if how in ("ctypes", "both"):
        ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
    if how == "tensorrt":  # before RTX's, as a program that serves both may do
        import tensorrt_lean_libs
        import tensorrt_lean_bindings
        registry = tensorrt_lean_bindings.get_plugin_registry()
        assert registry.load_library(path) is not None
        assert registry.get_creator("SelectiveScan", "1", "hcmen") is not None
    if how in ("registry", "both"):
        import tensorrt_rtx_bindings
        registry = tensorrt_rtx_bindings.get_plugin_registry()
        assert registry.load_library(path) is not None
        assert registry.get_creator("SelectiveScan", "1", "hcmen") is not None
"""
PARSING = """
    from hcmen.mamba.one_node import scan_model
    builder = tensorrt_rtx_bindings.Builder(tensorrt_rtx_bindings.Logger())
    flags = 1 << int(tensorrt_rtx_bindings.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = tensorrt_rtx_bindings.OnnxParser(network, tensorrt_rtx_bindings.Logger())
    print("parsed", parser.parse(scan_model(8, 4, functions=True).SerializeToString()))
"""
COMPILING = """
    from hcmen.export.commands.compile import main
    main()
"""


@pytest.fixture(scope="module")
def library() -> Path:
    """libhcmen_trt.so, with the CUDA kernels where nvcc is."""
    if not INCLUDES:
        pytest.skip(NO_HEADERS)
    made = build(INCLUDES[0], "trt")
    return made.cuda or made.host


def child(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


def compiled(bundle: Path, how: str, path: Path | None) -> subprocess.CompletedProcess[str]:
    """hcmen-compile in a process that has loaded the plugin library in one of the ways of `LOADING`."""
    words = command(bundle, "--variant", "text_only", "--target", "86")[4:]
    return child(LOADING + COMPILING, how, path, *words)


# --- graphs with nodes where one may overlook them --------------------------------------------------------------------


def pieces(domain: str = DOMAIN) -> tuple[NodeProto, list[TensorProto], list[FunctionProto]]:
    """A scan of constants, the constants, and the function of the scan, of `domain`."""
    model = scan_model(2, 2, batch=1, time=4)
    (node,) = model.graph.node
    constants = []
    for value in model.graph.input:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        constants.append(numpy_helper.from_array(np.full(shape, 0.5, np.float32), value.name))
    node.domain = domain
    model.functions[0].domain = domain
    return node, constants, list(model.functions)


def with_scan(nodes: list[NodeProto], functions: list[FunctionProto], domain: str = DOMAIN) -> ModelProto:
    proto = graph("text_only")
    proto.graph.initializer.extend(pieces()[1])
    proto.graph.node.extend(nodes)
    proto.functions.extend(functions)
    for name in {domain, *(function.domain for function in functions)} - {""}:
        proto.opset_import.append(helper.make_opsetid(name, VERSION))
    return proto


def stripped() -> ModelProto:
    return with_scan([pieces()[0]], [])


def in_a_branch() -> ModelProto:
    node, _, _ = pieces()
    then = helper.make_graph([node], "then", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 2])])
    other = helper.make_graph(
        [helper.make_node("Identity", ["u"], ["u_again"])],
        "other",
        [],
        [helper.make_tensor_value_info("u_again", TensorProto.FLOAT, [1, 4, 2])],
    )
    nodes = [
        helper.make_node("ReduceMax", ["text_length"], ["longest"], keepdims=0),
        helper.make_node("Greater", ["longest", "zero"], ["some"]),
        helper.make_node("If", ["some"], ["either"], then_branch=then, else_branch=other, name="the/branch"),
    ]
    return with_scan(nodes, [])


def in_a_loop() -> ModelProto:
    node, _, _ = pieces()
    node.input[0] = "carried"
    node.output[0] = "carried_on"
    state = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 2]) for name in ("carried", "carried_on")]
    more = [helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("more", "more_on")]
    turn = helper.make_tensor_value_info("turn", TensorProto.INT64, [])
    nodes = [node, helper.make_node("Identity", ["more"], ["more_on"])]
    body = helper.make_graph(nodes, "body", [turn, more[0], state[0]], [more[1], state[1]])
    proto = with_scan([helper.make_node("Loop", ["turns", "go", "u"], ["looped"], body=body, name="the/loop")], [])
    proto.graph.initializer.append(numpy_helper.from_array(np.array(3, np.int64), "turns"))
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "go"))
    return proto


def in_a_function() -> ModelProto:
    node, _, _ = pieces()
    imports = [helper.make_opsetid("", 19), helper.make_opsetid(DOMAIN, VERSION)]
    mix = helper.make_function("elsewhere", "Mix", list(node.input), ["y"], [node], imports)
    return with_scan([helper.make_node("Mix", list(node.input), ["mixed"], domain="elsewhere")], [mix])


def of_another_domain() -> ModelProto:
    node, _, functions = pieces("elsewhere")
    return with_scan([node], functions, "elsewhere")


def of_another_domain_without_a_function() -> ModelProto:
    return with_scan([pieces("elsewhere")[0]], [], "elsewhere")


def of_no_domain() -> ModelProto:
    return with_scan([pieces("")[0]], [])


def unknown() -> ModelProto:
    node, _, _ = pieces()
    node.op_type = "SelectiveScanAgain"
    return with_scan([node], [])


GRAPHS = [
    (stripped, 0, ""),
    (in_a_branch, 0, ""),
    (in_a_loop, 0, ""),
    (in_a_function, 0, ""),
    (of_another_domain, 0, ""),
    (of_another_domain_without_a_function, 3, "node 'node' is 'elsewhere::SelectiveScan', which no function"),
    (of_no_domain, 3, "node 'node' is '::SelectiveScan', which no function"),
    (unknown, 2, "unknown operator"),
]


def assert_written_out(done: subprocess.CompletedProcess[str], bundle: Path, code: int, text: str) -> None:
    assert done.returncode == code, done.stderr
    if code:
        line = done.stderr.splitlines()[-1]
        assert line.startswith(f"error: {bundle / 'text_only.onnx'}: ")
        assert text in line
        assert not (bundle / "engines").exists()
    else:
        ((name, record),) = listed(bundle).items()
        assert name.startswith("text_only.fp32.sm86.rtx")
        assert record.plugin in ("function", "none")


@pytest.mark.parametrize(("made", "code", "text"), GRAPHS, ids=[each[0].__name__ for each in GRAPHS])
def test_wherever_a_node_stands_it_is_written_out_or_refused(tmp_path, made: Callable[[], ModelProto], code, text):
    bundle = make_bundle(tmp_path / "bundle", ("text_only",), graphs={"text_only": made()})
    assert_written_out(compiled(bundle, "none", None), bundle, code, text)


@pytest.mark.parametrize(("made", "code", "text"), GRAPHS, ids=[each[0].__name__ for each in GRAPHS])
def test_so_it_is_in_a_process_that_has_the_plugins(library, tmp_path, made: Callable[[], ModelProto], code, text):
    bundle = make_bundle(tmp_path / "bundle", ("text_only",), graphs={"text_only": made()})
    assert_written_out(compiled(bundle, "both", library), bundle, code, text)


@pytest.mark.parametrize("how", ["ctypes", "registry", "tensorrt"])
def test_a_model_is_compiled_in_a_process_that_has_the_plugins(library, micro_bundle, monkeypatch, how):
    if how == "tensorrt":
        folders = lean_folders("tensorrt_lean_libs", "tensorrt_lean_bindings")
        if not folders:
            pytest.skip(NO_LEAN)
        monkeypatch.setenv("PYTHONPATH", str(next(iter(folders.values()))))
    done = compiled(micro_bundle, how, library)
    assert done.returncode == 0, done.stderr
    assert [record.plugin for record in listed(micro_bundle).values()] == ["function"]


def test_what_all_this_is_for(library):
    """The parser prefers the plugin to the function, and ends the process when it adds it to the network.

    If this fails, TensorRT-RTX can do more than it could in 1.7.
    """
    done = child(LOADING + PARSING, "registry", library)
    assert (done.returncode, done.stdout) == (-signal.SIGABRT, ""), done.stderr


def test_the_plugin_library_is_refused_before_it_is_loaded(tmp_path):
    """By the one place of this project that loads it: there need not even be such a file."""
    with pytest.raises(InputError, match=r"TensorRT-RTX 1\.[\d.]+ has no library plugins: use --plugin function"):
        RealBuilder().tensorrt.load_plugins(tmp_path / "libhcmen_trt.so")
