"""What the counts of sass.py bound on a device: for each case of benchmarks/scan_cuda.py the time that its kernels need
to issue their instructions, to compute their special functions, and to move their bytes. Needs no GPU.

    python tests/gpu/build.py --sass docs/results/cuda_sass.json

None of the three may exceed what was measured (docs/results/scan_cuda.json): tests/csrc/test_cuda_sass.py sees to it.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from build import BuildError, Kernel, find_nvcc
from sass import ROUND, STATE, Loops, counts

__all__ = ["DEVICES", "Backward", "Device", "Forward", "backward_plan", "benchmark_cases", "bounds", "report", "table"]

TILE, SUB, WARP_CHANNELS, BLOCK_CHANNELS = 8, 4, 32, 128
"""kTile, kSub and kChannels of selective_scan_backward.cu; channels of a block of kMostWarps."""
CELLS, PARAMETERS = WARP_CHANNELS * STATE, WARP_CHANNELS * (STATE + 2)
"""kCells and kParameters there: what a warp keeps of a chunk, of the gradients of A, D and delta_bias."""


@dataclass(frozen=True)
class Device:
    """What bounds a kernel. clock: Hz under load; bytes_per_second: of a kernel that copies; cache_bytes: of L2.
    issues, special: a clock and multiprocessor, in instructions of a warp and in results."""

    name: str
    multiprocessors: int
    clock: float
    bytes_per_second: float
    cache_bytes: int
    issues: int = 4
    special: int = 16


DEVICES = (Device("H200", 132, 1.755e9, 4.2e12, 60 << 20), Device("H100 SXM", 132, 1.755e9, 3.0e12, 50 << 20))


@dataclass(frozen=True)
class Forward:
    """A forward scan of 16 states and how it is shared out."""

    batch: int
    channel: int
    time: int
    dtype: str
    chunks: int
    lanes: int
    states: int
    steps: int
    time_warps: int
    direction: str = "forward"

    def name_of(self, kernel: str, *mode: int) -> str:
        kind = {"float32": "float", "float16": "half"}[self.dtype]
        return f"{kernel}<{', '.join(map(str, (kind, self.states, min(self.lanes, 4), *mode)))}>"

    @property
    def kernel(self) -> str:
        return self.name_of("scan_split_kernel") if self.time_warps > 1 else self.name_of("scan_forward_kernel", 0)

    def passes(self) -> Iterator[tuple[str, str, float]]:
        """Kernel, loop, and how many steps all warps take in it together; of a loop without steps, passes."""
        warps = self.batch * -(-self.channel * self.lanes // 32)
        names = [(self.kernel, 1.0)]
        if self.chunks > 1:
            names.append((self.name_of("scan_forward_kernel", 1), 1 - 1 / self.chunks))
        for name, part in names:
            yield name, "round", part * warps * -(-self.time // ROUND) * ROUND
            if self.time_warps == 1:
                yield name, "tile", part * warps * -(-self.time // self.steps)

    def moved(self, cache: int) -> float:
        element = 4 if self.dtype == "float32" else 2
        return element * self.batch * self.time * (4 * self.channel + 2 * STATE) + 4 * self.channel * (STATE + 2)


@dataclass(frozen=True)
class Backward:
    """A backward scan of 16 states, of more than 64 channels, and how it is shared out. portion: sequences that are
    under way together."""

    batch: int
    channel: int
    time: int
    dtype: str
    chunks: int
    portion: int
    direction: str = "backward"
    kernel: str = "scan_backward_kernel"

    @property
    def blocks(self) -> int:
        """Of channels."""
        return -(-self.channel // BLOCK_CHANNELS)

    @property
    def columns(self) -> int:
        """Warps that a sequence takes."""
        return self.blocks * BLOCK_CHANNELS // WARP_CHANNELS

    @property
    def tiles(self) -> int:
        return -(-self.time // TILE)

    @property
    def ahead(self) -> int:
        """Steps of the first launch. Without chunks it asks nothing of the last tile but the states before it."""
        return self.time if self.chunks > 1 else TILE * (self.tiles - 1)

    def floats(self) -> dict[str, int]:
        """The arrays of the workspace, of one sequence."""
        of_chunks, sides = self.columns * self.chunks, self.blocks if self.blocks > 1 else 0
        cut = self.chunks > 1
        return {
            "parameters": of_chunks * PARAMETERS,
            "starts": self.columns * self.tiles * CELLS,
            "before": cut * self.columns * self.tiles * WARP_CHANNELS,
            "sums": cut * of_chunks * WARP_CHANNELS,
            "ends": cut * of_chunks * CELLS,
            "slopes": cut * of_chunks * CELLS,
            "B": sides * self.time * STATE,
            "C": sides * self.time * STATE,
        }

    def workspace(self) -> int:
        """Bytes."""
        return 4 * sum((self.batch if n == "parameters" else self.portion) * x for n, x in self.floats().items())

    def passes(self) -> Iterator[tuple[str, str, float]]:
        """As Forward.passes; of carries chunks, of sums parts."""
        warps, cut, tail = self.batch * self.columns, self.chunks > 1, self.time - TILE * (self.tiles - 1)
        ends = f"scan_backward_ends_kernel<{str(cut).lower()}>"
        yield ends, "tile", warps * -(-self.ahead // TILE)
        yield ends, "stage", warps * self.ahead
        yield ends, "advance", warps * self.ahead
        if cut:
            yield "scan_backward_carries_kernel", "round", 2 * warps * CELLS / 32 * self.chunks
        subs = [-(-TILE // SUB)] * (self.tiles - 1) + [-(-tail // SUB)]
        yield self.kernel, "tile", warps * self.tiles
        yield self.kernel, "stage", warps * self.time
        yield self.kernel, "advance", warps * SUB * sum(n - 1 for n in subs)
        yield self.kernel, "back", warps * SUB * sum(subs)
        floats = self.floats()
        yield "scan_backward_sums_kernel", "round", self.batch * (floats["parameters"] + floats["B"] + floats["C"]) / 32

    def moved(self, cache: int) -> float:
        """Bytes: at least every input once and every output, and what each launch reads and writes, but for what the
        cache may have of it from the launch before, or still hold when it ends."""
        f, given = self.floats(), 2 if self.chunks > 1 else 1  # with dy, z and C, or without
        series, projection = self.time * self.channel, self.time * STATE
        carried = f["ends"] + f["slopes"]
        launches = [
            given * self.ahead * (2 * self.channel + STATE) + f["starts"] + f["before"] + f["sums"] + carried,
            2 * carried + f["sums"],
            7 * series + 2 * projection + f["starts"] + f["before"] + carried
            + (f["B"] + f["C"] or 2 * projection) + f["parameters"],
            f["B"] + f["C"] + 2 * projection if f["B"] else 0,
        ]  # fmt: skip
        least = 4 * self.batch * (7 * series + 4 * projection)
        portions = self.batch / self.portion
        return max(least, sum(portions * max(0, 4 * self.portion * floats - 2 * cache) for floats in launches))


Case = Forward | Backward


def bounds(device: Device, case: Case, kernels: dict[str, Loops]) -> dict[str, float]:
    """Microseconds below which `case` cannot end, for each of issue, special functions and memory."""
    issued = special = 0.0
    for name, part, steps in case.passes():
        loop = kernels[name].get(part)
        if loop is None:
            raise BuildError(5, f"sass.py finds no loop '{part}' in {name}")
        passes = steps / (loop.steps or 1)
        issued += passes * loop.instructions
        special += passes * loop.special
    clocks = device.multiprocessors * device.clock
    return {
        "issue_us": round(1e6 * issued / (device.issues * clocks), 2),
        "special_us": round(1e6 * special * 32 / (device.special * clocks), 2),
        "memory_us": round(1e6 * case.moved(device.cache_bytes) / device.bytes_per_second, 2),
    }


def backward_plan(workspace: Callable[..., int], batch: int, time: int) -> tuple[int, int]:
    """Chunks of a backward scan, and sequences under way together. There is no function that tells. So `workspace` is
    asked which of both, when wished for, takes as many bytes as when nothing is wished."""
    own, tiles = workspace(), -(-time // TILE)
    tiles_of_chunk = next(n for n in range(tiles, 0, -1) if workspace(steps_per_chunk=TILE * n) == own)
    return -(-tiles // tiles_of_chunk), next(n for n in range(1, batch + 1) if workspace(sequences_at_once=n) == own)


def benchmark_cases(library: Path) -> list[Case]:
    """The cases of benchmarks/scan_cuda.py, with the plans that `library` has for them."""
    try:
        from hcmen.base.cuda_library import CudaLaunch, CudaPlan, call, declare, workspace_bytes
        from hcmen.base.library import ScanArguments
    except ImportError as error:
        raise BuildError(3, f"--sass needs this package ({error}): pip install -e .") from None

    loaded = declare(ctypes.CDLL(str(library)), str(library))
    cases: list[Case] = []
    every = list(itertools.product((1, 16, 256), (512, 2048), (50, 500, 4096)))
    for dtype, (batch, channel, time) in itertools.product(("float32", "float16"), every):
        sizes = {"batch": batch, "channel": channel, "time": time, "state": STATE, "group": 1}
        found = CudaPlan()
        call(loaded, "selective_scan_plan", ScanArguments(**sizes, dtype=int(dtype == "float16")), CudaLaunch(), found)
        fields = (found.chunks, found.lanes_per_channel, found.states_per_lane, found.steps_per_warp, found.time_warps)
        cases.append(Forward(batch, channel, time, dtype, *fields))
    for batch, channel, time in every:
        scan = ScanArguments(batch=batch, channel=channel, time=time, state=STATE, group=1)

        def workspace(scan: ScanArguments = scan, **wish: int) -> int:
            return workspace_bytes(loaded, "selective_scan", scan, CudaLaunch(**wish), 1)

        case = Backward(batch, channel, time, "float32", *backward_plan(workspace, batch, time))
        if case.workspace() != workspace():
            raise BuildError(
                1, f"sass.py takes the workspace of {case} for {case.workspace()} bytes, not {workspace()}"
            )
        cases.append(case)
    return cases


def report(library: Path, architecture: int, kernels: Iterable[Kernel]) -> dict[str, Any]:
    """The JSON document: the kernels' counts, and the bounds of each case on each of DEVICES."""
    counted = counts(library, architecture)
    registers = {k.name: k.registers for k in kernels if k.architecture == architecture}
    shown = {
        name: {"registers": registers.get(name), **{part: asdict(loop) for part, loop in loops.items()}}
        for name, loops in sorted(counted.items())
    }
    cases = benchmark_cases(library)
    rows = [{**asdict(c), "kernel": c.kernel, **{d.name: bounds(d, c, counted) for d in DEVICES}} for c in cases]
    nvcc = find_nvcc()
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    head = {"architecture": architecture, "nvcc": "".join(re.findall(r"V[0-9.]+", version)) or None}
    return {**head, "devices": [asdict(d) for d in DEVICES], "kernels": shown, "cases": rows}


def table(document: dict[str, Any]) -> str:
    """What `report` gives, for people."""
    lines = [f"{'a pass of a loop':<48} steps instructions special shared shuffles memory registers"]
    for name, kernel in document["kernels"].items():
        for part in (part for part in kernel if part != "registers"):
            fields = ("steps", "instructions", "special", "shared", "shuffles", "memory")
            counted = [*(kernel[part][field] for field in fields), kernel["registers"]]
            lines.append(f"{name + ' ' + part:<48}" + "".join(f"{x!s:>8}" for x in counted))
    lines.append("\nbounds in us: issue, special functions, memory")
    for c in document["cases"]:
        bound = "   ".join(f"{d.name} {' '.join(f'{x:9.1f}' for x in c[d.name].values())}" for d in DEVICES)
        lines.append(f"{c['batch']:>4} x {c['channel']:>4} x {c['time']:>4} {c['dtype']} {c['direction']:<8}  {bound}")
    return "\n".join(lines)
