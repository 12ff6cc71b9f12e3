"""The data files of MMSA: MOSI, MOSEI, SIMS and SIMSv2, aligned and unaligned.

A file is a pickled dict {"train", "valid", "test"} of dicts with these keys (N samples, T steps, F features):

    text [N, T, F]  audio [N, T, F]  vision [N, T, F]     features, padded at the end
    text_bert [N, 3, T]                                   token ids, attention mask, token types
    audio_lengths, vision_lengths [N]                     valid prefix; not in aligned files
    regression_labels [N]                                 sentiment; SIMS also has one per modality (_T, _A, _V)
    id [N]                                                "video$_$clip"
    raw_text, annotations, classification_labels          not used here

What is put right on the way: -inf, NaN, +inf and float64 values that overflow float32 become 0 and are counted; steps
beyond a sample's length become 0 (BERT writes something there); lengths that a file does not give are found from the
data. What cannot be put right is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hcmen.config import ModelConfig
from hcmen.data import SPLITS, FloatArray, IntArray, MultimodalDataset, Split
from hcmen.data.unpickle import load_pickle
from hcmen.errors import InputError
from hcmen.modalities import MODALITIES

__all__ = ["dataset_from_mmsa", "read_mmsa"]


def read_mmsa(path: str | Path, config: ModelConfig) -> MultimodalDataset:
    """The data set in the MMSA file `path`, checked against the sizes and label range of `config`.

    Raises:
        InputError: no such file; a split or key is missing; the set is not the one `config` is for.
        CorruptFileError: the file is damaged, or holds anything but arrays, strings and numbers.
    """
    path = Path(path)
    return dataset_from_mmsa(load_pickle(path), str(path), config)


def dataset_from_mmsa(data: Any, name: str, config: ModelConfig) -> MultimodalDataset:
    """The data set in `data`, a dict of MMSA's layout; `name` is what error messages call it.

    Raises:
        InputError: as `read_mmsa`.
    """
    if not isinstance(data, Mapping):
        raise InputError(f"{name}: holds a {type(data).__name__}, expected a dict with the splits {', '.join(SPLITS)}")
    cleaned = dict.fromkeys(MODALITIES, 0)
    splits = {s: _split(_member(data, s, Mapping, name), f"{name}: {s}", config, cleaned) for s in SPLITS}
    return MultimodalDataset(name, splits, config.label_min, config.label_max, cleaned)


def _split(data: Mapping[str, Any], where: str, config: ModelConfig, cleaned: dict[str, int]) -> Split:
    labels = _labels(_member(data, "regression_labels", object, where), where, config)
    features: dict[str, FloatArray] = {}
    lengths: dict[str, IntArray] = {}
    for m in MODALITIES:
        x, bad = _features(_member(data, m, object, where), where, m, config, len(labels))
        cleaned[m] += bad
        lengths[m] = _lengths(data, where, m, x)
        x[np.arange(x.shape[1]) >= lengths[m][:, None]] = 0.0
        features[m] = x
    return Split(features, lengths, labels, _ids(data.get("id", list(range(len(labels)))), where, len(labels)))


def _ids(value: Any, where: str, samples: int) -> list[str]:
    names = value.tolist() if isinstance(value, np.ndarray) else value
    plain = isinstance(names, (list, tuple)) and all(isinstance(n, (str, int, float)) for n in names)
    if not plain or len(names) != samples:
        got = f"{len(names)} entries" if isinstance(names, (list, tuple)) else f"a {type(names).__name__}"
        raise InputError(f"{where}: 'id' is {got}, expected {samples} names, one per label")
    return [str(n) for n in names]


def _member(data: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    if key not in data:
        raise InputError(f"{where}: '{key}' is missing, found {', '.join(sorted(map(str, data)))[:200] or 'nothing'}")
    if not isinstance(data[key], kind):
        raise InputError(f"{where}: '{key}' is a {type(data[key]).__name__}, expected a dict")
    return data[key]


def _array(value: Any, where: str, key: str, rank: int) -> np.ndarray[Any, np.dtype[Any]]:
    """`value` as an array of numbers with `rank` axes; a list will do for one axis."""
    # No nested lists: a small file can hold one that unfolds into any number of elements.
    is_list = isinstance(value, (list, tuple)) and all(isinstance(x, (int, float)) for x in value)
    if not isinstance(value, np.ndarray) and not is_list:
        raise InputError(f"{where}: '{key}' is a {type(value).__name__}, expected an array of numbers")
    array = np.asarray(value)
    if array.ndim != rank or array.dtype.kind not in "biuf":
        raise InputError(
            f"{where}: '{key}' is {array.dtype} of shape {list(array.shape)}, expected numbers with {rank} axes"
        )
    return array


def _features(value: Any, where: str, m: str, config: ModelConfig, samples: int) -> tuple[FloatArray, int]:
    raw = _array(value, where, m, 3)
    expected = config.modality(m)
    if raw.shape[2] != expected.features:
        raise InputError(
            f"{where}: {m} has {raw.shape[2]} features per step, expected {expected.features}: "
            "the file is of another data set than the preset"
        )
    if not 1 <= raw.shape[1] <= expected.max_steps:
        raise InputError(
            f"{where}: {m} has {raw.shape[1]} steps, expected 1 to {expected.max_steps}: "
            "the file is of another data set than the preset"
        )
    if raw.shape[0] != samples:
        raise InputError(f"{where}: {m} has {raw.shape[0]} samples, expected {samples}, one per label")
    with np.errstate(over="ignore", invalid="ignore"):
        x = np.array(raw, dtype=np.float32, order="C")
    bad = ~np.isfinite(x)
    count = int(np.count_nonzero(bad))
    if count:
        x[bad] = 0.0
    return x, count


def _lengths(data: Mapping[str, Any], where: str, m: str, x: FloatArray) -> IntArray:
    """Valid prefix of modality `m`, at least 1: given, or from the text mask, or the last non-zero frame."""
    key = f"{m}_lengths"
    if key in data:
        given = _array(data[key], where, key, 1)
        if len(given) != len(x) or np.any(given != np.floor(given)):
            raise InputError(f"{where}: '{key}' has {len(given)} entries, expected {len(x)} whole numbers")
        wrong = np.flatnonzero((given < 0) | (given > x.shape[1]))
        if wrong.size:
            raise InputError(
                f"{where}: '{key}' of sample {wrong[0]} is {given[wrong[0]]:g}, expected 0 to {x.shape[1]}, "
                f"the steps of {m}"
            )
        return np.maximum(given.astype(np.int64), 1)
    if m == "text" and "text_bert" in data:
        tokens = _array(data["text_bert"], where, "text_bert", 3)
        if tokens.shape != (len(x), 3, x.shape[1]):
            raise InputError(
                f"{where}: 'text_bert' has shape {list(tokens.shape)}, expected {[len(x), 3, x.shape[1]]}, as text has"
            )
        return _last(tokens[:, 1] != 0)
    return _last(x.any(axis=2))


def _last(real: np.ndarray[Any, np.dtype[np.bool_]]) -> IntArray:
    """One past the last true step per row of [N, T], at least 1. (argmin of a mask is 0 for a full row.)"""
    steps = np.arange(1, real.shape[1] + 1)
    return np.maximum((real * steps).max(axis=1), 1).astype(np.int64)


def _labels(value: Any, where: str, config: ModelConfig) -> FloatArray:
    labels = _array(value, where, "regression_labels", 1).astype(np.float32)
    if not labels.size:
        raise InputError(f"{where}: holds no samples, expected at least 1")
    # Labels are averages of several annotators, stored as they came out: allow the last bits.
    slack = 1e-4
    wrong = np.flatnonzero(~((labels >= config.label_min - slack) & (labels <= config.label_max + slack)))
    if wrong.size:
        raise InputError(
            f"{where}: the label of sample {wrong[0]} is {labels[wrong[0]]:g}, expected "
            f"{config.label_min:g} to {config.label_max:g}: the file is of another data set than the preset"
        )
    return labels
