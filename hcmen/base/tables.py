"""Tables of text, within what a terminal shows."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence

__all__ = ["aligned", "fitted", "screen_width"]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table: a header, a rule, the rest; the first column to the left, figures to the right.

    Args:
        rows: the header first, at least one cell each, all of one length.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def screen_width() -> int | None:
    """The columns of the terminal that stdout is, or None: a file or a pipe takes lines of any length."""
    if not sys.stdout.isatty():
        return None
    return max(shutil.get_terminal_size().columns, 20)


def fitted(rows: Sequence[Sequence[str]], width: int | None, keep: int = 2) -> list[str]:
    """The lines of `aligned`, within `width` columns: columns from the right are left out, and a last line names them.

    Args:
        rows: as of `aligned`. width: None for any. keep: so many columns, from the left, always stay; what is still
            too long then is cut.
    """
    lines = aligned(rows)
    if width is None or max(map(len, lines)) <= width:
        return lines
    columns = len(rows[0])
    while columns > keep and max(map(len, lines)) > width:
        columns -= 1
        lines = aligned([row[:columns] for row in rows])
    lines = [line if len(line) <= width else f"{line[: width - 3]}..." for line in lines]
    left_out = ", ".join(rows[0][columns:])
    told = f"left out in {width} columns: {left_out}" if left_out else ""
    return [*lines, *textwrap.wrap(told, width)]
