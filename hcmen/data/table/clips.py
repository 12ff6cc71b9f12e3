"""The clips that a table names: measured first, since all have to be padded to the longest, and read when written."""

from __future__ import annotations

import contextlib
import os
import struct
import zipfile
import zlib
from pathlib import Path

from hcmen.base.clip import TEXT_TOKENS, Clip, read_clip
from hcmen.base.errors import InputError
from hcmen.base.files import open_regular
from hcmen.base.inputs import MOST_FEATURES, MOST_STEPS, FeatureConfig, Inputs
from hcmen.base.modalities import MODALITIES
from hcmen.base.npy import read_npy_header

__all__ = ["Shapes", "checked", "frames", "signature"]

Shapes = dict[str, tuple[int, int]]
"""Modality -> steps and features."""

_MOST_NUMBERS = 1 << 26
_MOST_FILE_BYTES = 1 << 30
_ANY = FeatureConfig(1, 1)


def signature(path: Path) -> list[int]:
    """What changes when the file does; raises OSError where none is there."""
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns]


def checked(path: Path) -> Shapes:
    """The sizes of the clip `path`, read whole.

    Raises:
        InputError, CorruptFileError: it is none, or holds what is no number.
    """
    shapes, keys = _declared(path)
    if TEXT_TOKENS in keys:
        raise InputError(f"holds {TEXT_TOKENS}", "features", "give the words in a column 'text'", where=str(path))
    for m, (steps, features) in shapes.items():
        if steps * features > _MOST_NUMBERS:
            raise InputError(f"{m} has {steps * features} numbers", f"at most {_MOST_NUMBERS}", where=str(path))
    clip = _read(path, shapes)
    for m, count in clip.cleaned.items():
        raise InputError(f"{m} has {count} NaN or infinite values", "finite numbers", "mend it", where=str(path))
    return {m: (x.shape[0], x.shape[1]) for m, x in clip.features.items()}


def frames(path: Path, m: str, shape: tuple[int, int]) -> Clip:
    """The clip `path` with its modality `m` alone, which has this shape.

    Raises:
        InputError, CorruptFileError: it is not what `checked` saw.
    """
    clip = _read(path, {m: shape})
    if clip.cleaned or clip.features[m].shape != shape:
        raise InputError("has changed since it was checked", fix="convert again", where=str(path))
    return clip


def _read(path: Path, shapes: Shapes) -> Clip:
    sizes = {m: FeatureConfig(features, steps) for m, (steps, features) in shapes.items()} or {"text": _ANY}
    return read_clip(path, Inputs(sizes.get("text"), sizes.get("audio"), sizes.get("vision")), clean=True)


def _declared(path: Path) -> tuple[Shapes, list[str]]:
    """What the headers in the file say, and its keys; nothing where it is no clip, which `read_clip` tells better."""
    shapes: Shapes = {}
    keys: list[str] = []
    # What zipfile raises has no common base.
    damage = (OSError, ValueError, RuntimeError, struct.error, zlib.error, EOFError, OverflowError, zipfile.BadZipFile)
    with contextlib.suppress(*damage, NotImplementedError, zipfile.LargeZipFile), open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > _MOST_FILE_BYTES:
            raise InputError(f"has more than {_MOST_FILE_BYTES >> 20} MiB", fix="cut the clip", where=str(path))
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist()[: len(MODALITIES) + 2]:
                key = member.filename.removesuffix(".npy")
                keys.append(key)
                if key not in MODALITIES:
                    continue
                shapes[key] = 1, 1  # which a header that is none does not fit
                with archive.open(member) as stream:
                    shape = read_npy_header(stream).shape
                if len(shape) == 2:
                    shapes[key] = min(max(shape[0], 1), MOST_STEPS), min(max(shape[1], 1), MOST_FEATURES)
    return shapes, keys
