"""The configuration of a text encoder, which any model may have; read without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hcmen.base.errors import shown
from hcmen.base.settings import checked, finite, in_range, require

__all__ = ["TextEncoderConfig"]

ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu")
"""Activations of a text encoder, by the names of its config.json."""

# A layer is made before weights of it are seen, if only on paper.
_MOST = (
    ("vocabulary", 1 << 24),
    ("layers", 1 << 8),
    ("heads", 1 << 12),
    ("intermediate", 1 << 20),
    ("positions", 1 << 20),
    ("token_types", 1 << 16),
)


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
        for name, most in _MOST:
            in_range(getattr(self, name), f"text_encoder.{name}", 1, most)
        require(
            self.activation in ACTIVATIONS,
            f"text_encoder.activation is {self.activation!r}, expected one of {', '.join(ACTIVATIONS)}",
        )
        require(
            finite(self.norm_epsilon) and self.norm_epsilon > 0,
            f"text_encoder.norm_epsilon is {shown(self.norm_epsilon)}, expected a positive number",
        )
        require(0.0 <= self.dropout < 1.0, f"text_encoder.dropout is {self.dropout}, expected 0 <= dropout < 1")
        require(
            0 <= self.unknown_token < self.vocabulary,
            f"text_encoder.unknown_token is {shown(self.unknown_token)}, expected an id below {self.vocabulary}",
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TextEncoderConfig:
        """The encoder of these sizes; raises InputError on missing or unknown keys, wrong types or values."""
        return cls(**checked(cls, data, "text_encoder."))
