"""Texts from a file, one a line, read as they are asked for: a file of any length, or what a pipe brings."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import IO

from hcmen.base.errors import HcmenError, InputError
from hcmen.base.files import open_regular, refused
from hcmen.base.strangers import HEAD_BYTES, stranger

__all__ = ["STDIN", "TextLines"]

STDIN = "-"
_MOST_BYTES = 1 << 20
"""Of a line; as many characters as anyone says have at most so many."""
_MOST_TEXTS = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_EXPECTED = "UTF-8 text, one text a line"


class TextLines:
    """The texts of a file in UTF-8: (name of the line, its text or what is wrong with it), in order.

    A name is `FILE:12`. A line that is no UTF-8 is told, and the next is read. What makes the whole file unusable is
    told last, under the name of the file: it cannot be read, is no text, or has a line without an end.

    Args:
        path: of a regular file, or "-" for what comes in on stdin.

    Attributes:
        name: of the file. blank: lines without a word that were left out so far.
    """

    def __init__(self, path: str):
        self.path = path
        self.name = "stdin" if path == STDIN else path
        self.blank = 0

    def __iter__(self) -> Iterator[tuple[str, str | HcmenError]]:
        texts = 0
        try:
            with refused(self.name, _EXPECTED, None if self.path == STDIN else "give the path of a file"):
                for number, line in enumerate(self._lines(), 1):
                    if not line.strip():
                        self.blank += 1
                        continue
                    texts += 1
                    if texts > _MOST_TEXTS:
                        raise self._unusable(f"more than {_MOST_TEXTS} texts", "split the file")
                    where = f"{self.name}:{number}"
                    try:
                        yield where, line.decode().strip()
                    except UnicodeDecodeError as error:
                        found = f"byte 0x{line[error.start]:02x} at place {error.start + 1} is no UTF-8"
                        yield (
                            where,
                            InputError(found, "UTF-8 text", "convert the file, with iconv for one", where=where),
                        )
            if not texts:
                raise self._unusable("no text in it", "write some")
        except HcmenError as error:
            yield self.name, error

    def _lines(self) -> Iterator[bytes]:
        """The lines as they are, without a byte-order mark."""
        with self._opened() as file:
            line = file.readline(_MOST_BYTES + 1)
            line = line.removeprefix(_BYTE_ORDER_MARK)
            other = None if _is_text(line[:HEAD_BYTES]) else stranger(line[:HEAD_BYTES])
            if other is not None:
                raise self._unusable(*other)
            number = 1
            while line:
                if 0 in line:
                    fix = "convert it from UTF-16, with iconv for one, if it is text"
                    raise self._unusable(f"the byte 0 in line {number}, which no text has", fix)
                if len(line) > _MOST_BYTES:
                    raise self._unusable(f"line {number} has more than {_MOST_BYTES} bytes", "break it into texts")
                yield line
                line, number = file.readline(_MOST_BYTES + 1), number + 1

    def _opened(self) -> AbstractContextManager[IO[bytes]]:
        if self.path != STDIN:
            return open_regular(self.path)
        if sys.stdin is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return nullcontext(sys.stdin.buffer)

    def _unusable(self, what: str, fix: str) -> InputError:
        return InputError(what, _EXPECTED, fix, where=self.name)


def _is_text(head: bytes) -> bool:
    """Whether UTF-8 begins so; a character may be cut off at the end."""
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4
    return True
