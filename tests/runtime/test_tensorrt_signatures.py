"""Every call of TensorRT that our sources make, held against the real bindings of 10.3 to 11.4.

What is called is seen by running hcmen-compile and the backend over the fake (tests/helpers/fake_tensorrt.py), which
records each call with the types of its arguments; what the bindings take is read from their wheels
(tests/helpers/bindings.py). So a method that TensorRT does not have, an argument too many, a type that its
bindings would refuse, or an enumerator that a version lacks, fails here without TensorRT.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import bindings as real
from helpers.fake_tensorrt import compiled, machine
from helpers.micro import micro_bundle_at

import hcmen.runtime.backends.flavour
import hcmen.runtime.backends.tensorrt
from hcmen.base.bundle import read_bundle
from hcmen.base.errors import BackendError
from hcmen.export.engine_options import Options
from hcmen.export.tensorrt import Compiler
from hcmen.runtime import load

SOURCES = ("runtime/backends/flavour.py", "runtime/backends/tensorrt.py", "export/tensorrt.py")
ATTRIBUTES = real.attributes_of(SOURCES)


@pytest.fixture(scope="module", params=list(real.PACKAGES))
def bindings(request) -> dict[str, Any]:
    """What the bindings of one version define; skips, naming the package, where it cannot be installed."""
    try:
        return real.dump(request.param)
    except real.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def calls(bindings, tmp_path_factory) -> list[dict[str, Any]]:
    """Everything that compiling and running calls, the ways it fails included."""
    tmp_path = tmp_path_factory.mktemp("calls")
    bundle = micro_bundle_at(tmp_path / "bundle")
    with pytest.MonkeyPatch.context() as patch:
        trt = machine(patch, tmp_path, bindings["version"])
        first = ("--variant", "full", "--timing-cache", tmp_path / "timings")
        everything = ("--workspace", 64, "--version-compatible", "--hardware-compatible", "--force")
        assert compiled(bundle, *first).code == 0
        assert compiled(bundle, *first, *everything).code == 0
        model = load(bundle, backend="tensorrt")
        assert all(t.passed for _ in range(3) for t in model.self_test(["full"]))
        patch.setattr(hcmen.runtime.backends.flavour.TrtModule, "load_plugins", lambda self, path: None)
        trt.creators.clear()
        assert compiled(bundle, "--variant", "audio_only").code == 3  # the parser's errors are asked for
        compiler = Compiler(read_bundle(bundle), Options())
        with pytest.raises(BackendError, match="node -1: Failed to parse"):  # also where they name no node
            compiler._build(SimpleNamespace(SerializeToString=lambda: b"junk"), "none", [], "junk")
        return list({json.dumps(call, sort_keys=True): call for call in trt.recorded}.values())


def test_every_call_fits_the_bindings(bindings, calls):
    assert {c["method"] for c in calls if c["class"] == ""} <= set(bindings["functions"])
    methods = [c for c in calls if c["class"]]
    wrong = {json.dumps(c): why for c in methods if (why := real.problem(c, bindings["classes"]))}
    assert wrong == {}
    assert len({(c["class"], c.get("method", c.get("property"))) for c in methods}) > 40
    # The comparison can fail.
    right = {"class": "IExecutionContext", "method": "set_input_shape", "args": ["str", "tuple"], "kwargs": {}}
    assert real.problem(right, bindings["classes"]) is None
    for args in (["str"], ["str", "dict"], ["str", "tuple", "int"]):
        assert "it takes" in str(real.problem(right | {"args": args}, bindings["classes"]))
    assert real.problem(right | {"method": "set_input_dims"}, bindings["classes"])


def test_every_line_that_calls_tensorrt_was_seen(bindings, calls):
    """No attribute in the sources that has the name of one of TensorRT's members is left out above."""
    members = {name for c in calls if c["class"] for name in bindings["classes"][c["class"]]} - {"__init__"}
    # Names that ours share with theirs, and log, which TensorRT calls.
    ours = {"name", "log", "file", "engine", "logger", "line"}
    mentioned = {node.attr for node in ATTRIBUTES} & members
    assert mentioned - {c.get("method", c.get("property")) for c in calls} - ours == set()
    assert len(mentioned) > 30


def test_every_name_of_the_module_is_there(bindings):
    """`trt.X` and `trt.X.Y` of the sources, and what the backend tells apart by name."""
    found = real.names_of_the_module(ATTRIBUTES)
    assert len(found) > 10
    found |= {("DataType", name) for name in hcmen.runtime.backends.tensorrt._DTYPES}
    found |= {("TensorIOMode", name) for name in ("INPUT", "OUTPUT")}
    found |= {("ILogger.Severity", name) for name in ("INTERNAL_ERROR", "ERROR", "VERBOSE")}
    real.assert_has(bindings, found - {("__version__", None)})
    (log,) = real.signatures(bindings["classes"]["ILogger"]["log"]["doc"])
    assert [p.name for p in log.parameters] == ["severity", "msg"]
