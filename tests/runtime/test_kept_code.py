"""Compiled code that is kept: this user's alone, whole or not at all, not without end, and never in a run's way."""

from __future__ import annotations

import multiprocessing
import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.command import open_folder, without_privileges

import hcmen.runtime.backends.kept_code as kept_code
from hcmen.runtime.backends.kept_code import KeptCode, cache_folder

KEY = {"engine": "0" * 64, "gpu": "Ada", "sm": 89}


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path) -> Path:
    """Where it lies; nothing is there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hcmen" / "tensorrt-rtx"


@pytest.fixture
def kept(folder) -> Path:
    """The file of KEY, with "code" in it."""
    KeptCode(KEY).write(b"code")
    (file,) = folder.iterdir()
    return file


def told(work: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What `work` gives, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return work(), [str(w.message) for w in caught]


def test_what_is_written_is_read_back_and_closed_to_others(kept, folder):
    assert told(KeptCode(KEY).read) == (b"code", [])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert told(KeptCode(KEY | {"gpu": "Blackwell"}).read) == (b"", [])


def test_nothing_kept_is_no_trouble():
    assert told(KeptCode(KEY).read) == (b"", [])


def test_the_same_content_is_not_written_again(kept):
    one = KeptCode(KEY)
    before = kept.stat().st_ino
    one.read()
    one.write(b"code")
    assert kept.stat().st_ino == before
    one.write(b"more")
    assert kept.stat().st_ino != before
    assert KeptCode(KEY).read() == b"more"


def linked(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


def fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file, 0o600)


UNUSABLE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (lambda f: os.truncate(f, f.stat().st_size - 1), "damaged"),
    "empty": (lambda f: os.truncate(f, 0), "damaged"),
    "one bit": (lambda f: f.write_bytes(f.read_bytes()[:-1] + b"E"), "damaged"),
    "of another kind": (lambda f: f.write_bytes(b"something else"), "damaged"),
    "a link": (linked, "too many levels of symbolic links"),
    "a pipe": (fifo, "not a regular file"),
    "a folder": (lambda f: (f.unlink(), f.mkdir()), "is a directory"),
    "open to others": (lambda f: f.chmod(0o620), "mode 0620, others may use it"),
    "too large": (lambda f: os.truncate(f, kept_code.MOST_BYTES + 1), "bytes, at most"),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_what_may_not_be_used_is_begun_anew_with_one_line(kept, what):
    make, reason = UNUSABLE[what]
    make(kept)
    one = KeptCode(KEY)
    content, lines = told(lambda: (one.read(), one.write(b"new"), one.write(b"newer"))[0])
    assert content == b""
    assert len(lines) == 1
    assert lines[0].startswith(f"{kept}: {reason}" if "bytes" not in reason else f"{kept}: ")
    assert reason in lines[0]
    if what != "a folder":  # in whose place no file can be put, and one line is enough
        assert told(KeptCode(KEY).read) == (b"newer", [])
        assert not kept.is_symlink()


def test_somebody_elses_is_not_used(kept, monkeypatch):
    """As root one may own files of others: here it is this process that becomes somebody else."""
    monkeypatch.setattr(kept_code.os, "geteuid", lambda: 4242)
    one = KeptCode(KEY)
    content, lines = told(lambda: (one.read(), one.write(b"new"))[0])
    assert content == b""
    assert len(lines) == 1
    assert "owned by user" in lines[0]
    monkeypatch.undo()
    assert kept.read_bytes().endswith(b"code")


@pytest.mark.parametrize("what", ["a link", "open to others", "a file"])
def test_an_unsafe_folder_is_not_used(kept, folder, what):
    if what == "open to others":
        folder.chmod(0o770)
    else:
        folder.rename(folder.with_name("elsewhere"))
        if what == "a link":
            folder.symlink_to("elsewhere")
        else:
            folder.touch()
    one = KeptCode(KEY)
    content, lines = told(lambda: (one.read(), one.write(b"new"))[0])
    assert content == b""
    assert len(lines) == 1
    assert lines[0].startswith(f"{folder}: ")
    assert lines[0].endswith("set XDG_CACHE_HOME to a folder of yours that can be written")


def test_without_a_home_or_with_one_that_cannot_be_written(monkeypatch):
    with open_folder() as home:
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        monkeypatch.setenv("HOME", str(home))
        assert cache_folder() == home / ".cache" / "hcmen" / "tensorrt-rtx"
        home.chmod(0o555)
        with without_privileges():
            one = KeptCode(KEY)
            _, lines = told(lambda: (one.read(), one.write(b"code"), one.write(b"more")))
        assert len(lines) == 1
        assert "permission denied, so that compiled code is not kept" in lines[0]
        monkeypatch.setenv("HOME", "nowhere")
        assert cache_folder() is None
        one = KeptCode(KEY)
        content, lines = told(lambda: (one.read(), one.write(b"code"))[0])
        assert content == b""
        assert len(lines) == 1
        assert "no home folder" in lines[0]


def test_a_full_disk_leaves_the_older_file(kept, folder, monkeypatch):
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    one = KeptCode(KEY)
    one.read()
    monkeypatch.setattr(kept_code.os, "replace", full)
    _, lines = told(lambda: (one.write(b"new"), one.write(b"newer")))
    assert len(lines) == 1
    assert "no space left on device" in lines[0]
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parents[1]))
    assert list(folder.iterdir()) == [kept]
    assert KeptCode(KEY).read() == b"code"


def test_too_much_is_not_kept(kept, monkeypatch):
    monkeypatch.setattr(kept_code, "MOST_BYTES", 100)
    one = KeptCode(KEY)
    _, lines = told(lambda: one.write(b"x" * 101))
    assert len(lines) == 1
    assert "101 bytes of compiled code" in lines[0]
    assert KeptCode(KEY).read() == b"code"


def test_the_newest_are_kept_and_reading_makes_new(folder, monkeypatch):
    monkeypatch.setattr(kept_code, "MOST_FILES", 3)
    keys = [KEY | {"sm": i} for i in range(4)]
    for i, key in enumerate(keys[:3]):
        one = KeptCode(key)
        one.write(b"code %d" % i)
        os.utime(folder / one.name, (i, i))
    (folder / "notes").touch()
    KeptCode(keys[0]).read()
    KeptCode(keys[3]).write(b"code 3")
    assert [KeptCode(key).read() for key in keys] == [b"code 0", b"", b"code 2", b"code 3"]
    assert (folder / "notes").exists()  # what is not ours stays


def test_what_killed_writers_left_goes(kept, folder):
    left = folder / f".{'0' * 32}.cache.tmp-00000000"
    left.touch()
    KeptCode(KEY).write(b"new")
    assert not left.exists()


def _write_many(content: bytes) -> None:
    for i in range(30):
        KeptCode(KEY).write(content * (i + 1))


def test_of_several_processes_the_last_ones_file_is_there_whole(folder):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write_many, args=(word,)) for word in (b"one", b"two")]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        content, lines = told(KeptCode(KEY).read)
        assert lines == []
        assert content == content[:3] * (len(content) // 3)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(list(folder.iterdir())) == 1
