"""GPU code that was compiled on this machine, kept from one process to the next in the user's own cache folder.

    $XDG_CACHE_HOME/hcmen/tensorrt-rtx/<digest>.cache    else ~/.cache/hcmen/tensorrt-rtx/<digest>.cache

One file for each engine, GPU, driver and version, which the digest is made of. It is native code and nobody signs it,
so that it is taken from no bundle: folder and file are this user's and closed to others, no link is followed at either,
and the content has its own sha256 before it. Whatever is wrong with it costs a warning and the time to compile again.

The file is written whole, and of several processes the last one's stays. The newest `MOST_FILES` are kept; reading one
makes it new again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from hcmen.base.errors import reason_of
from hcmen.base.files import open_regular, sweep, write_file
from hcmen.base.trust import user_folder

__all__ = ["MOST_BYTES", "MOST_FILES", "KeptCode", "cache_folder"]

MOST_FILES = 64
MOST_BYTES = 256 << 20
"""Of one file. A larger one is neither read nor written."""
_ELSEWHERE = "set XDG_CACHE_HOME to a folder of yours that can be written"
_TRIES = 20
_NAME = re.compile(r"[0-9a-f]{32}\.cache\Z")
_MAGIC = b"hcmen compiled code 1\n"
_HEAD = len(_MAGIC) + hashlib.sha256().digest_size


def cache_folder() -> Path | None:
    """Where this user's files lie, be it there or not; None where the user has no home."""
    folder = user_folder("XDG_CACHE_HOME", ".cache")
    return None if folder is None else folder / "tensorrt-rtx"


class KeptCode:
    """The file for one `key`: what the code was compiled from, for, and by. At most one line tells what is wrong."""

    def __init__(self, key: Mapping[str, str | int]):
        self.folder = cache_folder()
        self.name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32] + ".cache"
        self._known = b""  # the digest of what is kept
        self._useless = self._told = False

    def read(self) -> bytes:
        """What is kept; empty where that is nothing, or nothing that may be used."""
        if self.folder is None:
            self._do_without("this user has no home folder", _ELSEWHERE)
            return b""
        try:
            with contextlib.ExitStack() as stack:
                descriptor = _opened(self.folder)
                stack.callback(os.close, descriptor)
                try:
                    file = stack.enter_context(_opened_file(self.name, descriptor))
                except FileNotFoundError:
                    return b""
                except OSError as error:
                    self.begin_anew(_reason(error))
                    return b""
                found = os.fstat(file.fileno())
                problem = _not_own(found)
                if problem is None and found.st_size > MOST_BYTES:
                    problem = f"{found.st_size} bytes, at most {MOST_BYTES} are read"
                content = b"" if problem else file.read(MOST_BYTES)
                with contextlib.suppress(OSError):  # another's, or on a file system that is read alone
                    os.utime(file.fileno())
        except FileNotFoundError:
            return b""
        except OSError as error:
            self._do_without(f"{self.folder}: {_reason(error)}", _ELSEWHERE)
            return b""
        if problem is None and not _sound(content):
            problem = "damaged"
        if problem:
            self.begin_anew(problem)
            return b""
        self._known = content[len(_MAGIC) : _HEAD]
        return content[_HEAD:]

    def begin_anew(self, problem: str) -> None:
        """Forgets what is kept, which another file takes the place of, and says so."""
        self._known = b""
        self._tell(f"{self.folder}{os.sep}{self.name}: {problem}: compiled code is kept anew")

    def write(self, content: bytes) -> None:
        """Keeps `content`, if it is another one than before."""
        digest = hashlib.sha256(content).digest()
        if self._useless or self.folder is None or digest == self._known:
            return
        if len(content) > MOST_BYTES:
            self._do_without(f"{len(content)} bytes of compiled code", f"at most {MOST_BYTES} are kept")
            return
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(_opened(self.folder))
            sweep(self.folder)
            write_file(self.folder / self.name, _MAGIC + digest + content, mode=0o600)
            _keep_newest(self.folder)
        except OSError as error:
            self._do_without(f"{self.folder}: {_reason(error)}", _ELSEWHERE)
        else:
            self._known = digest

    def _do_without(self, problem: str, fix: str) -> None:
        self._useless = True
        self._tell(f"{problem}, so that compiled code is not kept and the next start is as slow: {fix}")

    def _tell(self, line: str) -> None:
        if not self._told:
            self._told = True
            warnings.warn(line, RuntimeWarning, stacklevel=2)


def _opened(folder: Path) -> int:
    """A descriptor of `folder`; raises OSError unless it is this user's own, and no link."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    problem = _not_own(os.fstat(descriptor))
    if problem is not None:
        os.close(descriptor)
        raise PermissionError(problem)
    return descriptor


def _opened_file(name: str, folder: int) -> IO[bytes]:
    """The regular file `name` in the folder, tried again where another process replaced it meanwhile."""
    left = _TRIES
    while True:
        left -= 1
        try:
            return open_regular(name, folder=folder, links=False)
        except OSError as error:
            if error.errno != errno.ESTALE or not left:
                raise


def _not_own(found: os.stat_result) -> str | None:
    """Why others could have put it there or changed it; None if nobody but this user can."""
    if found.st_uid != os.geteuid():
        return f"owned by user {found.st_uid}, not by user {os.geteuid()}, who runs this"
    mode = stat.S_IMODE(found.st_mode)
    return f"mode {mode:04o}, others may use it" if mode & 0o077 else None


def _sound(content: bytes) -> bool:
    head = _MAGIC + hashlib.sha256(memoryview(content)[_HEAD:]).digest()
    return content[:_HEAD] == head


def _keep_newest(folder: Path) -> None:
    """Removes the files that were neither written nor read for longest; what another process removed first is gone."""
    ages = []
    for entry in os.scandir(folder):
        if _NAME.match(entry.name):
            with contextlib.suppress(FileNotFoundError):
                ages.append((entry.stat(follow_symlinks=False).st_mtime_ns, entry.path))
    for _, path in sorted(ages)[:-MOST_FILES]:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _reason(error: OSError) -> str:
    return (error.strerror or reason_of(error)).lower()
