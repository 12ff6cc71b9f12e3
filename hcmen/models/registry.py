"""The kinds of models: what each is configured by, built as and trained with. What a model has to be: contract.py.

A kind of ours is a folder beside this file whose package holds its `KIND`, and is imported when it is first asked for.
Others are told of with `register`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hcmen.base.errors import InputError, shown, unknown_name

__all__ = ["DEFAULT", "Kind", "named", "register"]

OURS = ("hcmen",)
DEFAULT = "hcmen"
"""The kind of checkpoints that name none, and of the presets."""


@dataclass(frozen=True)
class Kind:
    """One kind of model.

    name: in configurations, checkpoints and bundles. title: in tables. config: its frozen dataclass, a contract.Config,
    imported without torch. module: config -> nn.Module, a contract.Model. objective: (config, training settings) -> a
    hcmen.models.objective.Objective. presets: name -> config.
    """

    name: str
    title: str
    config: type[Any]
    module: Callable[[Any], Any]
    objective: Callable[[Any, Any], Any]
    presets: Mapping[str, Any] = field(default_factory=dict)


_KINDS: dict[str, Kind] = {}


def register(kind: Kind) -> None:
    """Makes `kind` known under its name, in this process.

    Raises:
        InputError: another kind has the name, or its configuration says another one.
    """
    if kind.name in OURS or _KINDS.get(kind.name, kind) != kind:
        raise InputError(f"model kind '{kind.name}' is there already: choose another name")
    if kind.config.kind != kind.name:
        raise InputError(f"the configuration of model kind '{kind.name}' says '{kind.config.kind}', expected its name")
    _KINDS[kind.name] = kind


def named(name: str) -> Kind:
    """The kind called `name`; raises InputError with the nearest name if there is none.

    `name` may come out of a file, and be anything.
    """
    if not isinstance(name, str):
        raise InputError(f"the model kind is {shown(name)}", f"a name such as '{DEFAULT}'")
    if name in OURS and name not in _KINDS:
        _KINDS[name] = importlib.import_module(f"hcmen.models.{name}").KIND
    found = _KINDS.get(name)
    if found is None:
        known = list(dict.fromkeys((*OURS, *_KINDS)))
        raise unknown_name("model kind", name, known)
    return found
