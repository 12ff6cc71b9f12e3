"""Python's unpickler with bounds: on what a pickle may call, and on what it may build (see unpickle.py).

A small program can build something large, or something that a later step never comes back from. So there are bounds: on
the memory of small objects, which also bounds the steps; on the digits of numbers; on what may be a key, since Python
hashes a nested tuple without looking at its depth or at Ctrl-C; and, once all is built, on its depth and on its size
with each shared object counted as often as it is referred to.
"""

from __future__ import annotations

import codecs
import pickle
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np

from hcmen.base.errors import CorruptFileError, reason_of, shown
from hcmen.data.stand_ins import ADMITTED, Admitted, Array, DType, Forbidden, LongText
from hcmen.data.unpickle_advice import advice

__all__ = ["Reader"]

# Byte strings and texts of this size and more are left in the map.
_LARGE_BYTES = 1 << 16

# Small objects, as memory of them; MOSEI's 22,856 samples take a tenth.
_MOST_SMALL_BYTES = 1 << 29
# A number in NumPy has 8 bytes. Python turns a few thousand digits into a number, and refuses to print it.
_MOST_INTEGER_BYTES = 64
_MOST_DIGITS = 256
_MOST_DEPTH = 32
# What is built, with shared objects counted each time, against the size of the file: one reference takes two bytes
# there and eight in memory. The second number leaves room for small files.
_MOST_GROWTH, _MOST_UNFOLDED_BYTES = 8, 1 << 27


class _File:
    """The map as the file that the unpickler asks for; it refuses to read more than it has left, so that a declared
    size cannot make a reader allocate."""

    def __init__(self, view: memoryview) -> None:
        self._view, self._at, self._size = view, 0, len(view)

    def view(self, size: int) -> memoryview:
        start, end = self._at, self._at + size
        if not start <= end <= self._size:
            raise EOFError(f"{size} bytes announced, {self._size - start} left")
        self._at = end
        return self._view[start:end]

    def read(self, size: int) -> bytes:
        return self.view(size).tobytes()

    def check(self, size: int) -> None:
        """Refuses an announcement of more than there is."""
        self.view(size)
        self._at -= size

    def readline(self, most: int | None = None) -> bytes:
        """Up to the end of the line, or `most` bytes of it."""
        start = self._at
        end = self._size if most is None else min(self._size, start + most)
        for first in range(start, end, _LARGE_BYTES):
            found = self._view[first : min(end, first + _LARGE_BYTES)].tobytes().find(b"\n")
            if found >= 0:
                return self.read(first + found + 1 - start)
        return self.read(end - start)


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


# Bytes of memory that a step may take beyond the bytes of the file: 64 if not listed, which also bounds the steps.
_COSTS = [64] * 256
for _opcode, _bytes in (
    (pickle.EMPTY_LIST, 96),
    (pickle.EMPTY_DICT, 96),
    (pickle.EMPTY_SET, 256),
    (pickle.FROZENSET, 256),
    (pickle.MARK, 160),
    (pickle.LIST, 96),
    (pickle.DICT, 256),
    (pickle.SETITEM, 256),
    (pickle.MEMOIZE, 160),
    (pickle.PUT, 160),
    (pickle.BINPUT, 160),
    (pickle.LONG_BINPUT, 160),
    (pickle.REDUCE, 512),
    (pickle.BUILD, 256),
):
    _COSTS[_opcode[0]] = _bytes
_ITEM_BYTES = 128  # of a dict or set, while it grows

_SCALARS = frozenset({str, bytes, int, float, bool, type(None)})


