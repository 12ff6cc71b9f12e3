"""Writes figures from docs/results/*.json: parts of README.md and other pages, and the whole of docs/results.md.

python benchmarks/readme.py           rewrites the parts of pages between two markers, and docs/results.md
python benchmarks/readme.py --check   exits with 1 if it would change one of them
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import real_tables
import zoo_table
from real_tables import table

ROOT = Path(__file__).resolve().parent.parent


def result(name: str) -> dict[str, Any]:
    """The JSON docs/results/<name>.json."""
    return json.loads((ROOT / "docs" / "results" / f"{name}.json").read_bytes())


def scan(data: dict[str, Any]) -> str:
    """The selective scan beside its alternatives."""

    def median(case: dict[str, Any], method: str, threads: int) -> float:
        return next(r["median_ms"] for r in case["runs"] if (r["method"], r["threads"]) == (method, threads))

    rows = []
    for case in data["cases"]:
        if case["steps"] not in (50, 500):
            continue
        ours = median(case, "native", 1)
        rows.append(
            [
                f"{case['channels']} x {case['steps']} x {case['states']}",
                f"{ours:.3g} ms",
                *(
                    f"{median(case, m, 1):.3g} ms ({median(case, m, 1) / ours:.1f} x)"
                    for m in ("onnx_scan", "reference", "mamba_ssm_ref")
                ),
                f"{case['share_of_exp_rate']:.2f}",
                f"{case['two_threads_over_one']:.2f} x",
            ]
        )
    header = [
        "channels x steps x states",
        "our kernel",
        "standard ONNX `Scan`",
        "`hcmen.mamba.scan.selective_scan_ref`",
        "`mamba_ssm`'s `selective_scan_ref`",
        "share of exp rate",
        "2 threads over 1",
    ]
    return (
        f"Selective scan on one thread, float32, batch 1, {data['native_instruction_set']} kernels, medians side by "
        'side in one process. "Share of exp rate" is how many exponentials the whole scan computes per second over '
        f"what a bare loop of the same exponential over registers reaches.\n\n{table(header, rows)}"
    )


def kernels(here: dict[str, Any], elsewhere: list[dict[str, Any]], ulp: dict[str, Any]) -> str:
    """What the kernels reach of each processor's own limits, their growth with length, and their errors."""
    sizes = [(512, 500), (256, 500), (512, 50), (256, 50)]
    inputs = [c["input_bytes"] for c in here["kernels"][here["native_instruction_set"]]["convolution"]]
    rows = []
    for data in (here, *elsewhere):
        for isa, found in data["kernels"].items():
            shares = {
                (c["channels"], c["steps"]): c["share_of_exp_rate"]
                for c in found["scan"]
                if c["states"] == 16 and c["dtype"] == "float32"
            }
            copies = [c["none_share_of_memcpy"] for c in found["convolution"]] if data is here else []
            rows.append(
                [
                    f"{data['machine']['cpu']}, {isa}",
                    *(f"{shares[size]:.2f}" for size in sizes),
                    *(f"{share:.2f}" for share in copies),
                    *[""] * (len(inputs) - len(copies)),
                ]
            )
    header = [
        "processor, instruction set",
        *(f"scan {channels} x {steps}" for channels, steps in sizes),
        *(f"convolution, {size / 2**20:.2g} MiB" if size < 2**20 else f"{size / 2**20:.0f} MiB" for size in inputs),
    ]
    native = here["kernels"][here["native_instruction_set"]]
    length = [r for r in native["length"] if r["steps"] > 1]
    few = [r for r in native["few_channels"] if r["rate_factor"] == 1.0]
    worst = {
        f: max(isa[f]["most_units_in_the_last_place"] for isa in ulp["instruction_sets"].values())
        for f in ("exp", "softplus", "silu")
    }
    return (
        "The kernels beside the same core's limits, one thread, 16 states: the scan's share of the exp rate, and the "
        "speed of the convolution of width 4 over that of `memcpy` of its input (empty: measured before its last "
        f"change):\n\n{table(header, rows)}\n\n"
        f"Scan of 256 channels, µs per step at {' / '.join(format(r['steps'], ',') for r in length)} steps: "
        f"{' / '.join(format(r['one_thread_us_per_step'], '.2f') for r in length)} on one thread, "
        f"{' / '.join(format(r['two_thread_us_per_step'], '.2f') for r in length)} on two "
        "([picture](results/scan_linear.png)). Few channels are cut in time: "
        + ", ".join(f"{r['channels']} x {r['steps']:,} {r['two_threads_over_one']:.2f} x" for r in few)
        + " as fast on two threads. Over all 2^32 float32 values, on every instruction set: "
        + ", ".join(f"{name} within {error:.2f} ulp" for name, error in worst.items())
        + "."
    )


