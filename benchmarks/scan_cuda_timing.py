"""The cases and ways of scan_cuda.py, and how they are timed: the part that needs PyTorch.

A failure of one way is noted in its place and the others go on: `refused` by the library, `out_of_memory`, or `failed`.
Where the device answers no more, `Lost` ends everything.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import statistics
import time as clock
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from scan_cuda import STATE, WISHES
from torch import Tensor

from hcmen.base.cuda_library import CudaLaunch, CudaPlan, call, load_cuda_library, workspace_bytes
from hcmen.base.errors import InputError
from hcmen.base.library import ScanArguments, ScanGradients
from hcmen.mamba.reference import selective_scan_ref

DEVICE = "cuda"
DTYPES = {"float32": torch.float32, "float16": torch.float16}
AGREEMENT = {"float32": 3e-5, "float16": 5e-3}
# Device time of one graph of calls, and of all rounds of one case.
GRAPH_US, CASE_US = 20_000.0, 400_000.0
MOST_CALLS, LEAST_ROUNDS, MOST_ROUNDS = 64, 3, 31
# A case whose reference would take longer than this many elements is held to mamba_ssm's kernel alone.
MOST_CHECKED = 1 << 24
RULE = "the rule"

T = TypeVar("T")


class Lost(Exception):
    """The device answers no more, as after an access outside memory: every later call would fail."""


def recover(after: str = "") -> None:
    """Gives memory back after a failure, whose words go before those of `Lost`.

    Raises:
        Lost: the device fails still, when asked for the second time.
    """
    problem = ""
    for _ in range(2):
        try:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.zeros(1, device=DEVICE).add_(1).item()
            return
        except RuntimeError as error:
            problem = str(error).splitlines()[0]
    raise Lost(f"{after}the device answers no more: {problem}")


def why(error: Exception) -> dict[str, str]:
    """What a row says of a failure."""
    text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    if isinstance(error, InputError):
        return {"refused": text}
    return {"out_of_memory" if "out of memory" in text.lower() else "failed": text}


def tried(notes: dict[str, Any], name: str, make: Callable[[], T]) -> T | None:
    """What `make` gives, or None, and the reason under `name` in the notes.

    Raises:
        Lost: the device is lost by it.
    """
    try:
        return make()
    except Lost:
        raise
    except Exception as error:
        notes[name] = why(error)
    # Here, where the error no longer holds what was allocated.
    recover(f"{name}: {next(iter(notes[name].values()))}; then ")
    return None


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
        generator = torch.Generator(DEVICE).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=DEVICE, dtype=self.dtype)

        self.inputs = [
            {
                "u": normal(batch, time, channel),
                "delta": normal(batch, time, channel).sub_(4),
                "A": -torch.arange(1.0, STATE + 1.0, device=DEVICE).repeat(channel, 1),
                "B": normal(batch, time, 1, STATE),
                "C": normal(batch, time, 1, STATE),
                "D": normal(channel).float(),
                "delta_bias": 0.1 * normal(channel).float(),
                "z": normal(batch, time, channel),
            }
            for _ in range(self.sets)
        ]
        self.y = torch.empty(batch, time, channel, device=DEVICE, dtype=self.dtype)


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
    workspace = torch.empty(size, dtype=torch.uint8, device=DEVICE) if size else None
    plan = CudaPlan()
    call(library, "selective_scan_plan", scans[0], launch, plan)

    def run(i: int, kept: object = case) -> None:
        launch.stream = torch.cuda.current_stream().cuda_stream
        launch.workspace, launch.workspace_bytes = None if workspace is None else workspace.data_ptr(), size
        call(library, "selective_scan_forward", scans[i], launch)

    return run, plan


def ours_backward(case: Case, dy: Tensor, **wish: int) -> tuple[Call, dict[str, Tensor]]:
    """Every gradient, in float32 as the kernel gives them, and where they lie."""
    library, scans = load_cuda_library(), _scans(case)
    inputs = case.inputs[0]
    got = {f"d{name}": torch.empty(x.shape, dtype=torch.float32, device=DEVICE) for name, x in inputs.items()}
    grad = ScanGradients(dy=dy.data_ptr(), **{name: x.data_ptr() for name, x in got.items()})
    launch = CudaLaunch(**wish)
    size = workspace_bytes(library, "selective_scan", scans[0], launch, 1)
    workspace = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    launch.workspace, launch.workspace_bytes = workspace.data_ptr(), size

    def run(i: int, kept: object = (case, dy, got, workspace)) -> None:  # alive as long as their addresses are used
        launch.stream = torch.cuda.current_stream().cuda_stream
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
    pairs = [(torch.empty(count, device=DEVICE), torch.empty(count, device=DEVICE)) for _ in range(sets)]
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

    def recorded(run: Call) -> tuple[torch.cuda.CUDAGraph, int, float]:
        once = _once_us(run, sets)
        calls = max(1, min(MOST_CALLS, max(min(sets, 8), int(GRAPH_US / max(once, 1e-3)))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(calls):
                run(i % sets)
        graph.replay()
        torch.cuda.synchronize()
        return graph, calls, min(once, 1e5) * calls

    for name, run in ways.items():
        made = tried(result, name, lambda run=run: recorded(run))  # type: ignore[misc]
        if made is not None:
            graphs[name] = made[:2]
            total += made[2]
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


def disagreement(case: Case, theirs: Tensor | None) -> dict[str, float]:
    """How far ours and mamba_ssm's outputs are from the reference in float64, of its largest value; the reference is
    left out where it would not fit, and then ours is held to mamba_ssm's."""
    if case.y.numel() > MOST_CHECKED:
        return {} if theirs is None else {"ours_to_mamba_ssm": _off(case.y, theirs)}
    inputs = {name: x.double() for name, x in case.inputs[0].items()}
    want = selective_scan_ref(**inputs, delta_softplus=True)
    assert isinstance(want, Tensor)
    found = {"ours": _off(case.y, want)}
    if theirs is not None:
        found["mamba_ssm"] = _off(theirs, want)
    return found


