"""Data that lacks modalities: trained on, judged, exported and run as what it is, without a dummy."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers.command import run
from helpers.micro import MICRO
from helpers.tiny_bert import write_bert

from hcmen.base.bundle import read_bundle
from hcmen.base.errors import InputError
from hcmen.base.inputs import FeatureConfig, Inputs
from hcmen.base.manifest import FrontEnd
from hcmen.data.baseline import linear_baseline
from hcmen.data.convert import main as hcmen_convert
from hcmen.data.folder import write_folder
from hcmen.data.layout import open_splits
from hcmen.data.mmsa import dataset_from_mmsa
from hcmen.data.scale import label_scale
from hcmen.data.synthetic import make_synthetic, write_synthetic
from hcmen.evaluation.command import main as hcmen_eval
from hcmen.export.commands.export import main as hcmen_export
from hcmen.models.hcmen.model import HCMEN
from hcmen.models.text_encoder import read_sizes, read_tokenizer
from hcmen.runtime import load
from hcmen.runtime.commands.run import main as hcmen_run
from hcmen.training.command import main as hcmen_train
from hcmen.training.config import LOSSES, TrainConfig
from hcmen.training.evaluate import predict
from hcmen.training.presets import PRESETS
from hcmen.training.trainer import Trainer

HIDDEN = 8
SAMPLES = (24, 12, 16)


class Case(NamedTuple):
    """What a set has, and the variants that follow. tokens: its text is tokens alone."""

    keys: tuple[str, ...]
    variants: tuple[str, ...]
    tokens: bool = False


CASES = {
    "texts": Case((), ("text_only",), tokens=True),
    "texts and sounds": Case(("audio",), ("vision_missing", "text_only", "audio_only"), tokens=True),
    "sounds": Case(("audio",), ("audio_only",)),
    "features and pictures": Case(("text", "vision"), ("audio_missing", "text_only", "vision_only")),
}


@pytest.fixture(autouse=True)
def micro(monkeypatch):
    """Presets of one's own data are small and quick."""
    body = {"width": 8, "tokens": 4, "states": 2, "expand": 1, "alignment_tokens": 2}

    def small(name: str):
        preset = PRESETS[name]
        model = dataclasses.replace(preset.model, **body)
        quick = {"epochs": 2, "batch_size": 10}
        return dataclasses.replace(
            preset, model=model, train=TrainConfig(**quick), with_encoder={**preset.with_encoder, **quick}
        )

    monkeypatch.setattr("hcmen.training.command.preset_named", small)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert") / "bert", HIDDEN)


