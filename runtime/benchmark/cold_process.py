"""What a fresh process of `hcmen-bench --cold` does: nothing before its start is stamped, and few imports but ours.

The arguments, after the stamp that the boot line takes before any import:

    floor                                   imports NumPy and onnxruntime
    run OPTIONS {variant: clip file}        loads the variants of a bundle, scores each clip, then 20 more times
    eager OPTIONS clip                      scores the clip with PyTorch, in the module that OPTIONS names

It prints one JSON object: when each step was over on CLOCK_MONOTONIC, and the memory it holds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

__all__ = ["main"]

_SETTLED_CALLS = 20


def main(started: int) -> None:
    """Does what the arguments say and prints the report. started: the first stamp, taken before any import."""
    what, *words = sys.argv[1:]
    try:
        steps: dict[str, Callable[..., list[int]]] = {"floor": _floor, "run": _run, "eager": _eager}
        stamps = steps[what](*words)
    except Exception as error:
        from hcmen.base.console import describe_error

        line, code = describe_error(error)
        print(line, file=sys.stderr)
        sys.exit(code)
    memory = _resident()
    print(json.dumps({"stamps_ns": [started, *stamps], **memory}))


def _floor() -> list[int]:
    import numpy
    import onnxruntime  # noqa: F401

    del numpy
    now = time.monotonic_ns()
    return [now, now, now]


def _run(options: str, clips: str) -> list[int]:
    given: dict[str, Any] = json.loads(options)
    from hcmen.runtime.predictor import load

    if given["backend"] in ("auto", "ort"):
        import onnxruntime  # noqa: F401 (the backend's own import, made here to be told apart from loading)
    imported = time.monotonic_ns()
    bundle = given.pop("bundle")
    model = load(bundle, **given)
    files: dict[str, str] = json.loads(clips)
    for variant in files:
        model.kernels(variant)
    loaded = time.monotonic_ns()
    for variant, path in files.items():
        model(path, variant=variant)
    scored = time.monotonic_ns()
    for _ in range(_SETTLED_CALLS):
        for variant, path in files.items():
            model(path, variant=variant)
    return [imported, loaded, scored]


def _eager(options: str, clip: str) -> list[int]:
    import importlib

    given: dict[str, Any] = json.loads(options)
    peer = importlib.import_module(given["child"])
    imported = time.monotonic_ns()
    peer.cold(given["checkpoint"], clip, given["variant"], given["threads"] or os.cpu_count() or 1)
    now = time.monotonic_ns()
    return [imported, now, now]


def _resident() -> dict[str, float | None]:
    """Resident memory of this process in MiB: the most it had, what it has, and what of that is no mapped file."""
    sizes: dict[str, float] = {}
    try:
        with open("/proc/self/status") as status:
            for line in status:
                key, _, value = line.strip().partition(":")
                if value.endswith(" kB"):
                    sizes[key] = round(int(value.split()[0]) / 1024, 2)
    except OSError:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # kibibytes, and bytes on macOS
        sizes["VmHWM"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / (1 << 20), 2)
    return {
        "peak_mib": sizes.get("VmHWM"),
        "settled_mib": sizes.get("VmRSS"),
        "anonymous_mib": sizes.get("RssAnon"),
    }
