"""Old module names, which work for one version more and say where their content is now."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

__all__ = ["moved", "warn_of"]


def warn_of(change: str, level: int = 3) -> None:
    """Warns of `change`, in the name of the code that called what calls this, or of `level` calls from here."""
    warnings.warn(f"{change}, the old name ends with version 0.2", DeprecationWarning, stacklevel=level)


def moved(old: str, *new: str) -> Callable[[str], Any]:
    """The `__getattr__` of module `old`, whose content lies in the modules `new`: its import warns, and each name."""
    warn_of(f"{old} is now {' and '.join(new)}", level=4)

    def find(name: str) -> Any:
        modules = [importlib.import_module(module) for module in new if name == "__all__" or name[:2] != "__"]
        if name == "__all__":  # of a star import, whose names are asked for one by one after it
            return [listed for module in modules for listed in module.__all__]
        for module in sorted(modules, key=lambda m: name not in m.__all__):
            if hasattr(module, name):
                warn_of(f"{old} is now {module.__name__}: import {name} from there")
                return getattr(module, name)
        raise AttributeError(f"module {old!r} has no attribute {name!r}")

    return find
