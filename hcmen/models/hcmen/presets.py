"""HCMEN's sizes for each data set and for own data. The README says under "reconstruction" where they come from."""

from __future__ import annotations

import dataclasses

from hcmen.base.inputs import FeatureConfig
from hcmen.models.hcmen.config import ModelConfig

__all__ = ["PRESETS"]


def _presets() -> dict[str, ModelConfig]:
    mosi = ModelConfig(
        FeatureConfig(768, 50),
        FeatureConfig(5, 375),
        FeatureConfig(20, 500),
        states=12,
        expand=4,
        dropout=0.1,
        calibrated=True,
    )
    mosei = dataclasses.replace(
        mosi, audio=FeatureConfig(74, 500), vision=FeatureConfig(35, 500), states=16, backbone_depth=2, dropout=0.2
    )
    sims = dataclasses.replace(
        mosei,
        text=FeatureConfig(768, 39),
        audio=FeatureConfig(33, 400),
        vision=FeatureConfig(709, 55),
        tokens=39,
        expand=2,
        label_min=-1.0,
        label_max=1.0,
    )
    simsv2 = dataclasses.replace(
        sims, text=FeatureConfig(768, 50), audio=FeatureConfig(25, 925), vision=FeatureConfig(177, 232), tokens=50
    )
    tiny = ModelConfig(
        FeatureConfig(32, 20),
        FeatureConfig(5, 40),
        FeatureConfig(20, 32),
        width=32,
        tokens=8,
        states=8,
        expand=2,
        alignment_tokens=4,
        dropout=0.1,
    )
    own = dataclasses.replace(mosi, width=64, tokens=8, states=8, expand=2, alignment_tokens=4)
    words = dataclasses.replace(own, text=FeatureConfig(384, 128), audio=None, vision=None, dropout=0.4)
    return {"mosi": mosi, "mosei": mosei, "sims": sims, "simsv2": simsv2, "tiny": tiny, "words": words, "own": own}


PRESETS: dict[str, ModelConfig] = _presets()
