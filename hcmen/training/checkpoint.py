"""What training leaves on disk: the checkpoint that others read, and the state that a resumed run starts from.

    checkpoint.safetensors   the model of the best epoch
    config.json              its configuration, feature statistics, validation scores, and the sha256 of the weights
    last.safetensors         model, objective and optimiser after the last whole epoch, with the history of the run

No file here is a pickle. Each is written whole or not at all: to a temporary neighbour, flushed, then renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

import hcmen
from hcmen.base.bundle import CHECKPOINT_FILE, check_no_bundle
from hcmen.base.errors import CorruptFileError, InputError, reason_of, shown
from hcmen.base.files import open_regular, refused, write_file
from hcmen.base.records import MOST_MANIFEST_BYTES, JsonFile, parse_json
from hcmen.base.shipped import or_the_demo
from hcmen.base.typed import as_typed
from hcmen.models import registry
from hcmen.models.contract import Model
from hcmen.models.held import hold, on_meta, read_header
from hcmen.training.config import TrainConfig
from hcmen.training.outputs import SEVERAL

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
_ALTERED = "altered, truncated, or half of a write that was killed"


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
    run: Mapping[str, Any] | None = None,
) -> None:
    """Writes checkpoint.safetensors and config.json. run: preset, data and text encoder, where they are known.

    Raises:
        InputError: as `write_whole`.
    """
    weights = safetensors.torch.save(_dense(model.state_dict()))
    config = {
        "schema_version": SCHEMA_VERSION,
        "kind": model.config.kind,
        "model": model.config.to_json(),
        "train": train.to_json(),
        **({"run": dict(run)} if run else {}),
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
    kind = _kind_of(config, folder / CONFIG)
    path = folder / CHECKPOINT
    with _opened(path) as file, _held(f"{folder}: {CONFIG} does not describe {CHECKPOINT}", "train again"):
        _check_config(config)
        expected, size = config["weights"]["sha256"], os.fstat(file.fileno()).st_size
        if config["weights"].get("bytes", size) != size:
            raise CorruptFileError(
                f"{size} bytes, {CONFIG} says otherwise: {_ALTERED}", fix=_again(folder), where=str(path)
            )
        settings = kind.config.from_json(config["model"])
        planned = on_meta(lambda: kind.module(settings)).state_dict()
        tensors = read_header(file).tensors
        hold(tensors, planned)
        if len(tensors) > len(planned):
            raise ValueError(f"{len(tensors) - len(planned)} of the tensors are of no such model")
        content = _whole(file, size)
        digest = hashlib.sha256(content).hexdigest()
        if digest != expected:
            raise CorruptFileError(
                f"sha256 {digest[:12]}..., {CONFIG} says {shown(expected)[:14]}...: {_ALTERED}",
                fix=_again(folder),
                where=str(path),
            )
        weights = safetensors.torch.load(content)
        # Made anew: what a module computes when it is made, and does not save, is nowhere yet.
        model = kind.module(settings)
        model.load_state_dict(weights)
    return model.eval(), config


def save_state(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Writes last.safetensors: `tensors`, and `state` as JSON in its header; raises InputError as `write_whole`."""
    write_whole(folder / STATE, safetensors.torch.save(_dense(tensors), {"state": json.dumps(state)}))


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_state` wrote, every setting in it. The parameters of the model that it describes are there.

    Raises:
        InputError: there is nothing to resume, or the kind of model is not known here.
        CorruptFileError: the file is damaged.
    """
    path = folder / STATE
    if not path.exists():
        check_no_bundle(folder, "a folder of hcmen-train", "name the one to resume by --out")
        raise InputError(f"{folder}: holds no {STATE} to resume from: run without --resume")
    damaged = (f"{path}: truncated, damaged or not written by hcmen-train", "start over with --force")
    with _opened(path) as file:
        with _held(*damaged):
            header = read_header(file)
            state = json.loads(header.texts["state"])
            _check_state(state)
        kind = _kind_of(state, path)
        with _held(*damaged):
            settings = kind.config.from_json(state["model"])
            # Settings that the state does not know yet were at their defaults.
            train = TrainConfig.from_json(state["train"])
            state |= {"kind": kind.name, "model": settings.to_json(), "train": train.to_json()}
            planned = on_meta(lambda: kind.module(settings))
            hold(header.tensors, {f"model/{name}": p for name, p in planned.named_parameters()})
            for name, (_, shape) in header.tensors.items():
                whose, _, what = name.removeprefix("optimiser/").rpartition("/")
                if name.startswith("optimiser/") and shape != (() if what == "step" else header.tensors[whose][1]):
                    raise ValueError(f"'{name[:100]}' does not fit its parameter")
            tensors = safetensors.torch.load(_whole(file, os.fstat(file.fileno()).st_size))
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


@contextlib.contextmanager
def _held(what: str, fix: str) -> Iterator[None]:
    """Makes whatever a damaged file can raise in the block a CorruptFileError."""
    try:
        yield
    except (
        LookupError,
        TypeError,
        AttributeError,
        ValueError,
        ArithmeticError,
        RuntimeError,  # RecursionError too
        InputError,
        safetensors.SafetensorError,
    ) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else reason_of(error)
        raise CorruptFileError(f"{what}: {reason}; {fix}") from error


def _check_config(config: Mapping[str, Any]) -> None:
    """Raises ValueError unless what is read of config.json beside the model is of its type."""
    for name, kind in (("train", dict), ("validation", dict), ("dataset", dict), ("epoch", int)):
        value = config.get(name, kind())
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"'{name}' is {shown(value)}")
    scores = config.get("validation", {}).get("mae_by_variant", {})
    if not isinstance(scores, dict) or not all(type(x) in (int, float) for x in scores.values()):
        raise ValueError("'validation.mae_by_variant' holds more than numbers")


def _check_state(state: Any) -> None:
    """Raises ValueError unless the JSON of a state has all that a resumed run reads."""
    if not isinstance(state, dict) or state.get("schema_version") != SCHEMA_VERSION:
        raise ValueError("the state is of another version of hcmen")
    history, run = state["history"], state["run"]
    if not isinstance(history, list) or not isinstance(run, dict) or not {"model", "train"} <= state.keys():
        raise ValueError("the state is not whole")
    for record in history:
        numbers = [record["epoch"], record["loss"], record["validation_mae"], *record["validation"].values()]
        if not all(type(x) in (int, float) and math.isfinite(x) for x in numbers) or type(record["best"]) is not bool:
            raise ValueError("the history holds more than numbers")
    if history and not any(record["best"] for record in history):
        raise ValueError("no epoch of the history is the best")


def _kind_of(described: Mapping[str, Any], path: Path) -> registry.Kind:
    try:
        return registry.named(str(described.get("kind", registry.DEFAULT)))
    except InputError as error:
        raise error.but(where=str(path)) from error


def _again(folder: Path) -> str:
    return f"train again, or go on with {as_typed('hcmen-train', '--resume', '--out', folder)}"


def _whole(file: IO[bytes], size: int) -> bytes:
    """The `size` bytes that the file had when it was looked at."""
    file.seek(0)
    return file.read(size)


def _opened(path: Path) -> IO[bytes]:
    folder = path.parent
    fix = f"run {as_typed('hcmen-train', '--out', folder)}{or_the_demo(folder)}"
    if not path.exists():
        if (folder / SEVERAL).is_file():
            raise InputError(
                "holds the runs of several seeds", "one of them, such as seed-1111 in it", where=str(folder)
            )
        # To train into a folder that holds something else would be no help.
        check_no_bundle(folder, "a checkpoint folder of hcmen-train", "name the one it was exported from")
        if folder.is_file():
            fix = "name the folder that hcmen-train wrote"
        elif folder.is_dir() and any(folder.iterdir()):
            other = as_typed("hcmen-train", "--out", "OTHER")
            fix = f"name the folder that hcmen-train wrote, or train into another one with {other}"
    with refused(path, "a checkpoint", None if path.exists() else fix):
        return open_regular(path)


def _read_config(path: Path) -> dict[str, Any]:
    with _opened(path) as file:
        content = file.read(MOST_MANIFEST_BYTES + 1)
    config = parse_json(content, JsonFile(str(path), "train again, or restore the file"))
    found = config.get("schema_version") if isinstance(config, dict) else None
    if found != SCHEMA_VERSION:
        raise CorruptFileError(
            f"{path}: schema_version is {shown(found)}, expected {SCHEMA_VERSION}: written by another version of hcmen"
        )
    assert isinstance(config, dict)
    return config
