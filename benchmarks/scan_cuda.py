"""How fast the CUDA scan is, beside mamba_ssm's kernel, the device's copy bandwidth and an empty launch.

    python3 benchmarks/scan_cuda.py --out docs/results/scan_cuda.json
    python3 benchmarks/scan_cuda.py --backward --dtype float32
    python3 benchmarks/scan_cuda.py --tune --batch 1,16      every way of sharing out beside the rule's
    python3 benchmarks/scan_cuda.py --ways "lanes=2 channel_warps=2;chunk=64"    and these alone beside the rule's

Softplus, delta_bias, D and z, 16 states. For each case:

    ours           hcmen_cuda_selective_scan_forward (or _backward), output and workspace made before
    mamba_ssm      mamba_ssm's selective_scan_cuda on its own layout, channels before time, if it imports
    copy           an elementwise kernel of torch that moves as many bytes as the forward scan must
    nothing        an empty kernel through the same library

Times are the device's own: many calls are recorded in one CUDA graph, which is replayed behind a spinning kernel, so
that neither Python nor the driver is in them. Every call takes the next of several sets of random inputs, which
together exceed the device's L2 cache twice where memory allows. Ways are timed in turns, round after round; the median
is reported. `host_us` is what a call costs the host, in a stream that never waits.

`floor_us` is bytes moved over the bandwidth of a large copy; `of_copy` is floor over time. Run it where nothing else
uses the device. The result is written after every case, so that a run cut short loses nothing. From a checkout, without
installing, `python3 tests/gpu/run.py --prepare` builds the library and prints the environment to run this in.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import statistics
import sys
import time as clock
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import describe
from torch import Tensor

from hcmen.base.cuda_library import CudaLaunch, CudaPlan, call, load_cuda_library, workspace_bytes
from hcmen.base.errors import HcmenError
from hcmen.base.library import ScanArguments, ScanGradients
from hcmen.mamba.reference import selective_scan_ref

STATE = 16
BATCHES, CHANNELS, TIMES = (1, 16, 256), (512, 2048), (50, 500, 4096)
DTYPES = {"float32": torch.float32, "float16": torch.float16}
AGREEMENT = {"float32": 3e-5, "float16": 5e-3}
# Device time of one graph of calls, and of all rounds of one case.
GRAPH_US, CASE_US = 20_000.0, 400_000.0
MOST_CALLS, LEAST_ROUNDS, MOST_ROUNDS = 64, 3, 31
# A case whose reference would take longer than this many elements is held to mamba_ssm's kernel alone.
MOST_CHECKED = 1 << 24


def sets_of(size: int, cache_bytes: int) -> int:
    """How many sets of `size` bytes are taken in turns; one that is far beyond the cache leaves nothing of itself."""
    return 1 if size >= 4 * cache_bytes else max(2, min(MOST_CALLS, -(-2 * cache_bytes // size)))


class Case:
    """Several sets of inputs of one size, and what the scan over one of them must move."""

    def __init__(self, batch: int, channel: int, time: int, dtype: str, cache_bytes: int):
        self.sizes = {"batch": batch, "channel": channel, "time": time, "state": STATE}
        self.dtype, self.name = DTYPES[dtype], dtype
        element = self.dtype.itemsize
        # u, delta, z in, y out; B and C; A, D and delta_bias.
        self.bytes = element * (4 * batch * time * channel + 2 * batch * time * STATE) + 4 * channel * (STATE + 2)
        self.sets = sets_of(self.bytes, cache_bytes)
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cuda", dtype=self.dtype)

        self.inputs = [
            {
                "u": normal(batch, time, channel),
                "delta": normal(batch, time, channel).sub_(4),
                "A": -torch.arange(1.0, STATE + 1.0, device="cuda").repeat(channel, 1),
                "B": normal(batch, time, 1, STATE),
                "C": normal(batch, time, 1, STATE),
                "D": normal(channel).float(),
                "delta_bias": 0.1 * normal(channel).float(),
                "z": normal(batch, time, channel),
            }
            for _ in range(self.sets)
        ]
        self.y = torch.empty(batch, time, channel, device="cuda", dtype=self.dtype)


Call = Callable[[int], Any]
"""Queues the work on set number i."""


def _scans(case: Case) -> list[ScanArguments]:
    return [
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


def ours(case: Case, **wish: int) -> tuple[Call, CudaPlan]:
    library, scans = load_cuda_library(), _scans(case)
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


def ours_backward(case: Case, dy: Tensor, **wish: int) -> tuple[Call, dict[str, Tensor]]:
    """Every gradient, in float32 as the kernel gives them, and where they lie."""
    library, scans = load_cuda_library(), _scans(case)
    inputs = case.inputs[0]
    got = {f"d{name}": torch.empty(x.shape, dtype=torch.float32, device="cuda") for name, x in inputs.items()}
    grad = ScanGradients(dy=dy.data_ptr(), **{name: x.data_ptr() for name, x in got.items()})
    launch = CudaLaunch(**wish)
    size = workspace_bytes(library, "selective_scan", scans[0], launch, 1)
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
    launch.workspace, launch.workspace_bytes = workspace.data_ptr(), size

    def run(i: int) -> None:
        launch.stream = torch.cuda.current_stream().cuda_stream
        assert workspace.data_ptr()  # kept alive by this closure
        call(library, "selective_scan_backward", scans[i], grad, launch)

    return run, got


def _their_inputs(x: dict[str, Tensor]) -> tuple[Any, ...]:
    """Dense tensors in the layout that mamba_ssm's kernel wants."""
    u, delta, z = (x[k].transpose(1, 2).contiguous() for k in ("u", "delta", "z"))
    B, C = (x[k].permute(0, 2, 3, 1).contiguous() for k in ("B", "C"))
    return u, delta, x["A"], B, C, x["D"], z, x["delta_bias"]


