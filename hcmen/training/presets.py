"""What there is to train on: each data set with an architecture for it, and settings to train it with.

The sizes of a preset, features and most steps, are those of the data set it is named after. What is trained on a file
takes the file's.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hcmen.base.errors import unknown_name
from hcmen.base.modalities import MODALITIES
from hcmen.models import registry
from hcmen.models.contract import Config
from hcmen.training.config import TrainConfig

if TYPE_CHECKING:
    from hcmen.data.layout import Sizes

__all__ = ["PRESETS", "Preset", "preset_for", "preset_named", "sized"]

_SIBLINGS = TrainConfig(epochs=200, learning_rate=1e-4)
_RUNS = {
    "mosi": ("CMU-MOSI, unaligned_50", _SIBLINGS),
    "mosei": ("CMU-MOSEI, unaligned_50", _SIBLINGS),
    "sims": ("CH-SIMS, unaligned_39", _SIBLINGS),
    "simsv2": ("CH-SIMS v2(s)", _SIBLINGS),
    "tiny": ("the synthetic demo: seconds per epoch on two cores", TrainConfig(epochs=24, learning_rate=2e-3)),
}


@dataclass(frozen=True)
class Preset:
    """A named pair of configurations with one line on what it is for."""

    name: str
    about: str
    model: Config
    train: TrainConfig = field(default_factory=TrainConfig)


_MODELS = registry.named(registry.DEFAULT).presets
PRESETS: dict[str, Preset] = {name: Preset(name, about, _MODELS[name], run) for name, (about, run) in _RUNS.items()}


def preset_named(name: str) -> Preset:
    """The preset called `name`; raises InputError with the nearest name if there is none."""
    found = PRESETS.get(name)
    if found is None:
        raise unknown_name("preset", name, PRESETS)
    return found


def preset_for(sizes: Sizes) -> tuple[str, str]:
    """The name of the preset for data of such sizes, and by what it was chosen, in a few words.

    It is the one of the same features, or else the first of the narrowest label range that holds the labels.
    """
    from hcmen.data.layout import LABEL_SLACK

    def holds(preset: Preset) -> bool:
        inputs = preset.model.inputs
        return inputs.label_min - LABEL_SLACK <= sizes.label_min and sizes.label_max <= inputs.label_max + LABEL_SLACK

    def features(preset: Preset) -> bool:
        return all(preset.model.inputs.modality(m).features == sizes.modalities[m].features for m in MODALITIES)

    def width(preset: Preset) -> float:
        return preset.model.inputs.label_max - preset.model.inputs.label_min

    for fits, why in ((features, "features"), (holds, "labels")):
        found = min((p for p in PRESETS.values() if holds(p) and fits(p)), key=width, default=None)
        if found is not None:
            return found.name, why
    return max(PRESETS.values(), key=width).name, "labels"


def sized(config: Config, sizes: Sizes) -> Config:
    """`config` with the features and most steps of the data."""
    return dataclasses.replace(config, **sizes.modalities)  # type: ignore[type-var]
