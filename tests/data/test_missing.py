"""hcmen.data.missing: the corruption of a sample depends on (seed, epoch, index) and on nothing else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hcmen.base.modalities import MODALITIES, VARIANTS
from hcmen.data.missing import CorruptionConfig, corruption
from hcmen.training.config import TrainConfig

CONFIG = TrainConfig(seed=3).corruption
COUNT = 4000
LENGTHS = {
    m: np.random.default_rng(i).integers(1, t + 1, COUNT)
    for i, (m, t) in enumerate({"text": 12, "audio": 40, "vision": 30}.items())
}
STEPS = {m: int(n.max()) for m, n in LENGTHS.items()}


def draw(config: CorruptionConfig, epoch: int, indices: np.ndarray):
    return corruption(config, epoch, indices, {m: n[indices] for m, n in LENGTHS.items()}, STEPS)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_equal_whatever_the_batches_and_their_order(batch: int) -> None:
    indices = np.arange(200)
    whole = draw(CONFIG, 5, indices)
    order = np.random.default_rng(batch).permutation(indices)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        part = draw(CONFIG, 5, rows)
        np.testing.assert_array_equal(part.present, whole.present[rows])
        for m in MODALITIES:
            np.testing.assert_array_equal(part.keep[m], whole.keep[m][rows])


def test_equal_whatever_the_padding() -> None:
    indices = np.arange(50)
    lengths = {m: n[indices] for m, n in LENGTHS.items()}
    short = corruption(CONFIG, 1, indices, lengths, {m: int(n.max()) for m, n in lengths.items()})
    wide = corruption(CONFIG, 1, indices, lengths, dict.fromkeys(lengths, 100))
    for m in MODALITIES:
        steps = short.keep[m].shape[1]
        np.testing.assert_array_equal(wide.keep[m][:, :steps], short.keep[m])
        assert not wide.keep[m][:, steps:].any()


def test_other_epochs_seeds_and_samples_differ() -> None:
    indices = np.arange(100)
    first = draw(CONFIG, 1, indices)
    for other in (
        draw(CONFIG, 2, indices),
        draw(dataclasses.replace(CONFIG, seed=4), 1, indices),
        # Not the same stream one epoch later or one sample on.
        draw(dataclasses.replace(CONFIG, seed=1), 3, indices),
    ):
        assert (first.present != other.present).any(axis=1).mean() > 0.3
        assert (first.keep["audio"] != other.keep["audio"]).any(axis=1).mean() > 0.5
    same_lengths = {m: np.full(100, n) for m, n in STEPS.items()}
    rows = corruption(CONFIG, 1, indices, same_lengths, STEPS).keep["audio"]
    assert len(np.unique(rows, axis=0)) > 40


def test_frequencies() -> None:
    found = draw(CONFIG, 1, np.arange(COUNT))
    assert found.present.any(axis=1).all()
    names = {v.mask: v.name for v in VARIANTS}
    counts = dict.fromkeys(names.values(), 0)
    for row in found.present:
        counts[names[tuple(row.tolist())]] += 1
    assert counts["full"] / COUNT == pytest.approx(0.5, abs=0.03)
    for name, count in counts.items():
        if name != "full":
            assert count / COUNT == pytest.approx(0.5 / 6, abs=0.02)
    for m in MODALITIES:
        valid = np.arange(STEPS[m]) < LENGTHS[m][:, None]
        assert not (found.keep[m] & ~valid).any()
        whole = (found.keep[m] == valid).all(axis=1)
        if m == "text":
            continue
        # Half of the samples lose steps; the rates are uniform in [0, 0.9], 0.45 on average.
        lost = 1 - found.keep[m].sum() / valid.sum()
        assert lost == pytest.approx(0.5 * 0.45, abs=0.02)
        long = LENGTHS[m] > 20
        assert whole[long].mean() == pytest.approx(0.5, abs=0.05)


def test_first_and_last_step_of_a_text_stay() -> None:
    config = dataclasses.replace(CONFIG, step_drop_probability=1.0, max_step_drop_rate=1.0)
    found = draw(config, 1, np.arange(COUNT))
    rows = np.arange(COUNT)
    assert found.keep["text"][:, 0].all()
    assert found.keep["text"][rows, LENGTHS["text"] - 1].all()
    inner = LENGTHS["text"] > 2
    assert not found.keep["text"][inner, 1].all()
    assert not found.keep["audio"][:, 0].all()


@pytest.mark.parametrize(
    ("change", "whole", "complete"),
    [
        ({"modality_drop_probability": 0.0}, True, False),
        ({"step_drop_probability": 0.0}, False, True),
        ({"max_step_drop_rate": 0.0}, False, True),
        ({"modality_drop_probability": 0.0, "step_drop_probability": 0.0}, True, True),
    ],
)
def test_probabilities_of_zero(change: dict[str, float], whole: bool, complete: bool) -> None:
    found = draw(dataclasses.replace(CONFIG, **change), 1, np.arange(COUNT))
    assert found.present.all() == whole
    valid = {m: np.arange(STEPS[m]) < LENGTHS[m][:, None] for m in MODALITIES}
    assert all((found.keep[m] == valid[m]).all() for m in MODALITIES) == complete


def test_one_choice_does_not_shift_the_others() -> None:
    """Switching whole drops off leaves the dropped steps as they were, so that ablations compare like with like."""
    without = draw(dataclasses.replace(CONFIG, modality_drop_probability=0.0), 1, np.arange(100))
    for m in MODALITIES:
        np.testing.assert_array_equal(without.keep[m], draw(CONFIG, 1, np.arange(100)).keep[m])
