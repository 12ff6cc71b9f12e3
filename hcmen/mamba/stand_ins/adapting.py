"""A function of ours in the place of another, called by that one's argument order."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch

from hcmen.base.errors import InputError

__all__ = ["MARK", "Replacing", "adapted", "on_cuda"]

MARK = "__hcmen_replaces__"
"""The attribute of a function that stands in the place of another."""


class Replacing(Protocol):
    """What replaces attributes for a while: the shim."""

    def replace(self, owner: Any, name: str, value: Any, *, for_good: bool = False) -> None:
        """Sets an attribute, to be as it was in the end unless `for_good`."""
        ...

    def on_exit(self, undo: Callable[[], object]) -> None:
        """Has `undo` called in the end."""
        ...


def on_cuda(values: Iterable[Any]) -> bool:
    """Whether any of these is a tensor on CUDA."""
    return any(isinstance(value, torch.Tensor) and value.is_cuda for value in values)


def adapted(
    original: Callable[..., Any],
    ours: Callable[..., Any],
    *,
    works_on_cuda: bool,
    renamed: Mapping[str, str] | None = None,
    ignored: Sequence[str] = (),
) -> Callable[..., Any]:
    """`ours`, called by the argument order of `original`; with `works_on_cuda`, CUDA tensors still go to `original`.

    So every generation of a function is served by one, however it ordered its arguments. `renamed` gives the names that
    `original` has for arguments of `ours`; those `ignored` change nothing of the result.
    """
    parameters = inspect.signature(original).parameters
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [name for name, p in parameters.items() if p.kind in positional]
    known = inspect.signature(ours).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    renames = dict(renamed or {})

    @functools.wraps(original)
    def call(*arguments: Any, **named: Any) -> Any:
        if works_on_cuda and on_cuda(iter((*arguments, *named.values()))):
            return original(*arguments, **named)
        given = {**dict(zip(names, arguments, strict=False)), **named}
        if len(arguments) > len(names):
            return ours(*arguments, **named)
        passed = {renames.get(name, name): value for name, value in given.items() if name not in ignored}
        for name in [] if takes_all else [name for name in passed if name not in known]:
            value = passed.pop(name)
            default = parameters[name].default if name in parameters else None
            if value is not default and value is not None and value is not False:
                raise InputError(
                    f"{original.__name__} was called with {name}",
                    f"no more than {', '.join(known)}",
                    "leave it at its default, since it is not served",
                )
        return ours(**passed)

    setattr(call, MARK, True)
    return call
