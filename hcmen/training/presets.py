"""The sizes of each data set, with settings to train on it.

Where a size comes from is said in the README under "reconstruction".
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field

from hcmen.base.config import FeatureConfig, ModelConfig
from hcmen.base.errors import InputError
from hcmen.training.config import TrainConfig

__all__ = ["PRESETS", "Preset", "preset_named"]


@dataclass(frozen=True)
class Preset:
    """A named pair of configurations with one line on what it is for."""

    name: str
    about: str
    model: ModelConfig
    train: TrainConfig = field(default_factory=TrainConfig)


def _presets() -> dict[str, Preset]:
    sibling_training = TrainConfig(epochs=200, learning_rate=1e-4)
    mosi = ModelConfig(
        FeatureConfig(768, 50), FeatureConfig(5, 375), FeatureConfig(20, 500), states=12, expand=4, dropout=0.1
    )
    mosei = ModelConfig(
        FeatureConfig(768, 50),
        FeatureConfig(74, 500),
        FeatureConfig(35, 500),
        states=16,
        expand=4,
        backbone_depth=2,
        dropout=0.2,
    )
    sims = ModelConfig(
        FeatureConfig(768, 39),
        FeatureConfig(33, 400),
        FeatureConfig(709, 55),
        tokens=39,
        states=16,
        expand=2,
        backbone_depth=2,
        dropout=0.2,
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
    return {
        p.name: p
        for p in (
            Preset("mosi", "CMU-MOSI, unaligned_50", mosi, sibling_training),
            Preset("mosei", "CMU-MOSEI, unaligned_50", mosei, sibling_training),
            Preset("sims", "CH-SIMS, unaligned_39", sims, sibling_training),
            Preset("simsv2", "CH-SIMS v2(s)", simsv2, sibling_training),
            Preset(
                "tiny",
                "the synthetic demo: seconds per epoch on two cores",
                tiny,
                TrainConfig(epochs=24, learning_rate=2e-3),
            ),
        )
    }


PRESETS: dict[str, Preset] = _presets()


def preset_named(name: str) -> Preset:
    """The preset called `name`; raises InputError with the nearest name if there is none."""
    found = PRESETS.get(name)
    if found is None:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise InputError(f"unknown preset '{name}': {hint}choose from {', '.join(PRESETS)}")
    return found