def mamba_ssm(case: Case) -> Call | None:
    """Its CUDA kernel alone, without the Python around it."""
    try:
        import selective_scan_cuda
    except ImportError:
        return None
    sets = [_their_inputs(x) for x in case.inputs]
    return lambda i: selective_scan_cuda.fwd(*sets[i], True)


def mamba_ssm_backward(case: Case, dy: Tensor) -> Call | None:
    """Its backward kernel alone, given what its forward kernel kept."""
    try:
        import selective_scan_cuda
    except ImportError:
        return None
    theirs_dy = dy.transpose(1, 2).contiguous()
    sets = []
    for x in case.inputs:
        theirs = _their_inputs(x)
        out, kept, *_ = selective_scan_cuda.fwd(*theirs, True)
        sets.append((*theirs, theirs_dy, kept, out, None, True, False))
    return lambda i: selective_scan_cuda.bwd(*sets[i])


def copy(size: int, cache_bytes: int) -> Call:
    """Reads and writes size / 2 bytes each, so that as many are moved as `size` says.

    A kernel and not `copy_`: in a graph that becomes a node for the copy engines, which reach two thirds of a kernel's
    rate on an H200.
    """
    count = max(1, size // 8)
    sets = sets_of(size, cache_bytes)
    pairs = [(torch.empty(count, device="cuda"), torch.empty(count, device="cuda")) for _ in range(sets)]
    return lambda i: torch.neg(pairs[i % sets][1], out=pairs[i % sets][0])


def nothing() -> Call:
    library, launch = load_cuda_library(), CudaLaunch()

    def run(i: int) -> None:
        launch.stream = torch.cuda.current_stream().cuda_stream
        library.hcmen_cuda_nothing(ctypes.byref(launch))

    return run


def _once_us(run: Call, sets: int) -> float:
    """A rough time of one call, the host's share included where the device is faster."""
    run(0)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    for i in range(3):
        run(i % sets)
    after.record()
    torch.cuda.synchronize()
    return 1e3 * before.elapsed_time(after) / 3


def host_us(run: Call, sets: int, calls: int = 100) -> float:
    """What a call costs the host: microseconds of a call among many that are queued behind a spinning kernel."""
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)
    started = clock.perf_counter_ns()
    for i in range(calls):
        run(i % sets)
    taken = clock.perf_counter_ns() - started
    torch.cuda.synchronize()
    return taken / 1e3 / calls


