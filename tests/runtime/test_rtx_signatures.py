"""Every call of TensorRT-RTX that our sources make, held against the real bindings of 1.4 to 1.7.

As test_tensorrt_signatures.py, for the sources that both flavours share and for what RTX alone has. The bindings are
unpacked beside the library that is installed; nothing of them runs.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import bindings as real
from helpers.fake_tensorrt import compiled, machine
from helpers.micro import micro_bundle_at

import hcmen.runtime.backends.tensorrt
from hcmen.base.bundle import read_bundle
from hcmen.base.errors import BackendError
from hcmen.export.engine_options import Options
from hcmen.export.tensorrt import Compiler
from hcmen.runtime import load
from hcmen.runtime.backends import TensorRTRTX
from hcmen.runtime.backends import tensorrt_rtx as rtx
from hcmen.runtime.backends.flavour import TENSORRT_RTX, parsed_version
from hcmen.runtime.backends.options import SPECIALIZATIONS

SOURCES = (
    "runtime/backends/flavour.py",
    "runtime/backends/tensorrt.py",
    "runtime/backends/tensorrt_rtx.py",
    "export/tensorrt.py",
)
ATTRIBUTES = real.attributes_of(SOURCES)
# What TensorRT alone is asked for: plugins, code for the host, compatible engines, timings.
TENSORRT_ALONE = {
    *("get_plugin_registry", "get_creator", "load_library", "plugins_to_serialize", "engine_host_code_allowed"),
    *("set_flag", "hardware_compatibility_level"),
    *("create_timing_cache", "set_timing_cache", "get_timing_cache"),
}


@pytest.fixture(scope="module", params=real.RTX_VERSIONS)
def bindings(request) -> dict[str, Any]:
    """What the bindings of one version define; skips, naming the package, where it cannot be had."""
    try:
        return real.rtx_dump(request.param)
    except real.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def calls(bindings, tmp_path_factory) -> list[dict[str, Any]]:
    """Everything that compiling and running calls, the ways it fails included."""
    tmp_path = tmp_path_factory.mktemp("calls")
    bundle = micro_bundle_at(tmp_path / "bundle")
    with pytest.MonkeyPatch.context() as patch:
        trt = machine(patch, tmp_path, bindings["version"], flavour="tensorrt-rtx")
        first = ("--variant", "full", "--backend", "tensorrt-rtx")
        assert compiled(bundle, *first, "--workspace", 64, "--profiles", 2).code == 0
        for options in (TensorRTRTX(), TensorRTRTX(cuda_graph=False, specialization="none")):  # the second has a cache
            with load(bundle, backend=options) as model:
                assert all(t.passed for t in model.self_test(["full"]))
        trt.invalid = 1
        with pytest.raises(BackendError, match="made by another version"):
            load(bundle, backend="tensorrt-rtx").kernels("full")
        compiler = Compiler(read_bundle(bundle), Options(), flavour=TENSORRT_RTX)
        with pytest.raises(BackendError, match="node -1: Failed to parse"):
            compiler._build(SimpleNamespace(SerializeToString=lambda: b"junk"), "none", [], "junk")
        model = SimpleNamespace(SerializeToString=(bundle / "full.onnx").read_bytes)
        with pytest.raises(BackendError, match="Plugin not found"):
            compiler._build(model, "none", [], "junk")
        return list({json.dumps(call, sort_keys=True): call for call in trt.recorded}.values())


def test_every_call_fits_the_bindings(bindings, calls):
    assert all(c["class"] for c in calls)  # no function of the module is called: RTX has none for us
    wrong = {json.dumps(c): why for c in calls if (why := real.problem(c, bindings["classes"]))}
    assert wrong == {}
    assert len({(c["class"], c.get("method", c.get("property"))) for c in calls}) > 40
    # The comparison can fail.
    for right, given in (
        ({"class": "IRuntimeCache", "method": "deserialize", "args": ["bytes"], "kwargs": {}}, ["str"]),
        (
            {"class": "IRuntimeConfig", "method": "set_runtime_cache", "args": ["IRuntimeCache"], "kwargs": {}},
            ["bytes"],
        ),
        (
            {"class": "ICudaEngine", "method": "create_execution_context", "args": ["IRuntimeConfig"], "kwargs": {}},
            ["int"],
        ),
    ):
        assert real.problem(right, bindings["classes"]) is None
        assert "it takes" in str(real.problem(right | {"args": given}, bindings["classes"]))


def test_every_line_that_calls_tensorrt_was_seen(bindings, calls):
    """No attribute in the sources that has the name of one of RTX's members is left out above."""
    members = {name for c in calls for name in bindings["classes"][c["class"]]} - {"__init__"}
    ours = {"name", "log", "file", "engine", "logger", "line"}
    mentioned = {node.attr for node in ATTRIBUTES} & members
    assert mentioned - {c.get("method", c.get("property")) for c in calls} - ours - TENSORRT_ALONE == set()
    assert len(mentioned) > 35


def test_every_name_of_the_module_is_there(bindings):
    """`module.X` and `module.X.Y` of the sources, and what is told apart by name."""
    found = real.names_of_the_module(ATTRIBUTES)
    assert len(found) > 15
    found = {(name, None if member == "__members__" else member) for name, member in found}
    found |= {("DataType", name) for name in hcmen.runtime.backends.tensorrt._DTYPES}
    found |= {("CudaGraphStrategy", name) for name in ("DISABLED", "WHOLE_GRAPH_CAPTURE")}
    found |= {("DynamicShapesKernelSpecializationStrategy", name.upper()) for name in SPECIALIZATIONS}
    found |= {("EngineInvalidityDiagnostics", name) for name in rtx._REFUSALS}
    found |= {("ComputeCapability", f"SM{n}") for n in (80, 86, 89, 120)}
    real.assert_has(bindings, found - {("__version__", None), ("__name__", None)})
    assert set(bindings["enums"]["EngineInvalidityDiagnostics"]) == set(rtx._REFUSALS)


def test_the_oldest_version_that_is_let_in_is_the_oldest_held_to():
    oldest = min(map(parsed_version, real.RTX_VERSIONS))
    assert TENSORRT_RTX.oldest == oldest[: len(TENSORRT_RTX.oldest)]
