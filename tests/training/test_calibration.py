"""What validation shows of each set of modalities: scale and shift of its score, and what is listened to."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnxruntime
import pytest
import torch
from helpers.micro import MICRO

from hcmen.base.modalities import MODALITIES, VARIANTS, variant_named
from hcmen.data.mmsa import dataset_from_mmsa
from hcmen.data.synthetic import make_synthetic
from hcmen.export.variants import export_variant
from hcmen.models.contract import uncalibrated
from hcmen.models.hcmen.model import HCMEN
from hcmen.training.checkpoint import load_checkpoint, save_checkpoint
from hcmen.training.config import TrainConfig
from hcmen.training.evaluate import calibration_of, heard_of, predict
from hcmen.training.report import scores_text, unheard
from hcmen.training.trainer import Trainer

SAMPLES = (24, 12, 16)


def test_scores_are_calibrated_by_what_validation_shows(tmp_path):
    """Each set of modalities has its own scale and shift, be it that of a batch or of a sample; training sees none."""
    config = dataclasses.replace(MICRO, calibrated=True)
    dataset = dataset_from_mmsa(make_synthetic(MICRO.inputs, (24, 60, 8), 0), "synthetic", MICRO.inputs)
    trainer = Trainer(config, TrainConfig(epochs=2, batch_size=10), dataset, tmp_path)
    trainer.run()
    model, described = load_checkpoint(tmp_path)
    table, valid = model.calibration.clone(), dataset.splits["valid"]
    heard = {v: next(part for part in VARIANTS if part.number == table[v.number, 2]) for v in VARIANTS}
    plain = dataclasses.replace(config, calibrated=False)
    bare = HCMEN(plain).eval()
    bare.load_state_dict({name: x for name, x in model.state_dict().items() if name != "calibration"})
    for variant in VARIANTS:
        raw, got = predict(bare, valid, heard[variant]), predict(model, valid, variant)
        number = 4 * heard[variant].mask[0] + 2 * heard[variant].mask[1] + heard[variant].mask[2]
        scale, shift = calibration_of(valid.labels, raw)
        assert table[number, :2].tolist() == pytest.approx([scale, shift], abs=1e-6)
        np.testing.assert_allclose(got, raw * scale + shift, atol=1e-5)
        mae = np.abs(valid.labels - got).mean()
        assert mae <= np.abs(valid.labels - raw).mean() + 1e-6
        assert described["validation"]["mae_by_variant"][variant.name] == pytest.approx(mae, abs=1e-5)
    features = {m: torch.from_numpy(x[:7]) for m, x in valid.features.items()}
    lengths = {m: torch.from_numpy(n[:7]) for m, n in valid.lengths.items()}
    rows = torch.tensor([v.mask for v in VARIANTS])
    mixed = model(features, lengths, rows).score
    for i, variant in enumerate(VARIANTS):
        alone = model(
            {m: features[m][i : i + 1] for m in variant.present}, {m: lengths[m][i : i + 1] for m in variant.present}
        )
        torch.testing.assert_close(mixed[i : i + 1], alone.score)
    model.train()
    bare.train()
    torch.manual_seed(1)
    told = model(features, lengths).score
    torch.manual_seed(1)
    torch.testing.assert_close(told, bare(features, lengths).score, rtol=0, atol=0)


def test_a_calibration_is_the_best_of_its_kind():
    rng = np.random.default_rng(3)
    y = rng.normal(size=200)
    scale, shift = calibration_of(y, 4 * y + 2)
    assert (scale, shift) == pytest.approx((0.25, -0.5), abs=1e-9)
    noise = rng.normal(size=200)
    scale, shift = calibration_of(y, noise)
    tried = [np.abs(y - s * noise - np.median(y - s * noise)).mean() for s in np.linspace(0, 1.2, 25)]
    assert np.abs(y - scale * noise - shift).mean() == pytest.approx(min(tried))
    assert calibration_of(y, y) == (1.0, 0.0)
    assert calibration_of(y[:49], noise[:49]) == (1.0, 0.0)


def calibrated_model(**heard: str) -> HCMEN:
    """A model that is calibrated somehow, and listens in the place of some variants to others."""
    torch.manual_seed(0)
    model = HCMEN(dataclasses.replace(MICRO, calibrated=True)).eval()
    table = uncalibrated()
    table[:, 0], table[:, 1] = torch.linspace(0.5, 1.2, 8), torch.linspace(-1, 1, 8)
    for name, part in heard.items():
        table[variant_named(name).number, 2] = variant_named(part).number
    model.calibrate(table)
    return model


def test_a_modality_that_is_not_listened_to_is_as_if_absent(tmp_path):
    """In a batch, in a sample, in a checkpoint, and in a graph, whose inputs it is among all the same."""
    model = calibrated_model(full="vision_missing", audio_missing="text_only")
    assert model.heard(("text", "audio", "vision")) == ("text", "audio")
    dataset = dataset_from_mmsa(make_synthetic(MICRO.inputs, SAMPLES, 0), "synthetic", MICRO.inputs)
    split = dataset.splits["valid"]
    features = {m: torch.from_numpy(x[:5]) for m, x in split.features.items()}
    lengths = {m: torch.from_numpy(n[:5]) for m, n in split.lengths.items()}
    save_checkpoint(tmp_path, model, TrainConfig(), epoch=1, validation={}, dataset={}, run={})
    again, _ = load_checkpoint(tmp_path)
    for name, part in (("full", "vision_missing"), ("audio_missing", "text_only"), ("text_missing", "text_missing")):
        present, heard = variant_named(name).present, variant_named(part).present
        expected = model({m: features[m] for m in heard}, {m: lengths[m] for m in heard})
        of_variant = {m: features[m] for m in present}, {m: lengths[m] for m in present}
        rows = torch.tensor([variant_named(name).mask] * 5)
        for found in (model(*of_variant), again(*of_variant), model(features, lengths, rows)):
            torch.testing.assert_close(found.score, expected.score)
            torch.testing.assert_close(found.modality_weights, expected.modality_weights)
        proto = export_variant(model, variant_named(name))
        inputs = [i.name for i in proto.graph.input]
        assert inputs == [*present, *(f"{m}_length" for m in present)]
        used = {name for node in proto.graph.node for name in node.input}
        assert used >= set(inputs)
        session = onnxruntime.InferenceSession(proto.SerializeToString())
        arrays = {**{m: x.numpy() for m, x in of_variant[0].items()}}
        arrays |= {f"{m}_length": n.numpy() for m, n in of_variant[1].items()}
        np.testing.assert_allclose(session.run(["score"], arrays)[0], expected.score.detach().numpy(), atol=1e-5)
    everything = len(export_variant(calibrated_model(), variant_named("full")).graph.node)
    assert len(export_variant(model, variant_named("full")).graph.node) < 0.85 * everything


def test_a_report_says_what_is_not_listened_to():
    dataset = dataset_from_mmsa(make_synthetic(MICRO.inputs, SAMPLES, 0), "synthetic", MICRO.inputs)
    assert unheard(calibrated_model(), dataset) == {}
    found = unheard(calibrated_model(full="text_only", audio_missing="text_only"), dataset)
    assert found == {"unheard": {"full": ["audio", "vision"], "audio_missing": ["vision"]}}
    scores = {key: {"mae": 1.0, "corr": 0.0, "acc2_non0": 0.5} for key in ("hcmen", "floor", "linear")}
    about = {"label_min": -3, "label_max": 3, "samples": {"test": 16}}
    report = {"dataset": about, "epoch": 1, "validation_mae": 1.0, "test": {"full": scores}, "checkpoint": "x"}
    assert "listen" not in scores_text(report, "hcmen")
    assert "full does not listen to audio and vision: validation is better without" in scores_text(
        {**report, **found}, "hcmen"
    )


def test_in_training_everything_is_listened_to():
    quiet, model = calibrated_model(full="text_only").train(), calibrated_model().train()
    features = {m: torch.randn(2, 5, MICRO.modality(m).features) for m in MODALITIES}
    lengths = {m: torch.tensor([5, 3]) for m in MODALITIES}
    for one in (quiet, model):
        torch.manual_seed(1)
        one.told = one(features, lengths).score
    assert torch.equal(quiet.told, model.told)


@pytest.mark.parametrize(
    ("number", "heard"), [(7, 8.0), (7, 2.5), (7, float("nan")), (7, -1.0), (4, 6.0), (7, 6.0)],
    ids=["beyond", "no whole number", "nan", "negative", "more than there is", "one that is not listened to itself"],
)  # fmt: skip
def test_a_table_that_says_something_else_is_refused(number: int, heard: float):
    table = uncalibrated()
    table[6, 2] = 4.0
    table[number, 2] = heard
    model = HCMEN(dataclasses.replace(MICRO, calibrated=True))
    with pytest.raises(ValueError, match="expected a part of each"):
        model.calibrate(table)
    with pytest.raises(ValueError, match="expected a part of each"):
        model.load_state_dict({**model.state_dict(), "calibration": table})


def test_what_does_harm_beyond_its_scatter_is_not_listened_to():
    rng = np.random.default_rng(0)
    y = rng.uniform(-3, 3, 400)
    noise = {v: rng.laplace(0, 1, 400) for v in VARIANTS}
    scatter = {"full": 1.4, "text_missing": 1.5, "audio_missing": 0.9, "vision_missing": 0.8, "text_only": 1.0}
    said = {v: y + scatter.get(v.name, 1.6) * noise[v] for v in VARIANTS}
    found = {v.name: part.name for v, part in heard_of(y, said).items()}
    # full is far worse than two of its parts, and takes the better; text with audio is no worse than text alone.
    assert found == {v.name: v.name for v in VARIANTS} | {"full": "vision_missing"}
    said[variant_named("vision_missing")] = y + 1.5 * noise[variant_named("vision_missing")]
    found = {v.name: part.name for v, part in heard_of(y, said).items()}
    assert (found["vision_missing"], found["full"]) == ("text_only", "audio_missing")
    few = {v: p[:49] for v, p in said.items()}
    assert all(v is part for v, part in heard_of(y[:49], few).items())


@pytest.mark.parametrize(("errors", "heard"), [(-5.0, "full"), (0.0, "full"), (0.9, "full"), (1.1, "text_only")])
def test_the_bound_is_one_standard_error_of_the_difference(errors: float, heard: str):
    rng = np.random.default_rng(1)
    with_all, text = rng.uniform(1, 2, (2, 150))
    difference = with_all - text
    text += difference.mean() - errors * difference.std(ddof=1) / np.sqrt(150)
    found = heard_of(np.zeros(150), {variant_named("full"): with_all, variant_named("text_only"): text})
    assert found[variant_named("full")].name == heard
