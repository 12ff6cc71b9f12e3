"""Kernels inside a TensorRT engine (`--plugin aot`): their PTX, their numbers, and the plugins in TensorRT's own code.

No engine is built here: TensorRT's builder cannot be installed from wheels alone. Its Python bindings can, and with
stubs of the libraries behind them their plugin code runs, on the registry of the lean runtime (helpers/trt_wheels.py).
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import emulated
from helpers.op_cases import ConvCase, ScanCase, assert_conv, assert_scan, conv_arrays, conv_outputs, scan_arrays
from helpers.trt_wheels import NO_LEAN, lean_folders

from hcmen.base.errors import BackendError, InputError
from hcmen.mamba import ptx, trt_aot
from hcmen.mamba.functions import strip_functions
from hcmen.mamba.one_node import conv_model, one_node_model, scan_model
from hcmen.mamba.ptx import Kernel
from hcmen.mamba.trt_aot import ConvSwitches, ScanSwitches, conv_kernel, prepare, scan_kernel

ROOT = Path(__file__).resolve().parents[2]
LEANS = lean_folders("tensorrt_bindings", "tensorrt_lean_libs")

# switches as in ScanSwitches: softplus, reverse, gated, stateful; then batch, time, channel, state, group, half
SCANS = [
    ((1, 0, 1, 0), 2, 9, 66, 16, None, False),
    ((1, 1, 0, 0), 1, 1, 1, 1, None, False),
    ((0, 0, 0, 1), 3, 4, 33, 5, 3, False),
    ((1, 1, 1, 1), 2, 13, 6, 17, 2, True),
    ((0, 1, 1, 0), 1, 3, 130, 4, None, True),
    ((1, 0, 0, 1), 2, 6, 9, 140, 1, False),
]
# switches as in ConvSwitches: silu, reverse, stateful; then batch, time, channel, width, half
CONVS = [
    ((1, 0, 0), 2, 17, 66, 4, False),
    ((0, 1, 0), 3, 8, 5, 3, False),
    ((1, 1, 0), 1, 1, 130, 6, True),
    ((0, 0, 0), 2, 9, 3, 1, True),
    ((1, 0, 1), 2, 17, 66, 4, False),
    ((0, 1, 1), 3, 2, 5, 12, True),
    ((1, 1, 1), 2, 16, 7, 2, False),
]


def scan_of(case: tuple[Any, ...]) -> Kernel:
    switches, _, _, channel, state, group, half = case
    return scan_kernel(ScanSwitches(*map(bool, switches)), channel=channel, state=state, group=group or 1, half=half)


def conv_of(case: tuple[Any, ...]) -> Kernel:
    switches, _, _, channel, width, half = case
    return conv_kernel(ConvSwitches(*map(bool, switches)), channel=channel, width=width, half=half)


# --- the kernels, compiled ------------------------------------------------------------------------------------------


def compiler_or_skip(make: Callable[[], ptx.PtxCompiler]) -> ptx.PtxCompiler:
    try:
        return make()
    except BackendError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("make", [ptx.Nvrtc, ptx.Nvcc], ids=["nvrtc", "nvcc"])
@pytest.mark.parametrize("architecture", [87, 90])
def test_ptx_is_made_without_a_gpu_and_assembles(
    make: Callable[[], ptx.PtxCompiler], architecture: int, tmp_path: Path
) -> None:
    compiler = compiler_or_skip(make)
    assert architecture in compiler.architectures
    cases = [scan_of(SCANS[0]), conv_of(CONVS[2])]
    if isinstance(compiler, ptx.Nvrtc):  # the quick one
        largest = scan_kernel(ScanSwitches(1, 0, 1, 1), channel=64, state=trt_aot.MOST_STATES, group=1, half=False)
        wide = conv_kernel(ConvSwitches(1, 0, 1), channel=64, width=32, half=False)
        cases = [*map(scan_of, SCANS), *map(conv_of, CONVS), largest, wide]
    for kernel in cases:
        text = compiler.ptx(kernel, architecture)
        assert f".target sm_{architecture}" in text
        entries = re.findall(r"\.visible \.entry (\w+)\((.*?)\)", text, re.S)
        assert [name for name, _ in entries] == [kernel.name]
        types = re.findall(r"\.param \.(\w+)", entries[0][1])
        macros = dict(kernel.macros)
        inputs = (3 if "HCMEN_WIDTH" in macros else 7 + macros["HCMEN_GATED"]) + macros["HCMEN_STATEFUL"]
        outputs = 1 + macros["HCMEN_STATEFUL"]
        assert types == ["u64"] * inputs + ["u32"] * 2 + ["u64"] * outputs
        assemble(text, architecture, tmp_path)


def assemble(ptx: str, architecture: int, folder: Path) -> None:
    """ptxas takes it, and nothing is spilled to memory."""
    ptxas = shutil.which("ptxas")
    if ptxas is None:
        pytest.skip("ptxas, of the CUDA toolkit, is not installed")
    (folder / "kernel.ptx").write_text(ptx)
    command = [ptxas, "-v", f"-arch=sm_{architecture}", str(folder / "kernel.ptx"), "-o", str(folder / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr


def test_kernels_have_names_of_their_own() -> None:
    base: dict[str, Any] = {"channel": 8, "state": 4, "group": 2, "half": False}
    scan_sizes = [base | change for change in ({}, {"channel": 10}, {"state": 5}, {"group": 1}, {"half": True})]
    conv_sizes = [{"channel": 8, "width": width, "half": half} for width in (3, 4) for half in (False, True)]
    names = [scan_kernel(switches, **sizes).name for sizes in scan_sizes for switches in trt_aot.SCAN_NAMES]
    names += [conv_kernel(switches, **sizes).name for sizes in conv_sizes for switches in trt_aot.CONV_NAMES]
    assert len(set(names)) == len(names) == 5 * 16 + 4 * 8
    assert all(re.fullmatch(r"[a-z_][a-z_0-9]*", name) for name in names)
    assert len(set(trt_aot.SCAN_NAMES.values()) | set(trt_aot.CONV_NAMES.values())) == 24


def test_what_no_kernel_serves_is_refused() -> None:
    switches = ScanSwitches(True, False, False, False)
    with pytest.raises(InputError, match="513 states, expected 1 to 512"):
        scan_kernel(switches, channel=8, state=513, group=1, half=False)
    with pytest.raises(InputError, match="8 channels in 3 groups"):
        scan_kernel(switches, channel=8, state=4, group=3, half=False)
    with pytest.raises(InputError, match="width 33, expected 1 to 32"):
        conv_kernel(ConvSwitches(True, False, False), channel=8, width=33, half=False)
    with pytest.raises(InputError, match="with a state has width 1, expected at least 2"):
        conv_kernel(ConvSwitches(True, False, True), channel=8, width=1, half=False)


# --- the kernels, run -----------------------------------------------------------------------------------------------


def emulate(kernel: Kernel, blocks: int, tensors: list[np.ndarray], batch: int, time: int, folder: Path) -> None:
    """Runs the kernel's own source on the host, in three orders of its threads; the last tensors are written."""
    if emulated.compiler() is None:
        pytest.skip("there is no C++ compiler")
    library = folder / f"{kernel.name}.so"
    flags = ["-O1", "-shared", "-fPIC", "-I", str(ROOT / "hcmen" / "mamba"), *kernel.options]
    made = emulated.build(library, flags, [emulated.EMULATION / "trt_aot_driver.cc"])
    assert made.returncode == 0, made.stderr[-3000:]
    launch = ctypes.CDLL(str(library)).launch_aot
    addresses = (ctypes.c_void_p * len(tensors))(*(tensor.ctypes.data for tensor in tensors))
    written = None
    for order in range(3):
        launch(ctypes.c_uint(blocks), addresses, batch, time, order)
        if written is not None:
            assert np.array_equal(written, tensors[-1])
        written = tensors[-1].copy()


