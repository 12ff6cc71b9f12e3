"""What the runtime needs to know of a model, whatever model it is: what it takes, what it gives, and on which scale.

A bundle's manifest carries it, and a model's configuration makes it. Standard library alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hcmen.base.errors import InputError, unknown_name
from hcmen.base.modalities import MODALITIES, Variant, variant_named, variants_of
from hcmen.base.settings import checked, require

__all__ = ["OUTPUTS", "FeatureConfig", "Inputs", "TensorSpec", "TokenConfig", "neutral_label"]

_MOST_LETTERS = 40
_MOST_LABEL = 1e38  # of float32
# A size is believed before a file of that size is there: what it admits must be what a machine can hold.
MOST_FEATURES, MOST_STEPS, _MOST_WORDS = 1 << 16, 1 << 20, 1 << 24


def _short(number: int) -> str:
    """A number to be shown, which may have any number of digits."""
    return str(number) if abs(number) < 10**18 else f"a number of {number.bit_length()} bits"


@dataclass(frozen=True)
class FeatureConfig:
    """What one modality looks like: `features` numbers per step, at most `max_steps` steps."""

    features: int
    max_steps: int

    def __post_init__(self) -> None:
        require(self.features >= 1, f"features is {_short(self.features)}, expected at least 1")
        require(self.max_steps >= 1, f"max_steps is {_short(self.max_steps)}, expected at least 1")

    @classmethod
    def from_json(cls, data: Any, where: str) -> FeatureConfig:
        """Reads the sizes that a file names; raises InputError where they are none, or none that a machine can hold."""
        made = cls(**checked(cls, data, where))
        for name, most in (("features", MOST_FEATURES), ("max_steps", MOST_STEPS)):
            number = getattr(made, name)
            require(number <= most, f"{name} is {_short(number)}, expected 1 to {most}")
        return made


@dataclass(frozen=True)
class TokenConfig:
    """A text as token ids: ids are below `vocabulary`, token types below `token_types`.

    unknown_token: the id that stands for a word that is dropped.
    """

    vocabulary: int
    token_types: int
    unknown_token: int

    def __post_init__(self) -> None:
        for name in ("vocabulary", "token_types"):
            number = getattr(self, name)
            require(1 <= number <= _MOST_WORDS, f"text_tokens.{name} is {_short(number)}, expected 1 to {_MOST_WORDS}")
        require(
            0 <= self.unknown_token < self.vocabulary,
            f"text_tokens.unknown_token is {self.unknown_token}, expected an id below {self.vocabulary}",
        )


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output. shape: an int for a fixed size, a name for a dynamic one."""

    name: str
    dtype: str
    shape: tuple[str | int, ...]

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary that `from_json` reads back."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, data: Any, where: str) -> TensorSpec:
        """Reads what `to_json` wrote; raises InputError, which names `where`, on anything else."""
        keys = ("name", "dtype", "shape")
        require(
            isinstance(data, Mapping) and all(key in data for key in keys),
            f"'{where}' is no tensor, expected an object of {', '.join(keys)}",
        )
        unknown = [str(key)[:100] for key in data if key not in keys]
        require(not unknown, f"unknown key {'.'.join((where, *unknown[:1]))!r}, expected {', '.join(keys)}")
        name, dtype, shape = data["name"], data["dtype"], data["shape"]
        require(
            isinstance(name, str) and isinstance(dtype, str) and 0 < len(name) <= 100 and 0 < len(dtype) <= 100,
            f"'{where}' has a name or dtype that is no string of 1 to 100 characters",
        )
        require(
            isinstance(shape, (list, tuple))
            and len(shape) <= 8
            and all(isinstance(s, (str, int)) and not isinstance(s, bool) for s in shape),
            f"'{where}.shape' is no list of at most 8 names and integers",
        )
        return cls(name, dtype, tuple(shape))


OUTPUTS = (
    TensorSpec("score", "float32", ("batch",)),
    TensorSpec("modality_weights", "float32", ("batch", len(MODALITIES))),
)
"""What every model gives: the score in label units, and how much it rests on each modality."""


def neutral_label(label_min: float, label_max: float) -> float:
    """The label that leans to neither end of a range: 0 where it lies within, else the middle."""
    return 0.0 if label_min < 0.0 < label_max else label_min / 2 + label_max / 2


