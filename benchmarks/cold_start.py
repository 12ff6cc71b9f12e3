"""From process start to the first score: seconds and memory, in fresh processes.

    python benchmarks/cold_start.py --bundle build/bundle --clip samples/clip.npz --out docs/results/cold_start.json

The processes take turns, so that a slow moment of the machine meets all of them: a Python that only imports NumPy and
onnxruntime (what no runtime on top of them can undercut), one that imports the runtime as well, `hcmen-run`, and eager
PyTorch on the same clip. Then one process step by step: where the time goes, and what one session and sessions of all
variants cost in memory. That is proportional set size, in which a page of the weights that several sessions have mapped
counts once.

    python benchmarks/cold_start.py --version NAME=PYTHON --version NAME=PYTHON --bundle BUNDLE --out FILE

sets two installed versions beside each other, on a bundle that both of them read, and adds that to the file. A name may
be a commit's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe

from hcmen.base.bundle import read_bundle
from hcmen.base.clip import write_clip
from hcmen.base.modalities import MODALITIES

EAGER = """
import sys
from pathlib import Path
import numpy as np, torch
from hcmen.training.checkpoint import load_checkpoint
model, _ = load_checkpoint(Path(sys.argv[1]))
clip = np.load(sys.argv[2])
features = {m: torch.from_numpy(clip[m])[None] for m in ("text", "audio", "vision")}
with torch.inference_mode():
    print(model(features, {m: torch.tensor([x.shape[1]]) for m, x in features.items()}).score.item())
"""


STEPS = """
import sys, time
started = float(sys.argv[3])
marks = []
def mark(name):
    marks.append((name, time.time()))
def proportional():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:")) / 1024
mark("start Python")
import numpy
mark("import numpy")
import onnxruntime
mark("import onnxruntime")
base = proportional()
import hcmen.runtime.predictor, hcmen.runtime.backends.ort
mark("import hcmen.runtime")
model = hcmen.runtime.predictor.load(sys.argv[1])
mark("read the manifest")
model._session("full")
mark("verify files, make a session")
model(sys.argv[2])
mark("read the clip, first score")
one = proportional()
for variant in model.variants:
    model(sys.argv[2], variant=variant)
full = proportional()
import json
before = started
for i, (name, at) in enumerate(marks):
    marks[i], before = (name, at - before), at
print(json.dumps({"steps": dict(marks), "memory": [base, one, full]}))
"""


def full_length(bundle: Path) -> dict[str, np.ndarray]:
    """A random clip of the longest that the bundle takes."""
    takes, rng = read_bundle(bundle).manifest.inputs, np.random.default_rng(0)
    return {
        m: rng.standard_normal((takes.modality(m).max_steps, takes.modality(m).features)).astype(np.float32)
        for m in MODALITIES
    }


def step_by_step(bundle: Path, clip: Path, rounds: int) -> dict[str, Any]:
    """Medians of the steps of a cold start, and of memory with one session and with all."""
    seen = []
    for _ in range(rounds):
        command = [sys.executable, "-c", STEPS, str(bundle), str(clip), repr(time.time())]
        seen.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    steps = {name: round(1e3 * statistics.median(s["steps"][name] for s in seen), 1) for name in seen[0]["steps"]}
    base, one, full = (statistics.median(s["memory"][i] for s in seen) for i in range(3))
    return {
        "n": rounds,
        "steps_ms": steps,
        "proportional_mib": {
            "numpy and onnxruntime": round(base, 1),
            "one session more": round(one - base, 1),
            "sessions of all variants more": round(full - base, 1),
            "all over one": round((full - base) / (one - base), 2),
        },
    }


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


def in_turns(commands: dict[str, list[str]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """What `measure` gives for every command and round; each round runs all of them."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for command in commands.values():
        measure(command)  # the first run fills the file cache
    for _ in range(rounds):
        for name, command in commands.items():
            samples[name].append(measure(command))
    return samples


def rows_of(samples: dict[str, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    """Medians and worst of every process, printed as they are made."""
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
            f"{name:36}  {rows[-1]['seconds_median']:6.3f} s  {rows[-1]['peak_resident_mib_median']:7.1f} MiB  "
            f"(medians of {len(values)})"
        )
    return rows


def side_by_side(pythons: dict[str, str], bundle: Path, clip: Path, rounds: int) -> dict[str, Any]:
    """Two installed versions in turns, and the median of the ratios of their rounds, with its quartiles."""
    old, new = pythons
    kinds = {
        "import hcmen.runtime": lambda python: [python, "-I", "-c", "import hcmen.runtime"],
        "import the predictor": lambda python: [python, "-I", "-c", "import hcmen.runtime.predictor"],
        "hcmen-run": lambda python: [str(Path(python).parent / "hcmen-run"), str(clip), "--bundle", str(bundle)],
    }
    commands = {f"{kind}, {name}": of(python) for kind, of in kinds.items() for name, python in pythons.items()}
    samples = in_turns(commands, rounds)
    ratios = {}
    for kind in kinds:
        pairs = zip(samples[f"{kind}, {new}"], samples[f"{kind}, {old}"], strict=True)
        low, middle, high = statistics.quantiles([x[0] / y[0] for x, y in pairs], n=4)
        ratios[f"{kind}, {new} / {old}"] = {"median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}
    print(json.dumps(ratios, indent=1))
    return {"machine": describe(), "rows": rows_of(samples), "ratios_of_seconds": ratios}


def main() -> None:
    """Runs the rounds and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=Path("build/bundle"))
    parser.add_argument("--train", type=Path, default=Path("build/train"))
    parser.add_argument("--clip", type=Path, default=Path("samples/clip.npz"))
    parser.add_argument("--large", type=Path, help="another bundle to go through step by step, of the MOSI preset")
    parser.add_argument("--version", action="append", default=[], metavar="NAME=PYTHON", help="an environment, twice")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()

    if a.version:
        pythons = dict(version.split("=", 1) for version in a.version)
        result = json.loads(a.out.read_text())
        result["versions"] = side_by_side(pythons, a.bundle, a.clip, a.rounds)
        a.out.write_text(json.dumps(result, indent=2) + "\n")
        return

    commands = {
        "import numpy and onnxruntime": [sys.executable, "-c", "import numpy, onnxruntime"],
        "import hcmen.runtime as well": [
            *(sys.executable, "-c", "import numpy, onnxruntime, hcmen.runtime.predictor, hcmen.runtime.backends.ort"),
        ],
        "hcmen-run": [str(Path(sys.executable).parent / "hcmen-run"), str(a.clip), "--bundle", str(a.bundle)],
        "eager PyTorch": [sys.executable, "-c", EAGER, str(a.train), str(a.clip)],
    }
    samples = in_turns(commands, a.rounds)
    rows = rows_of(samples)
    detail = {"demo": step_by_step(a.bundle, a.clip, a.rounds)}
    if a.large:
        with tempfile.TemporaryDirectory() as folder:
            clip = Path(folder) / "clip.npz"
            write_clip(clip, full_length(a.large))
            detail["mosi"] = step_by_step(a.large, clip, a.rounds)
    print(json.dumps(detail, indent=1))
    if a.out:
        result = {
            "schema_version": 1,
            "what": __doc__.splitlines()[0],
            "machine": describe(),
            "rows": rows,
            "step_by_step": detail,
        }
        a.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
