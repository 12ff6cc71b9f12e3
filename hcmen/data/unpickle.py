"""Unpickling of data files: NumPy arrays, strings, numbers and plain containers, and nothing else.

A pickle is a program. `pickle.load` runs it with everything that can be imported; here it meets stand-ins for the six
functions that NumPy's own pickles call, and any other name ends the reading with an error that says the name:

    numpy.{core,_core}.multiarray._reconstruct, numpy.ndarray, numpy.dtype     arrays, protocol 0 to 4
    numpy.{core,_core}.numeric._frombuffer                                     arrays, protocol 5, axes in any order
    numpy.{core,_core}.multiarray.scalar                                       single NumPy numbers and strings
    _codecs.encode, builtins.bytes                                             how bytes travel in protocols 0 to 2

Python 2's own byte strings need no function. They are read as Latin-1, in which its names and keys are what they were.

The stand-ins (stand_ins.py) never call NumPy's own unpickling code: they check dtype, shape and byte count and then lay
an array over the bytes, without a copy. Declared sizes are held against the size of the file before anything is
allocated. The machine (pickle_machine.py) is Python's own unpickler in Python rather than the one in C, whose memo is
an array that a hostile index blows up; it also bounds what a pickle may build.

The file is mapped into memory, not read: byte strings from 64 KiB on, which is where arrays keep their numbers, stay
where they are, and the arrays are views over the map. What is held in memory are the small things alone: strings,
numbers, containers. In protocol 2 an array's bytes are spelt as UTF-8 text; they are respelt piece by piece, into
memory or into a nameless file where there is a folder for it.
"""

from __future__ import annotations

import codecs
import contextlib
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hcmen.base.errors import InputError
from hcmen.base.files import open_regular
from hcmen.base.strangers import HEAD_BYTES
from hcmen.data.pickle_machine import Reader
from hcmen.data.unpickle_advice import no_pickle

__all__ = ["MappedPickle", "load_pickle"]

_PIECE_BYTES = 1 << 22


def load_pickle(path: Path) -> Any:
    """What the pickle at `path` holds: arrays, str, bytes, int, float, bool, None, tuple, list and dict of these.

    Arrays are read-only views over the file, which stays mapped as long as one of them lives, and which must not be
    cut short meanwhile. Arrays of objects come back as lists. Byte strings of 64 KiB and more that are not in an array
    come back as memoryviews, texts of that size as an object without use.

    Raises:
        InputError: there is no such file, or it cannot be read.
        CorruptFileError: the pickle calls for anything but NumPy arrays, strings and numbers, or is damaged.
    """
    with MappedPickle(path) as source:
        return source.load()


class MappedPickle:
    """A pickle on disk, mapped but not read.

    Attributes:
        size: bytes of the file.
    """

    def __init__(self, path: Path, scratch: Path | None = None) -> None:
        """Opens and maps `path`.

        Args:
            path: the pickle.
            scratch: the folder for arrays that have to be respelt (protocol 2); they go to memory if None.

        Raises:
            InputError: there is no such file, or it cannot be read.
            CorruptFileError: it is something else.
        """
        self.path, self._scratch = path, scratch
        self._maps: list[mmap.mmap] = []
        try:
            self._file = open_regular(path)
            with contextlib.ExitStack() as on_error:
                on_error.callback(self._file.close)
                self.size = os.fstat(self._file.fileno()).st_size
                head = os.pread(self._file.fileno(), HEAD_BYTES, 0)
                other = no_pickle(head, str(path))
                if other is not None:
                    raise other
                # Nothing can be mapped of an empty file.
                self._view = self._mapped(self._file) if self.size else memoryview(b"")
                on_error.pop_all()
        except OSError as error:
            raise InputError(
                f"{path}: {(error.strerror or 'cannot be read').lower()}, expected a data file in MMSA's layout"
            ) from error

    def __enter__(self) -> MappedPickle:
        return self

    def __exit__(self, *_: object) -> None:
        # The map itself goes with the last array over it.
        self._file.close()

    def load(self) -> Any:
        """What the pickle holds, see `load_pickle`.

        Raises:
            CorruptFileError: as `load_pickle`.
            OSError: an array cannot be respelt into the scratch folder.
        """
        return Reader(self._view, str(self.path), self.respelt).load()

    def pieces(self) -> Iterator[bytes]:
        """The bytes of the file from start to end, a few megabytes at a time, read past the map."""
        at = 0
        # A file that grows meanwhile need not end.
        while piece := os.pread(self._file.fileno(), min(_PIECE_BYTES, self.size - at), at):
            yield piece
            at += len(piece)

    def release(self) -> None:
        """Lets go of the pages that were touched; the next touch reads them from the file again."""
        for mapped in self._maps:
            if hasattr(mapped, "madvise"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def respelt(self, text: memoryview) -> memoryview:
        """The UTF-8 `text` as Latin-1: in a nameless file that is mapped, or in memory where there is no folder.

        Raises:
            ValueError: the text is not UTF-8, or holds a character beyond Latin-1.
            OSError: the scratch file cannot be written.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("surrogatepass")

        def pieces() -> Iterator[bytes]:
            for start in range(0, len(text), _PIECE_BYTES):
                yield decoder.decode(text[start : start + _PIECE_BYTES]).encode("latin1")
                self.release()
            yield decoder.decode(b"", final=True).encode("latin1")

        if self._scratch is None:
            return memoryview(b"".join(pieces()))
        with tempfile.TemporaryFile(dir=self._scratch) as file:
            for piece in pieces():
                file.write(piece)
            file.flush()
            return self._mapped(file)

    def _mapped(self, file: Any) -> memoryview:
        self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return memoryview(self._maps[-1])
