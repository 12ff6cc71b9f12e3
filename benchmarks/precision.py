"""What float16 and int8 weights cost and gain on this CPU, and what was not chosen.

    python benchmarks/precision.py --checkpoint build/train --out docs/results/precision.json

Five parts: `trained`, the checkpoint exported in both precisions, with every gate of an export; `alternatives`, other
ways of fewer bits on its graph of all modalities; `mosi`, the MOSI preset; `bert`, the same with a BERT of BERT-base's
size inside; `products`, the single products that the choice of layers rests on. The weights of `mosi` and `bert` are
random: sizes, times and element-wise differences say something there, the mean absolute error would not.

Times are processor times of one thread for one full-length clip, medians of calls that take turns with the float32
graph in one process; `latency` is the median of the ratio, turn by turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import onnx
import torch
from machine import describe
from onnx import ModelProto, TensorProto, helper, numpy_helper
from text_encoder import BERT_BASE

from hcmen.base.console import Console
from hcmen.base.modalities import Variant, variant_named
from hcmen.data.mmsa import dataset_from_mmsa
from hcmen.data.synthetic import make_synthetic
from hcmen.data.trained_on import dataset_of
from hcmen.export.bundle import export_bundle
from hcmen.export.float16 import half_weights, to_float16
from hcmen.export.int8 import activation_ranges, linear_layers, quantised
from hcmen.export.parity import golden_cases, parity_clips
from hcmen.export.reduced import LabelledData, moved, side_by_side
from hcmen.export.variants import export_variant
from hcmen.models.hcmen.config import ModelConfig
from hcmen.models.hcmen.model import HCMEN
from hcmen.runtime.backends.ort import OrtBackend
from hcmen.training.checkpoint import load_checkpoint, write_json, write_whole
from hcmen.training.evaluate import predict
from hcmen.training.presets import preset_named

Making = Callable[[ModelProto], ModelProto]


def session(model: ModelProto) -> Any:
    """A session for a graph with its weights inside."""
    return OrtBackend().session(model.SerializeToString(), np.zeros(0, np.uint8), "weights.bin", "graph")


def dynamic(model: ModelProto) -> ModelProto:
    """The same layers quantised by ranges of each input, 7 bits per column."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "model.onnx", Path(folder) / "dynamic.onnx"
        onnx.save(model, source)
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=list(linear_layers(model)),
        )
        return half_weights(onnx.load(target))


def all_bits(model: ModelProto, ranges: Any) -> ModelProto:
    """The graph that export would make if weights had 8 bits: wrong on AVX2 without VNNI."""
    from onnxruntime.quantization import quant_utils

    table = quant_utils.ONNX_INT_TYPE_REDUCED_RANGE
    before = table[TensorProto.INT8]
    table[TensorProto.INT8] = (np.array(-127, np.int8), np.array(127, np.int8))
    try:
        return quantised(model, ranges)[0]
    finally:
        table[TensorProto.INT8] = before


def batch_dependence(model: ModelProto, data: LabelledData, variant: Variant) -> float:
    """The largest difference that batch mates make to a score, over the first batch of validation samples."""
    loaded = session(model)
    batch = next(data.validation(variant))
    together = loaded.run(batch)["score"]
    alone = [loaded.run({name: x[i : i + 1] for name, x in batch.items()})["score"][0] for i in range(len(together))]
    return float(np.abs(together - np.array(alone)).max())


def trained(checkpoint: Path, say: Console) -> dict[str, Any]:
    """The checkpoint in both precisions, as hcmen-export makes them."""
    found: dict[str, Any] = {}
    for precision in ("fp16", "int8"):
        with tempfile.TemporaryDirectory() as folder:
            manifest = export_bundle(checkpoint, Path(folder) / "bundle", precision=precision, console=say)
            found[precision] = {
                "weights_bytes": manifest.weights.bytes,
                "variants": {
                    name: {
                        **{key: v.parity[key] for key in ("bytes", "latency", "max_abs", "metric", "atol")},
                        "int8_layers": len(v.parity["layers"]["quantised"]),
                        "kept_in_float": v.parity["layers"]["kept_in_float"],
                    }
                    for name, v in manifest.variants.items()
                },
            }
    return found


