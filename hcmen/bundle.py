"""The old name of hcmen.base.bundle, hcmen.base.manifest and hcmen.base.records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hcmen.base import inputs as _inputs
from hcmen.base.moved import moved, warn_of

if TYPE_CHECKING:
    from hcmen.base.inputs import TensorSpec

__getattr__ = moved(__name__, "hcmen.base.records", "hcmen.base.manifest", "hcmen.base.bundle", "hcmen.base.inputs")


def expected_inputs(model: Any, variant: str) -> tuple[TensorSpec, ...]:
    """The inputs of the graph of `variant` of a model with the configuration `model`."""
    warn_of(f"{__name__}.expected_inputs(model, variant) is now model.inputs.of_variant(variant)")
    takes: _inputs.Inputs = model.inputs
    return takes.of_variant(variant)


def expected_outputs() -> tuple[TensorSpec, ...]:
    """The outputs that every graph has."""
    warn_of(f"{__name__}.expected_outputs() is now hcmen.base.inputs.OUTPUTS")
    return _inputs.OUTPUTS
