"""From process start to the first score: seconds and resident memory, in fresh processes.

    python benchmarks/cold_start.py --bundle build/bundle --clip samples/clip.npz --out docs/results/cold_start.json

Three processes take turns, so that a slow moment of the machine meets all of them: a Python that only imports NumPy and
onnxruntime (what no runtime on top of them can undercut), `hcmen-run`, and eager PyTorch on the same clip.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import describe

EAGER = """
import sys
from pathlib import Path
import numpy as np, torch
from hcmen.checkpoint import load_checkpoint
model, _ = load_checkpoint(Path(sys.argv[1]))
clip = np.load(sys.argv[2])
features = {m: torch.from_numpy(clip[m])[None] for m in ("text", "audio", "vision")}
with torch.inference_mode():
    print(model(features, {m: torch.tensor([x.shape[1]]) for m, x in features.items()}).score.item())
"""


def measure(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident MiB of one process and its children's worst."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        assert process.stderr is not None
        sys.exit(f"{' '.join(command[:3])} failed: {process.stderr.read().decode(errors='replace')}")
    return seconds, usage.ru_maxrss / 1024


def main() -> None:
    """Runs the rounds and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=Path("build/bundle"))
    parser.add_argument("--train", type=Path, default=Path("build/train"))
    parser.add_argument("--clip", type=Path, default=Path("samples/clip.npz"))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()

    commands = {
        "import numpy and onnxruntime": [sys.executable, "-c", "import numpy, onnxruntime"],
        "hcmen-run": [str(Path(sys.executable).parent / "hcmen-run"), str(a.clip), "--bundle", str(a.bundle)],
        "eager PyTorch": [sys.executable, "-c", EAGER, str(a.train), str(a.clip)],
    }
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for command in commands.values():
        measure(command)  # the first run fills the file cache
    for _ in range(a.rounds):
        for name, command in commands.items():
            samples[name].append(measure(command))
    rows: list[dict[str, Any]] = []
    for name, values in samples.items():
        seconds, mebibytes = zip(*values, strict=True)
        rows.append(
            {
                "process": name,
                "n": len(values),
                "seconds_median": round(statistics.median(seconds), 3),
                "seconds_max": round(max(seconds), 3),
                "peak_resident_mib_median": round(statistics.median(mebibytes), 1),
                "peak_resident_mib_max": round(max(mebibytes), 1),
            }
        )
        print(
            f"{name:30}  {rows[-1]['seconds_median']:6.3f} s  {rows[-1]['peak_resident_mib_median']:7.1f} MiB  "
            f"(medians of {len(values)})"
        )
    if a.out:
        result = {"schema_version": 1, "what": __doc__.splitlines()[0], "machine": describe(), "rows": rows}
        a.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
