"""A conversion of a table that is stopped goes on, and what is kept of one is never taken for another's."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tables import TEXTS, array, clips, convert, names, rows, split_of, tokens_of, write_words, written

from hcmen.data.table import texts, work

COUNT = 32


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "_TEXTS", 4)
    monkeypatch.setattr(work, "_CLIPS", 4)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    return write_words(tmp_path / "bert")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are made tokens of; at the 14th the user stops it, once."""
    found: list[str] = []
    real = texts.Words.__call__

    def call(self: texts.Words, text: str) -> object:
        if len(found) == 13:
            found.append("")
            raise KeyboardInterrupt
        found.append(text)
        return real(self, text)

    monkeypatch.setattr(texts.Words, "__call__", call)
    return found


def table(folder: Path, *, shift: int = 0) -> Path:
    return written(folder, rows(COUNT, text=lambda i: TEXTS[(i + shift) % 8], split=split_of))


def expected(split: str, *, shift: int = 0, steps: int = 6) -> np.ndarray[Any, Any]:
    return tokens_of([TEXTS[(i + shift) % 8] for i in range(COUNT) if split_of(i) == split], steps)


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"bert", "set.csv", "clips"}


def test_it_goes_on_where_it_was_stopped(tmp_path: Path, words: Path, seen: list[str]) -> None:
    source = table(tmp_path)
    stopped = convert(source, "--text-encoder", words, "--jobs", 1)
    assert (stopped.code, stopped.lines) == (130, ["error: interrupted"])
    assert left(tmp_path) == {".out.work"}
    assert {path.name for path in (tmp_path / ".out.work").iterdir()} == {
        "key", "00000000.json", "00000004.json", "00000008.json"
    }  # fmt: skip
    del seen[:]
    seen += [""] * 14
    outcome = convert(source, "--text-encoder", words, "--jobs", 1)
    assert outcome.code == 0, outcome.err
    assert "goes on where it was stopped: 12 of 32 rows were done" in outcome.lines
    assert seen[14:] == [TEXTS[i % 8] for i in range(12, COUNT)]
    for split in ("train", "valid", "test"):
        np.testing.assert_array_equal(array(tmp_path, split, "text_bert"), expected(split))
    assert left(tmp_path) == {"out"}


def another_table(source: Path, words: Path) -> list[object]:
    table(source.parent, shift=3)
    return []


def fewer_tokens(source: Path, words: Path) -> list[object]:
    return ["--max-tokens", 5]


def another_vocabulary(source: Path, words: Path) -> list[object]:
    path = words / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["vocab"].update({"good": 8, "bad": 7})
    path.write_text(json.dumps(document))
    return []


@pytest.mark.parametrize("change", [another_table, fewer_tokens, another_vocabulary])
def test_what_is_kept_of_another_is_not_taken(
    tmp_path: Path, words: Path, seen: list[str], change: Callable[[Path, Path], list[object]]
) -> None:
    source = table(tmp_path)
    assert convert(source, "--text-encoder", words, "--jobs", 1).code == 130
    outcome = convert(source, "--text-encoder", words, "--jobs", 1, *change(source, words))
    assert outcome.code == 0, outcome.err
    assert "goes on" not in outcome.err
    assert len(seen[14:]) == COUNT
    found = array(tmp_path, "train", "text_bert")
    if change is another_table:
        np.testing.assert_array_equal(found, expected("train", shift=3))
    elif change is fewer_tokens:
        np.testing.assert_array_equal(found, expected("train", steps=5))
    else:
        plain, turned = expected("train"), expected("train")
        turned[:, 0][plain[:, 0] == 7], turned[:, 0][plain[:, 0] == 8] = 8, 7
        np.testing.assert_array_equal(found, turned)
    assert left(tmp_path) == {"out"}


