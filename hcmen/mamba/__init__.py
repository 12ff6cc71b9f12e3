"""The operators of Mamba in PyTorch and in ONNX, for anybody's model. It knows nothing of sentiment."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "Report": "hcmen.mamba.report",
    "export": "hcmen.mamba.exporting",
    "shim": "hcmen.mamba.stand_ins.hook",
}
"""What `hcmen.mamba` itself offers, and where it lies: imported when it is asked for."""


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