@pytest.mark.parametrize("case", SCANS, ids=lambda case: scan_of(case).name.removeprefix("hcmen_aot_scan_"))
def test_scan_kernels_give_the_reference_numbers(case: tuple[Any, ...], tmp_path: Path) -> None:
    (softplus, reverse, gated, stateful), batch, time, channel, state, group, half = case
    on = (bool(gated), bool(stateful), bool(reverse), bool(softplus))
    of = ScanCase(batch, time, channel, state, group, "float16" if half else "float32", *on)
    feeds = scan_arrays(of)
    y, last = np.full_like(feeds["u"], np.nan), np.full((batch, channel, state), np.nan, np.float32)
    kernel = scan_of(case)
    emulate(kernel, batch * kernel.rows, [*feeds.values(), y, *([last] if stateful else [])], batch, time, tmp_path)
    assert_scan(of, feeds, [y, last] if stateful else [y])


@pytest.mark.parametrize("case", CONVS, ids=lambda case: conv_of(case).name.removeprefix("hcmen_aot_conv_"))
def test_convolution_kernels_give_the_reference_numbers(case: tuple[Any, ...], tmp_path: Path) -> None:
    switches, batch, time, channel, width, half = case
    of = ConvCase(batch, time, channel, width, "float16" if half else "float32", *map(bool, switches))
    feeds = conv_arrays(of)
    outputs = list(conv_outputs(of, feeds).values())[: 1 + of.stateful]
    kernel = conv_of(case)
    threads = batch * -(-time // trt_aot.STEPS) * kernel.rows
    emulate(kernel, -(-threads // trt_aot.THREADS), [*feeds.values(), *outputs], batch, time, tmp_path)
    assert_conv(of, feeds, outputs)


# --- compilers and GPUs that do not fit -----------------------------------------------------------------------------


class FakeCompiler:
    where, version, architectures = "/fake/nvrtc", (13, 0), (75, 87, 90)

    def ptx(self, kernel: Kernel, architecture: int) -> str:
        raise AssertionError


def test_the_architecture_is_one_that_compiler_gpu_and_driver_know() -> None:
    choose = ptx.checked_architecture
    assert choose(FakeCompiler(), 87, (13, 0)) == 87
    assert choose(FakeCompiler(), 89, (13, 2)) == 87  # PTX for an older GPU runs on a newer one
    assert choose(FakeCompiler(), 121, None) == 90
    with pytest.raises(BackendError, match=r"CUDA 13\.0, but the driver reads PTX up to CUDA 12\.6: pip install"):
        choose(FakeCompiler(), 87, (12, 6))
    with pytest.raises(BackendError, match=r"compute capability 7\.5 and later, this GPU has 7\.2"):
        choose(FakeCompiler(), 72, None)


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"^/nowhere/libnvrtc\.so cannot be loaded: pip install nvidia-cuda-nvrtc$"):
        ptx.Nvrtc("/nowhere/libnvrtc.so")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BackendError, match=r"^nvcc is not on PATH"):
        ptx.Nvcc()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match=r"^TensorRT 10\.9 or later is needed for --plugin aot"):
        trt_aot.register(87, FakeCompiler())


