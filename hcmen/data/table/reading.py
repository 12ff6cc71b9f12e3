"""A table, row by row: CSV with any usual delimiter, JSON lines, Parquet.

Nothing of a file is trusted. A line, a cell and the number of rows are bounded; nothing is waited for. A row that
cannot be read is told and the next one read, but for what makes all that follows meaningless.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from hcmen.base.errors import BackendError, CorruptFileError, InputError, reason_of, shown
from hcmen.base.records import JsonFile, parse_json
from hcmen.base.strangers import HEAD_BYTES, stranger

__all__ = ["COLUMNS", "FEATURE", "SUFFIXES", "Problem", "TableFile"]

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
"""How the names of tables end."""
COLUMNS = ("id", "label", "text", "clip", "split", "group")
FEATURE = re.compile(r"(text|audio|vision)\.(0|[1-9]\d{0,5})")
"""A column of one feature: audio.0, audio.1, ..."""

_DELIMITERS = (",", ";", "\t", "|")
_MOST_ROWS, _MOST_NAMES = 1 << 22, 1 << 18
# In characters. A longer line or cell ends the reading: what follows an open quotation mark is no row.
_MOST_LINE, _MOST_CELL = 1 << 25, 1 << 24
_STARTS = (
    (b"\xff\xfe", "UTF-16", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16", "save it as UTF-8"),
    (b"PK\x03\x04", "a zip archive or a workbook", "save the sheet as CSV (UTF-8)"),
    (b"\xd0\xcf\x11\xe0", "an old workbook", "save the sheet as CSV (UTF-8)"),
    (b"\x80", "a pickle or binary", "give a pickle the name .pkl"),
)
_PARQUET = b"PAR1"
_BATCH_ROWS = 256


class Problem(NamedTuple):
    """What is wrong with a row. row: its number, as a spreadsheet counts: in CSV the names are row 1. corrupt: whether
    a file is damaged.
    """

    row: int
    reason: str
    id: str = ""
    corrupt: bool = False


Found = tuple[int, "dict[str, Any] | Problem"]


class TableFile:
    """The table in `file`.

    Attributes:
        columns: their names in the order in which they were seen; those of JSON lines as the rows are read.
    """

    def __init__(self, file: IO[bytes], path: Path):
        """Looks what it is.

        Args:
            file: open at its start. path: what it is called, whose end says its kind.

        Raises:
            InputError: it is no table.
            CorruptFileError: it holds zeros or is damaged.
            BackendError: it is Parquet, and pyarrow is not installed.
        """
        self.path, self._file = path, file
        self.columns: dict[str, None] = {}
        suffix, head = path.suffix.lower(), file.read(HEAD_BYTES)
        file.seek(0)
        if head.startswith(_PARQUET) != (suffix == ".parquet"):
            what = "not Parquet" if suffix == ".parquet" else "a Parquet file"
            raise InputError(what, "a table of the kind that its name says", "rename it", where=str(path))
        if suffix == ".parquet":
            self._rows = self._parquet()
            return
        strange = next(((what, fix) for start, what, fix in _STARTS if head.startswith(start)), stranger(head, ""))
        if strange is not None:
            raise InputError(strange[0], "a table in text, with a first row of names", strange[1], where=str(path))
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        self._number = 0
        self._rows = self._csv(text, suffix) if suffix in (".csv", ".tsv") else self._json(text)

    def rows(self) -> Iterator[Found]:
        """The number and cells of each row, or its problem; cells without content are left out.

        Raises:
            InputError: what follows cannot be read, or there are too many rows.
            CorruptFileError: as above.
        """
        for count, found in enumerate(self._rows, 1):
            if count > _MOST_ROWS:
                raise self._error(f"more than {_MOST_ROWS} rows", "fewer", "split the table")
            yield found

    def _error(self, what: str, expected: str | None = None, fix: str | None = None) -> InputError:
        return InputError(what, expected, fix, where=str(self.path))

    def _lines(self, text: IO[str]) -> Iterator[str]:
        """The lines with their ends."""
        while line := text.readline(_MOST_LINE):
            if len(line) == _MOST_LINE:
                raise self._error(f"row {self._number + 1} has a line of {_MOST_LINE} characters or more", "fewer")
            if "\0" in line:
                fix = "save it as UTF-8 again, or get it again"
                raise CorruptFileError(f"row {self._number + 1} holds zero bytes", "text", fix, where=str(self.path))
            if not line.isascii():
                try:
                    line.encode()
                except UnicodeEncodeError as error:
                    byte = ord(line[error.start]) - 0xDC00
                    raise self._error(
                        f"row {self._number + 1} is no UTF-8 (byte 0x{byte:02x})", fix="save the table as UTF-8"
                    ) from None
            yield line

    # --- CSV ----------------------------------------------------------------------------------------------------------

    def _csv(self, text: IO[str], suffix: str) -> Iterator[Found]:
        lines = self._lines(text)
        first = ""
        for first in lines:
            if first.strip():
                break
            self._number += 1
        delimiter = _delimiter(first, suffix)
        records = self._records(itertools.chain([first], lines), delimiter)
        header = next(records, [])
        if isinstance(header, Problem):
            raise self._error(f"the first row cannot be read ({header.reason})", "the names of the columns")
        names = [name.strip() for name in header]
        twice = next((name for name in names if name and names.count(name) > 1), None)
        if twice is not None:
            raise self._error(f"the column {shown(twice[:100])} is there twice", "each name once")
        self.columns.update(dict.fromkeys(names))
        return self._cells(records, names)

    def _cells(self, records: Iterable[list[str] | Problem], names: list[str]) -> Iterator[Found]:
        kept = [(i, name) for i, name in enumerate(names) if name in COLUMNS or FEATURE.fullmatch(name)]
        for record in records:
            if isinstance(record, Problem):
                yield record.row, record
            elif len(record) != len(names):
                cells = f"has {len(record)} cells, expected {len(names)} as the first row has"
                yield self._number, Problem(self._number, cells)
            elif record:
                yield self._number, {name: record[i] for i, name in kept if record[i].strip()}

    def _records(self, lines: Iterable[str], delimiter: str) -> Iterator[list[str] | Problem]:
        """Rows that are not empty. The limit on a cell is csv's own and everybody's, and set while one is read."""
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            before = csv.field_size_limit(_MOST_CELL)
            try:
                record = next(reader, None)
            except csv.Error as error:
                self._number += 1
                reason = reason_of(error, 100)
                if "unexpected end" in reason or "field limit" in reason:
                    what = "is never closed" if "end" in reason else f"is followed by {_MOST_CELL} characters in a cell"
                    raise self._error(f"a quotation mark of row {self._number} {what}", fix="close it") from None
                if "new-line character" in reason:
                    reason = "a line ends in the middle of a cell without quotation marks"
                yield Problem(self._number, f"cannot be read ({reason})")
                continue
            finally:
                csv.field_size_limit(before)
            if record is None:
                return
            self._number += 1
            if record:
                yield record

    # --- JSON lines ---------------------------------------------------------------------------------------------------

    def _json(self, text: IO[str]) -> Iterator[Found]:
        for line in self._lines(text):
            self._number += 1
            if not line.strip():
                continue
            if len(line) > _MOST_CELL:
                yield self._number, Problem(self._number, f"has {len(line)} characters, expected at most {_MOST_CELL}")
                continue
            try:
                found = parse_json(line.encode(), JsonFile("", "mend the row"), _MOST_LINE)
            except CorruptFileError as error:
                yield self._number, Problem(self._number, str(error.but(fix="")), corrupt=True)
                continue
            if not isinstance(found, dict):
                kind = f"is {shown(found)}" if not isinstance(found, (list, str)) else f"is a {type(found).__name__}"
                yield self._number, Problem(self._number, f'{kind}, expected an object such as {{"id": "a", ...}}')
                continue
            if len(self.columns) < _MOST_NAMES:  # a file may have others in every row
                self.columns.update(dict.fromkeys(found))
            yield self._number, _plain(found)

    # --- Parquet ------------------------------------------------------------------------------------------------------

    def _parquet(self) -> Iterator[Found]:
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise BackendError(
                "Parquet needs pyarrow, which is not installed",
                fix="pip install 'hcmen[parquet]', or save the table as CSV",
            ) from error
        with self._decoded():
            table = parquet.ParquetFile(self._file)
            names = list(table.schema_arrow.names)
        if len(set(names)) < len(names):
            raise self._error("a column is there twice", "each name once")
        self.columns.update(dict.fromkeys(names))
        return self._batches(table, [name for name in names if name in COLUMNS or FEATURE.fullmatch(name)])

    def _batches(self, table: Any, names: list[str]) -> Iterator[Found]:
        number, batches = 0, iter(table.iter_batches(_BATCH_ROWS, columns=names))
        while True:
            with self._decoded():
                batch = next(batches, None)
                rows = [] if batch is None else batch.to_pylist()
            if batch is None:
                return
            for row in rows:
                number += 1
                yield number, _plain(row)

    @contextlib.contextmanager
    def _decoded(self) -> Iterator[None]:
        """What pyarrow raises, made an error of the file."""
        try:
            yield
        except (ValueError, OSError, ArithmeticError, LookupError, NotImplementedError, TypeError) as error:
            raise CorruptFileError(
                f"damaged Parquet ({reason_of(error, 100)})", fix="write or copy it again", where=str(self.path)
            ) from error


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Of a row with types the cells that have a content and a name that is known."""
    return {
        name: value
        for name, value in row.items()
        if value is not None
        and (name in COLUMNS or FEATURE.fullmatch(name))
        and not (isinstance(value, str) and not value.strip())
    }


def _delimiter(line: str, suffix: str) -> str:
    """What stands between the names of the first row: whatever makes most known names of it."""

    def known(delimiter: str) -> int:
        try:
            names = next(csv.reader([line], delimiter=delimiter), [])
        except csv.Error:
            return 0
        return sum(name.strip() in COLUMNS or bool(FEATURE.fullmatch(name.strip())) for name in names)

    ordered = sorted(_DELIMITERS, key=lambda d: d != "\t") if suffix == ".tsv" else _DELIMITERS
    return max(ordered, key=known)
