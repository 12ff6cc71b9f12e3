"""What all stand-ins ask of their arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hcmen.base.errors import InputError

__all__ = ["cast", "not_served", "real", "widest"]

PACKED = "pass each sequence in a call of its own, or pad them"


def real(**tensors: Tensor | None) -> None:
    """Refuses complex tensors.

    Raises:
        InputError: one is complex; of what came it names the first.
    """
    for name, x in tensors.items():
        if x is not None and x.is_complex():
            fix = "build the model with real states, which is Mamba's default"
            raise InputError(f"{name} is {x.dtype}", "a real tensor, since complex state spaces are not served", fix)


def not_served(what: str, value: Any, fix: str = PACKED) -> None:
    """Refuses an argument that came.

    Raises:
        InputError: `value` is neither None nor False.
    """
    if value is not None and value is not False:
        raise InputError(f"{what} came", "none, since it is not served", fix)


def widest(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that holds all of them: callers mix float32 with half precision, above all under autocast."""
    first, *others = {x.dtype for x in tensors if x is not None}
    for other in others:
        first = torch.promote_types(first, other)
    return first


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in this dtype: in a program of torch.export, a conversion to its own would keep alive what is dead."""
    return x if x.dtype == dtype else x.to(dtype)
