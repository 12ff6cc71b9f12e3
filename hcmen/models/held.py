"""A file of weights held to the module that is to take them, before either is in memory.

The sizes in a configuration are believed by nobody: a width of 1e8 in a file of a few lines would be allocated. So the
module is built on torch's "meta" device first, where tensors have shapes and no memory. What the header of the
safetensors file says must be the same, and the file as long as that. Then both are as large as the file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from hcmen.base.errors import reason_of

__all__ = ["Header", "hold", "on_meta", "read_header"]

# By safetensors' names; what no module of ours has is not among them.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MOST_AXES = 16
_MOST_BYTES = 64 << 20  # the history of some 50,000 epochs


class Header(NamedTuple):
    """What a safetensors file says that it holds: (dtype, shape) by name, and texts by name."""

    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    texts: Mapping[str, str]


def on_meta(make: Callable[[], Any]) -> Any:
    """The module that `make` builds, with shapes and without memory.

    Raises:
        ValueError: the module cannot be built that way, or its sizes are beyond any tensor's.
    """
    try:
        with torch.device("meta"):
            return make()
    except (RuntimeError, NotImplementedError, ArithmeticError, TypeError) as error:
        raise ValueError(f"no model of these sizes can be built ({reason_of(error)})") from error


def read_header(file: IO[bytes]) -> Header:
    """The header of the open safetensors file `file`.

    Whether tensors overlap and names come twice is for safetensors to say.

    Raises:
        ValueError: there is none, or the file is not as long as its header says.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(_MOST_BYTES, size - 8):
        raise ValueError(f"its header has {length} bytes, expected at most {min(_MOST_BYTES, max(size - 8, 0))}")
    try:
        read = json.loads(file.read(length))
        texts = read.pop("__metadata__", {})
        tensors = {name: (_DTYPES[x["dtype"]], _shape(x["shape"])) for name, x in read.items()}
    except (RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("its header is no list of tensors") from error
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise ValueError("its header holds more than tensors and texts")
    needed = 8 + length + sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values())
    if size != needed:
        # Of any number of digits, as the sizes are.
        raise ValueError(f"it has {size} bytes, its header asks for {'more' if needed > size else 'fewer'}")
    return Header(tensors, texts)


def hold(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], wanted: Mapping[str, Tensor]) -> None:
    """Holds the tensors of a header to those of a module; there may be more of them.

    Raises:
        ValueError: one is missing, or has another shape or dtype.
    """
    for name, x in wanted.items():
        if name not in tensors:
            raise ValueError(f"the weights lack '{name}'")
        dtype, shape = tensors[name]
        if (dtype, shape) != (x.dtype, tuple(x.shape)):
            raise ValueError(
                f"weight '{name[:100]}' is {_called(dtype)} {list(shape)}, expected {_called(x.dtype)} {list(x.shape)}"
            )


def _shape(value: Any) -> tuple[int, ...]:
    if (
        type(value) is not list
        or len(value) > _MOST_AXES
        or not all(type(n) is int and 0 <= n < 1 << 48 for n in value)
    ):
        raise TypeError("no shape")
    return tuple(value)


def _called(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
