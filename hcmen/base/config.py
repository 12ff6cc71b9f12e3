"""The configuration of a model: frozen dataclasses that are saved as JSON beside what they describe.

`ModelConfig` fixes the architecture; it is part of every checkpoint and bundle.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hcmen.base.errors import InputError
from hcmen.base.modalities import MODALITIES

__all__ = [
    "FeatureConfig",
    "ModelConfig",
    "TextEncoderConfig",
    "checked",
    "require",
]

ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu")
"""Activations of a text encoder, by the names of its config.json."""


def require(condition: bool, message: str) -> None:
    """Raises InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)


@dataclass(frozen=True)
class FeatureConfig:
    """What one modality looks like: `features` numbers per step, at most `max_steps` steps."""

    features: int
    max_steps: int

    def __post_init__(self) -> None:
        require(self.features >= 1, f"features is {self.features}, expected at least 1")
        require(self.max_steps >= 1, f"max_steps is {self.max_steps}, expected at least 1")


@dataclass(frozen=True)
class TextEncoderConfig:
    """A BERT encoder inside the model, by the sizes of its own config.json; its width is the text's `features`.

    vocabulary: token ids. positions: longest sequence, in tokens. unknown_token: id of [UNK], which stands for a word
    that is dropped. norm_epsilon: of every layer norm. dropout: of hidden states and of attention weights.
    """

    vocabulary: int
    layers: int
    heads: int
    intermediate: int
    positions: int
    token_types: int = 2
    activation: str = "gelu"
    norm_epsilon: float = 1e-12
    dropout: float = 0.1
    unknown_token: int = 100

    def __post_init__(self) -> None:
        for name in ("vocabulary", "layers", "heads", "intermediate", "positions", "token_types"):
            require(getattr(self, name) >= 1, f"text_encoder.{name} is {getattr(self, name)}, expected at least 1")
        require(
            self.activation in ACTIVATIONS,
            f"text_encoder.activation is {self.activation!r}, expected one of {', '.join(ACTIVATIONS)}",
        )
        require(
            math.isfinite(self.norm_epsilon) and self.norm_epsilon > 0,
            f"text_encoder.norm_epsilon is {self.norm_epsilon}, expected a positive number",
        )
        require(0.0 <= self.dropout < 1.0, f"text_encoder.dropout is {self.dropout}, expected 0 <= dropout < 1")
        require(
            0 <= self.unknown_token < self.vocabulary,
            f"text_encoder.unknown_token is {self.unknown_token}, expected an id below {self.vocabulary}",
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TextEncoderConfig:
        """The encoder of these sizes; raises InputError on missing or unknown keys, wrong types or values."""
        return cls(**checked(cls, data, "text_encoder."))


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of one HCMEN.

    width: d, the size of every token after projection. tokens: L, the number of tokens every modality is pooled to.
    states: N of the selective scan (mamba_ssm's d_state). expand: scan channels are `expand * width`.
    conv_width: taps of the causal convolution (mamba_ssm's d_conv). backbone_depth: CNN + BiMamba pairs after fusion.
    alignment_tokens: tokens per modality in the alignment loss, used in training only.
    label_min, label_max: the range of the data set's labels, for reporting; the head itself is not squashed.
    proxies, cnn, mamba: ablations. Without proxies present tokens are not enhanced and a learned token stands for an
    absent modality; without cnn or mamba every block of that kind passes its input on.
    text_encoder: the BERT that makes the text features out of token ids; None takes features as they come.
    """

    text: FeatureConfig
    audio: FeatureConfig
    vision: FeatureConfig
    width: int = 128
    tokens: int = 50
    states: int = 16
    expand: int = 4
    conv_width: int = 4
    backbone_depth: int = 1
    dropout: float = 0.1
    alignment_tokens: int = 8
    label_min: float = -3.0
    label_max: float = 3.0
    proxies: bool = True
    cnn: bool = True
    mamba: bool = True
    text_encoder: TextEncoderConfig | None = None

    def __post_init__(self) -> None:
        for name in ("width", "tokens", "states", "expand", "backbone_depth", "alignment_tokens"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}, expected at least 1")
        require(2 <= self.conv_width <= 16, f"conv_width is {self.conv_width}, expected 2 to 16")
        require(0.0 <= self.dropout < 1.0, f"dropout is {self.dropout}, expected 0 <= dropout < 1")
        require(
            math.isfinite(self.label_min) and math.isfinite(self.label_max) and self.label_min < self.label_max,
            f"label range is [{self.label_min}, {self.label_max}], expected two finite numbers in rising order",
        )
        encoder = self.text_encoder
        if encoder is not None:
            require(
                self.text.features % encoder.heads == 0,
                f"text_encoder.heads is {encoder.heads}, expected a divisor of the {self.text.features} text features",
            )
            require(
                self.text.max_steps <= encoder.positions,
                f"text.max_steps is {self.text.max_steps}, expected at most the {encoder.positions} positions of the "
                "text encoder",
            )

    @property
    def channels(self) -> int:
        """Channels of the selective scan (mamba_ssm's d_inner)."""
        return self.expand * self.width

    @property
    def dt_rank(self) -> int:
        """Rank of the step-size projection, ceil(width / 16) as in mamba_ssm."""
        return math.ceil(self.width / 16)

    def modality(self, name: str) -> FeatureConfig:
        """The feature sizes of the modality `name`."""
        require(name in MODALITIES, f"unknown modality '{name}': choose from {', '.join(MODALITIES)}")
        found: FeatureConfig = getattr(self, name)
        return found

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary that `from_json` reads back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Reads what `to_json` wrote.

        Raises:
            InputError: a key is missing, unknown, of the wrong type or out of range.
        """
        values = dict(checked(cls, data))
        for name in MODALITIES:
            values[name] = FeatureConfig(**checked(FeatureConfig, values[name], f"{name}."))
        if values.get("text_encoder") is not None:
            values["text_encoder"] = TextEncoderConfig.from_json(values["text_encoder"])
        return cls(**values)


_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "FeatureConfig": (Mapping,),
    "TextEncoderConfig | None": (Mapping, type(None)),
}


def checked(cls: type, data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`data` with every key known to the dataclass `cls`, required keys there, and values of the declared type."""
    require(isinstance(data, Mapping), f"config {prefix or cls.__name__} is {type(data).__name__}, expected an object")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f", did you mean '{near[0]}'?" if near else ""
            raise InputError(f"unknown config key '{prefix}{key}'{hint}")
    for name, f in fields.items():
        if name not in data:
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            require(not required, f"config key '{prefix}{name}' is missing")
            continue
        kinds = _KINDS[str(f.type)]
        value = data[name]
        require(
            # In Python a bool is an int, in JSON it is not.
            isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)),
            f"config key '{prefix}{name}' is {value!r}, expected {f.type}",
        )
    return {name: data[name] for name in fields if name in data}
