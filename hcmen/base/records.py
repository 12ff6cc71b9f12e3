"""What JSON files that are not trusted are read with: JSON without its traps, objects whose every key is accounted for,
and the records of files by name, sha256 and size. Which file it is, and what mends it, the caller says (`JsonFile`)."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from typing import Any

from hcmen.base.errors import CorruptFileError, did_you_mean, reason_of, shown
from hcmen.base.files import read_small, refused

__all__ = [
    "MANIFEST",
    "MANIFEST_FILE",
    "MOST_MANIFEST_BYTES",
    "FileRecord",
    "JsonFile",
    "JsonObject",
    "check_file_name",
    "parse_json",
    "read_json",
]

MANIFEST_FILE = "manifest.json"
MOST_MANIFEST_BYTES = 16 << 20
_MAX_DEPTH = 32
_MAX_FILE_BYTES = 8 << 30
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_FILE_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}\Z")


@dataclass(frozen=True)
class JsonFile:
    """What a file of JSON is called in messages, and what helps when it is damaged."""

    name: str
    fix: str

    def damaged(self, what: str, expected: str | None = None, hint: str | None = None) -> CorruptFileError:
        """The error that refuses it, with `hint` before the advice."""
        return CorruptFileError(what, expected, f"{hint} {self.fix}" if hint else self.fix, where=self.name)


MANIFEST = JsonFile("manifest", "copy or export the bundle again")


@dataclass(frozen=True)
class FileRecord:
    """A file of the bundle: its path relative to the bundle with `/` between parts, its sha256 and its size."""

    file: str
    sha256: str
    bytes: int


def check_file_name(name: str, file: JsonFile = MANIFEST) -> None:
    """Raises CorruptFileError unless `name`, of `file`, is a plain file name, below the bundle or one folder in it."""
    parts = name.split("/")
    if len(parts) > 2 or not all(_FILE_PART.match(p) for p in parts) or name == MANIFEST_FILE:
        raise file.damaged(f"file name {name[:200]!r} is unsafe", "plain names inside the bundle such as full.onnx")


class JsonObject:
    """A JSON object whose keys are taken one by one; `finish` refuses the ones that nobody took."""

    def __init__(self, where: str, data: Any, file: JsonFile):
        self.where, self.file = where, file
        if not isinstance(data, dict):
            raise self.file.damaged(f"{where or 'the top'} is {_kind(data)}", "an object")
        self.data: dict[str, Any] = data
        self._taken: set[str] = set()

    def _name(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def value(self, key: str, kind: type) -> Any:
        """The value at `key`, of the type `kind`; raises CorruptFileError as all of these."""
        if key not in self.data:
            raise self.file.damaged(f"key '{self._name(key)}' is missing")
        self._taken.add(key)
        value = self.data[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.file.damaged(f"'{self._name(key)}' is {_kind(value)}", _kind(kind()))
        return value

    def string(self, key: str) -> str:
        """A string of at most 1000 characters."""
        value: str = self.value(key, str)
        if len(value) > 1000:
            raise self.file.damaged(f"'{self._name(key)}' has {len(value)} characters", "at most 1000")
        return value

    def one_of(self, key: str, choices: tuple[str, ...]) -> str:
        """One of the strings `choices`."""
        value = self.string(key)
        if value not in choices:
            raise self.file.damaged(f"'{self._name(key)}' is {shown(value)}", " or ".join(choices))
        return value

    def integer(self, key: str, least: int, most: int = 1 << 31) -> int:
        """An integer from `least` to `most`."""
        value: int = self.value(key, int)
        if not least <= value <= most:
            raise self.file.damaged(f"'{self._name(key)}' is {value}", f"{least} to {most}")
        return value

    def number(self, key: str, least: float, most: float) -> float:
        """A number from `least` to `most`."""
        value = self.value(key, object)
        if not isinstance(value, (int, float)):
            raise self.file.damaged(f"'{self._name(key)}' is {_kind(value)}", "a number")
        if not least <= value <= most:
            raise self.file.damaged(f"'{self._name(key)}' is {shown(value)}", f"{least:g} to {most:g}")
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of `count` finite numbers."""
        values = self.value(key, list)
        if len(values) != count or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in values):
            raise self.file.damaged(f"'{self._name(key)}' is not a list of {count} numbers")
        if not all(abs(v) <= 1e38 for v in values):
            raise self.file.damaged(f"'{self._name(key)}' holds a number beyond float32")
        return tuple(float(v) for v in values)

    def object(self, key: str) -> JsonObject:
        """The object at `key`."""
        return JsonObject(self._name(key), self.value(key, dict), self.file)

    def digest(self, key: str) -> str:
        """A sha256."""
        value = self.string(key)
        if not _SHA256.match(value):
            what = f"'{self._name(key)}' is no sha256 of 64 lower-case hexadecimal digits"
            raise self.file.damaged(what)
        return value

    def record(self) -> FileRecord:
        """The keys of a file record, among others that may be there."""
        record = FileRecord(self.string("file"), self.digest("sha256"), self.integer("bytes", 1, _MAX_FILE_BYTES))
        check_file_name(record.file, self.file)
        return record

    def finish(self) -> None:
        """Refuses keys that nobody took."""
        unknown = [k for k in self.data if k not in self._taken]
        if unknown:
            hint = did_you_mean(unknown[0], self._taken)
            raise self.file.damaged(f"unknown key {shown(self._name(unknown[0]))}", hint=hint)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "an integer"}
    return names.get(type(value), "null" if value is None else "a number")


def read_json(
    path: str | os.PathLike[str], fix: str, expected: str | None = None, most: int = MOST_MANIFEST_BYTES
) -> Any:
    """What `parse_json` makes of the regular file `path`.

    Args:
        path: the file. fix: what helps when it is damaged. expected: what it should be, where it cannot be read.
        most: bytes.

    Raises:
        InputError: it cannot be read.
        CorruptFileError: as `parse_json`.
    """
    with refused(path, expected):
        content = read_small(path, most)
    return parse_json(content, JsonFile(os.fspath(path), fix), most)


def parse_json(content: bytes, file: JsonFile, most: int = MOST_MANIFEST_BYTES) -> Any:
    """JSON without its traps: no duplicate keys, no NaN or infinity, no excess of size or depth.

    Args:
        content: what stands in the file. file: what it is. most: bytes.

    Raises:
        CorruptFileError: it has one of them, or is no JSON.
    """
    if len(content) > most:
        raise file.damaged(f"more than {most} bytes")
    # Python takes some 70 bytes for an empty list and 200 for a key, of 3 and 6 bytes.
    if sum(map(content.count, b"[{:")) > most >> 4:
        raise file.damaged(f"more than {most >> 4} lists, objects and keys", "a few thousand")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, value in pairs:
            if key in made:
                raise file.damaged(f"key {shown(key)} is there twice")
            made[key] = value
        return made

    def refuse(word: str) -> Any:
        raise file.damaged(f"{word} is not a finite number")

    def finite(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else refuse(digits[:40])

    try:
        data = json.loads(content.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else reason_of(error)
        raise file.damaged(f"not valid JSON ({reason})") from error
    if _depth_exceeds(data, _MAX_DEPTH):
        raise file.damaged("nested too deeply", f"at most {_MAX_DEPTH} levels")
    return data


def _depth_exceeds(data: Any, limit: int) -> bool:
    level = [data]
    for _ in range(limit):
        level = [v for d in level for v in (d.values() if isinstance(d, dict) else d if isinstance(d, list) else ())]
        if not level:
            return False
    return True
