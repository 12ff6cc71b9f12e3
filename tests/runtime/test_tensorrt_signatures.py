"""Every call of TensorRT that our sources make, held against the real bindings of 10.3 to 11.4.

What is called is seen by running hcmen-compile and the backend over the fake (tests/helpers/fake_tensorrt.py), which
records each call with the types of its arguments; what the bindings take is read from their wheels
(tests/helpers/bindings.py). So a method that TensorRT does not have, an argument too many, a type that its
bindings would refuse, or an enumerator that a version lacks, fails here without TensorRT.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import bindings as real
from helpers.fake_cuda import FakeCuda
from helpers.fake_tensorrt import compiled, machine
from helpers.micro import micro_bundle_at

import hcmen.runtime.backends.flavour
import hcmen.runtime.backends.tensorrt
from hcmen.base.bundle import read_bundle
from hcmen.base.errors import BackendError, HcmenError
from hcmen.export.tensorrt import Compiler, Options
from hcmen.runtime import load

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / p for p in ("runtime/backends/flavour.py", "runtime/backends/tensorrt.py", "export/tensorrt.py")]
# The fake's name of what the bindings call by their C++ name.
ALIASES = {"ParserError": "nvonnxparser::IParserError"}


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
    version, tmp_path = bindings["version"], tmp_path_factory.mktemp("calls")
    bundle = micro_bundle_at(tmp_path / "bundle")
    found: dict[str, dict[str, Any]] = {}
    with pytest.MonkeyPatch.context() as patch:
        trt = machine(patch, tmp_path, version, FakeCuda(sm=87))
        cache = tmp_path / "timings"
        first = ("--variant", "full", "--timing-cache", cache)
        everything = ("--workspace", 64, "--version-compatible", "--hardware-compatible", "--force")
        assert compiled(bundle, *first).code == 0
        assert compiled(bundle, *first, *everything).code == 0
        assert compiled(bundle, "--variant", "full", "--precision", "fp16", "--plugin", "function").code == 0
        model = load(bundle, backend="tensorrt")
        for _ in range(3):
            assert all(t.passed for t in model.self_test(["full"]))
        patch.setattr(hcmen.runtime.backends.flavour.TrtModule, "load_plugins", lambda self, path: None)
        trt.registry._creators.clear()
        assert compiled(bundle, "--variant", "audio_only").code == 3  # the parser's errors are asked for
        compiler = Compiler(read_bundle(bundle), Options())
        with pytest.raises(BackendError, match="node -1: Failed to parse"):  # also where they name no node
            compiler._build(SimpleNamespace(SerializeToString=lambda: b"junk"), "none", None, "junk")
        for call in trt.recorded:
            found[json.dumps(call, sort_keys=True)] = call
    return list(found.values())


def takes(kind: str, given: str) -> bool:
    """Whether a parameter of the bindings' type `kind` takes what Python calls `given`."""
    kind = kind.removeprefix("typing.").removeprefix("typing_extensions.")
    if kind.rpartition(".")[2] == given:
        return True
    by_type = {
        "int": ("int", "SupportsInt", "SupportsIndex", "Union[SupportsInt, SupportsIndex]"),
        "bytes": ("buffer", "Buffer"),
        "memoryview": ("buffer", "Buffer"),
        "tuple": ("tuple", "tensorrt_bindings.tensorrt.Dims"),
        "list": ("list", "List"),
    }
    return kind in by_type.get(given, ())


def gives(kind: str, returned: str) -> bool:
    """Whether the bindings may return what the fake returned, by their annotation `kind`."""
    name = re.split(r"[\[]", kind.rpartition(".")[2] if "[" not in kind else kind)[0].rpartition(".")[2]
    if kind == ALIASES.get(returned, ""):
        return True
    if returned == "NoneType":  # a null pointer
        return kind == "None" or kind.startswith("tensorrt_bindings.") or "apsule" in kind or kind == "object"
    if returned == "object":
        return "apsule" in kind or kind == "object"
    return {"tuple": "Dims"}.get(returned, returned).lower() == name.lower()


def problem(call: dict[str, Any], classes: dict[str, Any]) -> str | None:
    """What the bindings would say to `call`."""
    members = classes.get(call["class"])
    if members is None:
        return "there is no such class"
    if "property" in call:
        member = members.get(call["property"])
        if member is None or member["kind"] != "property":
            return "there is no such property"
        return "it cannot be set" if call["set"] and not member["settable"] else None
    member = members.get(call["method"])
    if member is None or member["kind"] != "method":
        return "there is no such method"
    offered = real.signatures(member["doc"])
    if not offered:
        return f"its signature cannot be read from {member['doc'][:100]!r}"
    for signature in offered:
        given = dict(zip((p.name for p in signature.parameters), call["args"], strict=False)) | call["kwargs"]
        known = {p.name: p for p in signature.parameters}
        if len(call["args"]) > len(known) or not set(given) <= set(known):
            continue
        if any(not p.optional and p.name not in given for p in signature.parameters):
            continue
        if not all(takes(known[name].type, kind) for name, kind in given.items()):
            continue
        if call["method"] == "__init__" or gives(signature.returns, call["returned"]):
            return None
    return f"it takes {offered}"