def graphs(data: dict[str, Any]) -> str:
    """The exported graphs beside what else there is."""
    rows, full = [], data["variants"]["full"]
    for name, v in data["variants"].items():
        before = f"{sum(v['nodes_before'].values())} → " if "nodes_before" in v else ""
        rows.append(
            [
                name,
                f"{v['median_ms']['hcmen']:.2f} ms",
                *(
                    f"{v[f'{peer}_over_ours']:.1f} x"
                    for peer in ("eager_reference", "eager_native", "torch_compile")
                    if f"{peer}_over_ours" in full
                ),
                f"{v['one_thread_ms'] / full['one_thread_ms']:.2f}",
                f"{v['floor_one_thread_ms'] / full['floor_one_thread_ms']:.2f}",
                f"{v['clips_per_s_by_batch']['32']:.0f}",
                f"{before}{sum(v['nodes'].values())}",
            ]
        )
    header = [
        "variant",
        f"hcmen, {data['threads']} threads",
        "eager on `selective_scan_ref`",
        "eager on our op",
        *(["`torch.compile`"] if "torch_compile_over_ours" in full else []),
        "share of full's time, 1 thread",
        "of its arithmetic",
        "clips/s, batches of 32",
        "nodes",
    ]
    top = ", ".join(f"{op} {100 * share:.0f} %" for op, share in list(full["profile"]["share"].items())[:5])
    growth = data["growth"]
    rates = {name: rate / 1e9 for name, rate in data["rates"].get("flop_per_s_by_library", {}).items()}
    libraries = (
        f" (On this processor PyTorch's matrix products reach {rates['torch']:.0f} GFLOP/s, ONNX Runtime's "
        f"{rates['onnxruntime']:.0f}: a part of what it gains.)"
        if rates and rates["onnxruntime"] > 1.2 * rates["torch"]
        else ""
    )
    return (
        "The exported graphs at MOSI's size (random weights, batch 1, full length), medians in one process "
        "taking turns, "
        "PyTorch with one thread or all, whichever is faster; how many times as long the others take:\n\n"
        f"{table(header, rows)}\n\n"
        f"One run of `full` on one thread takes {full['one_thread_ms']:.1f} ms; its arithmetic alone, at the "
        "rates of one "
        f"large matrix product and of a bare loop of exponentials, takes {full['floor_one_thread_ms']:.1f} ms."
        f"{libraries} "
        "Of its time: "
        f"{top}. Time per step on `audio_only` from {growth[0]['steps']} to {growth[-1]['steps']:,} steps: "
        f"{' / '.join(format(r['us_per_step'], '.1f') for r in growth)} µs.\n\n"
        "![Share of time and of arithmetic by variant; time against length](results/graph.png)"
    )


