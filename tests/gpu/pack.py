"""Packs wheels into pieces for a bare GPU machine without a network, and puts the pieces together there.

    python tests/gpu/pack.py make --out FOLDER --architecture 90 WHEEL [WHEEL ...]
    python tests/gpu/pack.py join FOLDER --target SITE          SITE then goes onto PYTHONPATH

make writes NAME.000, NAME.001 and so on, none above --piece-mib, and NAME.json. The listing has the sizes and digests,
the files, and what was cut or left out. join checks all digests before it writes a file.

With --architecture, images of device code for other architectures are overwritten with zeros, which xz packs to almost
nothing. No file changes its size, and all headers stay, so the loader and the CUDA runtime walk them as before. Such a
library serves devices of that one architecture only. cuobjdump needs -arch for it, as it would unpack the zeros too.

Standard library only. Slices of the files are packed one by one, so that all cores unpack at once.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import lzma
import os
import struct
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

__all__ = ["Image", "blank_images", "join", "make", "read_containers", "runnable"]

VERSION = 1
SLICE = 8 << 20
CONTAINER_MAGIC = 0xBA55ED50
CONTAINER_HEADER = struct.Struct("<IHHQ")
"""Magic, version, size of this header, size of what follows it."""
IMAGE_HEADER = struct.Struct("<HHIQ")
"""Kind, attributes, size of this header, size of the payload with its padding."""
IMAGE_ARCHITECTURE, IMAGE_FLAGS, IMAGE_HEADER_LEAST = 28, 40, 48
PTX, ELF = 1, 2
EXACT_ONLY = 1 << 20
"""The flag of sm_90a and its like: code that runs on this very architecture and on no later one."""


@dataclass(frozen=True)
class Image:
    """Device code for one architecture. start and end: its payload within the file, without the header."""

    kind: int
    architecture: int
    exact_only: bool
    start: int
    end: int

    @property
    def name(self) -> str:
        """As cuobjdump names it, with a prefix for PTX and for kinds that are not known here."""
        prefix = {PTX: "ptx_", ELF: "sm_"}.get(self.kind, f"kind{self.kind}_")
        return f"{prefix}{self.architecture}{'a' if self.exact_only else ''}"


def fatbin_sections(data: bytes | bytearray) -> list[tuple[int, int]]:
    """Where the .nv_fatbin sections of a 64-bit little-endian ELF file start and end. Other files have none."""
    if data[:6] != b"\x7fELF\x02\x01" or len(data) < 64:
        return []
    (table,) = struct.unpack_from("<Q", data, 0x28)
    entry_size, count, names_index = struct.unpack_from("<HHH", data, 0x3A)
    # name, type, flags, address, offset, size
    headers = [struct.unpack_from("<IIQQQQ", data, table + entry_size * i) for i in range(count)]
    if names_index >= count:
        return []
    names = headers[names_index][4]
    wanted = b".nv_fatbin\0"
    return [(h[4], h[4] + h[5]) for h in headers if data[names + h[0] : names + h[0] + len(wanted)] == wanted]


def read_containers(data: bytes | bytearray, start: int, end: int) -> Iterator[list[Image]]:
    """The images of each container in a section. ValueError for anything that is not understood."""
    at = start
    while at + CONTAINER_HEADER.size <= end:
        magic, _, header_size, size = CONTAINER_HEADER.unpack_from(data, at)
        if magic == 0:  # padding between two containers
            at += 4
            continue
        stop = at + header_size + size
        if magic != CONTAINER_MAGIC or header_size < CONTAINER_HEADER.size or stop > end:
            raise ValueError(f"no container of device code at byte {at}")
        at += header_size
        images = []
        while at < stop:
            if at + IMAGE_HEADER_LEAST > stop:
                raise ValueError(f"an image's header at byte {at} reaches past its container")
            kind, _, header_size, size = IMAGE_HEADER.unpack_from(data, at)
            (architecture,) = struct.unpack_from("<I", data, at + IMAGE_ARCHITECTURE)
            (flags,) = struct.unpack_from("<Q", data, at + IMAGE_FLAGS)
            payload = at + header_size
            if header_size < IMAGE_HEADER_LEAST or payload + size > stop:
                raise ValueError(f"an image at byte {at} reaches past its container")
            images.append(Image(kind, architecture, bool(flags & EXACT_ONLY), payload, payload + size))
            at = payload + size
        yield images
    if any(data[at:end]):
        raise ValueError(f"no container of device code at byte {at}")


def runnable(images: Sequence[Image], architecture: int) -> list[Image]:
    """What of one container a device of this architecture may load. Kinds that are not known are always among it.

    Machine code for this very architecture wins. Without it, all machine code of the same generation that is not newer
    stays, and so does all PTX that is not newer.
    """
    unknown = [i for i in images if i.kind not in (PTX, ELF)]
    exact = [i for i in images if i.kind == ELF and i.architecture == architecture]
    if exact:
        return exact + unknown
    older = [
        i
        for i in images
        if i.architecture == architecture or (i.architecture < architecture and not i.exact_only)
        if i.kind == PTX or (i.kind == ELF and i.architecture // 10 == architecture // 10)
    ]
    return older + unknown


def blank_images(data: bytearray, architecture: int) -> dict[str, Any] | None:
    """Overwrites, in a library, the images that this architecture does not load. Says what was done, or None."""
    sections = fatbin_sections(data)
    if not sections:
        return None
    kept: Counter[str] = Counter()
    blanked: Counter[str] = Counter()
    containers = inexact = empty = kept_bytes = blanked_bytes = 0
    for section in sections:
        # All of a section is read before any of it is changed.
        for images in list(read_containers(data, *section)):
            containers += 1
            keep = runnable(images, architecture)
            empty += not keep
            inexact += bool(keep) and not any(i.kind == ELF and i.architecture == architecture for i in keep)
            for image in images:
                size = image.end - image.start
                if image in keep:
                    kept[image.name] += 1
                    kept_bytes += size
                else:
                    data[image.start : image.end] = bytes(size)
                    blanked[image.name] += 1
                    blanked_bytes += size
    return {
        "architecture": architecture,
        "containers": containers,
        "containers_without_exact_image": inexact,
        "containers_with_nothing_to_run": empty,
        "kept_bytes": kept_bytes,
        "blanked_bytes": blanked_bytes,
        "kept": dict(sorted(kept.items())),
        "blanked": dict(sorted(blanked.items())),
    }


def installed_path(name: str) -> str | None:
    """Where a file of a wheel lies once installed, or None for scripts and other data outside the packages."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name:
        raise ValueError(f"{name!r} is no path inside a wheel")
    if parts[0].endswith(".data"):
        return "/".join(parts[2:]) if len(parts) > 2 and parts[1] in ("purelib", "platlib") else None
    return "/".join(parts)


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
    name = name or wheels[0].name.split("-")[0]
    files: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    cut: dict[str, Any] = {}
    seen: set[str] = set()
    content = bytearray()
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for info in archive.infolist():
                if info.is_dir():
                    continue
                path = installed_path(info.filename)
                if path is None or any(fnmatch.fnmatchcase(path, pattern) for pattern in leave_out):
                    left_out.append({"path": info.filename, "size": info.file_size})
                    continue
                if path in seen:
                    raise ValueError(f"{path} is in two of the wheels")
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

    raw = [bytes(content[at : at + SLICE]) for at in range(0, len(content), SLICE)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # lzma lets go of the interpreter's lock
        slices = list(pool.map(lambda part: compress(part, preset), raw))
    packed = b"".join(slices)

    out.mkdir(parents=True, exist_ok=True)
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
    (out / f"{name}.json").write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")
    return listing


def check(data: bytes | bytearray, stated: dict[str, Any], what: str) -> None:
    """ValueError unless size and digest are as stated."""
    if len(data) != stated["size"]:
        raise ValueError(f"{what} has {len(data)} bytes, not {stated['size']}")
    if hashlib.sha256(data).hexdigest() != stated["sha256"]:
        raise ValueError(f"{what} has another digest than the listing says")


def join(listing_path: Path, target: Path) -> int:
    """Checks and unpacks the pieces beside one listing into the folder target. Returns the number of files."""
    listing = json.loads(listing_path.read_text(encoding="utf-8"))
    if listing.get("version") != VERSION:
        raise ValueError(f"{listing_path} is no listing of this version")
    packed = bytearray()
    for stated in listing["pieces"]:
        piece = (listing_path.parent / Path(stated["name"]).name).read_bytes()
        check(piece, stated, stated["name"])
        packed += piece
    check(packed, listing["whole"], "the whole")

    parts, at = [], 0
    for size in listing["slices"]:
        parts.append(bytes(packed[at : at + size]))
        at += size
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # lzma lets go of the interpreter's lock
        content = b"".join(pool.map(lzma.decompress, parts))
    check(content, listing["content"], "the content")

    view, at = memoryview(content), 0
    for file in listing["files"]:
        path = installed_path(file["path"])
        if path is None or path != file["path"]:
            raise ValueError(f"{file['path']!r} is no path to unpack")
        destination = target / path
        destination.parent.mkdir(parents=True, exist_ok=True)
        destination.write_bytes(view[at : at + file["size"]])
        destination.chmod(0o755 if file["executable"] else 0o644)
        at += file["size"]
    return len(listing["files"])


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
    for file in listing["left_out"]:
        print(f"{file['path']}: left out, {file['size']:,} bytes")
    for piece in listing["pieces"]:
        print(f"{piece['name']}: {piece['size'] / (1 << 20):.1f} MiB")


def run_join(arguments: argparse.Namespace) -> None:
    """The command join."""
    listings = sorted(arguments.folder.glob("*.json"))
    if not listings:
        raise ValueError(f"there is no listing in {arguments.folder}")
    for listing in listings:
        print(f"{listing.stem}: {join(listing, arguments.target)} files in {arguments.target}")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Packs wheels into pieces, and puts the pieces together.")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("make", help="pack wheels into pieces")
    command.add_argument("wheel", type=Path, nargs="+")
    command.add_argument("--out", type=Path, required=True, help="the folder for the pieces")
    command.add_argument("--name", help="what the pieces are called; the first wheel's name by default")
    command.add_argument("--architecture", type=int, help="the one to keep device code for, such as 90; all by default")
    command.add_argument("--piece-mib", type=float, default=60, help="the most a piece may have")
    command.add_argument("--preset", type=int, default=6, choices=range(10), help="of xz")
    command.add_argument("--leave-out", action="append", default=[], metavar="PATTERN", help="files to leave out")
    command.set_defaults(run=run_make)
    command = commands.add_parser("join", help="put pieces together")
    command.add_argument("folder", type=Path, help="where the pieces and their listings lie")
    command.add_argument("--target", type=Path, required=True, help="the folder to unpack into")
    command.set_defaults(run=run_join)
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except (OSError, ValueError, KeyError, lzma.LZMAError, zipfile.BadZipFile) as error:
        print(f"pack.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
