"""Tables and lines of text, within what a terminal shows."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence

__all__ = ["aligned", "fitted", "folded", "screen_width"]

_GAP = "  "
_ROOM, _LEAST_ROOM = 24, 12
"""Columns of the first cell, which is folded: where others can be left out for it, and where none can any more."""


def aligned(rows: Sequence[Sequence[str]], *, figures: bool = True) -> list[str]:
    """The lines of a table: a header, a rule, the rest; the first column to the left.

    Args:
        rows: the header first, at least one cell each, all of one length. figures: the other columns to the right.
    """
    widths = _widths(rows)
    lines = [
        _GAP.join(
            cell.rjust(width) if figures and i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def screen_width() -> int | None:
    """The columns of the terminal that stdout is, or None: a file or a pipe takes lines of any length."""
    if not sys.stdout.isatty():
        return None
    return max(shutil.get_terminal_size().columns, 20)


def folded(line: str, width: int | None, indent: str = "") -> list[str]:
    """`line` as lines within `width` columns (None: any), those after the first behind `indent`."""
    if width is None or len(line) <= width:
        return [line]
    return textwrap.wrap(line, max(width, len(indent) + 1), subsequent_indent=indent, break_on_hyphens=False)


def fitted(
    rows: Sequence[Sequence[str]],
    width: int | None,
    keep: int = 2,
    *,
    least: Sequence[str] = (),
    figures: bool = True,
) -> list[str]:
    """The lines of `aligned`, within `width` columns. The first column is folded, then columns are left out.

    What is left out is named in a last line.

    Args:
        rows, figures: as of `aligned`. width: None for any.
        keep: so many columns, from the left, always stay. least: those that go first, by their headers, in this
            order; the others go from the right.
    """
    header, out = list(rows[0]), list[int]()
    if width is None or _needed(_widths(rows)) <= width:
        return aligned(rows, figures=figures)
    going = [header.index(name) for name in least if name in header]
    going += [i for i in range(len(header) - 1, keep - 1, -1) if i not in going]
    while True:
        stay = [i for i in range(len(header)) if i not in out]
        chosen = [[row[i] for i in stay] for row in rows]
        widths = _widths(chosen)
        room = width - _needed(widths) + widths[0]
        if room >= min(widths[0], _ROOM) or len(out) == len(going):
            break
        out = going[: len(out) + 1]
    lines = aligned([part for row in chosen for part in _parts(row, max(room, _LEAST_ROOM))], figures=figures)
    lines[1] = lines[1][:width]
    lines = [part for line in lines for part in folded(line, width, _GAP)]
    if not out:
        return lines
    return [*lines, *folded(f"left out in {width} columns: {', '.join(header[i] for i in sorted(out))}", width)]


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]


def _needed(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _parts(row: Sequence[str], room: int) -> list[list[str]]:
    """The row, its first cell folded into rows of `room` columns."""
    first, *more = folded(row[0], room) or [""]
    return [[first, *row[1:]], *([part, *[""] * (len(row) - 1)] for part in more)]