@dataclass(frozen=True)
class Inputs:
    """What a model takes and gives.

    text, audio, vision: the features of each modality, and its most steps; None where the model has no such modality.
    text_tokens: the text is token ids int64 [3, time] (ids, attention mask, token types) instead of features; at most
    `text.max_steps` of them, of which the model itself makes `text.features` numbers each. None takes features.
    label_min, label_max: the range of the labels. label_min_means, label_max_means: what its two ends mean.
    outputs: what every graph gives; those of `OUTPUTS` are among them.
    """

    text: FeatureConfig | None
    audio: FeatureConfig | None
    vision: FeatureConfig | None
    text_tokens: TokenConfig | None = None
    label_min: float = -3.0
    label_max: float = 3.0
    label_min_means: str = "negative"
    label_max_means: str = "positive"
    outputs: tuple[TensorSpec, ...] = OUTPUTS

    def __post_init__(self) -> None:
        require(bool(self.modalities), f"there is no modality, expected at least one of {', '.join(MODALITIES)}")
        require(self.text is not None or self.text_tokens is None, "there are text_tokens and no text, expected both")
        require(
            -_MOST_LABEL <= self.label_min < self.label_max <= _MOST_LABEL,
            f"label range is [{self.label_min}, {self.label_max}], expected two finite numbers in rising order",
        )
        for name in ("label_min_means", "label_max_means"):
            word = getattr(self, name)
            require(
                1 <= len(word) <= _MOST_LETTERS and word.isprintable(),
                f"{name} is {word[:_MOST_LETTERS]!r}, expected 1 to {_MOST_LETTERS} printable characters",
            )
        names = [t.name for t in self.outputs]
        require(len(set(names)) == len(names), f"outputs are {', '.join(names)[:200]}, expected each name once")
        for wanted in OUTPUTS:
            require(
                wanted in self.outputs,
                f"outputs are {', '.join(names)[:200] or 'none'}, expected {wanted.name} {wanted.dtype} "
                f"{list(wanted.shape)} among them",
            )

    @property
    def scale(self) -> str:
        """The range of the labels and what its ends mean, as in "-3 (negative) to 3 (positive)"."""
        return f"{self.label_min:g} ({self.label_min_means}) to {self.label_max:g} ({self.label_max_means})"

    def label(self, score: float) -> str:
        """The end of the scale that `score` leans to, in its word, or "neutral" at the point between them."""
        middle = neutral_label(self.label_min, self.label_max)
        if score == middle:
            return "neutral"
        return self.label_max_means if score > middle else self.label_min_means

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that the model has, in axis order."""
        return tuple(m for m in MODALITIES if getattr(self, m) is not None)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The variants that the model serves: those of its modalities."""
        return variants_of(self.modalities)

    def modality(self, name: str) -> FeatureConfig:
        """The feature sizes of the modality `name`; raises InputError where the model has none of that name."""
        if name not in MODALITIES:
            raise unknown_name("modality", name, MODALITIES)
        found: FeatureConfig | None = getattr(self, name)
        if found is None:
            raise InputError(f"the model has no {name}", f"{' or '.join(self.modalities)}, which it was trained on")
        return found

    def of_variant(self, variant: str) -> tuple[TensorSpec, ...]:
        """The inputs of the graph of `variant`: features and valid length per present modality, in axis order.

        A text of tokens is `text_tokens` alone, whose attention mask says how long it is.

        Raises:
            InputError: there is no such variant, or the model lacks one of its modalities.
        """
        inputs: list[TensorSpec] = []
        for m in variant_named(variant).present:
            if m == "text" and self.text_tokens:
                inputs.append(TensorSpec("text_tokens", "int64", ("batch", 3, "text_time")))
                continue
            inputs.append(TensorSpec(m, "float32", ("batch", f"{m}_time", self.modality(m).features)))
            inputs.append(TensorSpec(f"{m}_length", "int64", ("batch",)))
        return tuple(inputs)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary that `from_json` reads back."""
        return {**dataclasses.asdict(self), "outputs": [t.to_json() for t in self.outputs]}

    @classmethod
    def from_json(cls, data: Any) -> Inputs:
        """Reads what `to_json` wrote.

        Raises:
            InputError: a key is missing or unknown, or a value is of the wrong type or out of range.
        """
        values = checked(cls, data, whole=True)
        for m in MODALITIES:
            if values[m] is not None:
                values[m] = FeatureConfig.from_json(values[m], f"{m}.")
        if values["text_tokens"] is not None:
            values["text_tokens"] = TokenConfig(**checked(TokenConfig, values["text_tokens"], "text_tokens."))
        values["outputs"] = tuple(TensorSpec.from_json(t, f"outputs[{i}]") for i, t in enumerate(values["outputs"]))
        return cls(**values)
