"""How fast the selective scan is, beside everything else that could compute it on this machine.

    python benchmarks/scan.py --out docs/results/scan_cpu.json

All methods run in one process on the same float32 data (batch 1, with softplus, bias, D and z), in interleaved rounds:
a load that comes and goes falls on all of them alike. Reported are medians with the number of runs. The methods:

    native        our kernels through the C interface
    torch_op      the same through hcmen.mamba.scan.selective_scan, without gradients
    ort_op        the same as an ONNX Runtime operator, a model of one node
    onnx_scan     the standard ONNX Scan in ONNX Runtime, written by hand as lean as we know how: the honest opponent
    onnx_function the model-local function our models carry, in ONNX Runtime without our library
    reference     selective_scan_ref, plain PyTorch
    mamba_ssm_ref mamba_ssm's function of that name, with --mamba-ssm FILE; it gets its own layout, channels before time
    exp           the exponentials alone, in registers, by the code the native scan uses: no scan can be faster

Then benchmarks/kernels.py, once for each instruction set that this machine has: shares of the machine's own limits,
also of the convolution; and on two threads long scans, few channels and little work. docs/results/scan_linear.png shows
the cost of a step over the number of steps.
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from kernels import keep_apart, plot_linear
from machine import describe
from onnx import ModelProto, TensorProto, helper, numpy_helper

from hcmen.base.library import ScanArguments, library_isa, library_path, load_library
from hcmen.mamba.one_node import scan_model
from hcmen.mamba.scan import implementation, selective_scan, selective_scan_ref

# channels, steps, states; the first is the one that targets are stated for.
CASES = [(512, 500, 16)] + [
    (channels, steps, states)
    for states in (16, 12)
    for channels in (256, 512)
    for steps in (50, 500)
    if (channels, steps, states) != (512, 500, 16)
]
THREADS = (1, 2)
INSTRUCTION_SETS = ("avx512", "avx2", "baseline")
RUNS_PER_ROUND = 3
# Worker threads of torch and ONNX Runtime spin for a while after their work, on the core the next method needs.
PAUSE_SECONDS = 0.01
AGREEMENT = 1e-5

Arrays = dict[str, np.ndarray]


def make_data(channels: int, steps: int, states: int) -> Arrays:
    """Step sizes of a trained model, softplus(N(-4, 1)), and decay rates 1 to 16."""
    generator = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape).astype(np.float32)

    return {
        "u": normal(1, steps, channels),
        "delta": normal(1, steps, channels) - np.float32(4),
        "A": -np.tile(np.arange(states, dtype=np.float32) % 16 + 1, (channels, 1)),
        "B": normal(1, steps, states),
        "C": normal(1, steps, states),
        "D": normal(channels),
        "delta_bias": np.float32(0.1) * normal(channels),
        "z": normal(1, steps, channels),
    }


def standard_scan_model(data: Arrays) -> ModelProto:
    """One ONNX Scan over time, exp inside its body, six nodes a step; parameters are initializers, batch is 1.

    Time stands first, so that Scan transposes nothing, and every operand of the body has its final shape already.
    """
    channels, states = data["A"].shape
    make = helper.make_node
    body = helper.make_graph(
        [
            make("Mul", ["d", "A"], ["rate"]),
            make("Exp", ["rate"], ["decay"]),
            make("Mul", ["decay", "h"], ["kept"]),
            make("Mul", ["du", "b"], ["added"]),
            make("Add", ["kept", "added"], ["h_next"]),
            make("MatMul", ["h_next", "c"], ["y"]),
        ],
        "step",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in {
                "h": [channels, states],
                "d": [channels, 1],
                "du": [channels, 1],
                "b": [1, states],
                "c": [states, 1],
            }.items()
        ],
        [
            helper.make_tensor_value_info("h_next", TensorProto.FLOAT, [channels, states]),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [channels, 1]),
        ],
    )
    constants = {
        "A": data["A"],
        "D": data["D"],
        "delta_bias": data["delta_bias"],
        "h_first": np.zeros((channels, states), np.float32),
        "column": np.array([-1, channels, 1]),
        "b_row": np.array([-1, 1, states]),
        "c_column": np.array([-1, states, 1]),
        "flat": np.array([1, -1, channels]),
    }
    nodes = [
        make("Add", ["delta", "delta_bias"], ["biased"]),
        make("Softplus", ["biased"], ["step"]),
        make("Mul", ["step", "u"], ["driven"]),
        make("Reshape", ["step", "column"], ["d_rows"]),
        make("Reshape", ["driven", "column"], ["du_rows"]),
        make("Reshape", ["B", "b_row"], ["b_rows"]),
        make("Reshape", ["C", "c_column"], ["c_rows"]),
        make(
            "Scan",
            ["h_first", "d_rows", "du_rows", "b_rows", "c_rows"],
            ["h_last", "y_rows"],
            body=body,
            num_scan_inputs=4,
        ),
        make("Reshape", ["y_rows", "flat"], ["y_scan"]),
        make("Mul", ["u", "D"], ["skip"]),
        make("Add", ["y_scan", "skip"], ["y_skip"]),
        make("Sigmoid", ["z"], ["gate"]),
        make("Mul", ["z", "gate"], ["silu"]),
        make("Mul", ["y_skip", "silu"], ["y"]),
    ]
    series = [1, None, channels]
    graph = helper.make_graph(
        nodes,
        "scan",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, None, states] if name in "BC" else series)
            for name in ("u", "delta", "B", "C", "z")
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, series)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def session(model: ModelProto, threads: int, *, library: bool = False) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if library:
        options.register_custom_ops_library(str(library_path()))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def mamba_ssm_reference(source: Path) -> Callable[..., torch.Tensor]:
    """`selective_scan_ref` of a mamba_ssm checkout; the file as a whole needs CUDA extensions to be imported."""
    import einops

    tree = ast.parse(source.read_text())
    tree.body = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "selective_scan_ref"]
    names = {"torch": torch, "F": torch.nn.functional, "rearrange": einops.rearrange, "repeat": einops.repeat}
    exec(compile(tree, str(source), "exec"), names)
    return names["selective_scan_ref"]  # type: ignore[return-value]


def methods(data: Arrays, mamba_ssm: Path | None = None) -> dict[tuple[str, int], Callable[[], Any]]:
    """(name, threads) -> a call that returns y, all ready to run."""
    channels, states = data["A"].shape
    tensors = {name: torch.from_numpy(x) for name, x in data.items()}
    library = load_library()
    y = np.empty_like(data["u"])
    pointers = {name: x.ctypes.data for name, x in data.items()}
    arguments = ScanArguments(
        batch=1,
        time=data["u"].shape[1],
        channel=channels,
        state=states,
        group=1,
        delta_softplus=1,
        y=y.ctypes.data,
        **pointers,
    )
    one_node = scan_model(channels, states, delta_softplus=True, gated=True)
    hand_written = standard_scan_model(data)

    def native(threads: int) -> np.ndarray:
        status = library.hcmen_selective_scan_forward(ctypes.byref(arguments), threads)
        assert status == 0
        return y

    def torch_op() -> np.ndarray:
        with torch.inference_mode(), implementation("native"):
            result = selective_scan(**tensors, delta_softplus=True)
        assert isinstance(result, torch.Tensor)
        return result.numpy()

    def reference() -> np.ndarray:
        with torch.inference_mode():
            result = selective_scan_ref(**tensors, delta_softplus=True)
        assert isinstance(result, torch.Tensor)
        return result.numpy()

    def run(model: ModelProto, threads: int, *, library: bool) -> Callable[[], Any]:
        made = session(model, threads, library=library)
        feeds = {i.name: data[i.name] for i in made.get_inputs()}
        return lambda: made.run(None, feeds)[0]

    calls: dict[tuple[str, int], Callable[[], Any]] = {}
    for threads in THREADS:
        calls["native", threads] = lambda threads=threads: native(threads)
        calls["torch_op", threads] = torch_op
        calls["ort_op", threads] = run(one_node, threads, library=True)
        calls["onnx_scan", threads] = run(hand_written, threads, library=False)
        calls["onnx_function", threads] = run(one_node, threads, library=False)
        calls["reference", threads] = reference
    if mamba_ssm is not None:
        function = mamba_ssm_reference(mamba_ssm)
        theirs = {k: x.transpose(1, 2).contiguous() if x.dim() == 3 else x for k, x in tensors.items()}

        def peer() -> np.ndarray:
            with torch.inference_mode():
                return function(**theirs, delta_softplus=True).transpose(1, 2).numpy()

        calls["mamba_ssm_ref", 1] = peer
    return calls


def check(calls: dict[tuple[str, int], Callable[[], Any]]) -> None:
    """All methods must compute the same thing, or their times mean nothing."""
    want = np.array(calls["reference", 1](), np.float64)
    bound = AGREEMENT * np.abs(want).max()
    for (name, threads), call in calls.items():
        error = float(np.abs(np.asarray(call(), np.float64) - want).max())
        if not error <= bound:
            sys.exit(f"{name} at {threads} threads is off by {error:.3g}, expected at most {bound:.3g}: not timed")


def measure(case: tuple[int, int, int], seconds: float, rounds: int, mamba_ssm: Path | None) -> dict[str, Any]:
    """Medians of one case; at least three rounds, then until `rounds` are done or `seconds` have gone."""
    channels, steps, states = case
    calls = methods(make_data(channels, steps, states), mamba_ssm)
    check(calls)
    library = load_library()
    elements = channels * steps * states
    times: dict[tuple[str, int], list[float]] = {key: [] for key in (*calls, ("exp", 1))}
    per_round = library.hcmen_exp_loop(1)
    exp_rounds = max(1, elements // per_round)
    exp_elements = exp_rounds * per_round
    calls["exp", 1] = lambda: library.hcmen_exp_loop(exp_rounds)
    start = time.perf_counter()
    for index in range(rounds):
        if index >= 3 and time.perf_counter() - start > seconds:
            break
        for (name, threads), call in calls.items():
            torch.set_num_threads(threads)
            keep_apart()
            time.sleep(PAUSE_SECONDS)
            for _ in range(2):
                call()  # the caches and threads of this method
            for _ in range(RUNS_PER_ROUND):
                before = time.perf_counter()
                call()
                times[name, threads].append(time.perf_counter() - before)

    def milliseconds(name: str, threads: int) -> float:
        return 1e3 * statistics.median(times[name, threads])

    exp_rate = exp_elements / statistics.median(times["exp", 1])
    rate = elements / statistics.median(times["native", 1])
    return {
        "channels": channels,
        "steps": steps,
        "states": states,
        "runs": [
            {
                "method": name,
                "threads": threads,
                "median_ms": milliseconds(name, threads),
                "least_ms": 1e3 * min(values),
                "n": len(values),
            }
            for (name, threads), values in times.items()
        ],
        "native_elements_per_second": rate,
        "exp_elements_per_second": exp_rate,
        "share_of_exp_rate": elements / min(times["native", 1]) * min(times["exp", 1]) / exp_elements,
        "times_onnx_scan": milliseconds("onnx_scan", 1) / milliseconds("native", 1),
        "times_reference": milliseconds("reference", 1) / milliseconds("native", 1),
        **({"times_mamba_ssm_ref": milliseconds("mamba_ssm_ref", 1) / milliseconds("native", 1)} if mamba_ssm else {}),
        "two_threads_over_one": milliseconds("native", 1) / milliseconds("native", 2),
    }


def of_instruction_set(isa: str, rounds: int, threads: bool) -> dict[str, Any] | None:
    """What benchmarks/kernels.py measures with `isa`, or None where this machine lacks it."""
    command = [sys.executable, str(Path(__file__).parent / "kernels.py"), "--rounds", str(rounds)]
    done = subprocess.run(
        [*command, *(["--threads"] if threads else [])],
        env={**os.environ, "HCMEN_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0 and "cannot run" in done.stderr:
        return None
    if done.returncode != 0:
        sys.exit(f"benchmarks/kernels.py failed with {isa}:\n{done.stderr}")
    return json.loads(done.stdout)


def report_kernels(result: dict[str, Any]) -> str:
    lines = [f"{result['instruction_set']} kernels, one thread"]
    lines += [
        f"  scan {r['channels']} x {r['steps']} x {r['states']} {r['dtype']}: {r['median_ms']:.4f} ms, "
        f"{r['share_of_exp_rate']:.2f} of the exp rate"
        for r in result["scan"]
    ]
    lines += [
        f"  convolution {r['channels']} x {r['steps']}: {r['none_share_of_memcpy']:.2f} of memcpy, "
        f"{r['none_share_of_loop']:.2f} of a copying loop; with silu {r['silu_share_of_silu_loop']:.2f} of silu alone"
        for r in result["convolution"]
    ]
    lines += [
        f"  {r['steps']} steps: {r['one_thread_us_per_step']:.3f} us each, 2 threads {r['two_thread_us_per_step']:.3f}"
        for r in result.get("length", [])
    ]
    lines += [
        f"  {r['channels']} x {r['steps']}, rates x {r['rate_factor']}: 2 threads {r['two_threads_over_one']:.2f} x 1"
        for r in result.get("few_channels", [])
    ]
    lines += [
        f"  {r['channels']} x {r['steps']}, {r['way']}, {'after a rest' if r['after_rest'] else 'in a row'}: "
        f"2 threads {r['two_threads_over_one']:.2f} times 1"
        for r in result.get("little_work", [])
    ]
    return "\n".join(lines)


def report(result: dict[str, Any]) -> str:
    medians = {(r["method"], r["threads"]): r for r in result["runs"]}
    names = list(dict.fromkeys(r["method"] for r in result["runs"]))
    lines = [f"{result['channels']} channels, {result['steps']} steps, {result['states']} states"]
    for name in names:
        cells = [medians.get((name, threads)) for threads in THREADS]
        text = "".join(f"  {c['median_ms']:9.3f} ms (n {c['n']})" if c else "" for c in cells)
        lines.append(f"  {name:14}{text}")
    lines.append(
        f"  native is {result['times_onnx_scan']:.1f} x the standard Scan and {result['times_reference']:.1f} x "
        f"the reference at 1 thread, {result['share_of_exp_rate']:.2f} of the exp rate; "
        f"2 threads are {result['two_threads_over_one']:.2f} times 1"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each case")
    parser.add_argument("--rounds", type=int, default=51, help=f"most rounds of {RUNS_PER_ROUND} runs for each case")
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first so many cases")
    parser.add_argument("--kernel-rounds", type=int, default=31, help="rounds of benchmarks/kernels.py")
    parser.add_argument(
        "--mamba-ssm", type=Path, help="mamba_ssm/ops/selective_scan_interface.py of a checkout, to time it too"
    )
    options = parser.parse_args()
    found = [of_instruction_set(isa, options.kernel_rounds, isa == library_isa()) for isa in INSTRUCTION_SETS]
    kernels = {result["instruction_set"]: result for result in found if result is not None}
    for result in kernels.values():
        print(report_kernels(result), flush=True)
    results = []
    for case in CASES[: options.cases]:
        results.append(measure(case, options.seconds, options.rounds, options.mamba_ssm))
        print(report(results[-1]), flush=True)
    if options.out:
        document = {
            "schema_version": 1,
            "machine": describe(),
            "native_instruction_set": library_isa(),
            "batch": 1,
            "dtype": "float32",
            "cases": results,
            "kernels": kernels,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(document, indent=1) + "\n")
        plot_linear(kernels[library_isa()]["length"], options.out.parent / "scan_linear.png", library_isa())


if __name__ == "__main__":
    main()