def alternatives(checkpoint: Path, rounds: int, say: Console) -> dict[str, Any]:
    """Ways of fewer bits, on the graph of all modalities."""
    model, about = load_checkpoint(checkpoint)
    data = LabelledData(dataset_of(checkpoint, about, model.config.inputs, None, say.note, "judging"))
    variant = variant_named("full")
    graph = export_variant(model, variant)
    ranges = activation_ranges(graph, data.calibration(variant))
    ways: dict[str, Making] = {
        "fp16 weights, float32 products (chosen)": half_weights,
        "fp16 weights and products": to_float16,
        "int8, ranges from clips, 7-bit weights (chosen)": lambda m: quantised(m, ranges)[0],
        "int8, ranges from clips, 8-bit weights": lambda m: all_bits(m, ranges),
        "int8, ranges of each input, 7-bit weights": dynamic,
    }
    eager = predict(model, data.valid, variant)
    clip = parity_clips(model.config.inputs)[1]
    found = {}
    for name, make in ways.items():
        made = make(graph)
        loaded = session(made)
        got = np.concatenate([loaded.run(inputs)["score"] for inputs in data.validation(variant)])
        metric = moved(data.valid.labels, eager, got, "int8" if "int8" in name else "fp16")
        latency = side_by_side(made, graph, clip, variant, rounds)
        found[name] = {
            "bytes": made.ByteSize() / graph.ByteSize(),
            "latency": latency.ratio,
            "slower": latency.slower,
            "max_abs": metric["max_abs"],
            "mae_change": metric["change"],
            "batch_mates_move_a_score_by": batch_dependence(made, data, variant),
        }
        say.note(f"{name}: {found[name]}")
    return {"variant": variant.name, "turns": rounds, "ways": found}


def random_weights(config: ModelConfig, names: list[str], rounds: int, say: Console) -> dict[str, Any]:
    """Sizes, times and differences of a model of random weights."""
    torch.manual_seed(0)
    model = HCMEN(config).eval()
    data = LabelledData(dataset_from_mmsa(make_synthetic(config.inputs, (32, 8, 8), 0), "synthetic", config.inputs))
    clips = parity_clips(config.inputs, seed=1)
    found: dict[str, Any] = {}
    for name in names:
        variant = variant_named(name)
        say.note(f"tracing {name}")
        graph = export_variant(model, variant)
        ranges = activation_ranges(graph, data.calibration(variant))
        forms = {"fp16": half_weights(graph), "int8": quantised(graph, ranges)[0]}
        cases = golden_cases(model, variant, clips)
        times = [side_by_side(made, graph, clips[1], variant, rounds) for made in forms.values()]
        found[name] = {"fp32": {"bytes": graph.ByteSize(), "ms": round(1e3 * times[0].other, 3)}}
        for latency, (precision, made) in zip(times, forms.items(), strict=True):
            loaded = session(made)
            differences = [np.abs(loaded.run(inputs)["score"] - outputs["score"]) for inputs, outputs in cases]
            found[name][precision] = {
                "bytes": made.ByteSize(),
                "ms": round(1e3 * latency.seconds, 3),
                "latency": latency.ratio,
                "slower": latency.slower,
                "max_abs": float(np.concatenate(differences).max()),
            }
        found[name]["score_deviation"] = float(np.concatenate([o["score"] for _, o in cases]).std())
        say.note(f"{name}: {found[name]}")
    return {"weights": "random", "turns": rounds, "variants": found}


# --- single products ------------------------------------------------------------------------------------------------

SHAPES = (
    (500, 8, 512),
    (500, 512, 32),
    (500, 512, 128),
    (500, 128, 1024),
    (50, 768, 128),
    (50, 768, 3072),
    (50, 3072, 768),
)
CONVOLUTION = (128, 500, 3)
"""channels, steps, width of a CNN block at the size of MOSI."""


def one_graph(nodes: list[Any], constants: dict[str, Any], shape: list[Any], out: list[Any]) -> bytes:
    """A model of `nodes` from x to y."""
    made = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 19), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(made, opset_imports=opsets, ir_version=9).SerializeToString())


