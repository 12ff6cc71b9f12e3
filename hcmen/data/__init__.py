"""Data: sets in memory, their readers and makers, and the corruption of training samples. NumPy only, no torch.

mmsa.py       the pickles of MMSA (MOSI, MOSEI, SIMS, SIMSv2), read safely
folder.py     the same as a folder of arrays that stay on disk
convert.py    hcmen-convert, from the one to the other
cut.py        hcmen-clip, single samples as clips
synthetic.py  a set of the same layout whose sentiment a linear model cannot read
missing.py    which steps and modalities of a sample are dropped in an epoch
protocols.py  which are dropped when a model is judged
published.py  what others scored under these protocols
baseline.py   the linear model that HCMEN has to beat
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

__all__ = ["SPLITS", "FloatArray", "IntArray", "MultimodalDataset", "Split"]

SPLITS: tuple[str, ...] = ("train", "valid", "test")

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Samples in memory, or mapped from disk and then read-only; N samples, T_m steps and F_m features of modality m.

    features: {m: float32 [N, T_m, F_m]}, zero beyond the valid prefix.
    lengths: {m: int64 [N]}, the valid prefix, at least 1.
    labels: float32 [N]. ids: N names, "video$_$clip" in MMSA's files.
    """

    features: dict[str, FloatArray]
    lengths: dict[str, IntArray]
    labels: FloatArray
    ids: list[str]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class MultimodalDataset:
    """The three splits of one data set.

    cleaned: per modality, how many stored values were NaN or infinite (in float32) and were set to zero.
    """

    name: str
    splits: dict[str, Split]
    label_min: float
    label_max: float
    cleaned: dict[str, int] = field(default_factory=dict)
