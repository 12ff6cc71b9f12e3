"""Latency of a stream's updates over a long recording, and what it holds in memory meanwhile.

    python benchmarks/stream.py --out docs/results/stream.json

The presets tiny (the demo's) and mosi with random weights, exported to --bundles unless they lie there. Each gets
windows as long as the model takes, eight hops a window, pushed in chunks of a tenth of a hop as fast as they are
scored. Latency is from the arrival of the chunk that completes a window to its score; overhead is that without the
graph's run. First and last tenth side by side show that nothing grows with the length of the stream.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
from machine import describe
from soak import memory

from hcmen.runtime import load

PRESETS = {"tiny": Fraction(4), "mosi": Fraction(5)}
"""Seconds of the longest window, which fix the frame rates."""
HOPS = 8


def bundle_of(preset: str, folder: Path) -> Path:
    """A bundle of random weights of that preset, made if it is not there."""
    path = folder / preset
    if not path.exists():
        import torch

        from hcmen.base.console import Console
        from hcmen.base.modalities import variant_named
        from hcmen.export.bundle import export_bundle
        from hcmen.models.hcmen.model import HCMEN
        from hcmen.training.checkpoint import save_checkpoint
        from hcmen.training.config import TrainConfig
        from hcmen.training.presets import preset_named

        torch.manual_seed(0)
        model = HCMEN(preset_named(preset).model).eval()
        with tempfile.TemporaryDirectory() as checkpoint:
            save_checkpoint(Path(checkpoint), model, TrainConfig(), epoch=0, validation={}, dataset={"name": "none"})
            export_bundle(Path(checkpoint), path, [variant_named("text_missing")], console=Console())
    return path


def measure(path: Path, seconds: Fraction, windows: int, threads: int) -> dict[str, Any]:
    """One stream of `windows` windows."""
    model = load(path, threads=threads)
    rates = {m: Fraction(model.inputs.modality(m).max_steps) / seconds for m in ("audio", "vision")}
    hop = seconds / HOPS
    stream = model.stream("text_missing", window=seconds, hop=hop, rates=rates)
    rng = np.random.default_rng(0)
    source = {m: rng.standard_normal((1 << 16, model.inputs.modality(m).features), np.float32) for m in rates}
    sent = dict.fromkeys(rates, 0)
    latency, run = np.zeros(windows), np.zeros(windows)
    held: list[dict[str, int]] = []
    done, step = 0, 0
    while done < windows:
        step += 1
        chunk = {}
        for m, rate in rates.items():
            upto = int(step * hop / 10 * rate)
            start = sent[m] % ((1 << 16) - 4096)
            chunk[m] = source[m][start : start + upto - sent[m]]
            sent[m] = upto
        for update in stream.push(**chunk):
            latency[done], run[done] = update.latency_seconds, update.run_seconds
            done += 1
            if done in (windows // 10, windows):
                held.append(memory())
            if done == windows:
                break

    def milliseconds(values: Any) -> dict[str, float]:
        named = {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}
        return {k: round(v * 1e3, 3) for k, v in {**named, "longest": float(values.max())}.items()}

    tenth = windows // 10
    return {
        "threads": threads,
        "window_seconds": float(seconds),
        "hop_seconds": float(hop),
        "frames_per_window": {m: model.inputs.modality(m).max_steps for m in rates},
        "stream_seconds": float(step * hop / 10),
        "n": windows,
        "latency_ms": milliseconds(latency),
        "latency_first_tenth_ms": milliseconds(latency[:tenth]),
        "latency_last_tenth_ms": milliseconds(latency[-tenth:]),
        "overhead_ms": milliseconds(latency - run),
        "heap_bytes_gained_after_first_tenth": held[1]["heap_bytes"] - held[0]["heap_bytes"],
        "resident_bytes_gained_after_first_tenth": held[1]["resident_bytes"] - held[0]["resident_bytes"],
        "counts": vars(stream.counts),
    }


def main() -> None:
    """Measures and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundles", type=Path)
    parser.add_argument("--windows", type=int, nargs=2, default=(20_000, 1_000), help="of tiny and of mosi")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = a.bundles or Path(temporary)
        rows = {}
        for (preset, seconds), windows in zip(PRESETS.items(), a.windows, strict=True):
            path = bundle_of(preset, folder)
            print(f"{preset}: {windows} windows", file=sys.stderr)
            rows[preset] = measure(path, seconds, windows, a.threads)
            print(json.dumps(rows[preset], indent=1))
    if a.out:
        result = {"schema_version": 1, "what": __doc__.splitlines()[0], "machine": describe(), "presets": rows}
        a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
