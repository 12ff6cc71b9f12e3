"""Configurations: frozen dataclasses that are saved as JSON beside what they describe.

`ModelConfig` fixes the architecture (it is part of every checkpoint and bundle), `TrainConfig` one training run.
`PRESETS` holds the sizes of each data set; where a size comes from is said in the README under "reconstruction".
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hcmen.errors import InputError, did_you_mean, shown, unknown_name
from hcmen.modalities import MODALITIES

__all__ = [
    "AUXILIARIES",
    "MIXES",
    "PRECISIONS",
    "PRESETS",
    "FeatureConfig",
    "ModelConfig",
    "TextEncoderConfig",
    "TrainConfig",
    "preset_named",
    "train_setting",
]

MIXES = ("none", "mixup", "manifold", "ms-mix", "powmix")
"""Ways of mixing training samples; hcmen/mixing.py says what each does."""

AUXILIARIES = ("none", "polarity")
"""Heads that take part in training only; see hcmen/losses.py."""

ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu")
"""Activations of a text encoder, by the names of its config.json."""

PRECISIONS = ("fp32", "bf16")
"""What the model's matrix products are computed in while it trains; hcmen/training.py says what stays float32."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


@dataclass(frozen=True)
class FeatureConfig:
    """What one modality looks like: `features` numbers per step, at most `max_steps` steps."""

    features: int
    max_steps: int

    def __post_init__(self) -> None:
        _require(self.features >= 1, f"features is {self.features}, expected at least 1")
        _require(self.max_steps >= 1, f"max_steps is {self.max_steps}, expected at least 1")


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
            _require(getattr(self, name) >= 1, f"text_encoder.{name} is {getattr(self, name)}, expected at least 1")
        _require(
            self.activation in ACTIVATIONS,
            f"text_encoder.activation is {self.activation!r}, expected one of {', '.join(ACTIVATIONS)}",
        )
        _require(
            math.isfinite(self.norm_epsilon) and self.norm_epsilon > 0,
            f"text_encoder.norm_epsilon is {self.norm_epsilon}, expected a positive number",
        )
        _require(0.0 <= self.dropout < 1.0, f"text_encoder.dropout is {self.dropout}, expected 0 <= dropout < 1")
        _require(
            0 <= self.unknown_token < self.vocabulary,
            f"text_encoder.unknown_token is {self.unknown_token}, expected an id below {self.vocabulary}",
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TextEncoderConfig:
        """The encoder of these sizes; raises InputError on missing or unknown keys, wrong types or values."""
        return cls(**_checked(cls, data, "text_encoder."))


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
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}, expected at least 1")
        _require(2 <= self.conv_width <= 16, f"conv_width is {self.conv_width}, expected 2 to 16")
        _require(0.0 <= self.dropout < 1.0, f"dropout is {self.dropout}, expected 0 <= dropout < 1")
        _require(
            math.isfinite(self.label_min) and math.isfinite(self.label_max) and self.label_min < self.label_max,
            f"label range is [{self.label_min}, {self.label_max}], expected two finite numbers in rising order",
        )
        encoder = self.text_encoder
        if encoder is not None:
            _require(
                self.text.features % encoder.heads == 0,
                f"text_encoder.heads is {encoder.heads}, expected a divisor of the {self.text.features} text features",
            )
            _require(
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
        if name not in MODALITIES:
            raise unknown_name("modality", name, MODALITIES)
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
        values = dict(_checked(cls, data))
        for name in MODALITIES:
            values[name] = FeatureConfig(**_checked(FeatureConfig, values[name], f"{name}."))
        if values.get("text_encoder") is not None:
            values["text_encoder"] = TextEncoderConfig.from_json(values["text_encoder"])
        return cls(**values)


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    batch_size: samples per optimiser step, over all micro-batches and processes.
    micro_batches: pieces that a batch is computed in, one after the other, for less memory. Terms of single samples
    come out as with one piece; those over a batch (the alignment's InfoNCE, mixing) see one micro-batch.
    precision: one of PRECISIONS.
    warmup_fraction: share of the optimiser steps with a rising learning rate; it falls along a cosine after them.
    modality_drop_probability, step_drop_probability, max_step_drop_rate: the corruption of one view of each sample,
    drawn from (seed, epoch, index); see hcmen/data/missing.py.

    alignment_weight: factor of the alignment loss (nats); 0 computes none.

    mix: one of MIXES. Samples are mixed as hcmen/mixing.py says, with draws from (seed, epoch, step).
    mix_weight: factor of the mixtures' squared error (label units squared) beside that of the samples themselves.
    mix_alpha: concentration of the Beta and Dirichlet distributions that weights are drawn from; 1 is uniform, large
    numbers are even mixtures.
    mix_similarity: ms-mix pairs samples more alike than this, a share of the batch's range of cosine similarities.
    mix_same_sign: ms-mix pairs no positive label with a negative one.
    intensity_weight: factor of ms-mix's loss that teaches intensities (nats).
    powmix_ratio: mixtures per sample of the batch. powmix_parts: samples per mixture. powmix_probability: share of
    the steps that mix at all.

    text_encoder_learning_rate: peak learning rate of the text encoder, which rises and falls with the other one; 0
    leaves the encoder as it came, without dropout.

    aux: one of AUXILIARIES. polarity_weight: factor of the polarity head's cross-entropy (nats).
    decoupled_weight: within it, factor of the decoupled term of mixtures.
    """

    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    warmup_fraction: float = 0.1
    gradient_clip_norm: float = 1.0
    alignment_weight: float = 0.01
    modality_drop_probability: float = 0.5
    step_drop_probability: float = 0.5
    max_step_drop_rate: float = 0.9
    seed: int = 0
    mix: str = "none"
    mix_weight: float = 0.7
    mix_alpha: float = 2.0
    mix_similarity: float = 0.4
    mix_same_sign: bool = False
    intensity_weight: float = 0.5
    powmix_ratio: float = 1.0
    powmix_parts: int = 3
    powmix_probability: float = 0.5
    aux: str = "none"
    polarity_weight: float = 0.1
    decoupled_weight: float = 0.1
    text_encoder_learning_rate: float = 2e-5
    micro_batches: int = 1
    precision: str = "fp32"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "micro_batches"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}, expected at least 1")
        _require(
            self.micro_batches <= self.batch_size,
            f"micro_batches is {self.micro_batches}, expected at most the batch_size of {self.batch_size}",
        )
        _require(self.learning_rate > 0, f"learning_rate is {self.learning_rate}, expected a positive number")
        _require(self.seed >= 0, f"seed is {self.seed}, expected 0 or more")
        for name in (
            "weight_decay",
            "alignment_weight",
            "mix_weight",
            "intensity_weight",
            "polarity_weight",
            "decoupled_weight",
            "text_encoder_learning_rate",
        ):
            _require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}, expected 0 or more")
        for name, choices in (("mix", MIXES), ("aux", AUXILIARIES), ("precision", PRECISIONS)):
            value = getattr(self, name)
            _require(value in choices, f"{name} is {value!r}, expected one of {', '.join(choices)}")
        for name in ("mix_alpha", "powmix_ratio"):
            value = getattr(self, name)
            _require(value > 0 and math.isfinite(value), f"{name} is {value}, expected a positive number")
        _require(self.powmix_parts >= 2, f"powmix_parts is {self.powmix_parts}, expected at least 2")
        _require(
            self.gradient_clip_norm > 0, f"gradient_clip_norm is {self.gradient_clip_norm}, expected a positive number"
        )
        for name in (
            "warmup_fraction",
            "modality_drop_probability",
            "step_drop_probability",
            "max_step_drop_rate",
            "mix_similarity",
            "powmix_probability",
        ):
            _require(0.0 <= getattr(self, name) <= 1.0, f"{name} is {getattr(self, name)}, expected 0 to 1")

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary that `from_json` reads back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainConfig:
        """Reads what `to_json` wrote; raises InputError on unknown keys, wrong types or values out of range."""
        return cls(**_checked(cls, data))


def train_setting(text: str) -> tuple[str, int | float | bool | str]:
    """Name and value of a field of `TrainConfig` from "name=value", the value in the field's type.

    Raises:
        InputError: there is no such field, or the value is none of its type. Whether it is in range is for
            `TrainConfig` to say.
    """
    name, sign, value = (part.strip() for part in text.partition("="))
    fields = {f.name: str(f.type) for f in dataclasses.fields(TrainConfig)}
    _require(bool(sign), f"'{text}' is no setting, expected name=value")
    if name not in fields:
        fix = did_you_mean(name, fields) or f"choose from {', '.join(fields)}"
        raise InputError(f"unknown training setting '{name}'", fix=fix)
    kind = fields[name]
    found: int | float | bool | str | None = None
    if kind == "bool":
        found = {"true": True, "false": False}.get(value.lower())
    elif kind == "str":
        found = value
    else:
        with contextlib.suppress(ValueError):
            found = int(value) if kind == "int" else float(value)
    if found is None or (isinstance(found, float) and not math.isfinite(found)):
        wanted = {"bool": "true or false", "int": "a whole number", "float": "a finite number"}[kind]
        raise InputError(f"{name} is '{value}', expected {wanted}")
    return name, found


_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "FeatureConfig": (Mapping,),
    "TextEncoderConfig | None": (Mapping, type(None)),
}


def _checked(cls: type, data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`data` with every key known to the dataclass `cls`, required keys there, and values of the declared type."""
    _require(isinstance(data, Mapping), f"config {prefix or cls.__name__} is {type(data).__name__}, expected an object")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            hint = did_you_mean(str(key), fields)
            raise InputError(f"unknown config key {shown(f'{prefix}{key}')}" + (f", {hint}" if hint else ""))
    for name, f in fields.items():
        if name not in data:
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            _require(not required, f"config key '{prefix}{name}' is missing")
            continue
        kinds = _KINDS[str(f.type)]
        value = data[name]
        _require(
            # In Python a bool is an int, in JSON it is not.
            isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)),
            f"config key '{prefix}{name}' is {shown(value)}, expected {f.type}",
        )
    return {name: data[name] for name in fields if name in data}


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
        raise unknown_name("preset", name, PRESETS)
    return found
