"""What native code this user has let in: a key that signs the engines compiled here, and libraries that variables name.

    $XDG_STATE_HOME/hcmen/engine.key    else ~/.local/state/hcmen/engine.key

The key is 32 random bytes, made by the first compile and readable by its user alone. Whoever can write a bundle can
write its list of engines; without the key they cannot sign it. A library that an environment variable names is loaded
where nobody but this user and root can have put it there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hcmen.base.errors import BackendError, CorruptFileError, InputError, shown
from hcmen.base.files import refused, write_file

__all__ = [
    "check_nobody_else_writes",
    "engine_key",
    "key_path",
    "library_from_environment",
    "made_key",
    "signature",
    "user_folder",
]

_KEY = re.compile(rb"[0-9a-f]{64}\n\Z")
_MOST_LINKS = 40
_ELSEWHERE = "set XDG_STATE_HOME to a folder of yours that can be written"


def key_path() -> Path | None:
    """Where this user's key lies, be it there or not; None where the user has no home."""
    folder = user_folder("XDG_STATE_HOME", ".local/state")
    return None if folder is None else folder / "engine.key"


def user_folder(variable: str, otherwise: str) -> Path | None:
    """This user's folder of hcmen's in the one that `variable` names, else in `otherwise` at home; None without a home.

    A relative path counts as not set, as the XDG specification demands.
    """
    named = os.environ.get(variable, "")
    folder = named if os.path.isabs(named) else os.path.join(os.path.expanduser("~"), otherwise)
    return Path(folder, "hcmen") if os.path.isabs(folder) else None


def engine_key() -> bytes | None:
    """This user's key on this machine; None where none was made.

    Raises:
        InputError: it may not be read.
        CorruptFileError: it is damaged, or another user could have written or read it.
    """
    path = key_path()
    if path is None:
        return None
    again = "remove it and compile the engines again"
    with refused(path, fix="check its owner and permissions"):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise CorruptFileError("a link", "the key itself", again, where=str(path)) from error
        try:
            found = os.fstat(descriptor)
            content = os.read(descriptor, 1024) if stat.S_ISREG(found.st_mode) else b""
        finally:
            os.close(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise CorruptFileError("not a regular file", "a key", again, where=str(path))
    if found.st_uid != os.geteuid():
        expected = f"user {os.geteuid()}, who runs this"
        raise CorruptFileError(f"owned by user {found.st_uid}", expected, again, where=str(path))
    if stat.S_IMODE(found.st_mode) & 0o077:
        mode = f"mode {stat.S_IMODE(found.st_mode):04o}, others may use it"
        raise CorruptFileError(mode, "0600", again, where=str(path))
    if not _KEY.match(content):
        raise CorruptFileError("no key of hcmen's", "64 hexadecimal digits", again, where=str(path))
    return bytes.fromhex(content.decode())


def made_key() -> bytes:
    """This user's key, made now where there is none.

    Raises:
        InputError: the user has no home, or the place cannot be written.
        CorruptFileError: as `engine_key`.
    """
    key = engine_key()
    if key is not None:
        return key
    path = key_path()
    if path is None:
        raise InputError("this user has no home folder for the key that signs engines", fix=_ELSEWHERE)
    with refused(path, fix=_ELSEWHERE, note="and engines are signed with it"):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(folder, fcntl.LOCK_EX)
            key = engine_key()  # another process may have been first
            if key is None:
                key = secrets.token_bytes(32)
                write_file(path, key.hex().encode() + b"\n", mode=0o600)
        finally:
            os.close(folder)
    return key


def signature(key: bytes, data: Mapping[str, Any]) -> str:
    """The HMAC-SHA256 of what is plain JSON, as hexadecimal digits."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hmac.new(key, b"hcmen engine\0" + text.encode(), hashlib.sha256).hexdigest()


# --- libraries ------------------------------------------------------------------------------------------------------


def library_from_environment(variable: str, fix: str) -> Path | None:
    """The absolute path, links resolved, of the library that an environment variable names; None where it is not set.

    Raises:
        InputError: the path is relative: what it names would depend on the folder that one stands in.
        BackendError: no file is there; the message has `fix`.
        CorruptFileError: another user could have put the file there.
    """
    named = os.environ.get(variable)
    if not named:
        return None
    if not os.path.isabs(named):
        raise InputError(f"{variable} is {shown(named)}", "an absolute path")
    if not os.path.isfile(named):
        raise BackendError(f"{variable} is {shown(named)}", "a file", f"{fix}; or correct or unset {variable}")
    return check_nobody_else_writes(Path(named), variable)


def check_nobody_else_writes(path: Path, variable: str) -> Path:
    """The absolute path `path` with its links resolved.

    Raises:
        CorruptFileError: it, a link or a folder on its way is neither this user's nor root's, or others may write it.
    """
    at, left, links = Path("/"), list(reversed(path.parts[1:])), 0
    _check_owned(at, path, variable)
    while left:
        part = left.pop()
        if part == os.pardir:
            at = at.parent
            continue
        here = at / part
        if _check_owned(here, path, variable):
            at = here
            continue
        links += 1
        if links > _MOST_LINKS:
            raise CorruptFileError(f"{variable} is {shown(str(path))}, links without end", "a file")
        target = Path(os.readlink(here))
        at = Path("/") if target.is_absolute() else at
        left += [p for p in reversed(target.parts) if p != "/"]
    return at


def _check_owned(here: Path, path: Path, variable: str) -> bool:
    """Whether `here`, on the way to `path`, is no link; raises CorruptFileError where others could change it."""
    with refused(path):
        found = os.lstat(here)
    what = f"{variable} is {shown(str(path))}, and {here}"
    if found.st_uid not in (0, os.geteuid()):
        raise CorruptFileError(
            f"{what} is owned by user {found.st_uid}",
            f"user {os.geteuid()}, who runs this, or root",
            "copy the library to a folder of yours",
        )
    if stat.S_ISLNK(found.st_mode):
        return False
    # In a folder with the sticky bit, as /tmp, nobody can replace what is another's.
    sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    if found.st_mode & 0o022 and not sticky:
        raise CorruptFileError(
            f"{what} may be written by others (mode {stat.S_IMODE(found.st_mode):04o})",
            "by its owner alone",
            f"chmod go-w {here}",
        )
    return True
