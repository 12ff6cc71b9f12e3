"""Engines of anybody's .onnx file. It has no golden set, so parity is not measured."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hcmen.base.errors import InputError, shown
from hcmen.base.files import refused, write_file
from hcmen.export.tensorrt import GraphCompiler, Profile
from hcmen.export.weights import embedded
from hcmen.runtime.backends import Ort
from hcmen.runtime.backends.ort import OrtBackend
from hcmen.runtime.foreign import ForeignGraph, check_names

__all__ = ["ForeignEngine", "compile_file", "parse_spans"]

_SPAN = re.compile(r"(.+)=([1-9]\d{0,8})(?::([1-9]\d{0,8}):([1-9]\d{0,8}))?")

Spans = Mapping[str, tuple[int, int, int]]


@dataclass(frozen=True)
class ForeignEngine:
    """What was built. plugin: what runs the hcmen ops, "none" where there are none. seconds: the build."""

    bytes: int
    plugin: str
    seconds: float
    profile: Profile


def parse_spans(texts: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    """{size: (least, best, most)} of texts such as time=16:64:512, or time=64 for all three.

    Raises:
        InputError: one is not written so, or a name comes twice.
    """
    found: dict[str, tuple[int, int, int]] = {}
    for text in texts:
        match = _SPAN.fullmatch(text)
        low, best, high = (int(match[i] or match[2]) for i in (2, 3, 4)) if match else (1, 0, 0)
        if match is None or not low <= best <= high:
            raise InputError(f"--size is {shown(text)}", "NAME=LEAST:BEST:MOST, such as time=16:64:512, or NAME=N")
        if match[1] in found:
            raise InputError(f"--size tells twice of {shown(match[1])}", "once")
        found[match[1]] = (low, best, high)
    return found


def compile_file(compiler: GraphCompiler, path: str, out: Path, spans: Spans) -> ForeignEngine:
    """Writes the engine of the file `path` to `out`, whole or not at all.

    Raises:
        InputError: a size is missing or unknown, or the file has no float16 form.
        CorruptFileError: the file is damaged.
        BackendError: TensorRT refuses the graph or the build.
    """
    graph = ForeignGraph(path)
    graph.session(OrtBackend(Ort(threads=1)))
    check_names([graph], spans)
    missing = [name for name in graph.open_sizes if name not in spans]
    if missing:
        words = " ".join(f"--size {name}=LEAST:BEST:MOST" for name in missing)
        raise InputError(f"open sizes without numbers: {', '.join(missing)}", fix=f"say {words}", where=path)
    profile = {
        t.name: tuple(tuple(spans[n][i] if isinstance(n, str) else n for n in t.shape) for i in range(3))
        for t in graph.inputs
    }
    model = embedded(graph.content, graph.weights, graph.weights_file, path)
    if compiler.options.precision == "fp16":
        from hcmen.export.float16 import to_float16

        model = to_float16(model)
    started = time.perf_counter()
    plan, plugin = compiler.engine_of(model, [profile] if graph.open_sizes else [], path)
    seconds = time.perf_counter() - started
    content = memoryview(plan).cast("B")
    with refused(out, fix="choose another place"):
        write_file(out, content)
    return ForeignEngine(len(content), plugin, seconds, profile)
