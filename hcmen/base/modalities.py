"""Modalities and the seven variants (non-empty subsets of the modalities).

The order of `MODALITIES` is the order of every axis of length three: presence masks `[batch, 3]` and the
output `modality_weights` `[batch, 3]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from hcmen.base.errors import InputError, several_names, unknown_name

__all__ = ["MODALITIES", "VARIANTS", "Variant", "variant_for", "variant_meant", "variant_named", "variants_of"]

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

    @property
    def number(self) -> int:
        """1 to 7, the sum of what is present: text counts 4, audio 2, vision 1."""
        return sum(there << place for place, there in enumerate(reversed(self.mask)))


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
        InputError: no variant has that name; the message suggests the one that is meant, or else the nearest one.
    """
    found = _BY_NAME.get(name) if isinstance(name, str) else None
    if found is None:
        several = several_names(name, _BY_NAME) if isinstance(name, str) else ()
        if several:
            raise InputError(f"'{name}' is {len(several)} variants, expected one: choose {' or '.join(several)}")
        meant = variant_meant(name) if isinstance(name, str) else None
        if meant is not None:
            fix = f"did you mean '{meant}'? choose from {', '.join(_BY_NAME)}"
            raise InputError(f"unknown variant '{name}'", fix=fix)
        raise unknown_name("variant", name, _BY_NAME)
    return found


def variants_of(modalities: Iterable[str]) -> tuple[Variant, ...]:
    """The variants that need none but `modalities`, the one of all of them first."""
    there = set(modalities)
    return tuple(v for v in VARIANTS if there.issuperset(v.present))


# What people call a modality, what says that one is absent (before or after it), and what says nothing.
_WORDS = {
    **dict.fromkeys(("text", "texts", "txt", "words", "word", "language", "lang", "transcript", "t"), "text"),
    **dict.fromkeys(("audio", "acoustic", "acoustics", "sound", "voice", "speech", "a"), "audio"),
    **dict.fromkeys(("vision", "visual", "visuals", "video", "image", "images", "face", "faces", "v"), "vision"),
    **dict.fromkeys(("no", "non", "not", "without", "wo", "minus", "sans", "drop", "dropped", "exclude", "w"), "no"),
    **dict.fromkeys(("missing", "miss", "absent", "lacking", "lacks", "lost", "less", "off", "removed"), "missing"),
    **dict.fromkeys(("only", "just", "alone", "solely", "and", "plus", "with", "modality", "the", "is", "or", "o"), ""),
    **dict.fromkeys(("full", "all", "everything", "complete", "any"), "all"),
}
_LONGEST_FIRST = sorted((w for w in _WORDS if len(w) > 1), key=len, reverse=True)
_WORD = re.compile("|".join([*_LONGEST_FIRST, r"(?<![a-z])[tavwo](?![a-z])"]))


def variant_meant(name: str) -> str | None:
    """The name of the variant that `name` says in other words, such as `no_audio` or `missing-video`; None if none."""
    if len(name) > 100:
        return None
    lowered = name.lower()
    if re.sub(r"[\W\d_]+", "", _WORD.sub("", lowered)):
        return None  # a word that is not known may say anything
    said = [_WORDS[word] for word in _WORD.findall(lowered)]
    named = [word for word in said if word in MODALITIES]
    if not named:
        return "full" if "all" in said and "no" not in said and "missing" not in said else None
    if "no" in said:
        at = said.index("no")
        absent = {word for word in said[at:] if word in MODALITIES} or set(named)
    elif "missing" in said:
        absent = set(named)
    else:
        return variant_for(named).name
    present = set(MODALITIES) - absent
    return variant_for(present).name if present else None


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
