"""A data set as a folder of arrays that are mapped instead of read: what hcmen-convert writes.

    dataset.json              where the numbers come from, and the sizes of what follows
    train/ valid/ test/       text.npy audio.npy vision.npy                              float32 [N, T, F], as in Split
                              text_lengths.npy audio_lengths.npy vision_lengths.npy      int64 [N]
                              text_bert.npy                                              int64 [N, 3, T]
                              regression_labels.npy                                      float32 [N]
                              id.json                                                    N strings

Labels and names are always there. Of the others a folder has what its source has, the same in every split.
The names are MMSA's keys, so a folder is checked by the same code as a pickle. The numbers are what the reader makes
of the pickle: cleaned, float32, zero beyond the lengths.

A folder appears whole or not at all (hcmen/base/files.py). The arrays are written rather than mapped, since a full disk
ends a process that writes through a map.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import hcmen
from hcmen.base.errors import CorruptFileError, InputError, reason_of, shown
from hcmen.base.files import check_writable, open_regular, refused, sweep, writing_folder
from hcmen.base.inputs import Inputs
from hcmen.base.manifest import FrontEnd, front_ends_from_json, front_ends_to_json
from hcmen.base.modalities import MODALITIES
from hcmen.base.npy import read_npy_header
from hcmen.base.records import JsonFile, JsonObject, read_json
from hcmen.data import SPLITS, MultimodalDataset, Split
from hcmen.data.layout import Fit, RawArray, RawSplit, fitted, open_splits, whole_numbers, with_tokens

__all__ = ["INDEX", "check_free", "map_arrays", "read_folder", "write_folder"]

SCHEMA_VERSION = 1
INDEX = "dataset.json"

_IDS = "id.json"
_ARRAYS = {
    **{m: (np.dtype("<f4"), 3) for m in MODALITIES},
    **{f"{m}_lengths": (np.dtype("<i8"), 1) for m in MODALITIES},
    "text_bert": (np.dtype("<i8"), 3),
    "regression_labels": (np.dtype("<f4"), 1),
}
_ALWAYS = {_IDS, "regression_labels.npy"}
_AGAIN = "convert the data file again"
_MOST_ID_BYTES = 64 << 20


def read_folder(folder: Path, inputs: Inputs | Fit) -> MultimodalDataset:
    """The data set in `folder`, checked against `inputs` as `read_mmsa` says; features stay on disk.

    Raises:
        InputError: `folder` holds no data set, or not the one `inputs` is for.
        CorruptFileError: a file is missing, truncated or altered.
    """
    index = _read_index(folder)
    data = {name: _map_split(folder, name, index) for name in SPLITS}
    inputs = fitted(inputs, data, str(folder), index["label_range"])
    splits = {}
    for name, raw in open_splits(data, str(folder), inputs).items():
        split = Split(dict(raw.raw), dict(raw.given), raw.labels, raw.ids)
        splits[name] = with_tokens(split, raw, inputs.text_tokens, f"{folder}: {name}")
    return MultimodalDataset(
        str(folder),
        splits,
        inputs.label_min,
        inputs.label_max,
        index["cleaned"],
        index["misplaced"],
        index["front_ends"],
    )


def map_arrays(folder: Path, split: str) -> dict[str, dict[str, Any]]:
    """One split of `folder` in MMSA's layout, {split: {key: array}}, the arrays read-only maps.

    Raises:
        InputError: `folder` holds no data set.
        CorruptFileError: a file is missing, truncated or altered.
    """
    return {split: _map_split(folder, split, _read_index(folder))}


def check_free(out: Path, force: bool) -> None:
    """Finds out before the work whether a data set may and can be written to `out`.

    Raises:
        InputError: something is there that `force` does not allow to replace, or the place cannot be written.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out}: is there and is no folder, expected a new name: choose another")
    if out.exists() and any(out.iterdir()):
        if not (out / INDEX).exists():
            raise InputError(f"{out}: holds files and no {INDEX}, so it is no data set to replace: choose another name")
        if not force:
            raise InputError(f"{out}: holds a data set already: replace it with --force, or choose another name")
    with _written(out):
        check_writable(out.parent)
        sweep(out.parent, out.name)


