"""What an attack is, and how its file is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FILES", "Attack", "content", "file"]

FILES = Path(__file__).resolve().parent / "files"


@dataclass(frozen=True)
class Attack:
    """parser: whose file it is, of `FORMATS`. tries: in a few words. code: what its reader ends with, 0 for a file that
    may be read. says: a part of the line. made: the content, or a function that makes the file at a path from a valid
    content. command: the exit code of the command that reads it, where that is asked for.
    """

    parser: str
    tries: str
    code: int
    says: str
    made: bytes | Callable[[Path, bytes], object]
    command: int | None = None


def file(name: str) -> bytes:
    """What the fuzzer found, and kept."""
    return (FILES / name).read_bytes()


def content(make: Callable[[bytes], bytes]) -> Callable[[Path, bytes], object]:
    """A file that is made of a valid one when it is needed."""
    return lambda path, valid: path.write_bytes(make(valid))
