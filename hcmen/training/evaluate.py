"""Scores of a model on a split: for each variant, or as a missing-modality protocol leaves the samples.

The model may be on any device; scores come back as NumPy arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hcmen.base.modalities import Variant, variant_named
from hcmen.data import Ragged, Split
from hcmen.data.protocols import Masks, batches
from hcmen.models.contract import uncalibrated
from hcmen.training.device import device_of, moved

__all__ = ["calibrated_on", "calibration_of", "heard_of", "predict", "predict_masked", "predict_variants", "texts_read"]

Array = npt.NDArray[np.float64]


def predict(model: Any, split: Split, variant: Variant, batch_size: int = 256) -> Array:
    """Scores [samples] of `split` in label units, from the modalities of `variant` alone; the others are not run.

    The model is left in the mode (training or evaluation) it came in.
    """
    before, device = model.training, device_of(model)
    model.eval()
    try:
        with torch.inference_mode():
            scores = [model(*_on(device, batch)).score for batch in _batches(split, variant, batch_size)]
    finally:
        model.train(before)
    return torch.cat(scores).double().cpu().numpy() if scores else np.empty(0)


def predict_variants(model: Any, split: Split, batch_size: int = 256) -> dict[str, Array]:
    """`predict` for every variant that the split has the modalities of, by name."""
    return {v.name: predict(model, split, v, batch_size) for v in split.variants}


_LEAST_TO_CALIBRATE = 50
"""Samples; fewer say too little of a scale and a shift, or of a modality."""


def calibration_of(truth: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[float, float]:
    """The scale from 0 to 1.2 and the shift that bring `scores` nearest to `truth`, both [samples], by absolute error.

    Scores of what was learnt from other samples are too large where little can be told: they shrink towards the median.
    Nothing changes where there are fewer than 50 samples.
    """
    y, p = np.asarray(truth, np.float64), np.asarray(scores, np.float64)
    found = (1.0, 0.0)
    if len(y) < _LEAST_TO_CALIBRATE:
        return found
    least = float(np.abs(y - p).mean())
    for scale in np.linspace(0.0, 1.2, 25):
        shift = float(np.median(y - scale * p))
        error = float(np.abs(y - scale * p - shift).mean())
        if error < least:
            found, least = (float(scale), shift), error
    return found


def heard_of(truth: npt.ArrayLike, predictions: Mapping[Variant, Array]) -> dict[Variant, Variant]:
    """Which part of each variant's modalities is to be listened to, by `predictions` [samples] of a validation split.

    It is all of them, unless the absolute error is lower without some by more than one standard error of the
    difference, sample by sample: the rule of one standard error (Breiman et al., Classification and Regression Trees,
    1984). Then it is the part with the lowest error. A modality can do harm that was of use in training: features that
    were themselves trained on the labels of the training split, for one.
    """
    errors = {variant: np.abs(np.asarray(truth, np.float64) - p) for variant, p in predictions.items()}
    found: dict[Variant, Variant] = {}
    for variant in sorted(errors, key=lambda v: len(v.present)):
        found[variant] = variant
        for part in {found[v] for v in found if set(v.present) < set(variant.present)}:
            gain = errors[variant] - errors[part]
            sure = len(gain) >= _LEAST_TO_CALIBRATE and gain.mean() > gain.std(ddof=1) / np.sqrt(len(gain))
            if sure and errors[part].mean() < errors[found[variant]].mean():
                found[variant] = part
    return found


def calibrated_on(truth: npt.ArrayLike, predictions: Mapping[str, Array]) -> tuple[Tensor, dict[str, Array]]:
    """The table that a model is calibrated with, and what becomes of its `predictions` [samples] by variant.

    See `calibration_of`, `heard_of`, and HCMEN's `calibrate`.
    """
    table = uncalibrated()
    scaled = {}
    for name, p in predictions.items():
        variant = variant_named(name)
        scale, shift = calibration_of(truth, p)
        table[variant.number, :2] = torch.tensor([scale, shift])
        scaled[variant] = p * scale + shift
    heard = heard_of(truth, scaled)
    for variant, part in heard.items():
        table[variant.number, 2] = part.number
    return table, {name: scaled[heard[variant_named(name)]] for name in predictions}


def predict_masked(
    model: Any,
    split: Split,
    masks: Masks,
    batch_size: int = 256,
    on_batch: Callable[[int], None] = lambda samples: None,
) -> Array:
    """Scores [samples] of `split` in label units, from what `masks` leaves of each sample.

    A sample's absent modalities are not run; `on_batch` is told how many samples each batch had. The model is left in
    the mode (training or evaluation) it came in.
    """
    before, device = model.training, device_of(model)
    scores = np.empty(len(split))
    model.eval()
    try:
        with torch.inference_mode():
            for batch in batches(split, masks, batch_size):
                features = {m: torch.from_numpy(x) for m, x in batch.features.items()}
                lengths = {m: torch.from_numpy(n) for m, n in batch.lengths.items()}
                found = model(*_on(device, (features, lengths))).score
                scores[batch.rows] = found.double().cpu().numpy()
                on_batch(len(batch.rows))
    finally:
        model.train(before)
    return scores


_MOST_READ = 1 << 30
"""Bytes of outputs of a text encoder that are kept, of one split."""


def texts_read(encoder: Any, split: Split, batch_size: int = 64) -> Split:
    """`split` with what `encoder`, a TextEncoder that will not change, makes of its texts: they are read once.

    Unchanged where that takes more than 1 GiB: the texts are then read whenever a batch needs them.
    """
    tokens, lengths = split.text_tokens, split.lengths["text"]
    size = encoder.bert.config.hidden_size
    if tokens is None or 4 * size * int(lengths.sum()) > _MOST_READ:
        return split
    starts = np.cumsum(lengths) - lengths
    values = np.empty((int(lengths.sum()), size), np.float32)
    order, device = np.argsort(lengths, kind="stable"), device_of(encoder)
    with torch.inference_mode():
        for rows in np.split(order, range(batch_size, len(order), batch_size)):
            ids = torch.from_numpy(split.model_input("text", rows, int(lengths[rows].max())))
            for row, made in zip(rows, encoder(moved(ids, device)).float().cpu().numpy(), strict=True):
                values[starts[row] : starts[row] + lengths[row]] = made[: lengths[row]]
    said = Ragged(values, starts, lengths)
    return dataclasses.replace(split, text_tokens=dataclasses.replace(tokens, outputs=said))


def _on(
    device: torch.device, batch: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    features, lengths = ({m: moved(x, device) for m, x in part.items()} for part in batch)
    return features, lengths


def _batches(split: Split, variant: Variant, batch_size: int) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Features and lengths of successive batches, padded to the longest sample of the batch only."""
    for start in range(0, len(split), batch_size):
        rows = slice(start, start + batch_size)
        lengths = {m: split.lengths[m][rows] for m in variant.present}
        yield (
            {m: torch.from_numpy(split.model_input(m, rows, int(lengths[m].max()))) for m in variant.present},
            {m: torch.from_numpy(n) for m, n in lengths.items()},
        )