def test_every_call_fits_the_bindings(bindings, calls):
    functions = {c["method"] for c in calls if c["class"] == ""}
    assert functions <= set(bindings["functions"])
    methods = [c for c in calls if c["class"]]
    wrong = {json.dumps(c): why for c in methods if (why := problem(c, bindings["classes"]))}
    assert wrong == {}
    assert len({(c["class"], c.get("method", c.get("property"))) for c in methods}) > 40


def names_in(tree: ast.AST) -> set[str]:
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_every_line_that_calls_tensorrt_was_seen(bindings, calls):
    """No attribute in the sources that has the name of one of TensorRT's members is left out above."""
    used_classes = {c["class"] for c in calls if c["class"]}
    members = {name for c in used_classes for name in bindings["classes"][c]} - {"__init__"}
    # Names that ours share with theirs, and log, which TensorRT calls.
    ours = {"name", "log", "file", "engine", "logger", "line"}
    mentioned = {name for source in SOURCES for name in names_in(ast.parse(source.read_text())) if name in members}
    seen = {c.get("method", c.get("property")) for c in calls}
    assert mentioned - seen - ours == set()
    assert len(mentioned) > 30


def test_every_name_of_the_module_is_there(bindings):
    """`trt.X` and `trt.X.Y` of the sources, enumerators among them."""
    found = set()
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            chain = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            match = re.fullmatch(r"(?:self\.module|self\._trt|trt|module)\.([A-Za-z]\w*)(?:\.(\w+))?", chain)
            if match:
                found.add((match[1], match[2]))
    assert ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED") in found
    assert len(found) > 10
    for name, member in found:
        if name == "__version__":
            continue
        assert name in bindings["classes"] or name in bindings["functions"], name
        if member not in (None, "__init__"):
            assert member in bindings["enums"][name], f"{name}.{member}"


def test_the_enumerators_of_types_and_severities(bindings):
    """What the backend tells apart by name."""
    assert set(hcmen.runtime.backends.tensorrt._DTYPES) <= set(bindings["enums"]["DataType"])
    assert {"INPUT", "OUTPUT"} <= set(bindings["enums"]["TensorIOMode"])
    assert {"INTERNAL_ERROR", "ERROR", "VERBOSE"} <= set(bindings["enums"]["ILogger.Severity"])
    (log,) = real.signatures(bindings["classes"]["ILogger"]["log"]["doc"])
    assert [p.name for p in log.parameters] == ["severity", "msg"]


def test_the_fake_has_nothing_that_the_bindings_lack(bindings, monkeypatch, tmp_path):
    """Or a call could pass every test and fail on a device."""
    trt = machine(monkeypatch, tmp_path, bindings["version"], FakeCuda())
    for name, value in vars(trt).items():
        if not isinstance(value, type) or value.__module__ != "tensorrt":
            continue
        assert name in bindings["classes"]
        for member in getattr(value, "__members__", ()):
            assert member in bindings["enums"][name], f"{name}.{member}"
        public = [m for m in vars(value) if not m.startswith("_") and m not in getattr(value, "__members__", ())]
        for member in (m for m in public if m != "Severity"):
            assert member in bindings["classes"][name], f"{name}.{member}"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"method": "set_input_dims"}, "no such method"),
        ({"args": ["str"]}, "it takes"),
        ({"args": ["str", "dict"]}, "it takes"),
        ({"args": ["str", "tuple", "int"]}, "it takes"),
        ({"args": ["str"], "kwargs": {"dims": "tuple"}}, "it takes"),
        ({"returned": "int"}, "it takes"),
        ({"class": "IContext"}, "no such class"),
    ],
)
def test_the_comparison_can_fail(bindings, change, why):
    call = {
        "class": "IExecutionContext",
        "method": "set_input_shape",
        "args": ["str", "tuple"],
        "kwargs": {},
        "returned": "bool",
    }
    assert problem(call, bindings["classes"]) is None
    assert why in str(problem(call | change, bindings["classes"]))


def test_a_refusal_is_an_expected_error(monkeypatch, tmp_path, micro_bundle):
    """The machine of these tests is one on which `load` itself may fail as the runtime promises."""
    machine(monkeypatch, tmp_path, "10.3.0", FakeCuda(devices=0))
    with pytest.raises(HcmenError):
        load(micro_bundle, backend="tensorrt")
