"""Counts the instructions of the kernels in compiled code. Needs no GPU.

    python tests/gpu/build.py --sass docs/results/cuda_sass.json

cuobjdump and nvdisasm are CUDA's, or the pip packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm, or triton's.

A kernel's main loop is the loop with most `MUFU.EX2`, the decays of the states. It is counted along the way through its
blocks that a full round takes: the one with most special functions, among those with most reads and writes of memory,
among those the shortest. So a round with softplus and gate counts, and not the guarded loads at the end of a sequence.

A tile of the backward scan has several loops, each counted so by itself. What is around them counts along the shortest
way through all that have special functions, so that it bounds from below whatever the number of chunks.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from build import BuildError, readable_name

__all__ = ["Loop", "Loops", "count", "count_backward", "count_sums", "counts", "find_tools", "functions", "way_through"]

ROUND = 4
"""kRound of selective_scan_cuda.h."""
STATE = 16
"""Of a channel, in the kernels whose loops are told apart by their decays."""


@dataclass(frozen=True)
class Loop:
    """Instructions that one warp issues in one pass. steps: that a pass takes, 0 where that is the plan's; special:
    MUFU; shared: reads and writes of shared memory; memory: of global memory; static: all instructions that lie in the
    loop; bytes: of the whole kernel's code."""

    steps: int
    instructions: int
    special: int
    shared: int
    shuffles: int
    memory: int
    static: int
    bytes: int


Loops = dict[str, Loop]
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
        BuildError: the tools are missing, or find no code for the architecture.
    """
    tools = find_tools()
    if tools is None:
        raise BuildError(3, "cuobjdump and nvdisasm are needed: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    command = [tools[0], "-sass", "-arch", f"sm_{architecture}", str(binary)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": tools[1]})
    found: dict[str, list[Instruction]] = {}
    for part in done.stdout.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", body, re.MULTILINE)
        found[name.strip()] = [(int(address, 16), text.strip()) for address, text in lines]
    if done.returncode != 0 or not found:
        said = (done.stderr.strip() or "cuobjdump finds none").splitlines()[0]
        raise BuildError(5, f"{binary} has no code for sm_{architecture}: {said}")
    return found


_BRANCH = re.compile(r"(@!?U?P\w+ )?\s*BRA(?:\.\S+)? (?:.*, )?`?\(?(?:\.L_\w+|0x(?P<target>[0-9a-f]+))\)?")


def _target(text: str) -> int | None:
    match = _BRANCH.match(text)
    return int(match["target"], 16) if match and match["target"] else None


def _operation(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def _kind(text: str) -> str:
    return _operation(text).split(".")[0]


def _loops(code: Sequence[Instruction]) -> list[tuple[int, int]]:
    """First and last address of each loop, by its branch back; the endless one after a kernel's end is none."""
    return sorted({(t, a) for a, text in code if (t := _target(text)) is not None and t < a})


def _within(code: Sequence[Instruction], loop: tuple[int, int]) -> list[str]:
    return [text for a, text in code if loop[0] <= a <= loop[1]]


def _decays(code: Sequence[Instruction], loop: tuple[int, int]) -> int:
    return sum("MUFU.EX2" in text for text in _within(code, loop))


Weight = tuple[int, int, int]


def _weight(address: int, text: str) -> Weight:
    return (_kind(text) == "MUFU", _kind(text) in ("LDG", "STG", "LDS", "STS", "BAR"), -1)


def way_through(
    code: Sequence[Instruction],
    first: int,
    last: int,
    around: Sequence[tuple[int, int]] = (),
    weight_of: Callable[[int, str], Weight] = _weight,
) -> list[Instruction]:
    """The way from `first` to `last` that weighs most and enters none of the loops `around`: by default with most
    special functions, then most accesses to memory, then fewest instructions. Branches back are not taken."""
    inside = [(a, text) for a, text in code if first <= a <= last and not any(lo <= a <= hi for lo, hi in around)]
    place = {a: i for i, (a, _) in enumerate(inside)}

    best: list[tuple[Weight, int | None] | None] = [None] * len(inside)
    for i in range(len(inside) - 1, -1, -1):
        address, text = inside[i]
        weight = weight_of(address, text)
        if address == last:
            best[i] = (weight, None)
            continue
        kind, target = _kind(text), _target(text)
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
    way: list[Instruction] = []
    at: int | None = 0
    while at is not None:
        way.append(inside[at])
        found = best[at]
        if found is None:
            raise BuildError(5, f"sass.py finds no way through the loop at {first:x}")
        at = found[1]
    return way


def _counted(steps: int, way: Iterable[str], static: int, size: int) -> Loop:
    kinds = Counter(map(_kind, way))
    return Loop(
        steps,
        sum(kinds.values()),
        kinds["MUFU"],
        kinds["LDS"] + kinds["STS"],
        kinds["SHFL"],
        kinds["LDG"] + kinds["STG"] + kinds["LDGSTS"],
        static,
        size,
    )


