"""Nests of tensors, as models take and give them: lists, mappings and records, each tensor by its path."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor, nn

from hcmen.base.errors import InputError

__all__ = ["arguments_by_name", "leaves", "named", "outputs_by_name", "replaced"]


def _children(value: Any) -> list[tuple[str, Any]] | None:
    """(name, value) of what is in a list, mapping or record; None for anything else."""
    if isinstance(value, Mapping):
        return [(str(key), x) for key, x in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, (list, tuple)):
        return [(str(i), x) for i, x in enumerate(value)]
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    return None


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    for key, x in _children(value) or ():
        yield from leaves(x, f"{name}.{key}" if name else key)


def named(values: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a nest with a name for each: the path to it."""
    for name, value in values.items():
        yield from leaves(value, name)


def arguments_by_name(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """name -> argument of the model's forward, in the order that they were given in."""
    names = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    names += [f"input_{i}" for i in range(len(names), len(args))]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def outputs_by_name(outputs: Any) -> dict[str, Any]:
    """name -> output. Raises InputError for what is no nest of tensors."""
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    children = _children(outputs)
    if children is None:
        raise InputError(f"the model gives a {type(outputs).__name__}", "a tensor, or a nest of tensors")
    if isinstance(outputs, (list, tuple)) and not hasattr(outputs, "_fields"):
        children = [(f"output_{name}", x) for name, x in children]
    found = {name: x for name, x in children if x is not None}
    for name, x in found.items():
        if not isinstance(x, Tensor) and _children(x) is None:
            raise InputError(
                f"the model's output '{name}' is a {type(x).__name__}",
                "a tensor, or a nest of tensors",
                "switch it off (a cache by use_cache=False), or wrap the model",
            )
    return found


def replaced(value: Any, new: Iterator[Tensor]) -> Any:
    """A nest with other tensors in it, in the order of `_leaves`."""
    if isinstance(value, Tensor):
        return next(new)
    children = _children(value)
    if children is None:
        return value
    values = [replaced(x, new) for _, x in children]
    if isinstance(value, Mapping):
        return dict(zip(value, values, strict=True))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*values)
    if isinstance(value, (list, tuple)):
        return type(value)(values)
    return replace(value, **{name: x for (name, _), x in zip(children, values, strict=True)})
