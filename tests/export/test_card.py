"""What a bundle says to people: the scores that its checkpoint reached, and the model card."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.small_bundle import INPUTS, make_bundle

from hcmen.base.bundle import read_bundle
from hcmen.base.errors import CorruptFileError, InputError
from hcmen.base.inputs import FeatureConfig, Inputs, TokenConfig
from hcmen.base.manifest import FrontEnd, Manifest, ModelRecord, Score
from hcmen.base.metrics import HEADLINE_ACC2
from hcmen.export.card import card, quoted
from hcmen.export.trained import Trained, trained

ABOUT: dict[str, Any] = {
    "epoch": 3,
    "dataset": {"name": "mosi.pkl", "samples": {"train": 1284, "valid": 229, "test": 686}},
    "validation": {"mae": 0.8, "mae_by_variant": {"full": 0.75}},
    "train": {"seed": 7},
}
FLOOR = {"mae": 1.4, "corr": 0.0, "acc2_non0": 0.6}
LINEAR = {"mae": 0.69, "corr": 0.7, "acc2_non0": 0.8}
REPORT = {
    "epoch": 3,
    "validation_mae": 0.8,
    "test": {"full": {"hcmen": {"mae": 0.7, "corr": None, "acc2_non0": 0.81}, "floor": FLOOR, "linear": LINEAR}},
}
VALID = Score("mosi.pkl", "valid", "variants", "full", {"mae": 0.75})
TEST = Score("mosi.pkl", "test", "variants", "full", {"mae": 0.7, "acc2_non0": 0.81})


def made(folder: Path, training: Trained | None = None, **changes: Any) -> tuple[Manifest, Trained]:
    """The manifest of a bundle of three variants, as it would be exported."""
    training = training or Trained("mosi.pkl", scores=(VALID, TEST))
    path = make_bundle(
        folder / "b", ("full", "text_only", "audio_only"), scores=training.scores, model=ModelRecord("hcmen", {})
    )
    manifest = read_bundle(path).manifest
    parity = {"passed": True, "outputs": {"score": {"max_abs": 2e-6}}}
    variants = {name: dataclasses.replace(v, parity=parity) for name, v in manifest.variants.items()}
    return dataclasses.replace(manifest, **{"variants": variants, **changes}), training


def test_scores_are_those_of_this_checkpoint(tmp_path: Path) -> None:
    assert trained(tmp_path, ABOUT) == Trained("mosi.pkl", ABOUT["dataset"]["samples"], 7, (VALID,))
    assert trained(tmp_path, {}) == Trained()
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    found = trained(tmp_path, ABOUT)
    assert found.scores == (VALID, TEST)
    assert found.baselines == {("full", "floor"): FLOOR, ("full", "linear"): LINEAR}
    for change in ({"epoch": 2}, {"validation_mae": 0.81}):
        (tmp_path / "report.json").write_text(json.dumps({**REPORT, **change}))
        assert trained(tmp_path, ABOUT).scores == (VALID,)
        assert not trained(tmp_path, ABOUT).baselines


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        json.dumps({**REPORT, "test": {"full": {}}}),
        json.dumps({**REPORT, "test": {"full": {"hcmen": {}, "floor": []}}}),
        *(
            json.dumps({**REPORT, "unheard": unheard})
            for unheard in (
                [],
                {"full": "text"},
                {"full": ["smell"]},
                {"text_only": ["text"]},
                {"ful": ["text"]},
                {"full": [[]]},
            )
        ),
    ],
)
def test_a_damaged_report_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(CorruptFileError, match=r"report\.json: no report of hcmen-train.*remove it, or train again"):
        trained(tmp_path, ABOUT)


@pytest.mark.parametrize("part", ["dataset", "validation", "train"])
@pytest.mark.parametrize("value", [None, [], 1.5, "x"])
def test_a_damaged_configuration_is_named(tmp_path: Path, part: str, value: object) -> None:
    with pytest.raises(CorruptFileError, match=r"config\.json does not describe a training .*: train again"):
        trained(tmp_path, {**ABOUT, part: value})


@pytest.mark.parametrize("samples", [3, "abc", {"train": -1}, {"train": 1.5}, {"train": True}, {"test": [1]}])
def test_damaged_counts_are_named(tmp_path: Path, samples: object) -> None:
    with pytest.raises(CorruptFileError, match=r"config\.json does not describe a training .*: train again"):
        trained(tmp_path, {**ABOUT, "dataset": {"name": "x", "samples": samples}})
    with pytest.raises(CorruptFileError, match=r"a count or seed is '7'"):
        trained(tmp_path, {**ABOUT, "train": {"seed": "7"}})


def test_the_card_says_what_is_not_listened_to(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({**REPORT, "unheard": {"full": ["vision"]}}))
    manifest, training = made(tmp_path, trained(tmp_path, ABOUT))
    assert training.unheard == {"full": ("vision",)}
    assert "- full does not listen to vision: the validation error was lower without.\n" in card(manifest, training)


def test_a_report_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path, most: int) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    monkeypatch.setattr("hcmen.export.trained.read_small", denied)
    with pytest.raises(
        InputError, match=r"report\.json: permission denied, expected a report of hcmen-train: check its owner"
    ):
        trained(tmp_path, ABOUT)


def test_the_card_tells_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    manifest, training = made(tmp_path, trained(tmp_path, ABOUT))
    text = card(manifest, training)
    assert "a score from -3 (negative) to 3 (positive) from text, audio and vision." in text
    assert "- trained on `mosi.pkl`\n- samples: 1284 training, 229 validation, 686 test\n- labels from -3 to 3" in text
    assert "The checkpoint is that of epoch 1 of one training run, seed 7. It is the one of the lowest mean" in text
    assert "hcmen-train scored it on the test split once, after that choice." in text
    assert (
        "### `mosi.pkl`, validation split, 229 samples\n\n| variant | MAE |\n| --- | ---: |\n| full | 0.750 |\n" in text
    )
    test = text[text.index("### `mosi.pkl`, test split, 686 samples") :].splitlines()
    assert (
        test[2] == "| variant | MAE | MAE, floor | MAE, linear | Corr, linear | Acc-2 | Acc-2, floor | Acc-2, linear |"
    )
    assert test[4] == "| full | 0.700 | 1.400 | 0.690 | 0.700 | 0.810 | 0.600 | 0.800 |"
    assert "for Acc-2. The model's MAE is better in every variant that has both." in test[6]
    assert "The model's MAE is not better in full." in test[7]
    assert test[8] == "- Acc-2: labels below the neutral one against labels above it, those on it left out."
    assert "| audio | 3 | 20 |" in text
    assert "KiB | score within 2.0e-06 |\n" in text
    assert f"sha256 {manifest.weights.sha256}" in text
    assert f"checkpoint sha256 {'0' * 64}, epoch 1" in text
    assert "hcmen-run --self-test --bundle FOLDER" in text
    assert "synthetic" not in text
    assert max(len(line) for line in text.splitlines()) < 400


def test_what_it_must_not_be_used_for_is_said(tmp_path: Path) -> None:
    text = " ".join(card(*made(tmp_path)).split())
    assert "It is no measure of what a person feels." in text
    for said in ("Clinical decisions", "hiring", "Law enforcement", "Surveillance", "Regulation (EU) 2024/1689"):
        assert said in text
    assert (
        "prohibits systems that infer emotions of people at work and in education, except for medical or safety" in text
    )
    assert "Article 5(1)(f)" in text
    assert "Annex III" in text
    assert "Article 50(3)" in text


def test_nothing_is_claimed_that_is_not_known(tmp_path: Path) -> None:
    manifest, training = made(tmp_path, Trained())
    text = card(manifest, training)
    assert "- trained on a data set without a name\n- labels from" in text
    assert "of one training run. How it was chosen is not recorded. It was not scored on a test split." in text
    assert text.count("what made its features is not recorded") == 3
    for claim in ("samples:", "seed 0", "lowest", "once", "###", "floor", "better", "license", "model-index", "nan"):
        assert claim not in text
    # Without one of the baselines, or of the measures, nothing is said of it.
    partly = Trained("mosi.pkl", scores=(TEST,))
    assert "better" not in card(*made(tmp_path / "c", partly))
    partly = Trained("mosi.pkl", scores=(TEST,), baselines={("full", "floor"): {"mae": 1.4}})
    text = card(*made(tmp_path / "d", partly))
    assert "| variant | MAE | MAE, floor | Acc-2 |" in text
    assert "Linear" not in text


def test_a_model_without_a_modality_is_told_as_it_is(tmp_path: Path) -> None:
    tokens = Inputs(FeatureConfig(6, 12), None, None, TokenConfig(99, 2, 1), label_min=1.0, label_max=5.0)
    manifest, training = made(tmp_path)
    only = {"text_only": manifest.variants["text_only"]}
    front = FrontEnd("tokenizer", {"lowercase": True}, "a" * 64)
    text = card(dataclasses.replace(manifest, inputs=tokens, variants=only, front_ends={"text": front}), training)
    assert "a score from 1 (negative) to 5 (positive) from text alone." in text
    assert "| text | token ids below 99 | 12 |" in text
    assert "- The model has no audio and no vision: it was trained without." in text
    assert "- A text encoder is part of the weights. Its licence" in text
    assert f'- text: made by tokenizer, settings `{{"lowercase": true}}`, sha256 {"a" * 64}' in text
    assert "| audio" not in text
    assert "- audio" not in text
    assert "missing-modality" not in text
    assert "text, audio" not in text


def test_every_data_set_that_has_scores_has_a_table(tmp_path: Path) -> None:
    other = Score("/home/me/sims", "test", "variants", "text_only", {"mae": 0.4, "acc2": 0.7})
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    manifest, training = made(tmp_path, trained(tmp_path, ABOUT))
    text = card(dataclasses.replace(manifest, scores=(*manifest.scores, other)), training)
    assert re.findall("^### .*", text, re.M) == [
        "### `mosi.pkl`, validation split, 229 samples",
        "### `mosi.pkl`, test split, 686 samples",
        "### sims, test split",
    ]
    assert "| text_only | 0.400 | 0.700 |" in text
    assert "Scores on a data set that it was not trained on" in text
    assert "/home" not in text


def test_every_accuracy_that_is_quoted_first_is_explained(tmp_path: Path) -> None:
    for measure in set(HEADLINE_ACC2.values()):
        baselines = {("full", "floor"): {"mae": 1.4, measure: 0.6}}
        training = Trained("x", scores=(Score("x", "test", "variants", "full", {"mae": 0.7, measure: 0.8}),))
        text = card(*made(tmp_path / measure, dataclasses.replace(training, baselines=baselines)))
        assert "| variant | MAE | MAE, floor | Acc-2 | Acc-2, floor |" in text
        assert "\n- Acc-2: labels " in text


def test_a_reduced_precision_is_told_with_what_it_moved(tmp_path: Path) -> None:
    manifest, training = made(tmp_path, precision="int8")
    v = manifest.variants["full"]
    moved = dataclasses.replace(v, parity={**v.parity, "metric": {"change": 0.0042}})
    text = card(dataclasses.replace(manifest, variants={**manifest.variants, "full": moved}), training)
    assert "- The scores are those of the model in float32, and the graphs are int8." in text
    assert "| variant | graph | parity with the eager model | MAE moved on validation clips |" in text
    assert "| score within 2.0e-06 | +0.42% |" in text
    assert "| score within 2.0e-06 |  |" in text


HOSTILE = [
    "[click](https://evil.example)",
    "<script>alert(1)</script>",
    "` <img src=x onerror=alert(1)>",
    "``` \n# Heading\n\n- list",
    "a | b | c",
    "https://evil.example/x y",
    "www.evil.example",
    "me@evil.example",
    "![x](//evil.example/x)",
    "**bold** _it_ ~~no~~",
    "\u202egnp.exe\u2066",
    "---\nlicense: mit\n---",
    "&lt;b&gt; \\` \\",
    "x" * 900,
    "\x1b[31m\r\n\t\v",
    "1. one\n2. two",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_acts_in_the_card(tmp_path: Path, name: str) -> None:
    markdown = pytest.importorskip("markdown_it").MarkdownIt("gfm-like" if _linkify() else "commonmark").enable("table")
    scores = (Score(name, "test", "variants", "full", {"mae": 0.7}),)
    hostile, harmless = Trained(name, {name: 5}, 1, scores), Trained("a-b", {"a-b": 5}, 1, scores)
    inputs = dataclasses.replace(INPUTS, label_min_means="<b>*no*</b>|`")
    front = {"audio": FrontEnd(name, {name: name}, None)}
    manifest, _ = made(tmp_path, hostile, inputs=inputs, front_ends=front)
    text = card(manifest, hostile)
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "x" * 150 not in text
    calm = dataclasses.replace(
        manifest,
        inputs=INPUTS,
        front_ends={"audio": FrontEnd("a-b", {"a": "b"}, None)},
        scores=(scores[0]._replace(data="a-b"),),
    )

    def shape(content: str) -> list[str]:
        """Every token of the page but text and code, which do nothing."""
        kinds: list[str] = []
        for token in markdown.parse(content):
            kinds += [child.type for child in token.children or [token] if child.type not in ("text", "code_inline")]
        return kinds

    assert shape(text) == shape(card(calm, harmless))


def _linkify() -> bool:
    try:
        import linkify_it  # noqa: F401
    except ImportError:
        return False
    return True


def test_plain_words_stay_plain() -> None:
    assert quoted("in favour") == "in favour"
    assert quoted("负面") == "负面"
    assert quoted("mosi.pkl") == "`mosi.pkl`"
    assert quoted("") == "`?`"
    assert quoted("a`b|c\nd") == "`a'b/c d`"


def test_the_metadata_is_what_the_hub_reads(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    text = card(*made(tmp_path, trained(tmp_path, {**ABOUT, "dataset": {"name": "---\nlicense: mit"}})))
    found = hub.ModelCard(text)
    assert found.data.to_dict() == {
        "library_name": "hcmen",
        "tags": ["sentiment-analysis", "onnx", "text", "audio", "vision", "missing-modality"],
    }
    assert found.text.lstrip().startswith("# A sentiment model for an edge device: HCMEN\n")


def test_the_card_of_an_export_stays_whole_when_a_variant_is_added(tmp_path: Path) -> None:
    from hcmen.base.modalities import variant_named
    from hcmen.base.shipped import DEMO
    from hcmen.export.bundle import export_bundle

    export_bundle(DEMO / "train", tmp_path / "b", [variant_named("text_only")])
    first = (tmp_path / "b" / "README.md").read_text()
    assert "| text_only | 0.973 | 1.555 | 1.478 |" in first
    assert "| audio_only |" not in first
    export_bundle(DEMO / "train", tmp_path / "b", [variant_named("audio_only")])
    both = (tmp_path / "b" / "README.md").read_text()
    assert "| text_only | 0.973 | 1.555 | 1.478 |" in both
    assert "| audio_only | 1.082 | 1.555 | 1.450 |" in both
    assert "| full |" not in both
