"""Counts the instructions of the scan kernels in compiled code, and what they bound on a device. Needs no GPU.

    python tests/gpu/build.py --sass docs/results/cuda_sass.json

cuobjdump and nvdisasm are CUDA's, or the pip packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm, or triton's.

A kernel's main loop is the loop with most `MUFU.EX2`, the decays of the states. It is counted along the way through its
blocks that a full round takes: the one with most special functions, among those with most reads and writes of memory,
among those the shortest. So a round with softplus and gate counts, and not the guarded loads at the end of a sequence.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from build import readable_name

__all__ = [
    "DEVICES",
    "Case",
    "Device",
    "Loop",
    "benchmark_cases",
    "bounds",
    "count",
    "counts",
    "find_tools",
    "functions",
    "report",
    "table",
    "way_through",
]

ROUND = 4
"""kRound of selective_scan_cuda.h."""


@dataclass(frozen=True)
class Device:
    """What bounds a kernel. clock: Hz under load; bytes_per_second: of a kernel that copies; issues, special: a clock
    and multiprocessor, in instructions of a warp and in results."""

    name: str
    multiprocessors: int
    clock: float
    bytes_per_second: float
    issues: int = 4
    special: int = 16


DEVICES = (Device("H200", 132, 1.755e9, 4.2e12), Device("H100 SXM", 132, 1.755e9, 3.0e12))


@dataclass(frozen=True)
class Loop:
    """Instructions that one warp issues in one pass. special: MUFU; shared: reads and writes of shared memory; memory:
    of global memory; static: all instructions that lie in the loop; bytes: of the whole kernel's code."""

    instructions: int
    special: int
    shared: int
    shuffles: int
    memory: int
    static: int
    bytes: int


Instruction = tuple[int, str]


