"""Runs of hcmen-train on the smallest model and set, and what they leave."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import hcmen.data.synthetic
from hcmen.training import command as train
from hcmen.training.config import TrainConfig
from hcmen.training.presets import Preset
from helpers.micro import MICRO

SAMPLES = (24, 12, 16)
# Every epoch of this run is better than the one before, so that each writes a checkpoint to be killed in.
TRAIN = TrainConfig(epochs=3, batch_size=10, learning_rate=1e-3)

# A process that runs the command on the micro model, with one thing about it changed.
PROGRAM = f"""
import os, signal, sys, time
import hcmen.training.command
from hcmen.base.inputs import FeatureConfig
from hcmen.models.hcmen.config import ModelConfig
from hcmen.training.presets import Preset
from hcmen.training.config import TrainConfig
from hcmen.data import synthetic

micro = Preset("tiny", "for tests", {MICRO!r}, {TRAIN!r})
hcmen.training.command.preset_named = lambda name: micro
synthetic.SAMPLES["tiny"] = {SAMPLES!r}
from hcmen.training import checkpoint, trainer as training

{{change}}
hcmen.training.command.main(sys.argv[1:])
"""


def make_micro(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has every preset be the smallest one, in this process."""
    monkeypatch.setattr(train, "preset_named", lambda name: Preset("tiny", "for tests", MICRO, TRAIN))
    monkeypatch.setitem(hcmen.data.synthetic.SAMPLES, "tiny", SAMPLES)


def on_one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it every preset is the smallest one, and PyTorch has one thread."""
    make_micro(monkeypatch)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def command(*arguments: Any) -> int:
    """The exit code of hcmen-train."""
    return train.main.main([*map(str, arguments)], standalone_mode=False)


def result(folder: Path) -> dict[str, Any]:
    """Everything a run leaves, without times and without the picture."""

    def timeless(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in record.items() if k != "seconds"} for record in history]

    content = (folder / "last.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    state = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["state"])
    return {
        "checkpoint": (folder / "checkpoint.safetensors").read_bytes(),
        "config": (folder / "config.json").read_bytes(),
        "log": timeless([json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]),
        "tensors": {name: x.numpy().tobytes() for name, x in safetensors.torch.load(content).items()},
        "state": {**state, "history": timeless(state["history"])},
    }
