"""Device code within libraries: what of it one architecture loads, and zeros in the place of the rest.

Images of device code for other architectures are overwritten with zeros, which xz packs to almost nothing. No file
changes its size, and all headers stay, so the loader and the CUDA runtime walk them as before. Such a library serves
devices of that one architecture only. cuobjdump needs -arch for it, as it would unpack the zeros too. Libraries that
make or carry their kernels in other ways, as TensorRT for RTX does for most of them, have little to cut.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Image", "blank_images", "read_containers", "runnable"]

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
    """Overwrites, in a library, the images that this architecture does not load. Says what was done, or None.

    Raises:
        ValueError: something is not understood.
    """
    try:
        sections = fatbin_sections(data)
    except struct.error:
        raise ValueError("the table of sections reaches past the file") from None
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
