"""Data: sets in memory, their readers and makers, and the corruption of training samples. NumPy only, no torch.

layout.py     MMSA's layout of a data set (MOSI, MOSEI, SIMS, SIMSv2), checked
folder.py     a set as a folder of arrays that stay on disk
mmsa.py       the set in a pickle, read safely, or in such a folder
convert.py    hcmen-convert, from the one to the other
table/        one's own data, a row a sample, for hcmen-convert
cut.py        hcmen-clip, single samples as clips
synthetic.py  a set of the same layout whose sentiment a linear model cannot read
trained_on.py the set that a checkpoint was trained on, found again
scale.py      the scale of labels, where nobody says it
missing.py    which steps and modalities of a sample are dropped in an epoch
protocols.py  which are dropped when a model is judged
published.py  what others scored under these protocols
baseline.py   the linear model that a model has to beat
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hcmen.base.manifest import FrontEnd
from hcmen.base.modalities import MODALITIES, Variant, variants_of

__all__ = ["SPLITS", "FloatArray", "IntArray", "MultimodalDataset", "Ragged", "Split", "TextTokens", "cleaned_notes"]

SPLITS: tuple[str, ...] = ("train", "valid", "test")

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Ragged:
    """Sequences of differing lengths without their padding, one behind the other.

    values: float32 [steps of all, F]. starts, lengths: int64 [N], where each begins and how many steps it has.
    """

    values: FloatArray
    starts: IntArray
    lengths: IntArray

    def padded(self, rows: IntArray | slice, steps: int) -> FloatArray:
        """The sequences `rows` as float32 [rows, steps, F], zero beyond their lengths; cut where they are longer."""
        starts, lengths = self.starts[rows], np.minimum(self.lengths[rows], steps)
        result = np.zeros((len(starts), steps, self.values.shape[1]), np.float32)
        for row, start, length in zip(result, starts, lengths, strict=True):
            row[:length] = self.values[start : start + length]
        return result


@dataclass(frozen=True)
class TextTokens:
    """Texts as a text encoder takes them.

    ids: int64 [N, 3, T]: token ids, attention mask (ones on the valid prefix), token types; zero beyond it.
    unknown: the id that stands for a dropped word.
    outputs: what the encoder makes of the texts, where it was asked once for all; no word of such a split is dropped.
    """

    ids: IntArray
    unknown: int
    outputs: Ragged | None = None

    def rows(self, rows: slice) -> TextTokens:
        """Those of some neighbouring samples, on the same memory."""
        said = self.outputs and Ragged(self.outputs.values, self.outputs.starts[rows], self.outputs.lengths[rows])
        return TextTokens(self.ids[rows], self.unknown, said)


@dataclass(frozen=True)
class Split:
    """Samples in memory, or mapped from disk and then read-only; N samples, T_m steps and F_m features of modality m.

    features: {m: float32 [N, T_m, F_m]}, zero beyond the valid prefix, of what the data has as features.
    lengths: {m: int64 [N]}, the valid prefix, at least 1, of every modality that the data has.
    labels: float32 [N]. ids: N names, "video$_$clip" in MMSA's files.
    text_tokens: for a model with a text encoder, which takes them in place of the text features.
    """

    features: dict[str, FloatArray]
    lengths: dict[str, IntArray]
    labels: FloatArray
    ids: list[str]
    text_tokens: TextTokens | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that the data has, in axis order; a text may be there as tokens alone."""
        return tuple(m for m in MODALITIES if m in self.lengths)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The variants that the data has the modalities of."""
        return variants_of(self.modalities)

    @property
    def steps(self) -> dict[str, int]:
        """{m: T_m}, how far each modality is padded as a model takes it."""
        tokens = {} if self.text_tokens is None else {"text": self.text_tokens.ids.shape[2]}
        return {m: tokens.get(m) or self.features[m].shape[1] for m in self.modalities}

    def rows(self, rows: slice) -> Split:
        """Some neighbouring samples of this split, on the same memory."""
        tokens = self.text_tokens
        return Split(
            {m: x[rows] for m, x in self.features.items()},
            {m: n[rows] for m, n in self.lengths.items()},
            self.labels[rows],
            self.ids[rows],
            None if tokens is None else tokens.rows(rows),
        )

    def model_input(
        self, m: str, rows: IntArray | slice, steps: int, keep: npt.NDArray[np.bool_] | None = None
    ) -> npt.NDArray[Any]:
        """Modality `m` of the samples `rows` as the model takes it; always a copy.

        Args:
            m: the modality. rows: which samples. steps: how many steps, from the first one on.
            keep: bool [samples, steps], False for steps that are dropped or padding; all are kept if None.

        Returns:
            float32 [samples, steps, F], dropped steps zero; or text tokens int64 [samples, 3, steps], the ids of
            dropped steps replaced by that of the unknown token; or what the text encoder made of these.
        """
        if m != "text" or self.text_tokens is None:
            x = self.features[m][rows, :steps]
            return np.array(x) if keep is None else x * keep[..., None]
        said = self.text_tokens.outputs
        if said is not None:
            assert keep is None or keep.sum() == said.lengths[rows].clip(max=steps).sum(), "a word is dropped"
            return said.padded(rows, steps)
        tokens = np.array(self.text_tokens.ids[rows, :, :steps])
        if keep is not None:
            ids, mask = tokens[:, 0], tokens[:, 1]
            ids[(mask != 0) & ~keep] = self.text_tokens.unknown
        return tokens


@dataclass(frozen=True)
class MultimodalDataset:
    """The three splits of one data set. front_ends: per modality what made its features, where that is known.

    All of them have the same modalities.

    cleaned: per modality, how many stored values were NaN or infinite (in float32) and were set to zero, or misplaced.
    misplaced: how many of these stood behind padding and were moved to the start, or stood beyond the length of their
    sample (audio and vision) and were set to zero.
    """

    name: str
    splits: dict[str, Split]
    label_min: float
    label_max: float
    cleaned: dict[str, int] = field(default_factory=dict)
    misplaced: dict[str, int] = field(default_factory=dict)
    front_ends: Mapping[str, FrontEnd] = field(default_factory=dict)


def cleaned_notes(cleaned: Mapping[str, int], misplaced: Mapping[str, int], zero: str = "count as 0") -> list[str]:
    """What a command says of the values that were put right, a line per modality and kind; see `MultimodalDataset`."""
    notes = []
    for m, count in cleaned.items():
        moved = misplaced.get(m, 0)
        if count > moved:
            notes.append(f"{m}: {count - moved} stored values were NaN or infinite and {zero}")
        if moved:
            notes.append(
                f"{m}: {moved} stored values were not where their sample's length says: those behind padding are at "
                f"its start now, those beyond the length {zero}"
            )
    return notes
