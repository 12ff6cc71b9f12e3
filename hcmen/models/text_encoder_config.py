"""The configuration of a text encoder, which any model may have; read without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hcmen.base.settings import checked, require

__all__ = ["TextEncoderConfig"]

ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu")
"""Activations of a text encoder, by the names of its config.json."""


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
