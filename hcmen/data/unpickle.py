"""Unpickling of data files: NumPy arrays, strings, numbers and plain containers, and nothing else.

A pickle is a program. `pickle.load` runs it with everything that can be imported; here it meets stand-ins for the six
functions that NumPy's own pickles call, and any other name ends the reading with an error that says the name:

    numpy.{core,_core}.multiarray._reconstruct, numpy.ndarray, numpy.dtype     arrays, protocol 0 to 4
    numpy.{core,_core}.numeric._frombuffer                                     arrays, protocol 5
    numpy.{core,_core}.multiarray.scalar                                       single NumPy numbers and strings
    _codecs.encode, builtins.bytes                                             how bytes travel in protocols 0 to 2

The stand-ins never call NumPy's own unpickling code: they check dtype, shape and byte count and then lay an array over
the bytes, without a copy. Declared sizes are held against the size of the file before anything is allocated. The
machine is Python's own unpickler in Python rather than the one in C, whose memo is an array that a hostile index blows
up.

The file is mapped into memory, not read: byte strings from 64 KiB on, which is where arrays keep their numbers, stay
where they are, and the arrays are views over the map. What is held in memory are the small things alone: strings,
numbers, containers. In protocol 2 an array's bytes are spelt as UTF-8 text; they are respelt piece by piece, into
memory or into a nameless file where there is a folder for it.
"""

from __future__ import annotations

import codecs
import contextlib
import math
import mmap
import os
import pickle
import re
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from hcmen.base.errors import CorruptFileError, InputError, reason_of, shown
from hcmen.base.files import open_regular
from hcmen.base.strangers import HEAD_BYTES, stranger
from hcmen.data.unpickle_advice import advice

__all__ = ["MappedPickle", "load_pickle"]

_DTYPE = re.compile(r"(?:b1|[iu][1248]|f[248]|[US]\d{1,6}|O[48]?)")
_MAX_RANK = 4

# Byte strings and texts of this size and more are left in the map.
_LARGE_BYTES = 1 << 16
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
            CorruptFileError: it is a zip archive.
        """
        self.path, self._scratch = path, scratch
        self._maps: list[mmap.mmap] = []
        try:
            self._file = open_regular(path)
            with contextlib.ExitStack() as on_error:
                on_error.callback(self._file.close)
                self.size = os.fstat(self._file.fileno()).st_size
                head = os.pread(self._file.fileno(), HEAD_BYTES, 0)
                other = stranger(head, str(path))
                if other is not None:
                    raise CorruptFileError(other[0], "a pickle of MMSA's layout", other[1], where=str(path))
                if head.startswith(b"PK\x03\x04"):
                    raise CorruptFileError(
                        f"{path}: a zip archive, expected a pickle of MMSA's layout: unpack it first"
                    )
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
        return _unwrap(_Reader(_MappedFile(self._view), self).load())

    def pieces(self) -> Iterator[bytes]:
        """The bytes of the file from start to end, a few megabytes at a time, read past the map."""
        at = 0
        while piece := os.pread(self._file.fileno(), _PIECE_BYTES, at):
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


class _Forbidden(Exception):
    """The pickle wants something that is not admitted; the message says what."""


class _LongText:
    """A text that is left as it lies in the file, for the one use that data has for it: bytes in protocol 2."""

    __slots__ = ("latin1",)

    def __init__(self, latin1: Callable[[], memoryview]) -> None:
        self.latin1 = latin1


class _MappedFile:
    """The map as the file that the unpickler asks for; it refuses to read more than it has left, so that a declared
    size cannot make a reader allocate."""

    def __init__(self, view: memoryview) -> None:
        self._view, self._at = view, 0

    def view(self, size: int) -> memoryview:
        left = len(self._view) - self._at
        if not 0 <= size <= left:
            raise EOFError(f"{size} bytes announced, {left} left")
        self._at += size
        return self._view[self._at - size : self._at]

    def read(self, size: int) -> bytes:
        return self.view(size).tobytes()

    def check(self, size: int) -> None:
        """Refuses an announcement of more than there is."""
        self.view(size)
        self._at -= size

    def readline(self) -> bytes:
        start = self._at
        for first in range(start, len(self._view), _LARGE_BYTES):
            found = self._view[first : first + _LARGE_BYTES].tobytes().find(b"\n")
            if found >= 0:
                return self.read(first + found + 1 - start)
        return self.read(len(self._view) - start)


class _Admitted:
    """A function of the list above. Not a class and without attributes, so a pickle cannot build on it or change it."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise _Forbidden(f"setting '{name}' of a function")

    def __setstate__(self, state: Any) -> None:
        raise _Forbidden("setting the state of a function")