def forward(case: Case, cache_bytes: int, result: dict[str, Any], notes: dict[str, Any]) -> dict[str, Call]:
    """The ways of a forward scan. What ours gives is looked at before; notes: why others cannot be timed."""
    run, plan = ours(case)
    result["plan"] = {name: getattr(plan, name) for name, _ in CudaPlan._fields_}
    run(0)
    other = tried(notes, "mamba_ssm", lambda: mamba_ssm(case))
    theirs = other and tried(notes, "mamba_ssm", lambda: other(0)[-1].transpose(1, 2))  # out, x, out_z
    off = tried(result, "disagreement", lambda: disagreement(case, theirs))
    if off:
        result["disagreement"] = {k: float(f"{v:.2e}") for k, v in off.items()}
        result["agrees"] = all(v <= AGREEMENT[case.name] for name, v in off.items() if name.startswith("ours"))
    ways = {"ours": run, "nothing": nothing()}
    if case.bytes <= 8 << 30:  # beyond, a copy's rate changes no more
        copying = tried(notes, "copy", lambda: copy(case.bytes, cache_bytes))
        ways |= {} if copying is None else {"copy": copying}
    return ways if theirs is None or other is None else {**ways, "mamba_ssm": other}


def backward(case: Case, result: dict[str, Any], notes: dict[str, Any]) -> dict[str, Call]:
    """The ways of its gradients."""
    dy = torch.randn_like(case.y)
    run, got = ours_backward(case, dy)
    run(0)

    def compared(other: Call) -> dict[str, float]:
        du, _, dA, *_ = other(0)
        off = {"du": _off(got["du"], du.transpose(1, 2)), "dA": _off(got["dA"], dA)}
        return {f"{k}_to_mamba_ssm": float(f"{v:.2e}") for k, v in off.items()}

    other = tried(notes, "mamba_ssm", lambda: mamba_ssm_backward(case, dy))
    off = other and tried(notes, "mamba_ssm", lambda: compared(other))
    if off is None or other is None:
        return {"ours": run}
    result["disagreement"] = off
    return {"ours": run, "mamba_ssm": other}


def run_case(case: Case, bandwidth: float, cache_bytes: int, gradients: bool) -> dict[str, Any]:
    result: dict[str, Any] = {**case.sizes, "dtype": case.name, "direction": "backward" if gradients else "forward"}
    result |= {"sets": case.sets, "bytes_moved": case.bytes}
    notes: dict[str, Any] = {}
    ways = backward(case, result, notes) if gradients else forward(case, cache_bytes, result, notes)
    result["times"] = times = {**notes, **measure(ways, case.sets)}
    if "median_us" not in times["ours"]:
        return result
    median = times["ours"]["median_us"]
    if not gradients:
        result["host_us"] = hosts = dict[str, Any]()
        for name in ("ours", "mamba_ssm"):
            if "median_us" in times.get(name, {}):
                us = tried(hosts, name, lambda name=name: host_us(ways[name], case.sets))  # type: ignore[misc]
                hosts |= {} if us is None else {name: round(us, 2)}
        result["floor_us"] = round(1e6 * case.bytes / bandwidth, 3)
        result["of_copy"] = round(result["floor_us"] / median, 3)
        if "median_us" in times["nothing"]:
            result["over_nothing"] = round(median / times["nothing"]["median_us"], 3)
    if "median_us" in times.get("mamba_ssm", {}):
        result["times_faster_than_mamba_ssm"] = round(times["mamba_ssm"]["median_us"] / median, 3)
    return result


