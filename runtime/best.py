"""Which variant scores a clip, and which one "auto" takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hcmen.base.clip import TEXT_TOKENS, Clip
from hcmen.base.errors import InputError
from hcmen.base.modalities import Variant, variant_for, variant_named
from hcmen.base.typed import as_typed

if TYPE_CHECKING:
    from hcmen.base.manifest import Manifest

__all__ = ["best_variant", "variant_of"]


def best_variant(manifest: Manifest, present: Sequence[str], name: str) -> str:
    """The variant of a bundle that uses most of the modalities `present`, and no other.

    Among those that use equally many it is the one of the lowest validation error in the manifest, and without such
    scores the one with text rather than audio, and audio rather than vision.

    Raises:
        InputError: every variant needs a modality that the clip `name` lacks.
    """
    usable = [v for v in map(variant_named, manifest.variants) if set(v.present) <= set(present)]
    if not usable:
        have, wanted = ", ".join(manifest.variants), variant_for(present).name
        raise InputError(
            f"has {' and '.join(present)} alone, and the bundle's variants ({have}) need more",
            fix=f"add '{wanted}' to the bundle with {as_typed('hcmen-export', '--variant', wanted)}",
            where=name,
        )
    errors = {s.variant: s.measures["mae"] for s in manifest.scores if s.split == "valid" and "mae" in s.measures}

    def worth(variant: Variant) -> tuple[Any, ...]:
        return len(variant.present), -errors.get(variant.name, math.inf), variant.mask

    return max(usable, key=worth).name


def variant_of(clip: Clip, chosen: Variant | None, manifest: Manifest) -> str:
    """The variant that scores `clip`: `chosen`, or the best one of the bundle where None was.

    Raises:
        InputError: the variant needs what the clip lacks.
    """
    if chosen is None:
        return best_variant(manifest, clip.present, clip.name)
    absent = [m for m in chosen.present if m not in clip.present]
    if absent:
        why = ""
        if TEXT_TOKENS in clip.ignored:
            why = f" (its {TEXT_TOKENS} need a bundle with a text encoder)"
        elif "text" in clip.ignored:
            why = f" (this bundle takes {TEXT_TOKENS} in place of its text features)"
        raise InputError(
            f"{clip.name}: variant '{chosen.name}' needs {' and '.join(absent)}, the clip has only "
            f"{', '.join(clip.present)}{why}: use variant '{clip.variant.name}' or auto"
        )
    return chosen.name
