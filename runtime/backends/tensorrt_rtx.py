"""What TensorRT for RTX has and TensorRT has not, over its Python module."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

__all__ = ["capabilities_of", "set_targets"]


def capabilities_of(module: Any) -> tuple[int, ...]:
    """The compute capabilities that the module can build engines for, rising, 89 for 8.9."""
    names = module.ComputeCapability.__members__
    return tuple(sorted(int(name[2:]) for name in names if re.fullmatch(r"SM\d+", name)))


def set_targets(module: Any, config: Any, capabilities: Sequence[int]) -> None:
    """Makes a builder's configuration one for GPUs of these compute capabilities, each one of `capabilities_of`."""
    config.num_compute_capabilities = len(capabilities)
    for i, n in enumerate(capabilities):
        config.set_compute_capability(module.ComputeCapability.__members__[f"SM{n}"], i)
