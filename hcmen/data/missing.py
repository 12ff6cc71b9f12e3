"""What of a training sample is hidden from the model: steps and whole modalities, a new draw in every epoch.

A corruption is a pure function of (seed, epoch, index): it does not depend on the batch, the order of the samples or
the number of workers. The rules for steps are those of TFR-Net and its successors (MMSA, LNLN, TF-Mamba): per modality
a rate r, every valid step dropped with probability r, dropped frames become zero vectors, the first and last step of a
text ([CLS] and [SEP]) stay. Whole modalities: one of the incomplete subsets, all equally likely.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hcmen.base.modalities import MODALITIES, variants_of
from hcmen.data import IntArray

__all__ = ["Corruption", "CorruptionConfig", "corruption"]

BoolArray = npt.NDArray[np.bool_]

# Names this use of (seed, epoch, index); the order of the samples has another number.
_STREAM = 1


@dataclass(frozen=True)
class CorruptionConfig:
    """What a training run says of its corruptions; `corruption` says what each number does."""

    seed: int
    modality_drop_probability: float
    step_drop_probability: float
    max_step_drop_rate: float


@dataclass(frozen=True)
class Corruption:
    """What is left of a batch. keep: {m: bool [batch, T_m]}, False for dropped and for padded steps.

    present: bool [batch, 3] in the order of MODALITIES, at least one per row.
    """

    keep: dict[str, BoolArray]
    present: BoolArray


def corruption(
    config: CorruptionConfig, epoch: int, indices: IntArray, lengths: Mapping[str, IntArray], steps: Mapping[str, int]
) -> Corruption:
    """The corruption of the samples `indices` in `epoch`.

    With probability `modality_drop_probability` a sample keeps one of the incomplete subsets of the modalities only, of
    which three have six and one alone has none. Independently,
    each modality loses steps with probability `step_drop_probability`, at a rate drawn from
    [0, max_step_drop_rate].

    Args:
        config: the seed, the probabilities and the largest rate.
        epoch: which pass over the data, any non-negative number.
        indices: [batch], each sample's place in the training split.
        lengths: {m: [batch]}, valid steps of each sample, of every modality that there is. steps: {m: T_m}, the padded
            length of the result.
    """
    keep = {m: np.zeros((len(indices), steps[m]), dtype=np.bool_) for m in lengths}
    whole, *incomplete = (np.array(v.mask) for v in variants_of(lengths))
    present = np.tile(whole, (len(indices), 1))
    for row, index in enumerate(indices):
        generator = np.random.default_rng((_STREAM, config.seed, epoch, int(index)))
        # Every draw is made whether it is used or not, so that one choice does not shift the ones after it.
        drop_modality, *drop_steps = generator.random(1 + len(MODALITIES))
        subset = generator.integers(max(1, len(incomplete)))
        rates = generator.random(len(MODALITIES)) * config.max_step_drop_rate
        if incomplete and drop_modality < config.modality_drop_probability:
            present[row] = incomplete[subset]
        for m, drop, rate in zip(MODALITIES, drop_steps, rates, strict=True):
            if m not in lengths:
                continue
            length = int(lengths[m][row])
            kept = generator.random(length) >= (rate if drop < config.step_drop_probability else 0.0)
            if m == "text":
                kept[[0, -1]] = True
            keep[m][row, :length] = kept
    return Corruption(keep, present)