def measure(ways: dict[str, Call], sets: int, case_us: float = CASE_US) -> dict[str, dict[str, Any]]:
    """Device time of each way in microseconds: median, least and number of replays. A way that fails says why."""
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    result: dict[str, dict[str, Any]] = {}
    total = 0.0
    for name, run in ways.items():
        try:
            once = _once_us(run, sets)
            calls = max(1, min(MOST_CALLS, max(min(sets, 8), int(GRAPH_US / once))))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for i in range(calls):
                    run(i % sets)
            graph.replay()
            torch.cuda.synchronize()
        except (RuntimeError, HcmenError) as error:  # memory, most of all
            result[name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            torch.cuda.empty_cache()
            continue
        graphs[name] = graph, calls
        total += min(once, 1e5) * calls
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(case_us / max(total, 1.0))))
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, (graph, calls) in graphs.items():
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(100_000)  # the device is busy while the host queues what is timed
            before.record()
            graph.replay()
            after.record()
            torch.cuda.synchronize()
            times[name].append(1e3 * before.elapsed_time(after) / calls)
    for name, t in times.items():
        result[name] = {"median_us": round(statistics.median(t), 3), "least_us": round(min(t), 3), "runs": len(t)}
    return result


def _off(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).abs().max()) / float(want.float().abs().max())


def disagreement(case: Case, run: Call, other: Call | None) -> dict[str, float]:
    """How far ours and mamba_ssm's outputs are from the reference in float64, of its largest value; the reference is
    left out where it would not fit, and then ours is held to mamba_ssm's."""
    run(0)
    theirs = None if other is None else other(0)[-1].transpose(1, 2)  # out, x, out_z
    if case.y.numel() > MOST_CHECKED:
        return {} if theirs is None else {"ours_to_mamba_ssm": _off(case.y, theirs)}
    inputs = {name: x.double() for name, x in case.inputs[0].items()}
    want = selective_scan_ref(**inputs, delta_softplus=True)
    assert isinstance(want, Tensor)
    found = {"ours": _off(case.y, want)}
    if theirs is not None:
        found["mamba_ssm"] = _off(theirs, want)
    return found


def run_case(case: Case, bandwidth: float, cache_bytes: int, backward: bool) -> dict[str, Any]:
    result: dict[str, Any] = {**case.sizes, "dtype": case.name, "direction": "backward" if backward else "forward"}
    result |= {"sets": case.sets, "bytes_moved": case.bytes}
    if backward:
        dy = torch.randn_like(case.y)
        run, got = ours_backward(case, dy)
        ways: dict[str, Call] = {"ours": run}
        try:
            other = mamba_ssm_backward(case, dy)
            if other is not None:
                run(0)
                gradients = other(0)
                off = {"du": _off(got["du"], gradients[0].transpose(1, 2)), "dA": _off(got["dA"], gradients[2])}
                result["disagreement"] = {f"{k}_to_mamba_ssm": float(f"{v:.2e}") for k, v in off.items()}
                ways["mamba_ssm"] = other
                del gradients
        except torch.cuda.OutOfMemoryError:
            result["mamba_ssm"] = "out of memory"
            other = None
            torch.cuda.empty_cache()
    else:
        run, plan = ours(case)
        try:
            other = mamba_ssm(case)
            off = disagreement(case, run, other)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            other, off = None, {}
            result["mamba_ssm"] = "out of memory"
        result["disagreement"] = {k: float(f"{v:.2e}") for k, v in off.items()}
        result["agrees"] = all(v <= AGREEMENT[case.name] for v in off.values())
        result["plan"] = {name: getattr(plan, name) for name, _ in CudaPlan._fields_}
        ways = {"ours": run, "nothing": nothing()}
        if case.bytes <= 8 << 30:  # beyond, a copy's rate changes no more
            ways["copy"] = copy(case.bytes, cache_bytes)
        if other is not None:
            ways["mamba_ssm"] = other
    result["times"] = times = measure(ways, case.sets)
    if "median_us" not in times["ours"]:
        return result
    median = times["ours"]["median_us"]
    if not backward:
        result["host_us"] = {n: round(host_us(ways[n], case.sets), 2) for n in ("ours", "mamba_ssm") if n in ways}
        result["floor_us"] = round(1e6 * case.bytes / bandwidth, 3)
        result["of_copy"] = round(result["floor_us"] / median, 3)
        result["over_nothing"] = round(median / times["nothing"]["median_us"], 3)
    if "median_us" in times.get("mamba_ssm", {}):
        result["times_faster_than_mamba_ssm"] = round(times["mamba_ssm"]["median_us"] / median, 3)
    return result


