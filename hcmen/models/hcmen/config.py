"""The configuration of HCMEN: a frozen dataclass that is saved as JSON in every checkpoint and bundle."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from hcmen.base.inputs import FeatureConfig, Inputs, TokenConfig
from hcmen.base.modalities import MODALITIES
from hcmen.base.settings import checked, in_range, require
from hcmen.models.text_encoder_config import TextEncoderConfig

__all__ = ["ModelConfig"]

# (field, least, most). Some sizes are believed before weights of them are seen, and some have no weights: similarities
# are [tokens, tokens]. The operators count channels and states in 32 bits.
_RANGES = (
    ("width", 1, 1 << 16),
    ("tokens", 1, 1 << 12),
    ("states", 1, 1 << 12),
    ("expand", 1, 1 << 8),
    ("conv_width", 2, 16),
    ("backbone_depth", 1, 1 << 8),
    ("alignment_tokens", 1, 1 << 12),
)


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of one HCMEN.

    text, audio, vision: what each modality looks like; None where the model has no such modality.
    width: d, the size of every token after projection. tokens: L, the number of tokens every modality is pooled to.
    states: N of the selective scan (mamba_ssm's d_state). expand: scan channels are `expand * width`.
    conv_width: taps of the causal convolution (mamba_ssm's d_conv). backbone_depth: CNN + BiMamba pairs after fusion.
    alignment_tokens: tokens per modality in the alignment loss, used in training only.
    label_min, label_max: the range of the data set's labels, for reporting; the head itself is not squashed.
    proxies, cnn, mamba: ablations. Without proxies present tokens are not enhanced and a learned token stands for an
    absent modality; without cnn or mamba every block of that kind passes its input on.
    text_encoder: the BERT that makes the text features out of token ids; None takes features as they come.
    calibrated: the score of each set of modalities is scaled and shifted by what the validation split showed.
    kind: what hcmen/models/registry.py knows the model as.
    """

    text: FeatureConfig | None
    audio: FeatureConfig | None
    vision: FeatureConfig | None
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
    calibrated: bool = False
    kind: ClassVar[str] = "hcmen"

    def __post_init__(self) -> None:
        for name, least, most in _RANGES:
            in_range(getattr(self, name), name, least, most)
        require(0.0 <= self.dropout < 1.0, f"dropout is {self.dropout}, expected 0 <= dropout < 1")
        encoder = self.text_encoder
        if encoder is not None:
            require(self.text is not None, "there is a text_encoder and no text, expected both")
            assert self.text is not None
            require(
                self.text.features % encoder.heads == 0,
                f"text_encoder.heads is {encoder.heads}, expected a divisor of the {self.text.features} text features",
            )
            require(
                self.text.max_steps <= encoder.positions,
                f"text.max_steps is {self.text.max_steps}, expected at most the {encoder.positions} positions of the "
                "text encoder",
            )
        _ = self.inputs  # which checks the label range

    @property
    def channels(self) -> int:
        """Channels of the selective scan (mamba_ssm's d_inner)."""
        return self.expand * self.width

    @property
    def dt_rank(self) -> int:
        """Rank of the step-size projection, ceil(width / 16) as in mamba_ssm."""
        return math.ceil(self.width / 16)

    @property
    def inputs(self) -> Inputs:
        """What the model takes and gives."""
        encoder = self.text_encoder
        tokens = encoder and TokenConfig(encoder.vocabulary, encoder.token_types, encoder.unknown_token)
        sizes = {m: getattr(self, m) for m in MODALITIES}
        return Inputs(**sizes, text_tokens=tokens, label_min=self.label_min, label_max=self.label_max)

    def modality(self, name: str) -> FeatureConfig:
        """The feature sizes of the modality `name`."""
        return self.inputs.modality(name)

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
        for name in (m for m in MODALITIES if values[m] is not None):
            values[name] = FeatureConfig.from_json(values[name], f"{name}.")
        if values.get("text_encoder") is not None:
            values["text_encoder"] = TextEncoderConfig.from_json(values["text_encoder"])
        return cls(**values)
