"""Does `hcmen-bench --compare` cry wolf? The same bundle measured several times, every pair of runs compared.

    python benchmarks/bench_noise.py --bundle build/bundle --runs 6 --out docs/results/bench_noise.json

Nothing changes between the runs, so every verdict but "no difference" is a false one. How much of a true slowdown would
have been seen is asked of the same data: one run of each pair is multiplied by 1.1, 1.2, 1.5 and 2.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import describe

from hcmen.runtime.benchmark.judge import SAME, SLOWER, compare_documents
from hcmen.runtime.benchmark.report import read_document

FACTORS = (1.1, 1.2, 1.5, 2.0)


def scaled(document: dict[str, Any], factor: float) -> dict[str, Any]:
    """The document with every timed call of its rows `factor` times as long; the probe stays."""
    changed = copy.deepcopy(document)
    for row in changed["rows"]:
        for times in filter(None, (row["run"], row["call"])):
            times["rounds_ms"] = [[ms * factor for ms in turn] for turn in times["rounds_ms"]]
    return changed


def main() -> None:
    """Measures, compares all pairs, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=Path("build/bundle"))
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--options", default="--variant full --variant text_only --rounds 30 --calls 5 --loads 0")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    here = describe()
    command = [str(Path(sys.executable).parent / "hcmen-bench"), str(a.bundle), *a.options.split(), "--quiet", "--out"]
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(a.runs):
            path = Path(folder) / f"{i}.json"
            subprocess.run([*command, str(path)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            runs.append(read_document(path))
            print(f"run {i + 1} of {a.runs}: {runs[-1]['seconds']:.0f} s", file=sys.stderr)
    pairs = list(itertools.permutations(runs, 2))
    equal = [v for new, old in pairs for v in compare_documents(new, old)[0]]
    seen = {}
    for factor in FACTORS:
        slower = [v for new, old in pairs for v in compare_documents(scaled(new, factor), old)[0]]
        seen[str(factor)] = round(sum(v.verdict == SLOWER for v in slower) / len(slower), 3)
    result = {
        "schema_version": 1,
        "what": __doc__.splitlines()[0],
        "machine": here,
        "options": a.options,
        "runs": len(runs),
        "comparisons": len(equal),
        "false_verdicts": sum(v.verdict != SAME for v in equal),
        "share_of_slowdowns_seen": seen,
        "p50_ms": {row["name"]: [r["rows"][i]["run"]["p50"] for r in runs] for i, row in enumerate(runs[0]["rows"])},
        "cpu_share_of_others": [r["cpu_time_of_others"]["others_share"] for r in runs],
    }
    a.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({k: result[k] for k in ("comparisons", "false_verdicts", "share_of_slowdowns_seen")}))


if __name__ == "__main__":
    main()
