"""The scale that labels are on, where nobody says it."""

from __future__ import annotations

import math

__all__ = ["label_scale"]

_USUAL = (1.0, 3.0)


def label_scale(lowest: float, highest: float) -> tuple[float, float]:
    """The ends of the scale of labels from `lowest` to `highest`, which are finite.

    Labels on both sides of zero are on a scale about zero: of 1 (SIMS) or 3 (MOSI) where that holds them, else of the
    next whole number. Others are from a whole number to a whole number, such as 1 to 5. Labels that are all the same
    are in the middle of two.
    """
    if lowest < 0 < highest:
        most = max(-lowest, highest)
        end = next((usual for usual in _USUAL if most <= usual), float(math.ceil(most)))
        return -end, end
    low, high = float(math.floor(lowest)), float(math.ceil(highest))
    return (low, high) if low < high else (low - 1.0, high + 1.0)
