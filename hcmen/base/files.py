"""Files and folders that are there whole or not at all, and small files read whole.

A file or folder is written to a temporary neighbour, `.NAME.tmp-XXXXXXXX`, which is renamed when it is whole. The
writer holds a shared lock (flock) on it meanwhile. `sweep` takes a neighbour that nobody locks for one that a killed
writer left; process numbers would not do, since a container has its own.

Every writer sweeps for the name that it writes. To list a folder of 100,000 entries takes 0.14 s, and to write a file
6 ms: so a process lists a folder in a hundredth of its time at most (`_sweep_now_and_then`).

A reader of a folder that is replaced at any time takes such a lock too (`HeldFolder`). What it holds is not emptied
when another is put in its place: it stays as a neighbour, which a sweep after the reader's end removes. No lock is ever
waited for without an end.

Needs the standard library alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

from hcmen.base.errors import InputError, reason_of

__all__ = [
    "HeldFolder",
    "check_writable",
    "open_regular",
    "read_small",
    "refused",
    "replace_folder",
    "sweep",
    "write_file",
    "write_files",
    "writing_file",
    "writing_folder",
]

_LEFT = re.compile(r"\.(.+)\.(tmp|old)-[0-9a-f]{8}\Z", re.DOTALL)
_EXCHANGE, _AT_FDCWD = 2, -100
_PATIENCE_SECONDS = 1.0
"""How long a reader waits for a writer between two renames, which takes it some microseconds."""
_LISTING_SHARE = 0.01
_MOST_LISTED = 1000


@contextlib.contextmanager
def refused(
    where: str | os.PathLike[str], expected: str | None = None, fix: str | None = None, *, note: str | None = None
) -> Iterator[None]:
    """Makes an OSError of the block an InputError about `where`, with `note` behind the system's reason."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = f"make room, or {fix}" if fix else "make room"
        reason = (error.strerror or reason_of(error)).lower()
        raise InputError(f"{reason}, {note}" if note else reason, expected, fix, where=os.fspath(where)) from error


# --- writing --------------------------------------------------------------------------------------------------------


def write_file(path: str | os.PathLike[str], content: bytes | memoryview, *, mode: int = 0o666) -> None:
    """Writes `content` to `path` so that a reader, or a process killed at any moment, sees the old file or the new one.

    A link at `path` is replaced, and what it leads to stays. What killed writers of `path` left is removed.

    Args:
        path, content: what goes where. mode: of the file, less the umask.

    Raises:
        OSError: the disk is full, or the place cannot be written; nothing is left behind.
    """
    with writing_file(path, mode=mode) as file:
        file.write(content)