class Reader(pickle._Unpickler):
    """Python's unpickler with stand-ins for every name, and without the opcodes that data has no use for."""

    def __init__(self, view: memoryview, name: str, respelt: Callable[[memoryview], memoryview]) -> None:
        """A reader of the pickle that `view` maps.

        Args:
            view: the whole file.
            name: what error messages call it.
            respelt: gives a text of UTF-8 in Latin-1.
        """
        file = _File(view)
        super().__init__(file)  # type: ignore[call-arg]
        self._mapped, self._size, self._name, self._respelt = file, len(view), name, respelt
        # A frame is only a hint to read ahead. Not to follow it keeps the reading at one place in the map, from which
        # large strings can be cut, and a frame of the size of the file from being allocated.
        self.read, self.readline = file.read, file.readline
        self.metastack: list[list[Any]] = []
        self.stack: list[Any] = []
        self.append = self.stack.append
        self._small_bytes = _MOST_SMALL_BYTES

    def load(self) -> Any:
        """What the pickle holds.

        Raises:
            CorruptFileError: it asks for what is not admitted, or for too much of it, or is damaged.
        """
        try:
            value = self._run()
            _check(value, _MOST_GROWTH * self._size + _MOST_UNFOLDED_BYTES)
        except Forbidden as error:
            raise CorruptFileError(
                f"{self._name}: the pickle asks for {error}, only NumPy arrays, strings and numbers are admitted: "
                f"{advice(str(error))}"
            ) from None
        except _DAMAGE as error:
            raise CorruptFileError(
                f"{self._name}: truncated, damaged or not a pickle ({type(error).__name__}: {reason_of(error, 100)}): "
                f"{advice(f'{type(error).__name__}: {reason_of(error)}')}"
            ) from None
        return _unwrap(value)

    def _run(self) -> Any:
        view, dispatch, costs = self._mapped.view, self.dispatch, _COSTS
        while True:
            opcode = view(1)[0]
            if opcode == _STOP:
                return self.stack.pop()
            self._small_bytes -= costs[opcode]
            if self._small_bytes < 0:
                self._charge(0)
            dispatch[opcode](self)

    def _charge(self, size: int) -> None:
        self._small_bytes -= size
        if self._small_bytes < 0:
            raise Forbidden(f"more than {_MOST_SMALL_BYTES >> 20} MiB of small objects")

    def find_class(self, module: str, name: str) -> Admitted:
        found = ADMITTED.get((module, name))
        if found is None:
            raise Forbidden(shown(f"{module[:100]}.{name[:100]}"[:100]))
        return found

    def _build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, (Array, DType)):
            raise Forbidden(f"setting the state of a {type(target).__name__}")
        target.__setstate__(state)

    def _reduce(self) -> None:
        args = self.stack.pop()
        function = self.stack[-1]
        if not isinstance(function, Admitted) or not isinstance(args, tuple):
            raise Forbidden(f"a call of a {type(function).__name__}")
        made = self.stack[-1] = function(*args)
        if isinstance(made, (str, bytes)):
            self._charge(sys.getsizeof(made))

    def _frame(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        self._mapped.check(size)

    # --- strings and numbers ----------------------------------------------------------------------------------------

    def _counted(self, form: str) -> memoryview:
        (size,) = struct.unpack(form, self.read(struct.calcsize(form)))
        return self._mapped.view(size)

    def _push_bytes(self, data: memoryview) -> None:
        self.append(data if len(data) >= _LARGE_BYTES else data.tobytes())

    def _push_text(self, data: memoryview) -> None:
        if len(data) >= _LARGE_BYTES:
            self.append(LongText(lambda: self._respelt(data)))
            return
        text = str(data.tobytes(), "utf-8", "surrogatepass")
        self._charge(max(0, sys.getsizeof(text) - len(data) - 64))
        self.append(text)

    def _bytes4(self) -> None:
        self._push_bytes(self._counted("<I"))

    def _bytes8(self) -> None:
        self._push_bytes(self._counted("<Q"))

    def _text4(self) -> None:
        self._push_text(self._counted("<I"))

    def _text8(self) -> None:
        self._push_text(self._counted("<Q"))

    def _text_line(self) -> None:
        line = self.readline()
        text = str(line[:-1], "raw-unicode-escape")
        self._charge(max(0, sys.getsizeof(text) - len(line) - 64))  # one character beyond Latin-1 widens them all
        self.append(text)

    # Python 2's byte strings are its names and keys, and the numbers of its arrays. Latin-1 loses nothing of either.

    def _old_string(self, data: memoryview) -> None:
        self.append(data if len(data) >= _LARGE_BYTES else str(data, "latin1"))

    def _old_string1(self) -> None:
        self._old_string(self._counted("<B"))

    def _old_string4(self) -> None:
        self._old_string(self._counted("<i"))

    def _old_string_line(self) -> None:
        line = self.readline()[:-1]
        if len(line) < 2 or line[0] != line[-1] or line[:1] not in (b"'", b'"'):
            raise pickle.UnpicklingError("a string without quotation marks")
        line = line[1:-1]
        if b"\\" in line:
            with warnings.catch_warnings():  # of an escape that Python 2 never wrote
                warnings.simplefilter("ignore")
                line = codecs.escape_decode(line)[0]  # type: ignore[attr-defined,unused-ignore]
        self._old_string(memoryview(line))

    def _bytearray(self) -> None:
        data = self._counted("<Q")
        self.append(data if len(data) >= _LARGE_BYTES else bytearray(data))

    def _digits(self) -> bytes:
        """A line with a number on it."""
        line = self._mapped.readline(_MOST_DIGITS)
        if len(line) == _MOST_DIGITS and not line.endswith(b"\n"):
            raise Forbidden(f"a number of more than {_MOST_DIGITS} digits")
        return line[:-1]

    def _integer_line(self) -> None:
        digits = self._digits()
        self.append({b"00": False, b"01": True}[digits] if digits in (b"00", b"01") else int(digits, 0))

    def _long_line(self) -> None:
        self.append(int(self._digits().rstrip(b"L"), 0))

    def _float_line(self) -> None:
        self.append(float(self._digits()))

    def _integer_of(self, size: int) -> None:
        if size < 0:
            raise pickle.UnpicklingError("a number of fewer than 0 bytes")
        self._mapped.check(size)
        if size > _MOST_INTEGER_BYTES:
            raise Forbidden(f"a whole number of {size} bytes")
        self.append(pickle.decode_long(self.read(size)))

    def _long1(self) -> None:
        self._integer_of(self.read(1)[0])

    def _long4(self) -> None:
        self._integer_of(struct.unpack("<i", self.read(4))[0])

    def _get_line(self) -> None:
        self.append(self.memo[int(self._digits())])

    def _put_line(self) -> None:
        place = int(self._digits())
        if not 0 <= place < 1 << 32:
            raise ValueError("a place in the memo beyond 32 bits")
        self.memo[place] = self.stack[-1]

    # --- containers -------------------------------------------------------------------------------------------------

    def _container(self, kind: type) -> Any:
        """The top of the stack, which has to be of this very type."""
        if type(self.stack[-1]) is not kind:
            raise Forbidden(f"items in a {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def _append_one(self) -> None:
        item = self.stack.pop()
        self._container(list).append(item)

    def _append_all(self) -> None:
        items = self.pop_mark()
        self._container(list).extend(items)

    def _set(self, target: dict[Any, Any], keys: list[Any], values: list[Any]) -> None:
        self._charge(_ITEM_BYTES * len(keys))
        _check_keys(keys)
        if len(keys) != len(values):
            raise pickle.UnpicklingError("a key without a value")
        target.update(zip(keys, values, strict=True))

    def _set_one(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self._container(dict), [key], [value])

    def _set_all(self) -> None:
        items = self.pop_mark()
        self._set(self._container(dict), items[::2], items[1::2])

    def _dict_of(self) -> None:
        items, made = self.pop_mark(), dict[Any, Any]()
        self._set(made, items[::2], items[1::2])
        self.append(made)

    def _add_all(self) -> None:
        items = self.pop_mark()
        self._charge(_ITEM_BYTES * len(items))
        _check_keys(items)
        self._container(set).update(items)

    def _frozen(self) -> None:
        items = self.pop_mark()
        self._charge(_ITEM_BYTES * len(items))
        _check_keys(items)
        self.append(frozenset(items))

    # --- what data has no use for -----------------------------------------------------------------------------------

    def _instance(self) -> None:
        module, name = (self.readline()[:-1].decode("utf-8") for _ in range(2))
        self.find_class(module, name)
        self._forbidden()

    def _forbidden(self) -> None:
        raise Forbidden("an object of a class, or one kept outside the file")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    for _opcode, _handler in (
        (pickle.BUILD, _build),
        (pickle.REDUCE, _reduce),
        (pickle.FRAME, _frame),
        (pickle.STRING, _old_string_line),
        (pickle.BINSTRING, _old_string4),
        (pickle.SHORT_BINSTRING, _old_string1),
        (pickle.BINBYTES, _bytes4),
        (pickle.BINBYTES8, _bytes8),
        (pickle.BINUNICODE, _text4),
        (pickle.BINUNICODE8, _text8),
        (pickle.BYTEARRAY8, _bytearray),
        (pickle.UNICODE, _text_line),
        (pickle.INT, _integer_line),
        (pickle.LONG, _long_line),
        (pickle.FLOAT, _float_line),
        (pickle.LONG1, _long1),
        (pickle.LONG4, _long4),
        (pickle.GET, _get_line),
        (pickle.PUT, _put_line),
        (pickle.APPEND, _append_one),
        (pickle.APPENDS, _append_all),
        (pickle.SETITEM, _set_one),
        (pickle.SETITEMS, _set_all),
        (pickle.DICT, _dict_of),
        (pickle.ADDITEMS, _add_all),
        (pickle.FROZENSET, _frozen),
        (pickle.INST, _instance),
        (pickle.OBJ, _forbidden),
        (pickle.NEWOBJ, _forbidden),
        (pickle.NEWOBJ_EX, _forbidden),
        (pickle.PERSID, _forbidden),
        (pickle.BINPERSID, _forbidden),
        (pickle.EXT1, _forbidden),
        (pickle.EXT2, _forbidden),
        (pickle.EXT4, _forbidden),
        (pickle.NEXT_BUFFER, _forbidden),
        (pickle.READONLY_BUFFER, _forbidden),
    ):
        dispatch[_opcode[0]] = _handler


_STOP = pickle.STOP[0]


def _check_keys(keys: list[Any]) -> None:
    """Refuses keys whose hash goes deep, takes long, or is the same for many: all but short plain values."""
    for key in keys:
        if type(key) not in _SCALARS:
            raise Forbidden(f"a {type(key).__name__} as a key")
        # Python takes whole numbers modulo 2**61 - 1, so that many of them can be made to collide.
        if type(key) is int and key.bit_length() > 60:
            raise Forbidden(f"a whole number of {key.bit_length()} bits as a key")


def _check(value: Any, most_bytes: int) -> None:
    """Refuses what is nested too deep or in itself, and what unfolds into too much: nobody could walk through it.

    Each object is looked at once, however often it is referred to.
    """
    done: dict[int, tuple[int, int]] = {}  # id -> depth and bytes, all shared objects unfolded
    path = [(value, _inside(value))]
    entered = {id(value)}
    while path:
        current, left = path[-1]
        inner = next((x for x in left if id(x) not in done), None)
        if inner is not None:
            if id(inner) in entered:
                raise Forbidden("a container that holds itself")
            if len(path) > _MOST_DEPTH:
                raise Forbidden(f"containers more than {_MOST_DEPTH} deep")
            entered.add(id(inner))
            path.append((inner, _inside(inner)))
            continue
        path.pop()
        entered.discard(id(current))
        found = [done[id(x)] for x in _inside(current)]
        size = _own_bytes(current) + sum(n for _, n in found)
        depth = 1 + max((n for n, _ in found), default=0)
        if size > most_bytes or depth > _MOST_DEPTH:
            raise Forbidden(
                f"containers more than {_MOST_DEPTH} deep, or of more than {most_bytes} bytes once unfolded"
            )
        done[id(current)] = depth, size


def _inside(value: Any) -> Iterator[Any]:
    """The containers and arrays that `value` refers to itself; each as often as it does."""
    if isinstance(value, Array):
        value = value.value
    items = value.values() if isinstance(value, dict) else value
    if isinstance(value, (list, tuple, dict)) and not _SCALARS.issuperset(map(type, items)):
        return (x for x in items if isinstance(x, (list, tuple, dict, set, frozenset, Array)))
    return iter(())


def _own_bytes(value: Any) -> int:
    """Bytes of the array, or of the references and plain values that a container holds itself."""
    if isinstance(value, Array):
        value = value.value
    if isinstance(value, np.ndarray):
        return value.nbytes
    if not isinstance(value, (list, tuple, dict, set, frozenset)):
        return 0
    total = 8 * len(value)
    for items in (value, value.values()) if isinstance(value, dict) else (value,):
        if not {str, bytes}.isdisjoint(map(type, items)):
            total += sum(len(x) for x in items if isinstance(x, (str, bytes)))
    return total


def _unwrap(value: Any) -> Any:
    """`value` with stand-ins replaced by what they hold, in place.

    Only the levels that MMSA's layout has are entered (split, key, list of values).
    """

    def plain(x: Any) -> Any:
        return x.value if isinstance(x, Array) else x

    value = plain(value)
    seen: set[int] = set()
    for data in _replaced(value, plain) if isinstance(value, dict) else ():
        if not isinstance(data, dict) or id(data) in seen:
            continue
        seen.add(id(data))
        for inner in _replaced(data, plain):
            if isinstance(inner, list) and id(inner) not in seen:
                seen.add(id(inner))
                inner[:] = map(plain, inner)
    return value


def _replaced(items: dict[Any, Any], plain: Callable[[Any], Any]) -> list[Any]:
    for key, value in items.items():
        items[key] = plain(value)
    return list(items.values())
