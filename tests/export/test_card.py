"""What a bundle says to people: the scores that its checkpoint reached, and the model card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.small_bundle import make_bundle

from hcmen.base.bundle import read_bundle
from hcmen.base.errors import CorruptFileError, InputError
from hcmen.base.inputs import FeatureConfig, Inputs, TokenConfig
from hcmen.base.manifest import ModelRecord, Score
from hcmen.export.card import card, scores_of

ABOUT = {"epoch": 3, "dataset": {"name": "mosi.pkl"}, "validation": {"mae": 0.8, "mae_by_variant": {"full": 0.75}}}
REPORT = {
    "epoch": 3,
    "validation_mae": 0.8,
    "test": {"full": {"hcmen": {"mae": 0.7, "corr": None}, "floor": {"mae": 1.4, "corr": 0.0}}},
}
VALID = Score("mosi.pkl", "valid", "variants", "full", {"mae": 0.75})
TEST = Score("mosi.pkl", "test", "variants", "full", {"mae": 0.7})


def test_scores_are_those_of_this_checkpoint(tmp_path: Path):
    assert scores_of(tmp_path, ABOUT) == (VALID,)
    assert scores_of(tmp_path, {}) == ()
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    assert scores_of(tmp_path, ABOUT) == (VALID, TEST)
    for change in ({"epoch": 2}, {"validation_mae": 0.81}):
        (tmp_path / "report.json").write_text(json.dumps({**REPORT, **change}))
        assert scores_of(tmp_path, ABOUT) == (VALID,)


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 100_000, json.dumps({**REPORT, "test": {"full": {}}})])
def test_a_damaged_report_is_named(tmp_path: Path, content: str):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(CorruptFileError, match=r"report\.json: no report of hcmen-train.*remove it, or train again"):
        scores_of(tmp_path, ABOUT)


@pytest.mark.parametrize("part", ["dataset", "validation"])
@pytest.mark.parametrize("value", [None, [], 1.5, "x"])
def test_a_damaged_configuration_is_named(tmp_path: Path, part: str, value: object):
    with pytest.raises(CorruptFileError, match=r"config\.json does not describe a training .*: train again"):
        scores_of(tmp_path, {**ABOUT, part: value})


def test_a_report_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def denied(path: Path, most: int) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    monkeypatch.setattr("hcmen.export.card.read_small", denied)
    with pytest.raises(
        InputError, match=r"report\.json: permission denied, expected a report of hcmen-train: check its owner"
    ):
        scores_of(tmp_path, ABOUT)


def test_the_card_tells_what_the_manifest_says(tmp_path: Path):
    parity = {"passed": True, "outputs": {"score": {"max_abs": 2e-6}}}
    path = make_bundle(tmp_path / "b", ("full", "text_only"), scores=(VALID, TEST), model=ModelRecord("hcmen", {}))
    manifest = read_bundle(path).manifest
    for record in manifest.variants.values():
        object.__setattr__(record, "parity", parity)
    text = card(manifest)
    assert "a score from -3 (negative) to 3 (positive)" in text
    assert "| audio | 3 | 20 |" in text
    assert "| variant | graph | parity with the eager model | MAE, mosi.pkl, valid | MAE, mosi.pkl, test |" in text
    assert "KiB | score within 2.0e-06 | 0.750 | 0.700 |\n" in text
    assert f"weights sha256 {manifest.weights.sha256}" in text
    assert f"checkpoint sha256 {'0' * 64}, epoch 1" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables[5:]} == {6}
    words = Inputs(FeatureConfig(6, 12), FeatureConfig(3, 20), FeatureConfig(4, 15), TokenConfig(99, 2, 1))
    object.__setattr__(manifest, "inputs", words)
    assert "| text | token ids below 99 | 12 |" in card(manifest)
