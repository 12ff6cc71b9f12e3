"""The exported graphs beside what else there is: eager PyTorch, torch.compile, an earlier export; and what bounds them.

    python benchmarks/graph.py --out docs/results/graph.json            add --before BUNDLE for an earlier export

HCMEN of the MOSI preset with random weights, batch 1 at full length (text 50, audio 375, vision 500 steps), medians in
one process. Contenders take turns in bursts, whose first runs are not counted and before which everybody's threads are
given time to fall asleep: ONNX Runtime's and OpenMP's spin for a while after a run and would hold up the next one.
PyTorch has one thread or all, whichever is faster for the variant.

The floor of a variant is the time for its arithmetic alone at rates measured here: its multiplications and additions
at the rate of one large matrix product, the exponentials of its scans at the rate of a bare loop over registers.
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from machine import describe
from onnx import TensorProto, helper, numpy_helper
from torch.utils.flop_counter import FlopCounterMode

import hcmen.models.hcmen.layers
from hcmen.base.console import Console
from hcmen.base.library import library_path, load_library
from hcmen.base.modalities import MODALITIES, VARIANTS
from hcmen.export.bundle import export_bundle
from hcmen.mamba.scan import implementation
from hcmen.models.hcmen.model import HCMEN
from hcmen.runtime import load
from hcmen.training.checkpoint import save_checkpoint, write_json
from hcmen.training.config import TrainConfig
from hcmen.training.presets import preset_named

Run = Callable[[], Any]
PAUSE_S = 0.03
"""Longer than the threads of ONNX Runtime and of OpenMP spin."""
BATCHES = (1, 8, 32)
LENGTHS = (50, 500, 5_000, 50_000)


def inputs(config: Any, variant: Any, batch: int = 1, steps: int | None = None) -> dict[str, np.ndarray]:
    """Graph inputs of `variant`: random features of full length, or of `steps` steps."""
    rng = np.random.default_rng(0)
    made: dict[str, np.ndarray] = {}
    for m in variant.present:
        features = config.modality(m)
        time_steps = steps or features.max_steps
        made[m] = rng.standard_normal((batch, time_steps, features.features)).astype(np.float32)
        made[f"{m}_length"] = np.full(batch, time_steps, np.int64)
    return made


def taking_turns(contenders: dict[str, Run], rounds: int, burst: int = 4) -> dict[str, list[float]]:
    """Seconds of each contender's runs; of every burst the first two are not counted."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            time.sleep(PAUSE_S)
            for i in range(burst):
                started = time.perf_counter()
                run()
                if i >= 2:
                    times[name].append(time.perf_counter() - started)
    return times


def eager(model: Any, feed: dict[str, np.ndarray], threads: int, how: str) -> Run:
    """The eager model (or a compiled one) on the scan implementation `how`."""
    features = {m: torch.from_numpy(feed[m]) for m in MODALITIES if m in feed}
    lengths = {m: torch.from_numpy(feed[f"{m}_length"]) for m in features}

    @torch.inference_mode()
    def run() -> np.ndarray:
        torch.set_num_threads(threads)
        with implementation(how):
            return model(features, lengths).score.numpy()

    return run


