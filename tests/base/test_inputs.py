"""What a model takes and gives: JSON both ways, and manifests of schema 1, which held one model's configuration."""

from __future__ import annotations

import copy
import json
import zipfile
from pathlib import Path

import pytest

from hcmen.base.bundle import read_bundle
from hcmen.base.errors import CorruptFileError, InputError
from hcmen.base.inputs import OUTPUTS, FeatureConfig, Inputs, TensorSpec, TokenConfig
from hcmen.base.manifest import Manifest
from hcmen.base.modalities import VARIANTS
from hcmen.runtime import load

PLAIN = Inputs(FeatureConfig(6, 10), FeatureConfig(3, 16), FeatureConfig(4, 16))
WORDS = Inputs(
    FeatureConfig(32, 20),
    FeatureConfig(5, 40),
    FeatureConfig(20, 32),
    TokenConfig(30522, 2, 100),
    -1.0,
    1.0,
    "sad",
    "glad",
    (*OUTPUTS, TensorSpec("arousal", "float32", ("batch",))),
)


@pytest.mark.parametrize("inputs", [PLAIN, WORDS], ids=["features", "tokens"])
def test_json_both_ways(inputs):
    document = json.loads(json.dumps(inputs.to_json()))
    assert Inputs.from_json(document) == inputs
    for key in document:
        with pytest.raises(InputError, match=f"'{key}' is missing"):
            Inputs.from_json({k: x for k, x in document.items() if k != key})
    with pytest.raises(InputError, match="unknown config key 'vison', did you mean 'vision'"):
        Inputs.from_json({**document, "vison": {}})
    for bad in (None, [], "x", 1):
        with pytest.raises(InputError):
            Inputs.from_json(bad)


def test_the_inputs_of_a_graph():
    assert [(t.name, t.dtype, t.shape) for t in PLAIN.of_variant("text_missing")] == [
        ("audio", "float32", ("batch", "audio_time", 3)),
        ("audio_length", "int64", ("batch",)),
        ("vision", "float32", ("batch", "vision_time", 4)),
        ("vision_length", "int64", ("batch",)),
    ]
    assert [(t.name, t.dtype, t.shape) for t in WORDS.of_variant("text_only")] == [
        ("text_tokens", "int64", ("batch", 3, "text_time"))
    ]
    with pytest.raises(InputError, match="unknown variant"):
        PLAIN.of_variant("all")
    with pytest.raises(InputError, match="unknown modality 'smell'"):
        PLAIN.modality("smell")


# --- schema 1 -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle as it was exported while there was one model and schema 1."""
    path = tmp_path_factory.mktemp("schema1")
    with zipfile.ZipFile(Path(__file__).resolve().parents[1] / "files" / "schema1_bundle.zip") as archive:
        archive.extractall(path)
    return path


def test_a_bundle_of_schema_1_is_run(old: Path):
    document = json.loads((old / "manifest.json").read_text())
    assert document["schema_version"] == 1
    model = load(old)
    assert model.inputs == PLAIN
    tests = list(model.self_test())
    assert [(t.variant, t.passed) for t in tests] == [(v.name, True) for v in VARIANTS]
    manifest = model.bundle.manifest
    assert (manifest.model.kind, dict(manifest.model.config)) == ("hcmen", document["model"])
    assert (manifest.scores, manifest.front_ends) == ((), {})
    # What it is read as is a manifest of schema 2, to be written and read again.
    again = manifest.to_json()
    assert again["schema_version"] == 2
    assert Manifest.from_json(json.loads(json.dumps(again))) == manifest
    for key in document.keys() - {"schema_version", "model", "label_range"}:
        assert again[key] == document[key]


def test_schema_1_is_read_as_strictly(old: Path):
    document = json.loads((old / "manifest.json").read_text())

    def refused(match: str, **changes) -> None:
        with pytest.raises(CorruptFileError, match=match) as caught:
            Manifest.from_json({**copy.deepcopy(document), **changes})
        assert "\n" not in str(caught.value)

    refused("unknown key 'inputs'", inputs=document["model"])
    refused("unknown key 'surprise'", surprise=1)
    refused("'model' is a list", model=[])
    refused(r"'model\.text' is missing", model={})
    refused("expected two finite numbers in rising order", label_range=[1, 1])
    refused("'label_range' is not a list of 2 numbers", label_range=[1])
    refused(r"'model\.text_encoder' is an integer", model={**document["model"], "text_encoder": 3})
    refused(r"'model\.text_encoder\.vocabulary' is missing", model={**document["model"], "text_encoder": {}})
    refused("config key 'features' is 'x'|audio.features", model={**document["model"], "audio": {"features": "x"}})
    for key in document:
        with pytest.raises((CorruptFileError, InputError)):
            Manifest.from_json({k: x for k, x in document.items() if k != key})


def test_text_tokens_of_schema_1(old: Path):
    """They were in the configuration of the text encoder, whose sizes could be left to their defaults."""
    document = json.loads((old / "manifest.json").read_text())
    document["model"]["text_encoder"] = {
        "vocabulary": 1000,
        "layers": 2,
        "heads": 2,
        "intermediate": 8,
        "positions": 10,
    }
    with pytest.raises(CorruptFileError, match=r"inputs' is text float32 .* expected text_tokens int64"):
        Manifest.from_json(document)  # the graphs take features
    document["variants"] = {"audio_only": document["variants"]["audio_only"]}
    assert Manifest.from_json(document).inputs.text_tokens == TokenConfig(1000, 2, 100)


def test_a_schema_of_the_future_says_what_to_do(old: Path, tmp_path: Path):
    document = json.loads((old / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**document, "schema_version": 3}))
    with pytest.raises(InputError, match=r"schema_version is 3, expected 1 or 2: upgrade hcmen") as caught:
        read_bundle(tmp_path)
    assert "\n" not in str(caught.value)
