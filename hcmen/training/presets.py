"""What there is to train on: each data set with an architecture for it, and settings to train it with.

The sizes of a preset, features and most steps, are those of the data set it is named after. What is trained on a file
takes the file's; `words` and `own` are for files alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hcmen.base.errors import InputError, unknown_name
from hcmen.base.inputs import FeatureConfig
from hcmen.base.modalities import MODALITIES
from hcmen.models import registry
from hcmen.models.contract import Config
from hcmen.training.config import TrainConfig

if TYPE_CHECKING:
    from hcmen.data.layout import Sizes
    from hcmen.models.text_encoder_config import TextEncoderConfig

__all__ = ["PRESETS", "Preset", "preset_for", "preset_named", "sized"]

# On MOSI's features 12 epochs at 1e-3 reach what 16 at 1e-4 do not: docs/real_data.md.
_OWN = TrainConfig(epochs=12, learning_rate=1e-3, loss="absolute")
# With every word and a dropout of .4, an encoder that does not learn reads each text once. On MOSI's texts and on rated
# tweets validation prefers that to .1 and 12 epochs: .82 to .87, and .47 to .49 (two seeds).
_WORDS = dataclasses.replace(_OWN, epochs=20, step_drop_probability=0.0)
_RUNS = {
    "mosi": ("CMU-MOSI, unaligned_50", _OWN),
    "mosei": ("CMU-MOSEI, unaligned_50", _OWN),
    "sims": ("CH-SIMS, unaligned_39", _OWN),
    "simsv2": ("CH-SIMS v2(s)", _OWN),
    "tiny": ("the synthetic demo: seconds per epoch on two cores", TrainConfig(epochs=24, learning_rate=2e-3)),
    "words": ("texts alone, of any data set", _WORDS),
    "own": ("any other data: sizes, modalities and label range of the file", _OWN),
}
# A text encoder that learns needs smaller steps, and fewer of them. On MOSI's texts its error was .73 to .75 with 1e-4
# and every word, .81 with 5e-5 and dropped words (one seed).
_ENCODER = {"batch_size": 32, "text_encoder_learning_rate": 1e-4, "epochs": 6}
_ANY = ("words", "own")  # for any file, whatever its modalities and labels


@dataclass(frozen=True)
class Preset:
    """A named pair of configurations with one line on what it is for.

    any_scale: labels may be on any scale, that of the file. with_encoder: what differs in `train` where a text encoder
    learns with the model.
    """

    name: str
    about: str
    model: Config
    train: TrainConfig = field(default_factory=TrainConfig)
    any_scale: bool = False
    with_encoder: Mapping[str, Any] = field(default_factory=dict)


_MODELS = registry.named(registry.DEFAULT).presets
PRESETS: dict[str, Preset] = {
    name: Preset(name, about, _MODELS[name], run, name in _ANY, {} if name == "tiny" else _ENCODER)
    for name, (about, run) in _RUNS.items()
}


def preset_named(name: str) -> Preset:
    """The preset called `name`; raises InputError with the nearest name if there is none."""
    found = PRESETS.get(name)
    if found is None:
        raise unknown_name("preset", name, PRESETS)
    return found


def preset_for(sizes: Sizes) -> tuple[str, str]:
    """The name of the preset for data of such sizes, and by what of it it was chosen, in a word.

    It is the one of a data set with the same features whose label range holds the labels, or else `words` for texts
    alone, and `own` for the rest.
    """
    from hcmen.data.layout import LABEL_SLACK

    def is_of(preset: Preset) -> bool:
        inputs = preset.model.inputs
        return (
            not preset.any_scale
            and set(inputs.modalities) == set(sizes.modalities)
            and all(inputs.modality(m).features == size.features for m, size in sizes.modalities.items())
            and inputs.label_min - LABEL_SLACK <= sizes.label_min
            and sizes.label_max <= inputs.label_max + LABEL_SLACK
        )

    found = next((preset.name for preset in PRESETS.values() if is_of(preset)), None)
    if found is not None:
        return found, "features"
    return ("own" if set(sizes.modalities) - {"text"} else "words"), "modalities"


def sized(preset: Preset, sizes: Sizes, encoder: TextEncoderConfig | None = None, hidden: int = 0) -> Config:
    """The model of `preset` with the modalities, features and most steps of the data.

    Its label range is the one that the data says, or else that of the preset's data set; a preset for any scale takes
    the scale that the labels look like.

    Args:
        encoder: for the text, which is then tokens; its outputs have `hidden` features.

    Raises:
        InputError: the text is tokens and there is no encoder, or there are no tokens and there is one.
    """
    from hcmen.data.scale import label_scale  # it brings NumPy, which --help does without

    config = preset.model
    found: dict[str, Any] = {m: sizes.modalities.get(m) for m in MODALITIES}
    if encoder is not None:
        if sizes.token_steps is None:
            raise InputError("has no text tokens ('text_bert')", "what the text encoder reads", "leave it out")
        steps = sizes.token_steps
        if "text" not in sizes.modalities and config.inputs.text is not None:
            steps = max(steps, config.inputs.text.max_steps)  # nothing but the encoder bounds the next text
        found |= {"text": FeatureConfig(hidden, min(steps, encoder.positions)), "text_encoder": encoder}
    elif sizes.token_steps is not None and "text" not in sizes.modalities:
        raise InputError("has its text as tokens alone", fix="name the BERT that reads them with --text-encoder")
    low, high = config.inputs.label_min, config.inputs.label_max
    if sizes.label_range is not None:
        low, high = sizes.label_range
    elif preset.any_scale:
        low, high = label_scale(sizes.label_min, sizes.label_max)
    if (low, high) != (config.inputs.label_min, config.inputs.label_max):
        found |= {"label_min": low, "label_max": high}
    return dataclasses.replace(config, **found)  # type: ignore[type-var]
