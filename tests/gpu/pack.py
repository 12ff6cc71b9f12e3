"""Packs wheels into pieces for a bare GPU machine without a network, and puts the pieces together there.

    python tests/gpu/pack.py make --out FOLDER --architecture 90 WHEEL [WHEEL ...]
    python tests/gpu/pack.py join FOLDER --target SITE          SITE then goes onto PYTHONPATH

make writes NAME.000, NAME.001 and so on, none above --piece-mib, and NAME.json. The listing has the sizes and digests,
the files, and what was cut or left out. join takes every listing of FOLDER. It checks all of them and all digests of
pieces, unpacks into a new folder beside SITE, and renames that once everything is right; SITE must not be there before.

With --architecture, device code for other architectures is cut as fatbin.py tells.

Standard library only. Slices of the files are packed one by one, so that all cores unpack at once. Exit code 2 for
wrong arguments, 5 for pieces or a listing that are damaged or would lead outside SITE.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import json
import lzma
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

__all__ = ["Damaged", "join", "make"]

VERSION = 1
SLICE = 8 << 20
MOST_PIECE_MIB = 60
MOST_LISTING, MOST_XZ_MEMORY = 32 << 20, 128 << 20
"""Bytes of a listing, and of what unpacking one slice may take; xz's preset 9 takes 65 MiB."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Damaged(ValueError):
    """A listing or a piece is not what `make` wrote."""


