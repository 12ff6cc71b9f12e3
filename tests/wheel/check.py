"""Does an installed hcmen work by itself? For an environment with the wheel, numpy, click and onnxruntime alone.

    python tests/wheel/check.py                                      the environment of this interpreter
    python tests/wheel/check.py --python "qemu-aarch64 ... python3" --scripts site/bin    another machine's, emulated
    python tests/wheel/check.py --bundle build/bundle                another bundle than the small one of the tests

No torch and no onnx may be there, and every module of this checkout has to be. hcmen-doctor has to find everything in
order, every variant of the bundle to pass its self-test, and a clip to get the score that the exported golden set has
for it. The demo's bundle, which comes with the wheel, has to pass its self-test where none is named. Prints
one JSON line; exit code 1 and a line on stderr if something is wrong.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
MICRO = Path(__file__).resolve().parents[1] / "files" / "micro_bundle.zip"
FORBIDDEN = ("torch", "onnx", "safetensors", "transformers")
_PROBE = """
import importlib.metadata, importlib.util, json, platform
from hcmen.base.library import library_isa, library_path
from hcmen.data.published import PUBLISHED  # read from a table that the wheel must carry
print(json.dumps({
    "machine": platform.machine(), "python": platform.python_version(), "libc": platform.libc_ver()[1],
    "isa": library_isa(), "library_bytes": library_path().stat().st_size,
    "installed": {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()},
    "forbidden": [n for n in FORBIDDEN if importlib.util.find_spec(n)],
    "missing": [n for n in NAMES if importlib.util.find_spec(n) is None],
}))
"""


def module_names() -> list[str]:
    """The modules of this checkout, by the names that they are imported as."""
    packages = {"hcmen": "hcmen", "hcmen.export": "export", "hcmen.runtime": "runtime"}
    return sorted(
        ".".join(
            (package, *(part for part in path.relative_to(ROOT / folder).with_suffix("").parts if part != "__init__"))
        )
        for package, folder in packages.items()
        for path in (ROOT / folder).rglob("*.py")
    )


class Wrong(Exception):
    """What is not as it should be."""


class Environment:
    """An interpreter and the folder of its scripts."""

    def __init__(self, python: Sequence[str], scripts: Path, timeout_s: int) -> None:
        self.python, self.scripts, self.timeout_s = list(python), scripts, timeout_s

    def run(self, *arguments: str | Path) -> str:
        """What the interpreter prints. Raises Wrong if it fails."""
        # Away from any checkout, whose folder `hcmen` would come before the installed one.
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [*self.python, *map(str, arguments)],
                capture_output=True,
                text=True,
                timeout=self.timeout_s,
                cwd=folder,
            )
        if done.returncode != 0:
            raise Wrong(f"{' '.join(map(str, arguments))[:200]}: exit code {done.returncode}: {done.stderr[-1500:]}")
        return done.stdout

    def command(self, name: str, *arguments: str | Path) -> Any:
        """What one of our commands prints as JSON."""
        return json.loads(self.run(self.scripts / name, *arguments, "--format", "json"))


def golden_clip(bundle: Path, target: Path) -> float:
    """The longest single clip of the golden set, written to `target` as a clip; its score by the eager model."""
    with np.load(bundle / "golden" / "full.npz") as golden:
        singles = [k.split("/")[0] for k in golden.files if k.endswith("/score") and golden[k].shape == (1,)]
        case = max(singles, key=lambda c: sum(golden[k].size for k in golden.files if k.startswith(f"{c}/")))
        clip = {
            m: golden[f"{case}/{m}"][0, : int(golden[f"{case}/{m}_length"][0])] for m in ("text", "audio", "vision")
        }
        score = float(golden[f"{case}/score"][0])
    np.savez(target, **clip)
    return score


def check(environment: Environment, bundle: Path, *, bare: bool, clip: Path | None) -> dict[str, Any]:
    """Facts about the environment and what ran in it. `clip` of None takes one of the golden set. Raises Wrong."""
    facts: dict[str, Any] = json.loads(
        environment.run("-c", f"FORBIDDEN, NAMES = {FORBIDDEN}, {module_names()}{_PROBE}")
    )
    forbidden, missing = facts.pop("forbidden"), facts.pop("missing")
    if missing:
        raise Wrong(f"not installed: {', '.join(missing)}: install this version of hcmen")
    if bare and forbidden:
        raise Wrong(
            f"expected no {' or '.join(forbidden)} beside numpy, click and onnxruntime: take a bare environment"
        )

    doctor = environment.command("hcmen-doctor", "--bundle", bundle)
    rows = {r["name"]: r for r in doctor["rows"]}
    for name in ("kernel library", "SelectiveScan, kernel", "CausalConv1d, kernel", "bundle"):
        if rows[name]["status"] != "ok":
            raise Wrong(f"hcmen-doctor: {name}: {rows[name]['detail']}")
    facts["doctor"] = {"ok": [r["name"] for r in doctor["rows"] if r["status"] == "ok"]}
    facts["doctor"] |= {n: rows[n]["detail"] for n in ("cpu", "SelectiveScan, kernel", "CausalConv1d, kernel")}

    for named in ((), ("--bundle", bundle)):
        tested = environment.command("hcmen-run", *named, "--self-test", "--quiet")["self_test"]
        if len(tested) != 7 or not all(t["passed"] for t in tested.values()):
            raise Wrong(f"the self-test of {named or 'the demo'}: {json.dumps(tested)[:1500]}")
    facts["self_test"] = {variant: t["outputs"]["score"]["max_abs"] for variant, t in tested.items()}
    (score,) = environment.command("hcmen-run", ROOT / "samples" / "clip.npz", "--quiet")["results"]
    facts["demo"] = {"score": score["score"], "variant": score["variant"]}

    with tempfile.TemporaryDirectory() as folder:
        wanted = None
        if clip is None:
            clip = Path(folder) / "clip.npz"
            wanted = golden_clip(bundle, clip)
        (result,) = environment.command("hcmen-run", clip, "--bundle", bundle, "--quiet")["results"]
    facts["clip"] = {"score": result["score"], "variant": result["variant"], "golden": wanted}
    if wanted is not None and not abs(result["score"] - wanted) <= 1e-5 + 1e-5 * abs(wanted):
        raise Wrong(f"the clip's score is {result['score']}, expected {wanted}")
    return facts


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", default=shlex.quote(sys.executable), help="the interpreter, a command line")
    parser.add_argument("--scripts", type=Path, default=Path(sys.executable).parent, help="where hcmen-run lies")
    parser.add_argument("--bundle", type=Path, help="an exported bundle; by default that of tests/files")
    parser.add_argument("--clip", type=Path, help="a clip to score; by default one of the bundle's golden set")
    parser.add_argument("--not-bare", action="store_true", help="let torch and the like be installed")
    parser.add_argument("--timeout", type=int, default=600, metavar="SECONDS", help="for each command")
    options = parser.parse_args(arguments)
    environment = Environment(shlex.split(options.python), options.scripts.absolute(), options.timeout)
    with tempfile.TemporaryDirectory() as folder:
        bundle, clip = options.bundle, options.clip
        if bundle is None:
            bundle = Path(folder)
            with zipfile.ZipFile(MICRO) as archive:
                archive.extractall(bundle)
        try:
            facts = check(environment, bundle.resolve(), bare=not options.not_bare, clip=clip and clip.resolve())
        except (Wrong, OSError, subprocess.TimeoutExpired) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
