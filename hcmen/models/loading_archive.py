"""The checkpoint in an archive that is not trusted: a zip, a tar or a tar.gz of the folder that hcmen-train wrote.

Two files of it are written, under names of ours: config.json and checkpoint.safetensors. Whatever else lies in it is
passed over. A link, a device, or a name that leads outside condemns the whole archive, wanted or not. Entries and bytes
are counted, unpacked ones too, and so are the bytes of a directory, which takes memory before its entries are seen.

Tars are read here and not by `tarfile`, which believes what headers say of their own length.
"""

from __future__ import annotations

import gzip
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from hcmen.base.bundle import CHECKPOINT_FILE
from hcmen.base.errors import CorruptFileError, HcmenError, InputError, reason_of, shown
from hcmen.base.files import refused
from hcmen.base.records import MOST_MANIFEST_BYTES

__all__ = ["AGAIN", "CONFIG_FILE", "unpack"]

CONFIG_FILE = "config.json"
_MOST_ENTRIES = 10_000
_MOST_AT_ONCE = 1 << 20
"""Bytes of one read: of a zip's directory, which is read at once, too."""
_MOST_PARTS = 8
_PART = 1 << 16
AGAIN = "make the archive again of the folder that hcmen-train wrote"
_BLOCK = 512
# What reading a damaged or hostile zip or gzip can raise; neither module has a common base for them.
_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    NotImplementedError,
    RuntimeError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
)


class _Entry(NamedTuple):
    """name: as it stands there. what: "file", "folder" or "note", else what it is in words. size: unpacked."""

    name: str
    what: str
    size: int
    content: Iterator[bytes]


def unpack(file: IO[bytes], folder: Path, where: str, most_bytes: int) -> None:
    """Writes the checkpoint and its configuration, which the archive holds, into the empty folder `folder`.

    Args:
        file: the archive, open at its begin. where: what it is called. most_bytes: of all that is unpacked.

    Raises:
        InputError: it is none, has no checkpoint or several, or is larger than is admitted.
        CorruptFileError: it is damaged, or holds what no checkpoint needs and what could do harm.
    """
    begin = file.read(_BLOCK)
    file.seek(0)
    if begin[:4] == b"PK\x03\x04":
        entries = _of_zip(_Bounded(file, os.fstat(file.fileno()).st_size))
    elif begin[:2] == b"\x1f\x8b":
        entries = _of_tar(_Bounded(gzip.GzipFile(fileobj=file, mode="rb"), most_bytes))
    elif begin[257:262] == b"ustar":
        entries = _of_tar(_Bounded(file, most_bytes))
    else:
        raise InputError(
            "no zip or tar",
            "an archive of a checkpoint folder",
            f"name the folder that hcmen-train wrote, or {AGAIN}",
            where=where,
        )
    try:
        _write(entries, folder, most_bytes)
    except HcmenError as error:
        raise error.but(where=where) from error
    except _ERRORS as error:
        raise CorruptFileError(f"a damaged archive ({reason_of(error, 100)})", fix=AGAIN, where=where) from error


def _write(entries: Iterator[_Entry], folder: Path, most_bytes: int) -> None:
    found: set[tuple[str, ...]] = set()
    left = most_bytes
    for count, entry in enumerate(entries, 1):
        if count > _MOST_ENTRIES:
            raise InputError(f"more than {_MOST_ENTRIES} entries", "a checkpoint folder alone", AGAIN)
        path = _parts(entry.name)
        if entry.what not in ("file", "folder"):
            raise CorruptFileError(f"{shown(entry.name)} is {entry.what}", "files and folders", AGAIN)
        if entry.what == "folder" or not path or path[-1] not in (CONFIG_FILE, CHECKPOINT_FILE):
            continue
        if path in found:
            raise CorruptFileError(f"{shown(entry.name)} is there twice", fix=AGAIN)
        found.add(path)
        most = min(left, MOST_MANIFEST_BYTES) if path[-1] == CONFIG_FILE else left
        if entry.size > most:
            raise InputError(f"{path[-1]} is of {entry.size} bytes", f"at most {most}", "raise most_bytes")
        left -= entry.size
        if len({p[:-1] for p in found}) > 1:
            raise InputError("holds several checkpoints", "one", "pack one folder")
        with open(folder / path[-1], "wb") as file:
            for part in entry.content:
                with refused(folder, fix="set TMPDIR to a folder with room"):
                    file.write(part)
                    file.flush()
    missing = {CONFIG_FILE, CHECKPOINT_FILE} - {path[-1] for path in found}
    if missing:
        raise InputError(f"no {' and no '.join(sorted(missing))} in it", "an archive of a checkpoint folder", AGAIN)


