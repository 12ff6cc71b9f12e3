"""Which settings a run has: those of the command line, and those of the run that is resumed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hcmen.base.errors import InputError
from hcmen.training.config import TrainConfig, train_setting

if TYPE_CHECKING:
    from hcmen.models.contract import Config

__all__ = ["given_settings", "resumed_settings"]

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


def resumed_settings(
    out: Path, preset: str | None, given: Mapping[str, Any], data: Path | None, text_encoder: Path | None
) -> tuple[Config, TrainConfig, dict[str, Any]]:
    """The settings of the run in `out`; options that were given must agree with them."""
    from hcmen.models import registry
    from hcmen.training.checkpoint import load_state

    _, state = load_state(out)
    paths = {"data": data, "text_encoder": text_encoder}
    asked = {"preset": preset, **{name: os.path.realpath(path) for name, path in paths.items() if path}, **given}
    before = {**state["train"], **state["run"]}
    for name, value in asked.items():
        if value is not None and value != before.get(name):
            option = f"--{name.replace('_', '-')}" if name in _OPTIONS else f"--set {name}"
            raise InputError(
                f"{option} is {value}, the run in {out} has {before.get(name)}: leave the option out "
                "to resume, or start over with --force"
            )
    kind = registry.named(state["kind"])
    return kind.config.from_json(state["model"]), TrainConfig.from_json(state["train"]), state["run"]
