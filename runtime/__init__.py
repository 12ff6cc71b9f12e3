"""Runs exported bundles with numpy and ONNX Runtime; PyTorch is never imported.

    from hcmen.runtime import load

    model = load("build/bundle")
    print(model("samples/clip.npz").score)

The names below are loaded on first use, so that importing this package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hcmen.base.clip import Clip, read_clip
    from hcmen.base.errors import HcmenError
    from hcmen.runtime.predictor import Predictor, Result, load

__all__ = ["Clip", "HcmenError", "Predictor", "Result", "load", "read_clip"]

_HOMES = {
    "Clip": "hcmen.base.clip",
    "HcmenError": "hcmen.base.errors",
    "Predictor": "hcmen.runtime.predictor",
    "Result": "hcmen.runtime.predictor",
    "load": "hcmen.runtime.predictor",
    "read_clip": "hcmen.base.clip",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
