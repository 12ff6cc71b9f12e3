"""The smallest model that still has every part, for tests that train."""

from __future__ import annotations

from hcmen.config import FeatureConfig, ModelConfig

MICRO = ModelConfig(
    FeatureConfig(6, 10),
    FeatureConfig(3, 16),
    FeatureConfig(4, 16),
    width=8,
    tokens=4,
    states=2,
    expand=1,
    alignment_tokens=2,
)
