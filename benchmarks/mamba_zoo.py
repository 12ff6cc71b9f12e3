"""Other people's Mamba models, one after the other: built from their authors' code, exported, verified and timed.

    python benchmarks/mamba_zoo.py --list
    python benchmarks/mamba_zoo.py --repos FOLDER --out docs/results/mamba_zoo.json
    python benchmarks/mamba_zoo.py --repos FOLDER --only Vim,SEMamba

FOLDER has one folder for each repository, named as it is: `git clone https://github.com/hustvl/Vim FOLDER/Vim`. Nothing
of them is part of this project. Packages of the index are looked for in --packages as well (default build/zoo), which
`python tests/all/run.py --bring` fills. A family whose code is not there is left out, and one line says what to bring.

Each family is built small, with random weights, by the code as its authors wrote it, under `hcmen.mamba.shim()`;
`hcmen.mamba.export` writes and verifies the file; then four ways of running the example are timed, in turns, on one
thread:

    eager_reference   PyTorch, scans and convolutions by the plain reference
    eager             PyTorch on hcmen's operators
    scan              ONNX Runtime without the library: the functions of the file, ONNX's own Scan
    library           ONNX Runtime with the library

Each family runs in a process of its own, with a time limit, and its row is written when it ends: a run that is broken
off loses one family. With --resume rows that are there stay.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from machine import describe
from zoo import FAMILIES, Family

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 420


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def own_row(family: Family) -> dict[str, Any]:
    """What is known of a family before it runs."""
    return {
        "name": family.name,
        "source": family.source,
        "commit": family.commit,
        "version": None if family.commit else _version(family.source),
        "folders": list(family.folders),
        "packages": list(family.packages),
        "stand_ins": list(family.absent),
        "what": family.what,
        "asked_open": [{str(axis): name for axis, name in axes.items()} for axes in family.dynamic],
        "note": family.note,
        "refused": family.refused,
    }


def run(family: Family, options: argparse.Namespace, lock: Path) -> dict[str, Any]:
    """The row of one family, by a process of its own. lock: a file that only one of them holds while it takes times."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, "-W", "ignore", "-m", "zoo.measure", family.name, "--out", str(out)]
        command += ["--repos", str(options.repos), "--packages", str(options.packages)]
        command += ["--seconds", str(options.seconds), "--lock", str(lock)]
        paths = [str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        environment = {**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        # A session of its own, so that a time limit ends what a family started as well.
        with subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                _, errors = process.communicate(timeout=options.limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return {"state": "failed", "reason": f"it did not end within {options.limit} s"}
        if out.exists():
            return json.loads(out.read_bytes()) | {"wall_s": time.perf_counter() - started}
        last = (errors.strip().splitlines() or [""])[-1]
        return {"state": "failed", "reason": f"its process ended with {process.returncode}: {last}"}


def line(row: dict[str, Any]) -> str:
    """One row for the terminal."""
    if row["state"] != "done":
        return f"{row['name']:<28} {row['state']}: {row['reason']}"
    ms = row["ms"]
    times = "  ".join(f"{ms[name]['median']:9.2f}" for name in ("eager_reference", "eager", "scan", "library"))
    error = max(row["errors"]["library"], row["errors"]["functions"])
    return (
        f"{row['name']:<28} {times}  {row['times_scan']:5.1f} x  off by {error:.0e} of {row['errors']['bound']:.0e}  "
        f"{row['nodes']} nodes  open: {', '.join(row['open_sizes'])}"
    )


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many families do what they shall."""
    done = [row for row in rows if row["state"] == "done"]
    ratios = [row["times_scan"] for row in done]
    return {
        "families": len(rows),
        "done": len(done),
        "refused": [row["name"] for row in rows if row["state"] == "failed" and row["refused"]],
        "failed": [row["name"] for row in rows if row["state"] == "failed" and not row["refused"]],
        "absent": [row["name"] for row in rows if row["state"] == "absent"],
        "slower_than_scan": [row["name"] for row in done if row["times_scan"] < 1],
        "median_times_scan": statistics.median(ratios) if ratios else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repos", type=Path, default=ROOT / "build" / "repos", help="one folder for each repository")
    parser.add_argument("--packages", type=Path, default=ROOT / "build" / "zoo", help="packages of the index")
    parser.add_argument("--only", help="names of families, with commas between")
    parser.add_argument("--seconds", type=float, default=12, help="for timing one family")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for one family, all in all")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time; times are taken one after the other")
    parser.add_argument("--out", type=Path, help="a JSON, written anew after each family")
    parser.add_argument("--resume", action="store_true", help="leave families that --out has as done")
    parser.add_argument("--list", action="store_true", help="where the code of each family must lie, and end")
    options = parser.parse_args()
    names = list(FAMILIES) if options.only is None else [name.strip() for name in options.only.split(",")]
    unknown = [name for name in names if name not in FAMILIES]
    if unknown:
        sys.exit(f"no family {', '.join(unknown)}, expected of {', '.join(FAMILIES)}")
    sys.path.append(str(options.packages))
    if options.list:
        for name in names:
            family = FAMILIES[name]
            print(
                f"{name}: {family.missing(options.repos) or 'all is there'}; tried at {family.commit or 'any version'}"
            )
        return
    data: dict[str, Any] = {}
    if options.resume and options.out and options.out.exists():
        data = json.loads(options.out.read_bytes())
    rows: dict[str, dict[str, Any]] = {row["name"]: row for row in data.get("families", [])}
    wanted = [name for name in names if not (options.resume and rows.get(name, {}).get("state") == "done")]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        started = {pool.submit(run, FAMILIES[name], options, Path(folder) / "lock"): name for name in wanted}
        for future in as_completed(started):
            name = started[future]
            rows[name] = own_row(FAMILIES[name]) | future.result()
            print(line(rows[name]), flush=True)
            ordered = [rows[n] for n in FAMILIES if n in rows]
            data = {"machine": describe(), "threads": 1, "summary": summary(ordered), "families": ordered}
            if options.out:
                options.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(data.get("summary", {}), indent=1))


if __name__ == "__main__":
    main()