def write_folder(
    out: Path,
    splits: Mapping[str, RawSplit],
    source: Mapping[str, Any],
    release: Callable[[], None] = lambda: None,
    on_bytes: Callable[[int], None] = lambda _: None,
    *,
    label_range: tuple[float, float] | None = None,
    front_ends: Mapping[str, FrontEnd] | None = None,
) -> dict[str, Any]:
    """Writes `splits` to the folder `out`, whole or not at all, in place of a data set that is there.

    Args:
        out: the folder.
        splits: train, valid and test, with the same modalities.
        source: what the index says of their origin.
        release: called whenever some megabytes of the stored arrays have been touched.
        on_bytes: called with the number of bytes written since the last call.
        label_range: that of the scale which the labels are on; None where nobody knows it.
        front_ends: per modality what made its features.

    Returns:
        What dataset.json says.

    Raises:
        InputError: there is too little space, or the place cannot be written; nothing is left behind.
    """
    needed = sum(4 * raw.size for split in splits.values() for raw in split.raw.values())
    needed += sum(8 * split.text_bert.size for split in splits.values() if split.text_bert is not None)
    with _written(out):
        free = shutil.disk_usage(out.parent).free
        if needed > free:
            raise InputError(
                f"{out}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: free some space or choose another "
                "place"
            )
        with writing_folder(out) as temporary:
            known = {"label_range": label_range, "front_ends": front_ends_to_json(front_ends or {})}
            return _write(temporary, splits, {"source": dict(source), **known}, release, on_bytes)


# --- writing --------------------------------------------------------------------------------------------------------


def _write(
    folder: Path,
    splits: Mapping[str, RawSplit],
    known: Mapping[str, Any],
    release: Callable[[], None],
    on_bytes: Callable[[int], None],
) -> dict[str, Any]:
    """known: what the index says beside what is counted here."""
    there = dict.fromkeys(m for split in splits.values() for m in split.raw)
    cleaned, misplaced = dict.fromkeys(there, 0), dict.fromkeys(there, 0)
    described = {}
    for name, split in splits.items():
        (folder / name).mkdir()
        for m in split.raw:
            lengths = np.empty(len(split), np.int64)

            def features(m: str = m, split: RawSplit = split, lengths: RawArray = lengths) -> Iterable[RawArray]:
                first = 0
                for piece in split.pieces(m, release):
                    lengths[first : first + len(piece.lengths)] = piece.lengths
                    first += len(piece.lengths)
                    cleaned[m] += piece.cleaned
                    misplaced[m] += piece.misplaced
                    yield piece.features
                    on_bytes(piece.features.nbytes)

            _write_array(folder / name / f"{m}.npy", m, split.raw[m].shape, features())
            _write_array(folder / name / f"{m}_lengths.npy", f"{m}_lengths", lengths.shape, [lengths])
        if split.text_bert is not None:
            stored = split.text_bert
            starts = range(0, len(stored), 1024)
            tokens = (whole_numbers(stored[i : i + 1024], name) for i in starts)
            _write_array(folder / name / "text_bert.npy", "text_bert", stored.shape, tokens)
        _write_array(folder / name / "regression_labels.npy", "regression_labels", split.labels.shape, [split.labels])
        _write_json(folder / name / _IDS, split.ids)
        described[name] = {
            "samples": len(split),
            "sizes": {m: {"steps": x.shape[1], "features": x.shape[2]} for m, x in split.raw.items()},
            "bytes": {path.name: path.stat().st_size for path in sorted((folder / name).iterdir())},
        }
    labels = np.concatenate([split.labels for split in splits.values()])
    index = {
        "schema_version": SCHEMA_VERSION,
        **known,
        "cleaned": cleaned,
        "misplaced": misplaced,
        "left_out": {name: str(s.unusable_tokens) for name, s in splits.items() if s.unusable_tokens is not None},
        "label_min": float(labels.min()),
        "label_max": float(labels.max()),
        "splits": described,
        "versions": {"hcmen": hcmen.__version__, "numpy": np.__version__},
    }
    _write_json(folder / INDEX, index)
    return index


def _write_array(path: Path, key: str, shape: tuple[int, ...], pieces: Iterable[RawArray]) -> None:
    dtype, _ = _ARRAYS[key]
    with open(path, "wb") as file:
        header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, dtype).data)


