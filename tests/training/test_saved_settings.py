"""hcmen-train --config: what a training wrote gives the same run again; the command line wins, and that is said."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.micro import MICRO
from helpers.micro_runs import SAMPLES, TRAIN, command, make_micro, on_one_thread, result
from helpers.tiny_bert import write_bert

from hcmen.base.errors import CorruptFileError, HcmenError, InputError
from hcmen.base.inputs import FeatureConfig
from hcmen.data.synthetic import make_synthetic, write_synthetic
from hcmen.training import command as train
from hcmen.training.checkpoint import load_checkpoint
from hcmen.training.presets import Preset
from hcmen.training.settings import read_settings

OTHERS = ("--mix", "mixup", "--epochs", 2, "--set", "modality_drop_probability=0.3", "--seed", 9, "--batch-size", 7)


@pytest.fixture(autouse=True)
def micro(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from on_one_thread(monkeypatch)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with settings of its own, on a file; not to be changed."""
    folder = tmp_path_factory.mktemp("written")
    write_synthetic(folder / "set.pkl", make_synthetic(MICRO.inputs, SAMPLES, 1))
    with pytest.MonkeyPatch.context() as patch:
        make_micro(patch)
        assert command("--data", folder / "set.pkl", *OTHERS, "--out", folder / "run", "--threads", 1, "-q") == 0
    return folder / "run"


