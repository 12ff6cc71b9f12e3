"""benchmarks/mixing_study.py: runs are added one by one, and a second start does only what is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "mixing_study.py"


def study(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--epochs", "1", "--held-out", "8", "8", "--out", str(out), *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        timeout=120,
        check=False,
    )


def test_one_epoch_of_it(tmp_path: Path) -> None:
    out = tmp_path / "study.json"
    few = ("--sizes", "12", "--arms", "none", "ms-mix", "--seeds")
    begun = study(out, *few, "0")
    assert begun.returncode == 0, begun.stderr
    before = json.loads(out.read_bytes())
    assert [(r["arm"], r["samples"], r["seed"]) for r in before["runs"]] == [("none", 12, 0), ("ms-mix", 12, 0)]
    assert before["runs"][0]["full"] != before["runs"][1]["full"]

    # A mark that only a run of its own would lose; the third run is the one that is missing.
    before["runs"][0]["full"]["mae"] = 1.25
    out.write_text(json.dumps(before))
    went_on = study(out, *few, "0", "1")
    assert went_on.returncode == 0, went_on.stderr
    runs = json.loads(out.read_bytes())["runs"]
    assert runs[:2] == before["runs"]
    assert [(r["arm"], r["seed"]) for r in runs] == [("none", 0), ("ms-mix", 0), ("none", 1), ("ms-mix", 1)]

    rows = [
        [c.strip() for c in line.split("|")[1:-1]]
        for line in out.with_suffix(".md").read_text(encoding="utf-8").splitlines()
    ]
    found = {row[1]: row for row in rows if len(row) == 7 and row[0] == "12"}
    assert went_on.stdout == out.with_suffix(".md").read_text(encoding="utf-8")
    for name in ("none", "ms-mix"):
        one, two = (r["missing"]["mae"] for r in runs if r["arm"] == name)
        assert found[name][2] == "2"
        assert found[name][5] == f"{(one + two) / 2:.3f} ± {abs(one - two) / 2**0.5:.3f}"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [(("--arms", "mixdown"), 2, "unknown arm 'mixdown'"), (("--study", "ablations"), 1, "choose another --out")],
)
def test_other_settings_are_refused(tmp_path: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    settings = {"study": "mixing", "preset": "tiny", "epochs": 1, "set": [1600, 8, 8]}
    (tmp_path / "study.json").write_text(json.dumps({"settings": settings, "runs": []}))
    done = study(tmp_path / "study.json", *arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
