"""The data that a checkpoint was trained on, found again from what its config.json says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hcmen.base.errors import CorruptFileError, InputError
from hcmen.base.inputs import Inputs
from hcmen.data import MultimodalDataset, cleaned_notes

__all__ = ["dataset_of", "mention_cleaned", "trained_on"]


def dataset_of(
    folder: Path,
    config: Mapping[str, Any],
    inputs: Inputs,
    data: Path | None,
    note: Callable[[str], None],
    purpose: str,
) -> MultimodalDataset:
    """The file or folder `data`, or what the checkpoint in `folder` was trained on.

    Args:
        config: its config.json. note: is told what is read. purpose: of the data, in a few words for that note.

    Raises:
        InputError: the data is not there, or does not fit the model.
        CorruptFileError: the file is damaged, or config.json does not say what it was.
    """
    from hcmen.data.mmsa import dataset_from_mmsa, read_mmsa
    from hcmen.data.synthetic import make_synthetic

    name, made = (str(data), None) if data else trained_on(folder, config)
    if made is not None:
        samples, seed = made
        note(f"no --data: {purpose} {folder} on the synthetic set it was trained on (seed {seed})")
        return dataset_from_mmsa(make_synthetic(inputs, samples, seed), name, inputs)
    if data is None:
        if not Path(name).exists():
            raise InputError(f"{folder}: was trained on {name}, which is not there: name the data with --data")
        note(f"no --data: {purpose} {folder} on {name}, which it was trained on")
    dataset = read_mmsa(name, inputs)
    mention_cleaned(dataset, note)
    return dataset


def trained_on(folder: Path, config: Mapping[str, Any]) -> tuple[str, tuple[tuple[int, int, int], int] | None]:
    """The name of the data, and for the synthetic set its samples per split and its seed.

    Raises:
        CorruptFileError: config.json does not say.
    """
    try:
        name, samples = str(config["dataset"]["name"]), config["dataset"]["samples"]
        if name != "synthetic":
            return name, None
        return name, (
            (int(samples["train"]), int(samples["valid"]), int(samples["test"])),
            int(config["train"]["seed"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(
            f"{folder}: config.json does not say what the model was trained on (lacks {error}): name the data with "
            "--data, or train again"
        ) from error


def mention_cleaned(dataset: MultimodalDataset, note: Callable[[str], None]) -> None:
    """Tells how many values of the data were no numbers, or not at their place."""
    for line in cleaned_notes(dataset.cleaned, dataset.misplaced):
        note(line)
