"""What a row of a table has to hold: checked one by one, and what is wrong is told by row."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from hcmen.base.errors import InputError, did_you_mean, shown
from hcmen.base.files import writing_file
from hcmen.base.inputs import MOST_FEATURES
from hcmen.base.modalities import MODALITIES
from hcmen.data import SPLITS
from hcmen.data.layout import LABEL_SLACK
from hcmen.data.table.reading import COLUMNS, FEATURE, Problem, TableFile

__all__ = ["BadRow", "Row", "Rows", "read_rows"]

MOST_CHARACTERS = 1 << 18
"""Of a text; as many as words for a model may have (media/words.py)."""
_MOST_NAME = 1000
_MOST_COMPARED = 1000
"""Names of columns that are compared with the known ones for a hint; a million of them would take 20 seconds."""
_MOST_PATH = 4096
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,4})?", re.ASCII)
_NO_NUMBER = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)
_COMMA = re.compile(r"[+-]?\d+,\d+", re.ASCII)
_WORDS_SHOWN = 3
_OTHER_NAMES = {"dev": "valid", "val": "valid", "validation": "valid", "training": "train", "testing": "test"}


class BadRow(Exception):
    """Why a row cannot be used."""


class Row(NamedTuple):
    """A row that can be used. place: of its features in the arrays of `Rows.vectors`."""

    number: int
    id: str
    label: float
    split: str | None
    group: str | None
    text: str | None
    clip: str | None
    place: int


@dataclass
class Rows:
    """The rows of a table.

    good: those that can be used. problems: those that cannot, in their order. vectors: {m: [rows, features]}, one
    vector a row, mapped. unknown: columns that nobody reads, each with what may have been meant, or "".
    """

    good: list[Row] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    vectors: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)


def read_rows(table: TableFile, folder: Path, label_range: tuple[float, float] | None) -> Rows:
    """Every row of `table`, checked; what the clips hold is not looked at.

    Args:
        table: at its start. folder: for the features of columns. label_range: labels beyond it are refused.

    Raises:
        InputError: a column that every table has is missing, or no label is a number.
        CorruptFileError, OSError: as the table, or `folder`, has it.
    """
    rows, reader = Rows(), _Reader(str(table.path), label_range)
    with contextlib.ExitStack() as stack:
        for number, cells in table.rows():
            if not reader.seen:
                _check_columns(table)
            problem = cells if isinstance(cells, Problem) else None
            if problem is None:
                assert not isinstance(cells, Problem)
                try:
                    row = reader.row(number, cells, table.columns)
                    reader.write(folder, stack)
                    rows.good.append(row)
                except BadRow as error:
                    problem = Problem(number, str(error), reader.id)
            if problem is not None:
                rows.problems.append(problem)
    _check_columns(table)
    if reader.words and not reader.numbers:
        told = ", ".join(f"'{word}'" for word in reader.words)
        comma = any(map(_COMMA.fullmatch, reader.words))
        fix = (
            "write a point where the comma is" if comma else "give numbers, such as -1 for negative and 1 for positive"
        )
        raise InputError(f"labels are words: {told}", "numbers", fix, where=str(table.path))
    for m, width in reader.widths.items():
        if rows.good:
            shape = (len(rows.good), width)
            rows.vectors[m] = np.asarray(np.memmap(folder / f"{m}.vectors", np.dtype("<f4"), "r", shape=shape))
    _complete(rows)
    absent = [c for c in COLUMNS if c not in table.columns]
    unknown = [name for name in table.columns if name and name not in COLUMNS and not FEATURE.fullmatch(name)]
    rows.unknown = {name: did_you_mean(name, absent) if i < _MOST_COMPARED else "" for i, name in enumerate(unknown)}
    return rows


def _check_columns(table: TableFile) -> None:
    missing = [name for name in ("id", "label") if name not in table.columns]
    if not missing:
        return
    compared = filter(None, itertools.islice(table.columns, _MOST_COMPARED))
    hint = next(filter(None, (did_you_mean(name, missing) for name in compared)), None)
    found = ", ".join(shown(name[:40]) for name in list(table.columns)[:8]) or "nothing"
    what = f"has no column {' and no column '.join(map(repr, missing))}, its names are {found}"
    fix = f"{hint} name the columns so" if hint else "put a first row with the names of the columns on top"
    raise InputError(what, fix=fix, where=str(table.path))


def _complete(rows: Rows) -> None:
    """Makes problems of rows that lack a cell which others have."""
    for name in ("text", "clip", "split", "group"):
        there = [getattr(row, name) is not None for row in rows.good]
        if any(there) and not all(there):
            rows.problems += [
                Problem(row.number, f"{name} is empty", row.id)
                for row, full in zip(rows.good, there, strict=True)
                if not full
            ]
            rows.good = [row for row, full in zip(rows.good, there, strict=True) if full]
    rows.problems.sort(key=lambda problem: problem.row)


class _Reader:
    """Makes rows of cells. words: the first labels that are none. numbers: how many are. seen: whether a row was."""

    def __init__(self, where: str, label_range: tuple[float, float] | None):
        self._where, self._range = where, label_range
        self._ids: dict[str, int] = {}
        self._files: dict[str, IO[bytes]] = {}
        self._vectors: dict[str, bytes] = {}
        self._written = 0
        self.widths: dict[str, int] = {}
        self.words: list[str] = []
        self.numbers = 0
        self.seen = False
        self.id = ""

    def row(self, number: int, cells: Mapping[str, Any], columns: Mapping[str, None]) -> Row:
        """The row of these cells; raises BadRow."""
        self.id = ""
        if not self.seen:
            self.widths = _widths(columns, self._where)
            self.seen = True
        name = self.id = self._id(number, cells.get("id"))
        label = self._label(cells.get("label"))
        text = _string(cells, "text", MOST_CHARACTERS)
        clip = _string(cells, "clip", _MOST_PATH)
        if clip is not None and "\0" in clip:
            raise BadRow("clip holds a zero byte, expected a path")
        split = _string(cells, "split", _MOST_NAME)
        split = None if split is None else split.strip()
        if split is not None and split not in SPLITS:
            meant = _OTHER_NAMES.get(split.lower(), "")
            hint = f": did you mean '{meant}'?" if meant else ""
            raise BadRow(f"split is {shown(split[:100])}, expected {', '.join(SPLITS)}{hint}")
        group = _string(cells, "group", _MOST_NAME)
        group = None if group is None else group.strip()
        self._vectors = {m: _vector(cells, m, width) for m, width in self.widths.items()}
        return Row(number, name, label, split, group, text, clip, self._written)

    def write(self, folder: Path, stack: contextlib.ExitStack) -> None:
        """Keeps the features of the row that was made last."""
        for m, content in self._vectors.items():
            if m not in self._files:
                self._files[m] = stack.enter_context(writing_file(folder / f"{m}.vectors"))
            self._files[m].write(content)
        self._written += 1

    def _id(self, number: int, value: Any) -> str:
        if value is None:
            raise BadRow("id is empty, expected a name of its own")
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise BadRow(f"id is {shown(value)}, expected a name")
        name = shown(value) if isinstance(value, int) else value.strip()
        if len(name) > _MOST_NAME:
            raise BadRow(f"id has {len(name)} characters, expected at most {_MOST_NAME}")
        first = self._ids.setdefault(name, number)
        if first != number:
            self.id = name
            raise BadRow(f"id {shown(name[:100])} is that of row {first} too, expected one of its own")
        return name

    def _label(self, value: Any) -> float:
        label = _number(value)
        if label is None:
            told = "empty" if value is None else shown(value[:40] if isinstance(value, str) else value)
            if isinstance(value, str) and len(self.words) < _WORDS_SHOWN and value.strip()[:40] not in self.words:
                self.words.append(value.strip()[:40])
            raise BadRow(f"label is {told}, expected a number")
        self.numbers += 1
        if not abs(label) <= 1e38:
            raise BadRow(f"label is {label:g}, expected a finite number")
        if self._range is not None and not self._range[0] - LABEL_SLACK <= label <= self._range[1] + LABEL_SLACK:
            raise BadRow(
                f"label is {label:g}, expected {self._range[0]:g} to {self._range[1]:g}, as --label-range says"
            )
        return label


def _number(value: Any) -> float | None:
    """The number in a cell, which may be no finite one; None if it is none."""
    if isinstance(value, str):
        value = value.strip()
        return float(value) if len(value) <= 100 and (_NUMBER.fullmatch(value) or _NO_NUMBER.fullmatch(value)) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if isinstance(value, float) or value.bit_length() < 1000 else math.inf


def _string(cells: Mapping[str, Any], name: str, most: int) -> str | None:
    value = cells.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        value = shown(value)
    if value is not None and not isinstance(value, str):
        raise BadRow(f"{name} is {shown(value)}, expected text")
    if value is not None and len(value) > most:
        raise BadRow(f"{name} has {len(value)} characters, expected at most {most}")
    if value is not None and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRow(f"{name} holds half a character, expected Unicode text") from None
    return value


def _widths(columns: Mapping[str, None], where: str) -> dict[str, int]:
    """{m: features} of the columns m.0, m.1, ..."""
    numbers: dict[str, set[int]] = {}
    for name in columns:
        found = FEATURE.fullmatch(name)
        if found:
            numbers.setdefault(found[1], set()).add(int(found[2]))
    widths = {}
    for m in (m for m in MODALITIES if m in numbers):
        count = max(numbers[m]) + 1
        missing = next((k for k in range(count) if k not in numbers[m]), None)
        if missing is not None or count > MOST_FEATURES:
            what = f"column {m}.{count - 1} is there" + (f" and {m}.{missing} is not" if missing is not None else "")
            raise InputError(what, f"{m}.0, {m}.1 and so on without a gap, at most {MOST_FEATURES}", where=where)
        widths[m] = count
    return widths


def _vector(cells: Mapping[str, Any], m: str, width: int) -> bytes:
    values = np.empty(width, np.float64)
    for k in range(width):
        value = _number(cells.get(f"{m}.{k}"))
        if value is None:
            told = shown(cells[f"{m}.{k}"]) if f"{m}.{k}" in cells else "empty"
            raise BadRow(f"{m}.{k} is {told:.60}, expected a number")
        values[k] = value
    with np.errstate(over="ignore"):
        made = values.astype("<f4")
    wrong = np.flatnonzero(~np.isfinite(made))
    if wrong.size:
        raise BadRow(f"{m}.{wrong[0]} is {values[wrong[0]]:g}, expected a finite number")
    return made.tobytes()