def _texts(way: Iterable[Instruction]) -> list[str]:
    return [text for _, text in way]


def count(code: Sequence[Instruction], steps: int = ROUND) -> Loops:
    """`round`: the main loop of a kernel, of which a pass takes `steps`. `tile`: one pass of the loop around it less
    the main loop, what a tile costs besides its rounds. A kernel without loops counts as one round."""
    size = code[-1][0] + 16
    loops = [(_decays(code, loop), *loop) for loop in _loops(code)]
    most = max((n for n, _, _ in loops), default=0)
    if most == 0:
        end = max(a for a, text in code if _operation(text) == "EXIT")
        return {"round": _counted(steps, _texts(way_through(code, code[0][0], end)), len(code), size)}
    main = min((hi - lo, lo, hi) for n, lo, hi in loops if n == most)[1:]
    inner = way_through(code, *main)
    found = {"round": _counted(steps, _texts(inner), len(_within(code, main)), size)}
    around = [(hi - lo, lo, hi) for _, lo, hi in loops if lo <= main[0] and hi >= main[1] and (lo, hi) != main]
    if around:
        lo, hi = min(around)[1:]
        others = [(a, b) for _, a, b in loops if lo < a and b < hi and not (a <= main[0] and b >= main[1])]
        others = [(a, b) for a, b in others if not main[0] <= a <= main[1]]
        outer = Counter(_texts(way_through(code, lo, hi, others)))
        outer.subtract(Counter(_texts(inner)))
        static = len(_within(code, (lo, hi))) - found["round"].static
        found["tile"] = _counted(0, (+outer).elements(), static, size)
    return found


def count_backward(code: Sequence[Instruction]) -> Loops:
    """Of a kernel that walks over tiles, the loops within a tile: `stage` reads inputs, `advance` takes states ahead,
    `back` computes gradients. `tile`: what a tile costs besides."""
    size, loops = code[-1][0] + 16, _loops(code)
    tile = max(loops, key=lambda loop: (_decays(code, loop), loop[1] - loop[0]))
    inside = [loop for loop in loops if tile[0] <= loop[0] and loop[1] <= tile[1] and loop != tile]
    found = {}
    for loop in sorted(inside, key=lambda loop: _decays(code, loop)):  # of two of a kind that with softplus and gate
        decays, kinds = _decays(code, loop), set(map(_kind, _within(code, loop)))
        if decays == 0 or any(loop[0] <= lo and hi <= loop[1] for lo, hi in inside if (lo, hi) != loop):
            continue
        if "SHFL" in kinds:
            name, a_step = "back", 2 * STATE  # ahead once more, and back
        elif decays >= STATE:
            name, a_step = "advance", STATE
        else:
            name, a_step = "stage", 1 + any("MUFU.RCP" in text for text in _within(code, loop))
        found[name] = _counted(decays // a_step, _texts(way_through(code, *loop)), len(_within(code, loop)), size)
    must = [loop for loop in inside if _decays(code, loop)]
    way = way_through(code, *tile, (), lambda a, _: (any(lo <= a <= hi for lo, hi in must), 0, -1))
    rest = [text for a, text in way if not any(lo <= a <= hi for lo, hi in inside)]
    static = sum(tile[0] <= a <= tile[1] and not any(lo <= a <= hi for lo, hi in inside) for a, _ in code)
    return {"tile": _counted(0, rest, static, size), **found}


def count_sums(code: Sequence[Instruction]) -> Loops:
    """Of a kernel that adds parts up, the shortest loop that adds eight."""
    loops = [loop for loop in _loops(code) if sum(_kind(text) == "LDG" for text in _within(code, loop)) == 8]
    way = min((_texts(way_through(code, *loop)) for loop in loops), key=len)
    return {"round": _counted(8, way, len(way), code[-1][0] + 16)}


def counts(binary: Path, architecture: int) -> dict[str, Loops]:
    """The loops of the kernels of `binary`, under readable names, but for the convolution's of any width.

    Raises:
        BuildError: as `functions`, or a kernel's loops are none that this knows.
    """
    found = {}
    for mangled, code in functions(binary, architecture).items():
        name = readable_name(mangled)
        try:
            if name.startswith(("scan_backward_kernel", "scan_backward_ends")):
                found[name] = count_backward(code)
            elif name == "scan_backward_sums_kernel":
                found[name] = count_sums(code)
            elif name.startswith(("scan_forward", "scan_split")):
                found[name] = count(code)
            elif name.startswith(("scan_", "conv_")) and "_any_" not in name:
                found[name] = count(code, 8)  # chunks of a carry, steps of a convolution
        except ValueError:
            raise BuildError(5, f"sass.py does not know the loops of {name} for sm_{architecture}") from None
    return found
