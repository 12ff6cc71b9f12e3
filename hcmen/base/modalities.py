"""Modalities and the seven variants (non-empty subsets of the modalities).

The order of `MODALITIES` is the order of every axis of length three: presence masks `[batch, 3]` and the
output `modality_weights` `[batch, 3]`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hcmen.base.errors import InputError, unknown_name

__all__ = ["MODALITIES", "VARIANTS", "Variant", "variant_for", "variant_named"]

MODALITIES: tuple[str, ...] = ("text", "audio", "vision")


@dataclass(frozen=True)
class Variant:
    """One missing-modality configuration: its name and the modalities that are present, in axis order."""

    name: str
    present: tuple[str, ...]

    @property
    def absent(self) -> tuple[str, ...]:
        """The modalities this variant does without, in axis order."""
        return tuple(m for m in MODALITIES if m not in self.present)

    @property
    def mask(self) -> tuple[bool, ...]:
        """Presence per modality, in axis order."""
        return tuple(m in self.present for m in MODALITIES)


VARIANTS: tuple[Variant, ...] = (
    Variant("full", ("text", "audio", "vision")),
    Variant("text_missing", ("audio", "vision")),
    Variant("audio_missing", ("text", "vision")),
    Variant("vision_missing", ("text", "audio")),
    Variant("text_only", ("text",)),
    Variant("audio_only", ("audio",)),
    Variant("vision_only", ("vision",)),
)

_BY_NAME = {v.name: v for v in VARIANTS}
_BY_PRESENT = {v.present: v for v in VARIANTS}


def variant_named(name: str) -> Variant:
    """The variant called `name`.

    Raises:
        InputError: no variant has that name; the message suggests the nearest one.
    """
    found = _BY_NAME.get(name)
    if found is None:
        raise unknown_name("variant", name, _BY_NAME)
    return found


def variant_for(present: Iterable[str]) -> Variant:
    """The variant in which exactly the modalities `present` are there.

    Raises:
        InputError: no modality, or a name that is not a modality.
    """
    names = set(present)
    unknown = sorted(names - set(MODALITIES))
    if unknown:
        raise unknown_name("modality", unknown[0], MODALITIES)
    if not names:
        raise InputError(f"no modality is present: at least one of {', '.join(MODALITIES)} is needed")
    return _BY_PRESENT[tuple(m for m in MODALITIES if m in names)]