def data_of(case: Case, bert: Path, low: float = -3.0, high: float = 3.0) -> dict[str, Any]:
    """A synthetic set with what the case has, its labels moved from -3 to 3 to another scale."""
    config = MICRO
    if case.tokens:
        config = dataclasses.replace(MICRO, text=FeatureConfig(HIDDEN, 12), text_encoder=read_sizes(bert)[0])
    data = make_synthetic(config.inputs, SAMPLES, 0)
    kept = {"regression_labels", "id", *case.keys, *(f"{m}_lengths" for m in case.keys)}
    kept |= {"text_bert"} if case.tokens else set()
    for split in data.values():
        for key in set(split) - kept:
            del split[key]
        labels = np.asarray(split["regression_labels"], np.float64)
        split["regression_labels"] = low + (labels + 3) / 6 * (high - low)
    return data


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["pickle", "folder"])
def test_from_data_to_a_score(name, form, bert, tmp_path):
    case = CASES[name]
    data = data_of(case, bert, 1.0, 5.0)
    source = tmp_path / "set.pkl"
    write_synthetic(source, data)
    if form == "folder":
        assert run(hcmen_convert, source, tmp_path / "set").code == 0
        source = tmp_path / "set"
        wanted = {f"{key}{end}.npy" for key in case.keys for end in ("", "_lengths")}
        wanted |= {"regression_labels.npy", "id.json"} | ({"text_bert.npy"} if case.tokens else set())
        assert {path.name for path in (source / "valid").iterdir()} == wanted

    out = tmp_path / "train"
    encoder = ("--text-encoder", bert) if case.tokens else ()
    done = run(hcmen_train, "--data", source, "--out", out, "--threads", 1, *encoder)
    assert done.code == 0, done.err
    there = tuple(m for m in ("text", "audio", "vision") if m in case.keys or (m == "text" and case.tokens))
    preset = "words" if there == ("text",) else "own"
    assert f"preset {preset}: its architecture, training settings and label range 1 to 5, chosen by the" in done.err
    report = json.loads((out / "report.json").read_text())
    assert tuple(report["test"]) == case.variants
    history = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert all(tuple(record["validation"]) == case.variants for record in history)
    said = "beats the floor in MAE and Acc-2 in "
    (line,) = (line for line in done.out.splitlines() if said in line)
    assert all(absent not in line.partition(said)[2] for absent in ("text_missing",))
    assert run(hcmen_train, "--resume", "--out", out, "--threads", 1).code == 0

    bundle = tmp_path / "bundle"
    done = run(hcmen_export, "--checkpoint", out, "--bundle", bundle)
    assert done.code == 0, done.err
    manifest = read_bundle(bundle).manifest
    assert (manifest.inputs.modalities, tuple(manifest.variants)) == (there, case.variants)
    assert set(manifest.normalisation) == set(there)
    assert all(v.parity["passed"] for v in manifest.variants.values())
    assert (manifest.inputs.label_min, manifest.inputs.label_max) == (1.0, 5.0)

    clip = out / "clips" / "000.npz"
    done = run(hcmen_run, clip, "--bundle", bundle, "--self-test", "--format", "json")
    assert done.code == 0, done.err
    (result,) = json.loads(done.out)["results"]
    assert (result["variant"], result["label_min"], result["label_max"]) == (case.variants[0], 1.0, 5.0)
    assert run(hcmen_run, clip, "--bundle", bundle, "--check", "--checkpoint", out).code == 0


@pytest.mark.parametrize("name", CASES)
def test_nothing_of_what_is_absent_is_in_the_model(name, bert):
    case = CASES[name]
    there = {m: getattr(MICRO, m) if m in case.keys else None for m in ("text", "audio", "vision")}
    if case.tokens:
        there |= {"text": FeatureConfig(HIDDEN, 12), "text_encoder": read_sizes(bert)[0]}
    config = dataclasses.replace(MICRO, **there)
    names = dict(HCMEN(config).named_parameters())
    modalities = config.inputs.modalities
    assert {n.split(".")[1] for n in names if n.startswith("encoders.")} == set(modalities)
    assert type(config).from_json(json.loads(json.dumps(config.to_json()))) == config
    assert Inputs.from_json(json.loads(json.dumps(config.inputs.to_json()))) == config.inputs


@pytest.mark.parametrize("absent", ["text", "audio", "vision"])
def test_a_model_of_two_modalities_has_two_streams(absent):
    """Absent for the whole batch or in a sample: the same numbers; what the model lacks weighs nothing."""
    torch.manual_seed(0)
    model = HCMEN(dataclasses.replace(MICRO, **{absent: None})).eval()
    first, second = model.config.inputs.modalities
    sizes = {"text": 6, "audio": 3, "vision": 4}
    features = {m: torch.randn(5, 7, sizes[m]) for m in (first, second)}
    lengths = {m: torch.tensor([7, 1, 3, 4, 5]) for m in (first, second)}
    rows = torch.tensor([[m != absent and not (m == second and i % 2) for m in sizes] for i in range(5)])
    mixed = model(features, lengths, rows)
    whole = model(features, lengths)
    alone = model({first: features[first]}, {first: lengths[first]})
    for got, both, one in zip(mixed, whole, alone, strict=True):
        torch.testing.assert_close(got[0::2], both[0::2])
        torch.testing.assert_close(got[1::2], one[1::2])
    place = list(sizes).index(absent)
    assert not mixed.modality_weights[:, place].any()
    torch.testing.assert_close(mixed.modality_weights.sum(dim=1), torch.ones(5))
    with pytest.raises(InputError, match=f"the model has no {absent}, expected {first} or {second}"):
        model({absent: torch.randn(5, 3, sizes[absent])}, {absent: torch.tensor([1, 2, 3, 3, 3])})