def reduced(data: dict[str, Any]) -> str:
    """What float16 and int8 bundles cost and gain."""

    def one(part: str, precision: str) -> str:
        full = data[part]["result"]["variants"]["full"]
        got, whole = full[precision], full["fp32"]
        return f"{100 * got['bytes'] / whole['bytes']:.0f} % of the bytes and {got['latency']:.2f} times the time"

    trained = data["trained"]["result"]["int8"]["variants"].values()
    slower = [v["latency"]["ratio"] for v in trained]
    moved = max(abs(v["metric"]["change"]) for v in trained)
    return (
        f"Bundles of fewer bits, `full`, processor time of one thread: int8 has {one('mosi', 'int8')} at MOSI's size, "
        f"{one('bert', 'int8')} with a BERT-base inside (random weights); fp16 {one('mosi', 'fp16')}, "
        f"{one('bert', 'fp16')}. "
        f"On the demo's small trained model int8 is slower ({min(slower):.2f} to {max(slower):.2f} times) and "
        "moves the "
        f"MAE by at most {100 * moved:.2f} % ([table](results/precision.md), [how](precision.md))."
    )


def long_life(soak: dict[str, Any], stream: dict[str, Any]) -> str:
    """Memory over many calls, and a stream's latency."""
    slope, mosi = soak["slopes"]["heap_bytes"], stream["presets"]["mosi"]
    busy = ", on a busy machine" if stream["machine"]["load_average_1min"] > 4 else ""
    return (
        f"{soak['calls']:,} calls of varying shapes from {soak['threads']} threads on {soak['models']} models "
        f"({soak['sessions']} sessions): resident memory rises by {soak['slopes']['resident_bytes']['rise']} "
        "bytes, heap "
        f"by {slope['per_call']:.2f} bytes per call ([picture](results/soak.png)). A stream of "
        f"{mosi['n']:,} windows of "
        f"{mosi['window_seconds']:.0f} s at MOSI's size{busy}: {mosi['counts']['late']} late, "
        "latency median "
        f"{mosi['latency_ms']['p50']:.0f} ms, of which the stream itself {mosi['overhead_ms']['p50']:.1f} ms."
    )


def arm(data: dict[str, Any], wheel: dict[str, Any]) -> str:
    """What ran under emulation, and the wheel."""
    test = data["steps"]["self-test"]
    return (
        "Under emulation of a Cortex-A53 (qemu), the aarch64 wheel "
        f"({data['steps']['wheel']['bytes'] / 1e6:.2f} MB) with "
        f"ONNX Runtime {test['installed']['onnxruntime']} passes the self-test of all {len(test['self_test'])} "
        "variants, "
        f"largest difference {max(test['self_test'].values()):.0e}; exp within "
        f"{data['steps']['ulp']['units_in_the_last_place']['exp']:.2f} ulp. The x86-64 wheel is "
        f"{wheel['wheel']['bytes'] / 1e6:.2f} MB and needs glibc alone."
    )


def instructions(data: dict[str, Any]) -> str:
    """Instructions counted under emulation."""
    parts = []
    for isa, lanes in data["lanes"].items():
        found = data["results"][isa]
        scan = found["scan"]["512 x 500 x 16 float32"]["per_exponential"]
        parts.append(f"{isa} ({lanes} lanes) {scan:.2f}, of which the exponential itself {found['exp_loop']:.2f}")
    return f"Instructions per exponential of a scan 512 x 500 x 16: {'; '.join(parts)}."


def bench(quiet: dict[str, Any], busy: dict[str, Any]) -> str:
    """How far a verdict of hcmen-bench can be believed."""

    def seen(noise: dict[str, Any]) -> str:
        share = noise["share_of_slowdowns_seen"]
        return " / ".join(f"{100 * share[s]:.0f}" for s in ("1.1", "1.2", "1.5"))

    return (
        f"`hcmen-bench --compare` on runs of one and the same bundle: {quiet['false_verdicts']} false verdicts of "
        f"{quiet['comparisons']} where nothing else ran, {busy['false_verdicts']} of {busy['comparisons']} on a busy "
        f"machine; it would have called {seen(quiet)} % and {seen(busy)} % of true slowdowns by 10 / 20 / 50 %. Beside "
        "eager PyTorch, `torch.compile` and ONNX Runtime without our library: "
        "[bench.json](results/bench.json), to be read with `hcmen-bench --show`."
    )


