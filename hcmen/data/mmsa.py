"""The data sets of MMSA: MOSI, MOSEI, SIMS and SIMSv2, aligned and unaligned, from a pickle or a converted folder.

layout.py says what is in them and how it is checked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hcmen.base.inputs import Inputs
from hcmen.data import FloatArray, IntArray, MultimodalDataset, Split
from hcmen.data.folder import read_folder
from hcmen.data.layout import Fit, RawSplit, fitted, open_splits, with_tokens
from hcmen.data.unpickle import load_pickle

__all__ = ["dataset_from_mmsa", "read_mmsa"]


def read_mmsa(path: str | Path, inputs: Inputs | Fit) -> MultimodalDataset:
    """The data set in the MMSA file `path`, checked against the sizes and label range of `inputs`.

    A function for `inputs` is called with the sizes of the data, and makes the inputs to check it against.

    `path` may also be a folder that hcmen-convert wrote. The numbers are the same; those of the folder stay on disk,
    as read-only maps.

    Raises:
        InputError: no such file; a split or key is missing; the set is not the one `inputs` is for.
        CorruptFileError: the file is damaged, or holds anything but arrays, strings and numbers.
    """
    path = Path(path)
    if path.is_dir():
        return read_folder(path, inputs)
    return dataset_from_mmsa(load_pickle(path), str(path), inputs)


def dataset_from_mmsa(data: Any, name: str, inputs: Inputs | Fit) -> MultimodalDataset:
    """The data set in `data`, a dict of MMSA's layout; `name` is what error messages call it.

    Raises:
        InputError: as `read_mmsa`.
    """
    inputs = fitted(inputs, data, name)
    cleaned: dict[str, int] = {}
    misplaced: dict[str, int] = {}
    splits = {}
    for s, raw in open_splits(data, name, inputs).items():
        split = _converted(raw, cleaned, misplaced)
        splits[s] = with_tokens(split, raw, inputs.text_tokens, f"{name}: {s}")
    return MultimodalDataset(name, splits, inputs.label_min, inputs.label_max, cleaned, misplaced)


def _converted(split: RawSplit, cleaned: dict[str, int], misplaced: dict[str, int]) -> Split:
    features: dict[str, FloatArray] = {}
    lengths: dict[str, IntArray] = {}
    for m in split.raw:
        features[m] = np.empty(split.raw[m].shape, np.float32)
        lengths[m] = np.empty(len(split), np.int64)
        first = 0
        for piece in split.pieces(m):
            rows = slice(first, first := first + len(piece.lengths))
            features[m][rows], lengths[m][rows] = piece.features, piece.lengths
            cleaned[m] = cleaned.get(m, 0) + piece.cleaned
            misplaced[m] = misplaced.get(m, 0) + piece.misplaced
    return Split(features, lengths, split.labels, split.ids)
