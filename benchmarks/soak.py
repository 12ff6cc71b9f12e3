"""Many calls in one process: does memory stay where it is?

    python benchmarks/soak.py --bundle BUNDLE --out docs/results/soak.json --picture docs/results/soak.png

Two models (a session per variant each) are called from two threads, each thread calling both in turn, with batches of 1
to 4 clips of random lengths and of random variants. ONNX Runtime's arenas grow to the largest shapes that meet in them
and stay there, so the longest clips run first, on every session. Then, at equal numbers of calls and while none runs,
three things are sampled: bytes that the C heap has handed out (glibc's mallinfo2, over all arenas), blocks that
Python's own allocator has handed out, and resident anonymous memory. The last two thirds of the samples are cut into
eight blocks, each gets a straight line, and the middle slope of the eight is judged: a leak shows in every block, an
arena that grows by 64 KiB when two threads' calls meet in it for the first time shows in one (one run of 2400 calls in
eight has such a step). The first two see any leak after a few hundred calls. Resident memory also holds what is free
between the blocks, which settles over tens of thousands of calls, so it is judged from 50,000 calls on.

--leak N leaks N bytes of the C heap per call, and one Python object with --leak 1, to see them found.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hcmen.base.modalities import variant_named
from hcmen.runtime import Predictor, load

BOUNDS = {"heap_bytes": 2.0, "python_blocks": 0.02, "resident_bytes": 8.0}
"""Most of each per call, beyond twice the standard error of the slope."""
SETTLING = {"heap_bytes": 1 << 14, "python_blocks": 200, "resident_bytes": 0}
"""What may come on top in the whole run, spread evenly: pools and caches that are still filling up."""
RISES = {"heap_bytes": 1 << 19, "python_blocks": 4000, "resident_bytes": 1 << 20}
"""Most that each may rise over the last two thirds, steps included."""
SAMPLES = 120
RESIDENT_FROM_CALLS = 50_000
_FIRST_JUDGED = 1 / 3
_BLOCKS = 8


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (n, ctypes.c_size_t)
        for n in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keep")
    ]


def memory() -> dict[str, int]:
    """What this process holds now; raises OSError or AttributeError without /proc or glibc 2.33."""
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    heap = mallinfo2()
    status = Path("/proc/self/status").read_text()
    return {
        "heap_bytes": heap.uordblks + heap.hblkhd,
        "python_blocks": sys.getallocatedblocks(),
        "resident_bytes": int(status.partition("RssAnon:")[2].split()[0]) * 1024,
    }


def clips_of(model: Predictor, variant: str, rng: np.random.Generator, *, longest: bool) -> list[dict[str, np.ndarray]]:
    """1 to 4 clips of random lengths, or 4 of the longest."""
    clips = []
    for _ in range(4 if longest else int(rng.integers(1, 5))):
        clip = {}
        for m in variant_named(variant).present:
            sizes = model.inputs.modality(m)
            steps = sizes.max_steps if longest else int(rng.integers(1, sizes.max_steps + 1))
            clip[m] = rng.standard_normal((steps, sizes.features), np.float32)
        clips.append(clip)
    return clips


def soak(bundle: Path, calls: int, threads: int, leak: int, progress: bool) -> dict[str, Any]:
    """The samples: calls made, seconds, resident bytes."""
    models = [load(bundle, threads=1) for _ in range(2)]
    variants = models[0].variants
    samples = np.zeros((SAMPLES + 1, 2 + len(BOUNDS)))  # made beforehand, or it would be what grows
    leaked: list[object] = []
    failures: list[BaseException] = []
    barrier = threading.Barrier(threads + 1)
    per_turn = -(-calls // (SAMPLES * threads))

    def work(me: int) -> None:
        rng = np.random.default_rng(me)
        try:
            for model in models:
                for variant in variants:
                    for _ in range(3):
                        model(clips_of(model, variant, rng, longest=True))
            for _ in range(SAMPLES + 1):
                barrier.wait()  # the sample is taken while nothing runs
                barrier.wait()
                for i in range(per_turn):
                    model, variant = models[i % 2], variants[int(rng.integers(len(variants)))]
                    model(clips_of(model, variant, rng, longest=False))
                    if leak:
                        leaked.append(object() if leak == 1 else np.ones(leak, np.uint8))
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for w in workers:
        w.start()
    started = time.perf_counter()
    try:
        for turn in range(SAMPLES + 1):
            barrier.wait()
            held = memory()
            samples[turn] = turn * per_turn * threads, time.perf_counter() - started, *(held[what] for what in BOUNDS)
            barrier.wait()
            if progress and turn % 10 == 0:
                print(f"{turn * per_turn * threads} calls, {held['resident_bytes'] / 2**20:.2f} MiB", file=sys.stderr)
    except threading.BrokenBarrierError:
        raise SystemExit(f"a call failed: {failures}") from None
    for w in workers:
        w.join()
    return judge(samples) | {"threads": threads, "sessions": 2 * len(variants), "models": 2}


def judge(samples: NDArray[np.float64]) -> dict[str, Any]:
    """The middle slopes of what `memory` gives over calls, with standard errors and bounds, and whether all are flat.

    Args:
        samples: [sample, (calls, seconds, each of BOUNDS)].
    """
    counts = samples[:, 0]
    late = samples[counts >= _FIRST_JUDGED * counts[-1]]
    blocks = np.array_split(late, _BLOCKS)
    slopes: dict[str, Any] = {}
    for column, (what, bound) in enumerate(BOUNDS.items(), 2):
        each = np.array([np.polyfit(b[:, 0], b[:, column], 1)[0] for b in blocks])
        slope = float(np.median(each))
        # of a median of normal values whose deviation is 1.4826 median absolute deviations
        error = float(np.sqrt(np.pi / 2 / _BLOCKS) * 1.4826 * np.median(np.abs(each - slope)))
        rise = int(late[:, column].max() - late[0, column])
        bound += SETTLING[what] / counts[-1]
        judged = what != "resident_bytes" or counts[-1] >= RESIDENT_FROM_CALLS
        slopes[what] = {
            "per_call": round(slope, 4),
            "standard_error": round(error, 4),
            "bound": round(bound, 4) if judged else None,
            "rise": rise,
            "most": RISES[what] if judged else None,
            "flat": bool(slope - 2 * error <= bound and rise <= RISES[what]) if judged else None,
        }
    return {
        "calls": int(counts[-1]),
        "flat": all(s["flat"] is not False for s in slopes.values()),
        "slopes": slopes,
        "samples": [
            {"calls": int(s[0]), "seconds": round(s[1], 2), **dict(zip(BOUNDS, map(int, s[2:]), strict=True))}
            for s in samples
        ],
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Resident memory over calls."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 2.6), layout="constrained")
    calls = [s["calls"] / 1000 for s in result["samples"]]
    axes.plot(calls, [s["resident_bytes"] / 2**20 for s in result["samples"]], color="#2a6f97")
    axes.set(xlabel="thousand calls", ylabel="resident MiB", xlim=(0, calls[-1]))
    axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
    axes.set_title(
        f"{result['threads']} threads, {result['sessions']} sessions: "
        f"{result['slopes']['resident_bytes']['per_call']:+.2f} bytes a call",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Runs the calls, writes the JSON and the picture; exit code 1 if memory grew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=Path("build/bundle"))
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--leak", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    a = parser.parse_args()
    result = soak(a.bundle, a.calls, a.threads, a.leak, progress=a.out is not None)
    if a.out:
        from machine import describe

        whole = {"schema_version": 1, "what": __doc__.splitlines()[0], "machine": describe(), **result}
        a.out.write_text(json.dumps(whole, indent=1) + "\n")
    if a.picture:
        draw(result, a.picture)
    print(json.dumps({k: v for k, v in result.items() if k != "samples"}))
    sys.exit(0 if result["flat"] else 1)


if __name__ == "__main__":
    main()