class _DType:
    """A NumPy dtype on its way: the code comes with the call, the byte order with the state."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any) -> None:
        code = code.decode("ascii") if isinstance(code, bytes) else code
        if not isinstance(code, str) or not _DTYPE.fullmatch(code):
            raise _Forbidden(f"an array of dtype {shown(code)}")
        self.code, self.order = code, "|"

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, subdtype, names, fields, item size, alignment, flags)
        if not isinstance(state, tuple) or len(state) < 8 or any(state[2:5]) or state[1] not in ("<", ">", "|", "="):
            raise _Forbidden("an array of a structured dtype")
        self.order = state[1]

    @property
    def is_object(self) -> bool:
        return self.code.startswith("O")

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.code if self.order == "|" else self.order + self.code)


class _Array:
    """A NumPy array on its way; `value` is the array, or the list that an array of objects holds."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: Any = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.fill(shape, dtype, "F" if fortran else "C", data)

    def fill(self, shape: Any, dtype: Any, order: str, data: Any) -> None:
        if not isinstance(dtype, _DType):
            raise _Forbidden("an array without a dtype")
        sizes_fit = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
        if not sizes_fit or len(shape) > _MAX_RANK:
            raise _Forbidden(f"an array whose shape is no tuple of at most {_MAX_RANK} sizes")
        if dtype.is_object:
            if not isinstance(data, list) or len(shape) != 1 or len(data) != shape[0]:
                raise _Forbidden("an array of objects that is not a plain list of them")
            self.value = data
            return
        numpy_dtype, count = dtype.numpy(), math.prod(shape)
        is_bytes = isinstance(data, (bytes, bytearray, memoryview))
        if not is_bytes or len(data) != count * numpy_dtype.itemsize:
            got = len(data) if is_bytes else type(data).__name__
            raise ValueError(f"array {shape} of {numpy_dtype} has {got} bytes of {count * numpy_dtype.itemsize}")
        if not count or not numpy_dtype.itemsize:
            self.value = np.zeros(shape, numpy_dtype)
            return
        self.value = np.frombuffer(data, numpy_dtype).reshape(shape, order=order)  # type: ignore[call-overload]
        self.value.flags.writeable = False


def _reconstruct(kind: Any, *_: Any) -> _Array:
    if kind is not _NDARRAY:
        raise _Forbidden("an array of a subclass of numpy.ndarray")
    return _Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any = "C") -> _Array:
    array = _Array()
    if isinstance(dtype, _DType) and dtype.is_object:
        raise _Forbidden("an array of objects over raw bytes")
    array.fill(shape, dtype, "F" if order == "F" else "C", data)
    return array


def _scalar(dtype: Any, data: Any = b"") -> Any:
    if not isinstance(dtype, _DType) or dtype.is_object:
        raise _Forbidden("a NumPy scalar that is neither number nor string")
    array = _Array()
    array.fill((1,), dtype, "C", data)
    return array.value[0].item()


def _no_direct_call(*_: Any) -> Any:
    raise _Forbidden("numpy.ndarray called directly")


def _encode(text: Any, codec: Any = "latin1") -> bytes | memoryview:
    if not isinstance(text, (str, _LongText)) or codec not in ("latin1", "latin-1"):
        raise _Forbidden(f"_codecs.encode with codec {shown(codec)}")
    return text.latin1() if isinstance(text, _LongText) else text.encode("latin1")


def _empty_bytes(*args: Any) -> bytes:
    if args:
        raise _Forbidden("bytes with arguments")
    return b""


_NDARRAY = _Admitted(_no_direct_call)
_ADMITTED: dict[tuple[str, str], _Admitted] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Admitted(_DType),
    ("_codecs", "encode"): _Admitted(_encode),
    ("builtins", "bytes"): _Admitted(_empty_bytes),
    ("__builtin__", "bytes"): _Admitted(_empty_bytes),
}
for _module in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    _ADMITTED[f"{_module}.multiarray", "_reconstruct"] = _Admitted(_reconstruct)
    _ADMITTED[f"{_module}.multiarray", "scalar"] = _Admitted(_scalar)
    _ADMITTED[f"{_module}.numeric", "_frombuffer"] = _Admitted(_from_buffer)