# Short names of what hcmen_cuda_launch may wish.
WISHES = {
    "lanes": "lanes_per_channel",
    "time_warps": "time_warps",
    "chunk": "steps_per_chunk",
    "channel_warps": "channel_warps",
    "steps": "steps_per_warp",
}
RULE = "the rule"


def every_way(time: int) -> list[dict[str, int]]:
    """Of lanes, warps in time and chunks, what a sequence of `time` steps allows."""
    whole = [
        {"lanes": n, "chunk": -1, "time_warps": w} for n in (1, 2, 4) for w in (1, 4, 8, 13, 16) if 4 * w < time + 4
    ]
    chunks = [c for c in (16, 32, 64, 128, 256, 512) if 2 * c <= time]
    return whole + [{"lanes": n, "chunk": c, "time_warps": 1} for n in (1, 2, 4) for c in chunks]


def timed(case: Case, ways: Sequence[dict[str, int]]) -> list[dict[str, Any]]:
    """Every way that has a plan of its own, and the rule's, best first. Each way is timed beside the rule."""
    found: dict[str, tuple[Call, CudaPlan]] = {RULE: ours(case)}
    kept = {bytes(found[RULE][1])}
    for way in ways:
        run, plan = ours(case, **{WISHES[name]: value for name, value in way.items()})
        if bytes(plan) not in kept:
            kept.add(bytes(plan))
            found[" ".join(f"{name}={value}" for name, value in way.items())] = run, plan
    times = measure({name: run for name, (run, _) in found.items()}, case.sets, case_us=2 * CASE_US)
    ranked = sorted(times, key=lambda n: times[n].get("median_us", float("inf")))
    return [
        {"way": n, **times[n], "plan": {field: getattr(found[n][1], field) for field, _ in CudaPlan._fields_}}
        for n in ranked
    ]


