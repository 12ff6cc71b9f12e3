"""Old module names, which work for one version more and say where their content is now."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

__all__ = ["moved"]


def moved(old: str, *new: str) -> Callable[[str], Any]:
    """The `__getattr__` of the module `old`, whose content lies in the modules `new`; each use of a name warns."""

    def find(name: str) -> Any:
        if name == "__all__":  # of a star import, whose names are asked for one by one after it
            return [listed for module in new for listed in importlib.import_module(module).__all__]
        if not name.startswith("__"):
            for module in new:
                found = importlib.import_module(module)
                if hasattr(found, name):
                    warnings.warn(
                        f"{old} is now {module}: import {name} from there, the old name ends with version 0.2",
                        DeprecationWarning,
                        stacklevel=2,
                    )
                    return getattr(found, name)
        raise AttributeError(f"module {old!r} has no attribute {name!r}")

    return find
