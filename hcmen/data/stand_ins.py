"""What stands for NumPy's functions in a pickle: they check dtype, shape and bytes, and call none of NumPy's own.

`ADMITTED` has every name that a pickle may ask for. What is made here is no more than what the pickle's own bytes
give: an array is a view over them, and an array of no bytes has no elements.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from hcmen.base.errors import shown

__all__ = ["ADMITTED", "Admitted", "Array", "DType", "Forbidden", "LongText"]

_DTYPE = re.compile(r"(?:b1|[iu][1248]|f[248]|[US]\d{1,6}|O[48]?)")
_MAX_RANK = 4
_LAST_CHARACTER = 0x10FFFF


class Forbidden(Exception):
    """The pickle wants something that is not admitted; the message says what."""


class LongText:
    """A text that is left as it lies in the file, for the one use that data has for it: bytes in protocol 2."""

    __slots__ = ("_bytes", "_respelt")

    def __init__(self, respelt: Callable[[], memoryview]) -> None:
        self._respelt = respelt
        self._bytes: memoryview | None = None

    def latin1(self) -> memoryview:
        """Its characters as bytes, respelt once however often the pickle asks."""
        if self._bytes is None:
            self._bytes = self._respelt()
        return self._bytes


class Admitted:
    """A function of the list below. Not a class and without attributes, so a pickle cannot build on it or change it."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise Forbidden("setting an attribute of a function")

    def __setstate__(self, state: Any) -> None:
        raise Forbidden("setting the state of a function")


class DType:
    """A NumPy dtype on its way: the code comes with the call, the byte order with the state."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any) -> None:
        code = code.decode("ascii") if isinstance(code, bytes) else code
        if not isinstance(code, str) or not _DTYPE.fullmatch(code):
            raise Forbidden(f"an array of dtype {shown(code)}")
        self.code, self.order = code, "|"

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, subdtype, names, fields, item size, alignment, flags)
        if not isinstance(state, tuple) or len(state) < 8 or any(state[2:5]) or state[1] not in ("<", ">", "|", "="):
            raise Forbidden("an array of a structured dtype")
        self.order = state[1]

    @property
    def is_object(self) -> bool:
        return self.code.startswith("O")

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.code if self.order == "|" else self.order + self.code)


class Array:
    """A NumPy array on its way; `value` is the array, or the list that an array of objects holds."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: Any = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.fill(shape, dtype, "F" if fortran else "C", data)

    def fill(self, shape: Any, dtype: Any, order: str, data: Any) -> None:
        if not isinstance(dtype, DType):
            raise Forbidden("an array without a dtype")
        sizes_fit = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
        if not sizes_fit or len(shape) > _MAX_RANK:
            raise Forbidden(f"an array whose shape is no tuple of at most {_MAX_RANK} sizes")
        if dtype.is_object:
            if type(data) is not list or len(shape) != 1 or len(data) != shape[0]:
                raise Forbidden("an array of objects that is not a plain list of them")
            self.value = data
            return
        numpy_dtype, count = dtype.numpy(), math.prod(shape)
        if count and not numpy_dtype.itemsize:  # no byte stands behind an element, and NumPy would make one
            raise Forbidden(f"an array of dtype '{dtype.code}'")
        if isinstance(data, str):  # the byte string of a Python 2
            data = data.encode("latin1")
        is_bytes = isinstance(data, (bytes, bytearray, memoryview))
        if not is_bytes or len(data) != count * numpy_dtype.itemsize:
            got = len(data) if is_bytes else type(data).__name__
            needed = shown(count * numpy_dtype.itemsize)
            raise ValueError(f"array {shown(list(shape))} of {numpy_dtype} has {got} bytes of {needed}")
        if not count:
            self.value = np.zeros(shape, numpy_dtype)
            return
        flat = np.frombuffer(data, numpy_dtype)
        if numpy_dtype.kind == "U" and flat.view(f"{numpy_dtype.byteorder}u4").max() > _LAST_CHARACTER:
            raise ValueError("an array of text with numbers that are no characters")
        self.value = flat.reshape(shape, order=order)  # type: ignore[call-overload]
        self.value.flags.writeable = False


def _reconstruct(kind: Any, *_: Any) -> Array:
    if kind is not _NDARRAY:
        raise Forbidden("an array of a subclass of numpy.ndarray")
    return Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any = "C", axis_order: Any = None) -> Array:
    array = Array()
    if isinstance(dtype, DType) and dtype.is_object:
        raise Forbidden("an array of objects over raw bytes")
    if order not in ("C", "F", "K"):
        raise Forbidden("an array of an unknown memory order")
    array.fill(shape, dtype, "F" if order == "F" else "C", data)
    if axis_order is not None:
        # Since NumPy 2.3, for an array with its axes in turn: `shape` as it lies in memory, and where each axis went.
        plain = type(axis_order) is tuple and all(type(n) is int for n in axis_order)
        if order != "K" or not plain or sorted(axis_order) != list(range(len(shape))):
            raise Forbidden("an array whose axis order names not every axis once")
        array.value = array.value.transpose(axis_order)
    return array


def _scalar(dtype: Any, data: Any = b"") -> Any:
    if not isinstance(dtype, DType) or dtype.is_object:
        raise Forbidden("a NumPy scalar that is neither number nor string")
    if dtype.code in ("U0", "S0"):  # an empty string, which has no bytes
        return "" if dtype.code == "U0" else b""
    array = Array()
    array.fill((1,), dtype, "C", data)
    return array.value[0].item()


def _no_direct_call(*_: Any) -> Any:
    raise Forbidden("numpy.ndarray called directly")


def _encode(text: Any, codec: Any = "latin1") -> bytes | memoryview:
    if not isinstance(text, (str, LongText)) or codec not in ("latin1", "latin-1"):
        raise Forbidden(f"_codecs.encode with codec {shown(codec)}")
    return text.latin1() if isinstance(text, LongText) else text.encode("latin1")


def _empty_bytes(*args: Any) -> bytes:
    if args:
        raise Forbidden("bytes with arguments")
    return b""


_NDARRAY = Admitted(_no_direct_call)
ADMITTED: dict[tuple[str, str], Admitted] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): Admitted(DType),
    ("_codecs", "encode"): Admitted(_encode),
    ("builtins", "bytes"): Admitted(_empty_bytes),
    ("__builtin__", "bytes"): Admitted(_empty_bytes),
}
for _module in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    ADMITTED[f"{_module}.multiarray", "_reconstruct"] = Admitted(_reconstruct)
    ADMITTED[f"{_module}.multiarray", "scalar"] = Admitted(_scalar)
    ADMITTED[f"{_module}.numeric", "_frombuffer"] = Admitted(_from_buffer)
