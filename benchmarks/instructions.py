"""Instructions per exponential of the scan and per element of the convolution, counted and not timed.

    python benchmarks/instructions.py         docs/results/instruction_counts.json and the table of docs/arm.md; minutes

On ARM by qemu with a plugin that counts, on x86 by valgrind's callgrind, which knows no AVX-512. A count is the
difference between a program that calls the kernel three times and one that calls it once, halved: what a call takes,
dispatch and memory included, on one thread. Needs g++ and g++-aarch64-linux-gnu, gcc, CMake, qemu-user, valgrind.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from machine import describe

ROOT = Path(__file__).resolve().parents[1]
SOURCE, CSRC = ROOT / "benchmarks" / "instructions", ROOT / "runtime" / "csrc"
SCANS = [
    (512, 500, 16),
    *((c, t, n) for n in (16, 12) for c in (256, 512) for t in (50, 500) if (c, t, n) != (512, 500, 16)),
]
CONVOLUTIONS = [(512, 500, 4), (256, 50, 4), (512, 500, 2)]
EXP_ROUNDS = 2000
MARKS = ("<!-- counts: written by benchmarks/instructions.py -->", "<!-- end of counts -->")


def run(command: Sequence[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )


def build(folder: Path, compiler: str, *options: str) -> Path:
    """The program that calls kernels, beside the library it calls."""
    run(["cmake", "-S", CSRC, "-B", folder, *options])
    run(["cmake", "--build", folder, "--target", "hcmen_ops", "--parallel", "2"])
    program = folder / "calls"
    link = [f"-L{folder}", "-lhcmen_ops", f"-Wl,-rpath,{folder}"]
    run([compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", f"-I{CSRC}", SOURCE / "calls.cc", "-o", program, *link])
    return program


def on_arm(folder: Path) -> Callable[..., tuple[int, str]]:
    """A function of the program's arguments: instructions executed under qemu, and what it printed."""
    program = build(
        folder / "arm", "aarch64-linux-gnu-g++", f"-DCMAKE_TOOLCHAIN_FILE={CSRC / 'aarch64-linux-gnu.cmake'}"
    )
    plugin = folder / "count.so"
    run(["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", SOURCE / "count.c", "-o", plugin])
    qemu = ["qemu-aarch64", "-cpu", "cortex-a53", "-plugin", plugin, "-L", "/usr/aarch64-linux-gnu", program]

    def count(*arguments: str) -> tuple[int, str]:
        done = run([*qemu, *arguments])
        return int(re.findall(r"^executed (\d+)$", done.stderr, re.MULTILINE)[-1]), done.stdout

    return count


def on_x86(folder: Path, isa: str) -> Callable[..., tuple[int, str]]:
    """The same under callgrind with the kernels of `isa`."""
    program = build(folder / "x86", "g++")
    callgrind = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", program]

    def count(*arguments: str) -> tuple[int, str]:
        done = run([*callgrind, *arguments], HCMEN_ISA=isa)
        return int(re.findall(r"Collected : (\d+)", done.stderr)[-1]), done.stdout

    return count


def per_call(count: Callable[..., tuple[int, str]], isa: str, *arguments: object) -> tuple[int, str]:
    """Instructions of one call, and what the program printed. Raises RuntimeError if other kernels than `isa` ran."""
    words = [str(a) for a in arguments]
    (once, said), (thrice, _) = count(*words, "1"), count(*words, "3")
    if said.split()[0] != isa:
        raise RuntimeError(f"the kernels were {said.split()[0]}, expected {isa}")
    return (thrice - once) // 2, said


def measure(count: Callable[..., tuple[int, str]], isa: str) -> dict[str, Any]:
    """All rows of one instruction set."""
    taken, said = per_call(count, isa, "exp", EXP_ROUNDS)
    found: dict[str, Any] = {"exp_loop": taken / int(said.split()[1]), "scan": {}, "conv": {}}
    for half in (False, True):
        dtype = "float16" if half else "float32"
        for channels, steps, states in SCANS if not half else SCANS[:1]:
            taken, _ = per_call(count, isa, "scan", channels, steps, states, int(half))
            found["scan"][f"{channels} x {steps} x {states} {dtype}"] = {
                "instructions": taken,
                "per_exponential": taken / (channels * steps * states),
            }
        for channels, steps, width in CONVOLUTIONS if not half else CONVOLUTIONS[:1]:
            taken, _ = per_call(count, isa, "conv", channels, steps, width, int(half))
            found["conv"][f"{channels} x {steps}, width {width} {dtype}"] = {
                "instructions": taken,
                "per_element": taken / (channels * steps),
            }
    return found


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: one row per size, one column per instruction set."""
    names = list(results)
    lines = ["| instructions | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    lines.append(
        "| per exponential, in registers | " + " | ".join(f"{r['exp_loop']:.2f}" for r in results.values()) + " |"
    )
    for op, unit in (("scan", "per_exponential"), ("conv", "per_element")):
        for size in results[names[0]][op]:
            cells = " | ".join(f"{r[op][size][unit]:.2f}" for r in results.values())
            lines.append(f"| {unit.replace('_', ' ')}, {op} {size} | {cells} |")
    return "\n".join(lines)


def put_table(page: Path, text: str) -> None:
    """Puts `text` between the two marks of a page. Raises ValueError if they are not there."""
    before, mark, rest = page.read_text().partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not mark or not end:
        raise ValueError(f"{page} has no lines {' and '.join(MARKS)}")
    page.write_text(f"{before}{mark}\n\n{text}\n\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "instruction_counts.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "arm.md", help="the page with the table")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "instructions", help="for what is built")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    results = {"neon": measure(on_arm(folder), "neon"), "avx2": measure(on_x86(folder, "avx2"), "avx2")}
    tools = [["aarch64-linux-gnu-g++", "--version"], ["qemu-aarch64", "--version"], ["valgrind", "--version"]]
    data = {
        "schema_version": 1,
        "machine": {**describe(), "counters": [run(t).stdout.splitlines()[0] for t in tools]},
        "lanes": {"neon": 4, "avx2": 8},
        "results": results,
    }
    options.out.write_text(json.dumps(data, indent=2) + "\n")
    put_table(options.page, table(results))
    print(table(results))


if __name__ == "__main__":
    main()
