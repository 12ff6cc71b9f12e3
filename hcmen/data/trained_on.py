"""The data that a checkpoint was trained on, found again from what its config.json says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hcmen.base.errors import CorruptFileError, InputError, shown
from hcmen.base.inputs import Inputs
from hcmen.data import MultimodalDataset, cleaned_notes

__all__ = ["dataset_of", "mention_cleaned", "trained_on"]

_MOST_SAMPLES, _MOST_NUMBERS = 1 << 16, 1 << 32  # the largest preset's has 22,856 samples and 2^31 numbers


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
        # It is made of sizes alone, and no file bounds them.
        size = sum(samples) * sum(inputs.modality(m).features * inputs.modality(m).max_steps for m in inputs.modalities)
        if size > _MOST_NUMBERS:
            raise CorruptFileError(
                f"{folder}: config.json asks for a synthetic set of {size} numbers", f"at most {_MOST_NUMBERS}"
            )
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
        counts, seed = (samples["train"], samples["valid"], samples["test"]), config["train"]["seed"]
        for number, most in (*((n, _MOST_SAMPLES) for n in counts), (seed, 1 << 63)):
            if type(number) is not int or not 0 <= number < most:
                raise ValueError(f"a number below {most}, says {shown(number)}")
        return name, (counts, seed)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(
            f"{folder}: config.json does not say what the model was trained on (lacks {error}): name the data with "
            "--data, or train again"
        ) from error


def mention_cleaned(dataset: MultimodalDataset, note: Callable[[str], None]) -> None:
    """Tells how many values of the data were no numbers, or not at their place."""
    for line in cleaned_notes(dataset.cleaned, dataset.misplaced):
        note(line)
