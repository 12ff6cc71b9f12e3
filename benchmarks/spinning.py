"""What it costs, and what it brings, that a session's threads spin: latency and processor time per call.

    python benchmarks/spinning.py --bundle BUNDLE --out docs/results/spinning.json

Spinning on and off in turns, in one process, for: one caller without a pause; two callers, each with a session of its
own, at the same time; one caller that pauses for 20 ms, as a live stream does. Medians over rounds of the median
latency, and the least latency seen, which is nearest to what an idle machine gives.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe

from hcmen.base.modalities import MODALITIES
from hcmen.runtime import Predictor, load


def calls(model: Predictor, clip: dict[str, Any], count: int, pause: float, times: list[float]) -> None:
    """Appends the seconds of each call to `times`."""
    for _ in range(count):
        started = time.perf_counter()
        model(clip)
        times.append(time.perf_counter() - started)
        if pause:
            time.sleep(pause)


def main() -> None:
    """Runs the rounds and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=Path("build/bundle"))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=40)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    models = {(s, t): [load(a.bundle, threads=t, spin=s) for _ in range(2)] for s in (True, False) for t in a.threads}
    takes = next(iter(models.values()))[0].inputs
    rng = np.random.default_rng(0)
    sizes = {m: takes.modality(m) for m in MODALITIES}
    clip = {m: rng.standard_normal((s.max_steps, s.features), np.float32) for m, s in sizes.items()}
    for pair in models.values():
        for model in pair:
            calls(model, clip, 3, 0, [])
    seen: dict[tuple[str, bool, int], list[tuple[float, float, float]]] = {}
    for _ in range(a.rounds):
        for key, pair in models.items():
            for what, callers, pause in (("one", 1, 0.0), ("two", 2, 0.0), ("paced", 1, 0.02)):
                times: list[float] = []
                time.sleep(0.05)  # the threads that ran last go to sleep
                before = time.process_time()
                workers = [
                    threading.Thread(target=calls, args=(m, clip, a.calls, pause, times)) for m in pair[:callers]
                ]
                for w in workers:
                    w.start()
                for w in workers:
                    w.join()
                processor = (time.process_time() - before) / len(times)
                seen.setdefault((what, *key), []).append((statistics.median(times), min(times), processor))
    rows = []
    for (what, spin, threads), values in seen.items():
        median, least, processor = zip(*values, strict=True)
        rows.append(
            {
                "callers": what,
                "spin": spin,
                "threads_per_session": threads,
                "latency_median_ms": round(statistics.median(median) * 1e3, 3),
                "latency_least_ms": round(min(least) * 1e3, 3),
                "processor_ms_per_call": round(statistics.median(processor) * 1e3, 3),
                "n": a.rounds * a.calls * (2 if what == "two" else 1),
            }
        )
        print(rows[-1])
    if a.out:
        result = {"schema_version": 1, "what": __doc__.splitlines()[0], "machine": describe(), "rows": rows}
        a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
