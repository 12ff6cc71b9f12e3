"""hcmen.data.synthetic: the true layout, determinism, and sentiment where a mean over time cannot see it."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest

from hcmen.base import metrics
from hcmen.base.errors import InputError
from hcmen.base.inputs import FeatureConfig
from hcmen.base.modalities import MODALITIES, VARIANTS, variant_named
from hcmen.data.baseline import linear_baseline
from hcmen.data.mmsa import dataset_from_mmsa, read_mmsa
from hcmen.data.synthetic import SAMPLES, make_synthetic, write_synthetic
from hcmen.models.hcmen.config import ModelConfig
from hcmen.training.presets import PRESETS

TINY = PRESETS["tiny"].model
SMALL = (600, 100, 300)


@pytest.mark.parametrize("preset", ["mosi", "sims", "tiny"])
def test_layout(preset: str) -> None:
    config = PRESETS[preset].model
    data = make_synthetic(config.inputs, (7, 3, 5))
    assert list(data) == ["train", "valid", "test"]
    for split, count in zip(data.values(), (7, 3, 5), strict=True):
        for m in MODALITIES:
            size = config.modality(m)
            assert split[m].shape == (count, size.max_steps, size.features)
            assert split[m].dtype == np.float32
        assert split["text_bert"].shape == (count, 3, config.text.max_steps)
        assert split["text_bert"].dtype == np.int64
        assert split["regression_labels"].dtype == np.float32
        assert np.abs(split["regression_labels"]).max() <= config.label_max
        assert set(split["classification_labels"].tolist()) <= {0, 1, 2}
        assert split["annotations"][0] in ("Negative", "Neutral", "Positive")
        assert all(len(split[key]) == count for key in split)
        assert all("$_$" in name for name in split["id"])
        assert ("regression_labels_T" in split) == (preset == "sims")
        for m in ("audio", "vision"):
            assert max(split[f"{m}_lengths"]) <= config.modality(m).max_steps
            for x, n in zip(split[m], split[f"{m}_lengths"], strict=True):
                assert not x[n:].any()
                assert x[:n].any(axis=1).all()


def test_sizes_are_those_of_mosi() -> None:
    assert SAMPLES["mosi"] == (1284, 229, 686)
    split = make_synthetic(PRESETS["mosi"].model.inputs, samples=(2, 1, 1))["train"]
    assert (split["text"].shape, split["audio"].shape, split["vision"].shape) == (
        (2, 50, 768),
        (2, 375, 5),
        (2, 500, 20),
    )


def test_text_and_its_tokens_say_the_same() -> None:
    for split in make_synthetic(TINY.inputs, (40, 3, 3)).values():
        ids, mask, types = split["text_bert"].transpose(1, 0, 2)
        assert not types.any()
        for sentence, row, real, vectors in zip(split["raw_text"], ids, mask, split["text"], strict=True):
            n = int(real.sum())
            assert real[:n].all()
            assert (row[0], row[n - 1]) == (101, 102)
            assert len(sentence.split()) == n - 2
            assert (row[1 : n - 1] >= 1000).all()
            assert not row[n:].any()
            assert not vectors[n:].any()


def test_the_seed_decides() -> None:
    first, again, other = (make_synthetic(TINY.inputs, (20, 5, 5), seed) for seed in (0, 0, 1))
    for split in first:
        for key in first[split]:
            np.testing.assert_array_equal(first[split][key], again[split][key])
    assert not np.array_equal(first["train"]["text"], other["train"]["text"])
    assert not np.array_equal(first["train"]["regression_labels"], other["train"]["regression_labels"])


def test_goes_through_the_reader(tmp_path: Path) -> None:
    data = make_synthetic(TINY.inputs, (20, 5, 6), 2)
    path = tmp_path / "synthetic.pkl"
    write_synthetic(path, data)
    assert [p.name for p in tmp_path.iterdir()] == ["synthetic.pkl"]
    found, direct = read_mmsa(path, TINY.inputs), dataset_from_mmsa(data, "synthetic", TINY.inputs)
    assert found.cleaned == dict.fromkeys(MODALITIES, 0)
    for name, split in found.splits.items():
        np.testing.assert_array_equal(split.labels, direct.splits[name].labels)
        for m in MODALITIES:
            np.testing.assert_array_equal(split.features[m], data[name][m])
            np.testing.assert_array_equal(split.lengths[m], direct.splits[name].lengths[m])
    with open(path, "rb") as file:
        np.testing.assert_array_equal(pickle.load(file)["test"]["audio"], data["test"]["audio"])


def test_writing_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        write_synthetic(tmp_path / "nowhere" / "set.pkl", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": FeatureConfig(4, 9)}, "text has 4 features and 9 steps, the synthetic set needs at least 1 and 10"),
        ({"audio": FeatureConfig(2, 60)}, "audio has 2 features and 60 steps"),
        ({"vision": FeatureConfig(3, 15)}, "vision has 3 features and 15 steps"),
    ],
)
def test_too_little_room(change: dict[str, FeatureConfig], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_synthetic(dataclasses.replace(TINY, **change).inputs, (2, 2, 2))


def test_no_samples() -> None:
    with pytest.raises(InputError, match="expected three numbers of at least 1"):
        make_synthetic(TINY.inputs, (2, 0, 2))


@pytest.mark.parametrize("steps", [10, 11, 16, 17, 39])
def test_awkward_sizes(steps: int) -> None:
    config = ModelConfig(FeatureConfig(1, steps), FeatureConfig(3, max(16, steps)), FeatureConfig(3, max(16, steps)))
    dataset_from_mmsa(make_synthetic(config.inputs, (50, 1, 1)), "small", config.inputs)


# --- where the sentiment is -----------------------------------------------------------------------------------------


def reading(sentence: str) -> float:
    """What a sentence says to whoever knows the rules: motifs in order, turned and scaled by the opening words."""
    words = sentence.split()
    pairs = list(itertools.pairwise(words))
    score = (pairs.count(("bad", "good")) - pairs.count(("good", "bad"))) / max(1, words.count("good"))
    return score * (-1 if words[0] == "supposedly" else 1) * (0.5 if words[1] == "slightly" else 1.0)


def test_sentiment_lies_in_order_and_far_context() -> None:
    split = make_synthetic(TINY.inputs, (3000, 1, 1))["train"]
    truth = split["regression_labels"]
    sentences = split["raw_text"].tolist()
    right = metrics.pearson(truth, [reading(s) for s in sentences])
    without_cue = metrics.pearson(truth, [reading(" ".join(["truly", "very", *s.split()[2:]])) for s in sentences])
    without_order = metrics.pearson(truth, [s.count("good") - s.count("bad") for s in sentences])
    assert right > 0.65
    assert without_cue < right - 0.2
    assert abs(without_order) < 0.05
    # The cue is far from what it turns round: never within the reach of one convolution.
    assert all("good" not in s.split()[:3] and "bad" not in s.split()[:3] for s in sentences)


def test_sarcasm_misleads_the_text_of_negative_samples_only() -> None:
    """Who reads the text well takes some negative samples for positive ones; audio and vision can tell."""
    split = make_synthetic(TINY.inputs, (3000, 1, 1))["train"]
    truth = split["regression_labels"]
    said = np.array([reading(s) for s in split["raw_text"]])
    misled = (np.abs(truth) > 1.0) & (np.sign(said) != np.sign(truth))
    assert (misled & (truth < 0)).sum() > 0.05 * len(truth)
    assert (misled & (truth > 0)).sum() < 0.01 * len(truth)


def test_a_linear_model_sees_little() -> None:
    dataset = dataset_from_mmsa(make_synthetic(TINY.inputs, SMALL), "synthetic", TINY.inputs)
    truth = dataset.splits["test"].labels
    floor = metrics.floor(truth, dataset.splits["train"].labels)
    found = {v.name: metrics.scores(truth, linear_baseline(dataset, v)) for v in VARIANTS}
    assert all(s["corr"] > 0.15 for s in found.values())
    assert floor["mae"] * 0.7 < found["full"]["mae"] < floor["mae"]
    assert found["full"]["corr"] < 0.65


def test_the_linear_model_is_the_best_of_its_kind() -> None:
    """On sentiment that does lie in the means, ridge regression finds it: the baseline is no straw man."""
    data = make_synthetic(TINY.inputs, SMALL)
    for split in data.values():
        for m in MODALITIES:
            real = split[m].any(axis=2)
            split[m][..., 0] += np.where(real, split["regression_labels"][:, None] * 5.0, 0.0)
    dataset = dataset_from_mmsa(data, "linear", TINY.inputs)
    for name in ("full", "vision_only"):
        found = metrics.scores(dataset.splits["test"].labels, linear_baseline(dataset, variant_named(name)))
        assert found["corr"] > 0.95
