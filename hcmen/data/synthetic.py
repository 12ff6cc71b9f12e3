"""A synthetic set in MMSA's layout, made so that reading it takes what the model is made of.

Every sample has a sentiment z, uniform in [-1, 1]; its label is z in label units, in fifths as annotators' averages
are. The three modalities each carry their own noisy copy of z, text the least noisy and vision the noisiest, so that
what one lacks another can supply in part. How a copy z_m is written into a sequence:

    local patterns       As a number of motifs, each of neighbouring steps in one of two orders: "bad good" (things got
                         better) or "good bad" in text, a rise or a fall of one direction of the features in audio and
                         vision. Both orders have the same mean frame; z_m is the balance between them.
    long-range context   Text and audio open with a cue, far ahead of the motifs. A "supposedly" turns their meaning
                         round, a "slightly" halves it; in audio the order of the opening contour turns it round.
    across modalities    Sarcasm: in some negative samples the text says the opposite of what is meant. Only audio
                         and vision, by disagreeing with the text, tell.
    a linear trace       Filler words lean a little towards z_m, and the audio and vision level shifts with it, so that
                         a linear model on mean frames beats nothing, and is clearly worse than one that sees order.

Lengths are ragged, padding is zero at the end, and the columns of audio and vision have scales and offsets of their
own.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hcmen.base.errors import InputError
from hcmen.base.files import writing_file
from hcmen.base.inputs import Inputs
from hcmen.base.modalities import MODALITIES
from hcmen.data import SPLITS

__all__ = ["SAMPLES", "make_synthetic", "write_synthetic"]

SAMPLES: dict[str, tuple[int, int, int]] = {
    "mosi": (1284, 229, 686),
    "mosei": (16326, 1871, 4659),
    "sims": (1368, 456, 457),
    "simsv2": (2722, 647, 1034),
    "tiny": (1600, 240, 400),
}
"""Samples of train, valid and test: those of the real sets, and of the demo."""

Array = npt.NDArray[np.float64]
Words = npt.NDArray[np.int64]

# How far each modality's copy of z strays (standard deviation).
_NOISE = {"text": 0.12, "audio": 0.42, "vision": 0.8}
_FLIP_PROBABILITY = {"text": 0.25, "audio": 0.15, "vision": 0.0}
_HALF_PROBABILITY = 0.5
_SARCASM_PROBABILITY = 0.25

_CLS, _SEP, _FIRST_WORD = 101, 102, 1000
# fmt: off
_FILLERS = (
    "the", "film", "is", "a", "story", "about", "one", "man", "who", "leaves", "his", "home", "and", "then", "we",
    "see", "that", "it", "takes", "some", "time", "before", "they", "meet", "again", "with", "music", "light",
    "colour", "voice", "scene", "camera", "end", "part", "place", "year", "people", "world", "thing", "way", "day",
)
# fmt: on
_WORDS = (*_FILLERS, "good", "bad", "truly", "supposedly", "very", "slightly")
_GOOD, _BAD, _TRULY, _SUPPOSEDLY, _VERY, _SLIGHTLY = range(len(_FILLERS), len(_WORDS))


@dataclass(frozen=True)
class _World:
    """What all samples share: word vectors, and directions, scales and offsets of the audio and vision features."""

    word_vectors: Array
    valence: Array
    directions: dict[str, Array]
    scale: dict[str, Array]
    offset: dict[str, Array]


def make_synthetic(
    inputs: Inputs, samples: tuple[int, int, int] = SAMPLES["mosi"], seed: int = 0
) -> dict[str, dict[str, Any]]:
    """A synthetic set in MMSA's layout: {"train", "valid", "test"} of dicts, see hcmen/data/mmsa.py.

    Args:
        inputs: feature counts, steps and label range.
        samples: how many samples train, valid and test have.
        seed: the same seed gives the same set.

    Raises:
        InputError: a sequence is too short to hide anything in (text needs 10 steps, audio and vision 16), audio or
            vision has fewer than 3 features, or a split has no samples.
    """
    for m in MODALITIES:
        size, need = inputs.modality(m), (1, 10) if m == "text" else (3, 16)
        if size.features < need[0] or size.max_steps < need[1]:
            raise InputError(
                f"{m} has {size.features} features and {size.max_steps} steps, the synthetic set needs at least "
                f"{need[0]} and {need[1]}"
            )
    if min(samples) < 1:
        raise InputError(f"samples is {samples}, expected three numbers of at least 1")
    generator = np.random.default_rng(seed)
    world = _make_world(inputs, generator)
    return {
        split: _make_split(inputs, world, split, count, generator) for split, count in zip(SPLITS, samples, strict=True)
    }


def write_synthetic(path: str | Path, data: Mapping[str, Any]) -> None:
    """Writes a set that `make_synthetic` made as the pickle that MMSA's readers take; a partial file never appears.

    Raises:
        OSError: the file cannot be written.
    """
    with writing_file(path) as file:
        pickle.dump(dict(data), file, protocol=4)


def _make_world(inputs: Inputs, generator: np.random.Generator) -> _World:
    # Vectors of unit variance per feature, whatever their number: noise on them then means the same everywhere.
    word_vectors = generator.standard_normal((len(_WORDS) + 2, inputs.text.features))
    valence = np.zeros(len(_FILLERS))
    valence[generator.permutation(len(_FILLERS))[: len(_FILLERS) // 2]] = 1.0
    directions, scale, offset = {}, {}, {}
    for m in ("audio", "vision"):
        features = inputs.modality(m).features
        # Three orthogonal directions (of the motifs, of the cue, of the level) of unit variance per feature.
        directions[m] = np.linalg.qr(generator.standard_normal((features, 3)))[0].T * np.sqrt(features)
        scale[m] = np.exp(generator.standard_normal(features))
        offset[m] = generator.standard_normal(features) * scale[m]
    return _World(word_vectors, valence - valence.mean(), directions, scale, offset)


def _make_split(
    inputs: Inputs, world: _World, split: str, count: int, generator: np.random.Generator
) -> dict[str, Any]:
    z = np.round(generator.uniform(-1.0, 1.0, count) * 15.0) / 15.0
    seen = {m: np.clip(z + noise * generator.standard_normal(count), -1.0, 1.0) for m, noise in _NOISE.items()}
    sarcastic = (z < -0.2) & (generator.random(count) < _SARCASM_PROBABILITY)
    seen["text"][sarcastic] = np.abs(seen["text"][sarcastic])

    words, text_lengths = _make_words(inputs.text.max_steps, world, seen["text"], generator)
    text = world.word_vectors[words] + 0.5 * generator.standard_normal((*words.shape, inputs.text.features))
    audio, audio_lengths = _make_frames("audio", inputs, world, seen["audio"], generator)
    vision, vision_lengths = _make_frames("vision", inputs, world, seen["vision"], generator)

    labels = np.float32(z * inputs.label_max)
    real = np.arange(words.shape[1]) < text_lengths[:, None]
    data = {
        "raw_text": np.array(
            [" ".join(_WORDS[w] for w in row[1 : n - 1]) for row, n in zip(words, text_lengths, strict=True)]
        ),
        "text_bert": np.stack([np.where(real, _token_ids(words), 0), real, np.zeros_like(words)], axis=1),
        "text": _padded(text, text_lengths),
        "audio": _padded(audio, audio_lengths),
        "vision": _padded(vision, vision_lengths),
        "audio_lengths": audio_lengths.tolist(),
        "vision_lengths": vision_lengths.tolist(),
        "regression_labels": labels,
        "classification_labels": 1 + np.sign(labels).astype(np.int64),
        "annotations": [("Negative", "Neutral", "Positive")[1 + int(s)] for s in np.sign(labels)],
        "id": [f"synthetic_{split}_{i // 10:04d}$_${i % 10}" for i in range(count)],
    }
    if inputs.label_max == 1.0:  # SIMS labels each modality as well
        for m in MODALITIES:
            data[f"regression_labels_{m[0].upper()}"] = np.float32(seen[m])
    return data


def _sentence(words: Words) -> str:
    """The words between [CLS] and [SEP]."""
    return " ".join(_WORDS[w] for w in words[1:-1])


def _token_ids(words: Words) -> Words:
    """Vocabulary ids as BERT has them: [CLS], [SEP], and words from 1000 on."""
    return np.array([*range(_FIRST_WORD, _FIRST_WORD + len(_WORDS)), _CLS, _SEP])[words]


def _padded(x: Array, lengths: Words) -> npt.NDArray[np.float32]:
    return np.where((np.arange(x.shape[1]) < lengths[:, None])[..., None], x, 0.0).astype(np.float32)


def _ragged(steps: int, count: int, generator: np.random.Generator) -> Words:
    """Lengths between three quarters of `steps` and all of them."""
    return generator.integers(-(-3 * steps // 4), steps + 1, count)


def _orders(value: Array, motifs: int, generator: np.random.Generator) -> Array:
    """Signs [samples, motifs], shuffled, whose mean is the nearest to `value` that so many signs can have."""
    ups = np.round(motifs * (1.0 + value) / 2.0)
    signs = np.where(np.arange(motifs) < ups[:, None], 1.0, -1.0)
    return generator.permuted(signs, axis=1)


def _places(first: int, lengths: Words, motifs: int, width: int, generator: np.random.Generator) -> Words:
    """Where each motif of `width` steps begins, [samples, motifs]: one per equal slot of [first, length), never
    touching the next one."""
    slot = (lengths - first) / motifs
    room = np.floor(slot - width - 1)
    shift = np.floor(generator.random((len(lengths), motifs)) * (room[:, None] + 1))
    return (first + np.floor(slot[:, None] * np.arange(motifs)) + shift).astype(np.int64)


def _make_words(steps: int, world: _World, seen: Array, generator: np.random.Generator) -> tuple[Words, Words]:
    """Word numbers [samples, steps] and lengths; the two numbers after the vocabulary are [CLS] and [SEP]."""
    count, rows = len(seen), np.arange(len(seen))
    lengths = _ragged(steps, count, generator)
    # Fillers that lean towards the sentiment: the linear trace.
    lean = np.exp(0.5 * seen[:, None] * world.valence * 2.0)
    edges = np.cumsum(lean / lean.sum(axis=1, keepdims=True), axis=1)
    draws = generator.random((count, steps))
    words = np.minimum((draws[:, :, None] > edges[:, None]).sum(axis=2), len(_FILLERS) - 1)

    flipped = generator.random(count) < _FLIP_PROBABILITY["text"]
    halved = (np.abs(seen) <= 0.5) & (generator.random(count) < _HALF_PROBABILITY)
    words[:, 1] = np.where(flipped, _SUPPOSEDLY, _TRULY)
    words[:, 2] = np.where(halved, _SLIGHTLY, _VERY)

    first = max(4, steps // 4)
    motifs = int(np.clip((lengths.min() - 1 - first) // 3, 1, 3))
    orders = _orders(seen * np.where(flipped, -1.0, 1.0) * np.where(halved, 2.0, 1.0), motifs, generator)
    places = _places(first, lengths - 1, motifs, 2, generator)
    words[rows[:, None], places] = np.where(orders > 0, _BAD, _GOOD)
    words[rows[:, None], places + 1] = np.where(orders > 0, _GOOD, _BAD)
    words[:, 0] = len(_WORDS)
    words[rows, lengths - 1] = len(_WORDS) + 1
    return words, lengths


def _make_frames(
    m: str, inputs: Inputs, world: _World, seen: Array, generator: np.random.Generator
) -> tuple[Array, Words]:
    """Audio or vision features [samples, steps, features] and lengths."""
    steps, features, count = inputs.modality(m).max_steps, inputs.modality(m).features, len(seen)
    rows = np.arange(count)
    lengths = _ragged(steps, count, generator)
    x = 0.6 * generator.standard_normal((count, steps, features))
    motif_direction, cue_direction, level_direction = world.directions[m]

    # The level of a whole clip varies more between speakers than with their sentiment.
    level = 0.25 * seen + 0.4 * generator.standard_normal(count)
    x += level[:, None, None] * level_direction

    flipped = generator.random(count) < _FLIP_PROBABILITY[m]
    contour = np.array([1.0, 1.0, -1.0, -1.0])
    if _FLIP_PROBABILITY[m]:
        x[:, 1:5] += np.where(flipped, -1.5, 1.5)[:, None, None] * contour[:, None] * cue_direction

    first = max(6, steps // 5)
    motifs = int(np.clip((lengths.min() - first) // (len(contour) + 1), 1, 5))
    orders = _orders(seen * np.where(flipped, -1.0, 1.0), motifs, generator)
    places = _places(first, lengths, motifs, len(contour), generator)
    for step, height in enumerate(contour):
        # A rise starts low: its contour is the mirror of a fall's.
        x[rows[:, None], places + step] -= 1.5 * (height * orders)[..., None] * motif_direction
    return x * world.scale[m] + world.offset[m], lengths
