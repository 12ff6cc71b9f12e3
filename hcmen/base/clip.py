"""Clips: one sample each, its features per modality, read from .npz files that are not trusted.

A clip file holds `text`, `audio` and `vision`, whichever are there, each a float array [time, features] (float16,
float32 or float64; computed in float32). For a model with a text encoder the text is `text_tokens` instead, integers
[3, time]: token ids, attention mask (all ones), token types. Of the two, the one that the model cannot take is set
aside, by name. Any other key is refused, since a misspelt `vison` would otherwise silently become a missing modality.

Member names, count, declared sizes, dtypes and shapes are checked before anything is decompressed beyond the first
few kilobytes of a member, and a member's declared size must be what its shape needs. What the model takes bounds the
shape, so memory is bounded too, whatever the compression ratio.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from hcmen.base.errors import CorruptFileError, InputError, did_you_mean, reason_of, shown
from hcmen.base.files import open_regular, writing_file
from hcmen.base.inputs import Inputs
from hcmen.base.modalities import MODALITIES, Variant, variant_for
from hcmen.base.npy import NpyHeader, read_npy_header
from hcmen.base.strangers import HEAD_BYTES, stranger
from hcmen.base.typed import as_typed

__all__ = [
    "TEXT_TOKENS",
    "Clip",
    "NotAnArchive",
    "batch_clips",
    "clip_from_arrays",
    "graph_inputs",
    "read_clip",
    "write_clip",
]

TEXT_TOKENS = "text_tokens"
"""The key of a text as a text encoder takes it, in clips and as a graph input."""
_KEYS = (*MODALITIES, TEXT_TOKENS)
_FLOATS = ("float16", "float32", "float64")
_MAX_MEMBERS = 16
_MOST_UNREAD_BYTES = 16 << 20
"""Of a modality that the model does not have: it is never unpacked, only the file may be that much longer."""

# What reading a damaged or hostile zip can raise; zipfile has no common base for them. OSError: an offset below zero.
_ZIP_ERRORS = (
    OSError,
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    UnicodeDecodeError,
    ValueError,
)


@dataclass(frozen=True)
class Clip:
    """One sample.

    name: what to call it, usually its path. features: modality -> float32 [time, features], present modalities alone.
    cleaned: modality -> how many NaN or infinite values were set to zero. ignored: keys of the file that this model
    has no use for. text_tokens: int64 [3, time], the text for a model with a text encoder.
    """

    name: str
    features: Mapping[str, NDArray[np.float32]]
    cleaned: Mapping[str, int] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    text_tokens: NDArray[np.int64] | None = None

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything the clip carries by its key in a clip file."""
        return {**self.features, **({} if self.text_tokens is None else {TEXT_TOKENS: self.text_tokens})}

    @property
    def present(self) -> tuple[str, ...]:
        """The modalities that the clip carries."""
        return tuple(m for m in MODALITIES if m in self.features or (m == "text" and self.text_tokens is not None))

    @property
    def steps(self) -> int:
        """How long it is, all modalities together."""
        return sum(map(len, self.features.values())) + (0 if self.text_tokens is None else self.text_tokens.shape[1])

    @property
    def variant(self) -> Variant:
        """The variant that uses all that the clip carries; raises InputError when it carries nothing."""
        return variant_for(self.present)


class NotAnArchive(InputError):
    """A file that does not begin as an .npz does, or not yet."""


def read_clip(path: str | os.PathLike[str], inputs: Inputs, clean: bool = False) -> Clip:
    """Reads and checks the clip file `path` for a model that takes `inputs`.

    Args:
        path: an .npz file; links are followed.
        inputs: of the model, bounds every modality's feature count and length.
        clean: set NaN and infinity to zero and count them, instead of refusing them.

    Raises:
        InputError: no such file, not a file, not an .npz, or content that does not fit the model.
        CorruptFileError: truncated or altered, or it asks for something unsafe (pickled objects, false sizes).
    """
    name = os.fspath(path)
    with _opened(name) as file:
        start = file.read(HEAD_BYTES)
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            raise CorruptFileError("the file is empty", "an .npz clip", "write it again", where=name)
        if start.startswith(b"\x93NUMPY"):
            raise InputError("a single .npy array", "an .npz with text, audio, vision", "use numpy.savez", where=name)
        other = stranger(start, name)
        if other is not None:
            raise NotAnArchive(other[0], "an .npz clip with text, audio, vision", other[1], where=name)
        if not start.startswith(b"PK"):
            raise NotAnArchive("not an .npz file", "a clip with text, audio, vision", "use numpy.savez", where=name)
        most = 4 * sum(_most_bytes(inputs, m) for m in _KEYS) + (1 << 20)
        if size > most:
            raise InputError(f"the file has {size} bytes", f"at most {most} for this model", "cut the clip", where=name)
        try:
            with zipfile.ZipFile(file) as archive:
                arrays, ignored = _read_members(name, archive, inputs)
        except _ZIP_ERRORS as error:
            raise CorruptFileError(
                f"damaged .npz ({reason_of(error)})", fix="write or copy it again", where=name
            ) from error
    clip = clip_from_arrays(name, arrays, inputs, clean)
    return dataclasses.replace(clip, ignored=ignored)


