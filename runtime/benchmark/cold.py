"""Fresh processes by turns: from process start to the first score, and resident memory.

Each process is a new Python that does one thing (cold_process.py) and reports when each step of it was over, on the
clock that all processes share (CLOCK_MONOTONIC), and what memory it holds after the first score and 20 more. Every kind
has one run before the counted ones, which fills the page cache: what is measured is a start with the files in memory,
not the disk.

Peak memory is VmHWM of the process itself. `ru_maxrss`, which is what /usr/bin/time shows, begins on Linux with the
size of the process that started it.

kinds: "floor" (a Python that imports NumPy and onnxruntime alone, which nothing that runs on them can undercut), one
per variant, "all variants" (every session of the bundle loaded and run once), and "eager" (PyTorch).
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hcmen.base.console import one_line
from hcmen.base.errors import BackendError
from hcmen.runtime.benchmark.measure import round_orders

__all__ = ["ALL_VARIANTS", "FLOOR", "STEPS", "Cold", "cold_kinds", "floor_kind", "measure_cold"]

FLOOR = "floor"
ALL_VARIANTS = "all variants"
STEPS = ("start", "import", "load", "first")
"""What a start consists of: Python is up; hcmen.runtime, NumPy and onnxruntime (or PyTorch) are imported; the session
is made; the clip is read and scored."""
# The stamp comes before anything is imported: what follows is ours, what is before it is Python's.
_BOOT = "import time; stamp = time.monotonic_ns(); from hcmen.runtime.benchmark.cold_process import main; main(stamp)"


@dataclass
class Cold:
    """What was found of one kind of process. steps_ms: per process, milliseconds of each of STEPS.

    peak_mib, settled_mib, anonymous_mib: resident memory at its largest; after the last call; of that, what is the
    process's own and not a mapped file.
    """

    bundle: str
    kind: str
    threads: int | None
    command: list[str]
    status: str = "ok"
    reason: str = ""
    steps_ms: list[list[float]] = field(default_factory=list)
    peak_mib: list[float] = field(default_factory=list)
    settled_mib: list[float] = field(default_factory=list)
    anonymous_mib: list[float] = field(default_factory=list)

    @property
    def total_ms(self) -> list[float]:
        """Process start to first score."""
        return [sum(steps) for steps in self.steps_ms]


def cold_kinds(
    label: str,
    bundle: str,
    clips: dict[str, str],
    threads: int | None,
    backend: str,
    checkpoint: str | None = None,
    child: str = "",
    *,
    trust_engines: bool = False,
) -> list[Cold]:
    """The kinds of process of one bundle.

    Args:
        label, bundle: its name in the report and its folder. clips: variant -> clip file. threads, backend,
            trust_engines: of the predictor. checkpoint, child: for "eager", the folder and the module that runs it;
            None leaves it out.
    """
    boot = [sys.executable, "-c", _BOOT]

    def made(kind: str, *words: str) -> Cold:
        return Cold(label, kind, threads, [*boot, *words])

    options = json.dumps(
        {"bundle": bundle, "threads": threads, "backend": backend, "trust_engines": trust_engines or None}
    )
    kinds = [made(variant, "run", options, json.dumps({variant: clip})) for variant, clip in clips.items()]
    if len(clips) > 1:
        kinds.append(made(ALL_VARIANTS, "run", options, json.dumps(clips)))
    if checkpoint is not None:
        variant = next(iter(clips))
        eager = {"checkpoint": checkpoint, "child": child, "threads": threads, "variant": variant}
        kinds.append(made(f"eager {variant}", "eager", json.dumps(eager), clips[variant]))
    return kinds


def floor_kind() -> Cold:
    """The process that only imports NumPy and onnxruntime."""
    return Cold("", FLOOR, None, [sys.executable, "-c", _BOOT, FLOOR])


def measure_cold(
    kinds: Sequence[Cold], rounds: int, seed: int, progress: Callable[[str], None] = lambda name: None
) -> None:
    """Runs every kind once uncounted, then `rounds` times in random order; a kind that fails is left out from then on.

    Interrupted, it kills the process that runs and keeps what it has.
    """
    for counted, order in enumerate([list(range(len(kinds))), *round_orders(len(kinds), rounds, seed)]):
        for i in order:
            if kinds[i].status == "ok":
                try:
                    found = _one(kinds[i].command)
                except BackendError as error:
                    kinds[i].status, kinds[i].reason = "failed", str(error)
                else:
                    if counted:
                        _keep(kinds[i], found)
            progress(kinds[i].kind)


def _keep(kind: Cold, found: dict[str, Any]) -> None:
    kind.steps_ms.append(found["steps_ms"])
    for key in ("peak_mib", "settled_mib", "anonymous_mib"):
        if found[key] is not None:
            getattr(kind, key).append(found[key])


def _one(command: Sequence[str]) -> dict[str, Any]:
    """What one fresh process reports; raises BackendError with its last line when it fails."""
    started = time.monotonic_ns()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            out, err = process.communicate()
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        last = [line for line in err.splitlines() if line.strip()]
        raise BackendError(one_line(last[-1] if last else f"exit code {process.returncode}").removeprefix("error: "))
    report = json.loads(out.splitlines()[-1])
    stamps = [started, *report["stamps_ns"]]
    report["steps_ms"] = [round((b - a) / 1e6, 3) for a, b in itertools.pairwise(stamps)]
    return dict(report)
