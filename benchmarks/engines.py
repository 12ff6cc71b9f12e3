"""What TensorRT-RTX's builder makes of the model-local functions: kernel launches counted, memory, sizes, build times.

    python benchmarks/engines.py        docs/results/tensorrt_rtx.json; an hour of two cores, no GPU

Launches are counted in the builder's own list of layers (launches.py), not timed: no engine runs here, and how long a
launch takes on a GPU is not in any figure. Times of ONNX Runtime on this CPU are: median of many, bodies taking turns.

Each build has a process of its own. The file is written after each, and what it holds already is not built again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from launches import activation_bytes, launches, layers_of
from machine import describe
from onnx import inliner, numpy_helper

from hcmen.base.bundle import read_bundle
from hcmen.base.files import write_file
from hcmen.base.modalities import VARIANTS
from hcmen.base.shipped import DEMO
from hcmen.mamba.functions import add_functions
from hcmen.mamba.one_node import conv_model, scan_model
from hcmen.mamba.scan_bodies import BLOCK
from hcmen.runtime.backends.tensorrt_rtx import set_targets

ROOT = Path(__file__).resolve().parents[1]
CHANNELS, STATES, WIDTH, STEPS = 512, 12, 4, 500
"""Of the models of one node: those of MOSI's longest modality."""
MAX_BATCH, OPT_BATCH = 32, 8
"""As hcmen-compile takes them when it is told nothing."""
BUILD_S = 1800
CPU_SIZES = [(512, 500, 12), (256, 500, 12), (256, 50, 12)]
NOTE = (
    "Launches are counted in the builder's list of layers for a run at full length; nothing was executed and no launch "
    "was timed. Others used the machine, too: of the build times take the order of magnitude, of ONNX Runtime's times "
    "the ratio. Weights are random in MOSI's sizes."
)


@dataclass(frozen=True)
class Case:
    """One build. graph: an operator or a variant; sizes: "node", "mosi" or "demo"; profiles: "clip" (one clip, or for a
    node a batch of one), "batches" (up to 32, for a node 32), or "both". target: a GPU to build for, by the builder's
    name for it; else its default."""

    graph: str
    sizes: str
    body: str
    precision: str
    profiles: str
    target: str | None = None


def cases() -> list[Case]:
    """All builds, the quickest first."""
    bodies, precisions, profiles = ("scan", "blocks"), ("fp32", "fp16"), ("clip", "batches", "both")
    found = [
        Case(op, "node", body, precision, batches)
        for op in ("SelectiveScan", "CausalConv1d")
        for body in bodies
        for precision in precisions
        for batches in profiles[:2]
    ]
    variants = sorted(VARIANTS, key=lambda v: len(v.present))
    for sizes in ("mosi", "demo"):
        found += [Case(v.name, sizes, "blocks", p, some) for v in variants for p in precisions for some in profiles]
    for name in ("text_only", "vision_only", "full"):
        found += [Case(name, "mosi", "scan", p, some) for p in precisions for some in profiles]
    found += [Case(v.name, "mosi", "blocks", p, "clip", "SM75") for v in variants for p in precisions]
    return found


# --- one build, in a process of its own -------------------------------------------------------------------------------


