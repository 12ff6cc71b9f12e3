"""Every parser against mutants of valid files: read, or refused as documented, in bounded time and memory.

The seeds are fixed: a run is the same as the one before. `make fuzz` runs longer, with fresh ones.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fuzz.worker
import pytest
from fuzz.formats import FORMATS, Format
from fuzz.mutate import havoc
from fuzz.run import ROOT, SETTINGS, Tally, fuzzed, main
from fuzz.worker import Outcome, Worker
from hypothesis import settings

_HOW = settings(SETTINGS, max_examples=200, derandomize=True)
pytestmark = pytest.mark.fuzz


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    made = Worker(tmp_path_factory.mktemp("fuzz"))
    yield made
    made.close()


@pytest.mark.parametrize("name", [pytest.param(name, id=name.replace(" ", "_")) for name in FORMATS])
def test_mutants_are_read_or_refused(worker: Worker, name: str, tmp_path: Path) -> None:
    kinds: set[str] = set()

    def told(content: bytes, found: Outcome) -> None:
        kinds.add(found.kind)
        if found.is_finding:
            (tmp_path / "finding").write_bytes(content)
            pytest.fail(f"{tmp_path / 'finding'}: {found.kind} {found.place}\n{found.detail}")

    fuzzed(worker, name, _HOW, told)
    # Mutants that are all refused, or all read, would have come to one place alone.
    assert len(kinds) > 1


# --- the fuzzer itself ----------------------------------------------------------------------------------------------

# Reads a file by what it says: each way of going wrong.
CHILD = f"""
import os, signal, sys, time, warnings
sys.path.insert(0, {str(ROOT / "tests")!r})
import fuzz.worker
from fuzz.formats import FORMATS, Format

def read(folder):
    way = (folder / "file").read_text()
    if way == "raise":
        return 1 // 0
    if way == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if way == "sleep":
        time.sleep(60)
    if way == "fill":
        return len(b"x" * (3 << 29))
    if way == "flood":
        return len(b"x" * (1 << 40))
    if way == "warn":
        warnings.warn("look", RuntimeWarning)

FORMATS["faulty"] = Format("faulty", "file", lambda folder: [b"good"], read, None)
fuzz.worker.main()
"""


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """A child whose parser goes wrong as its file says."""
    (tmp_path / "child.py").write_text(CHILD)
    (tmp_path / "folder").mkdir()
    monkeypatch.setitem(FORMATS, "faulty", Format("faulty", "file", lambda _: [b"good"], lambda _: None, havoc))
    made = Worker(tmp_path / "folder", tmp_path / "child.py")
    yield made
    made.close()


def test_what_goes_wrong_is_seen_and_the_next_case_is_read(faulty: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    for way, kind, says in (
        ("raise", "exit 70", "ZeroDivisionError"),
        ("die", "crash", "SIGSEGV"),
        ("sleep", "hang", "more than 2 s"),
        ("fill", "memory", ""),
        ("flood", "exit 70", "MemoryError"),
        ("warn", "noise", "RuntimeWarning: look"),
    ):
        with monkeypatch.context() as patience:
            if kind == "hang":  # alone: a busy machine takes seconds to fill the memory or to start a child
                patience.setattr(fuzz.worker, "MOST_SECONDS", 2.0)
            found = faulty.attempt("faulty", way.encode())
        assert found.kind == kind, found
        assert found.is_finding
        assert says in found.detail
        good = faulty.attempt("faulty", b"good")
        assert (good.kind, good.is_finding) == ("ok", False)
        assert good.bytes < 1 << 24


def test_a_finding_is_kept(faulty: Worker, tmp_path: Path) -> None:
    found = faulty.attempt("faulty", b"raise")
    counted = Tally()
    for _ in range(3):
        counted.take(tmp_path / "kept", "faulty", 7, b"raise", found)
    (place,) = counted.findings.values()
    assert (place["kind"], place["cases"], place["seed"]) == ("exit 70", 3, 7)
    assert (tmp_path / "kept" / place["file"]).read_bytes() == b"raise"
    assert "ZeroDivisionError" in (tmp_path / "kept" / f"{place['file']}.txt").read_text()
    assert counted.to_json()["outcomes"] == {"exit 70": 3}


def test_what_is_said_of_security_is_the_result() -> None:
    found = json.loads((ROOT / "docs" / "results" / "robustness.json").read_bytes())
    said = re.search(
        r"more than ([\d,]+) hostile files, none of which may take (\d+) s, or (\d+) MiB",
        " ".join((ROOT / "SECURITY.md").read_text().split()),
    )
    assert said is not None
    assert found["cases"] > int(said[1].replace(",", ""))
    assert found["limits"] == {"seconds": int(said[2]), "mib": int(said[3])}
    assert found["complete"]
    assert not any(found["findings"].values())
    assert set(found["parsers"]) == set(FORMATS)
    assert all(parser["cases"] for parser in found["parsers"].values())


def test_a_run_writes_what_became_of_the_cases(tmp_path: Path) -> None:
    out, kept = tmp_path / "robustness.json", tmp_path / "kept"
    told = ["--seconds", "2", "--only", "engine key", "--only", "graph", "--out", str(out), "--keep", str(kept)]
    assert main(told) == 0
    found = json.loads(out.read_text())
    assert found["complete"]
    assert found["cases"] == sum(p["cases"] for p in found["parsers"].values()) == sum(found["outcomes"].values()) > 100
    assert set(found["parsers"]) == {"engine key", "graph"}
    assert found["findings"] == {"exit 70": 0, "crash": 0, "hang": 0, "memory": 0, "noise": 0}
    assert found["seeds"]["count"] >= 2
    assert {"hypothesis", "numpy", "hcmen"} <= found["machine"]["versions"].keys()
    assert not kept.exists()


def test_a_run_that_is_interrupted_writes_what_it_has(tmp_path: Path) -> None:
    out = tmp_path / "robustness.json"
    script = str(ROOT / "tests" / "fuzz" / "run.py")
    process = subprocess.Popen(
        [sys.executable, script, "--seconds", "500", "--only", "engine key", "--out", str(out)],
        stdout=subprocess.PIPE,
        text=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until = time.monotonic() + 60
    while not children.read_text() and time.monotonic() < until:  # the worker has not begun
        time.sleep(0.1)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    found = json.loads(out.read_text())
    assert not found["complete"]
    assert "engine key: " in told
