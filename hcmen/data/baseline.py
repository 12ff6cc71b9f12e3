"""The linear model that a trained one has to beat: ridge regression on the mean frame of each modality."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hcmen.base.modalities import Variant
from hcmen.data import MultimodalDataset, Split

__all__ = ["linear_baseline"]

_PENALTIES = tuple(10.0**k for k in range(-3, 4))

Array = npt.NDArray[np.float64]


def linear_baseline(dataset: MultimodalDataset, variant: Variant) -> Array:
    """Scores [samples] of the test split by a ridge regression on mean-pooled features.

    It is trained for `variant` alone, on the modalities that are present: the mean over the valid steps, standardised
    by the training split. The penalty (per training sample) is the one with the lowest validation MAE of 1e-3 .. 1e3.
    Predictions are clipped to the label range.
    """
    pooled = {name: _pooled(split, variant) for name, split in dataset.splits.items()}
    mean, std = pooled["train"].mean(axis=0), pooled["train"].std(axis=0)
    x = {name: (p - mean) / np.where(std == 0, 1.0, std) for name, p in pooled.items()}
    y = dataset.splits["train"].labels.astype(np.float64)
    offset = y.mean()
    gram, moment = x["train"].T @ x["train"] / len(y), x["train"].T @ (y - offset) / len(y)

    def predict(weights: Array, split: str) -> Array:
        return np.clip(x[split] @ weights + offset, dataset.label_min, dataset.label_max)

    candidates = [np.linalg.solve(gram + penalty * np.eye(len(gram)), moment) for penalty in _PENALTIES]
    truth = dataset.splits["valid"].labels
    best = min(candidates, key=lambda weights: float(np.abs(predict(weights, "valid") - truth).mean()))
    return predict(best, "test")


def _pooled(split: Split, variant: Variant) -> Array:
    """Mean over the valid steps of each present modality, [samples, features of all]; padding is zero."""
    return np.concatenate(
        [split.features[m].sum(axis=1, dtype=np.float64) / split.lengths[m][:, None] for m in variant.present], axis=1
    )
