"""The splits of a table as folder.py writes them: clips and windows are made when written, never all at once."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hcmen.base.files import writing_file
from hcmen.data import SPLITS, FloatArray, IntArray
from hcmen.data.layout import Piece, RawSplit
from hcmen.data.table import clips
from hcmen.data.table.groups import group_of
from hcmen.data.table.rows import Row
from hcmen.data.table.work import Entry

__all__ = ["FromClips", "Source", "TableSplit", "Windows", "neighbours", "shaped", "tokens_by_split"]

_PIECE_BYTES = 1 << 23

Source = Callable[[int], FloatArray]
"""The frames [steps, features] of a sample, by its place in the split."""


@dataclasses.dataclass(frozen=True)
class TableSplit(RawSplit):
    """A split whose features are read where they are written. raw: arrays of the right shape without memory.

    sources: modality -> what gives the frames of a sample.
    """

    sources: Mapping[str, Source] = dataclasses.field(default_factory=dict)

    def pieces(
        self, m: str, release: Callable[[], None] = lambda: None, samples: slice = slice(None)
    ) -> Iterator[Piece]:
        """As `RawSplit.pieces`; everything is where it belongs already."""
        _, steps, features = self.raw[m].shape
        start, stop, _ = samples.indices(len(self))
        count = max(1, _PIECE_BYTES // (4 * steps * features))
        for first in range(start, stop, count):
            rows = range(first, min(first + count, stop))
            x = np.zeros((len(rows), steps, features), np.float32)
            for i, place in enumerate(rows):
                found = self.sources[m](place)
                x[i, : len(found)] = found
            yield Piece(x, self.given[m][rows.start : rows.stop], 0, 0)
            release()


def shaped(samples: int, steps: int, features: int) -> npt.NDArray[Any]:
    """An array of this shape in four bytes."""
    return np.broadcast_to(np.float32(0), (samples, steps, features))


class Windows:
    """Sequences of neighbouring rows, one vector each."""

    def __init__(self, vectors: npt.NDArray[np.float32], places: Sequence[Sequence[int]]):
        """vectors: [rows, features]. places: of the rows of each sample's window."""
        self._vectors, self._places = vectors, places

    def __call__(self, sample: int) -> FloatArray:
        """The vectors of the window of `sample`."""
        return self._vectors[list(self._places[sample])]


class FromClips:
    """The frames of one modality of the clips."""

    def __init__(self, m: str, paths: Sequence[Path], lengths: IntArray, features: int):
        """m: the modality. paths, lengths: of each sample."""
        self._m, self._paths, self._lengths, self._features = m, paths, lengths, features

    def __call__(self, sample: int) -> FloatArray:
        """The frames in the clip of `sample`."""
        shape = (int(self._lengths[sample]), self._features)
        return clips.frames(self._paths[sample], self._m, shape).features[self._m]


def neighbours(rows: Sequence[Row], context: int) -> list[list[int]]:
    """Per row itself and its neighbours of the same group, in the order of the table: 0, -1, +1, -2, +2 and so on.

    Args:
        rows: of the whole table. context: how many neighbours at most, half of them before; one that the group does not
            have is left out.
    """
    groups: dict[str, list[int]] = {}
    inside = []
    for place, row in enumerate(rows):
        group = groups.setdefault(group_of(row), [])
        inside.append((group, len(group)))
        group.append(place)
    offsets = [0, *(sign * (k // 2 + 1) for k in range(context) for sign in [(-1, 1)[k % 2]])]
    return [[group[at + k] for k in offsets if 0 <= at + k < len(group)] for group, at in inside]


def tokens_by_split(
    entries: Iterable[Entry], split_of: Sequence[str | None], steps: int, folder: Path
) -> dict[str, npt.NDArray[np.int32]]:
    """Per split ids, attention mask and types int32 [N, 3, steps], in files of `folder` that are mapped.

    Args:
        entries: of every row, in order. split_of: the split of each; None leaves it out.
    """
    counts = dict.fromkeys(SPLITS, 0)
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(writing_file(folder / f"{split}.tokens")) for split in SPLITS}
        for entry, split in zip(entries, split_of, strict=True):
            if split is None:
                continue
            tokens = np.zeros((3, steps), "<i4")
            count = len(entry["ids"])
            tokens[0, :count] = entry["ids"]
            tokens[1, :count] = 1
            tokens[2, :count] = entry.get("types", 0)
            files[split].write(tokens.tobytes())
            counts[split] += 1
    return {
        split: np.asarray(np.memmap(folder / f"{split}.tokens", np.dtype("<i4"), "r", shape=(count, 3, steps)))
        for split, count in counts.items()
    }