def cold_start(data: dict[str, Any]) -> str:
    """Process start to score."""
    rows = [
        [r["process"], f"{r['seconds_median']:.2f} s", f"{r['peak_resident_mib_median']:.0f} MiB", str(r["n"])]
        for r in data["rows"]
    ]
    text = "From process start to the score of one clip, demo bundle, fresh processes taking turns:\n\n" + table(
        ["process", "median", "peak resident", "n"], rows
    )
    detail = data["step_by_step"]
    steps = ", ".join(f"{name} {ms:.0f} ms" for name, ms in detail["demo"]["steps_ms"].items())
    memory = detail["mosi"]["proportional_mib"]
    return (
        f"{text}\n\nStep by step: {steps}. One session at MOSI's size costs {memory['one session more']:.0f} "
        "MiB beyond "
        f"NumPy and onnxruntime, sessions of all seven variants {memory['sessions of all variants more']:.0f} MiB, "
        f"{memory['all over one']:.2f} times as much (proportional set size)."
    )


def training(data: dict[str, Any]) -> str:
    """The demo's test split."""
    accuracy = "acc2_non0"
    rows = [
        [
            name,
            *(f"{scores[m]['mae']:.2f}" for m in ("hcmen", "linear", "floor")),
            *(f"{100 * scores[m][accuracy]:.0f} %" for m in ("hcmen", "linear", "floor")),
        ]
        for name, scores in data["test"].items()
    ]
    header = ["variant", "MAE", "linear", "floor", "Acc-2", "linear", "floor"]
    return (
        f"The demo's model on the {data['dataset']['samples']['test']} test samples of its synthetic set; *linear* is "
        "ridge regression on mean frames, trained per variant, *floor* the mean training label (MAE) or the commonest "
        f"class (Acc-2, negative against positive):\n\n{table(header, rows)}"
    )


def runtimes(data: dict[str, Any]) -> str:
    """The ONNX Runtime versions that one library and one set of files ran in."""
    worst = {
        way: max(c[way]["max_error_of_largest"] for r in data["runtimes"] for c in r["cases"] if "float32" in c["name"])
        for way in ("kernel", "function")
    }
    versions = ", ".join(r["onnxruntime"] for r in data["runtimes"])
    return (
        f"One binary and one file per case ran in ONNX Runtime {versions}: largest float32 error {worst['kernel']:.1e} "
        f"of the largest output with the library, {worst['function']:.1e} without it."
    )


def speed(data: dict[str, Any]) -> str:
    """What an epoch costs, and where it goes."""
    share, beside = data["shares"]["share"], data["beside_reference"]
    measured = data["epoch"]["measured_s"]
    epoch = f"{measured:.0f} s" if measured else f"about {data['epoch']['estimated_s']:.0f} s (from the median step)"
    return (
        f"Training at the size of CMU-MOSI (preset `mosi`, {data['samples']['train']} samples, batches of "
        f"{data['batch']}, two views of each, {data['threads']} threads): {data['step']['median_s']:.2f} s per step, "
        f"{epoch} per epoch with its validation. Of a step {100 * share['scan']:.0f} % are the scan, "
        f"{100 * share['causal_convolution']:.0f} % its causal convolution, "
        f"{100 * share['cnn_block_convolution']:.0f} % the CNN blocks' convolutions, {100 * share['data']:.1f} % data. "
        f"The same step on `selective_scan_ref` takes "
        f"{beside['times_reference']:.1f} x as long (batches of {beside['batch']})."
    )


