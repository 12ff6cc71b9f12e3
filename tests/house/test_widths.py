"""What commands print on a terminal is no wider than it is; through a pipe it is whole."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from hcmen.base.bundle import read_bundle
from hcmen.base.shipped import DEMO
from hcmen.base.tables import aligned, fitted, folded

CLIP = Path(__file__).resolve().parents[2] / "samples" / "clip.npz"
BUNDLE = str(DEMO / "bundle")

MEASURE = [
    *("bench", "--bundle", BUNDLE, "--bundle", "other", "--variant", "full", "--against", "functions"),
    *("--rounds", "2", "--calls", "2", "--warmup", "1", "--loads", "1", "--cold", "--cold-rounds", "1"),
]
COMMANDS = {
    "doctor": ["doctor", "--bundle", "broken"],
    "run": ["run", str(CLIP), "a much longer name of a clip than anybody would give.npz", "--bundle", BUNDLE],
    "run --check": ["run", str(CLIP), "--check", "--checkpoint", str(DEMO / "train"), "--bundle", BUNDLE],
    "run --self-test": ["run", "--self-test", "-v", "--bundle", BUNDLE],
    "bench": ["bench", "--show", "new.json"],
    "bench --compare": ["bench", "--show", "new.json", "--compare", "new.json"],
    "eval": ["eval", "--protocol", "fixed", "--protocol", "imbalanced", "--no-pictures"],
}
# What a user runs the command for: never left out.
NEEDED = {
    "doctor": ["FAILED", "weights.bin: sha256", "fix: ", "copy or export the bundle again", "SelectiveScan, kernel"],
    "run": ["clip", "variant", "score", "a much longer name of a", "give.npz", "full", "-3 (negative) to 3 (positive)"],
    "run --check": ["eager", "passed"],
    "run --self-test": ["vision_missing", "passed"],
    "bench": ["p50", "ratio", "functions", "first score s", "fresh process"],
    "bench --compare": ["new/old", "verdict"],
    "eval": ["MAE (floor)", "text_missing", "Written to"],
}


def on_terminal(columns: int, arguments: Sequence[str], folder: Path) -> tuple[str, int]:
    """What the command writes to a stdout that is a terminal of `columns`, and its exit code."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-m", "hcmen", *arguments],
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )
    os.close(theirs)
    text = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # how Linux says that the other side is closed
            break
        if not part:
            break
        text += part
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;]*m", "", text.decode()).replace("\r\n", "\n"), process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("widths")
    shutil.copy(CLIP, made / COMMANDS["run"][2])
    shutil.copytree(BUNDLE, made / "other")
    shutil.copytree(BUNDLE, made / "broken")
    with open(made / "broken" / "weights.bin", "r+b") as file:
        file.write(b"damage")
    return made


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("name", COMMANDS)
def test_no_line_is_longer_than_the_terminal_and_nothing_needed_is_lost(folder: Path, name: str, columns: int) -> None:
    if name.startswith("bench") and not (folder / "new.json").exists():
        on_terminal(80, [*MEASURE, "--out", "new.json"], folder)
    text, code = on_terminal(columns, COMMANDS[name], folder)
    assert code == (1 if name == "doctor" else 0), text
    assert max(map(len, text.splitlines())) <= columns, text
    whole = re.sub(r"\s+", " ", text)
    for needed in NEEDED[name]:
        assert needed in whole or needed.replace(" ", "") in whole.replace(" ", ""), text


@pytest.mark.parametrize("name", ["doctor", "run", "eval"])
def test_a_pipe_gets_all_columns(folder: Path, name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hcmen", *COMMANDS[name]],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "COLUMNS": "40", "OMP_NUM_THREADS": "1"},
    )
    assert "left out" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) > 120
    heads = {"doctor": "ok       python", "run": "clip  ", "eval": "setting  "}
    assert any(line.startswith(heads[name]) for line in done.stdout.splitlines())


@pytest.mark.parametrize("columns", [60, 80, 120, None])
def test_the_tables_after_a_training_and_an_export_fit_as_well(columns: int | None) -> None:
    from hcmen.export.report import table
    from hcmen.training.report import scores_text

    report = json.loads((DEMO / "train" / "report.json").read_text(encoding="utf-8"))
    trained = scores_text(report, "hcmen", columns)
    exported = table(read_bundle(DEMO / "bundle").manifest, columns)
    if columns is not None:
        assert max(map(len, [*trained.splitlines(), *exported.splitlines()])) <= columns
    assert "MAE" in trained
    assert (re.search(r"MAE +Corr +Acc-2", trained) is None) == ("left out in" in trained)
    assert "beats the floor" in trained.replace("\n", " ")
    assert exported.splitlines()[0].endswith("parity")
    assert exported.count(" ok") == 7
    assert ("left out" in exported) == (columns in (60, 80))


# --- the layout -------------------------------------------------------------------------------------------------------

ROWS = [["name", "a", "b", "note"], ["x" * 30, "1", "22", "words of some length"], ["y", "333", "4", "-"]]


@pytest.mark.parametrize("width", range(20, 80))
@pytest.mark.parametrize("lay", [lambda w: fitted(ROWS, w), lambda w: fitted(ROWS, w, 4), lambda w: fitted(ROWS, w, 1)])
def test_every_width_holds_and_says_what_is_left_out(lay: Callable[[int], list[str]], width: int) -> None:
    lines = lay(width)
    assert max(map(len, lines)) <= width
    flat = "".join(lines).replace(" ", "")
    assert flat.count("x") >= 30
    told = "".join(lines).partition("left out in")[2]
    for column, value in (("note", "wordsofsomelength"), ("b", "22"), ("a", "333")):
        assert value in flat or column in told.partition(":")[2]


def test_the_least_needed_go_first_and_the_table_stays_as_it_is_where_it_fits() -> None:
    assert fitted(ROWS, None) == fitted(ROWS, 1000) == aligned(ROWS)
    lines = fitted(ROWS, 54, least=("a",))
    assert lines[-1] == "left out in 54 columns: a"
    assert "words of some length" in "\n".join(lines)


def test_a_line_is_folded_without_losing_a_word_or_breaking_an_option() -> None:
    line = "run .venv/bin/hcmen-export --bundle build/bundle --variant audio_missing, then see"
    parts = folded(line, 40, "  ")
    assert " ".join(part.strip() for part in parts) == line
    assert max(map(len, parts)) <= 40
    assert folded(line, None) == [line]
