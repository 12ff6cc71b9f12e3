"""The real Python bindings of TensorRT, without TensorRT: their signatures, for tests on machines that have neither.

A bindings wheel holds one extension module that is linked against three libraries. Stubs of these, of a few lines, let
it be imported: nothing of it can run, and every class, method, signature and enumerator can be read.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.wheels import Unavailable, unpacked

__all__ = [
    "PACKAGES",
    "RTX_VERSIONS",
    "Parameter",
    "Signature",
    "Unavailable",
    "assert_has",
    "attributes_of",
    "dump",
    "names_of_the_module",
    "problem",
    "rtx_dump",
    "signatures",
]

# What the JetPacks and the newest packages have: JetPack 6, 7.0 and 7.1, 7.2, and TensorRT 11. 10.9 is the first with
# AOT plugins.
PACKAGES = {
    "10.3.0": "tensorrt_cu12_bindings==10.3.0",
    "10.9.0.34": "tensorrt_cu12_bindings==10.9.0.34",
    "10.13.3.9.post1": "tensorrt_cu13_bindings==10.13.3.9.post1",
    "10.16.1.11": "tensorrt_cu13_bindings==10.16.1.11",
    "11.4.0.106": "tensorrt_cu13_bindings==11.4.0.106",
}

_ROOT = Path(__file__).resolve().parents[2]
_SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "getBuilderPluginRegistry",
    "initLibNvInferPlugins",
)

RTX_VERSIONS = ("1.4.0.76", "1.5.0.114", "1.6.1.120", "1.7.1.116")

# Runs in a process of its own, as two versions cannot be imported in one.
_DUMP = """
import enum, importlib, inspect, json, sys
sys.path.insert(0, sys.argv[1])
trt = importlib.import_module(sys.argv[2])

def members(cls):
    found = {}
    for name in dir(cls):
        if name.startswith("_") and name != "__init__":
            continue
        value = inspect.getattr_static(cls, name)
        if isinstance(value, property):
            found[name] = {"kind": "property", "settable": value.fset is not None}
        elif callable(getattr(cls, name, None)):
            found[name] = {"kind": "method", "doc": getattr(cls, name).__doc__ or ""}
        else:
            found[name] = {"kind": "value"}
    return found

dump = {"version": trt.__version__, "classes": {}, "functions": {}, "enums": {}}
for name, value in vars(trt).items():
    if inspect.isclass(value):
        dump["classes"][name] = members(value)
        if hasattr(value, "__members__"):
            dump["enums"][name] = list(value.__members__)
    elif callable(value):
        dump["functions"][name] = value.__doc__ or ""
dump["enums"]["ILogger.Severity"] = list(trt.ILogger.Severity.__members__)
print(json.dumps(dump))
"""


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str
    optional: bool


@dataclass(frozen=True)
class Signature:
    parameters: tuple[Parameter, ...]
    returns: str


@functools.cache
def dump(version: str) -> dict[str, Any]:
    """Everything that the bindings of `version` define; raises Unavailable."""
    return _dumped("tensorrt_bindings", _installed(version))


def _dumped(module: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", _DUMP, str(folder), module]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise Unavailable(f"{module} in {folder} does not import: {done.stderr.strip().splitlines()[-1:]}")
    return dict(json.loads(done.stdout))


@functools.cache
def rtx_dump(version: str) -> dict[str, Any]:
    """As `dump`, of TensorRT-RTX, whose library is installed: that of any version lets the bindings be imported."""
    if importlib.util.find_spec("tensorrt_rtx_libs") is None:
        raise Unavailable("the library of TensorRT-RTX is not installed: pip install 'hcmen[rtx]'")
    return _dumped("tensorrt_rtx_bindings", unpacked(f"tensorrt_rtx_cu13_bindings=={version}"))


def signatures(doc: str) -> list[Signature]:
    """The signatures in a docstring of pybind11's, one per overload, without self."""
    found = []
    for line in doc.splitlines():
        match = re.match(r"^(?:\d+\. )?\w+\((.*)\) -> (.+)$", line.strip())
        if match and "*args" not in match[1]:
            parameters = tuple(_parameter(text) for text in _split(match[1]))
            found.append(Signature(tuple(p for p in parameters if p.name != "self"), match[2]))
    return found