def test_errors_of_the_compilers_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "trt_aot.cu"
    broken.write_text("this is no kernel\n")
    monkeypatch.setattr(ptx, "sources", lambda: (broken, ROOT / "runtime" / "csrc" / "scan_step.h"))
    found = 0
    for make in (ptx.Nvrtc, ptx.Nvcc):
        try:
            compiler: ptx.PtxCompiler = make()
        except BackendError:
            continue
        found += 1
        with pytest.raises(BackendError, match="error") as raised:
            compiler.ptx(scan_of(SCANS[0]), 87)
        assert "\n" not in str(raised.value)
    if not found:
        pytest.skip("neither nvidia-cuda-nvrtc nor nvcc is installed")


# --- the model ------------------------------------------------------------------------------------------------------


NAMES: dict[Any, str] = {**trt_aot.SCAN_NAMES, **trt_aot.CONV_NAMES}


@pytest.mark.parametrize("switches", NAMES, ids=NAMES.get)
def test_nodes_are_renamed_by_their_switches(switches: ScanSwitches | ConvSwitches) -> None:
    if isinstance(switches, ScanSwitches):
        model = scan_model(8, 4, functions=False, **vars(switches))
    else:
        flags = {"reverse": switches.reverse, "stateful": switches.stateful}
        model = conv_model(8, 4, activation="silu" if switches.silu else "none", functions=False, **flags)
    node = model.graph.node[0]
    before = list(node.input), list(node.output), node.name, node.domain
    assert prepare(model) is model
    assert (list(node.input), list(node.output), node.name, node.domain) == before
    assert node.op_type == NAMES[switches]
    given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert given == {"aot": 1, "plugin_namespace": b"hcmen", "plugin_version": b"1"}