def test_a_model_of_one_modality_has_one_stream():
    torch.manual_seed(0)
    model = HCMEN(dataclasses.replace(MICRO, text=None, vision=None)).eval()
    kinds = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert kinds == {"encoders", "backbone", "norm", "head"}
    x, n = torch.randn(3, 9, 3), torch.tensor([9, 2, 5])
    outputs = model({"audio": x}, {"audio": n})
    tokens = model.encoders["audio"](x, n)
    for block in model.backbone:
        tokens = block(tokens)
    torch.testing.assert_close(outputs.score, model.head(model.norm(tokens).amax(dim=1))[:, 0])
    assert outputs.modality_weights.tolist() == [[0.0, 1.0, 0.0]] * 3


def test_what_hides_nothing_computes_one_view(bert, tmp_path):
    nothing = TrainConfig(epochs=1, step_drop_probability=0.0)
    sounds = dataclasses.replace(MICRO, text=None, vision=None)
    less = dataclasses.replace(nothing, modality_drop_probability=0.0)
    for config, data, train, one in (
        (MICRO, make_synthetic(MICRO.inputs, SAMPLES, 0), nothing, False),
        (MICRO, make_synthetic(MICRO.inputs, SAMPLES, 0), less, True),
        (sounds, data_of(CASES["sounds"], bert), nothing, True),
        (sounds, data_of(CASES["sounds"], bert), TrainConfig(epochs=1), False),
    ):
        dataset = dataset_from_mmsa(data, "synthetic", config.inputs)
        trainer = Trainer(dataclasses.replace(config, dropout=0.0), train, dataset, tmp_path)
        trainer.model.eval()
        rows, split = np.arange(24), dataset.splits["train"]
        clean, corrupted = trainer._views(1, split, rows)
        assert (clean is corrupted) == one
        np.testing.assert_allclose(
            clean.score.detach().numpy(), predict(trainer.model, split, split.variants[0]), atol=1e-5
        )


@pytest.mark.parametrize("loss", LOSSES)
def test_the_error_that_is_learnt_from(loss, tmp_path):
    """The first step's terms, by hand."""
    dataset = dataset_from_mmsa(make_synthetic(MICRO.inputs, SAMPLES, 0), "synthetic", MICRO.inputs)
    config = dataclasses.replace(MICRO, dropout=0.0)
    trainer = Trainer(config, TrainConfig(epochs=1, batch_size=24, loss=loss, alignment_weight=0.0), dataset, tmp_path)
    trainer.model.eval()
    rows = np.arange(24)
    clean, corrupted = trainer._views(1, dataset.splits["train"], rows)
    found = trainer._losses(1, 0, dataset.splits["train"], rows, clean, corrupted)
    labels = torch.from_numpy(dataset.splits["train"].labels)
    away = torch.cat([clean.score - labels, corrupted.score - labels])
    expected = away.abs().mean() if loss == "absolute" else away.square().mean()
    torch.testing.assert_close(found["loss"], expected)


def test_a_clip_brings_more_than_the_model_has(bert, tmp_path):
    data = data_of(CASES["sounds"], bert)
    write_synthetic(tmp_path / "set.pkl", data)
    out, bundle = tmp_path / "train", tmp_path / "bundle"
    assert run(hcmen_train, "--data", tmp_path / "set.pkl", "--out", out, "--threads", 1).code == 0
    assert run(hcmen_export, "--checkpoint", out, "--bundle", bundle).code == 0
    sound = np.random.default_rng(0).standard_normal((9, 3)).astype(np.float32)
    np.savez(tmp_path / "more.npz", audio=sound, vision=np.zeros((1000, 900), np.float32))
    np.savez(tmp_path / "other.npz", vision=np.zeros((3, 4), np.float32))
    done = run(hcmen_run, tmp_path / "more.npz", tmp_path / "other.npz", "--bundle", bundle, "--format", "json")
    assert done.code == 2
    assert f"{tmp_path / 'more.npz'}: variant 'audio_only' ignores vision" in done.err
    assert (
        f"error: {tmp_path / 'other.npz'}: only vision is present, and this model has audio alone: give audio, or use "
        "a bundle trained with vision" in done.err
    )
    (result,) = json.loads(done.out)["results"]
    assert result["score"] == load(bundle)({"audio": sound}).score
    done = run(hcmen_run, "--text", "words", "--bundle", bundle)
    assert (done.code, done.lines) == (
        2,
        ["error: the model has no text, expected audio, which it was trained on"],
    )
    done = run(hcmen_export, "--checkpoint", out, "--bundle", tmp_path / "b2", "--variant", "full")
    assert done.code == 2
    assert done.lines == [
        f"error: {out}: was trained on audio, and 'full' needs text and audio and vision: choose from audio_only"
    ]
    with pytest.raises(InputError, match="a rate of vision was given, expected none: the model has audio alone"):
        load(bundle).stream(window=0.1, hop=0.1, rates={"audio": 100, "vision": 30})


