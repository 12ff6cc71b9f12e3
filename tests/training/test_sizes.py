"""hcmen-train takes features and steps from the data; a preset gives architecture, settings and label range."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from helpers.command import Outcome, run
from helpers.micro import MICRO

from hcmen.base.inputs import FeatureConfig
from hcmen.base.modalities import MODALITIES
from hcmen.data.convert import main as hcmen_convert
from hcmen.data.layout import Sizes
from hcmen.data.synthetic import make_synthetic, write_synthetic
from hcmen.training import command
from hcmen.training.checkpoint import load_checkpoint
from hcmen.training.config import TrainConfig
from hcmen.training.presets import PRESETS, Preset, preset_for

PUBLISHED = ("mosi", "mosei", "sims", "simsv2", "tiny")
OTHER = {"text": FeatureConfig(7, 11), "audio": FeatureConfig(25, 51), "vision": FeatureConfig(3, 17)}


@pytest.fixture(autouse=True)
def micro(monkeypatch):
    """Every preset is small and quick, and keeps its name and its label range."""

    def small(name: str) -> Preset:
        inputs = PRESETS[name].model.inputs
        model = dataclasses.replace(MICRO, label_min=inputs.label_min, label_max=inputs.label_max)
        return dataclasses.replace(PRESETS[name], model=model, train=TrainConfig(epochs=1, batch_size=10))

    monkeypatch.setattr(command, "preset_named", small)


@pytest.fixture
def data():
    """A data set of sizes that no preset has."""
    return make_synthetic(dataclasses.replace(MICRO, **OTHER).inputs, (12, 8, 8))


def trained(data: Path, out: Path, *arguments: str) -> Outcome:
    return run(command.main, "--data", data, "--out", out, "--threads", 1, *arguments)


def sizes(low: float, high: float, **modalities: FeatureConfig) -> Sizes:
    return Sizes({**OTHER, **modalities}, low, high)


@pytest.mark.parametrize("name", PUBLISHED)
def test_data_of_the_features_of_a_preset_gets_it_whatever_its_steps(name):
    inputs = PRESETS[name].model.inputs
    found = {m: FeatureConfig(inputs.modality(m).features, 7) for m in MODALITIES}
    assert preset_for(Sizes(found, inputs.label_min, inputs.label_max)) == (name, "features")


def test_other_data_gets_a_preset_by_its_modalities():
    assert preset_for(sizes(-1, 1)) == ("own", "modalities")
    mosei = {m: PRESETS["mosei"].model.inputs.modality(m) for m in MODALITIES}
    assert preset_for(sizes(-3, np.float32(3.00001), **mosei)) == ("mosei", "features")
    assert preset_for(sizes(-9, 9, **mosei)) == ("own", "modalities")
    assert preset_for(Sizes({"audio": mosei["audio"], "vision": mosei["vision"]}, -3, 3)) == ("own", "modalities")
    assert preset_for(Sizes({"text": mosei["text"]}, -3, 3)) == ("words", "modalities")
    assert preset_for(Sizes({}, -3, 3, token_steps=9)) == ("words", "modalities")
    assert preset_for(Sizes({"audio": mosei["audio"]}, -3, 3, token_steps=9)) == ("own", "modalities")


@pytest.mark.parametrize("form", ["pickle", "folder"])
@pytest.mark.parametrize("preset", [None, "mosei"])
def test_sizes_are_those_of_the_data(data, tmp_path, form, preset):
    # Splits that are padded to different lengths have the longest of them.
    for key in ("audio", "vision"):
        data["valid"][key] = data["valid"][key][:, :-2]
        data["valid"][f"{key}_lengths"] = np.minimum(data["valid"][f"{key}_lengths"], data["valid"][key].shape[1])
    write_synthetic(tmp_path / "set.pkl", data)
    source = tmp_path / "set.pkl"
    if form == "folder":
        source = tmp_path / "set"
        assert run(hcmen_convert, tmp_path / "set.pkl", source).code == 0
    done = trained(source, tmp_path / "out", *(["--preset", preset] if preset else []))
    assert done.code == 0, done.err
    model, described = load_checkpoint(tmp_path / "out")
    assert {m: model.config.modality(m) for m in MODALITIES} == OTHER
    assert (model.config.width, model.config.label_max) == (MICRO.width, 3.0)
    assert described["dataset"]["name"] == str(source)
    assert done.lines[0] == (
        f"sizes from {source}: text 7 features, 11 steps; audio 25 features, 51 steps; vision 3 features, 17 steps"
    )
    settings = "its architecture, training settings and label range -3 to 3"
    chosen = "" if preset else ", chosen by the modalities of the data; --preset names another"
    assert done.lines[1] == f"preset {preset or 'own'}: {settings}{chosen}"
    assert run(command.main, "--resume", "--data", source, "--out", tmp_path / "out").code == 0


def test_labels_beyond_the_range_are_refused(data, tmp_path):
    data["test"]["regression_labels"][0] = 5
    write_synthetic(tmp_path / "set.pkl", data)
    done = trained(tmp_path / "set.pkl", tmp_path / "out", "--preset", "mosi")
    assert done.code == 2
    assert "test: the label of sample 0 is 5, expected -3 to 3" in done.lines[-1]


def test_splits_of_different_features_are_refused(data, tmp_path):
    data["test"]["audio"] = data["test"]["audio"][..., :24]
    write_synthetic(tmp_path / "set.pkl", data)
    done = trained(tmp_path / "set.pkl", tmp_path / "out")
    assert done.code == 2
    assert len(done.lines) == 1
    assert "audio has 25 in train, 25 in valid, 24 in test features per step" in done.err
