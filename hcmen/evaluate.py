"""Scores of a model on a split, for each of the seven variants."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hcmen.data import Split
from hcmen.modalities import VARIANTS, Variant
from hcmen.model import HCMEN

__all__ = ["predict", "predict_variants"]

Array = npt.NDArray[np.float64]


def predict(model: HCMEN, split: Split, variant: Variant, batch_size: int = 256) -> Array:
    """Scores [samples] of `split` in label units, from the modalities of `variant` alone; the others are not run.

    The model is left in the mode (training or evaluation) it came in.
    """
    before = model.training
    model.eval()
    try:
        with torch.inference_mode():
            scores = [model(*batch).score for batch in _batches(split, variant, batch_size)]
    finally:
        model.train(before)
    return torch.cat(scores).double().numpy()


def predict_variants(model: HCMEN, split: Split, batch_size: int = 256) -> dict[str, Array]:
    """`predict` for every variant, by name."""
    return {v.name: predict(model, split, v, batch_size) for v in VARIANTS}


def _batches(split: Split, variant: Variant, batch_size: int) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Features and lengths of successive batches, padded to the longest sample of the batch only."""
    for start in range(0, len(split), batch_size):
        rows = slice(start, start + batch_size)
        lengths = {m: split.lengths[m][rows] for m in variant.present}
        features = {m: split.features[m][rows, : lengths[m].max()] for m in variant.present}
        yield (
            # Always a copy: features may be a read-only map, which torch warns of.
            {m: torch.from_numpy(np.array(x)) for m, x in features.items()},
            {m: torch.from_numpy(n) for m, n in lengths.items()},
        )
