"""What training leaves on disk: the checkpoint that others read, and the state that a resumed run starts from.

    checkpoint.safetensors   the model of the best epoch
    config.json              its configuration, feature statistics, validation scores, and the sha256 of the weights
    last.safetensors         model, objective and optimiser after the last whole epoch, with the history of the run

No file here is a pickle. Each is written whole or not at all: to a temporary neighbour, flushed, then renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

import hcmen
from hcmen.base.bundle import CHECKPOINT_FILE, check_no_bundle
from hcmen.base.errors import CorruptFileError, InputError, reason_of, shown
from hcmen.base.files import read_small, refused, write_file
from hcmen.base.shipped import or_the_demo
from hcmen.base.typed import as_typed
from hcmen.models import registry
from hcmen.models.contract import Model
from hcmen.training.config import TrainConfig

__all__ = [
    "load_checkpoint",
    "load_state",
    "save_checkpoint",
    "save_state",
    "versions",
    "write_json",
    "write_whole",
]

SCHEMA_VERSION = 1
CHECKPOINT, CONFIG, STATE = CHECKPOINT_FILE, "config.json", "last.safetensors"
_MOST_BYTES = 16 << 30


def write_whole(path: Path, content: bytes) -> None:
    """Writes `content` to `path` so that a reader, or a process killed at any moment, sees the old file or the new one.

    Raises:
        InputError: the disk is full, or the place cannot be written.
    """
    with refused(path, fix="choose another --out", note=f"{len(content)} bytes were to be written"):
        write_file(path, content)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes `data` as JSON, whole or not at all; raises InputError as `write_whole`."""
    write_whole(path, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())


def save_checkpoint(
    folder: Path,
    model: Model,
    train: TrainConfig,
    *,
    epoch: int,
    validation: Mapping[str, Any],
    dataset: Mapping[str, Any],
) -> None:
    """Writes checkpoint.safetensors and config.json.

    Raises:
        InputError: as `write_whole`.
    """
    weights = safetensors.torch.save(_dense(model.state_dict()))
    config = {
        "schema_version": SCHEMA_VERSION,
        "kind": model.config.kind,
        "model": model.config.to_json(),
        "train": train.to_json(),
        "normalisation": model.normalisation(),
        "validation": dict(validation),
        "epoch": epoch,
        "dataset": dict(dataset),
        "weights": {"file": CHECKPOINT, "sha256": hashlib.sha256(weights).hexdigest(), "bytes": len(weights)},
        "versions": versions(),
    }
    write_whole(folder / CHECKPOINT, weights)
    write_json(folder / CONFIG, config)


def load_checkpoint(folder: str | os.PathLike[str]) -> tuple[Any, dict[str, Any]]:
    """The model in `folder`, in eval mode, and what config.json says.

    Raises:
        InputError: there is no checkpoint, its files cannot be read, or its kind of model is not known here.
        CorruptFileError: a file is truncated or altered, or the two do not belong together.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    try:
        kind = registry.named(str(config.get("kind", registry.DEFAULT)))
    except InputError as error:
        raise error.but(where=str(folder / CONFIG)) from error
    path = folder / CHECKPOINT
    content = _read(path)
    digest = hashlib.sha256(content).hexdigest()
    try:
        expected = config["weights"]["sha256"]
        if digest != expected:
            raise CorruptFileError(
                f"sha256 {digest[:12]}..., {CONFIG} says {shown(expected)[:14]}...: altered, truncated, or half of a "
                "write that was killed",
                fix=f"train again, or go on with {as_typed('hcmen-train', '--resume', '--out', folder)}",
                where=str(path),
            )
        model = kind.module(kind.config.from_json(config["model"]))
        model.load_state_dict(safetensors.torch.load(content))
    except (KeyError, TypeError, ValueError, RuntimeError, InputError, safetensors.SafetensorError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else reason_of(error)
        raise CorruptFileError(f"{folder}: {CONFIG} does not describe {CHECKPOINT}: {reason}; train again") from error
    return model.eval(), config


def save_state(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Writes last.safetensors: `tensors`, and `state` as JSON in its header; raises InputError as `write_whole`."""
    write_whole(folder / STATE, safetensors.torch.save(_dense(tensors), {"state": json.dumps(state)}))


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_state` wrote.

    Raises:
        InputError: there is nothing to resume.
        CorruptFileError: the file is damaged.
    """
    path = folder / STATE
    if not path.exists():
        check_no_bundle(folder, "a folder of hcmen-train", "name the one to resume by --out")
        raise InputError(f"{folder}: holds no {STATE} to resume from: run without --resume")
    content = _read(path)
    try:
        tensors = safetensors.torch.load(content)
        # The Python API that loads from bytes does not give the header's metadata; it is JSON after a length.
        size = int.from_bytes(content[:8], "little")
        state = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["state"])
        if state["schema_version"] != SCHEMA_VERSION or not {"model", "train", "run", "history"} <= state.keys():
            raise ValueError("the state is of another version of hcmen")
    except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise CorruptFileError(
            f"{path}: truncated, damaged or not written by hcmen-train: start over with --force"
        ) from error
    return tensors, state


def versions() -> dict[str, str]:
    """Versions of what shapes the numbers of a run."""
    return {
        "hcmen": hcmen.__version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _dense(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().contiguous() for name, x in tensors.items()}


def _read(path: Path) -> bytes:
    folder = path.parent
    fix = f"run {as_typed('hcmen-train', '--out', folder)}{or_the_demo(folder)}"
    if not path.exists():
        # To train into a folder that holds something else would be no help.
        check_no_bundle(folder, "a checkpoint folder of hcmen-train", "name the one it was exported from")
        if folder.is_file():
            fix = "name the folder that hcmen-train wrote"
        elif folder.is_dir() and any(folder.iterdir()):
            other = as_typed("hcmen-train", "--out", "OTHER")
            fix = f"name the folder that hcmen-train wrote, or train into another one with {other}"
    with refused(path, "a checkpoint", None if path.exists() else fix):
        return read_small(path, _MOST_BYTES)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(
            f"{path}: not JSON ({reason_of(error, 100)}): train again, or restore the file"
        ) from error
    found = config.get("schema_version") if isinstance(config, dict) else None
    if found != SCHEMA_VERSION:
        raise CorruptFileError(
            f"{path}: schema_version is {shown(found)}, expected {SCHEMA_VERSION}: written by another version of hcmen"
        )
    assert isinstance(config, dict)
    return config
