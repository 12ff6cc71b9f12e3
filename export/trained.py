"""What a checkpoint folder tells of its training: the data, how the checkpoint was chosen, and what it reached."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hcmen.base.errors import CorruptFileError, InputError, reason_of, shown
from hcmen.base.files import read_small, refused
from hcmen.base.manifest import FrontEnd, Score, front_ends_from_json
from hcmen.base.modalities import variant_named
from hcmen.base.records import MOST_MANIFEST_BYTES, JsonFile, JsonObject, parse_json
from hcmen.models import registry

__all__ = ["Trained", "trained"]

_BASELINES = ("floor", "linear")
_PROTOCOL = "variants"
"""Every sample without the modalities that the variant leaves out."""


@dataclass(frozen=True)
class Trained:
    """data: the name of the data set. samples: of each split, where they are known. seed: of the run.

    scores: on the validation split, by which the checkpoint was chosen, and on the test split.
    baselines: (variant, "floor" or "linear") -> measures on the test split. front_ends: what made the features.
    unheard: variant -> modalities that it is given and does not listen to.
    """

    data: str = ""
    samples: Mapping[str, int] = field(default_factory=dict)
    seed: int | None = None
    scores: tuple[Score, ...] = ()
    baselines: Mapping[tuple[str, str], Mapping[str, float]] = field(default_factory=dict)
    front_ends: Mapping[str, FrontEnd] = field(default_factory=dict)
    unheard: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def trained(checkpoint: Path, about: Mapping[str, Any]) -> Trained:
    """What is known of the training.

    Args:
        checkpoint: the folder; a report.json in it counts where it is of this very epoch. about: its config.json.

    Raises:
        CorruptFileError: report.json is damaged, or what `about` says of the data and the validation.
    """
    try:
        dataset, validation = about.get("dataset", {}), about.get("validation", {})
        data, samples = str(dataset.get("name", "")), dict(dataset.get("samples", {}))
        maes, seed = validation.get("mae_by_variant", {}).items(), about.get("train", {}).get("seed")
        for count in (*samples.values(), *(() if seed is None else (seed,))):
            if type(count) is not int or count < 0:
                raise ValueError(f"a count or seed is {shown(count)}")
    except (AttributeError, TypeError, ValueError) as error:
        raise CorruptFileError(
            f"{checkpoint}: config.json does not describe a training ({reason_of(error, 100)}): train again"
        ) from error
    told = JsonObject("", {"front_ends": {}, **dataset}, JsonFile(f"{checkpoint}: config.json", "train again"))
    front_ends = front_ends_from_json(told.object("front_ends"))
    found = [Score(data, "valid", _PROTOCOL, variant, {"mae": mae}) for variant, mae in maes]
    baselines: dict[tuple[str, str], Mapping[str, float]] = {}
    unheard: dict[str, tuple[str, ...]] = {}
    path = checkpoint / "report.json"
    if os.path.lexists(path):  # or the training was stopped
        with refused(path, "a report of hcmen-train"):
            content = read_small(path, MOST_MANIFEST_BYTES)
        try:
            report = parse_json(content, JsonFile(f"{path}: no report of hcmen-train", "remove it, or train again"))
            if (report["epoch"], report["validation_mae"]) == (about["epoch"], validation["mae"]):
                kind = about.get("kind", registry.DEFAULT)
                for variant, models in report["test"].items():
                    found.append(Score(data, "test", _PROTOCOL, variant, _measures(models[kind])))
                    baselines |= {(variant, name): _measures(models[name]) for name in _BASELINES if name in models}
                for variant, modalities in report.get("unheard", {}).items():
                    if not isinstance(modalities, list) or not set(modalities) < set(variant_named(variant).present):
                        raise ValueError(f"{variant} does not listen to {shown(modalities)}")
                    unheard[variant] = tuple(modalities)
        except (InputError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise CorruptFileError(
                f"{path}: no report of hcmen-train ({reason_of(error, 100)}): remove it, or train again"
            ) from error
    return Trained(data, samples, seed, tuple(found), baselines, front_ends, unheard)


def _measures(found: Mapping[str, Any]) -> dict[str, float]:
    """Those that have a value: one without samples has none."""
    return {name: float(x) for name, x in found.items() if x is not None}
