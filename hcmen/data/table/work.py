"""The slow part of a conversion, in several processes; what is done of it is kept for one that is stopped.

What is kept lies in a hidden folder beside the output, `.NAME.work`: a file that says of what it is (`key`), and one
per chunk of rows, whole or not at all. It is locked while a conversion uses it, and emptied where it is of another
table or other options. A chunk with a row that cannot be used, or with a clip that has changed since, is done again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from hcmen.base.errors import BackendError, CorruptFileError, HcmenError, InputError
from hcmen.base.files import read_small, refused, write_file
from hcmen.base.records import MOST_MANIFEST_BYTES, JsonFile, parse_json
from hcmen.data.table import clips
from hcmen.data.table.rows import Row
from hcmen.data.table.texts import Words

__all__ = ["Chunks", "work_folder"]

_KEY = "key"
_TEXTS, _CLIPS = 512, 32
"""Rows of a chunk: without clips, and with some."""
_TOKENS = 1 << 16
"""Of a chunk, at most: what is kept of it is read by a reader of small files."""
_LOOKS_SECONDS = 0.2

Entry = dict[str, Any]
"""What is done of a row: ids, types and cut of its text, shapes and file of its clip; or problem and corrupt."""


@contextlib.contextmanager
def work_folder(out: Path, key: Mapping[str, Any]) -> Iterator[Path]:
    """The folder for what is done of the conversion `key` to `out`.

    It stays where the block is stopped, and goes where it ends, or the table is refused.

    Raises:
        InputError: another process converts to `out`, or the place cannot be written.
    """
    folder = Path(os.path.abspath(out)).with_name(f".{out.name}.work")
    content = json.dumps(key, sort_keys=True).encode()
    with refused(folder, "a place for what is done of the conversion", "choose another OUT_DIR"):
        if folder.is_symlink():
            raise InputError("is a link", "a folder of hcmen-convert's own", "remove it", where=str(folder))
        folder.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError("another process converts to it", fix="wait for its end", where=str(out)) from None
        except OSError:
            pass  # a file system without locks
        with refused(folder, "a place for what is done of the conversion", "choose another OUT_DIR"):
            if _content(folder / _KEY) != content:
                for entry in folder.iterdir():
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
                write_file(folder / _KEY, content)
        try:
            yield folder
        except (InputError, CorruptFileError) as error:
            if not isinstance(error.__cause__, OSError):  # of a full disk is all that is done kept
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


class Chunks:
    """The rows of a table in chunks, and what is done of each.

    Attributes:
        resumed: rows that were done before.
    """

    def __init__(self, folder: Path, base: Path, rows: Sequence[Row], words: Words | None):
        """folder: of `work_folder`. base: what the paths of clips start from. words: for texts, if there are any."""
        self._folder, self._base, self._rows, self._words = folder, base, rows, words
        self._size = _CLIPS if rows and rows[0].clip is not None else _TEXTS
        if words is not None:
            self._size = max(1, min(self._size, _TOKENS // words.most))
        self._starts = range(0, len(rows), self._size)
        self.resumed = 0

    def work(self, jobs: int, on_rows: Callable[[int], None]) -> None:
        """Does what is not done yet, in `jobs` processes at most; on_rows: is told how many rows are done."""
        if self._rows and self._rows[0].text is None and self._rows[0].clip is None:
            return
        left = []
        for start in self._starts:
            if (entries := self._kept(start)) is None or any("problem" in entry for entry in entries):
                left.append(start)
            else:
                self.resumed += len(entries)
        on_rows(self.resumed)
        if jobs == 1 or len(left) < 2:
            for start in left:
                on_rows(_make(self._path(start), self._chunk(start), self._base, self._words))
            return
        context = multiprocessing.get_context("fork")
        pool = ProcessPoolExecutor(min(jobs, len(left)), context, _begin, (self._base, self._words))
        running: set[Future[int]] = set()
        try:
            for start in left:
                running.add(pool.submit(_make, self._path(start), self._chunk(start)))
                if len(running) > jobs:
                    running = _one_less(running, on_rows)
            while running:
                running = _one_less(running, on_rows)
        except BrokenProcessPool as error:
            raise BackendError(
                "a process of the conversion was ended from outside", fix="make room in memory, or give fewer --jobs"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def entries(self) -> Iterator[Entry]:
        """What is done of every row, in order; after `work`."""
        for start in self._starts:
            found = self._kept(start)
            if found is None:
                raise InputError("a clip has changed meanwhile", fix="convert again", where=str(self._base))
            yield from found

    def _chunk(self, start: int) -> list[Row]:
        return list(self._rows[start : start + self._size])

    def _path(self, start: int) -> Path:
        return self._folder / f"{start:08d}.json"

    def _kept(self, start: int) -> list[Entry] | None:
        """What is kept of a chunk; None if it is nothing, or not what it was made of."""
        content = _content(self._path(start))
        if content is None:
            return None
        rows = self._chunk(start)
        try:
            entries = parse_json(content, JsonFile(str(self._path(start)), ""))
        except CorruptFileError:
            return None
        if not isinstance(entries, list) or len(entries) != len(rows):
            return None
        return entries if all(map(self._holds, rows, entries)) else None

    def _holds(self, row: Row, entry: Any) -> bool:
        """Whether an entry is one, and of the row's clip as it is now."""
        if not isinstance(entry, dict):
            return False
        if isinstance(entry.get("problem"), str):
            return True
        if row.clip is not None:
            try:
                if entry.get("file") != clips.signature(self._base / row.clip) or not entry["shapes"]:
                    return False
                if not all(type(n) is int and n > 0 for shape in entry["shapes"].values() for n in shape):
                    return False
            except (OSError, KeyError, AttributeError, TypeError):
                return False
        if row.text is None:
            return True
        rows = [entry.get("ids"), entry.get("types", [])]
        numbers = all(isinstance(x, list) and all(type(n) is int and 0 <= n < 1 << 24 for n in x) for x in rows)
        return numbers and bool(rows[0]) and len(rows[1] or rows[0]) == len(rows[0]) and type(entry.get("cut")) is int