def _write_json(path: Path, data: Any) -> None:
    with open(path, "w", encoding="ascii") as file:
        json.dump(data, file, indent=2 if isinstance(data, dict) else None, allow_nan=False)
        file.write("\n")


def _written(out: Path) -> contextlib.AbstractContextManager[None]:
    return refused(out, "a place for the converted data set", "choose another place")


# --- reading --------------------------------------------------------------------------------------------------------


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.exists():
        raise InputError(
            f"{folder}: is a directory without {INDEX}, expected a data file or a folder that hcmen-convert wrote"
        )
    index = read_json(path, _AGAIN, "a data set")
    found = index.get("schema_version") if isinstance(index, dict) else None
    if found != SCHEMA_VERSION:
        raise CorruptFileError(
            f"{path}: schema_version is {shown(found)}, expected {SCHEMA_VERSION}: convert the data file again"
        )
    cleaned, splits = index.get("cleaned"), index.get("splits")
    misplaced = index.setdefault("misplaced", {})  # folders of before have none
    ends = index.setdefault("front_ends", {})
    known = index.setdefault("label_range", None)
    told = JsonObject("", {"label_range": known, "front_ends": ends}, JsonFile(str(path), _AGAIN))
    index["front_ends"] = front_ends_from_json(told.object("front_ends"))
    index["label_range"] = None if known is None else told.numbers("label_range", 2)
    names = {_IDS, *(f"{key}.npy" for key in _ARRAYS)}
    whole = isinstance(cleaned, dict) and set(cleaned) <= set(MODALITIES)
    whole = whole and all(type(n) is int for n in cleaned.values()) and isinstance(splits, dict)
    whole = whole and isinstance(misplaced, dict) and all(type(n) is int for n in misplaced.values())
    for split in SPLITS:
        sizes = splits.get(split, {}).get("bytes") if whole and isinstance(splits.get(split, {}), dict) else None
        if (
            not isinstance(sizes, dict)
            or not _ALWAYS <= set(sizes) <= names
            or any((f"{m}.npy" in sizes) != (f"{m}_lengths.npy" in sizes) for m in MODALITIES)
            or not all(type(n) is int for n in sizes.values())
        ):
            raise CorruptFileError(f"{path}: does not describe the split {split}: convert the data file again")
    assert isinstance(index, dict)
    return index


def _map_split(folder: Path, split: str, index: Mapping[str, Any]) -> dict[str, Any]:
    sizes = index["splits"][split]["bytes"]
    for name, expected in sizes.items():
        path = folder / split / name
        with contextlib.suppress(OSError):
            size = path.stat().st_size
            if size == expected and path.is_file():
                continue
            raise CorruptFileError(
                f"{path}: has {size} bytes, {INDEX} says {expected}: truncated or altered, convert the data file again"
            )
        raise CorruptFileError(f"{path}: cannot be found or read, {INDEX} lists it: convert the data file again")
    data: dict[str, Any] = {
        key: _map_array(folder / split / f"{key}.npy", key) for key in _ARRAYS if f"{key}.npy" in sizes
    }
    data["id"] = read_json(folder / split / _IDS, _AGAIN, "a list of names", _MOST_ID_BYTES)
    return data


def _map_array(path: Path, key: str) -> RawArray:
    wanted, rank = _ARRAYS[key]
    try:
        with refused(path, "an array"), open_regular(path) as file:
            header = read_npy_header(file)
            if (header.dtype, len(header.shape), header.fortran) != (wanted, rank, False):
                raise CorruptFileError(
                    f"{path}: {header.dtype} of shape {list(header.shape)}, expected {wanted} with {rank} axes in C "
                    "order: convert the data file again"
                )
            size = os.fstat(file.fileno()).st_size
            # np.memmap reckons with 64 bits, beyond which a shape may come to any size.
            if header.offset + header.nbytes != size:
                raise ValueError(f"shape {list(header.shape)} in {size} bytes")
            # As a plain array over the map: np.memmap would hand its own class on to every result.
            return np.asarray(np.memmap(file, wanted, "r", header.offset, header.shape))
    except (ValueError, OverflowError) as error:
        raise CorruptFileError(f"{path}: damaged ({reason_of(error, 100)}): convert the data file again") from error
