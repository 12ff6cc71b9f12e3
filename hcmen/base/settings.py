"""Frozen dataclasses that are saved as JSON: how what was saved is read back, strictly."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from hcmen.base.errors import InputError, did_you_mean, shown

__all__ = ["checked", "finite", "in_range", "require"]

_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def require(condition: bool, message: str) -> None:
    """Raises InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def finite(value: float) -> bool:
    """Whether `value` is a number that a float can be; an integer in JSON may be larger than any of them."""
    return -sys.float_info.max <= value <= sys.float_info.max


def in_range(value: int, name: str, least: int, most: int) -> None:
    """Raises InputError unless `value`, of any number of digits, is from `least` to `most`."""
    if not least <= value <= most:
        raise InputError(f"{name} is {shown(value)}, expected {least} to {most}")


def checked(cls: type, data: Mapping[str, Any], prefix: str = "", *, whole: bool = False) -> dict[str, Any]:
    """`data` with every key known to the dataclass `cls`, required keys there, and values of the declared type.

    A field that is another dataclass is an object here, a tuple a list, and both may be null where None may be; what
    they hold is for the caller to read.

    Args:
        cls: its fields are the keys. data: what was saved. prefix: of keys in messages, such as "text.".
        whole: a key with a default is required as well.

    Raises:
        InputError: a key is missing or unknown, or a value is of another type.
    """
    require(isinstance(data, Mapping), f"config {prefix or cls.__name__} is {type(data).__name__}, expected an object")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            hint = did_you_mean(str(key), fields)
            raise InputError(f"unknown config key {shown(f'{prefix}{key}')}" + (f", {hint}" if hint else ""))
    for name, f in fields.items():
        if name not in data:
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            require(not required and not whole, f"config key '{prefix}{name}' is missing")
            continue
        declared = str(f.type)
        made_of = (list, tuple) if declared.startswith("tuple[") else (Mapping,)
        kinds = _TYPES.get(declared) or (*made_of, *([type(None)] if declared.endswith("| None") else []))
        value = data[name]
        # A whole number may have more digits than any float.
        fits = declared != "float" or not isinstance(value, int) or value.bit_length() < 1024
        require(
            # In Python a bool is an int, in JSON it is not.
            fits and isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)),
            f"config key '{prefix}{name}' is {shown(value)}, expected {declared}",
        )
    return {name: data[name] for name in fields if name in data}
