"""How fast the CUDA scan is, beside mamba_ssm's kernel, the device's copy bandwidth and an empty launch.

    python benchmarks/scan_cuda.py --out docs/results/scan_cuda.json
    python benchmarks/scan_cuda.py --tune             which way of sharing out is best for each size

Medians of CUDA events, float32 and float16 with softplus, delta_bias, D and z. Every call takes the next of several
sets of random inputs, as many as make more than twice the device's L2 cache, so that inputs come from memory. Ways are
timed in turns, round after round, in one process. For each case:

    ours           hcmen_cuda_selective_scan_forward through ctypes, output and workspace made before
    ours_graph     the same, recorded in a CUDA graph and replayed
    torch_op       hcmen.mamba.scan.selective_scan without gradients
    mamba_ssm      mamba_ssm's selective_scan_cuda.fwd on its own layout, channels before time, if it is installed
    copy           torch's copy of as many bytes as the scan must move
    nothing        an empty kernel through the same library

`over_nothing` compares a scan with an empty kernel, both many times in one CUDA graph, which the host does not slow.
`floor_us` is bytes moved over the bandwidth of a large copy; `of_copy` is floor over time. Run it where nothing else
uses the device. From a checkout, without installing, `python tests/gpu/run.py --prepare` builds the library and prints
the environment to run this in.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import describe
from torch import Tensor

from hcmen.base.cuda_library import CudaLaunch, CudaPlan, call, load_cuda_library, workspace_bytes
from hcmen.base.errors import HcmenError
from hcmen.base.library import ScanArguments
from hcmen.mamba.scan import implementation, selective_scan

STATE = 16
BATCHES, CHANNELS, TIMES = (1, 16, 256), (512, 2048), (50, 500, 4096)
WARMUP, AGREEMENT = 5, 3e-5
# Longest time of one way on one case.
SECONDS = 1.0


def sets_of(size: int, cache_bytes: int) -> int:
    """How many sets of `size` bytes are taken in turns; one that is far beyond the cache leaves nothing of itself."""
    return 1 if size >= 4 * cache_bytes else max(2, min(64, -(-2 * cache_bytes // size)))


class Case:
    """Several sets of inputs of one size, and what the scan over one of them must move."""

    def __init__(self, batch: int, channel: int, time: int, dtype: torch.dtype, cache_bytes: int):
        self.sizes = {"batch": batch, "channel": channel, "time": time, "state": STATE}
        self.dtype = dtype
        element = 2 if dtype == torch.float16 else 4
        # u, delta, z in, y out; B and C; A, D and delta_bias.
        self.bytes = element * (4 * batch * time * channel + 2 * batch * time * STATE) + 4 * channel * (STATE + 2)
        self.sets = sets_of(self.bytes, cache_bytes)
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.float32).to(dtype)

        self.inputs = [
            {
                "u": normal(batch, time, channel),
                "delta": normal(batch, time, channel) - 4,
                "A": -torch.arange(1.0, STATE + 1.0, device="cuda").repeat(channel, 1),
                "B": normal(batch, time, 1, STATE),
                "C": normal(batch, time, 1, STATE),
                "D": normal(channel).float(),
                "delta_bias": 0.1 * normal(channel).float(),
                "z": normal(batch, time, channel),
            }
            for _ in range(self.sets)
        ]
        self.y = torch.empty(batch, time, channel, device="cuda", dtype=dtype)


Call = Callable[[int], Any]
"""Queues the work on set number i."""


def ours(case: Case, **wish: int) -> tuple[Call, CudaPlan]:
    library = load_cuda_library()
    scans = [
        ScanArguments(
            **case.sizes,
            group=1,
            dtype=int(case.dtype == torch.float16),
            delta_softplus=1,
            y=case.y.data_ptr(),
            **{name: x.data_ptr() for name, x in inputs.items()},
        )
        for inputs in case.inputs
    ]
    launch = CudaLaunch(**wish)
    size = workspace_bytes(library, "selective_scan", scans[0], launch, 0)
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda") if size else None
    plan = CudaPlan()
    call(library, "selective_scan_plan", scans[0], launch, plan)

    def run(i: int) -> None:
        launch.stream = torch.cuda.current_stream().cuda_stream
        launch.workspace, launch.workspace_bytes = None if workspace is None else workspace.data_ptr(), size
        call(library, "selective_scan_forward", scans[i], launch)

    return run, plan


def in_graphs(run: Call, sets: int) -> Call:
    """`run` on each set, recorded and replayed."""
    graphs = []
    for i in range(sets):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(i)
        graphs.append(graph)
    return lambda i: graphs[i].replay()


def torch_op(case: Case) -> Call:
    def run(i: int) -> Tensor:
        with torch.no_grad(), implementation("native"):
            return selective_scan(**case.inputs[i], delta_softplus=True)  # type: ignore[return-value]

    return run


def mamba_ssm(case: Case) -> Call | None:
    """Its CUDA kernel alone, without the Python around it, on dense tensors in the layout it wants."""
    try:
        import selective_scan_cuda
    except ImportError:
        return None
    sets = []
    for x in case.inputs:
        u, delta, z = (x[k].transpose(1, 2).contiguous() for k in ("u", "delta", "z"))
        B, C = (x[k].permute(0, 2, 3, 1).contiguous() for k in ("B", "C"))
        sets.append((u, delta, x["A"], B, C, x["D"], z, x["delta_bias"], True))
    return lambda i: selective_scan_cuda.fwd(*sets[i])


def copy(size: int, cache_bytes: int) -> Call:
    """Copies size / 2 bytes, so that as many are moved as `size` says."""
    count = max(1, size // 8)
    sets = sets_of(size, cache_bytes)
    pairs = [(torch.empty(count, device="cuda"), torch.empty(count, device="cuda")) for _ in range(sets)]
    return lambda i: pairs[i % sets][0].copy_(pairs[i % sets][1])


def nothing() -> Call:
    library, launch = load_cuda_library(), CudaLaunch()

    def run(i: int) -> None:
        launch.stream = torch.cuda.current_stream().cuda_stream
        library.hcmen_cuda_nothing(ctypes.byref(launch))

    return run


def measure(ways: dict[str, Call], sets: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median, least and number of times in microseconds of each way, in turns. One event pair around each call."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        for i in range(WARMUP):
            run(i % sets)
    torch.cuda.synchronize()
    for i in range(rounds):
        events = {}
        for name, run in ways.items():
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            run(i % sets)
            after.record()
            events[name] = (before, after)
        torch.cuda.synchronize()
        for name, (before, after) in events.items():
            times[name].append(1e3 * before.elapsed_time(after))
    return {n: {"median_us": statistics.median(t), "least_us": min(t), "runs": len(t)} for n, t in times.items()}


def back_to_back(run: Call, sets: int, calls: int = 200) -> float:
    """Microseconds of a call among many, without waiting between them: what a launch costs in a stream."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    for i in range(calls):
        run(i % sets)
    after.record()
    torch.cuda.synchronize()
    return 1e3 * before.elapsed_time(after) / calls