def find_tools() -> tuple[str, str] | None:
    """cuobjdump and the path it finds nvdisasm on, or None."""
    folders = os.environ.get("PATH", "").split(os.pathsep)
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    if nvcc:
        folders.append(str(Path(nvcc).resolve().parent))
    for package, inside in (("nvidia", "cu13/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        folders += [str(Path(place) / inside) for place in (spec.submodule_search_locations or [] if spec else [])]
    path = os.pathsep.join(folders)
    cuobjdump = shutil.which("cuobjdump", path=path)
    return (cuobjdump, path) if cuobjdump and shutil.which("nvdisasm", path=path) else None


def functions(binary: Path, architecture: int) -> dict[str, list[Instruction]]:
    """The code of every kernel in `binary`, under its mangled name.

    Raises:
        RuntimeError: the tools are missing or refuse.
    """
    tools = find_tools()
    if tools is None:
        raise RuntimeError("cuobjdump and nvdisasm are needed: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    command = [tools[0], "-sass", "-arch", f"sm_{architecture}", str(binary)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": tools[1]})
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    found: dict[str, list[Instruction]] = {}
    for part in done.stdout.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", body, re.MULTILINE)
        found[name.strip()] = [(int(address, 16), text.strip()) for address, text in lines]
    return found


_BRANCH = re.compile(r"(@!?U?P\w+ )?\s*BRA(?:\.\S+)? (?:.*, )?`?\(?(?:\.L_\w+|0x(?P<target>[0-9a-f]+))\)?")


def _target(text: str) -> int | None:
    match = _BRANCH.match(text)
    return int(match["target"], 16) if match and match["target"] else None


def _operation(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def _loops(code: Sequence[Instruction]) -> list[tuple[int, int]]:
    """First and last address of each loop, by its branch back; the endless one after a kernel's end is none."""
    return [(t, a) for a, text in code if (t := _target(text)) is not None and t < a]


def _weight(text: str) -> tuple[int, int, int]:
    kind = _operation(text).split(".")[0]
    return (kind == "MUFU", kind in ("LDG", "STG", "LDS", "STS", "BAR"), -1)


def way_through(
    code: Sequence[Instruction], first: int, last: int, around: Sequence[tuple[int, int]] = ()
) -> list[str]:
    """The instructions of the way from `first` to `last` that has most special functions, then most accesses to memory,
    then fewest instructions, and that enters none of the loops `around`. Branches back are not taken."""
    inside = [(a, text) for a, text in code if first <= a <= last and not any(lo <= a <= hi for lo, hi in around)]
    place = {a: i for i, (a, _) in enumerate(inside)}

    best: list[tuple[tuple[int, int, int], int | None] | None] = [None] * len(inside)
    for i in range(len(inside) - 1, -1, -1):
        address, text = inside[i]
        weight = _weight(text)
        if address == last:
            best[i] = (weight, None)
            continue
        kind, target = _operation(text).split(".")[0], _target(text)
        follow = (
            [] if kind in ("EXIT", "RET") and not text.startswith("@") else [i + 1]
        )  # what is left out has no way in
        if kind == "BRA":
            if not text.startswith("@") and "P" not in text:
                follow = []
            if target is not None and target > address and target in place:
                follow.append(place[target])
        reached = [(end[0], j) for j in follow if j < len(inside) and (end := best[j]) is not None]
        if reached:
            rest, j = max(reached)
            best[i] = ((weight[0] + rest[0], weight[1] + rest[1], weight[2] + rest[2]), j)
    way: list[str] = []
    at: int | None = 0
    while at is not None:
        way.append(inside[at][1])
        found = best[at]
        if found is None:
            raise RuntimeError(f"no way through the loop at {first:x}")
        at = found[1]
    return way


def _counted(way: Iterable[str], static: int, size: int) -> Loop:
    kinds = Counter(_operation(text).split(".")[0] for text in way)
    return Loop(
        sum(kinds.values()),
        kinds["MUFU"],
        kinds["LDS"] + kinds["STS"],
        kinds["SHFL"],
        kinds["LDG"] + kinds["STG"] + kinds["LDGSTS"],
        static,
        size,
    )


def count(code: Sequence[Instruction]) -> tuple[Loop, Loop]:
    """The main loop of a kernel, and one pass of the loop around it less the main loop: what a tile costs besides its
    rounds, where the loop is left out. A kernel without loops counts as one pass, and the rest as nothing."""
    size = code[-1][0] + 16
    loops = [
        (sum("MUFU.EX2" in text for a, text in code if lo <= a <= hi), lo, hi) for lo, hi in _loops(code) if lo < hi
    ]
    most = max((n for n, _, _ in loops), default=0)
    if most == 0:
        end = max(a for a, text in code if _operation(text) == "EXIT")
        return _counted(way_through(code, code[0][0], end), len(code), size), _counted([], 0, size)
    main = min((hi - lo, lo, hi) for n, lo, hi in loops if n == most)[1:]
    inner = way_through(code, *main)
    round_ = _counted(inner, sum(main[0] <= a <= main[1] for a, _ in code), size)
    around = [(hi - lo, lo, hi) for _, lo, hi in loops if lo <= main[0] and hi >= main[1] and (lo, hi) != main]
    if not around:
        return round_, _counted([], 0, size)
    lo, hi = min(around)[1:]
    others = [(a, b) for _, a, b in loops if lo < a and b < hi and not (a <= main[0] and b >= main[1])]
    others = [(a, b) for a, b in others if not main[0] <= a <= main[1]]
    outer = Counter(way_through(code, lo, hi, others))
    outer.subtract(Counter(inner))
    rest = list((+outer).elements())
    return round_, _counted(rest, sum(lo <= a <= hi for a, _ in code) - round_.static, size)


@dataclass(frozen=True)
class Case:
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

    def name_of(self, kernel: str, *mode: int) -> str:
        kind = {"float32": "float", "float16": "half"}[self.dtype]
        return f"{kernel}<{', '.join(map(str, (kind, self.states, min(self.lanes, 4), *mode)))}>"

    @property
    def kernel(self) -> str:
        return self.name_of("scan_split_kernel") if self.time_warps > 1 else self.name_of("scan_forward_kernel", 0)


def bounds(device: Device, case: Case, kernels: dict[str, tuple[Loop, Loop]]) -> dict[str, float]:
    """Microseconds below which `case` cannot end, for each of issue, special functions and memory."""
    warps = case.batch * -(-case.channel * case.lanes // 32)
    rounds, tiles = -(-case.time // ROUND), -(-case.time // case.steps)
    passes = [(case.kernel, 1.0)]
    if case.chunks > 1:
        passes.append((case.name_of("scan_forward_kernel", 1), 1 - 1 / case.chunks))
    issued = special = 0.0
    for name, part in passes:
        round_, tile = kernels[name]
        issued += part * warps * (rounds * round_.instructions + tiles * tile.instructions)
        special += part * warps * rounds * round_.special
    element = 4 if case.dtype == "float32" else 2
    moved = element * case.batch * case.time * (4 * case.channel + 2 * 16) + 4 * case.channel * 18
    clocks = device.multiprocessors * device.clock
    return {
        "issue_us": round(1e6 * issued / (device.issues * clocks), 2),
        "special_us": round(1e6 * special * 32 / (device.special * clocks), 2),
        "memory_us": round(1e6 * moved / device.bytes_per_second, 2),
    }


def counts(binary: Path, architecture: int) -> dict[str, tuple[Loop, Loop]]:
    """`count` of every scan kernel of `binary`, under readable names."""
    return {
        readable_name(name): count(code)
        for name, code in functions(binary, architecture).items()
        if "scan_" in name and "carry" not in name
    }


def benchmark_cases(library: Path) -> list[Case]:
    """The cases of benchmarks/scan_cuda.py, with the plans that `library` has for them."""
    from hcmen.base.cuda_library import CudaLaunch, CudaPlan, call, declare
    from hcmen.base.library import ScanArguments

    loaded = declare(ctypes.CDLL(str(library)), str(library))
    cases = []
    for dtype, batch, channel, time in itertools.product(
        ("float32", "float16"), (1, 16, 256), (512, 2048), (50, 500, 4096)
    ):
        sizes = {"batch": batch, "channel": channel, "time": time, "state": 16, "group": 1}
        found = CudaPlan()
        call(loaded, "selective_scan_plan", ScanArguments(**sizes, dtype=int(dtype == "float16")), CudaLaunch(), found)
        fields = (found.chunks, found.lanes_per_channel, found.states_per_lane, found.steps_per_warp, found.time_warps)
        cases.append(Case(batch, channel, time, dtype, *fields))
    return cases


def report(kernels: dict[str, tuple[Loop, Loop]], registers: dict[str, int], cases: Iterable[Case]) -> dict[str, Any]:
    """The JSON document: the kernels' counts, and the bounds of each case on each of DEVICES."""
    shown = {
        name: {"registers": registers.get(name), "round": asdict(loop), "tile": asdict(rest)}
        for name, (loop, rest) in sorted(kernels.items())
    }
    rows = [{**asdict(c), "kernel": c.kernel, **{d.name: bounds(d, c, kernels) for d in DEVICES}} for c in cases]
    return {"devices": [asdict(d) for d in DEVICES], "kernels": shown, "cases": rows}


def table(document: dict[str, Any]) -> str:
    """What `report` gives, for people."""
    lines = [f"{'one round of ' + str(ROUND) + ' steps':<40} instructions special shared shuffles memory registers"]
    for name, kernel in document["kernels"].items():
        r = kernel["round"]
        counted = (r["instructions"], r["special"], r["shared"], r["shuffles"], r["memory"], kernel["registers"])
        lines.append(f"{name:<40}" + "".join(f"{x!s:>10}" for x in counted))
    lines.append("\nbounds in us: issue, special functions, memory")
    for c in document["cases"]:
        bound = "   ".join(f"{d.name} {' '.join(f'{x:9.1f}' for x in c[d.name].values())}" for d in DEVICES)
        lines.append(f"{c['batch']:>4} x {c['channel']:>4} x {c['time']:>4} {c['dtype']}  {bound}")
    return "\n".join(lines)
