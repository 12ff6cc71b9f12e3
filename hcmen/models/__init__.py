"""The models, a folder each, and what they share.

    from hcmen.models import load

    model = load("build/train")

`load` is imported on first use, so that importing this package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hcmen.models.loading import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("hcmen.models.loading").load


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