def session(path: Path, threads: int, folder: Path | None = None) -> Any:
    """A session as the runtime makes it for a small model, from a file, with or without a profile in `folder`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library_path()))
    options.add_session_config_entry("session.disable_prepacking", "1")
    if folder is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / "profile")
        options.optimized_model_filepath = str(folder / "optimised.onnx")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def nodes(path: Path) -> dict[str, int]:
    """Node counts of a graph by operator, the commonest first."""
    graph = onnx.load(str(path), load_external_data=False).graph
    return dict(collections.Counter(n.op_type for n in graph.node).most_common())


def profile(path: Path, feed: dict[str, np.ndarray], rounds: int) -> dict[str, Any]:
    """Where a run on one thread goes, by operator, and what ONNX Runtime makes of the graph."""
    with tempfile.TemporaryDirectory() as folder:
        profiled = session(path, 1, Path(folder))
        for _ in range(rounds + 5):
            profiled.run(None, feed)
        events = json.loads(Path(profiled.end_profiling()).read_text())
        kept = nodes(Path(folder) / "optimised.onnx")
    begin = sorted(e["ts"] for e in events if e["name"] == "model_run")[5]
    spent: collections.Counter[str] = collections.Counter()
    for e in events:
        if e.get("cat") == "Node" and e["name"].endswith("kernel_time") and e["ts"] >= begin:
            spent[e["args"]["op_name"]] += e["dur"]
    total = sum(spent.values())
    return {
        "threads": 1,
        "nodes_run": sum(kept.values()),
        "sum_ms": round(total / rounds / 1e3, 3),
        "share": {op: round(us / total, 4) for op, us in spent.most_common()},
    }


def arithmetic(model: HCMEN, feed: dict[str, np.ndarray]) -> dict[str, int]:
    """Floating-point operations of products and convolutions, and exponentials of scans, of one run."""
    exponentials = 0

    def counting(
        u: Any, delta: Any, A: Any, *rest: Any, real: Any = hcmen.models.hcmen.layers.selective_scan, **options: Any
    ) -> Any:
        nonlocal exponentials
        exponentials += u.numel() * A.shape[1]
        return real(u, delta, A, *rest, **options)

    kept, hcmen.models.hcmen.layers.selective_scan = hcmen.models.hcmen.layers.selective_scan, counting
    try:
        with FlopCounterMode(display=False) as counter:
            eager(model, feed, 1, "native")()
    finally:
        hcmen.models.hcmen.layers.selective_scan = kept
    return {"flop": counter.get_total_flops(), "scan_exponentials": exponentials}


def matmul_session(k: int, n: int) -> onnxruntime.InferenceSession:
    """[rows, k] times a constant [k, n], on one thread."""
    weights = numpy_helper.from_array(np.random.default_rng(0).standard_normal((k, n)).astype(np.float32), "b")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, ["rows", k])],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, ["rows", n])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def rates() -> dict[str, Any]:
    """What this machine does at best: operations of a matrix product and exponentials per second on one thread.

    The product is that of the fastest library: each has processors for which it knows no better than AVX2.
    """
    torch.set_num_threads(1)
    a, b = torch.randn(512, 1024), torch.randn(1024, 1024)
    session, feed = matmul_session(1024, 1024), {"a": a.numpy()}
    products: dict[str, Run] = {"torch": lambda: a @ b, "onnxruntime": lambda: session.run(None, feed)}
    seconds: dict[str, list[float]] = {name: [] for name in products}
    exponentials, library = [], load_library()
    for _ in range(25):
        for name, product in products.items():
            started = time.perf_counter()
            product()
            seconds[name].append(time.perf_counter() - started)
        started = time.perf_counter()
        count = library.hcmen_exp_loop(200_000)
        exponentials.append(count / (time.perf_counter() - started))
    by_library = {name: 2 * 512 * 1024 * 1024 / min(s) for name, s in seconds.items()}
    return {
        "flop_per_s": max(by_library.values()),
        "flop_per_s_by_library": {name: round(rate) for name, rate in by_library.items()},
        "exponentials_per_s": max(exponentials),
        "threads": 1,
    }


def one_variant(
    a: argparse.Namespace, model: HCMEN, bundle: Path, variant: Any, rate: dict[str, Any]
) -> dict[str, Any]:
    """All figures of one variant."""
    feed = inputs(model.config, variant)
    device = load(bundle, threads=a.threads)
    contenders: dict[str, Run] = {"hcmen": lambda: device.run(variant.name, feed)["score"]}
    if a.before:
        earlier = load(a.before, threads=a.threads)
        contenders["before"] = lambda: earlier.run(variant.name, feed)["score"]
    for threads in sorted({1, a.threads}):
        contenders[f"eager native, {threads} threads"] = eager(model, feed, threads, "native")
    if a.compile:
        torch._dynamo.reset()
        compiled = torch.compile(model)
        for threads in sorted({1, a.threads}):
            contenders[f"torch.compile, {threads} threads"] = eager(compiled, feed, threads, "native")
    expected = eager(
        model.double(), {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in feed.items()}, 1, "ref"
    )()
    model.float()
    errors = {name: float(np.abs(run() - expected).max()) for name, run in contenders.items()}
    wrong = {name: error for name, error in errors.items() if not error <= 1e-5 + 1e-5 * float(np.abs(expected).max())}
    if wrong:
        sys.exit(f"{variant.name}: wrong scores, off by {wrong}")
    times = taking_turns(contenders, a.rounds)
    for threads in sorted({1, a.threads}):
        reference = {"reference": eager(model, feed, threads, "ref")}
        times[f"eager reference, {threads} threads"] = taking_turns(reference, 2, burst=4)["reference"]
    medians = {name: 1e3 * statistics.median(own) for name, own in times.items()}
    ours = medians["hcmen"]

    def times_ours(kind: str) -> float:
        return round(min(ms for name, ms in medians.items() if name.startswith(kind)) / ours, 2)

    one = load(bundle, threads=1)
    alone = taking_turns({"one": lambda: one.run(variant.name, feed)}, a.rounds)["one"]
    work = arithmetic(model, feed)
    floor = 1e3 * (work["flop"] / rate["flop_per_s"] + work["scan_exponentials"] / rate["exponentials_per_s"])
    throughput = {}
    for batch in BATCHES:
        many = inputs(model.config, variant, batch)
        own = taking_turns({"hcmen": lambda many=many: device.run(variant.name, many)}, max(3, a.rounds // 4))["hcmen"]
        throughput[str(batch)] = round(batch / statistics.median(own), 1)
    return {
        "median_ms": {name: round(ms, 3) for name, ms in medians.items()},
        "n": {name: len(own) for name, own in times.items()},
        "eager_native_over_ours": times_ours("eager native"),
        "eager_reference_over_ours": times_ours("eager reference"),
        **({"torch_compile_over_ours": times_ours("torch.compile")} if a.compile else {}),
        **({"before_over_ours": times_ours("before")} if a.before else {}),
        "largest_error_to_float64": errors,
        "one_thread_ms": round(1e3 * statistics.median(alone), 3),
        "arithmetic": work,
        "floor_one_thread_ms": round(floor, 3),
        "clips_per_s_by_batch": throughput,
        "nodes": nodes(bundle / f"{variant.name}.onnx"),
        **({"nodes_before": nodes(a.before / f"{variant.name}.onnx")} if a.before else {}),
        "profile": profile(bundle / f"{variant.name}.onnx", feed, a.rounds),
    }


def growth(bundle: Path, config: Any, threads: int) -> list[dict[str, Any]]:
    """Time per step of audio_only from 50 to 50,000 steps."""
    variant = next(v for v in VARIANTS if v.name == "audio_only")
    device = load(bundle, threads=threads)
    rows = []
    for steps in LENGTHS:
        feed = inputs(config, variant, 1, steps)
        own = taking_turns({"hcmen": lambda feed=feed: device.run(variant.name, feed)}, 4 if steps > 5_000 else 15)[
            "hcmen"
        ]
        median = statistics.median(own)
        rows.append(
            {"steps": steps, "median_ms": round(1e3 * median, 3), "us_per_step": round(1e6 * median / steps, 3)}
        )
    return rows


def draw(result: dict[str, Any], path: Path) -> None:
    """Two pictures: each variant's share of time and of arithmetic, and time against length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    names = list(result["variants"])
    full = result["variants"]["full"]
    time_share = [result["variants"][n]["one_thread_ms"] / full["one_thread_ms"] for n in names]
    floor_share = [result["variants"][n]["floor_one_thread_ms"] / full["floor_one_thread_ms"] for n in names]
    places = np.arange(len(names))
    left.bar(places - 0.2, time_share, 0.4, label="time, one thread")
    left.bar(places + 0.2, floor_share, 0.4, label="arithmetic")
    left.set_xticks(places, [n.replace("_", "\n") for n in names], fontsize=8)
    left.set_ylabel("share of the variant full")
    left.legend(frameon=False)
    left.set_title("A missing modality saves its arithmetic", fontsize=10)
    steps = [r["steps"] for r in result["growth"]]
    right.loglog(steps, [r["median_ms"] for r in result["growth"]], "o-")
    right.set_xlabel("steps of audio")
    right.set_ylabel("ms, audio_only")
    right.grid(alpha=0.3)
    right.set_title("Time grows with length, not faster", fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Exports to a temporary folder, measures, and writes the JSON and the picture beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--before", type=Path, help="a bundle of the same weights (seed 0) that an earlier version wrote"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, help="measure this bundle of the same weights instead of exporting one")
    a = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch._dynamo")
    torch.manual_seed(0)
    config = preset_named("mosi").model
    model = HCMEN(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        bundle = a.bundle or Path(folder) / "bundle"
        if not a.bundle:
            checkpoint = Path(folder) / "checkpoint"
            checkpoint.mkdir()
            save_checkpoint(checkpoint, model, TrainConfig(), epoch=0, validation={}, dataset={"name": "none"})
            export_bundle(checkpoint, bundle, console=Console())
        rate = rates()
        variants = {}
        for variant in VARIANTS:
            variants[variant.name] = one_variant(a, model, bundle, variant, rate)
            shown = {k: v for k, v in variants[variant.name].items() if k.endswith(("_over_ours", "_ms"))}
            print(variant.name, json.dumps(shown), file=sys.stderr)
        result = {
            "schema_version": 1,
            "what": __doc__.splitlines()[0],
            "machine": describe(),
            "threads": a.threads,
            "model": config.to_json(),
            "rates": {k: round(v) if isinstance(v, float) else v for k, v in rate.items()},
            "variants": variants,
            "growth": growth(bundle, config, a.threads),
        }
    a.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(a.out, result)
    draw(result, a.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
