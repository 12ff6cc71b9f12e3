"""The demo's checkpoint and bundle, which come with the package, and what a command takes where none was named.

    hcmen/demo/train/     checkpoint.safetensors, config.json, report.json and clips/, for hcmen-export and hcmen-eval
    hcmen/demo/bundle/    the seven variants of it, for a device

`samples/demo.py --ship` makes both again. Needs the standard library alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from hcmen.base.errors import CorruptFileError
from hcmen.base.files import read_small
from hcmen.base.records import MOST_MANIFEST_BYTES, JsonFile, parse_json

__all__ = ["BUNDLE", "CHECKPOINT", "DEMO", "chosen_bundle", "chosen_checkpoint", "or_the_demo"]

DEMO = Path(__file__).absolute().parent.parent / "demo"
BUNDLE, CHECKPOINT = Path("build/bundle"), Path("build/train")
"""Where hcmen-export and hcmen-train write, seen from the working directory."""

Note = Callable[[str], None]


def chosen_bundle(named: str | os.PathLike[str] | None, note: Note) -> Path:
    """The bundle `named`; if none is, build/bundle where something is there, or else the demo's.

    Args:
        named: what the caller asked for. note: told what was taken where that was nothing.
    """
    return Path(named) if named is not None else _taken([BUNDLE, DEMO / "bundle"], note, "--bundle")


def chosen_checkpoint(named: str | os.PathLike[str] | None, note: Note, *, sha256: object = None) -> Path:
    """The checkpoint `named`; if none is, build/train where something is there, or else the demo's.

    Args:
        named, note: as of `chosen_bundle`.
        sha256: of the weights that are wanted, where they must be those of a bundle: whichever has them is taken.
    """
    if named is not None:
        return Path(named)
    places = [CHECKPOINT, DEMO / "train"]
    return _taken(
        sorted(places, key=lambda place: sha256 is not None and _weights(place) != sha256), note, "--checkpoint"
    )


def or_the_demo(place: str | os.PathLike[str]) -> str:
    """What to add to advice on how to make `place`, which is not there: `make demo`, in a checkout."""
    here = Path(place) in (BUNDLE, CHECKPOINT) and Path("samples/demo.py").is_file()
    return ", or make demo" if here else ""


def _taken(places: list[Path], note: Note, option: str) -> Path:
    # What is there and no good is an error to be told of, and no reason to take something else.
    found = next((place for place in places if os.path.lexists(place)), None)
    if found is None:
        return min(places, key=lambda place: place.is_absolute())
    note(f"no {option} given: taking {found}" + (", the demo's, which comes with hcmen" if found.is_absolute() else ""))
    return found


def _weights(checkpoint: Path) -> object:
    """What the config.json of `checkpoint` says of its weights; None if it says nothing."""
    try:
        content = read_small(checkpoint / "config.json", MOST_MANIFEST_BYTES)
        return parse_json(content, JsonFile("config.json", "train again"))["weights"]["sha256"]
    except (OSError, CorruptFileError, LookupError, TypeError):
        return None