def text_encoder(data: dict[str, Any]) -> str:
    """A BERT of true size inside the model."""
    variants = data["variants"]
    worst = max(v["parity_max_abs"] for v in variants.values())
    return (
        "With a text encoder of BERT-base's size inside (random weights, MOSI preset): "
        f"{data['weights_bytes'] / 1e6:.0f} MB of weights, once for {len(variants)} graphs, all within {worst:.1e} of "
        f"eager; a full-length clip takes {variants['full']['median_ms']:.0f} ms on `full`, "
        f"{variants['text_missing']['median_ms']:.1f} ms on `text_missing`, {data['threads']} threads."
    )


def peer(data: dict[str, Any]) -> str:
    """LNLN beside HCMEN."""
    first, found = data["settings"]["seeds"][0], {}
    for model in ("hcmen", "lnln"):
        own = [r for r in data["runs"] if r["model"] == model]
        best = min((r for r in own if r["seed"] == first), key=lambda r: r["validation_mae"])
        same = [r for r in own if (r["learning_rate"], r["input"]) == (best["learning_rate"], best["input"])]
        curves = [r["test"]["mae"] for r in same]
        means = [statistics.fmean(curve) for curve in curves]
        spread = f" ± {statistics.stdev(means):.3f}" if len(means) > 1 else ""
        found[model] = (
            f"{statistics.fmean(means):.3f}{spread} over the ten rates, "
            f"{statistics.fmean(c[0] for c in curves):.2f} with nothing dropped, "
            f"{statistics.fmean(c[-1] for c in curves):.2f} with 0.9 dropped, n = {len(curves)}"
        )
    return (
        "Steps dropped at r = 0.0 to 0.9, the same holes for both, one synthetic set, the same small text encoder: "
        f"test MAE of HCMEN {found['hcmen']}; of LNLN {found['lnln']} ([table](results/peer_lnln.md), "
        "[how](protocols.md#beside-a-peer)).\n\n"
        "![MAE against the share of dropped steps](results/peer_lnln.png)"
    )


def machines(names: list[str]) -> str:
    """On which processor each result was measured, with the versions of the newest of each."""
    groups: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for name in names:
        data = result(name)
        m = data["machine"] if "machine" in data else data["mosi"]["machine"]  # precision.json has one for each part
        isa = f", {m['kernels_isa']} kernels" if "kernels_isa" in m else ""
        groups.setdefault(m["cpu"] + isa, []).append((name, m))
    lines = []
    for cpu, own in groups.items():
        m = max((m for _, m in own if "compiler" in m), key=lambda m: m["date"])
        versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
        lines.append(
            f"- {cpu}, {m['logical_cores']} cores (shared), {m['compiler']}, {versions}, {m['date']}: "
            f"{', '.join(name for name, _ in own)}"
        )
    return "\n".join(lines)


def cuda(scans: dict[str, Any], whole: dict[str, Any]) -> str:
    """The CUDA scan beside mamba_ssm's, and the whole model, on a GPU."""
    rows = []
    for direction, dtype in (("forward", "float32"), ("forward", "float16"), ("backward", "float32")):
        ratios = gains(scans, direction, dtype)
        below = f"{sum(r < 1 for r in ratios)} of {len(ratios)}"
        rows.append([f"{direction}, {dtype}", f"{min(ratios):.2f} to {max(ratios):.2f}", below])
    versions = whole["machine"]["versions"]
    took = whole["whole_model"]["milliseconds"]
    return (
        f"The CUDA scan on {scans['device']['name']}, device time beside the kernel of mamba_ssm "
        f"{scans['mamba_ssm'].split(',')[0]}, 16 states with softplus and gate; batches of 1 to 256, 512 and 2,048 "
        f"channels, 50 to 4,096 steps ([how](cuda.md)):\n\n"
        f"{table(['direction, type', 'times as fast', 'sizes below 1.0'], rows)}\n\n"
        f"The whole model of MOSI's sizes, from host to host on ONNX Runtime: one clip takes "
        f"{took['plain']['batch 1']:.1f} ms, 32 take {took['plain']['batch 32']:.1f} ms; with `--cuda-graph` "
        f"{took['cuda graph']['batch 1']:.1f} and {took['cuda graph']['batch 32']:.1f} ms.\n\n"
        f"The tests of the GPU passed there with PyTorch {versions['torch']} and onnxruntime-gpu "
        f"{versions['onnxruntime-gpu']} ([gpu.json](results/gpu.json))."
    )


