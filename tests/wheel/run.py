"""Builds the sdist and out of it the wheel for this machine, and runs the wheel beside nothing but what it needs.

    python tests/wheel/run.py --out docs/results/wheel.json

Without --out the result lies beside the wheel: a wheel that somebody makes changes no figure of the documentation.

Needs a C++17 compiler, a package index, and NumPy in this interpreter. Exit code 1 if anything fails.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from build import ROOT, bare_environment, build_sdist, build_wheel, describe_wheel

sys.path.insert(0, str(ROOT / "benchmarks"))
from machine import describe

HERE = Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="by default wheel.json in --folder")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "wheel", help="for the wheel and the environment"
    )
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    out = options.out or folder / "wheel.json"
    try:
        sdist = build_sdist(folder.parent / "sdist", folder.parent / "packager")
        wheel = build_wheel(folder, folder.parent / "auditwheel", source=sdist)
        facts = describe_wheel(wheel)
        print(f"{wheel}: {facts['bytes'] / 1024:.0f} KiB, C library from {facts['glibc']} on", flush=True)
        bare = bare_environment(wheel, folder / "bare")
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    command = [sys.executable, HERE / "check.py", "--python", bare["python"], "--scripts", bare["scripts"]]
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        return 1
    ran = json.loads(done.stdout)
    data = {"schema_version": 1, "machine": describe(), "wheel": facts, "ran": ran}
    out.write_text(json.dumps(data, indent=2) + "\n")
    worst = max(ran["self_test"].values())
    print(f"beside {', '.join(sorted(ran['installed']))}:")
    print(f"{len(ran['self_test'])} variants, largest score error {worst:.1e}: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