def _parts(name: str) -> tuple[str, ...]:
    """The parts of a path inside the archive; raises CorruptFileError where it could lead outside."""
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    unsafe = name.startswith("/") or ".." in parts or "\\" in name or (len(name) > 1 and name[1] == ":")
    if unsafe or not name.isprintable() or len(parts) > _MOST_PARTS or len(name) > 1000:
        raise CorruptFileError(f"the name {shown(name)} is unsafe", "plain names inside the folder", AGAIN)
    return parts


class _Bounded:
    """A file of which no more than `most` bytes, and no more than a mebibyte at once, are read."""

    def __init__(self, file: Any, most: int) -> None:
        self._file, self._most = file, most

    def read(self, count: int = -1) -> bytes:
        """The next `count` bytes, or fewer at the end; all that are left without a count."""
        content: bytes = self._file.read(min(count, _MOST_AT_ONCE + 1) if count >= 0 else _MOST_AT_ONCE + 1)
        if len(content) > _MOST_AT_ONCE:
            raise CorruptFileError(f"its directory takes more than {_MOST_AT_ONCE} bytes", fix=AGAIN)
        if self._file.tell() > self._most:
            raise InputError("unpacks to too much", f"at most {self._most} bytes", "raise most_bytes")
        return content

    def exactly(self, count: int) -> bytes:
        """The next `count` bytes; raises CorruptFileError where there are fewer."""
        content = self.read(count)
        if len(content) < count:
            raise CorruptFileError("the archive ends too early", fix="copy it again")
        return content

    def parts(self, count: int) -> Iterator[bytes]:
        """The next `count` bytes, piece by piece."""
        while count > 0:
            yield self.exactly(min(_PART, count))
            count -= min(_PART, count)

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of any file."""
        moved: int = self._file.seek(offset, whence)
        return moved

    def tell(self) -> int:
        """As of any file."""
        place: int = self._file.tell()
        return place

    def seekable(self) -> bool:
        """As of any file."""
        return True


def _of_zip(file: _Bounded) -> Iterator[_Entry]:
    with zipfile.ZipFile(cast(IO[bytes], file)) as archive:
        for member in archive.infolist():
            mode = stat.S_IFMT(member.external_attr >> 16)
            what = "folder" if member.orig_filename.endswith("/") else "file"
            if mode not in (0, stat.S_IFREG, stat.S_IFDIR):
                what = "a link" if mode == stat.S_IFLNK else "a device or pipe"
            elif what == "file" and member.flag_bits & 1:
                what = "encrypted"
            elif what == "file" and member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                what = f"compressed by method {member.compress_type}"
            yield _Entry(member.orig_filename, what, member.file_size, _of_member(archive, member))


def _of_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes]:
    with archive.open(member) as stream:
        while part := stream.read(_PART):
            yield part


_KINDS = {"0": "file", "\0": "file", "5": "folder", "1": "a link", "2": "a link", "6": "a pipe"}
_KINDS |= dict.fromkeys("34", "a device")
_NOTES = "xg"
"""Headers of times and owners, as Python and git write them before a file."""


def _of_tar(file: _Bounded) -> Iterator[_Entry]:
    notes = 0
    while (header := file.read(_BLOCK)).strip(b"\0"):
        if len(header) < _BLOCK:
            raise CorruptFileError("the archive ends too early", fix="copy it again")
        check = 256 + sum(header[:148]) + sum(header[156:])
        if _octal(header[148:156]) != check:
            raise CorruptFileError("the checksum of a header is wrong", fix="copy the archive again")
        size, kind = _octal(header[124:136]), chr(header[156])
        padding = -size % _BLOCK
        if kind in _NOTES:
            notes += 1
            content = file.exactly(size + padding)
            if notes > 2 * _MOST_ENTRIES or b" path=" in content or b" size=" in content:
                raise CorruptFileError("a header gives a file another name or size", fix=AGAIN)
            continue
        name = _text(header[:100])
        if header[257:263] == b"ustar\0" and header[345]:
            name = f"{_text(header[345:500])}/{name}"
        place = file.tell()
        yield _Entry(name, _KINDS.get(kind, f"of type {kind!r}"), size, file.parts(size))
        for _ in file.parts(place + size + padding - file.tell()):
            pass


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0")
    if not all(byte in b"01234567" for byte in digits):
        raise CorruptFileError("a header holds no octal number", "a tar of files below 8 GiB", AGAIN)
    return int(digits or b"0", 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "backslashreplace")