def every_way(time: int) -> list[dict[str, int]]:
    """Of lanes, warps in time and chunks, what a sequence of `time` steps allows."""
    whole = [
        {"lanes": n, "chunk": -1, "time_warps": w} for n in (1, 2, 4) for w in (1, 4, 8, 13, 16) if 4 * w < time + 4
    ]
    chunks = [c for c in (16, 32, 64, 128, 256, 512) if 2 * c <= time]
    return whole + [{"lanes": n, "chunk": c, "time_warps": 1} for n in (1, 2, 4) for c in chunks]


def _ranked(times: dict[str, dict[str, Any]], plans: dict[str, CudaPlan]) -> list[dict[str, Any]]:
    """Best first, those that failed last."""
    rows = [{"way": name, **t} for name, t in times.items()]
    for row in rows:
        if row["way"] in plans:
            row["plan"] = {field: getattr(plans[row["way"]], field) for field, _ in CudaPlan._fields_}
    return sorted(rows, key=lambda r: r.get("median_us", float("inf")))


def timed(case: Case, ways: Sequence[dict[str, int]]) -> list[dict[str, Any]]:
    """Every way that has a plan of its own, and the rule's, best first. Each way is timed beside the rule."""
    found: dict[str, tuple[Call, CudaPlan]] = {RULE: ours(case)}
    kept = {bytes(found[RULE][1])}
    notes: dict[str, Any] = {}
    for way in ways:
        name = " ".join(f"{name}={value}" for name, value in way.items())
        wish = {WISHES[short]: value for short, value in way.items()}
        made = tried(notes, name, lambda wish=wish: ours(case, **wish))  # type: ignore[misc]
        if made is not None and bytes(made[1]) not in kept:
            kept.add(bytes(made[1]))
            found[name] = made
    times = measure({name: run for name, (run, _) in found.items()}, case.sets, case_us=2 * CASE_US)
    return _ranked({**times, **notes}, {name: plan for name, (_, plan) in found.items()})


def tune_backward(case: Case) -> list[dict[str, Any]]:
    """Lengths of chunks, best first."""
    dy = torch.randn(case.y.shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))
    chunks = [c for c in (8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024) if c < case.sizes["time"]]
    runs = {RULE: ours_backward(case, dy)[0]}
    notes: dict[str, Any] = {}
    for c in (-1, *chunks):
        name = f"chunk={c}"
        made = tried(notes, name, lambda c=c: ours_backward(case, dy, steps_per_chunk=c)[0])  # type: ignore[misc]
        runs |= {} if made is None else {name: made}
    return _ranked({**measure(runs, case.sets, case_us=2 * CASE_US), **notes}, {})


def tune(case: Case, ways: Sequence[dict[str, int]] | None = None) -> list[dict[str, Any]]:
    """Ways of sharing out, best first: `ways`, or every one, and then other shapes of blocks around the best."""
    if ways is not None:
        return timed(case, ways)
    ranked = timed(case, every_way(case.sizes["time"]))
    best = {short: ranked[0]["plan"][long] for short, long in WISHES.items()}
    if best["time_warps"] > 1 or "median_us" not in ranked[0]:
        return ranked
    shapes = [{**best, "channel_warps": w, "steps": k} for w, k in itertools.product((1, 2, 4), (4, 8, 16, 32))]
    names = {r["way"] for r in ranked}
    notes: dict[str, Any] = {}
    more = tried(notes, "other shapes", lambda: timed(case, shapes)) or []
    ranked += [r for r in more if r["way"] not in names]
    return _ranked({r.pop("way"): r for r in ranked} | notes, {})


def bandwidth_of_copies(cache_bytes: int, device_bytes: int) -> float:
    """Bytes per second of a large copy.

    Raises:
        RuntimeError: it cannot be timed; the message says why.
    """
    large = min(4 << 30, device_bytes // 8)
    (time,) = measure({"copy": copy(large, cache_bytes)}, 2).values()
    if "median_us" not in time:
        raise RuntimeError(*time.values())
    return large / (time["median_us"] * 1e-6)
