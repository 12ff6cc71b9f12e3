"""Runs parsers in a child process that many cases share: a crash, a hang or a flood of memory costs one case.

    python tests/fuzz/worker.py FOLDER DESCRIPTOR    the child

The child tells of each case what became of it, how long it took and by how much its resident memory rose, by the
kernel's high-water mark, which is set back before each case. Beyond `_MOST_ADDRESSES` it is refused memory, so that the
machine stays in use. The parent kills it after `MOST_SECONDS`, and starts another one.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz.formats import FORMATS

from hcmen.base.console import one_line
from hcmen.base.errors import HcmenError

__all__ = ["DOCUMENTED", "MOST_BYTES", "MOST_SECONDS", "Outcome", "Worker", "main", "put"]

MOST_SECONDS = 20.0
MOST_BYTES = 1 << 30
"""Of resident memory that a case may take beside what the process holds already: Python, NumPy, PyTorch."""
_MOST_ADDRESSES = 4 << 30
DOCUMENTED = ("ok", "exit 1", "exit 2", "exit 3", "exit 5")
"""What a file may come to. Exit 1 is a golden set whose numbers differ."""


@dataclass(frozen=True)
class Outcome:
    """kind: one of DOCUMENTED, or "exit 70", "crash", "hang", "memory", "noise". detail: the line, or the traceback.

    place: where in the sources it came to that; the same fault comes to it again.
    """

    kind: str
    detail: str = ""
    seconds: float = 0.0
    bytes: int = 0
    place: str = ""

    @property
    def is_finding(self) -> bool:
        return self.kind not in DOCUMENTED


class Worker:
    """The child, started when it is needed and again after it died."""

    def __init__(self, folder: Path, child: Path = Path(__file__)) -> None:
        """`folder`: an empty folder, in which each format gets one of its own. child: the script that is run."""
        self.folder, self._child = folder, child
        self._samples: dict[str, Sequence[bytes]] = {}
        self._warm: set[str] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self._log = folder / "worker.log"

    def samples(self, name: str) -> Sequence[bytes]:
        """Valid contents of the format `name`, whose folder is made when they are first asked for."""
        if name not in self._samples:
            folder = self.folder / name
            folder.mkdir()
            self._samples[name] = FORMATS[name].prepare(folder)
            (folder / FORMATS[name].file).parent.mkdir(parents=True, exist_ok=True)
        return self._samples[name]

    def attempt(self, name: str, content: bytes | Callable[[Path], object], *, again: bool = True) -> Outcome:
        """What reading a file of the format `name` comes to: of that content, or that is made so.

        What takes too long is tried once more, in a fresh child: the machine may have been busy.
        """
        valid = self.samples(name)[0]
        if self._process is None:
            self._start()
        if name not in self._warm:  # what is imported belongs to no case
            self._warm.add(name)
            found = self._asked(name, valid)
            if found is None or found.kind != "ok":
                raise RuntimeError(f"a valid file of '{name}' is not read: {found}")
        found = self._asked(name, content)
        if found is None and again:
            return self.attempt(name, content, again=False)
        return found or Outcome("hang", f"more than {MOST_SECONDS:g} s", MOST_SECONDS, place=f"{name}: hang")

    def close(self) -> None:
        """Ends the child."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._connection.close()
            self._process = None
            self._warm.clear()

    def _asked(self, name: str, content: bytes | Callable[[Path], object]) -> Outcome | None:
        """The child's answer; None, and no child any more, where none came in time."""
        assert self._process is not None
        put(self.folder / name / FORMATS[name].file, content)
        began = time.monotonic()
        try:
            self._connection.send(name)
            if self._connection.poll(MOST_SECONDS):
                return Outcome(*self._connection.recv())
        except (EOFError, OSError):
            code = self._process.wait()
            told = self._log.read_text(errors="replace")[-2000:]
            self.close()
            how = signal.Signals(-code).name if code < 0 else f"exit {code}"
            return Outcome("crash", f"{how}\n{told}", time.monotonic() - began, place=f"{name}: {how}")
        self.close()
        return None

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(self._child), str(self.folder), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            )
        theirs.close()
        if not self._connection.poll(120):
            self.close()
            raise RuntimeError(f"the child does not start: {self._log.read_text()[-2000:]}")
        self._connection.recv()


def put(path: Path, content: bytes | Callable[[Path], object]) -> None:
    """Makes `path` anew: a file of that content, or what the function makes."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)


# --- the child ------------------------------------------------------------------------------------------------------


def _status(key: str) -> int:
    """A size of this process in bytes, as /proc/self/status has it."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))


def _attempt(folder: Path, name: str) -> Outcome:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark is what there is now
    before, began, detail, place = _status("VmRSS"), time.perf_counter(), "", ""
    with warnings.catch_warnings(record=True) as noise:
        warnings.simplefilter("default")
        try:
            FORMATS[name].read(folder / name)
            kind = "ok"
        except HcmenError as error:
            kind, detail = f"exit {error.exit_code}", str(error)
            if "\n" in detail or len(one_line(error)) > 1500:
                kind, place = "noise", f"{name}: a message"
        except BaseException as error:
            # A Rust panic is a BaseException of its own; Ctrl-C does not come here, the child is in a session apart.
            kind, detail = "exit 70", "".join(traceback.format_exception(error, limit=-8))[-3000:]
            last = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in last if "/tests/fuzz/" not in frame.filename] or last
            place = f"{name}: {type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"
    seconds, risen = time.perf_counter() - began, max(0, _status("VmHWM") - before)
    shown = [w for w in noise if not issubclass(w.category, (DeprecationWarning, ImportWarning, ResourceWarning))]
    if shown and kind in DOCUMENTED:
        kind, detail = "noise", f"{shown[0].category.__name__}: {shown[0].message}"
        place = f"{name}: {shown[0].category.__name__} at {Path(shown[0].filename).name}:{shown[0].lineno}"
    if risen > MOST_BYTES and kind in DOCUMENTED:
        kind, place = "memory", f"{name}: memory"
    return Outcome(kind, detail, seconds, risen, place)


def _serve(folder: Path, connection: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    read: set[str] = set()
    connection.send("ready")
    while True:
        try:
            name = connection.recv()
        except EOFError:
            return
        found = _attempt(folder, name)
        if name not in read:  # more libraries are mapped now
            read.add(name)
            most, hard = _status("VmSize") + _MOST_ADDRESSES, resource.getrlimit(resource.RLIMIT_AS)[1]
            if hard == resource.RLIM_INFINITY or most < hard:
                resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        connection.send(dataclasses.astuple(found))


def main() -> None:
    """The child: answers until the parent is gone."""
    os.setsid()
    _serve(Path(sys.argv[1]), Connection(int(sys.argv[2])))


if __name__ == "__main__":
    main()