def within_a_graph(run: Call, sets: int, calls: int = 50) -> float:
    """Microseconds of a call among many in one CUDA graph: the device's own share, without the host's."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            run(i % sets)
    return min(back_to_back(lambda i: graph.replay(), 1, 5) for _ in range(5)) / calls


def check(case: Case, run: Call, other: Call | None) -> None:
    """Ours, the custom op and mamba_ssm's kernel agree before anything is timed."""
    want = torch_op(case)(0)
    run(0)
    scale = float(want.float().abs().max())
    bound = 5e-3 if case.dtype == torch.float16 else AGREEMENT
    found = {"ours": case.y}
    if other is not None:
        result = other(0)
        found["mamba_ssm"] = result[-1].transpose(1, 2)  # out, x, out_z
    for name, y in found.items():
        off = float((y.float() - want.float()).abs().max()) / scale
        if not off <= bound:
            raise SystemExit(
                f"{name} is off by {off:.1e} of the largest value, expected {bound:.0e} or less: {case.sizes}"
            )


def rounds_of(case: Case, rounds: int) -> int:
    """Fewer where a call takes long: at 1 TB/s."""
    return max(11, min(rounds, int(SECONDS / (1e-5 + case.bytes / 1e12))))


def run_case(case: Case, bandwidth: float, cache_bytes: int, rounds: int) -> dict[str, Any]:
    run, plan = ours(case)
    other = mamba_ssm(case)
    check(case, run, other)
    ways: dict[str, Call] = {
        "ours": run,
        "ours_graph": in_graphs(run, case.sets),
        "torch_op": torch_op(case),
        "nothing": nothing(),
        # Beyond, memory would run out, and a copy's rate changes no more.
        **({"copy": copy(case.bytes, cache_bytes)} if case.bytes <= 8 << 30 else {}),
        **({} if other is None else {"mamba_ssm": other}),
    }
    times = measure(ways, case.sets, rounds_of(case, rounds))
    stream = {name: round(back_to_back(ways[name], case.sets), 3) for name in ("ours", "ours_graph", "nothing")}
    graph = {name: round(within_a_graph(ways[name], case.sets), 3) for name in ("ours", "nothing")}
    floor = 1e6 * case.bytes / bandwidth
    median = times["ours"]["median_us"]
    result = {
        **case.sizes,
        "dtype": str(case.dtype).removeprefix("torch."),
        "sets": case.sets,
        "bytes_moved": case.bytes,
        "floor_us": round(floor, 3),
        "times": {n: {k: round(v, 3) for k, v in t.items()} for n, t in times.items()},
        "back_to_back_us": stream,
        "within_a_graph_us": graph,
        "plan": {name: getattr(plan, name) for name, _ in CudaPlan._fields_},
        "of_copy": round(floor / median, 3),
        "over_nothing": round(graph["ours"] / graph["nothing"], 3),
    }
    if other is not None:
        result["times_faster_than_mamba_ssm"] = round(times["mamba_ssm"]["median_us"] / median, 3)
    return result