def node_of(case: Case) -> tuple[onnx.ModelProto, list[dict[str, Any]], list[int]]:
    """The model, its profiles, and the steps of time of the inputs that a loop may run over."""
    dtype = {"fp32": "float32", "fp16": "float16"}[case.precision]
    rng = np.random.default_rng(0)
    if case.graph == "SelectiveScan":
        model = scan_model(CHANNELS, STATES, dtype=dtype, functions=False, delta_softplus=True, gated=True)
        weights = {"A": -rng.uniform(0.5, STATES, (CHANNELS, STATES)), "D": np.ones(CHANNELS)}
        weights["delta_bias"] = np.full(CHANNELS, 0.01)
        widths = dict.fromkeys(("u", "delta", "z"), CHANNELS) | dict.fromkeys("BC", STATES)
        steps = [STEPS]
    else:
        model = conv_model(CHANNELS, WIDTH, dtype=dtype, functions=False)
        weights = {"weight": rng.normal(size=(CHANNELS, WIDTH)), "bias": np.zeros(CHANNELS)}
        widths, steps = {"x": CHANNELS}, []
    kept = [value for value in model.graph.input if value.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.graph.initializer.extend(numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items())
    batch = {"clip": 1, "batches": MAX_BATCH}[case.profiles]
    shapes = {n: tuple((batch, t, width) for t in (1, STEPS // 2, STEPS)) for n, width in widths.items()}
    return model, [shapes], steps


def variant_of(case: Case, path: Path) -> tuple[onnx.ModelProto, list[dict[str, Any]], list[int]]:
    """The same of a variant of the bundle in `path`, as hcmen-compile prepares it."""
    from hcmen.export.engine_options import profile_shapes
    from hcmen.export.float16 import to_float16
    from hcmen.export.weights import embedded_model

    bundle = read_bundle(path)
    model = embedded_model(bundle, case.graph)
    if case.precision == "fp16":
        model = to_float16(model)
    profiles = profile_shapes(bundle, bundle.variant(case.graph), MAX_BATCH, OPT_BATCH)
    steps = [high[1] for _, _, high in profiles[0].values() if len(high) == 3]
    return model, {"clip": profiles[:1], "batches": profiles[1:], "both": profiles}[case.profiles], steps


def built(case: Case, path: Path) -> dict[str, Any]:
    """The figures of one build, or what the builder says against it."""
    import tensorrt_rtx_bindings as trt

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.said: list[tuple[Any, str]] = []

        def log(self, severity: Any, text: str) -> None:
            self.said.append((severity, text))

        def errors(self) -> str:
            worst = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)
            return " ".join(" ".join(text for severity, text in self.said if severity in worst).split())[:300]

    model, profiles, steps = node_of(case) if case.sizes == "node" else variant_of(case, path)
    model = inliner.inline_local_functions(add_functions(model, case.body))
    weights = sum(numpy_helper.to_array(t).nbytes for t in model.graph.initializer)
    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        return {"error": logger.errors()}
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, sizes in shapes.items():
            profile.set_shape(name, *sizes)
        config.add_optimization_profile(profile)
    if case.target is not None:
        set_targets(trt, config, [int(case.target.removeprefix("SM"))])
    started = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    seconds = round(time.perf_counter() - started, 2)
    if plan is None:
        return {"layers": network.num_layers, "seconds": seconds, "error": logger.errors()}
    log = "\n".join(text for _, text in logger.said)
    turns = [-(-n // (BLOCK if case.body == "blocks" else 1)) for n in steps]
    size = memoryview(plan).nbytes
    return {
        "layers": network.num_layers,
        "launches": [launches(layers, turns) for layers in layers_of(log)],
        "activation_bytes": activation_bytes(log),
        "engine_bytes": size,
        "weights_bytes": weights,
        "engine_over_weights": round(size / weights, 2),
        "seconds": seconds,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }


def in_a_child(case: Case, path: Path) -> dict[str, Any]:
    """`built` in another process, which may crash or take its gigabytes with it."""
    command = [sys.executable, __file__, "--build", json.dumps(dataclasses.asdict(case)), "--bundle", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_S, preexec_fn=lambda: os.nice(10))
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {BUILD_S} s"}
    if done.returncode:
        raise RuntimeError(f"{case}: exit code {done.returncode}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# --- ONNX Runtime -----------------------------------------------------------------------------------------------------


def on_this_cpu(channels: int, steps: int, states: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of one SelectiveScan by its function in ONNX Runtime, one thread, the bodies taking turns."""
    import onnxruntime

    rng = np.random.default_rng(0)
    feeds = {name: rng.normal(size=(1, steps, channels)) for name in ("u", "z")}
    feeds |= {"delta": rng.normal(-4.0, 1.0, (1, steps, channels)), "D": np.ones(channels)}
    feeds |= {name: rng.normal(size=(1, steps, states)) for name in "BC"}
    feeds |= {"A": -rng.uniform(0.5, states, (channels, states)), "delta_bias": np.zeros(channels)}
    feeds = {name: x.astype(np.float32) for name, x in feeds.items()}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    sessions = {
        body: onnxruntime.InferenceSession(
            add_functions(
                scan_model(channels, states, functions=False, delta_softplus=True, gated=True), body
            ).SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
        )
        for body in ("scan", "blocks")
    }
    spent: dict[str, list[float]] = {body: [] for body in sessions}
    for turn in range(rounds + 2):
        for body, session in sessions.items():
            started = time.perf_counter()
            session.run(None, feeds)
            if turn >= 2:
                spent[body].append(time.perf_counter() - started)
    medians = {f"{body}_ms": round(1e3 * statistics.median(own), 3) for body, own in spent.items()}
    return {"channels": channels, "steps": steps, "states": states, "batch": 1, "threads": 1, "n": rounds, **medians}


# --- all of it --------------------------------------------------------------------------------------------------------


def mosi_bundle(path: Path) -> Path:
    """A bundle of MOSI's sizes with random weights, exported to `path` unless it is there."""
    if not path.exists():
        import torch

        from hcmen.base.console import Console
        from hcmen.export.bundle import export_bundle
        from hcmen.models.hcmen.model import HCMEN
        from hcmen.training.checkpoint import save_checkpoint
        from hcmen.training.config import TrainConfig
        from hcmen.training.presets import preset_named

        torch.manual_seed(0)
        checkpoint = path.with_name("checkpoint")
        checkpoint.mkdir(parents=True, exist_ok=True)
        model = HCMEN(preset_named("mosi").model).eval()
        save_checkpoint(checkpoint, model, TrainConfig(), epoch=0, validation={}, dataset={"name": "none"})
        export_bundle(checkpoint, path, console=Console())
    return path


def standing(out: Path) -> tuple[dict[Case, dict[str, Any]], list[dict[str, Any]]]:
    """The builds and the times that an earlier run wrote there."""
    if not out.is_file():
        return {}, []
    held = json.loads(out.read_text())
    fields = [field.name for field in dataclasses.fields(Case)]
    rows = {Case(**{name: row.pop(name) for name in fields}): row for row in held["builds"]}
    return rows, held["onnxruntime_cpu"]


def write(out: Path, rows: dict[Case, dict[str, Any]], cpu: list[dict[str, Any]]) -> None:
    """The file, a line for each row, whole."""
    import tensorrt_rtx_bindings as trt

    known = {case: rows[case] for case in cases() if case in rows}
    head = {
        "schema_version": 1,
        "what": (__doc__ or "").splitlines()[0],
        "note": NOTE,
        "machine": describe(),
        "builder": {"name": "TensorRT-RTX", "version": trt.__version__},
        "block": BLOCK,
        "node": {"channels": CHANNELS, "states": STATES, "width": WIDTH, "steps": STEPS},
        "batches": {"clip": [1], "batches": [1, OPT_BATCH, MAX_BATCH], "node": [1, MAX_BATCH]},
    }
    lists = {"builds": [{**dataclasses.asdict(c), **r} for c, r in known.items()], "onnxruntime_cpu": cpu}
    parts = [json.dumps(head, indent=1)[:-2]]
    for name, items in lists.items():
        parts.append(f' "{name}": [\n' + ",\n".join(f"  {json.dumps(item)}" for item in items) + "\n ]")
    write_file(out, (",\n".join(parts) + "\n}\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "tensorrt_rtx.json")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "engines", help="for a bundle of MOSI's sizes")
    parser.add_argument("--only", default="", help="build the cases that have these words, such as 'demo fp16'")
    parser.add_argument("--again", action="store_true", help="build also what the file has already")
    parser.add_argument("--rounds", type=int, default=100, help="runs of each body in ONNX Runtime")
    parser.add_argument("--build", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--bundle", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build:
        print(json.dumps(built(Case(**options.build), options.bundle)))
        return
    out = options.out.resolve()
    rows, cpu = standing(out)
    bundles = {"node": Path(), "demo": DEMO / "bundle", "mosi": mosi_bundle(options.folder.resolve() / "mosi")}
    if options.rounds:
        cpu = [on_this_cpu(*size, options.rounds) for size in CPU_SIZES]
        print(json.dumps(cpu))
    for case in cases():
        words = [str(value) for value in dataclasses.asdict(case).values()]
        if (case not in rows or options.again) and all(word in words for word in options.only.split()):
            rows[case] = in_a_child(case, bundles[case.sizes])
            write(out, rows, cpu)
            print(" ".join(words), json.dumps(rows[case]), flush=True)
    write(out, rows, cpu)


if __name__ == "__main__":
    main()
