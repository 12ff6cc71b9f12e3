"""What the kernels reach of the machine's own limits, for one instruction set; benchmarks/scan.py runs it for each.

    HCMEN_ISA=avx2 python benchmarks/kernels.py          # JSON on stdout

The ceilings are measured beside the kernels, in interleaved rounds of one process: the exponential of the scan in a
loop over registers, a copy of the convolution's input (`memcpy`, and a loop of load, flip the sign, store), and silu in
a loop over 256 KiB. Shares compare the least time of each: what else runs on the machine lengthens some rounds of one
and not of the other.

With two threads the calling one keeps to one core and all others to the rest: on a machine where other work runs, the
scheduler would put both on one.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hcmen.base.library import ConvArguments, ScanArguments, library_isa, load_library

__all__ = ["keep_apart", "main", "plot_linear"]

# channels, steps, states
SCANS = [(c, t, n) for n in (16, 12) for c in (256, 512) for t in (50, 500)]
# channels, steps: inputs of half a MiB, 1 MiB, 16 MiB and 117 MiB
CONVS = [(256, 500), (512, 500), (512, 8000), (512, 60000)]
LINEAR = (50, 500, 5_000, 50_000)
# Few channels over much time.
CUT = [(8, 50_000), (16, 50_000), (16, 20_000), (40, 50_000)]
SHORT = [(64, 25), (64, 50), (128, 50), (256, 50), (512, 50)]
REST_SECONDS = 0.002
CORES = sorted(os.sched_getaffinity(0))

Call = Callable[[], Any]
Rounds = dict[str, list[float]]


def keep_apart() -> None:
    """The calling thread on one core, all other threads of the process on the others."""
    if len(CORES) < 2:
        return
    own = int(os.readlink("/proc/thread-self").rpartition("/")[2])
    for thread in map(int, os.listdir("/proc/self/task")):
        os.sched_setaffinity(thread, {CORES[0]} if thread == own else set(CORES[1:]))


def interleave(
    calls: Mapping[str, Call],
    rounds: int,
    before: Call = lambda: None,
    least: float = 1e-3,
    clock: Callable[[], float] = time.perf_counter,
) -> Rounds:
    """Seconds of one call of each by `clock`, round by round; brief calls are repeated for `least` seconds."""
    times: Rounds = {name: [] for name in calls}
    repeats = {}
    for name, call in calls.items():
        call()
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, int(least / max(1e-7, time.perf_counter() - start)))
    for _ in range(rounds):
        for name, call in calls.items():
            before()
            start = clock()
            for _ in range(repeats[name]):
                call()
            times[name].append((clock() - start) / repeats[name])
    return times


def summary(values: list[float]) -> dict[str, float]:
    return {"median_ms": 1e3 * statistics.median(values), "least_ms": 1e3 * min(values), "n": len(values)}


def quotient(times: Rounds, above: str, below: str) -> float:
    return min(times[above]) / min(times[below])


def scan_call(
    channels: int, steps: int, states: int, dtype: str = "float32", slow: float = 1.0
) -> Callable[[int], None]:
    """A scan with everything on, batch 1, as a function of the number of threads. slow: factor of the decay rates."""
    generator = np.random.default_rng(0)
    library = load_library()

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape).astype(dtype)

    series = (1, steps, channels)
    arrays = {
        "u": normal(*series),
        "delta": normal(*series) - np.asarray(4, dtype),
        "A": -slow * np.tile(np.arange(states, dtype=np.float32) % 16 + 1, (channels, 1)).astype(np.float32),
        "B": normal(1, steps, states),
        "C": normal(1, steps, states),
        "D": np.ones(channels, np.float32),
        "delta_bias": np.zeros(channels, np.float32),
        "z": normal(*series),
        "y": normal(*series),
    }
    arrays["A"] = np.ascontiguousarray(arrays["A"], np.float32)
    arguments = ScanArguments(
        batch=1,
        time=steps,
        channel=channels,
        state=states,
        group=1,
        delta_softplus=1,
        dtype=int(dtype == "float16"),
        **{name: x.ctypes.data for name, x in arrays.items()},
    )

    def call(threads: int, keep: Any = arrays) -> None:
        if library.hcmen_selective_scan_forward(ctypes.byref(arguments), threads) != 0:
            raise RuntimeError("the scan failed")

    return call


def scans(rounds: int) -> list[dict[str, Any]]:
    """The scan on one thread, beside its exponentials alone."""
    library = load_library()
    per_round = library.hcmen_exp_loop(1)
    results = []
    for dtype in ("float32", "float16"):
        for channels, steps, states in SCANS:
            elements = channels * steps * states
            loops = max(1, elements // per_round)
            scan = scan_call(channels, steps, states, dtype)
            times = interleave(
                {"scan": lambda scan=scan: scan(1), "exp": lambda loops=loops: library.hcmen_exp_loop(loops)}, rounds
            )
            share = quotient(times, "exp", "scan") * elements / (loops * per_round)
            exp_rate = loops * per_round / statistics.median(times["exp"])
            results.append(
                {
                    "channels": channels,
                    "steps": steps,
                    "states": states,
                    "dtype": dtype,
                    **summary(times["scan"]),
                    "exp_elements_per_second": exp_rate,
                    "share_of_exp_rate": share,
                }
            )
    return results


def convolution(channels: int, steps: int, rounds: int) -> dict[str, Any]:
    """The convolution of width 4 on one thread, beside copies of its input and silu alone."""
    library = load_library()
    count = channels * steps
    room = [np.zeros(count + 16, np.float32) for _ in range(2)]
    x, y = (r[(-r.ctypes.data // 4) % 16 :][:count] for r in room)  # on a line of memory, as tensors are
    x[:] = np.random.default_rng(0).standard_normal(count)
    weight, bias = np.full((channels, 4), 0.3, np.float32), np.zeros(channels, np.float32)
    small = min(count, 65536)
    from_, to = x.ctypes.data, y.ctypes.data

    def conv(silu: int) -> Call:
        arguments = ConvArguments(
            batch=1,
            time=steps,
            channel=channels,
            width=4,
            silu=silu,
            x=from_,
            weight=weight.ctypes.data,
            bias=bias.ctypes.data,
            y=to,
        )
        return lambda: library.hcmen_causal_conv1d_forward(ctypes.byref(arguments), 1)

    times = interleave(
        {
            "none": conv(0),
            "silu": conv(1),
            "memcpy": lambda: ctypes.memmove(to, from_, 4 * count),
            "loop": lambda: np.negative(x, out=y),
            "silu_loop": lambda: library.hcmen_evaluate(2, from_, to, small),
        },
        min(rounds, 9) if count > 10_000_000 else rounds,
    )
    return {
        "channels": channels,
        "steps": steps,
        "width": 4,
        "dtype": "float32",
        "input_bytes": 4 * count,
        **{name: summary(times[name]) for name in ("none", "silu", "memcpy", "loop")},
        "copied_bytes_per_second": 8 * count / statistics.median(times["memcpy"]),
        "none_share_of_memcpy": quotient(times, "memcpy", "none"),
        "none_share_of_loop": quotient(times, "loop", "none"),
        "silu_share_of_memcpy": quotient(times, "memcpy", "silu"),
        "silu_share_of_silu_loop": quotient(times, "silu_loop", "silu") * count / small,
    }


def linear(rounds: int) -> list[dict[str, Any]]:
    """Time over steps, 256 channels with 16 states; and what a scan costs before its first step."""
    results = []
    for steps in (1, *LINEAR):
        scan = scan_call(256, steps, 16)
        times = interleave({"one": lambda scan=scan: scan(1), "two": lambda scan=scan: scan(2)}, rounds, keep_apart)
        results.append(
            {
                "steps": steps,
                **{f"{name}_thread_us_per_step": 1e6 * statistics.median(v) / steps for name, v in times.items()},
                "n": len(times["one"]),
            }
        )
    return results


def cuts(rounds: int) -> list[dict[str, Any]]:
    """Two threads on few channels. Rates of 1 to 16, and of a 100 000th of that: a state that is never forgotten."""
    results = []
    for channels, steps in CUT:
        for slow in (1.0, 1e-5):
            scan = scan_call(channels, steps, 16, slow=slow)
            times = interleave({"one": lambda scan=scan: scan(1), "two": lambda scan=scan: scan(2)}, rounds, keep_apart)
            results.append(
                {
                    "channels": channels,
                    "steps": steps,
                    "states": 16,
                    "rate_factor": slow,
                    "two_threads_over_one": quotient(times, "one", "two"),
                    "one_thread": summary(times["one"]),
                    "two_threads": summary(times["two"]),
                }
            )
    return results


def shorts(rounds: int) -> list[dict[str, Any]]:
    """Two threads on little work: through the C interface's pool and ONNX Runtime's, in a row and after a rest."""
    import onnxruntime

    from hcmen.base.library import library_path
    from hcmen.mamba.one_node import scan_model

    results = []
    for channels, steps in SHORT:
        generator = np.random.default_rng(0)
        series, model = (1, steps, channels), scan_model(channels, 16, delta_softplus=True, gated=True)
        feeds = {
            **{n: generator.standard_normal(series).astype(np.float32) for n in ("u", "delta", "z")},
            **{n: generator.standard_normal((1, steps, 16)).astype(np.float32) for n in ("B", "C")},
            "A": -np.ones((channels, 16), np.float32),
            **{n: np.zeros(channels, np.float32) for n in ("D", "delta_bias")},
        }
        sessions = {}
        for threads in (1, 2):
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.register_custom_ops_library(str(library_path()))
            sessions[threads] = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        named = {n: feeds[n] for n in (i.name for i in sessions[1].get_inputs())}
        scan = scan_call(channels, steps, 16)
        ways: dict[str, Callable[[int], Any]] = {
            "c_interface": scan,
            "onnxruntime": lambda threads, s=sessions, f=named: s[threads].run(None, f),
        }
        for way, call in ways.items():
            for _ in range(3):  # the pool makes its workers at the second call of a row
                call(2)
            keep_apart()
            for rest in (False, True):
                times: Rounds = {"one": [], "two": []}
                for _ in range(3 * rounds):
                    for threads, name in ((1, "one"), (2, "two")):
                        if rest:
                            time.sleep(REST_SECONDS)
                        else:
                            call(threads)
                            call(threads)
                        start = time.perf_counter()
                        call(threads)
                        times[name].append(time.perf_counter() - start)
                results.append(
                    {
                        "channels": channels,
                        "steps": steps,
                        "states": 16,
                        "way": way,
                        "after_rest": rest,
                        "one_thread": summary(times["one"]),
                        "two_threads": summary(times["two"]),
                        "two_threads_over_one": statistics.median(times["one"]) / statistics.median(times["two"]),
                    }
                )
    return results


def plot_linear(rows: list[dict[str, Any]], path: Path, isa: str) -> None:
    """Microseconds per step over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in rows if r["steps"] > 1]
    figure, axes = pyplot.subplots(figsize=(5, 2.6), layout="constrained")
    for name, label in (("one", "1 thread"), ("two", "2 threads")):
        axes.plot([r["steps"] for r in rows], [r[f"{name}_thread_us_per_step"] for r in rows], "o-", label=label)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("steps")
    axes.set_ylabel("µs per step")
    axes.set_title(f"Selective scan, 256 channels x 16 states, {isa}", fontsize=9)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", action="store_true", help="also lengths, few channels and little work")
    options = parser.parse_args()
    document: dict[str, Any] = {
        "instruction_set": library_isa(),
        "scan": scans(options.rounds),
        "convolution": [convolution(channels, steps, options.rounds) for channels, steps in CONVS],
    }
    if options.threads:
        document |= {"length": linear(options.rounds), "few_channels": cuts(options.rounds)}
        document["little_work"] = shorts(options.rounds)
    json.dump(document, sys.stdout)


if __name__ == "__main__":
    main()
