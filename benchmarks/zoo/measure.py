"""One family in a process of its own: built, exported, verified, timed. benchmarks/mamba_zoo.py runs this.

python -m zoo.measure FAMILY --repos FOLDER --packages FOLDER --out FILE.json
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

import hcmen.mamba
from hcmen.base.errors import CheckFailed, HcmenError
from hcmen.base.library import library_path
from hcmen.mamba.scan import implementation
from zoo import FAMILIES, Family, Missing
from zoo.registry import stand_ins

LEAST_ROUNDS = 3
"""Of every way of running, however slow."""
LEAST_RATIOS = 15
"""Of the two ways in ONNX Runtime, whose ratio is what counts."""
MOST_ROUNDS = 60


def session(path: Path, *, library: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if library:
        options.register_custom_ops_library(str(library_path()))
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def calls(model: nn.Module, inputs: Sequence[Tensor], path: Path) -> dict[str, Callable[[], Any]]:
    """What is compared, each on the example's sizes."""

    def on_reference() -> Any:
        with implementation("ref"):
            return model(*inputs)

    def onnx_call(library: bool) -> Callable[[], Any]:
        made = session(path, library=library)
        feeds = {i.name: x.numpy() for i, x in zip(made.get_inputs(), inputs, strict=True)}
        return lambda: made.run(None, feeds)

    return {
        "eager_reference": on_reference,
        "eager": lambda: model(*inputs),
        "scan": onnx_call(False),
        "library": onnx_call(True),
    }


def timed(runs: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds of a call, all ways in turns: a load that comes and goes falls on all of them alike.

    Counted is the processor time of this process, which runs one thread. On a machine with nothing else running that is
    the time of a clock; on one that others use, a clock counts their turns too, and more of them in a longer call.

    After `LEAST_ROUNDS` and half of `seconds`, PyTorch is left out, so that ONNX Runtime gets as many rounds as fit.
    """
    took: dict[str, list[float]] = {name: [] for name in runs}
    waited: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for run in runs.values():
            run()
        begin, left = time.perf_counter(), dict(runs)
        for index in range(MOST_ROUNDS):
            for name, run in left.items():
                before, clock = time.process_time(), time.perf_counter()
                run()
                took[name].append(time.process_time() - before)
                waited[name].append(time.perf_counter() - clock)
            gone = time.perf_counter() - begin
            if index + 1 >= LEAST_ROUNDS and gone > seconds / 2:
                left = {name: run for name, run in runs.items() if name in ("scan", "library")}
            if index + 1 >= LEAST_RATIOS and gone > seconds:
                break
    return {
        name: {
            "median": 1e3 * statistics.median(took[name]),
            "least": 1e3 * min(took[name]),
            "clock_median": 1e3 * statistics.median(waited[name]),
            "n": len(took[name]),
        }
        for name in runs
    }


def operators(path: Path) -> dict[str, int]:
    """How many nodes of each operator the graph has."""
    graph = onnx.load(str(path), load_external_data=False).graph
    found = Counter(f"hcmen.{n.op_type}" if n.domain == "hcmen" else n.op_type for n in graph.node)
    return dict(found.most_common())


def _ever_less(family: Family) -> list[tuple[dict[int, str], ...]]:
    """What is asked for as open: all that the family wants, the batch alone, nothing."""
    wanted = tuple(family.dynamic)
    batch = tuple({axis: name for axis, name in axes.items() if name == "batch"} for axes in wanted)
    found: list[tuple[dict[int, str], ...]] = []
    for asked in (wanted, batch, tuple({} for _ in wanted)):
        if asked not in found:
            found.append(asked)
    return found


def exported(model: nn.Module, inputs: tuple[Tensor, ...], family: Family, path: Path) -> dict[str, Any]:
    """The file and what `hcmen.mamba.export` reports of it; sizes that the model fixes are asked for no more."""
    fixed: list[str] = []
    for asked in _ever_less(family):
        try:
            report = hcmen.mamba.export(model, inputs, path, dynamic=asked)
            break
        except CheckFailed as error:
            if "is fixed to" not in str(error) or not any(asked or ()):
                raise
            fixed.append(str(error))
    told = report.as_dict()
    worst = max(told["outputs"], key=lambda o: max(o["library"], o["functions"] or 0) / o["bound"])
    return {
        "sites": {op: sum(modules.values()) for op, modules in told["sites"].items()},
        "rewrites": told["rewrites"],
        "nodes_traced": told["nodes_traced"],
        "nodes": told["nodes"],
        "operators": operators(path),
        "fixed": fixed,
        "open_sizes": sorted({size["name"] for size in told["sizes"] if size["open"]}),
        "notes_on_sizes": sorted({f"{s['name']}: {s['note']}" for s in told["sizes"] if s["open"] and s["note"]}),
        "trials": told["trials"],
        "errors": {name: worst[name] for name in ("name", "library", "functions", "float64", "bound")},
        "float64": told["float64"],
    }


def measure(family: Family, repositories: Path, seconds: float, lock: Path) -> dict[str, Any]:
    """The row of one family. Raises what its code, the export or its check raises."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sys.path[:0] = [str(repositories / folder) for folder in family.folders]
    started = time.perf_counter()
    row: dict[str, Any] = {}
    with hcmen.mamba.shim(), tempfile.TemporaryDirectory() as folder:
        with stand_ins(family.absent):
            model, inputs = family.build(repositories)
        row["parameters"] = sum(p.numel() for p in model.parameters())
        row["inputs"] = [list(x.shape) for x in inputs]
        built = time.perf_counter()
        path = Path(folder) / "model.onnx"
        row |= exported(model, inputs, family, path)
        row["fixed"] = [told.replace(f"{repositories}/", "") for told in row["fixed"]]
        row["bytes"] = path.stat().st_size
        checked = time.perf_counter()
        with lock.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            begin = time.perf_counter()
            row["ms"] = timed(calls(model, inputs, path), seconds)
    row["times_scan"] = row["ms"]["scan"]["median"] / row["ms"]["library"]["median"]
    ended = time.perf_counter()
    row["seconds"] = {"build": built - started, "export": checked - built, "time": ended - begin}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--repos", type=Path, required=True)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=12)
    parser.add_argument("--lock", type=Path, default=Path(os.devnull))
    options = parser.parse_args()
    family = FAMILIES[options.family]
    sys.path.append(str(options.packages))
    row: dict[str, Any] = {"state": "done"}
    try:
        why = family.missing(options.repos)
        if why:
            raise Missing(why)
        row |= measure(family, options.repos.resolve(), options.seconds, options.lock)
    except Missing as error:
        row = {"state": "absent", "reason": str(error)}
    except HcmenError as error:
        row = {"state": "failed", "reason": str(error)}
    except Exception as error:  # other people's code raises anything
        if os.environ.get("ZOO_TRACE"):
            raise
        row = {"state": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
    options.out.write_text(json.dumps(row, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