DAMAGE = {
    "no JSON": b"[{",
    "nothing": b"",
    "too few": b"[]",
    "no objects": b"[1,2,3,4]",
    "no tokens": b"[{},{},{},{}]",
    "a token below zero": b'[{"ids":[-1],"cut":0},{"ids":[1],"cut":0},{"ids":[1],"cut":0},{"ids":[1],"cut":0}]',
    "a token as text": b'[{"ids":["a"],"cut":0},{"ids":[1],"cut":0},{"ids":[1],"cut":0},{"ids":[1],"cut":0}]',
    "types of others": b'[{"ids":[1],"types":[0,0],"cut":0}' + b',{"ids":[1],"cut":0}' * 3 + b"]",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_damaged_is_done_again(tmp_path: Path, words: Path, seen: list[str], case: str) -> None:
    source = table(tmp_path)
    assert convert(source, "--text-encoder", words, "--jobs", 1).code == 130
    (tmp_path / ".out.work" / "00000004.json").write_bytes(DAMAGE[case])
    outcome = convert(source, "--text-encoder", words, "--jobs", 1)
    assert outcome.code == 0, outcome.err
    assert "goes on where it was stopped: 8 of 32 rows were done" in outcome.lines
    np.testing.assert_array_equal(array(tmp_path, "train", "text_bert"), expected("train"))


def test_a_clip_that_has_changed_is_read_again(tmp_path: Path, words: Path, seen: list[str]) -> None:
    made = clips(tmp_path, COUNT)
    source = written(
        tmp_path, rows(COUNT, text=lambda i: TEXTS[i % 8], clip=lambda i: f"clips/{i}.npz", split=split_of)
    )
    assert convert(source, "--text-encoder", words, "--jobs", 1).code == 130
    longer = {m: np.ones((9, x.shape[1]), np.float32) for m, x in made[1].items()}
    np.savez(tmp_path / "clips" / "1.npz", **longer)
    outcome = convert(source, "--text-encoder", words, "--jobs", 1)
    assert outcome.code == 0, outcome.err
    assert "goes on where it was stopped: 8 of 32 rows were done" in outcome.lines
    assert array(tmp_path, "train", "audio_lengths")[1] == 9
    np.testing.assert_array_equal(array(tmp_path, "train", "audio")[1, :9], longer["audio"])


def test_a_clip_that_changes_meanwhile_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = clips(tmp_path, 8)
    source = written(tmp_path, rows(clip=lambda i: f"clips/{i}.npz", split=split_of))
    real = work.Chunks.work

    def changing(self: work.Chunks, *arguments: object) -> None:
        real(self, *arguments)
        np.savez(tmp_path / "clips" / "1.npz", **{m: x[:1] for m, x in made[2].items()})

    monkeypatch.setattr(work.Chunks, "work", changing)
    outcome = convert(source, "--jobs", 1)
    assert outcome.code == 2
    assert "has changed" in outcome.lines[-1]
    assert left(tmp_path) == set()


def test_two_at_once_do_not_meet(tmp_path: Path, words: Path) -> None:
    source = table(tmp_path)
    (tmp_path / ".out.work").mkdir()
    descriptor = os.open(tmp_path / ".out.work", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    outcome = convert(source, "--text-encoder", words)
    assert outcome.code == 2
    assert outcome.lines == [f"error: {tmp_path / 'out'}: another process converts to it: wait for its end"]
    os.close(descriptor)
    assert convert(source, "--text-encoder", words).code == 0


def test_no_link_is_followed(tmp_path: Path, words: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("x")
    (tmp_path / ".out.work").symlink_to("elsewhere")
    outcome = convert(table(tmp_path), "--text-encoder", words)
    assert (outcome.code, "is a link" in outcome.err) == (2, True)
    (tmp_path / ".out.work").unlink()
    (tmp_path / ".out.work").mkdir()
    (tmp_path / ".out.work" / "inside").symlink_to(tmp_path / "elsewhere")
    assert convert(table(tmp_path), "--text-encoder", words).code == 0
    assert (tmp_path / "elsewhere" / "precious").read_text() == "x"


def test_a_process_that_is_killed_is_told(tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = texts.Words.__call__

    def call(self: texts.Words, text: str) -> object:
        if os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, text)

    main = os.getpid()
    monkeypatch.setattr(texts.Words, "__call__", call)
    outcome = convert(table(tmp_path), "--text-encoder", words, "--jobs", 2)
    assert outcome.code == 3
    assert outcome.lines == [
        "error: a process of the conversion was ended from outside: make room in memory, or give fewer --jobs"
    ]
    assert left(tmp_path) == {".out.work"}


def started(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    """The command in a process of its own, which waits a little at every text."""
    code = (
        "import time\n"
        "from hcmen.data.table import texts, work\n"
        "from hcmen.data.convert import main\n"
        "real = texts.Words.__call__\n"
        "texts.Words.__call__ = lambda self, text: time.sleep(0.02) or real(self, text)\n"
        "work._TEXTS = 4\n"
        "main()\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=folder,
    )


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_what_is_done_and_no_process(tmp_path: Path, words: Path, sent: signal.Signals) -> None:
    source = written(tmp_path, rows(400, text=lambda i: TEXTS[i % 8], split=split_of))
    arguments = (source, tmp_path / "out", "--text-encoder", words, "--jobs", 2)
    process = started(tmp_path, *arguments)
    until = time.monotonic() + 60
    while len(list(tmp_path.glob(".out.work/*.json"))) < 3 and time.monotonic() < until:
        time.sleep(0.02)
    # To the whole group, as a terminal sends Ctrl-C; the others to the process alone.
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)
    else:
        process.send_signal(sent)
    _, told = process.communicate(timeout=60)
    if sent != signal.SIGKILL:
        assert process.returncode == 128 + sent
        assert told == f"error: {'interrupted' if sent == signal.SIGINT else 'terminated'}\n"
    assert left(tmp_path) == {".out.work"}
    until = time.monotonic() + 60
    while _group_lives(process.pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _group_lives(process.pid)
    outcome = convert(source, "--text-encoder", words)
    assert outcome.code == 0, outcome.err
    assert any(line.startswith("goes on where it was stopped: ") for line in outcome.lines)
    assert len(names(tmp_path, "train")) == 200
    every = tokens_of([TEXTS[i % 8] for i in range(400) if split_of(i) == "test"], 6)
    np.testing.assert_array_equal(array(tmp_path, "test", "text_bert"), every)
    assert left(tmp_path) == {"out"}


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