@pytest.mark.parametrize(
    ("protocol", "settings"),
    [("fixed", 3), ("intra", 10), ("random_mr", 6), ("imbalanced", 4)],
)
def test_the_protocols_are_those_of_what_is_there(bert, tmp_path, protocol, settings):
    case = CASES["features and pictures"]
    write_synthetic(tmp_path / "set.pkl", data_of(case, bert))
    out = tmp_path / "train"
    assert run(hcmen_train, "--data", tmp_path / "set.pkl", "--out", out, "--threads", 1).code == 0
    done = run(hcmen_eval, "--checkpoint", out, "--protocol", protocol, "--out", tmp_path / "eval", "--format", "json")
    assert done.code == 0, done.err
    found = json.loads(done.out)["protocols"][protocol]["settings"]
    assert len(found) == settings
    assert all(0 <= s["missing_rate"] <= 0.5 for s in found)
    assert all(set(s["dropped_steps"]) == {"text", "vision"} for s in found)


def test_what_does_not_fit_is_told_in_a_line(bert, tmp_path):
    texts = data_of(CASES["texts"], bert)
    write_synthetic(tmp_path / "texts.pkl", texts)
    done = run(hcmen_train, "--data", tmp_path / "texts.pkl", "--out", tmp_path / "a")
    assert done.code == 2
    assert done.lines == [
        f"error: {tmp_path / 'texts.pkl'}: has its text as tokens alone: name the BERT that reads them with "
        "--text-encoder"
    ]
    sounds = data_of(CASES["sounds"], bert)
    write_synthetic(tmp_path / "sounds.pkl", sounds)
    done = run(hcmen_train, "--data", tmp_path / "sounds.pkl", "--text-encoder", bert, "--out", tmp_path / "a")
    assert done.code == 2
    assert done.lines == [
        f"error: {tmp_path / 'sounds.pkl'}: has no text tokens ('text_bert'), expected what the text encoder reads: "
        "leave it out"
    ]
    for preset in ("words", "own"):
        done = run(hcmen_train, "--preset", preset, "--out", tmp_path / "a")
        assert (done.code, done.lines) == (
            2,
            [f"error: preset {preset} is for data of your own: name it with --data"],
        )
    for split in sounds.values():
        del split["audio"]
    write_synthetic(tmp_path / "nothing.pkl", sounds)
    done = run(hcmen_train, "--data", tmp_path / "nothing.pkl", "--out", tmp_path / "a")
    assert done.code == 2
    assert "train: has none of them, expected text or audio or vision, at least one" in done.err
    assert not list((tmp_path / "a").glob("*"))
    dataset = dataset_from_mmsa(texts, "texts", MICRO.inputs)
    with pytest.raises(InputError, match="the model has text, audio, vision, the data has"):
        Trainer(MICRO, TrainConfig(), dataset, tmp_path / "b")


def test_tokens_of_another_tokenizer_are_refused(bert, tmp_path):
    data = data_of(CASES["texts"], bert)
    ends = {"text": FrontEnd("tokenizer", {"max_tokens": 12}, "0" * 64)}
    write_folder(tmp_path / "set", open_splits(data, "set"), {}, label_range=(-3.0, 3.0), front_ends=ends)
    done = run(hcmen_train, "--data", tmp_path / "set", "--text-encoder", bert, "--out", tmp_path / "a")
    assert done.code == 2
    assert "its text tokens are of another tokenizer than that of" in done.lines[-1]


