"""The old name of hcmen.base.bundle, hcmen.base.manifest and hcmen.base.records."""

from __future__ import annotations

from typing import Any

from hcmen.base.inputs import OUTPUTS, Inputs, TensorSpec
from hcmen.base.moved import moved, warn_of

__getattr__ = moved(__name__, "hcmen.base.records", "hcmen.base.manifest", "hcmen.base.bundle", "hcmen.base.inputs")


def expected_inputs(model: Any, variant: str) -> tuple[TensorSpec, ...]:
    """The inputs of the graph of `variant` of a model with the configuration `model`."""
    warn_of(f"{__name__}.expected_inputs(model, variant) is now model.inputs.of_variant(variant)")
    inputs: Inputs = model.inputs
    return inputs.of_variant(variant)


def expected_outputs() -> tuple[TensorSpec, ...]:
    """The outputs that every graph has."""
    warn_of(f"{__name__}.expected_outputs() is now hcmen.base.inputs.OUTPUTS")
    return OUTPUTS
