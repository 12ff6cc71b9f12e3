"""Float16 and int8 for anybody's .onnx file, judged beside the float32 file on the same inputs.

There are no labels and no golden outputs, so what is told is how far each output moved, by its largest number: once
with the kernel library, once by the functions in the file, which stay in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from hcmen.base.errors import BackendError, CheckFailed, CorruptFileError, InputError, reason_of, unknown_name
from hcmen.base.files import open_regular, refused, write_file
from hcmen.base.typed import as_typed
from hcmen.export.float16 import half_weights
from hcmen.export.int8 import activation_ranges, linear_layers, quantised
from hcmen.export.weights import embedded
from hcmen.runtime.backends import Ort
from hcmen.runtime.backends.ort import FUNCTIONS, STANDARD, OrtBackend
from hcmen.runtime.foreign import ForeignGraph, check_names

__all__ = ["BOUNDS", "Moved", "calibration_arrays", "reduce_file"]

BOUNDS: dict[str, float | None] = {"fp16": 2e-2, "int8": None}
"""precision -> by how much of its largest number an output may move where no bound is named; None: it is told alone."""
RANDOM_BATCHES = 8
"""What int8 is calibrated with, where there are no arrays; one more is what the file is judged on."""

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Moved:
    """What a reduced file is beside the float32 one.

    before, after: bytes. moved: output -> way ("library", "functions", "standard") -> the largest difference, by the
    largest number of the float32 output. layers: linear layers that int8 multiplies as integers, [] with fp16.
    """

    before: int
    after: int
    moved: dict[str, dict[str, float]]
    layers: list[str]


def calibration_arrays(path: Path, graph: ForeignGraph) -> Arrays:
    """The inputs of `graph` in an .npz file of arrays by name; states that are not in it are zero.

    Raises:
        InputError: no such file, or arrays that do not fit the inputs.
        CorruptFileError: no .npz file.
    """
    with refused(path, "an .npz file of arrays by input name"), open_regular(path) as file:
        try:
            with np.load(file, allow_pickle=False) as archive:
                given = {name: archive[name] for name in archive.files}
        except OSError:
            raise
        except Exception as error:  # zipfile, zlib and NumPy have no common base
            what = f"no .npz file of plain arrays ({reason_of(error)})"
            raise CorruptFileError(what, fix="write it with numpy.savez", where=str(path)) from error
    known = {t.name: t for t in graph.inputs}
    zero = {s.name for s in graph.states}
    for name in given:
        if name not in known:
            raise unknown_name("input", name, known).but(where=str(path))
    sizes: dict[str, int] = {}
    for name, x in given.items():
        t = known[name]
        fits = x.dtype == t.dtype and len(x.shape) == len(t.shape)
        for n, found in zip(t.shape, x.shape, strict=False):
            fits = fits and found == (n if isinstance(n, int) else sizes.setdefault(n, found))
        if not fits:
            expected = f"{t.dtype} {[sizes.get(n, n) if isinstance(n, str) else n for n in t.shape]}"
            raise InputError(f"input '{name}' is {x.dtype} {list(x.shape)}", expected, where=str(path))
    for name, t in known.items():
        if name not in given:
            if name not in zero:
                raise InputError(f"input '{name}' is missing", ", ".join(known), where=str(path))
            given[name] = np.zeros([n if isinstance(n, int) else sizes[n] for n in t.shape], t.dtype)
    return given


def reduce_file(
    path: str,
    out: Path,
    precision: str,
    *,
    sizes: Mapping[str, int],
    ranges: Mapping[str, tuple[int, int]],
    calibrate: Path | None = None,
    tolerance: float | None = None,
    seed: int = 0,
) -> Moved:
    """Writes the file `path` to `out` in "fp16" or "int8", whole or not at all.

    Args:
        sizes, ranges: of random inputs, as of `ForeignGraph`. calibrate: an .npz file of inputs in their place.
        tolerance: by how much of its largest number an output may move; None for `BOUNDS`.

    Raises:
        InputError: a size is missing, an input does not fit, a weight is beyond float16, or no weight can be reduced.
        CorruptFileError: a file is damaged.
        BackendError: ONNX Runtime or the kernel library is missing.
        CheckFailed: an output moves further than the bound, or is no number.
    """
    graph = ForeignGraph(path)
    backends = {"library": OrtBackend(Ort(prepack=True)), "functions": OrtBackend(Ort(prepack=True), library=False)}
    session = graph.session(backends["library"])
    if session.kernels == FUNCTIONS:
        raise BackendError("the kernel library is not found", fix=f"see {as_typed('hcmen-doctor')}", where=path)
    if session.kernels == STANDARD:
        backends = {"standard": backends["library"]}
    check_names([graph], sizes, ranges)
    if calibrate is None:
        drawn = [graph.random(graph.sized(sizes), ranges, seed + i) for i in range(RANDOM_BATCHES + 1)]
        batches, judged = drawn[:-1], drawn[-1]
    else:
        judged = calibration_arrays(calibrate, graph)
        batches = [judged]
    model = embedded(graph.content, graph.weights, graph.weights_file, path)
    made, layers = _reduced(model, precision, batches, path)
    content = made.SerializeToString()
    moved: dict[str, dict[str, float]] = {}
    for way, backend in backends.items():
        expected = graph.session(backend).run(judged)
        got = backend.session(content, np.zeros(0, np.uint8), "none", f"{path} as {precision}").run(judged)
        for name, x in expected.items():
            moved.setdefault(name, {})[way] = _apart(name, got[name], x)
    bound = BOUNDS[precision] if tolerance is None else tolerance
    worst = max(((d, name, way) for name, ways in moved.items() for way, d in ways.items()), default=(0.0, "", ""))
    if bound is not None and worst[0] > bound:
        raise CheckFailed(
            f"output '{worst[1]}' moves by {worst[0]:.1e} of its largest number ({worst[2]})",
            f"at most {bound:g}",
            "nothing was written; keep float32, or name a larger --tolerance",
            where=path,
        )
    with refused(out, fix="choose another place"):
        write_file(out, content)
    return Moved(len(graph.content) + len(graph.weights), len(content), moved, layers)


def _reduced(model: ModelProto, precision: str, batches: Sequence[Arrays], where: str) -> tuple[ModelProto, list[str]]:
    """The reduced model, and the names of the weights of its integer products."""
    _name_nodes(model)
    try:
        if precision == "fp16":
            made, layers = half_weights(model), []
        else:
            weights = linear_layers(model)
            made, _ = quantised(model, activation_ranges(model, batches) if weights else {})
            layers = list(dict.fromkeys(weights.values()))
    except InputError as error:
        raise error.but(where=where, fix="keep float32") from error
    # The tools of int8 drop the metadata, which tell of the states.
    del made.metadata_props[:]
    made.metadata_props.extend(model.metadata_props)
    kinds = [{t.name: t.data_type for t in m.graph.initializer} for m in (model, made)]
    if kinds[0] == kinds[1]:
        raise InputError(f"it has no weight that {precision} stores smaller", fix="keep float32", where=where)
    return made, layers


def _name_nodes(model: ModelProto) -> None:
    """Gives each node a name of its own, by which int8 tells them apart."""
    seen: set[str] = set()
    for i, node in enumerate(model.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{i}"
            while node.name in seen:
                node.name += "_"
        seen.add(node.name)


def _apart(name: str, got: NDArray[Any], expected: NDArray[Any]) -> float:
    """The largest difference by the largest expected number; raises CheckFailed for what is no number, or no shape."""
    a, b = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    if a.shape != b.shape:
        raise CheckFailed(f"output '{name}' has shape {list(a.shape)}", str(list(b.shape)))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise CheckFailed(f"output '{name}' has NaN or infinity", "finite numbers", "nothing was written")
    if not a.size:
        return 0.0
    difference, largest = float(np.abs(a - b).max()), float(np.abs(b).max())
    return difference / largest if largest else (0.0 if difference == 0 else float("inf"))
