"""Sizes that a checkpoint, a state or a BERT's folder names are held to the weights in it before memory is taken."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers.micro import MICRO
from helpers.tiny_bert import write_bert

from hcmen.base.clip import read_clip
from hcmen.base.errors import CorruptFileError, HcmenError, InputError
from hcmen.base.inputs import FeatureConfig
from hcmen.base.shipped import DEMO
from hcmen.data.mmsa import dataset_from_mmsa
from hcmen.data.synthetic import make_synthetic
from hcmen.data.trained_on import dataset_of
from hcmen.models.hcmen.config import ModelConfig
from hcmen.models.text_encoder import read_sizes
from hcmen.runtime import load
from hcmen.training.checkpoint import load_checkpoint, load_state, save_state
from hcmen.training.config import TrainConfig
from hcmen.training.trainer import Trainer

Spoil = Callable[[Path], None]
_MOST_GROWTH = 300 << 20


def edited(**changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def model(**changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        before = json.loads((folder / "config.json").read_text())["model"]
        edited(model={**before, **changes})(folder)

    return spoil


def text(before: str, after: str) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        content = path.read_text()
        assert before in content
        path.write_text(content.replace(before, after, 1))

    return spoil


def weights(change: Callable[[bytes], bytes]) -> Spoil:
    """Other weights, which config.json knows."""

    def spoil(folder: Path) -> None:
        path = folder / "checkpoint.safetensors"
        content = change(path.read_bytes())
        path.write_bytes(content)
        described = {"file": path.name, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        edited(weights=described)(folder)

    return spoil


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def remade(content: bytes) -> bytes:
        found = safetensors.torch.load(content)
        change(found)
        return safetensors.torch.save(found)

    return weights(remade)


def header(change: Callable[[dict[str, Any]], object]) -> Spoil:
    def remade(content: bytes) -> bytes:
        size = int.from_bytes(content[:8], "little")
        read = json.loads(content[8 : 8 + size])
        change(read)
        text = json.dumps(read).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + size :]

    return weights(remade)


def sparse(folder: Path) -> None:
    """A file of 12 GB that takes no room on the disk, whose header is sound but for one tensor of that size."""
    path = folder / "checkpoint.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    read = json.loads(content[8 : 8 + size])
    end, more = len(content) - 8 - size, 12 << 30
    read["more"] = {"dtype": "U8", "shape": [more], "data_offsets": [end, end + more]}
    text = json.dumps(read).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + more)
    edited(weights={"sha256": "0" * 64})(folder)


ENCODER = {"vocabulary": 1 << 24, "layers": 256, "heads": 1, "intermediate": 1 << 20, "positions": 1 << 20}

CHECKPOINTS: dict[str, tuple[Spoil, str]] = {
    "a width beyond all": (model(width=10**8), "width is 100000000, expected 1 to 65536"),
    "a width of another model": (model(width=1 << 16), "expected float32"),
    "a width of 400 digits": (model(width=10**400), "a number of 1329 bits"),
    "a width that is true": (model(width=True), "'width' is True"),
    "a width that is a text": (model(width="8"), "'width' is '8'"),
    "tokens beyond all": (model(tokens=10**9), "tokens is 1000000000"),
    "tokens of another model": (model(tokens=1 << 12), "queries"),
    "states beyond all": (model(states=10**9), "states is"),
    "states of another model": (model(states=1 << 12), "expected float32"),
    "channels of another model": (model(expand=256), "expected float32"),
    "a depth beyond all": (model(backbone_depth=10**9), "backbone_depth is"),
    "a depth of another model": (model(backbone_depth=256), "lack"),
    "a depth below zero": (model(backbone_depth=-1), "backbone_depth is -1"),
    "features of another model": (model(audio={"features": 65536, "max_steps": 40}), "expected float32"),
    "steps beyond all": (model(audio={"features": 5, "max_steps": 10**9}), "max_steps"),
    "an encoder without weights": (
        model(text={"features": 1 << 16, "max_steps": 20}, text_encoder=ENCODER),
        "lack",
    ),
    "an encoder of layers beyond all": (model(text_encoder={**ENCODER, "layers": 10**9}), "text_encoder.layers"),
    "an encoder of words beyond all": (model(text_encoder={**ENCODER, "vocabulary": 10**9}), "vocabulary"),
    "a number that is none": (text('"dropout": 0.1', '"dropout": NaN'), "NaN is not a finite number"),
    "a number that is infinite": (text('"dropout": 0.1', '"dropout": 1e999'), "not a finite number"),
    "a number of 400 digits": (model(dropout=10**400), "'dropout' is a number of"),
    "a number of 5,000 digits": (text('"dropout": 0.1', f'"dropout": {"1" * 5000}'), "not valid JSON"),
    "lists within lists": (text('"dropout": 0.1', f'"dropout": {"[" * 100000}{"]" * 100000}'), "nested too deeply"),
    "objects within objects": (text('"dropout": 0.1', '"dropout": ' + '{"a":' * 50000 + "0" + "}" * 50000), "nested"),
    "a million lists": (text('"dropout": 0.1', f'"dropout": [{"[]," * 5000000}[]]'), "lists, objects and keys"),
    "a key that is there twice": (text('"dropout": 0.1', '"dropout": 0.1, "dropout": 0.1'), "twice"),
    "a data set that is a list": (edited(dataset=[]), "'dataset' is []"),
    "scores that are texts": (edited(validation={"mae_by_variant": {"full": "1"}}), "holds more than numbers"),
    "an epoch that is a text": (edited(epoch="1"), "'epoch' is '1'"),
    "weights of 12 GB": (sparse, "1 of the tensors are of no such model"),
    "another size than written": (edited(weights={"sha256": "", "bytes": 5}), "config.json says otherwise"),
    "a header beyond all": (weights(lambda c: (1 << 63).to_bytes(8, "little") + c[8:]), "its header has"),
    "a header of more than the file": (weights(lambda c: len(c).to_bytes(8, "little") + c[8:]), "its header has"),
    "a header within itself": (weights(lambda c: (10**6).to_bytes(8, "little") + b"[" * 10**6), "its header is no"),
    "no bytes": (weights(lambda c: b""), "its header has"),
    "a file cut short": (weights(lambda c: c[:-4]), "asks for more"),
    "a file that goes on": (weights(lambda c: c + b"\0" * 4), "asks for fewer"),
    "a shape that lies": (header(lambda h: h["gate.bias"].update(shape=[10**12])), "asks for more"),
    "a shape of 400 digits": (header(lambda h: h["gate.bias"].update(shape=[10**400])), "no list of tensors"),
    "a type of another model": (tensors(lambda t: t.update({"gate.bias": t["gate.bias"].half()})), "is float16 [3]"),
    "a weight too few": (tensors(lambda t: t.pop("gate.bias")), "lack 'gate.bias'"),
    "a weight too many": (tensors(lambda t: t.update({"other": torch.zeros(1)})), "1 of the tensors"),
}

_CHILD = """
import json, resource, sys, time
from hcmen.base.errors import HcmenError
from hcmen.training.checkpoint import load_checkpoint
import transformers.models.bert.modeling_bert
load_checkpoint(sys.argv[1])
for folder in sys.argv[2:]:
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    try:
        load_checkpoint(folder)
        outcome = [0, "was read"]
    except HcmenError as error:
        outcome = [error.exit_code, str(error)]
    except Exception as error:
        outcome = [70, repr(error)]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before << 10
    print(json.dumps([*outcome, grown, time.monotonic() - started]))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Of every checkpoint, in one process: exit code, message, bytes that the process grew by, seconds."""
    folders = []
    for name, (spoil, _) in CHECKPOINTS.items():
        folder = tmp_path_factory.mktemp("hostile") / name.replace(" ", "-")
        folder.mkdir()
        for file in ("config.json", "checkpoint.safetensors"):
            shutil.copy(DEMO / "train" / file, folder)
        spoil(folder)
        folders.append(str(folder))
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(DEMO / "train"), *folders], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(CHECKPOINTS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_hostile_checkpoint_ends_at_once_and_takes_no_memory(outcomes: dict[str, list[Any]], name: str):
    code, message, grown, seconds = outcomes[name]
    assert code == 5, message
    assert CHECKPOINTS[name][1] in message
    assert len(message) < 600
    assert grown < _MOST_GROWTH
    assert seconds < 30


def test_the_demo_scores_as_its_bundle_and_twice_the_same():
    """What a module computes for itself and does not save is there after loading."""
    first, second = (load_checkpoint(DEMO / "train")[0] for _ in range(2))
    clip = read_clip(sorted((DEMO / "train" / "clips").glob("*.npz"))[0], first.config.inputs)
    features = {m: torch.tensor(x)[None] for m, x in clip.features.items()}
    lengths = {m: torch.tensor([x.shape[1]]) for m, x in features.items()}
    with torch.no_grad():
        scores = [m(features, lengths).score for m in (first, second)]
    assert torch.equal(*scores)
    assert float(scores[0]) == pytest.approx(load(DEMO / "bundle")(clip).score, abs=1e-4)


def test_a_module_whose_buffers_are_not_saved_is_right_after_loading(tmp_path: Path):
    """BERT's position numbers are such."""
    folder = write_bert(tmp_path / "bert", 8)
    encoder, hidden = read_sizes(folder)
    config = dataclasses.replace(MICRO, text=FeatureConfig(hidden, 12), text_encoder=encoder)
    samples = (24, 12, 16)
    data = dataset_from_mmsa(make_synthetic(config.inputs, samples), "synthetic", config.inputs)
    trainer = Trainer(config, TrainConfig(epochs=1, batch_size=12), data, tmp_path / "out", text_encoder=folder)
    (tmp_path / "out").mkdir()
    trainer.run()
    again, _ = load_checkpoint(tmp_path / "out")
    named = dict(trainer.model.named_buffers())
    assert len(named) > len([name for name in again.state_dict() if name in named])
    for name, x in again.named_buffers():
        assert torch.equal(x, named[name]), name
    for name, x in again.state_dict().items():
        assert torch.equal(x, trainer.model.state_dict()[name]), name