def gains(scans: dict[str, Any], direction: str, dtype: str) -> list[float]:
    """How many times as fast as mamba_ssm's kernel ours is, for each size."""
    own = [c for c in scans["cases"] if (c["direction"], c["dtype"]) == (direction, dtype)]
    return [c["times_faster_than_mamba_ssm"] for c in own if c.get("times_faster_than_mamba_ssm")]


def engines(data: dict[str, Any]) -> str:
    """Both bodies of the functions as TensorRT-RTX builds them."""
    rows = []
    for sizes, graph, precision, profiles in (
        ("node", "SelectiveScan", "fp32", "batches"),
        ("node", "CausalConv1d", "fp32", "batches"),
        ("mosi", "full", "fp32", "both"),
        ("mosi", "full", "fp16", "both"),
    ):
        name = f"one {graph}, batch of 32" if sizes == "node" else f"{graph} of MOSI's sizes, {precision}, a clip / 32"
        row = [name]
        for body in ("scan", "blocks"):
            case = {"sizes": sizes, "graph": graph, "precision": precision, "profiles": profiles, "body": body}
            (built,) = (b for b in data["builds"] if {**case, "target": None}.items() <= b.items())
            done = "launches" in built
            row.append(" / ".join(f"{n:,}" for n in built["launches"]) if done else "does not build")
            row.append(" / ".join(f"{n / 1e6:,.0f}" for n in built["activation_bytes"]) if done else "")
        rows.append(row)
    header = ["graph", "`scan`: launches", "activations, MB", "`blocks`: launches", "activations, MB"]
    return (
        f"What the builder of {data['builder']['name']} {data['builder']['version']} makes of the model-local "
        "functions in either [body](op.md#the-model-local-functions), counted in its list of layers for a run at full "
        "length. "
        "Nothing was executed or timed ([sizes of engines](tensorrt.md#tensorrt-rtx-engines-built-anywhere)):\n\n"
        f"{table(header, rows)}"
    )


def dual(data: dict[str, Any]) -> str:
    """Mamba-2's operator beside what else runs it in ONNX Runtime."""
    rows = []
    for size in data["sizes"]:
        peer = min(size[name]["least_ms"] for name in size if name.startswith("linear attention"))
        steps = "a step, with states" if size["time"] == 1 else f"{size['time']} steps"
        groups = "1 group" if size["group"] == 1 else f"{size['group']} groups"
        rows.append(
            [
                f"{size['head']} heads of {size['head_dim']}, {size['state']} states, {groups}, {steps}",
                *(f"{ms:.3g}" for ms in (size["kernel"]["least_ms"], peer, size["function, scan"]["least_ms"])),
                f"{size['faster_than_linear_attention']['by_least']:.1f}",
                f"{size['faster_than_linear_attention']['by_median_of_pairs']:.1f}",
                f"{size['faster_than_scan_by_least']:.1f}",
            ]
        )
    header = ["size", "ours", "`LinearAttention`", "`Scan`", "times `LinearAttention`", "by pairs", "times `Scan`"]
    return (
        f"`StateSpaceDual` beside `com.microsoft::LinearAttention` of ONNX Runtime {data['onnxruntime']}, which runs "
        f"the same recurrence, and beside our function's `Scan`. One thread of an {data['cpu']} "
        f"({data['instruction_set']}), float32, in turns: the least of many rounds in milliseconds of processor time, "
        f"and the median of the ratios of pairs.\n\n{table(header, rows)}"
    )