def test_the_scale_and_the_front_end_reach_the_device(bert, tmp_path):
    data = data_of(CASES["texts"], bert, -0.5, 0.5)
    digest = hashlib.sha256(read_tokenizer(bert)).hexdigest()
    ends = {"text": FrontEnd("tokenizer", {"max_tokens": 12}, digest)}
    write_folder(tmp_path / "set", open_splits(data, "set"), {}, label_range=(-2.0, 2.0), front_ends=ends)
    out, bundle = tmp_path / "train", tmp_path / "bundle"
    assert run(hcmen_train, "--data", tmp_path / "set", "--text-encoder", bert, "--out", out).code == 0
    assert run(hcmen_export, "--checkpoint", out, "--bundle", bundle).code == 0
    manifest = read_bundle(bundle).manifest
    assert manifest.front_ends == ends
    assert (manifest.inputs.label_min, manifest.inputs.label_max) == (-2.0, 2.0)
    assert manifest.inputs.text == FeatureConfig(HIDDEN, min(128, read_sizes(bert)[0].positions))


@pytest.mark.parametrize(
    ("lowest", "highest", "scale"),
    [
        (-2.8, 3.0, (-3, 3)),
        (-0.4, 1.0, (-1, 1)),
        (-3.9, 3.4, (-4, 4)),
        (-0.1, 7.2, (-8, 8)),
        (1.0, 5.0, (1, 5)),
        (1.2, 4.9, (1, 5)),
        (0.0, 1.0, (0, 1)),
        (-3.0, -0.5, (-3, 0)),
        (2.0, 2.0, (1, 3)),
        (0.2, 0.7, (0, 1)),
    ],
)
def test_the_scale_that_labels_look_like(lowest, highest, scale):
    assert label_scale(lowest, highest) == scale


def test_the_linear_model_of_texts_is_a_ridge_on_their_tf_idf(bert):
    """By hand, in another way: dense counts, the closed form in its dual."""
    dataset = dataset_from_mmsa(
        data_of(CASES["texts"], bert),
        "texts",
        dataclasses.replace(
            MICRO, text=FeatureConfig(HIDDEN, 12), audio=None, vision=None, text_encoder=read_sizes(bert)[0]
        ).inputs,
    )
    (variant,) = dataset.splits["train"].variants
    tables = {}
    for name, split in dataset.splits.items():
        ids, mask = split.text_tokens.ids[:, 0], split.text_tokens.ids[:, 1]
        tables[name] = np.zeros((len(split), ids.max() + 500))
        for row, text, n in zip(tables[name], ids, mask.sum(axis=1), strict=True):
            for token in text[1 : n - 1]:
                row[token] += 1
    width = min(table.shape[1] for table in tables.values())
    seen = np.flatnonzero(tables["train"][:, :width].any(axis=0))
    counts = {name: table[:, seen] for name, table in tables.items()}
    weight = np.log((1 + SAMPLES[0]) / (1 + (counts["train"] > 0).sum(axis=0))) + 1
    x = {name: c * weight for name, c in counts.items()}
    x = {name: v / np.maximum(np.sqrt((v**2).sum(axis=1, keepdims=True)), 1e-12) for name, v in x.items()}
    centre = x["train"].mean(axis=0)
    x = {name: (v - centre) * len(seen) ** 0.5 for name, v in x.items()}
    y = dataset.splits["train"].labels.astype(np.float64)
    found = {}
    for penalty in 10.0 ** np.arange(-3, 4):
        dual = np.linalg.solve(x["train"] @ x["train"].T + penalty * len(y) * np.eye(len(y)), y - y.mean())
        said = {name: np.clip(v @ x["train"].T @ dual + y.mean(), -3, 3) for name, v in x.items()}
        found[np.abs(said["valid"] - dataset.splits["valid"].labels).mean()] = said["test"]
    np.testing.assert_allclose(linear_baseline(dataset, variant), found[min(found)], atol=1e-8)
