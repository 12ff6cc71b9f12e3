"""Hostile archives of a checkpoint: names that lead outside, links, devices, bombs, and headers that lie."""

from __future__ import annotations

import gzip
import io
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable

from attacks.attack import Attack, content

__all__ = ["ARCHIVES"]

CHECKPOINT, CONFIG = "train/checkpoint.safetensors", "train/config.json"
_END = bytes(1024)


def _zip(*members: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in members:
            info = name if isinstance(name, zipfile.ZipInfo) else zipfile.ZipInfo(name)
            archive.writestr(info, data, compress_type=method)
    return target.getvalue()


def _zip_of_mode(name: str, mode: int, data: bytes = b"/etc/passwd") -> bytes:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return _zip((info, data))


def _tar(*headers: bytes) -> bytes:
    return b"".join(headers) + _END


def _header(name: str, size: int | bytes = 0, kind: bytes = b"0", body: bytes = b"", link: str = "") -> bytes:
    """One entry: a header whose checksum is right, whatever it says, and `body` in whole blocks."""
    octal = size if isinstance(size, bytes) else b"%011o\0" % size
    fields = [name.encode(), b"0000644\0", b"0000000\0", b"0000000\0", octal, b"00000000000\0", b" " * 8, kind]
    fields += [link.encode(), b"ustar\x0000"]
    block = b"".join(f.ljust(n, b"\0") for f, n in zip(fields, (100, 8, 8, 8, 12, 12, 8, 1, 100, 8), strict=True))
    block = block.ljust(512, b"\0")
    block = block[:148] + b"%06o\0 " % sum(block) + block[156:]
    return block + body + bytes(-len(body) % 512)


def _gzipped_zeros(size: int, before: bytes = b"") -> bytes:
    target = io.BytesIO()
    with gzip.GzipFile(fileobj=target, mode="wb", compresslevel=1, mtime=0) as file:
        file.write(before)
        for _ in range(size >> 20):
            file.write(bytes(1 << 20))
    return target.getvalue()


def _with(more: bytes) -> Callable[[bytes], bytes]:
    """The valid tar with an entry more at its begin."""
    return lambda valid: more + valid


def _tar_entry(name: str, kind: bytes, link: str = "") -> bytes:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, link
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        archive.addfile(entry)
    return target.getvalue()


def _at_zip(tries: str, code: int, says: str, made: bytes) -> Attack:
    return Attack("checkpoint in a zip", tries, code, says, made)


def _at_tar(tries: str, code: int, says: str, made: bytes | Callable[[bytes], bytes]) -> Attack:
    return Attack("checkpoint in a tar", tries, code, says, made if isinstance(made, bytes) else content(made))


ZIPS = [
    *(
        _at_zip(f"the name {name!r}", 5, "is unsafe", _zip((name, b"x")))
        for name in ("../config.json", "/etc/config.json", "a/../../config.json", "..\\config.json", "C:/config.json")
    ),
    _at_zip("a name with an end of line", 5, "is unsafe", _zip(("a\nb/config.json", b"x"))),
    _at_zip("a name 9 folders deep", 5, "is unsafe", _zip(("a/" * 9 + "config.json", b"x"))),
    _at_zip("a link in the weights' place", 5, "is a link", _zip_of_mode(CHECKPOINT, stat.S_IFLNK | 0o777)),
    _at_zip("a link that is not wanted", 5, "is a link", _zip_of_mode("train/notes", stat.S_IFLNK | 0o777)),
    _at_zip("a device", 5, "is a device or pipe", _zip_of_mode("train/null", stat.S_IFCHR | 0o666)),
    _at_zip("the weights twice", 5, "is there twice", _zip((CHECKPOINT, b"x"), (f"./{CHECKPOINT}", b"y"))),
    _at_zip("two checkpoints", 2, "holds several checkpoints", _zip((CHECKPOINT, b"x"), ("b/config.json", b"{}"))),
    _at_zip("an empty name", 2, "no checkpoint.safetensors", _zip(("", b"x"))),
    _at_zip("weights alone", 2, "no config.json in it", _zip((CHECKPOINT, b"x"))),
    _at_zip("nothing", 2, "no zip or tar", b"PK\x05\x06" + bytes(18)),
    _at_zip("a configuration of 17 MiB in 17 KiB", 2, "at most 16777216", _zip((CONFIG, bytes(17 << 20)))),
    _at_zip("10,001 entries", 2, "more than 10000 entries", _zip(*((str(i), b"") for i in range(10_001)))),
    _at_zip(
        "a directory of more than a mebibyte",
        5,
        "directory takes more than",
        _zip(*((f"{i:0900}", b"") for i in range(1200))),
    ),
    _at_zip("LZMA, whose header asks for memory", 5, "method 14", _zip((CONFIG, b"{}"), method=zipfile.ZIP_LZMA)),
    _at_zip(
        "weights that say they are of 3 GiB",
        2,
        "checkpoint.safetensors is of 3221225472 bytes",
        (lambda made: made.replace(struct.pack("<I", 77), struct.pack("<I", 3 << 30)))(
            _zip((CHECKPOINT, bytes(77)), method=zipfile.ZIP_STORED)
        ),
    ),
    _at_zip("weights that are a pickle", 5, "", _zip((CHECKPOINT, b"\x80\x04cos\nsystem\n."), (CONFIG, b"{}"))),
    _at_zip("a configuration 100,000 deep", 5, "nested too deeply", _zip((CHECKPOINT, b""), (CONFIG, b"[" * 100_000))),
]
TARS = [
    *(
        _at_tar(f"the name {name!r}", 5, "is unsafe", _with(_header(name)))
        for name in ("../config.json", "/etc/config.json", "a/../../config.json", "..\\x", "\x1b[31m")
    ),
    _at_tar("a link in the weights' place", 5, "is a link", _tar_entry(CHECKPOINT, tarfile.SYMTYPE, "/etc/passwd")),
    _at_tar("a hard link", 5, "is a link", _tar_entry("train/x", tarfile.LNKTYPE, "/etc/passwd")),
    _at_tar("a device", 5, "is a device", _tar_entry("train/x", tarfile.CHRTYPE)),
    _at_tar("a pipe", 5, "is a pipe", _tar_entry("train/x", tarfile.FIFOTYPE)),
    _at_tar("a sparse file", 5, "of type 'S'", _with(_header("train/x", kind=b"S"))),
    _at_tar("a long name of GNU's", 5, "of type 'L'", _with(_header("x", 1 << 30, b"L"))),
    _at_tar(
        "a name given beforehand",
        5,
        "another name or size",
        _with(_header("x", 32, b"x", b"32 path=../../../../etc/passwd\n\n\n")),
    ),
    _at_tar("a note of 1 GiB", 5, "", _gzipped_zeros(64 << 20, _header("x", 1 << 30, b"x"))),
    _at_tar("30,000 notes", 5, "another name or size", _with(_header("x", 0, b"x") * 30_000)),
    _at_tar("a size below zero", 5, "no octal number", _with(_header("x", b"-0000000512\0"))),
    _at_tar("a size of 2**88", 5, "no octal number", _with(_header("x", b"\x80" + b"\xff" * 11))),
    _at_tar("a wrong checksum", 5, "checksum", lambda valid: _header("x")[:-1] + b"\1" + valid),
    _at_tar("weights cut off", 5, "ends too early", _header(CHECKPOINT, 4096, body=bytes(512))),
    _at_tar("weights that say they are of 7 GiB", 2, "of 7516192768 bytes", _tar(_header(CHECKPOINT, 7 << 30))),
    _at_tar("the weights twice", 5, "is there twice", _tar(_header(CHECKPOINT), _header(CHECKPOINT))),
    _at_tar("10,001 entries", 2, "more than 10000 entries", _tar(_header("x") * 10_001)),
    _at_tar("no entry", 2, "no checkpoint.safetensors and no config.json", _tar(_header("x", kind=b"5"))),
    _at_tar("a file of 3 GiB, and 64 MiB of it", 5, "ends too early", _gzipped_zeros(64 << 20, _header("x", 3 << 30))),
    _at_tar("a gzip in a gzip", 5, "ends too early", gzip.compress(gzip.compress(b"x"))),
    _at_tar("a gzip of nothing", 2, "no checkpoint", gzip.compress(b"")),
    _at_tar("a damaged gzip", 5, "a damaged archive", gzip.compress(_tar(_header("x")))[:12] + b"\xff" * 99),
]
ARCHIVES = [*ZIPS, *TARS]