@contextlib.contextmanager
def writing_file(path: str | os.PathLike[str], *, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """As `write_file`, for a block that writes to the file it is given.

    Raises:
        OSError: the disk is full, or the place cannot be written; nothing is left behind.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        temporary, file = stack.enter_context(_temporary_file(path, mode))
        yield file
        _to_disk(file)
        os.replace(temporary, path)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes all of `files` into `folder`, or none: the first is renamed when all are on the disk.

    Raises:
        OSError: the disk is full, or the place cannot be written; what was there is as it was.
    """
    with contextlib.ExitStack() as stack:
        made = {}
        for name, content in files.items():
            made[name], file = stack.enter_context(_temporary_file(folder / name))
            file.write(content)
            _to_disk(file)
        # A folder in a file's place would stop the renames half way.
        for name in files:
            if (folder / name).is_dir():
                raise IsADirectoryError(errno.EISDIR, f"{name} is a folder")
        for name, temporary in made.items():
            os.replace(temporary, folder / name)


@contextlib.contextmanager
def writing_folder(
    path: str | os.PathLike[str],
    *,
    check: Callable[[Path], None] = lambda _: None,
    verify: Callable[[Path], None] = lambda _: None,
) -> Iterator[Path]:
    """Gives an empty folder to write into, and puts it at `path` when the block ends well.

    At the end it is flushed to the disk and renamed. A folder at `path` is replaced then and not before; a link there
    stays, and the folder it names is replaced. When the block raises, the new folder is removed and `path` is as it
    was. What killed writers left is removed first.

    Args:
        path: where the folder shall be.
        check: raises when what is at its argument must not be replaced.
        verify: raises when its argument, the folder written, is not as it should be.

    Raises:
        OSError: the place cannot be written.
        HcmenError: what `check` and `verify` raise.
    """
    target = Path(path)
    target = Path(os.path.realpath(target)) if target.is_symlink() else Path(os.path.abspath(target))
    check(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent, target.name)
    temporary, descriptor = _new(target, mode=None)
    try:
        yield temporary
        verify(temporary)
        _flush(temporary)
        replace_folder(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def replace_folder(made: Path, target: Path) -> None:
    """Renames the folder `made` to its neighbour `target` and removes the folder that was there.

    One that a reader holds (`HeldFolder`) stays as a hidden neighbour. Where the system can exchange the two, `target`
    is there at every moment. Elsewhere the older folder moves aside first; were the process killed then, the next
    `sweep` would put it back.

    Raises:
        OSError: it cannot be renamed; `target` is as it was.
    """
    try:
        os.rename(made, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    else:
        return
    if _exchanged(made, target):
        _remove_unless_held(made)
        return
    old = target.with_name(f".{target.name}.old-{os.urandom(4).hex()}")
    descriptor = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _locked(descriptor)
        os.rename(target, old)
        try:
            os.rename(made, target)
        except BaseException:
            os.rename(old, target)
            raise
        os.rename(old, made)  # from here on no sweep would put it back
    finally:
        os.close(descriptor)
    _remove_unless_held(made)


def sweep(folder: Path, name: str | None = None) -> None:
    """Removes what killed writers left in `folder`: of the file or folder `name`, or of all.

    A folder that a killed writer had moved aside is put back where nothing has come in its place.
    """
    with contextlib.suppress(FileNotFoundError):
        for found in _left_in(folder):
            if name in (None, found[1]):
                _sweep(folder, found)


def check_writable(folder: Path) -> None:
    """Finds out before the work whether `folder`, made where it is not there, can be written.

    Raises:
        OSError: it cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _temporary_file(folder / "probe"):
        pass


def _remove_unless_held(folder: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if _locked(descriptor, fcntl.LOCK_EX):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


def _left_in(folder: Path) -> list[re.Match[str]]:
    """The neighbours in `folder` that writers make, whether their writer is alive or not."""
    return [found for entry in sorted(os.listdir(folder)) if (found := _LEFT.match(entry))]


_listed: dict[Path, tuple[float, list[re.Match[str]]]] = {}
"""Folder -> when it may be listed again, and what was left in it when it was listed."""


def _sweep_now_and_then(target: Path) -> None:
    """As `sweep` for the name of `target`, by a listing that was made as long ago as it is cheap to make another."""
    folder = Path(os.path.abspath(target.parent))
    now = time.monotonic()
    again, left = _listed.get(folder, (now, []))
    if now >= again:
        left = []
        with contextlib.suppress(OSError):  # a folder that may be written and not listed
            left = _left_in(folder)
        if len(_listed) >= _MOST_LISTED:
            _listed.clear()
        _listed[folder] = (now + (time.monotonic() - now) / _LISTING_SHARE, left)
    for found in left:
        if found[1] == target.name:
            _sweep(folder, found)


def _sweep(folder: Path, found: re.Match[str]) -> None:
    with contextlib.suppress(OSError):
        _remove_or_put_back(folder / found[0], folder / found[1], found[2])


def _remove_or_put_back(left: Path, target: Path, kind: str) -> None:
    descriptor = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is(left, descriptor):
            return
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            left.unlink()
        elif kind == "old" and not target.exists():
            os.rename(left, target)
        else:
            shutil.rmtree(left, ignore_errors=True)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _temporary_file(target: Path, mode: int = 0o666) -> Iterator[tuple[Path, IO[bytes]]]:
    """A temporary neighbour of `target`, open and locked; removed at the end, unless it was renamed."""
    _sweep_now_and_then(target)
    temporary, descriptor = _new(target, mode=mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield temporary, file
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _new(target: Path, *, mode: int | None) -> tuple[Path, int]:
    """A new neighbour of `target`, and the descriptor that holds its lock. mode: of a file; None makes a folder."""
    folder = mode is None
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    flags |= os.O_RDONLY | os.O_DIRECTORY if folder else os.O_WRONLY | os.O_CREAT | os.O_EXCL
    while True:
        path = target.with_name(f".{target.name}.tmp-{os.urandom(4).hex()}")
        with contextlib.suppress(FileExistsError):
            if folder:
                path.mkdir()
            try:
                descriptor = os.open(path, flags, mode or 0)
            except FileNotFoundError:
                if not folder:
                    raise
                continue
            # Between its making and its locking a sweep may have taken it for one that was left.
            if _locked(descriptor) and _is(path, descriptor):
                return path, descriptor
            os.close(descriptor)


def _locked(descriptor: int, kind: int = fcntl.LOCK_SH) -> bool:
    """Locks what is open, unless another's lock forbids; a file system without locks is written all the same."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _exchanged(one: Path, other: Path) -> bool:
    """Exchanges the names of two files or folders in one step; False where the system cannot."""
    import ctypes

    try:
        exchange = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if exchange(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), os.fspath(one), None, os.fspath(other))


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """Brings every file of `folder` to the disk, so that a rename that survives a power cut has content behind it."""
    for path in [*(p for p in folder.rglob("*") if p.is_file()), *(p for p in folder.rglob("*") if p.is_dir()), folder]:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --- reading --------------------------------------------------------------------------------------------------------


class HeldFolder:
    """The folder `path`, open, whose content no writer of this module removes as long as somebody has this object.

    descriptor: of the folder; None once it is closed. On a file system without locks it is one like others.

    Raises:
        OSError: no folder is there, or it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.descriptor: int | None = None
        until = time.monotonic() + _PATIENCE_SECONDS
        while not self._opened(Path(path), final=time.monotonic() > until):
            time.sleep(0.001)

    def _opened(self, path: Path, *, final: bool) -> bool:
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            if final or not _is_being_replaced(path):
                raise
            return False
        with contextlib.suppress(FileNotFoundError):
            # A writer may have replaced it since it was opened, and be emptying it.
            if final or (_locked(self.descriptor) and self.is_at(path)):
                return True
        self.close()
        return False

    def is_at(self, path: Path) -> bool:
        """Whether it is what `path` leads to now; raises OSError where that cannot be told."""
        return self.descriptor is not None and os.path.samestat(os.stat(path), os.fstat(self.descriptor))

    def close(self) -> None:
        """Lets go of it."""
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """None: another process opens the folder by its path."""
        return type(None), ()


def _is_being_replaced(path: Path) -> bool:
    """Whether the folder `path` is back, or moved aside by a writer that lacks `_exchanged`."""
    target = Path(os.path.realpath(path))
    with contextlib.suppress(OSError):
        left = map(_LEFT.match, os.listdir(target.parent))
        return any(found and found[2] == "old" and found[1] == target.name for found in left) or target.exists()
    return False


def open_regular(path: str | os.PathLike[str], *, folder: int | None = None, links: bool = True) -> IO[bytes]:
    """The regular file `path`, open for reading. A pipe or device is refused, and neither opened nor waited for.

    Args:
        path: of the file. folder: a descriptor of the folder that a relative path starts from.
        links: follow one at the end of `path`.

    Raises:
        IsADirectoryError: a folder is there.
        OSError: anything else that is no file, or it cannot be opened.
    """
    # Opening some devices does things, as rewinding a tape, so what is there is asked first.
    found = os.stat(path, dir_fd=folder, follow_symlinks=links)
    code = 0 if stat.S_ISREG(found.st_mode) else errno.EISDIR if stat.S_ISDIR(found.st_mode) else errno.EINVAL
    if stat.S_ISLNK(found.st_mode):
        code = errno.ELOOP
    if not code:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | (0 if links else os.O_NOFOLLOW)
        descriptor = os.open(path, flags, dir_fd=folder)
        if os.path.samestat(found, os.fstat(descriptor)):
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
        code = errno.ESTALE
    told = {errno.EINVAL: "not a regular file", errno.ESTALE: "changed while it was opened"}
    raise OSError(code, told.get(code, os.strerror(code)), os.fspath(path))


def read_small(path: str | os.PathLike[str], most: int = 256 << 20) -> bytes:
    """The content of the regular file `path` of at most `most` bytes.

    Raises:
        OSError: it is larger, cannot be read, or is as `open_regular` refuses it.
    """
    with open_regular(path) as file:
        # All of what is asked for is allocated at once; the files of /proc say that they are empty.
        limit = min(most, max(os.fstat(file.fileno()).st_size, 1 << 16))
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"more than {limit} bytes", os.fspath(path))
    return content