@pytest.mark.parametrize("place", ["", "config.json"])
def test_the_same_run_again(
    written: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The file is all that it takes: presets may have changed since.
    other = Preset("tiny", "", dataclasses.replace(MICRO, width=24), dataclasses.replace(TRAIN, epochs=9))
    monkeypatch.setattr(train, "preset_named", lambda name: other)
    assert command("--config", written / place, "--out", tmp_path / "again") == 0
    assert result(tmp_path / "again") == result(written)
    notes = capsys.readouterr().err.splitlines()
    assert notes[0] == f"settings of {written / 'config.json'}"


def test_the_same_run_of_the_synthetic_set(tmp_path: Path) -> None:
    assert command("--out", tmp_path / "run", "-q", "--seed", 4) == 0
    assert command("--config", tmp_path / "run", "--out", tmp_path / "again", "-q") == 0
    assert result(tmp_path / "again") == result(tmp_path / "run")


def test_the_same_runs_of_several_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--seeds", "3,1", "--learning-rate", 2e-3, "--out", tmp_path / "run", "-q") == 0
    assert command("--config", tmp_path / "run", "--out", tmp_path / "again", "-q") == 0
    for seed in (3, 1):
        assert result(tmp_path / "again" / f"seed-{seed}") == result(tmp_path / "run" / f"seed-{seed}")
    assert json.loads((tmp_path / "again" / "run.json").read_text()) == json.loads(
        (tmp_path / "run" / "run.json").read_text()
    )
    # One of its seeds; and of one run's settings, several.
    assert command("--config", tmp_path / "run" / "run.json", "--seed", 1, "--out", tmp_path / "one", "-q") == 0
    assert result(tmp_path / "one") == result(tmp_path / "run" / "seed-1")
    assert command("--config", tmp_path / "one", "--seeds", "3", "--out", tmp_path / "three", "-q") == 0
    assert result(tmp_path / "three" / "seed-3") == result(tmp_path / "run" / "seed-3")
    capsys.readouterr()


def test_a_text_encoder_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    model = dataclasses.replace(MICRO, text=FeatureConfig(32, 12))
    monkeypatch.setattr(train, "preset_named", lambda name: Preset("tiny", "", model, TRAIN))
    berts = [write_bert(tmp_path / name, 32, seed=seed) for seed, name in enumerate(("bert", "bert2"))]
    arguments = ("--text-encoder-learning-rate", 0, "-q")
    assert command("--text-encoder", berts[0], *arguments, "--out", tmp_path / "run") == 0
    assert command("--config", tmp_path / "run", "-q", "--out", tmp_path / "again") == 0
    assert result(tmp_path / "again") == result(tmp_path / "run")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (tmp_path / "run" / "tokenizer.json").read_bytes()
    capsys.readouterr()
    # Another one, by option; none, where the file does not say.
    assert command("--config", tmp_path / "run", "--text-encoder", berts[1], "--out", tmp_path / "other") == 0
    assert f"but for --text-encoder {berts[1]} (there {berts[0]})" in capsys.readouterr().err
    assert result(tmp_path / "other")["checkpoint"] != result(tmp_path / "run")["checkpoint"]
    settings = edited(tmp_path / "run", tmp_path, run={"preset": "tiny"})
    assert command("--config", settings, "--out", tmp_path / "none", "-q") == 2
    assert "does not say where the text encoder came from: name it with --text-encoder" in capsys.readouterr().err


def test_the_command_line_wins_and_that_is_said(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        command("--config", written, "--epochs", 1, "--mix", "mixup", "--set", "weight_decay=0", "--out", tmp_path) == 0
    )
    note = capsys.readouterr().err.splitlines()[0]
    assert note.endswith(", but for --epochs 1 (there 2), --set weight_decay 0.0 (there 0.0001)")
    _, config = load_checkpoint(tmp_path)
    before = json.loads((written / "config.json").read_text())
    assert config["train"] == {**before["train"], "epochs": 1, "weight_decay": 0.0}
    assert config["model"] == before["model"]


def test_other_data_of_the_same_sizes(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_synthetic(tmp_path / "other.pkl", make_synthetic(MICRO.inputs, SAMPLES, 2))
    assert command("--config", written, "--data", tmp_path / "other.pkl", "--out", tmp_path / "run") == 0
    assert f"but for --data {tmp_path / 'other.pkl'} (there " in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "run")[1]["run"]["data"] == str(tmp_path / "other.pkl")


@pytest.mark.parametrize(
    "change",
    [{"features": 9}, {"max_steps": 40}],
)
def test_a_model_that_does_not_fit_the_data(
    written: Path, tmp_path: Path, change: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    audio = dataclasses.replace(MICRO.inputs.modality("audio"), **change)
    inputs = dataclasses.replace(MICRO.inputs, audio=audio)
    write_synthetic(tmp_path / "other.pkl", make_synthetic(inputs, SAMPLES, 2))
    arguments = ("--config", written, "--data", tmp_path / "other.pkl", "--out", tmp_path / "run")
    assert command(*arguments) == 2
    error = capsys.readouterr().err.splitlines()
    assert len([line for line in error if line.startswith("error: ")]) == 1
    assert "steps at most, as the model of" in error[-1]
    assert "of audio" in error[-1]
    # A preset takes the data's sizes, and the rest of the file stays.
    assert command(*arguments, "--preset", "mosi", "-q") == 0
    _, config = load_checkpoint(tmp_path / "run")
    assert config["model"]["audio"] == dataclasses.asdict(audio)
    assert config["train"] == json.loads((written / "config.json").read_text())["train"]


def edited(written: Path, tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "run.json"
    found = {**json.loads((written / "config.json").read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in found.items() if v != "gone"}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trian": {}}, "unknown key 'trian': did you mean 'train'?"),
        ({"schema_version": 2}, "schema_version is 2, expected 1"),
        ({"schema_version": "gone"}, "schema_version is None, expected 1"),
        ({"train": "gone"}, "'train' is None, expected an object"),
        ({"model": []}, "'model' is [], expected an object"),
        ({"train": {"epoch": 3}}, "unknown config key 'epoch', did you mean 'epochs'?"),
        ({"train": {"epochs": "3"}}, "config key 'epochs' is '3', expected int"),
        ({"train": {"epochs": True}}, "config key 'epochs' is True, expected int"),
        ({"train": {"epochs": 0}}, "epochs is 0, expected 1 to"),
        ({"model": {"text": {"features": 3, "max_steps": 4}, "audio": 3}}, "expected"),
        ({"kind": "hcmne"}, "unknown model kind 'hcmne': did you mean 'hcmen'?"),
        ({"kind": 3}, "the model kind is 3, expected a name"),
        ({"run": {"presets": "tiny"}}, "unknown key 'run.presets': choose from preset, data, text_encoder"),
        ({"run": {"data": 3}}, "'run.data' is 3, expected a string or null"),
        ({"run": None}, "'run' is None, expected an object"),
        ({"run": {"preset": "moso", "data": None}}, "unknown preset 'moso'"),
        ({"run": {}}, "does not say which preset's synthetic set it was trained on: name it with --preset"),
        ({"seeds": [1, 1]}, "'seeds' is [1, 1], expected a list of different numbers"),
        ({"seeds": [1.0]}, "'seeds' is [1.0]"),
        ({"seeds": 4}, "'seeds' is 4"),
        ({"run": {"data": "/nowhere/set.pkl"}}, "/nowhere/set.pkl"),
    ],
)
def test_what_is_wrong_is_one_line(
    written: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.undo()  # for the presets' own names
    assert command("--config", edited(written, tmp_path, **changes), "--out", tmp_path / "out", "-q") == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert message in error
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", CorruptFileError, "not valid JSON"),
        (b"[]", InputError, r"holds \[\], expected an object of settings"),
        (b'{"train": {}, "train": {}}', CorruptFileError, "key 'train' is there twice"),
        (b'{"schema_version": 1e999}', CorruptFileError, "is not a finite number"),
        (b"[" * 100_000, CorruptFileError, "lists, objects and keys|nested too deeply"),
    ],
)
def test_what_are_no_settings(tmp_path: Path, content: bytes, error: type[HcmenError], message: str) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(error, match=message):
        read_settings(tmp_path / "run.json")


def test_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in (tmp_path, tmp_path / "no.json"):
        assert command("--config", place, "--out", tmp_path / "out") == 2
        assert "expected settings that hcmen-train wrote" in capsys.readouterr().err
    assert command("--config", tmp_path, "--resume") == 2
    assert "--resume goes on with the settings of the run in --out" in capsys.readouterr().err


def test_a_checkpoint_of_before(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It names the data, and no more."""
    assert command("--config", edited(written, tmp_path, run="gone"), "--out", tmp_path / "again", "-q") == 0
    again, before = result(tmp_path / "again"), result(written)
    assert again["checkpoint"] == before["checkpoint"]
    assert again["log"] == before["log"]
    dataset = {"name": "synthetic", "label_min": -3.0, "label_max": 3.0, "samples": {}}
    settings = edited(written, tmp_path, run="gone", dataset=dataset)
    assert command("--config", settings, "--out", tmp_path / "made", "-q") == 2
    assert "name it with --preset" in capsys.readouterr().err
    assert command("--config", settings, "--preset", "tiny", "--out", tmp_path / "made", "-q") == 0