def attributes_of(sources: Sequence[str]) -> list[ast.Attribute]:
    """Every `x.name` in our files `sources`, paths from the checkout's root."""
    trees = [ast.parse((_ROOT / name).read_text()) for name in sources]
    return [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)]


def names_of_the_module(attributes: Iterable[ast.Attribute]) -> set[tuple[str, str | None]]:
    """(X, Y) of each `trt.X.Y`, and (X, None) of each `trt.X`, by whatever name we call the module."""
    pattern = re.compile(r"(?:self\.module|self\._trt|trt|module)\.([A-Za-z]\w*)(?:\.(\w+))?")
    return {(m[1], m[2]) for node in attributes if (m := pattern.fullmatch(ast.unparse(node)))}


def assert_has(bindings: Mapping[str, Any], names: Iterable[tuple[str, str | None]]) -> None:
    """Holds that the bindings define each (name, enumerator)."""
    for name, member in names:
        assert name in {**bindings["classes"], **bindings["functions"], **bindings["enums"]}, name
        assert member in (None, "__init__") or member in bindings["enums"][name], f"{name}.{member}"


def takes(kind: str, given: str) -> bool:
    """Whether a parameter of the bindings' type `kind` takes what Python calls `given`."""
    kind = kind.removeprefix("typing.").removeprefix("typing_extensions.")
    by_type = {
        "int": ("SupportsInt", "SupportsIndex", "Union[SupportsInt, SupportsIndex]"),
        "bytes": ("buffer", "Buffer"),
        "memoryview": ("buffer", "Buffer"),
        "tuple": ("tensorrt_bindings.tensorrt.Dims", "tensorrt_rtx_bindings.tensorrt_rtx.Dims"),
        "list": ("List",),
    }
    # A type that pybind11 came to know after the function has its name in C++.
    return re.split(r"\.|::", kind)[-1] == given or kind in by_type.get(given, ())


def problem(call: dict[str, Any], classes: dict[str, Any]) -> str | None:
    """What the bindings would say to `call`."""
    members = classes.get(call["class"], {})
    if "property" in call:
        member = members.get(call["property"], {"kind": "none"})
        fits = member["kind"] == "property" and (member["settable"] or not call["set"])
        return None if fits else "there is no such property, or it cannot be set"
    member = members.get(call["method"], {"kind": "none"})
    if member["kind"] != "method":
        return "there is no such method"
    offered = signatures(member["doc"])
    for signature in offered:
        given = dict(zip((p.name for p in signature.parameters), call["args"], strict=False)) | call["kwargs"]
        known = {p.name: p for p in signature.parameters}
        if (
            len(call["args"]) <= len(known)
            and set(given) <= set(known)
            and all(p.optional or p.name in given for p in signature.parameters)
            and all(takes(known[name].type, kind) for name, kind in given.items())
        ):
            return None
    return f"it takes {offered}"


def _split(text: str) -> list[str]:
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "[(<{") - (character in "])>}")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return [*parts, current.strip()] if current.strip() else parts


def _parameter(text: str) -> Parameter:
    declared, _, default = text.partition(" = ")
    name, _, kind = declared.partition(": ")
    return Parameter(name, kind.strip(), bool(default))


def _installed(version: str) -> Path:
    folder = unpacked(PACKAGES[version])
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise Unavailable("no C compiler for the stubs of TensorRT's libraries")
    source = folder / "stub.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in _SYMBOLS))
    for library in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
        name = f"lib{library}.so.{version.split('.')[0]}"
        target = folder / "tensorrt_bindings" / name
        if not target.exists():
            part = target.with_name(f"{name}.{os.getpid()}")
            command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(part), str(source)]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            part.rename(target)
    return folder
