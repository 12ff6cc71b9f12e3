"""The smallest model that still has every part, for tests that train; and a bundle of it, exported beforehand."""

from __future__ import annotations

import zipfile
from pathlib import Path

from hcmen.base.inputs import FeatureConfig
from hcmen.models.hcmen.config import ModelConfig

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


def micro_bundle_at(target: Path) -> Path:
    """Unpacks the bundle that files/make_micro_bundle.py exported, all variants of a random `MICRO`, to `target`."""
    with zipfile.ZipFile(Path(__file__).resolve().parents[1] / "files" / "micro_bundle.zip") as archive:
        archive.extractall(target)
    return target