def clip_from_arrays(name: str, arrays: Mapping[str, Any], inputs: Inputs, clean: bool = False) -> Clip:
    """A checked clip from arrays in memory; the arrays given are never changed.

    Args:
        name: what to call the clip in results and messages.
        arrays: modality -> float array [time, features], `text_tokens` -> integers [3, time].
        inputs: of the model, bounds every modality's feature count and length.
        clean: set NaN and infinity to zero and count them, instead of refusing them.

    Raises:
        InputError: a key, rank, dtype, feature count, length or value that does not fit the model.
    """
    _check_keys(name, arrays, inputs)
    features: dict[str, NDArray[np.float32]] = {}
    cleaned: dict[str, int] = {}
    tokens = None
    for m in (m for m in _wanted(inputs) if m in arrays):
        try:
            array = np.asarray(arrays[m])
        except ValueError as error:
            shape = "integers [3, time]" if m == TEXT_TOKENS else "float [time, features]"
            raise InputError(f"{m} is no array ({reason_of(error)})", shape, "make it one", where=name) from None
        _check_array(name, m, array.dtype, array.shape, inputs)
        if m == TEXT_TOKENS:
            tokens = _checked_tokens(name, array, inputs)
            continue
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(array, dtype=np.float32)
        finite = np.isfinite(values)
        bad = int(values.size - np.count_nonzero(finite))
        if bad and not clean:
            raise InputError(
                f"{m} has {bad} NaN or infinite values among {values.size}",
                "finite numbers",
                "mend the clip, or set them to zero with --clean (clean=True)",
                where=name,
            )
        if bad:
            values = np.where(finite, values, np.float32(0))
            cleaned[m] = bad
        features[m] = values
    if not features and tokens is None:
        raise InputError("no modality is present", f"at least one of {', '.join(_wanted(inputs))}", where=name)
    return Clip(name, features, cleaned, tuple(k for k in arrays if k not in _wanted(inputs)), tokens)