def results() -> str:
    """The page docs/results.md."""
    scans, cold = result("scan_cpu"), result("cold_start")
    parts = {
        "The selective scan on a CPU": [scan(scans), kernels(scans, [result("scan_cpu_xeon")], result("ulp"))],
        "The state space dual on a CPU": [dual(result("state_space_dual"))],
        "Other people's Mamba models": ["A table by model is in [mamba.md](mamba.md#models)."],
        "The selective scan on a GPU": [cuda(result("scan_cuda"), result("gpu"))],
        "The exported graphs": [graphs(result("graph")), cold_start(cold), reduced(result("precision"))],
        "Memory and streams": [long_life(result("soak"), result("stream"))],
        "Runtimes and processors": [
            runtimes(result("ort_matrix")),
            f"{arm(result('arm_qemu'), result('wheel'))} {instructions(result('instruction_counts'))}",
        ],
        "Engines without plugins": [engines(result("tensorrt_rtx"))],
        "How far a comparison is to be believed": [bench(result("bench_noise"), result("bench_noise_busy"))],
        "What the model learns": [
            "On real texts, and on MOSI with three modalities: [real_data.md](real_data.md).",
            training(result("demo_training")),
            peer(result("peer_lnln")),
            "What sample mixing, and each part of the model, is worth on the synthetic set, over seeds and "
            "training-set sizes: [mixing](results/mixing_study.md), [ablations](results/ablation_study.md).",
        ],
        "What training costs": [speed(result("training_speed")), text_encoder(result("text_encoder"))],
        "Machines": [
            machines(
                [
                    *("scan_cpu", "graph", "cold_start", "soak", "stream", "bench", "bench_noise", "wheel"),
                    *("instruction_counts", "scan_cpu_xeon", "ulp", "precision", "demo_training", "peer_lnln"),
                    *("training_speed", "text_encoder", "tensorrt_rtx", "real_texts", "real_mosi", "demo_words"),
                ]
            ),
        ],
    }
    head = (
        "# Results\n\n<!-- written by benchmarks/readme.py: do not edit -->\n\n"
        "The files in [results/](results) hold every figure and the command that made it. Times are medians."
    )
    return "\n\n".join([head, *(f"## {title}\n\n" + "\n\n".join(own) for title, own in parts.items())]) + "\n"


def short(processor: str) -> str:
    return processor.replace("(R)", "").removesuffix(" Processor")


