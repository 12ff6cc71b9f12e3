"""MMSA's layout of a data set, checked: what a pickle and a converted folder have in common.

A data set is a dict {"train", "valid", "test"} of dicts with these keys (N samples, T steps, F features):

    text [N, T, F]  audio [N, T, F]  vision [N, T, F]     features, padded at the end, or all in front
    text_bert [N, 3, T]                                   token ids, attention mask, token types: for a text encoder
    audio_lengths, vision_lengths [N]                     valid prefix; not in aligned files
    regression_labels [N]                                 sentiment; SIMS also has one per modality (_T, _A, _V)
    id [N]                                                "video$_$clip"
    raw_text, annotations, classification_labels          not used here

A set may lack modalities, all its splits the same ones: it needs one of text, audio, vision and text_bert.

What is put right on the way: -inf, NaN, +inf and float64 values that overflow float32 become 0 and are counted; samples
with their padding in front are moved to the start (padding.py) and counted; steps beyond a sample's length become 0,
and are counted but for text, where BERT writes something; lengths that a file does not give are found from the data.
What cannot be put right is refused. A key that nobody needs refuses nothing, such as a `text_bert` that is no tokens.

Axes go by their name, never by their order: the file's audio is read as audio whatever its place. `RawSplit` is a split
that has been checked and not converted; its pieces are converted one after the other, so that a file larger than the
memory can pass through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hcmen.base.errors import InputError
from hcmen.base.inputs import FeatureConfig, Inputs, TokenConfig
from hcmen.base.modalities import MODALITIES
from hcmen.data import SPLITS, FloatArray, IntArray, Split, TextTokens
from hcmen.data.padding import beyond_length, in_front, mask_starts, moved
from hcmen.data.unpickle_advice import contents

__all__ = [
    "LABEL_SLACK",
    "Fit",
    "Piece",
    "RawArray",
    "RawSplit",
    "Sizes",
    "checked_tokens",
    "fitted",
    "open_split",
    "open_splits",
    "whole_numbers",
    "with_tokens",
]

RawArray = npt.NDArray[Any]


LABEL_SLACK = 1e-4
"""Labels are averages of several annotators, stored as they came out: the last bits may be beyond the range."""
# Stored bytes per piece. A piece passes through a handful of temporaries of its size.
_PIECE_BYTES = 1 << 23
_MOST_NAME = 1000
_OTHER = "store its arrays in the layout of docs/data.md, or make a table of it for hcmen-convert"


def open_split(data: Any, split: str, name: str, inputs: Inputs | None = None) -> RawSplit:
    """The split `split` of `data`, a dict of MMSA's layout; `name` is what error messages call it.

    Args:
        data: {"train", "valid", "test"}, see the top of this file.
        split: which one; the others are not looked at.
        name: what error messages call the data.
        inputs: the sizes and label range to hold the split against; any will do if None.

    Raises:
        InputError: the split or one of its keys is missing, its arrays do not fit each other, or do not fit `inputs`.
    """
    if not isinstance(data, Mapping):
        raise InputError(f"holds {contents(data)}", f"a dict with the splits {', '.join(SPLITS)}", _OTHER, where=name)
    members, where = _member(data, split, Mapping, name), f"{name}: {split}"
    labels = _labels(_member(members, "regression_labels", object, where), where, inputs)
    wanted = MODALITIES if inputs is None else inputs.modalities
    if not any(key in members for key in (*wanted, *(["text_bert"] if "text" in wanted else []))):
        found = ", ".join(m for m in (*MODALITIES, "text_bert") if m in members) or "none of them"
        raise InputError(f"has {found}", f"{' or '.join(wanted)}, at least one", where=where)
    raw = {m: _features(members[m], where, m, inputs, len(labels)) for m in wanted if m in members}
    given = {m: n for m, x in raw.items() if (n := _given_lengths(members, where, m, x)) is not None}
    ids = _ids(members.get("id", list(range(len(labels)))), where, len(labels))
    try:
        tokens, unusable = _text_bert(members, where, len(labels)), None
    except InputError as error:
        tokens, unusable = None, error
    return RawSplit(labels, ids, raw, given, tokens, where, unusable)


def open_splits(data: Any, name: str, inputs: Inputs | None = None) -> dict[str, RawSplit]:
    """Every split as `open_split` gives it.

    Raises:
        InputError: as there, or the splits have different modalities.
    """
    splits = {s: open_split(data, s, name, inputs) for s in SPLITS}
    # Beside text features a split may lack tokens: those that cannot be used are left out of a folder.
    there = {
        s: (*(["text_bert"] if split.text_bert is not None and "text" not in split.raw else []), *split.raw)
        for s, split in splits.items()
    }
    if len(set(there.values())) > 1:
        told = "; ".join(f"{', '.join(keys) or 'nothing'} in {s}" for s, keys in there.items())
        raise InputError(f"has {told}", "the same in every split", where=name)
    return splits


class Sizes(NamedTuple):
    """What the splits of a data set have in common.

    modalities: {m: features, most steps of any split} of what is there as features. label_min, label_max: the range
    that the labels are in. label_range: the range of the scale that the data says its labels have. token_steps: the
    most steps of text tokens; None without any.
    """

    modalities: Mapping[str, FeatureConfig]
    label_min: float
    label_max: float
    label_range: tuple[float, float] | None = None
    token_steps: int | None = None


Fit = Callable[[Sizes], Inputs]
"""Makes the inputs of a model for data of such sizes."""


def fitted(inputs: Inputs | Fit, data: Any, name: str, label_range: tuple[float, float] | None = None) -> Inputs:
    """`inputs`, or what it makes of the sizes of `data`, a dict of MMSA's layout that `name` stands for in messages.

    label_range: that of the scale, where the data says it.

    Raises:
        InputError: as `open_split`, or the splits differ in their modalities or features.
    """
    if isinstance(inputs, Inputs):
        return inputs
    splits = open_splits(data, name)
    found = {}
    for m in splits[SPLITS[0]].raw:
        widths = {s: split.raw[m].shape[2] for s, split in splits.items()}
        if len(set(widths.values())) > 1:
            told = ", ".join(f"{width} in {s}" for s, width in widths.items())
            raise InputError(f"{name}: {m} has {told} features per step, expected equally many in every split")
        found[m] = FeatureConfig(widths[SPLITS[0]], max(split.raw[m].shape[1] for split in splits.values()))
    labels = np.concatenate([split.labels for split in splits.values()])
    tokens = [split.text_bert.shape[2] for split in splits.values() if split.text_bert is not None]
    return inputs(Sizes(found, float(labels.min()), float(labels.max()), label_range, max(tokens, default=None)))


def with_tokens(split: Split, raw: RawSplit, limits: TokenConfig | None, where: str) -> Split:
    """`split` with its text tokens, if the model takes them.

    Raises:
        InputError: the data has no tokens, or not within these `limits`; `where` is what the message calls it.
    """
    if limits is None or (raw.text_bert is None and "text" not in raw.raw and raw.unusable_tokens is None):
        return split
    if raw.unusable_tokens is not None:
        raise raw.unusable_tokens
    if raw.text_bert is None:
        raise InputError(
            f"{where}: lacks 'text_bert', expected [N, 3, T] token ids for the text encoder: take another file "
            "(a folder: convert again), or train without --text-encoder"
        )
    steps = raw.raw["text"].shape[1] if "text" in raw.raw else raw.text_bert.shape[2]
    if raw.text_bert.shape[2] != steps:
        raise InputError(
            f"{where}: 'text_bert' has shape {list(raw.text_bert.shape)}, expected {[len(raw), 3, steps]}, as text "
            "has: cut or pad both to one length, or train without --text-encoder"
        )
    tokens = checked_tokens(raw.text_bert, limits, where)
    return dataclasses.replace(
        split,
        lengths={**split.lengths, "text": tokens[:, 1].sum(axis=1)},
        text_tokens=TextTokens(tokens, limits.unknown_token),
    )


def whole_numbers(stored: RawArray, where: str) -> IntArray:
    """Token ids, masks and types [N, 3, T] as int64, a copy, each text at the start of its row.

    Raises:
        InputError: a number is not whole.
    """
    with np.errstate(invalid="ignore"):
        tokens = np.array(stored).astype(np.int64)
    if np.any(tokens != stored):
        raise InputError(f"{where}: 'text_bert' holds numbers that are not whole, expected token ids")
    moved(tokens.swapaxes(1, 2), mask_starts(tokens[:, 1]))
    return tokens


def checked_tokens(stored: RawArray, limits: TokenConfig | None, where: str) -> IntArray:
    """Stored token ids, masks and types [N, 3, T] as int64, zero beyond each mask.

    A text without any token keeps its first one. Without `limits` no id is too large.

    Raises:
        InputError: numbers that are not whole, a mask that is not ones followed by zeros, ids or types out of range.
    """
    tokens = whole_numbers(stored, where)
    mask = tokens[:, 1]
    mask[~mask.any(axis=1), 0] = 1
    lengths = mask.sum(axis=1)
    prefix = np.arange(mask.shape[1]) < lengths[:, None]
    wrong = np.flatnonzero(((mask != 0) != prefix).any(axis=1) | (mask > 1).any(axis=1) | (mask < 0).any(axis=1))
    if wrong.size:
        raise InputError(
            f"{where}: the attention mask of sample {wrong[0]} is not ones followed by zeros, expected the rows "
            "token ids, attention mask, token types in 'text_bert'"
        )
    tokens *= prefix[:, None]
    most = (limits.vocabulary, limits.token_types) if limits else (np.iinfo(np.int64).max,) * 2
    for row, what, limit in ((0, "token", most[0]), (2, "token type", most[1])):
        values = tokens[:, row]
        outside = np.argwhere((values < 0) | (values >= limit))
        if outside.size:
            sample, step = outside[0]
            raise InputError(
                f"{where}: {what} {values[sample, step]} of sample {sample} is not below {limit}: the file was made "
                "with the vocabulary of another text encoder"
            )
    return tokens


class Piece(NamedTuple):
    """Some neighbouring samples of one modality: float32 features [n, T, F], zero beyond lengths int64 [n].

    cleaned: how many stored values were NaN or infinite in float32, or misplaced. misplaced: how many were moved from
    behind their padding, or stood beyond the length of their sample (of audio and vision).
    """

    features: FloatArray
    lengths: IntArray
    cleaned: int
    misplaced: int


@dataclass(frozen=True)
class RawSplit:
    """A split whose shapes, labels and lengths are checked, and whose features are as they were stored.

    labels: float32 [N]. ids: N names. raw: {m: [N, T_m, F_m]} of the modalities that are there as features, any number
    type and memory order.
    given: {m: int64 [N]}, the lengths that the data gives. text_bert: [N, 3, T'], token ids, attention mask and token
    types, if there are any. where: what error messages call the split. unusable_tokens: why `text_bert` is None
    although the data has something of that name.
    """

    labels: FloatArray
    ids: list[str]
    raw: Mapping[str, RawArray]
    given: Mapping[str, IntArray]
    text_bert: RawArray | None
    where: str = "data"
    unusable_tokens: InputError | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def pieces(
        self, m: str, release: Callable[[], None] = lambda: None, samples: slice = slice(None)
    ) -> Iterator[Piece]:
        """Modality `m`, converted, a few megabytes at a time.

        Args:
            m: the modality.
            release: called whenever some megabytes of the stored array have been touched.
            samples: which neighbouring samples; all if not given.

        Raises:
            InputError: frames of a sample lie beyond its length, and zeros within it.
        """
        raw = self.raw[m]
        start, stop, _ = samples.indices(len(raw))
        step = max(1, _PIECE_BYTES // (raw[0].size * max(4, raw.itemsize)))
        for first in range(start, stop, step):
            rows = slice(first, min(first + step, stop))
            x = _as_float32(raw, rows, release)
            bad = ~np.isfinite(x)
            cleaned = int(np.count_nonzero(bad))
            if cleaned:
                x[bad] = 0.0
            lengths, starts = self._places(m, rows, x)
            misplaced = int(np.count_nonzero(x[starts > 0]))
            moved(x, starts)
            beyond = beyond_length(x, lengths, rows.start, f"{self.where}: {m}", refuse=m != "text")
            misplaced += 0 if m == "text" else beyond
            yield Piece(x, lengths, cleaned + misplaced, misplaced)
            release()

    def tokens(self, index: int) -> IntArray | None:
        """Token ids, attention mask and token types [3, length] of sample `index`; None if the data has none.

        Raises:
            InputError: they are no tokens.
        """
        if self.text_bert is None:
            return None
        found = checked_tokens(self.text_bert[index : index + 1], None, f"sample {index}")[0]
        return found[:, : found[1].sum()]

    def sample(self, index: int) -> dict[str, FloatArray]:
        """The valid steps [length, F] of sample `index`, per modality."""
        pieces = {m: next(self.pieces(m, samples=slice(index, index + 1))) for m in self.raw}
        return {m: piece.features[0, : piece.lengths[0]] for m, piece in pieces.items()}

    def _places(self, m: str, rows: slice, x: FloatArray) -> tuple[IntArray, IntArray]:
        """Lengths of the samples `rows`, at least 1, and the steps of padding in front of each.

        The lengths are given, or those of the mask, or reach to the last frame that is not zero.
        """
        steps, none = x.shape[1], np.zeros(len(x), np.int64)
        mask = None if self.text_bert is None else self.text_bert[rows, 1]
        starts = none if mask is None else mask_starts(mask)
        masked = none if mask is None else _last(mask != 0) - starts
        fits = mask is not None and mask.shape[1] == steps
        if m in self.given:
            lengths = self.given[m][rows]
            return lengths, np.where(in_front(x, lengths), steps - lengths, 0)
        if m == "text" and fits:
            return masked, np.where((starts > 0) | in_front(x, masked), steps - masked, 0)
        lengths = _last(x.any(axis=2))
        if mask is None:
            return lengths, none
        # Aligned files: audio and vision have the text's length. In front of it only zeros are taken for padding.
        first = np.where(x.any(axis=2).any(axis=1), x.any(axis=2).argmax(axis=1), 0)
        behind = in_front(x, masked) if fits else none > 0
        begin = np.where(behind, steps - masked, np.where(starts > 0, first, 0))
        return np.maximum(lengths - begin, 1), begin


def _as_float32(raw: RawArray, rows: slice, release: Callable[[], None]) -> FloatArray:
    """A copy of raw[rows] in C order; overflow becomes infinity, in silence."""
    order = sorted(range(raw.ndim), key=lambda axis: -abs(raw.strides[axis]))
    stored = raw.transpose(order)
    place = order.index(0)
    with np.errstate(over="ignore", invalid="ignore"):
        if place == 0 or not stored.flags.c_contiguous:
            return np.array(raw[rows], dtype=np.float32, order="C")
        # The samples of a piece lie strewn over the whole array: gathered block by block, and let go of in between, or
        # a map of the array would come into memory as a whole.
        blocks = stored.reshape(-1, len(raw), *stored.shape[place + 1 :])
        x = np.empty((len(blocks), rows.stop - rows.start, *blocks.shape[2:]), np.float32)
        step = max(1, _PIECE_BYTES // (blocks[0].size * raw.itemsize))
        for first in range(0, len(blocks), step):
            x[first : first + step] = blocks[first : first + step, rows]
            release()
        x = x.reshape(*stored.shape[:place], x.shape[1], *stored.shape[place + 1 :])
        return np.ascontiguousarray(x.transpose(np.argsort(order)))


def _ids(value: Any, where: str, samples: int) -> list[str]:
    try:
        if isinstance(value, np.ndarray) and value.dtype.kind == "S":  # of Python 2
            value = np.char.decode(value, "latin1")
        names = value.tolist() if isinstance(value, np.ndarray) else value
    except (ValueError, SystemError):  # no character has such a number
        raise InputError(f"{where}: 'id' holds text that is none, expected {samples} names, one per label") from None
    plain = isinstance(names, (list, tuple)) and all(isinstance(n, (str, int, float)) for n in names)
    if not plain or len(names) != samples:
        got = f"{len(names)} entries" if isinstance(names, (list, tuple)) else f"a {type(names).__name__}"
        raise InputError(f"{where}: 'id' is {got}, expected {samples} names, one per label")
    found = [str(n) for n in names]
    longest = max(map(len, found), default=0)
    if longest > _MOST_NAME:
        raise InputError(f"{where}: 'id' has a name of {longest} characters, expected at most {_MOST_NAME}")
    return found


def _member(data: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    if key not in data:
        found = ", ".join(sorted(k[:40] for k in data if isinstance(k, str))[:20])
        raise InputError(f"{where}: '{key}' is missing, found {found or contents(data)}")
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


def _features(value: Any, where: str, m: str, inputs: Inputs | None, samples: int) -> RawArray:
    raw = _array(value, where, m, 3)
    # Where the model makes its text out of tokens, the features beside them are the linear model's alone.
    expected = inputs.modality(m) if inputs and not (m == "text" and inputs.text_tokens) else None
    if expected and raw.shape[2] != expected.features:
        raise InputError(
            f"{where}: {m} has {raw.shape[2]} features per step, expected {expected.features}: "
            "the file is of another data set than the model is for"
        )
    if expected and not 1 <= raw.shape[1] <= expected.max_steps:
        why = ": the file is of another data set than the model is for" if raw.shape[1] else ""
        raise InputError(f"{where}: {m} has {raw.shape[1]} steps, expected 1 to {expected.max_steps}{why}")
    if raw.shape[0] != samples:
        raise InputError(f"{where}: {m} has {raw.shape[0]} samples, expected {samples}, one per label")
    if not raw.size:
        raise InputError(f"{where}: {m} has shape {list(raw.shape)}, expected at least one step and one feature")
    return raw


def _given_lengths(data: Mapping[str, Any], where: str, m: str, x: RawArray) -> IntArray | None:
    """The lengths that the data gives for modality `m`, raised to 1 where they are 0; None if it gives none."""
    key = f"{m}_lengths"
    if key not in data:
        return None
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


def _text_bert(data: Mapping[str, Any], where: str, samples: int) -> RawArray | None:
    """'text_bert' [N, 3, T'], where T' need not be the steps of text; None if there is none."""
    if "text_bert" not in data:
        return None
    tokens = _array(data["text_bert"], where, "text_bert", 3)
    if tokens.shape[:2] != (samples, 3) or not tokens.size:
        raise InputError(
            f"{where}: 'text_bert' has shape {list(tokens.shape)}, expected [{samples}, 3, T]: token ids, attention "
            "mask, token types"
        )
    for first in range(0, samples, 1024):
        whole_numbers(tokens[first : first + 1024], where)
    return tokens


def _last(real: np.ndarray[Any, np.dtype[np.bool_]]) -> IntArray:
    """One past the last true step per row of [N, T], at least 1. (argmin of a mask is 0 for a full row.)"""
    steps = np.arange(1, real.shape[1] + 1)
    return np.maximum((real * steps).max(axis=1), 1).astype(np.int64)


def _labels(value: Any, where: str, inputs: Inputs | None) -> FloatArray:
    with np.errstate(over="ignore"):
        labels = _array(value, where, "regression_labels", 1).astype(np.float32)
    if not labels.size:
        raise InputError(f"{where}: holds no samples, expected at least 1")
    wrong = np.flatnonzero(~np.isfinite(labels))
    if wrong.size:
        raise InputError(f"{where}: the label of sample {wrong[0]} is {labels[wrong[0]]:g}, expected a number")
    if inputs is None:
        return labels
    low, high = inputs.label_min - LABEL_SLACK, inputs.label_max + LABEL_SLACK
    wrong = np.flatnonzero(~((labels >= low) & (labels <= high)))
    if wrong.size:
        raise InputError(
            f"{where}: the label of sample {wrong[0]} is {labels[wrong[0]]:g}, expected "
            f"{inputs.label_min:g} to {inputs.label_max:g}: scale them, or take a model or --preset of that range"
        )
    return labels
