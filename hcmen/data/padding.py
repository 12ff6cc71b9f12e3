"""Where the frames of a sample lie in its array: at the start, as in MMSA's files, or at the end behind padding.

MMSA-FET pads in front when it is told to (`padding_location="start"`), and nothing in its file says so. What tells are
frames that are not zero beyond the length, and zeros within it; or a mask that begins with zeros and ends with ones.
Such samples are moved to the start. Where the two do not agree on a place the data is refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hcmen.base.errors import InputError
from hcmen.data import FloatArray, IntArray

__all__ = ["beyond_length", "in_front", "mask_starts", "moved"]


def mask_starts(mask: npt.NDArray[Any]) -> IntArray:
    """The steps of padding in front of each text, by its mask [N, T]: 0 unless the mask begins with 0, ends with 1."""
    real = mask != 0
    return np.where(real[:, -1], real.argmax(axis=1), 0).astype(np.int64)


def moved(x: npt.NDArray[Any], starts: IntArray) -> None:
    """Moves the steps (axis 1) of the rows of `x` to the start, in place; what was in front of them comes last."""
    for i in np.flatnonzero(starts):
        x[i] = np.roll(x[i], -starts[i], axis=0)


def in_front(x: FloatArray, lengths: IntArray) -> npt.NDArray[np.bool_]:
    """Which samples of `x` [N, T, F] have zeros in place of their first frames, and end with `lengths` real ones."""
    steps = x.shape[1]
    found = np.zeros(len(x), bool)
    for i in np.flatnonzero((lengths < steps) & ~x[:, 0].any(axis=1)):
        start = steps - lengths[i]
        found[i] = not x[i, :start].any() and bool(x[i, lengths[i] :].any())
    return found


def beyond_length(x: FloatArray, lengths: IntArray, first: int, where: str, *, refuse: bool) -> int:
    """Sets the frames of `x` [N, T, F] beyond `lengths` to 0; how many values there were not 0.

    Args:
        x: the frames. lengths: the valid prefix of each sample.
        first: the number of the first sample, for messages. where: what messages call the array.
        refuse: whether zeros within the length and frames beyond it contradict each other.

    Raises:
        InputError: a sample has frames beyond its length and zeros within it, so that its frames are not where its
            length says.
    """
    count = 0
    for i in np.flatnonzero(lengths < x.shape[1]):
        beyond = x[i, lengths[i] :]
        if not (beyond.max() or beyond.min()):  # as fast as setting all of it to 0, and without a copy
            continue
        zeros = np.flatnonzero(~x[i, : lengths[i]].any(axis=1)) if refuse else np.array([])
        if zeros.size:
            place = lengths[i] + np.flatnonzero(x[i, lengths[i] :].any(axis=1))[0]
            raise InputError(
                f"sample {first + i} has the length {lengths[i]}, frame {zeros[0]} is zero and frame {place} is not",
                expected="its frames at the start, or at the end behind padding of zeros",
                fix="pad at the end (MMSA-FET: padding_location='end'), or correct the lengths",
                where=where,
            )
        count += int(np.count_nonzero(beyond))
        beyond[:] = 0.0
    return count
