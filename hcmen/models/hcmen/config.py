"""Settings of HCMEN's training that lie outside its architecture."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MixingConfig"]


@dataclass(frozen=True)
class MixingConfig:
    """How samples are mixed: the settings of a training run that mixing.py reads; see hcmen.training.config."""

    mix: str
    mix_alpha: float
    mix_similarity: float
    mix_same_sign: bool
    powmix_ratio: float
    powmix_parts: int
    powmix_probability: float
