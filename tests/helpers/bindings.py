"""The real Python bindings of TensorRT, without TensorRT: their signatures, for tests on machines that have neither.

A bindings wheel holds one extension module that is linked against three libraries. Stubs of these, of a few lines, let
it be imported: nothing of it can run, and every class, method, signature and enumerator can be read.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.wheels import Unavailable, unpacked

__all__ = ["PACKAGES", "Parameter", "Signature", "Unavailable", "dump", "signatures"]

# What the JetPacks and the newest packages have: JetPack 6, 7.0 and 7.1, 7.2, and TensorRT 11. 10.9 is the first with
# AOT plugins.
PACKAGES = {
    "10.3.0": "tensorrt_cu12_bindings==10.3.0",
    "10.9.0.34": "tensorrt_cu12_bindings==10.9.0.34",
    "10.13.3.9.post1": "tensorrt_cu13_bindings==10.13.3.9.post1",
    "10.16.1.11": "tensorrt_cu13_bindings==10.16.1.11",
    "11.4.0.106": "tensorrt_cu13_bindings==11.4.0.106",
}

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

# Runs in a process of its own, as two versions cannot be imported in one.
_DUMP = """
import enum, inspect, json, sys
sys.path.insert(0, sys.argv[1])
import tensorrt_bindings as trt

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
    folder = _installed(version)
    done = subprocess.run(
        [sys.executable, "-c", _DUMP, str(folder)], capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode:
        raise Unavailable(f"the bindings of TensorRT {version} do not import: {done.stderr.strip().splitlines()[-1:]}")
    return dict(json.loads(done.stdout))


def signatures(doc: str) -> list[Signature]:
    """The signatures in a docstring of pybind11's, one per overload, without self."""
    found = []
    for line in doc.splitlines():
        match = re.match(r"^(?:\d+\. )?\w+\((.*)\) -> (.+)$", line.strip())
        if match and "*args" not in match[1]:
            parameters = tuple(_parameter(text) for text in _split(match[1]))
            found.append(Signature(tuple(p for p in parameters if p.name != "self"), match[2]))
    return found


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