def batch_clips(clips: Sequence[Clip], modalities: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
    """The graph inputs of one batch: per modality `m` [batch, longest time, features] and `m_length` int64 [batch].

    Shorter clips are padded with zeros at the end. A text for a text encoder is `text_tokens` int64
    [batch, 3, longest time] alone: its attention mask says how long it is.

    Args:
        clips: at least one; each carries every one of `modalities`.
        modalities: the ones to batch, all that the first clip carries by default.

    Raises:
        InputError: no clip, or a clip lacks one of the modalities.
    """
    if not clips:
        raise InputError("no clip to batch, expected at least one")
    wanted = set(clips[0].present if modalities is None else modalities)
    inputs: dict[str, NDArray[Any]] = {}
    for m in (m for m in MODALITIES if m in wanted):
        tokens = [clip.text_tokens for clip in clips if m == "text" and clip.text_tokens is not None]
        for clip in clips:
            if m not in clip.present or (tokens and clip.text_tokens is None):
                raise InputError(
                    f"{clip.name}: {TEXT_TOKENS if tokens else m} is missing, and the batch needs "
                    f"{', '.join(sorted(wanted))}: choose a variant without it"
                )
        if tokens:
            inputs[TEXT_TOKENS] = np.zeros((len(clips), 3, max(t.shape[1] for t in tokens)), np.int64)
            for row, t in zip(inputs[TEXT_TOKENS], tokens, strict=True):
                row[:, : t.shape[1]] = t
            continue
        lengths = np.array([len(clip.features[m]) for clip in clips], np.int64)
        batch = np.zeros((len(clips), int(lengths.max()), clips[0].features[m].shape[1]), np.float32)
        for row, clip in zip(batch, clips, strict=True):
            row[: len(clip.features[m])] = clip.features[m]
        inputs[m] = batch
        inputs[f"{m}_length"] = lengths
    return inputs


def graph_inputs(features: Mapping[str, NDArray[Any]], lengths: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """A padded batch under the names of the graph's inputs.

    Args:
        features: {m: float32 [batch, time, features]}, text possibly as tokens int64 [batch, 3, time].
        lengths: {m: int64 [batch]}.
    """
    inputs: dict[str, NDArray[Any]] = {}
    for m, x in features.items():
        if x.dtype == np.int64:
            inputs[TEXT_TOKENS] = x
        else:
            inputs |= {m: x, f"{m}_length": lengths[m]}
    return inputs


def write_clip(path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Writes a clip file, whole or not at all.

    Args:
        path: the file. arrays: modality -> numbers [time, features], `text_tokens` -> integers [3, time].

    Raises:
        InputError: a key that is not a modality, or none.
        OSError: the place cannot be written; nothing is left behind.
    """
    target = Path(path)
    _check_keys(str(target), arrays)
    arrays = {k: np.asarray(x, dtype=np.int64 if k == TEXT_TOKENS else np.float32) for k, x in arrays.items()}
    if not arrays:
        raise InputError(f"{target}: no modality to write, expected at least one of {', '.join(MODALITIES)}")
    with writing_file(target) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type,unused-ignore]


def _opened(name: str) -> IO[bytes]:
    """The regular file `name`, open for reading. A pipe or device is refused instead of waited for."""
    try:
        return open_regular(name)
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.EINVAL):
            kind = "a folder" if error.errno == errno.EISDIR else "not a regular file"
            raise InputError(kind, "an .npz clip", "give the path of a file", where=name) from error
        hints = {errno.ENOENT: "check the path", errno.EACCES: "check its owner and permissions"}
        hint = hints.get(error.errno or 0, "give the path of an .npz clip")
        raise InputError((error.strerror or "cannot be opened").lower(), fix=hint, where=name) from error
    except ValueError as error:
        raise InputError(f"{name!r}: {error}", fix="give the path of an .npz clip") from error


def _most_bytes(inputs: Inputs, modality: str) -> int:
    if modality == TEXT_TOKENS:
        return 3 * inputs.modality("text").max_steps * 8 if inputs.text_tokens else 0
    if modality not in inputs.modalities:
        return _MOST_UNREAD_BYTES
    sizes = inputs.modality(modality)
    return sizes.features * sizes.max_steps * 8


def _wanted(inputs: Inputs) -> tuple[str, ...]:
    """The keys that `inputs` takes, in axis order."""
    return tuple(TEXT_TOKENS if m == "text" and inputs.text_tokens else m for m in inputs.modalities)


def _check_keys(name: str, keys: Iterable[str], inputs: Inputs | None = None) -> None:
    present = list(keys)
    for key in present:
        if key not in _KEYS:
            held = f"a clip holds {', '.join(_wanted(inputs) if inputs else _KEYS)}: remove others"
            fix = f"{did_you_mean(str(key), _KEYS)} {held}".lstrip()
            raise InputError(f"unknown key {shown(key)}", fix=fix, where=name)
    if inputs is None or not present or any(k in present for k in _wanted(inputs)):
        return
    if not any(k in present for k in ("text", TEXT_TOKENS)) or inputs.text is None:
        raise InputError(
            f"only {' and '.join(present)} is present, and this model has {' and '.join(inputs.modalities)} alone",
            fix=f"give {' or '.join(_wanted(inputs))}, or use a bundle trained with {' and '.join(present)}",
            where=name,
        )
    if inputs.text_tokens:
        raise InputError(
            "only text features are present, and this model makes its own from tokens",
            fix=f"give {TEXT_TOKENS} [3, time], or words with {as_typed('hcmen-run')} --text",
            where=name,
        )
    raise InputError(
        f"only {TEXT_TOKENS} is present, and this model has no text encoder",
        fix="give text features [time, features] under 'text', or use a bundle with a text encoder",
        where=name,
    )


def _checked_tokens(name: str, array: NDArray[Any], inputs: Inputs) -> NDArray[np.int64]:
    tokens = inputs.text_tokens
    assert tokens is not None
    for row, what, limit in ((0, "token id", tokens.vocabulary), (2, "token type", tokens.token_types)):
        wrong = np.flatnonzero((array[row] < 0) | (array[row] >= limit))
        if wrong.size:
            raise InputError(
                f"{what} {array[row][wrong[0]]} at step {wrong[0]}",
                f"0 to {limit - 1}",
                "use the tokenizer of this bundle",
                where=name,
            )
    if np.any(array[1] != 1):
        raise InputError(
            f"the attention mask (row 1 of {TEXT_TOKENS}) is not all ones",
            fix="cut the padding off the clip",
            where=name,
        )
    return np.ascontiguousarray(array, dtype=np.int64)


def _check_array(name: str, modality: str, dtype: np.dtype[Any], shape: tuple[int, ...], inputs: Inputs) -> None:
    tokens = modality == TEXT_TOKENS
    sizes = inputs.modality("text" if tokens else modality)
    expected = "int64 [3, time]" if tokens else f"[time, {sizes.features}]"
    if dtype.hasobject:
        wanted = expected if tokens else f"float32 {expected}"
        raise CorruptFileError(f"{modality} holds Python objects", wanted, "never unpickled", where=name)
    if tokens:
        if dtype.kind not in "iu" or dtype.itemsize > 8 or dtype == np.uint64:
            raise InputError(f"{modality} has dtype {dtype}", expected, "token ids are whole numbers", where=name)
        if len(shape) != 2 or shape[0] != 3:
            raise InputError(
                f"{modality} has shape {list(shape)}", expected, "ids, attention mask and token types", where=name
            )
        shape = shape[::-1]
    if not tokens and dtype.newbyteorder("=").name not in _FLOATS:
        raise InputError(
            f"{modality} has dtype {dtype}", ", ".join(_FLOATS), "convert it with .astype('float32')", where=name
        )
    if len(shape) != 2:
        raise InputError(f"{modality} has shape {list(shape)}", expected, "one clip without a batch", where=name)
    if not tokens and shape[1] != sizes.features:
        raise InputError(
            f"{modality} has {shape[1]} features (shape {list(shape)})",
            expected,
            "use the features this model was trained on",
            where=name,
        )
    if shape[0] == 0:
        raise InputError(f"{modality} has no time step", f"1 to {sizes.max_steps}", "leave it out instead", where=name)
    if shape[0] > sizes.max_steps:
        raise InputError(
            f"{modality} has {shape[0]} steps", f"at most {sizes.max_steps}", "cut or resample the clip", where=name
        )


def _read_members(
    name: str, archive: zipfile.ZipFile, inputs: Inputs
) -> tuple[dict[str, NDArray[Any]], tuple[str, ...]]:
    members = archive.infolist()
    if len(members) > _MAX_MEMBERS:
        raise InputError(f"{len(members)} arrays", f"at most {len(MODALITIES)}", "remove the others", where=name)
    keys = [m.filename.removesuffix(".npy") for m in members]
    for key, member in zip(keys, members, strict=True):
        if not member.filename.endswith(".npy"):
            raise InputError(
                f"member {member.filename!r} is no .npy array", fix="write the clip with numpy.savez", where=name
            )
        if keys.count(key) > 1:
            raise CorruptFileError(f"{key!r} is there twice", "once", "write the clip with numpy.savez", where=name)
    _check_keys(name, keys, inputs)
    wanted = {k: m for k, m in zip(keys, members, strict=True) if k in _wanted(inputs)}
    if not wanted:
        raise InputError("no modality is present", f"at least one of {', '.join(_wanted(inputs))}", where=name)
    headers = {key: _read_header(name, key, archive, member, inputs) for key, member in wanted.items()}
    arrays = {key: _read_array(archive, wanted[key], header) for key, header in headers.items()}
    return arrays, tuple(k for k in keys if k not in wanted)


def _read_header(name: str, key: str, archive: zipfile.ZipFile, member: zipfile.ZipInfo, inputs: Inputs) -> NpyHeader:
    """The header, checked, from the first kilobytes of the member."""
    if member.flag_bits & 0x1:
        raise InputError(f"{key} is encrypted", "a plain .npz", "write the clip with numpy.savez", where=name)
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(f"{key} is compressed by method {member.compress_type}", "numpy.savez's own", where=name)
    with archive.open(member) as stream:
        try:
            header = read_npy_header(stream)
        except ValueError as error:
            raise CorruptFileError(
                f"{key} has no valid .npy header ({reason_of(error)})", fix="write the clip again", where=name
            ) from error
    _check_array(name, key, header.dtype, header.shape, inputs)
    needed = header.offset + header.nbytes
    if member.file_size != needed:
        raise CorruptFileError(
            f"{key} declares {member.file_size} bytes",
            f"{needed} for shape {list(header.shape)}",
            "write the clip again",
            where=name,
        )
    return header


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, header: NpyHeader) -> NDArray[Any]:
    with archive.open(member) as stream:
        data = stream.read(member.file_size + 1)
    if len(data) != member.file_size:
        raise EOFError(f"{member.filename} ends after {len(data)} of {member.file_size} bytes")
    return header.array(data)