def _content(path: Path) -> bytes | None:
    with contextlib.suppress(OSError):
        return read_small(path, MOST_MANIFEST_BYTES)
    return None


def _one_less(running: set[Future[int]], on_rows: Callable[[int], None]) -> set[Future[int]]:
    done, still = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        on_rows(future.result())
    return still


# --- within a process -------------------------------------------------------------------------------------------------

_own: tuple[Path, Words | None] | None = None
"""Of a process of its own: where the paths of clips start, and the tokenizer."""


def _begin(base: Path, words: Words | None) -> None:
    """Ctrl-C is for the process that was started by the user; it tells the others, which end when it does."""
    global _own
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _own = base, words
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process once its parent has; each of them holds the pipe open that would tell the others."""
    while os.getppid() == parent:
        time.sleep(_LOOKS_SECONDS)
    os._exit(1)


def _make(path: Path, rows: list[Row], base: Path | None = None, words: Words | None = None) -> int:
    """Does a chunk and keeps it; how many rows it has."""
    if base is None:
        assert _own is not None
        base, words = _own
    entries = [_entry(row, base, words) for row in rows]
    with refused(path, "a place for what is done of the conversion"):
        write_file(path, json.dumps(entries, separators=(",", ":")).encode())
    return len(rows)


def _entry(row: Row, base: Path, words: Words | None) -> Entry:
    entry: Entry = {}
    try:
        if row.text is not None and words is not None:
            tokens, cut = words(row.text)
            entry = {"ids": tokens[0].tolist(), "cut": cut}
            if tokens[2].any():
                entry["types"] = tokens[2].tolist()
        if row.clip is not None:
            clip = base / row.clip
            with contextlib.suppress(OSError):  # `checked` says it in our words
                entry["file"] = clips.signature(clip)
            entry["shapes"] = clips.checked(clip)
    except HcmenError as error:
        return {"problem": str(error), "corrupt": isinstance(error, CorruptFileError)}
    return entry
