"""HCMEN: CNN and Mamba over text, audio and vision, any of which may be missing."""

from __future__ import annotations

from typing import Any

from hcmen.models.hcmen.config import ModelConfig
from hcmen.models.hcmen.presets import PRESETS
from hcmen.models.registry import Kind

__all__ = ["KIND"]


def _module(config: ModelConfig) -> Any:
    from hcmen.models.hcmen.model import HCMEN

    return HCMEN(config)


def _objective(config: ModelConfig, train: Any) -> Any:
    from hcmen.models.hcmen.objective import HCMENObjective

    return HCMENObjective(config, train)


KIND = Kind(ModelConfig.kind, "HCMEN", ModelConfig, _module, _objective, PRESETS)
