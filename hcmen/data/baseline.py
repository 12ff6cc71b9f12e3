"""The linear model that a trained one has to beat: ridge regression on what each modality is on the whole."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from hcmen.base.modalities import Variant
from hcmen.data import IntArray, MultimodalDataset, Split

__all__ = ["linear_baseline", "ridge"]

_PENALTIES = tuple(10.0**k for k in range(-3, 4))
_MOST_WORDS = 2048
"""The commonest tokens of the training texts; rarer ones change little, and the solution costs their cube."""

Array = npt.NDArray[np.float64]


def linear_baseline(dataset: MultimodalDataset, variant: Variant) -> Array:
    """Scores [samples] of the test split by a ridge regression.

    It is trained for `variant` alone, on the modalities that are present: the mean over the valid steps, standardised
    by the training split. A text that is there as tokens alone is the tf-idf of its commonest ones, as scikit-learn
    defines it (smoothed, rows of unit length), centred. The penalty (per training sample) is the one with the lowest
    validation MAE of 1e-3 .. 1e3. Predictions are clipped to the label range.
    """
    columns: dict[str, list[Array]] = {name: [] for name in dataset.splits}
    for m in variant.present:
        described = _pooled(dataset, m) if m in dataset.splits["train"].features else _tf_idf(dataset)
        for name, block in described.items():
            columns[name].append(block)
    return ridge({name: np.concatenate(blocks, axis=1) for name, blocks in columns.items()}, dataset)["test"]


def ridge(x: Mapping[str, Array], dataset: MultimodalDataset) -> dict[str, Array]:
    """Scores [samples] of each split by a ridge regression on `x`, per split [samples, columns], centred.

    Penalty and range are those of `linear_baseline`.
    """
    y = dataset.splits["train"].labels.astype(np.float64)
    offset = y.mean()
    gram, moment = x["train"].T @ x["train"] / len(y), x["train"].T @ (y - offset) / len(y)

    def predict(weights: Array, split: str) -> Array:
        return np.clip(x[split] @ weights + offset, dataset.label_min, dataset.label_max)

    candidates = [np.linalg.solve(gram + penalty * np.eye(len(gram)), moment) for penalty in _PENALTIES]
    truth = dataset.splits["valid"].labels
    best = min(candidates, key=lambda weights: float(np.abs(predict(weights, "valid") - truth).mean()))
    return {name: predict(best, name) for name in x}


def _pooled(dataset: MultimodalDataset, m: str) -> dict[str, Array]:
    """Per split the mean over the valid steps [samples, features], standardised; padding is zero."""
    pooled = {
        name: split.features[m].sum(axis=1, dtype=np.float64) / split.lengths[m][:, None]
        for name, split in dataset.splits.items()
    }
    mean, std = pooled["train"].mean(axis=0), pooled["train"].std(axis=0)
    return {name: (p - mean) / np.where(std == 0, 1.0, std) for name, p in pooled.items()}


def _tf_idf(dataset: MultimodalDataset) -> dict[str, Array]:
    """Per split the tf-idf of the texts [samples, words], scaled such that columns vary by one on average."""
    texts = {name: _words(split) for name, split in dataset.splits.items()}
    found, counts = np.unique(np.concatenate([np.unique(text) for text in texts["train"]]), return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_MOST_WORDS]
    vocabulary = np.sort(found[order])
    if not vocabulary.size:
        return {name: np.zeros((len(rows), 1)) for name, rows in texts.items()}
    texts_with = counts[np.searchsorted(found, vocabulary)]
    weight = np.log((1 + len(texts["train"])) / (1 + texts_with)) + 1.0
    made = {}
    for name, rows in texts.items():
        table = np.zeros((len(rows), len(vocabulary)))
        for row, text in zip(table, rows, strict=True):
            place = np.searchsorted(vocabulary, text)
            place = np.minimum(place, len(vocabulary) - 1)
            np.add.at(row, place[vocabulary[place] == text], 1.0)
        table *= weight
        length = np.linalg.norm(table, axis=1, keepdims=True)
        made[name] = table / np.where(length == 0, 1.0, length)
    mean = made["train"].mean(axis=0)
    return {name: (table - mean) * np.sqrt(len(vocabulary)) for name, table in made.items()}


def _words(split: Split) -> list[IntArray]:
    """The token ids of each text, without its first and last one, [CLS] and [SEP]."""
    assert split.text_tokens is not None
    return [ids[1 : n - 1] for ids, n in zip(split.text_tokens.ids[:, 0], split.lengths["text"], strict=True)]
