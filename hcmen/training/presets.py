"""What there is to train on: each data set with a model's sizes for it, and settings to train it with."""

from __future__ import annotations

from dataclasses import dataclass, field

from hcmen.base.errors import unknown_name
from hcmen.models import registry
from hcmen.models.contract import Config
from hcmen.training.config import TrainConfig

__all__ = ["PRESETS", "Preset", "preset_named"]

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
