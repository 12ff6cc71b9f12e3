"""The configuration of one training run: a frozen dataclass that is saved as JSON beside what it describes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hcmen.base.errors import InputError, did_you_mean, shown
from hcmen.base.settings import checked, finite, in_range, require
from hcmen.models.contract import MixingConfig

if TYPE_CHECKING:
    from hcmen.data.missing import CorruptionConfig

__all__ = ["AUXILIARIES", "LOSSES", "MIXES", "PRECISIONS", "TrainConfig", "train_setting"]

LOSSES = ("squared", "absolute")
"""What the distance of a score from its label counts as."""

MIXES = ("none", "mixup", "manifold", "ms-mix", "powmix")
"""Ways of mixing training samples; hcmen/models/mixing.py says what each does."""

AUXILIARIES = ("none", "polarity")
"""Heads that take part in training only, of the kinds of models that have them."""

PRECISIONS = ("fp32", "bf16")
"""What the model's matrix products are computed in while it trains; training/trainer.py says what stays float32."""

# (field, least, most)
_RANGES = (
    ("epochs", 1, 1 << 31),
    ("batch_size", 1, 1 << 31),
    ("micro_batches", 1, 1 << 31),
    ("powmix_parts", 2, 1 << 16),
    ("seed", 0, (1 << 63) - 1),
)


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Which of the loss terms below there are is for the model's objective to say.

    batch_size: samples per optimiser step, over all micro-batches and processes.
    micro_batches: pieces that a batch is computed in, one after the other, for less memory. Terms of single samples
    come out as with one piece; those over a batch (the alignment's InfoNCE, mixing) see one micro-batch.
    precision: one of PRECISIONS.
    warmup_fraction: share of the optimiser steps with a rising learning rate; it falls along a cosine after them.
    modality_drop_probability, step_drop_probability, max_step_drop_rate: the corruption of one view of each sample,
    drawn from (seed, epoch, index); see hcmen/data/missing.py.

    loss: one of LOSSES, of samples and of mixtures. The absolute one is what a model is judged by.

    alignment_weight: factor of the alignment loss (nats); 0 computes none.

    mix: one of MIXES. Samples are mixed as hcmen/models/mixing.py says, with draws from (seed, epoch, step).
    mix_weight: factor of the mixtures' error beside that of the samples themselves.
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
    loss: str = "squared"
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
        for name, least, most in _RANGES:
            in_range(getattr(self, name), name, least, most)
        require(
            self.micro_batches <= self.batch_size,
            f"micro_batches is {self.micro_batches}, expected at most the batch_size of {self.batch_size}",
        )
        for name in (
            "weight_decay",
            "alignment_weight",
            "mix_weight",
            "intensity_weight",
            "polarity_weight",
            "decoupled_weight",
            "text_encoder_learning_rate",
        ):
            value = getattr(self, name)
            require(finite(value) and value >= 0, f"{name} is {shown(value)}, expected 0 or more")
        for name, choices in (("loss", LOSSES), ("mix", MIXES), ("aux", AUXILIARIES), ("precision", PRECISIONS)):
            value = getattr(self, name)
            require(value in choices, f"{name} is {value!r}, expected one of {', '.join(choices)}")
        for name in ("learning_rate", "mix_alpha", "powmix_ratio", "gradient_clip_norm"):
            value = getattr(self, name)
            require(finite(value) and value > 0, f"{name} is {shown(value)}, expected a positive number")
        for name in (
            "warmup_fraction",
            "modality_drop_probability",
            "step_drop_probability",
            "max_step_drop_rate",
            "mix_similarity",
            "powmix_probability",
        ):
            require(0.0 <= getattr(self, name) <= 1.0, f"{name} is {getattr(self, name)}, expected 0 to 1")

    @property
    def corruption(self) -> CorruptionConfig:
        """The settings of the corruption alone."""
        from hcmen.data.missing import CorruptionConfig

        return CorruptionConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(CorruptionConfig)})

    @property
    def mixing(self) -> MixingConfig:
        """The settings of the mixing alone."""
        return MixingConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(MixingConfig)})

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary that `from_json` reads back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainConfig:
        """Reads what `to_json` wrote; raises InputError on unknown keys, wrong types or values out of range."""
        return cls(**checked(cls, data))


def train_setting(text: str) -> tuple[str, int | float | bool | str]:
    """Name and value of a field of `TrainConfig` from "name=value", the value in the field's type.

    Raises:
        InputError: there is no such field, or the value is none of its type. Whether it is in range is for
            `TrainConfig` to say.
    """
    name, sign, value = (part.strip() for part in text.partition("="))
    fields = {f.name: str(f.type) for f in dataclasses.fields(TrainConfig)}
    require(bool(sign), f"'{text}' is no setting, expected name=value")
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
    if found is None or (isinstance(found, float) and not finite(found)):
        wanted = {"bool": "true or false", "int": "a whole number", "float": "a finite number"}[kind]
        raise InputError(f"{name} is '{value}', expected {wanted}")
    return name, found