def installed_path(name: str) -> str | None:
    """Where a file of a wheel lies once installed, or None for scripts and other data outside the packages."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} is no path inside a wheel")
    if parts[0].endswith(".data"):
        return "/".join(parts[2:]) if len(parts) > 2 and parts[1] in ("purelib", "platlib") else None
    return "/".join(parts)


def _opened(wheel: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(wheel)
    except zipfile.BadZipFile:
        raise ValueError(f"{wheel} is no wheel: it is no zip archive") from None


def compress(raw: bytes, preset: int) -> bytes:
    """One xz stream. The first filter makes jumps in x86 code alike, which packs libraries better."""
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": preset}]
    return lzma.compress(raw, lzma.FORMAT_XZ, lzma.CHECK_CRC64, filters=filters)


def make(
    wheels: Sequence[Path],
    out: Path,
    *,
    name: str | None = None,
    architecture: int | None = None,
    piece_bytes: int = 60 << 20,
    preset: int = 6,
    leave_out: Sequence[str] = (),
) -> dict[str, Any]:
    """Packs the wheels into pieces in the folder out, and returns the listing that lies beside them."""
    from fatbin import blank_images  # join needs this file alone

    name = name or wheels[0].name.split("-")[0]
    if not NAME.fullmatch(name):
        raise ValueError(f"the name is {name!r}, expected letters, digits, '.', '_' and '-'")
    out.mkdir(parents=True, exist_ok=True)
    listing_path = out / f"{name}.json"
    listing_path.write_text("")  # now, and not after minutes of packing
    listing_path.unlink()
    files: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    cut: dict[str, Any] = {}
    seen: set[str] = set()
    content = bytearray()
    for wheel in wheels:
        with _opened(wheel) as archive:
            for info in archive.infolist():
                if info.is_dir():
                    continue
                path = installed_path(info.filename)
                if path is None or any(fnmatch.fnmatchcase(path, pattern) for pattern in leave_out):
                    left_out.append({"path": info.filename, "size": info.file_size})
                    continue
                if path in seen:
                    raise ValueError(f"{path} comes twice, the second time from {wheel}")
                seen.add(path)
                data = bytearray(archive.read(info))
                if architecture is not None:
                    try:
                        done = blank_images(data, architecture)
                    except ValueError as error:
                        raise ValueError(f"{path}: {error}; without --architecture nothing is cut") from None
                    if done:
                        cut[path] = done
                executable = bool(info.external_attr >> 16 & 0o100)
                files.append({"path": path, "size": len(data), "executable": executable})
                content += data

    served = [done for done in cut.values() if done["containers"] > done["containers_with_nothing_to_run"]]
    if cut and not served:
        found = sorted({image for done in cut.values() for image in done["blanked"]})
        raise ValueError(f"no device code serves architecture {architecture}: there is {', '.join(found)}")

    raw = [bytes(content[at : at + SLICE]) for at in range(0, len(content), SLICE)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # lzma lets go of the interpreter's lock
        slices = list(pool.map(lambda part: compress(part, preset), raw))
    packed = b"".join(slices)

    for old in out.glob(f"{name}.[0-9][0-9][0-9]"):
        old.unlink()
    pieces = []
    for number, at in enumerate(range(0, len(packed), piece_bytes)):
        piece = packed[at : at + piece_bytes]
        (out / f"{name}.{number:03}").write_bytes(piece)
        digest = hashlib.sha256(piece).hexdigest()
        pieces.append({"name": f"{name}.{number:03}", "size": len(piece), "sha256": digest})
    listing = {
        "version": VERSION,
        "wheels": [wheel.name for wheel in wheels],
        "pieces": pieces,
        "whole": {"size": len(packed), "sha256": hashlib.sha256(packed).hexdigest()},
        "content": {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()},
        "cut": cut,
        "left_out": left_out,
        "slices": [len(part) for part in slices],
        "files": files,
    }
    listing_path.write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")
    return listing


def _require(right: bool, what: str) -> None:
    if not right:
        raise Damaged(what)


def _whole(value: object, least: int = 0) -> bool:
    return type(value) is int and value >= least


def _sized(value: object, what: str) -> None:
    right = isinstance(value, dict) and _whole(value.get("size")) and isinstance(value.get("sha256"), str)
    _require(right, f"{what} has no size and sha256")


def read_listing(path: Path) -> dict[str, Any]:
    """A listing whose names, paths and sizes are safe and add up.

    Raises:
        Damaged: the message says what is wrong.
    """
    _require(
        path.is_file() and path.stat().st_size <= MOST_LISTING, f"{path} is no file of at most {MOST_LISTING} bytes"
    )
    try:
        listing = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise Damaged(f"{path} is no JSON") from None
    _require(isinstance(listing, dict) and listing.get("version") == VERSION, f"{path} is no listing of this version")
    pieces, slices, files = (listing.get(key) for key in ("pieces", "slices", "files"))
    lists = all(isinstance(value, list) for value in (pieces, slices, files))
    _require(lists, f"{path} has no lists of pieces, slices and files")
    for key in ("whole", "content"):
        _sized(listing.get(key), f"{path}: {key}")
    for number, piece in enumerate(pieces):
        _sized(piece, f"{path}: piece {number}")
        _require(piece.get("name") == f"{path.stem}.{number:03}", f"{path}: piece {number} has another name")
    paths = set()
    for number, file in enumerate(files):
        right = (
            isinstance(file, dict) and isinstance(file.get("path"), str) and isinstance(file.get("executable"), bool)
        )
        _require(right and _whole(file.get("size")), f"{path}: file {number} has no path, size and executable")
        try:
            kept = installed_path(file["path"])
        except ValueError as error:
            raise Damaged(f"{path}: {error}") from None
        _require(kept == file["path"] and kept not in paths, f"{path}: {file['path']!r} is no path to unpack, or twice")
        paths.add(kept)
    _require(all(_whole(size, 1) for size in slices), f"{path}: a slice's size is no number above 0")
    packed, size = listing["whole"]["size"], listing["content"]["size"]
    adds_up = packed == sum(p["size"] for p in pieces) == sum(slices) and size == sum(f["size"] for f in files)
    _require(adds_up and len(slices) == -(-size // SLICE), f"{path}: the sizes do not add up")
    return listing


def read_pieces(listing_path: Path, listing: dict[str, Any]) -> bytes:
    """The packed bytes, with the sizes and digests that the listing states."""
    packed = bytearray()
    for stated in listing["pieces"]:
        path = listing_path.parent / stated["name"]
        _require(path.is_file(), f"{path} is not there")
        _require(path.stat().st_size == stated["size"], f"{path} has {path.stat().st_size} bytes, not {stated['size']}")
        piece = path.read_bytes()
        _require(
            hashlib.sha256(piece).hexdigest() == stated["sha256"], f"{path} has another digest than the listing says"
        )
        packed += piece
    right = hashlib.sha256(packed).hexdigest() == listing["whole"]["sha256"]
    _require(right, f"{listing_path}: the pieces together have another digest")
    return bytes(packed)


def unpack(packed: bytes) -> bytes:
    """One slice, which holds at most SLICE bytes."""
    try:
        stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MOST_XZ_MEMORY)
        raw = stream.decompress(packed, max_length=SLICE + 1)
    except lzma.LZMAError as error:
        raise Damaged(f"a slice cannot be unpacked: {error}") from None
    _require(stream.eof and not stream.unused_data and len(raw) <= SLICE, "a slice holds more or less than it should")
    return raw


def contents(packed: bytes, sizes: Sequence[int]) -> Iterator[bytes]:
    """The slices, some at a time, so that no more of them than cores are in memory."""
    workers, at = os.cpu_count() or 1, 0
    with ThreadPoolExecutor(workers) as pool:  # lzma lets go of the interpreter's lock
        for first in range(0, len(sizes), workers):
            parts = []
            for size in sizes[first : first + workers]:
                parts.append(packed[at : at + size])
                at += size
            yield from pool.map(unpack, parts)


def spread(slices: Iterator[bytes], files: Sequence[dict[str, Any]], folder: Path) -> str:
    """Writes the files that the slices hold one after another. Returns the digest of all."""
    digest, rest = hashlib.sha256(), memoryview(b"")
    for stated in files:
        path, left = folder / stated["path"], stated["size"]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            while left:
                if not rest:
                    data = next(slices, b"")
                    _require(bool(data), "the slices hold less than the listing states")
                    digest.update(data)
                    rest = memoryview(data)
                count = file.write(rest[:left])
                rest, left = rest[count:], left - count
        path.chmod(0o755 if stated["executable"] else 0o644)
    _require(not rest and next(slices, None) is None, "the slices hold more than the listing states")
    return digest.hexdigest()


def join(listing_paths: Sequence[Path], target: Path) -> dict[str, int]:
    """Unpacks the pieces beside the listings into the folder target, which must not be there. Files of each listing.

    Raises:
        Damaged: a listing or a piece is not what `make` wrote. Then nothing is left of it.
        FileExistsError: something is at target.
    """
    if os.path.lexists(target):
        raise FileExistsError(f"{target} is there already: name a folder that is not")
    listings = [read_listing(path) for path in listing_paths]
    needed = sum(listing["content"]["size"] for listing in listings)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise OSError(f"{needed} bytes are to be unpacked into {target.parent}, {free} are free")
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for path, listing in zip(listing_paths, listings, strict=True):
            packed = read_pieces(path, listing)
            try:
                found = spread(contents(packed, listing["slices"]), listing["files"], folder)
            except (FileExistsError, NotADirectoryError) as error:
                raise Damaged(f"{path}: {error.filename} is a file and a folder, or twice") from None
            _require(found == listing["content"]["sha256"], f"{path}: the files have another digest")
        folder.chmod(0o755)
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return {path.stem: len(listing["files"]) for path, listing in zip(listing_paths, listings, strict=True)}


def run_make(arguments: argparse.Namespace) -> None:
    """The command make."""
    listing = make(
        arguments.wheel,
        arguments.out,
        name=arguments.name,
        architecture=arguments.architecture,
        piece_bytes=int(arguments.piece_mib * (1 << 20)),
        preset=arguments.preset,
        leave_out=arguments.leave_out,
    )
    for path, done in listing["cut"].items():
        print(f"{path}: {done['kept_bytes']:,} bytes of device code kept, {done['blanked_bytes']:,} blanked")
        if done["containers_without_exact_image"] or done["containers_with_nothing_to_run"]:
            inexact, empty = done["containers_without_exact_image"], done["containers_with_nothing_to_run"]
            print(f"  of {done['containers']} containers {inexact} have no exact image, {empty} nothing to run")
    if arguments.architecture is not None and not listing["cut"]:
        print("no device code was found: nothing was cut, and --architecture makes no difference")
    for file in listing["left_out"]:
        print(f"{file['path']}: left out, {file['size']:,} bytes")
    for piece in listing["pieces"]:
        print(f"{piece['name']}: {piece['size'] / (1 << 20):.1f} MiB")


def run_join(arguments: argparse.Namespace) -> None:
    """The command join."""
    listings = sorted(arguments.folder.glob("*.json"))
    if not listings:
        raise FileNotFoundError(f"there is no listing in {arguments.folder}")
    for name, count in join(listings, arguments.target).items():
        print(f"{name}: {count} files in {arguments.target}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"pack.py: {message}\n")


def _mib(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 1 / (1 << 20) <= float(text) <= MOST_PIECE_MIB:
            return float(text)
    raise argparse.ArgumentTypeError(f"'{text}' is no number above 0 and up to {MOST_PIECE_MIB}")


def main() -> int:
    """The command line."""
    parser = _Parser(description="Packs wheels into pieces, and puts the pieces together.")
    commands = parser.add_subparsers(required=True, metavar="make or join")
    command = commands.add_parser("make", help="pack wheels into pieces")
    command.add_argument("wheel", type=Path, nargs="+")
    command.add_argument("--out", type=Path, required=True, help="the folder for the pieces")
    command.add_argument("--name", help="what the pieces are called; the first wheel's name by default")
    command.add_argument("--architecture", type=int, help="the one to keep device code for, such as 90; all by default")
    command.add_argument("--piece-mib", type=_mib, default=MOST_PIECE_MIB, help="the most a piece may have, up to 60")
    command.add_argument("--preset", type=int, default=6, choices=range(10), help="of xz")
    command.add_argument("--leave-out", action="append", default=[], metavar="PATTERN", help="files to leave out")
    command.set_defaults(run=run_make)
    command = commands.add_parser("join", help="put pieces together")
    command.add_argument("folder", type=Path, help="where the pieces and their listings lie")
    command.add_argument("--target", type=Path, required=True, help="the folder to unpack into, which is not there yet")
    command.set_defaults(run=run_join)
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile) as error:  # RuntimeError: a wheel under a password
        print(f"pack.py: {error}", file=sys.stderr)
        return 5 if isinstance(error, Damaged) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
