"""Which settings a run has: those of the command line, those of the run that is resumed, those that a run wrote.

config.json of every checkpoint holds the settings of its run. run.json of several seeds holds them for all. Both are
read by `read_settings`, strictly.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hcmen.base.errors import InputError, did_you_mean, shown
from hcmen.base.records import read_json
from hcmen.training.config import TrainConfig, train_setting
from hcmen.training.outputs import SEVERAL

if TYPE_CHECKING:
    from hcmen.models.contract import Config

__all__ = ["MOST_SEED", "Saved", "given_settings", "option", "read_settings", "resumed_seeds", "resumed_settings"]

MOST_SEED = 2**32 - 1
_SCHEMA_VERSION = 1
_SOURCES = ("preset", "data", "text_encoder")
# Of config.json, what is not read here.
_OTHERS = ("normalisation", "validation", "epoch", "dataset", "weights", "versions")
_MOST_SEEDS = 1000

# Settings with an option of their own; the others have --set.
_OPTIONS = (
    *("preset", "data", "text_encoder", "epochs", "batch_size", "micro_batches"),
    *("learning_rate", "text_encoder_learning_rate", "mix", "aux", "precision", "seed"),
)


def given_settings(changes: Sequence[str], **options: Any) -> dict[str, Any]:
    """The training settings of the command line: options that were given, and those of --set."""
    given = {name: value for name, value in options.items() if value is not None}
    for change in changes:
        try:
            name, value = train_setting(change)
        except InputError as error:
            raise click.UsageError(f"--set {change}: {error}") from error
        if given.setdefault(name, value) != value:
            raise click.UsageError(f"{name} is given twice, as {given[name]} and as {value}: give it once")
    return given


@dataclass(frozen=True)
class Saved:
    """Settings that a training wrote.

    where: the file. model, train: the configurations. run: {"preset", "data", "text_encoder"}, None where there was
    none. seeds: of several runs; empty for one.
    """

    where: Path
    model: Config
    train: TrainConfig
    run: Mapping[str, str | None]
    seeds: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What `read_settings` reads back; `where` is not among it."""
        return {
            "schema_version": _SCHEMA_VERSION,
            "kind": self.model.kind,
            "model": self.model.to_json(),
            "train": self.train.to_json(),
            "run": dict(self.run),
            **({"seeds": list(self.seeds)} if self.seeds else {}),
        }


def read_settings(place: Path) -> Saved:
    """The settings in `place`: config.json or run.json of hcmen-train, or a folder that holds one.

    Raises:
        InputError: there is none, a key is missing or unknown, or a value is of the wrong type or out of range.
        CorruptFileError: the file is no JSON.
    """
    from hcmen.models import registry

    path = place
    if place.is_dir():
        path = next((place / name for name in (SEVERAL, "config.json") if (place / name).exists()), place / SEVERAL)
    found = read_json(path, "name another file, or train again", "settings that hcmen-train wrote")
    try:
        if not isinstance(found, dict):
            raise InputError(f"holds {shown(found)}", "an object of settings")
        if found.get("schema_version") != _SCHEMA_VERSION:
            raise InputError(f"schema_version is {shown(found.get('schema_version'))}", str(_SCHEMA_VERSION))
        known = ("schema_version", "kind", "model", "train", "run", "seeds", *_OTHERS)
        for key in found:
            if key not in known:
                raise InputError(f"unknown key {shown(key)}", fix=did_you_mean(key, known) or "leave it out")
        for key in ("model", "train"):
            if not isinstance(found.get(key), dict):
                raise InputError(f"'{key}' is {shown(found.get(key))}", "an object, as hcmen-train writes it")
        kind = registry.named(found.get("kind", registry.DEFAULT))
        return Saved(
            path,
            kind.config.from_json(found["model"]),
            TrainConfig.from_json(found["train"]),
            _sources(found),
            _seeds(found.get("seeds", [])),
        )
    except InputError as error:
        raise error.but(where=str(path)) from error


def _sources(found: Mapping[str, Any]) -> dict[str, str | None]:
    if "run" not in found:  # of a version that wrote no more than the name of the data
        dataset = found.get("dataset")
        name = dataset.get("name") if isinstance(dataset, dict) else None
        return dict.fromkeys(_SOURCES) | {"data": name if isinstance(name, str) and name != "synthetic" else None}
    run = found["run"]
    if not isinstance(run, dict):
        raise InputError(f"'run' is {shown(run)}", f"an object of {', '.join(_SOURCES)}")
    for key, value in run.items():
        if key not in _SOURCES:
            raise InputError(f"unknown key {shown(f'run.{key}')}", fix=f"choose from {', '.join(_SOURCES)}")
        if value is not None and not isinstance(value, str):
            raise InputError(f"'run.{key}' is {shown(value)}", "a string or null")
    return {key: run.get(key) for key in _SOURCES}


def _seeds(found: Any) -> tuple[int, ...]:
    numbers = isinstance(found, list) and len(found) <= _MOST_SEEDS and all(type(x) is int for x in found)
    if not numbers or len(set(found)) < len(found) or not all(0 <= x <= MOST_SEED for x in found):
        raise InputError(f"'seeds' is {shown(found)}", f"a list of different numbers from 0 to {MOST_SEED}")
    return tuple(found)


def resumed_settings(
    out: Path, preset: str | None, given: Mapping[str, Any], data: Path | None, text_encoder: Path | None
) -> tuple[Config, TrainConfig, dict[str, Any]]:
    """The settings of the run in `out`; options that were given must agree with them."""
    from hcmen.models import registry
    from hcmen.training.checkpoint import load_state

    _, state = load_state(out)
    _check_agreement(out, {**state["train"], **state["run"]}, preset, given, data, text_encoder)
    kind = registry.named(state["kind"])
    return kind.config.from_json(state["model"]), TrainConfig.from_json(state["train"]), state["run"]


def resumed_seeds(
    out: Path,
    seeds: Sequence[int],
    preset: str | None,
    given: Mapping[str, Any],
    data: Path | None,
    text_encoder: Path | None,
) -> Saved:
    """The settings of the several runs in `out`; options that were given must agree with them."""
    saved = read_settings(out / SEVERAL)
    told = ",".join(map(str, saved.seeds))
    if "seed" in given:
        raise InputError(
            f"--seed is {given['seed']}, {out} has the runs of several: leave it out, or name one's folder"
        )
    if seeds and tuple(seeds) != saved.seeds:
        raise InputError(
            f"--seeds is {','.join(map(str, seeds))}, the runs in {out} have {told}: leave the option out to resume, "
            "or start over with --force"
        )
    _check_agreement(out, {**saved.train.to_json(), **saved.run}, preset, given, data, text_encoder)
    return saved


def _check_agreement(
    out: Path,
    before: Mapping[str, Any],
    preset: str | None,
    given: Mapping[str, Any],
    data: Path | None,
    text_encoder: Path | None,
) -> None:
    paths = {"data": data, "text_encoder": text_encoder}
    asked = {"preset": preset, **{name: os.path.realpath(path) for name, path in paths.items() if path}, **given}
    for name, value in asked.items():
        if value is not None and value != before.get(name):
            raise InputError(
                f"{option(name)} is {value}, the run in {out} has {before.get(name)}: leave the option out "
                "to resume, or start over with --force"
            )


def option(name: str) -> str:
    """How the training setting `name` is given on the command line."""
    return f"--{name.replace('_', '-')}" if name in _OPTIONS else f"--set {name}"