def tune(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Every way of sharing out that a size allows, best first."""
    ways: dict[str, Call] = {}
    plans: dict[str, CudaPlan] = {}
    chunks = [-1, *(c for c in (128, 256, 512, 1024) if 2 * c <= case.sizes["time"])]
    for lanes, warps, chunk in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16), chunks):
        wish = {"lanes_per_channel": lanes, "time_warps": warps, "steps_per_chunk": chunk}
        run, plan = ours(case, **wish)
        if plan.time_warps != warps:
            continue
        name = f"lanes {lanes}, time warps {warps}, chunk {chunk}"
        ways[name], plans[name] = run, plan
    ways["the rule"], plans["the rule"] = ours(case)
    times = measure(ways, case.sets, max(11, rounds // 8))
    ranked = sorted(times, key=lambda n: times[n]["median_us"])
    return [{"way": n, "median_us": round(times[n]["median_us"], 3), "blocks": plans[n].blocks} for n in ranked]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=201)
    parser.add_argument("--quick", action="store_true", help="a few cases, to see that it runs")
    parser.add_argument("--tune", action="store_true", help="time every way of sharing out instead")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("PyTorch sees no CUDA device: nothing was measured", file=sys.stderr)
        return 3
    try:
        load_cuda_library()
    except HcmenError as error:
        print(error, file=sys.stderr)
        return 3
    properties = torch.cuda.get_device_properties(0)
    cache = int(getattr(properties, "L2_cache_size", 64 << 20))
    large = 4 << 30
    big = copy(large, cache)
    copied = measure({"copy": big}, 2, 21)["copy"]["median_us"]
    bandwidth = large / (copied * 1e-6)
    print(f"{properties.name}, L2 {cache >> 20} MiB, copies at {bandwidth / 1e12:.2f} TB/s")
    del big
    sizes = list(itertools.product(BATCHES, CHANNELS, TIMES))
    if options.quick:
        sizes = [(1, 512, 50), (16, 512, 500)]
    results = []
    for dtype, (batch, channel, time) in itertools.product((torch.float32, torch.float16), sizes):
        torch.cuda.empty_cache()
        case = Case(batch, channel, time, dtype, cache)
        if options.tune:
            ranked = tune(case, options.rounds)
            results.append({**case.sizes, "dtype": str(dtype).removeprefix("torch."), "ranked": ranked})
            rule = next(r for r in ranked if r["way"] == "the rule")
            print(
                f"{batch:>4} x {time:>4} x {channel:>4}: {ranked[0]} against {rule['median_us']} us by the rule",
                flush=True,
            )
            continue
        result = run_case(case, bandwidth, cache, options.rounds)
        results.append(result)
        line = (
            f"{batch:>4} x {time:>4} x {channel:>4} {result['dtype']}: {result['times']['ours']['median_us']:9.1f} us, "
        )
        line += f"{result['of_copy']:.2f} of copying, {result['over_nothing']:.2f} of an empty kernel within a graph"
        if "times_faster_than_mamba_ssm" in result:
            line += f", {result['times_faster_than_mamba_ssm']:.2f} x mamba_ssm"
        print(line, flush=True)
    if options.out:
        device = {"name": properties.name, "multiprocessors": properties.multi_processor_count, "l2_bytes": cache}
        data = {
            "machine": describe(),
            "device": {**device, "copy_bytes_per_second": round(bandwidth)},
            "mamba_ssm": any("mamba_ssm" in r.get("times", {}) for r in results),
            "tuned" if options.tune else "cases": results,
        }
        options.out.write_text(json.dumps(data, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