def test_defaults_subgraphs_and_other_nodes() -> None:
    tensors = {"x": ("float32", [2, 3, 4]), "weight": ("float32", [4, 2]), "bias": ("float32", [4])}
    inner = one_node_model("CausalConv1d", tensors, {"y": tensors["x"]}, {}, functions=False).graph
    branch = onnx.helper.make_node("If", ["c"], ["o"], then_branch=inner, else_branch=inner)
    relu = onnx.helper.make_node("Relu", ["o"], ["p"])
    model = onnx.helper.make_model(onnx.helper.make_graph([branch, relu], "g", [], []))
    prepare(model)
    branches = [attribute.g.node[0].op_type for attribute in model.graph.node[0].attribute]
    assert branches == [trt_aot.CONV_NAMES[ConvSwitches(False, False, False)]] * 2
    assert model.graph.node[1] == relu


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda node: node.input.pop(), "has 6 inputs and 1 outputs, expected 7 and 1"),
        (lambda node: node.output.append("more"), "has 7 inputs and 2 outputs"),
        (lambda node: node.input.__setitem__(3, ""), "none of them unnamed"),
        (lambda node: setattr(node, "op_type", "Other"), "hcmen::Other has no AOT kernel"),
        (lambda node: setattr(node, "op_type", "StateSpaceDual"), "hcmen::StateSpaceDual has no AOT kernel"),
        (lambda node: set_attribute(node, "reverse", 2), "attribute 'reverse' is 2, expected 0 or 1"),
        (lambda node: set_attribute(node, "reverse", 1.0), "attribute 'reverse' is 1.0"),
        (lambda node: set_attribute(node, "gated", 1), "expected 8 and 1"),
    ],
)
def test_nodes_that_are_not_as_specified_are_refused(spoil: Callable[[Any], Any], message: str) -> None:
    model = scan_model(8, 4, functions=False)
    spoil(model.graph.node[0])
    with pytest.raises(InputError, match=re.escape(message)):
        prepare(model)


def set_attribute(node: Any, name: str, value: Any) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])


def test_functions_must_be_gone() -> None:
    model = scan_model(8, 4)
    with pytest.raises(InputError, match="still carries the function 'SelectiveScan'"):
        prepare(model)
    assert prepare(strip_functions(model)).graph.node[0].op_type == "SelectiveScanAot"
    silly = conv_model(8, 4, functions=False)
    set_attribute(silly.graph.node[0], "activation", "gelu")
    with pytest.raises(InputError, match="'activation' is b'gelu', expected none or silu"):
        prepare(silly)


# --- the plugins, in TensorRT's own code ----------------------------------------------------------------------------

STUB = """
#include <dlfcn.h>
#include <stdlib.h>
extern "C" {
void* getPluginRegistry() {
  void* lean = dlopen(getenv("HCMEN_TEST_LEAN"), RTLD_NOW | RTLD_GLOBAL);
  return lean ? ((void* (*)())dlsym(lean, "getPluginRegistry"))() : nullptr;
}
void* createInferBuilder_INTERNAL() { return nullptr; }
void* createInferRefitter_INTERNAL() { return nullptr; }
void* createInferRuntime_INTERNAL() { return nullptr; }
void* createNvOnnxParser_INTERNAL() { return nullptr; }
void* createNvOnnxParserRefitter_INTERNAL() { return nullptr; }
int getNvOnnxParserVersion() { return 0; }
void* getBuilderPluginRegistry() { return nullptr; }
bool initLibNvInferPlugins() { return false; }
}
"""