_DAMAGE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    EOFError,
    LookupError,
    NameError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)


class _Reader(pickle._Unpickler):
    """Python's unpickler with stand-ins for every name, and without the opcodes that data has no use for."""

    def __init__(self, file: _MappedFile, source: MappedPickle) -> None:
        super().__init__(file)
        self._mapped, self._source, self._path = file, source, source.path

    def load(self) -> Any:
        try:
            return super().load()
        except _Forbidden as error:
            raise CorruptFileError(
                f"{self._path}: the pickle asks for {error}, only NumPy arrays, strings and numbers are admitted: "
                f"{advice(str(error))}"
            ) from None
        except _DAMAGE as error:
            raise CorruptFileError(
                f"{self._path}: truncated, damaged or not a pickle ({type(error).__name__}: {reason_of(error, 100)}): "
                f"{advice(f'{type(error).__name__}: {reason_of(error)}')}"
            ) from None

    def find_class(self, module: str, name: str) -> _Admitted:
        found = _ADMITTED.get((module, name))
        if found is None:
            raise _Forbidden(f"'{f'{module}.{name}'[:100]}'")
        return found

    def _build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, (_Array, _DType)):
            raise _Forbidden(f"setting the state of a {type(target).__name__}")
        target.__setstate__(state)

    def _reduce(self) -> None:
        args = self.stack.pop()
        function = self.stack[-1]
        if not isinstance(function, _Admitted) or not isinstance(args, tuple):
            raise _Forbidden(f"a call of a {type(function).__name__}")
        self.stack[-1] = function(*args)

    # A frame is only a hint to read ahead. Not to follow it keeps the reading at one place in the map, from which
    # large strings can be cut, and a frame of the size of the file from being allocated.

    def _frame(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        self._mapped.check(size)

    def _counted(self, form: str) -> memoryview:
        (size,) = struct.unpack(form, self.read(struct.calcsize(form)))
        return self._mapped.view(size)

    def _push_bytes(self, data: memoryview) -> None:
        self.append(data if len(data) >= _LARGE_BYTES else data.tobytes())

    def _push_text(self, data: memoryview) -> None:
        large = len(data) >= _LARGE_BYTES
        self.append(
            _LongText(lambda: self._source.respelt(data)) if large else str(data.tobytes(), "utf-8", "surrogatepass")
        )

    def _bytes4(self) -> None:
        self._push_bytes(self._counted("<I"))

    def _bytes8(self) -> None:
        self._push_bytes(self._counted("<Q"))

    def _text4(self) -> None:
        self._push_text(self._counted("<I"))

    def _text8(self) -> None:
        self._push_text(self._counted("<Q"))

    def _bytearray(self) -> None:
        data = self._counted("<Q")
        self.append(data if len(data) >= _LARGE_BYTES else bytearray(data))

    def _forbidden(self) -> None:
        raise _Forbidden("an object of a class, or one kept outside the file")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.REDUCE[0]] = _reduce
    dispatch[pickle.FRAME[0]] = _frame
    dispatch[pickle.BINBYTES[0]] = _bytes4
    dispatch[pickle.BINBYTES8[0]] = _bytes8
    dispatch[pickle.BINUNICODE[0]] = _text4
    dispatch[pickle.BINUNICODE8[0]] = _text8
    dispatch[pickle.BYTEARRAY8[0]] = _bytearray
    for _opcode in (
        pickle.NEWOBJ,
        pickle.NEWOBJ_EX,
        pickle.PERSID,
        pickle.BINPERSID,
        pickle.EXT1,
        pickle.EXT2,
        pickle.EXT4,
        pickle.NEXT_BUFFER,
        pickle.READONLY_BUFFER,
    ):
        dispatch[_opcode[0]] = _forbidden


def _unwrap(value: Any) -> Any:
    """`value` with stand-ins replaced by what they hold.

    Only the levels that MMSA's layout has are entered (split, key, list of values): a pickle may nest lists so that
    walking all of them would never end.
    """

    def plain(x: Any) -> Any:
        return x.value if isinstance(x, _Array) else x

    value = plain(value)
    if not isinstance(value, dict):
        return value
    return {
        split: {key: [plain(x) for x in v] if isinstance(v := plain(inner), list) else v for key, inner in data.items()}
        if isinstance(data, dict)
        else plain(data)
        for split, data in value.items()
    }