# --- the state ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    data = dataset_from_mmsa(make_synthetic(MICRO.inputs, (24, 12, 16)), "synthetic", MICRO.inputs)
    run = {"preset": "tiny", "data": None, "text_encoder": None}
    Trainer(MICRO, TrainConfig(epochs=1, batch_size=12), data, folder, run).run()
    return folder


def _state(change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        found, state = load_state(folder)
        change(found, state)
        save_state(folder, found, state)

    return spoil


STATES: dict[str, tuple[Spoil, str]] = {
    "a width of another model": (_state(lambda t, s: s["model"].update(width=1 << 16)), "expected float32"),
    "a width beyond all": (_state(lambda t, s: s["model"].update(width=10**9)), "width is 1000000000"),
    "a depth of another model": (_state(lambda t, s: s["model"].update(backbone_depth=200)), "lack"),
    "no model": (_state(lambda t, s: s.pop("model")), "not whole"),
    "a model that is a list": (_state(lambda t, s: s.update(model=[])), "expected an object"),
    "a history of texts": (_state(lambda t, s: s.update(history=["a"])), "damaged"),
    "a history without numbers": (_state(lambda t, s: s["history"][0].update(loss="low")), "more than numbers"),
    "a history without a best": (_state(lambda t, s: s["history"][0].update(best=False)), "is the best"),
    "a run that is a list": (_state(lambda t, s: s.update(run=[])), "not whole"),
    "a seed of 400 digits": (_state(lambda t, s: s["train"].update(seed=10**400)), "seed is a number of"),
    "a parameter too few": (_state(lambda t, s: t.pop("model/gate.bias")), "lack 'model/gate.bias'"),
    "a moment of another size": (
        _state(lambda t, s: t.update({"optimiser/model/gate.bias/exp_avg": torch.zeros(1)})),
        "does not fit its parameter",
    ),
    "lists within lists": (_state(lambda t, s: s.update(run="?")), "not whole"),
    "a header beyond all": (
        lambda f: (f / "last.safetensors").write_bytes((1 << 63).to_bytes(8, "little") + b"{}"),
        "its header has",
    ),
    "no state": (
        lambda f: (f / "last.safetensors").write_bytes(safetensors.torch.save({"a": torch.zeros(1)})),
        "lacks 'state'",
    ),
    "a state within itself": (
        lambda f: (f / "last.safetensors").write_bytes(
            safetensors.torch.save({"a": torch.zeros(1)}, {"state": "[" * 100000})
        ),
        "recursion",
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_a_hostile_state_is_refused_in_one_line(trained: Path, tmp_path: Path, name: str):
    spoil, words = STATES[name]
    shutil.copy(trained / "last.safetensors", tmp_path)
    spoil(tmp_path)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(CorruptFileError) as found:
        load_state(tmp_path)
    assert words in str(found.value)
    assert "\n" not in str(found.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < _MOST_GROWTH >> 10
    assert time.monotonic() - started < 20


# --- the data that a checkpoint names -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "inputs"),
    [
        ({"dataset": {"name": "synthetic", "samples": {"train": 10**9, "valid": 1, "test": 1}}}, MICRO.inputs),
        ({"dataset": {"name": "synthetic", "samples": {"train": "9", "valid": 1, "test": 1}}}, MICRO.inputs),
        ({"train": {"seed": -1}}, MICRO.inputs),
        ({"train": {"seed": 10**400}}, MICRO.inputs),
        ({}, dataclasses.replace(MICRO, audio=FeatureConfig(1 << 16, 1 << 20)).inputs),
    ],
)
def test_a_synthetic_set_is_of_a_size_that_a_machine_can_hold(tmp_path: Path, change: dict[str, Any], inputs: Any):
    config = {
        "dataset": {"name": "synthetic", "samples": {"train": 24, "valid": 12, "test": 16}},
        "train": {"seed": 0},
    }
    assert len(dataset_of(tmp_path, config, MICRO.inputs, None, lambda _: None, "judging").splits["train"]) == 24
    with pytest.raises(CorruptFileError, match=r"config\.json") as found:
        dataset_of(tmp_path, config | change, inputs, None, lambda _: None, "judging")
    assert len(str(found.value)) < 400


# --- a BERT's folder ------------------------------------------------------------------------------------------------


def _compressed(folder: Path) -> None:
    """Weights of 4 GB in a file of 4 MB, as torch.save would have made it with compression."""
    import zipfile

    torch.save({"embeddings.word_embeddings.weight": torch.zeros(8)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content + b"\0" * (64 << 20) if "/data/" in name else content)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"hidden_size": 10**9}, InputError, "hidden_size is 1000000000"),
        ({"hidden_size": 10**400}, InputError, "hidden_size is a number of"),
        ({"hidden_size": True}, InputError, "hidden_size is True"),
        ({"hidden_size": 1 << 16}, InputError, "belong to different models"),
        ({"num_hidden_layers": 10**9}, InputError, "text_encoder.layers"),
        ({"num_hidden_layers": 256}, InputError, "the weights lack"),
        ({"intermediate_size": 1 << 20, "num_hidden_layers": 2}, InputError, "belong to different models"),
        ({"vocab_size": 1 << 24}, InputError, "belong to different models"),
        ({"layer_norm_eps": 10**400}, InputError, "norm_epsilon' is a number of"),
        ({"max_position_embeddings": 1 << 20}, InputError, "belong to different models"),
        (_compressed, CorruptFileError, "it is compressed"),
    ],
)
def test_a_bert_is_held_to_its_weights_before_memory_is_taken(
    tmp_path: Path, change: Any, error: type[HcmenError], words: str
):
    folder = write_bert(tmp_path / "bert", 32)
    if callable(change):
        change(folder)
    else:
        edited(**change)(folder)
    data = dataset_from_mmsa(make_synthetic(MICRO.inputs, (24, 12, 16)), "synthetic", MICRO.inputs)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()

    def build() -> None:
        encoder, hidden = read_sizes(folder)
        config = dataclasses.replace(MICRO, text=FeatureConfig(hidden, 12), text_encoder=encoder)
        Trainer(config, TrainConfig(), data, tmp_path / "out", text_encoder=folder)

    with pytest.raises(error) as found:
        build()
    assert words in str(found.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < _MOST_GROWTH >> 10
    assert time.monotonic() - started < 20


def test_sizes_in_range_are_read_as_before():
    config = ModelConfig.from_json(json.loads((DEMO / "train" / "config.json").read_text())["model"])
    assert config.width == 32
    assert np.isfinite(config.dropout)