@pytest.mark.skipif(not LEANS, reason=NO_LEAN)
@pytest.mark.parametrize("folder", LEANS.values(), ids=LEANS)
def test_tensorrt_takes_the_plugins(folder: Path, tmp_path: Path) -> None:
    """All of them, with the real bindings and the real registry: signatures, shapes, types, launch and kernel."""
    compiler_or_skip(ptx.ptx_compiler)
    if emulated.compiler() is None or sys.platform != "linux":
        pytest.skip("there is no C++ compiler, or this is not Linux")
    (lean,) = folder.glob("tensorrt_lean_libs/libnvinfer_lean.so.*")
    source = tmp_path / "stub.cc"
    source.write_text(STUB)
    major = lean.suffix
    for name in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
        soname = f"lib{name}.so{major}"
        options = ["-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", str(tmp_path / soname), "-ldl"]
        subprocess.run([str(emulated.compiler()), str(source), *options], check=True)
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "PYTHONPATH": str(folder),
        "HCMEN_TEST_LEAN": str(lean),
    }
    script = Path(__file__).parents[1] / "helpers" / "trt_aot_bindings.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    plugins = json.loads(done.stdout.splitlines()[-1])["plugins"]
    assert set(plugins) == {*trt_aot.SCAN_NAMES.values(), *trt_aot.CONV_NAMES.values()}
    batch, time, channel, state = 3, 50, 66, 17
    for number, (switches, name) in enumerate(trt_aot.SCAN_NAMES.items()):
        got, half, grouped = plugins[name], number % 2 == 0, number % 3 == 0
        kernel = scan_kernel(switches, channel=channel, state=state, group=2 if grouped else 1, half=half)
        check_plugin(got, kernel, [[batch, time, channel], [batch, channel, state]][: 1 + switches.stateful])
        # 8 lanes for 17 states, so 16 channels of a block.
        assert got["launch"]["grid_x"] == 3 * 5
        shared = [True, True, False, True, True, False, False, *[True] * switches.gated, *[False] * switches.stateful]
        shared += [True, False][: 1 + switches.stateful]
        assert got["combinations"] == [["FLOAT"] * len(shared), ["HALF" if s else "FLOAT" for s in shared]]
    for number, (conv, name) in enumerate(trt_aot.CONV_NAMES.items()):
        got = plugins[name]
        kernel = conv_kernel(conv, channel=channel, width=4, half=number % 2 == 0)
        check_plugin(got, kernel, [[batch, time, channel], [batch, 3, channel]][: 1 + conv.stateful])
        assert got["launch"]["grid_x"] == -(-3 * 7 * 66 // 128)
        shared = [True, False, False, *[False] * conv.stateful, True, *[False] * conv.stateful]
        assert got["combinations"] == [["FLOAT"] * len(shared), ["HALF" if s else "FLOAT" for s in shared]]


def check_plugin(got: dict[str, Any], kernel: Kernel, output_shapes: list[list[int]]) -> None:
    assert got["fields"] == 0
    assert got["output_types"]
    assert got["output_shapes"] == output_shapes
    assert got["linear"]
    assert got["tactics"] == []
    expected = {"grid_y": 1, "grid_z": 1, "block_x": 128, "block_y": 1, "block_z": 1, "shared_mem": 0}
    assert {key: value for key, value in got["launch"].items() if key != "grid_x"} == expected
    assert got["integers"] == [3, 50]
    assert got["int32"]
    assert got["kernel"] == kernel.name
    assert f".visible .entry {kernel.name}(" in got["ptx"]
    assert ".target sm_87" in got["ptx"]