def summary() -> str:
    """Seven sentences for the README, each with its machine."""
    scans, graph, cold, cuda_scans = result("scan_cpu"), result("graph"), result("cold_start"), result("scan_cuda")
    case = next(c for c in scans["cases"] if (c["channels"], c["steps"], c["states"]) == (512, 500, 16))
    took = {r["method"]: r["median_ms"] for r in case["runs"] if r["threads"] == 1}
    full = graph["variants"]["full"]
    start = {r["process"]: r for r in cold["rows"]}
    ours, eager = start["hcmen-run"], start["eager PyTorch"]
    ratios = gains(cuda_scans, "forward", "float32")
    matrix, zoo = result("ort_matrix"), result("mamba_zoo")
    versions = [r["onnxruntime"] for r in matrix["runtimes"]]
    trained = result("demo_training")
    test = trained["test"]["full"]
    lines = [
        f"The scan of 512 channels and 500 steps takes {took['native']:.2f} ms on an {scans['machine']['cpu']} thread, "
        f"{took['onnx_scan'] / took['native']:.0f} times as fast as ONNX's own `Scan`.",
        f"The exported model of MOSI's size scores a clip in {full['median_ms']['hcmen']:.1f} ms on an "
        f"{graph['machine']['cpu']}, {full['eager_native_over_ours']:.1f} times as fast as eager PyTorch.",
        f"`hcmen-run` scores its first clip within {ours['seconds_median']:.2f} s and "
        f"{ours['peak_resident_mib_median']:.0f} MiB on an {cold['machine']['cpu']}, eager PyTorch within "
        f"{eager['seconds_median']:.1f} s and {eager['peak_resident_mib_median']:.0f} MiB.",
        f"The float32 CUDA scan is {min(ratios):.1f} to {max(ratios):.1f} times as fast as mamba_ssm's kernel on an "
        f"{cuda_scans['device']['name']}, over {len(ratios)} sizes.",
        f"Graphs of {zoo['summary']['done']} public Mamba families run {zoo['summary']['median_times_scan']:.1f} times "
        f"as fast with our kernels as by `Scan` on an {short(zoo['machine']['cpu'])}, in the median.",
        f"One library and one file per case ran in ONNX Runtime {versions[0]} to {versions[-1]} on an "
        f"{short(matrix['machine']['processor'])}, {len(versions)} versions in "
        "all.",
        f"The demo's model, trained on an {trained['machine']['cpu']}, has a mean absolute error of "
        f"{test['hcmen']['mae']:.2f} on its synthetic test set, linear regression {test['linear']['mae']:.2f}.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def score() -> str:
    """What the clip of the samples gets by the demo's model, which the README shows as a picture too."""
    full = next(row["score"] for row in result("demo")["rows"] if row["variant"] == "full")
    return f"With the demo's model the clip gets {full:.2f} of -3 (negative) to 3 (positive)."


def words_demo() -> str:
    """What `make demo-words` reaches."""
    found = result("demo_words")
    samples, test = found["dataset"]["samples"], found["test"]["text_only"]
    own, linear, floor = (
        f"MAE {test[row]['mae']:.3f}, Corr {test[row]['corr']:.3f}, Acc-2 {100 * test[row]['acc2_non0']:.1f} %"
        for row in ("hcmen", "linear", "floor")
    )
    sentences = "\n".join(f"| {score:+.2f} | {text} |" for text, score in found["scores"].items())
    return (
        f"On {samples['test']:,} texts held out, labels from -4 to 4, one seed: {own}. Ridge on tf-idf has {linear}, "
        f"the floor {floor}. All of it took {found['seconds'] / 60:.1f} minutes on an {found['machine']['cpu']}, "
        f"{found['machine']['logical_cores']} cores, with its {samples['train']:,} training texts.\n\n"
        f"| score | sentence |\n| ---: | --- |\n{sentences}"
    )


PARTS = {
    "README.md": {"score": score, "figures": summary},
    "docs/text.md": {"demo": words_demo},
    "docs/op.md": {"dual": lambda: dual(result("state_space_dual"))},
    "docs/mamba.md": {"models": lambda: zoo_table.tables(result("mamba_zoo"))},
    "docs/real_data.md": {
        "texts": lambda: real_tables.tables(result("real_texts")["sets"]),
        "modalities": lambda: real_tables.tables(result("real_mosi")["sets"]),
        "presets": lambda: real_tables.presets(result("real_mosi")["sets"]["features"]),
    },
}


def written() -> dict[Path, str]:
    """What docs/results.md and the pages with parts of figures have to hold."""
    pages = {ROOT / "docs" / "results.md": results()}
    for name, parts in PARTS.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        for part, content in parts.items():
            begin, end = f"<!-- {part}: written by benchmarks/readme.py -->", f"<!-- end of {part} -->"
            before, _, rest = text.partition(begin)
            text = f"{before}{begin}\n\n{content()}\n\n{end}{rest.partition(end)[2]}"
        pages[ROOT / name] = text
    return pages


def main() -> None:
    """Rewrites the pages, or checks them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 if one of them is stale")
    arguments = parser.parse_args()
    stale = {p: text for p, text in written().items() if not p.exists() or p.read_text(encoding="utf-8") != text}
    if arguments.check and stale:
        names = " and ".join(str(path.relative_to(ROOT)) for path in stale)
        sys.exit(f"not as docs/results is, which they quote: {names}: run python benchmarks/readme.py")
    for path, text in stale.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
