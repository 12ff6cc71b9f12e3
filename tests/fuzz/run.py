"""Fuzzes every parser with fresh seeds and writes what became of it; Ctrl-C ends it early, with what it has.

    python tests/fuzz/run.py --seconds 600 --out docs/results/robustness.json

Each parser gets as much time as the others. What should not have happened is kept in build/fuzz, one file for each
place in the sources, with what was told beside it. Exit code 1 if there is any. `--only NAME --seed N` repeats.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz.formats import FORMATS
from fuzz.worker import MOST_BYTES, MOST_SECONDS, Outcome, Worker

__all__ = ["SETTINGS", "Tally", "fuzzed", "main"]

ROOT = Path(__file__).resolve().parents[2]

SETTINGS = settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
_BATCH = settings(SETTINGS, max_examples=100, phases=[Phase.generate])
_FINDINGS = ("exit 70", "crash", "hang", "memory", "noise")


def fuzzed(
    worker: Worker, name: str, how: settings, told: Callable[[bytes, Outcome], None], seed: int | None = None
) -> None:
    """Reads mutants of the format `name` and tells of each; where `told` raises, Hypothesis looks for a smaller one."""
    samples = worker.samples(name)

    @how
    @hypothesis.given(st.randoms(use_true_random=False))
    def case(rng: Random) -> None:
        content = FORMATS[name].mutate(rng, rng.choice(samples))
        told(content, worker.attempt(name, content))

    (case if seed is None else hypothesis.seed(seed)(case))()


@dataclass
class Tally:
    """What became of one parser's cases."""

    cases: int = 0
    spent: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    most_seconds: float = 0.0
    most_bytes: int = 0
    findings: dict[str, dict[str, Any]] = field(default_factory=dict)

    def take(self, keep: Path, name: str, seed: int, content: bytes, found: Outcome) -> None:
        """Counts a case; the first finding of each place is kept."""
        self.cases += 1
        self.outcomes[found.kind] += 1
        self.most_seconds = max(self.most_seconds, found.seconds)
        self.most_bytes = max(self.most_bytes, found.bytes)
        if not found.is_finding:
            return
        if found.place not in self.findings:
            self.findings[found.place] = _kept(keep, name, content, found, seed)
            print(f"{found.kind}: {found.place}", file=sys.stderr, flush=True)
        self.findings[found.place]["cases"] += 1

    def to_json(self) -> dict[str, Any]:
        return {
            "cases": self.cases,
            "outcomes": dict(sorted(self.outcomes.items())),
            "most_seconds": round(self.most_seconds, 3),
            "most_mib": round(self.most_bytes / 2**20, 1),
        }


def _kept(folder: Path, name: str, content: bytes, found: Outcome, seed: int) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.replace(' ', '_').replace(':', '')}-{hashlib.sha256(content).hexdigest()[:8]}"
    path.write_bytes(content)
    path.with_name(path.name + ".txt").write_text(f"{found.kind} {found.place}\n{found.detail}\n")
    return {"parser": name, "kind": found.kind, "place": found.place, "file": path.name, "seed": seed, "cases": 0}


def _fuzz(names: Sequence[str], seconds: float, seed: int, keep: Path) -> dict[str, Any]:
    """Turns of `_BATCH` cases, each with the next seed, to the parser that has had the least time."""
    parsers = {name: Tally() for name in names}
    began, turns = time.monotonic(), 0
    ended: list[int] = []
    # An exception could be raised where it is ignored, in Hypothesis' callback of the garbage collector for one.
    before = {
        end: signal.signal(end, lambda number, _: ended.append(number)) for end in (signal.SIGINT, signal.SIGTERM)
    }
    with tempfile.TemporaryDirectory(prefix="hcmen-fuzz-") as folder:
        worker = Worker(Path(folder))
        try:
            while time.monotonic() - began < seconds and not ended:
                name = min(names, key=lambda n: parsers[n].spent)
                start = time.monotonic()

                def told(content: bytes, found: Outcome, name: str = name, seed: int = seed + turns) -> None:
                    parsers[name].take(keep, name, seed, content, found)
                    if ended:
                        raise KeyboardInterrupt

                fuzzed(worker, name, _BATCH, told, seed + turns)
                parsers[name].spent += time.monotonic() - start
                turns += 1
        except KeyboardInterrupt:
            pass
        finally:
            worker.close()
            for end, handler in before.items():
                signal.signal(end, handler)
    outcomes = sum((p.outcomes for p in parsers.values()), Counter[str]())
    return {
        "complete": not ended,
        "seconds": round(time.monotonic() - began, 1),
        "limits": {"seconds": MOST_SECONDS, "mib": MOST_BYTES >> 20},
        "seeds": {"first": seed, "count": turns, "cases_each": _BATCH.max_examples},
        "cases": sum(p.cases for p in parsers.values()),
        "outcomes": dict(sorted(outcomes.items())),
        "findings": {kind: outcomes[kind] for kind in _FINDINGS},
        "most_seconds": round(max(p.most_seconds for p in parsers.values()), 3),
        "most_mib": round(max(p.most_bytes for p in parsers.values()) / 2**20, 1),
        "parsers": {name: p.to_json() for name, p in parsers.items()},
        "places": [found for p in parsers.values() for found in p.findings.values()],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzzes, prints a line for each parser, writes the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--only", metavar="NAME", action="append", choices=list(FORMATS), help="these parsers alone")
    parser.add_argument("--seed", type=int, default=None, help="of the first turn; drawn if not given")
    parser.add_argument("--keep", type=Path, default=ROOT / "build" / "fuzz", help="where findings go")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args(arguments)
    hypothesis.configuration.set_hypothesis_home_dir(tempfile.gettempdir())
    result = _fuzz(a.only or list(FORMATS), a.seconds, secrets.randbits(32) if a.seed is None else a.seed, a.keep)
    for name, found in result["parsers"].items():
        told = ", ".join(f"{count} {kind}" for kind, count in found["outcomes"].items())
        print(f"{name}: {told}; at most {found['most_seconds']} s, {found['most_mib']} MiB")
    if a.out:
        sys.path.insert(0, str(ROOT / "benchmarks"))
        from machine import describe

        from hcmen.runtime.benchmark.machine import versions

        here = describe()
        here["versions"] |= versions(("hypothesis", "safetensors", "tokenizers"))
        whole = {"schema_version": 1, "what": (__doc__ or "").splitlines()[0], "machine": here, **result}
        a.out.write_text(json.dumps(whole, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("complete", "seconds", "cases", "findings")}))
    return 1 if any(result["findings"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