def tune_backward(case: Case) -> list[dict[str, Any]]:
    """Lengths of chunks, best first."""
    dy = torch.randn(case.y.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    chunks = [c for c in (8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024) if c < case.sizes["time"]]
    runs = {RULE: ours_backward(case, dy)[0]}
    runs |= {f"chunk={c}": ours_backward(case, dy, steps_per_chunk=c)[0] for c in (-1, *chunks)}
    times = measure(runs, case.sets, case_us=2 * CASE_US)
    return [{"way": n, **times[n]} for n in sorted(times, key=lambda n: times[n].get("median_us", float("inf")))]


def tune(case: Case, ways: Sequence[dict[str, int]] | None = None) -> list[dict[str, Any]]:
    """Ways of sharing out, best first: `ways`, or every one, and then other shapes of blocks around the best."""
    if ways is not None:
        return timed(case, ways)
    ranked = timed(case, every_way(case.sizes["time"]))
    best = {short: ranked[0]["plan"][long] for short, long in WISHES.items()}
    if best["time_warps"] > 1:
        return ranked
    shapes = [{**best, "channel_warps": w, "steps": k} for w, k in itertools.product((1, 2, 4), (4, 8, 16, 32))]
    names = {r["way"] for r in ranked}
    ranked += [r for r in timed(case, shapes) if r["way"] not in names]
    return sorted(ranked, key=lambda r: r.get("median_us", float("inf")))


def _ways(text: str) -> list[dict[str, int]]:
    return [{name: int(value) for name, value in (part.split("=") for part in way.split())} for way in text.split(";")]


def _choices(text: str, among: Sequence[Any]) -> list[Any]:
    """A list with commas, of numbers or of the names that `among` holds."""
    return [type(among[0])(part) for part in text.split(",")]


def _line(result: dict[str, Any]) -> str:
    sizes = f"{result['batch']:>4} x {result['channel']:>4} x {result['time']:>4} {result['dtype']}"
    times = result.get("times", {})
    if "median_us" not in times.get("ours", {}):
        return f"{sizes}: {result.get('failed') or times}"
    line = f"{sizes} {result['direction']}: {times['ours']['median_us']:9.1f} us"
    if "of_copy" in result:
        line += f", {result['of_copy']:.2f} of copying, {result['over_nothing']:.1f} x an empty kernel"
    if "times_faster_than_mamba_ssm" in result:
        line += f", {result['times_faster_than_mamba_ssm']:.2f} x mamba_ssm"
    return line + ("" if result.get("agrees", True) else f", OFF {result['disagreement']}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--batch", default=",".join(map(str, BATCHES)))
    parser.add_argument("--channel", default=",".join(map(str, CHANNELS)))
    parser.add_argument("--time", default=",".join(map(str, TIMES)))
    parser.add_argument("--dtype", default=",".join(DTYPES), help="float32, float16, or both with a comma")
    parser.add_argument("--seconds", type=float, help="start no case after that many")
    parser.add_argument("--quick", action="store_true", help="two sizes, to see that it runs")
    parser.add_argument("--backward", action="store_true", help="time the gradients instead")
    parser.add_argument("--tune", action="store_true", help="time every way of sharing out instead")
    parser.add_argument(
        "--ways", type=_ways, help=f"time these instead: of {', '.join(WISHES)}, as in lanes=2 chunk=64"
    )
    options = parser.parse_args(arguments)
    dtypes = options.dtype.split(",")
    if not set(dtypes) <= set(DTYPES):
        parser.error(f"--dtype is '{options.dtype}', expected names among {', '.join(DTYPES)}")
    started = clock.monotonic()
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
    bandwidth = large / (measure({"copy": copy(large, cache)}, 2)["copy"]["median_us"] * 1e-6)
    print(f"{properties.name}, L2 {cache >> 20} MiB, copies at {bandwidth / 1e12:.2f} TB/s", flush=True)
    sizes = list(
        itertools.product(
            _choices(options.batch, BATCHES), _choices(options.channel, CHANNELS), _choices(options.time, TIMES)
        )
    )
    if options.quick:
        sizes = [(1, 512, 50), (16, 512, 500)]
    device = {"name": properties.name, "multiprocessors": properties.multi_processor_count, "l2_bytes": cache}
    data: dict[str, Any] = {
        "machine": describe(),
        "device": {**device, "copy_bytes_per_second": round(bandwidth)},
        "not_measured": [],
    }
    tuning = options.tune or options.ways is not None
    results = data["tuned" if tuning else "cases"] = []
    for dtype, (batch, channel, time) in itertools.product(dtypes, sizes):
        if options.seconds is not None and clock.monotonic() - started > options.seconds:
            data["not_measured"].append([dtype, batch, channel, time])
            continue
        gc.collect()
        torch.cuda.empty_cache()
        names = {"batch": batch, "channel": channel, "time": time, "state": STATE, "dtype": dtype}
        try:
            case = Case(batch, channel, time, dtype, cache)
            if tuning:
                ranked = tune_backward(case) if options.backward else tune(case, options.ways)
                result = {**names, "ranked": ranked}
                rule = next(r for r in ranked if r["way"] == RULE)
                print(f"{batch:>4} x {channel:>4} x {time:>4} {dtype}: rule {rule.get('median_us')} us; ", end="")
                shown = ranked if options.ways else ranked[:4]
                print("; ".join(f"{r['way']} {r.get('median_us')}" for r in shown), flush=True)
            else:
                result = run_case(case, bandwidth, cache, options.backward)
                print(_line(result), flush=True)
            del case
        except (RuntimeError, HcmenError) as error:
            result = {**names, "failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            print(_line(result), flush=True)
        results.append(result)
        if options.out:
            options.out.write_text(json.dumps(data, indent=1) + "\n")
    if data["not_measured"]:
        print(f"{len(data['not_measured'])} cases were not measured: {options.seconds:.0f} s were over")
    return 0 if all(r.get("agrees", True) and "failed" not in r for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