def product(kind: str, depth: int, columns: int) -> bytes:
    """x [1, steps, depth] times a weight [depth, columns], in one of the ways of `products`."""
    rng = np.random.default_rng(0)
    w = (rng.normal(size=(depth, columns)) / np.sqrt(depth)).astype(np.float32)
    scale = np.abs(w).max(axis=0) / np.float32(64)
    q = np.rint(w / scale).astype(np.int8)
    node = helper.make_node
    activation = {"xs": np.float32(5 / 127), "xz": np.uint8(128)}
    weight = {"q": q, "s": scale, "z": np.zeros(columns, np.int8)}
    if kind == "float32":
        nodes, constants = [node("MatMul", ["x", "w"], ["y"])], {"w": w}
    elif kind.startswith("ranges from clips"):
        constants = {**activation, **weight}
        if kind.endswith("uint8 weights"):
            constants |= {"q": (q.astype(np.int16) + 128).astype(np.uint8), "z": np.full(columns, 128, np.uint8)}
        nodes = [
            node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
            node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
            node("DequantizeLinear", ["q", "s", "z"], ["wd"], axis=1),
            node("MatMul", ["xd", "wd"], ["y"]),
        ]
    elif kind == "ranges of each input":
        constants = weight
        nodes = [
            node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
            node("MatMulInteger", ["xq", "q", "xz", "z"], ["i"]),
            node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
            node("Mul", ["xs", "s"], ["ss"]),
            node("Mul", ["f", "ss"], ["y"]),
        ]
    else:  # blocks of 128 rows, each with a scale of its own; activations quantised by row and block
        blocks = -(-depth // 128)
        padded = np.zeros((columns, blocks * 128), np.float32)
        padded[:, :depth] = w.T
        padded = padded.reshape(columns, blocks, 128)
        s = np.maximum(np.abs(padded).max(axis=-1), 1e-12) / np.float32(127)
        constants = {"q": (np.rint(padded / s[..., None]) + 128).astype(np.uint8), "s": s.astype(np.float32).ravel()}
        attributes = {"K": depth, "N": columns, "bits": 8, "block_size": 128, "accuracy_level": 4}
        nodes = [node("MatMulNBits", ["x", "q", "s"], ["y"], domain="com.microsoft", **attributes)]
    return one_graph(nodes, constants, [1, "t", depth], [1, "t", columns])


def convolution(kind: str) -> bytes:
    """The convolution of a CNN block, in float32 or int8 with ranges from clips."""
    channels, steps, width = CONVOLUTION
    rng = np.random.default_rng(0)
    w = (rng.normal(size=(channels, channels, width)) / np.sqrt(channels * width)).astype(np.float32)
    node, shape = helper.make_node, [1, channels, steps]
    pads = {"pads": [width // 2, width // 2], "kernel_shape": [width]}
    if kind == "float32":
        return one_graph([node("Conv", ["x", "w"], ["y"], **pads)], {"w": w}, shape, shape)
    scale = np.abs(w).max(axis=(1, 2)) / np.float32(64)
    constants = {"q": np.rint(w / scale[:, None, None]).astype(np.int8), "s": scale, "z": np.zeros(channels, np.int8)}
    constants |= {"xs": np.float32(5 / 127), "xz": np.uint8(128)}
    nodes = [
        node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        node("DequantizeLinear", ["q", "s", "z"], ["wd"], axis=0),
        node("Conv", ["xd", "wd"], ["c"], **pads),
        node("QuantizeLinear", ["c", "xs", "xz"], ["cq"]),
        node("DequantizeLinear", ["cq", "xs", "xz"], ["y"]),
    ]
    return one_graph(nodes, constants, shape, shape)


def products(rounds: int) -> list[dict[str, Any]]:
    """Single products side by side: milliseconds in float32, and what the other ways take of it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    kinds = ("float32", "ranges from clips", "ranges from clips, uint8 weights", "ranges of each input", "8-bit blocks")
    rng = np.random.default_rng(1)
    rows = []
    channels, length, width = CONVOLUTION
    cases = [
        (f"[{t}, {k}] x [{k}, {n}]", {kind: product(kind, k, n) for kind in kinds}, (1, t, k)) for t, k, n in SHAPES
    ]
    cases.append(
        (
            f"convolution, {channels} channels, {length} steps, width {width}",
            {kind: convolution(kind) for kind in kinds[:2]},
            (1, channels, length),
        )
    )
    for what, models, shape in cases:
        x = rng.normal(size=shape).astype(np.float32)
        sessions = {
            kind: onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
            for kind, model in models.items()
        }
        seconds: dict[str, list[float]] = {kind: [] for kind in sessions}
        for turn in range(rounds + 3):
            for kind, own in seconds.items():
                started = time.thread_time()
                sessions[kind].run(None, {"x": x})
                if turn >= 3:
                    own.append(time.thread_time() - started)
        median = {kind: statistics.median(own) for kind, own in seconds.items()}
        base = median.pop("float32")
        latency = {kind: round(own / base, 3) for kind, own in median.items()}
        rows.append({"what": what, "float32_ms": round(1e3 * base, 4), "latency": latency, "turns": rounds})
    return rows


# --- the tables -----------------------------------------------------------------------------------------------------


def table(*rows: tuple[str, ...]) -> list[str]:
    """Markdown of a table, its numbers to the right."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return ["", lines[0], "|" + "---|" + "---:|" * (len(rows[0]) - 1), *lines[1:], ""]


def beside(latency: float, slower: bool) -> str:
    """A ratio of times, with a word where float32 is the faster one."""
    return f"{latency:.2f} x{' (slower)' if slower else ''}"


def trained_rows(part: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row per variant and precision of the trained checkpoint."""
    rows = [("variant", "precision", "graph + weights", "of fp32", "latency", "max difference", "MAE eager", "moved")]
    for precision, found in part.items():
        for name, v in found["variants"].items():
            size, metric = v["bytes"], v["metric"]
            rows.append(
                (
                    name,
                    precision,
                    f"{size['got'] / 1e3:.0f} kB",
                    f"{size['got'] / size['fp32']:.0%}",
                    beside(v["latency"]["ratio"], v["latency"]["slower"]),
                    f"{v['max_abs']:.4f}",
                    f"{metric['eager']:.4f}",
                    f"{metric['change']:+.2%}",
                )
            )
    return rows


def random_rows(part: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row per variant and precision of random weights."""
    rows = [("variant", "precision", "graph + weights", "of fp32", "fp32 takes", "latency", "max difference")]
    for name, v in part["variants"].items():
        for precision in ("fp16", "int8"):
            own, size = v[precision], v["fp32"]["bytes"]
            rows.append(
                (
                    name,
                    precision,
                    f"{own['bytes'] / 1e6:.2f} MB",
                    f"{own['bytes'] / size:.0%}",
                    f"{v['fp32']['ms']:.1f} ms",
                    beside(own["latency"], own["slower"]),
                    f"{own['max_abs']:.4f} (scores deviate by {v['score_deviation']:.2f})",
                )
            )
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The tables of what has been measured."""
    lines = [
        "# What float16 and int8 cost and gain",
        "",
        "Written by benchmarks/precision.py. Latency is the processor time of one full-length clip over float32's, the",
        "median of turns in one process; (slower) where it is so by 2 % in three turns of four.",
    ]
    parts = {name: part["result"] for name, part in result.items() if isinstance(part, dict) and "result" in part}
    if "trained" in parts:
        lines += ["", "## A trained checkpoint, as hcmen-export makes and judges it"]
        lines += table(*trained_rows(parts["trained"]))
    if "alternatives" in parts:
        lines += ["## Other ways, on its graph of all modalities"]
        rows = [("way", "size", "latency", "max difference", "MAE moved", "batch mates move a score by")]
        for way, v in parts["alternatives"]["ways"].items():
            figures = (f"{v['bytes']:.0%}", beside(v["latency"], v["slower"]), f"{v['max_abs']:.4f}")
            rows.append((way, *figures, f"{v['mae_change']:+.2%}", f"{v['batch_mates_move_a_score_by']:.1e}"))
        lines += table(*rows)
    for name, title in (("mosi", "The MOSI preset, random weights"), ("bert", "The same with a BERT-base inside")):
        if name in parts:
            lines += [f"## {title}", *table(*random_rows(parts[name]))]
    if "products" in parts:
        kinds = list(parts["products"][0]["latency"])
        lines += ["## Single products"]
        rows = [("product", "float32", *kinds)]
        for row in parts["products"]:
            ratios = (f"{row['latency'][k]:.2f} x" if k in row["latency"] else "" for k in kinds)
            rows.append((row["what"], f"{row['float32_ms']:.3f} ms", *ratios))
        lines += table(*rows)
    some = next(part for part in result.values() if isinstance(part, dict) and "machine" in part)
    versions = ", ".join(f"{name} {version}" for name, version in some["machine"]["versions"].items())
    lines.append(f"One thread, {some['machine']['cpu']}, {versions}, {some['machine']['date']}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures the parts asked for; a part that is not keeps what the file holds of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("build/train"))
    parser.add_argument(
        "--part",
        nargs="+",
        choices=["trained", "alternatives", "mosi", "bert", "products"],
        default=["trained", "alternatives", "mosi", "bert", "products"],
    )
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    say = Console()
    mosi = preset_named("mosi").model
    parts: dict[str, Callable[[], Any]] = {
        "trained": lambda: trained(a.checkpoint, say),
        "alternatives": lambda: alternatives(a.checkpoint, a.rounds, say),
        "mosi": lambda: random_weights(mosi, ["full", "text_missing", "text_only", "audio_only"], a.rounds, say),
        "bert": lambda: random_weights(
            dataclasses.replace(mosi, text_encoder=BERT_BASE), ["full", "text_only"], a.rounds, say
        ),
        "products": lambda: products(5 * a.rounds),
    }
    result = json.loads(a.out.read_text()) if a.out.exists() else {"schema_version": 1}
    for name in a.part:
        print(f"--- {name}", file=sys.stderr)
        result[name] = {"threads": 1, "machine": describe(), "result": parts[name]()}
        write_json(a.out, result)
        write_whole(a.out.with_suffix(".md"), markdown(result).encode())


if __name__ == "__main__":
    main()
