"""Generated files of the layout, sizes and dtypes of MMSA's, few samples each, with the real files' quirks in them."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hcmen.models.hcmen.config import ModelConfig
from hcmen.training.presets import preset_named

COUNTS = {"train": 5, "valid": 3, "test": 4}


@dataclass(frozen=True)
class File:
    """One of the published files: steps per modality, and whether audio and vision come with lengths."""

    preset: str
    text: int
    audio: int
    vision: int
    aligned: bool = False
    audio_dtype: str = "float64"

    @property
    def config(self) -> ModelConfig:
        return preset_named(self.preset).model


FILES = {
    "mosi unaligned": File("mosi", 50, 375, 500),
    "mosi aligned": File("mosi", 50, 50, 50, aligned=True),
    "mosei unaligned": File("mosei", 50, 500, 500),
    "mosei aligned": File("mosei", 50, 50, 50, aligned=True),
    "sims unaligned": File("sims", 39, 400, 55, audio_dtype="float32"),
    "simsv2 unaligned": File("simsv2", 50, 925, 232, audio_dtype="float32"),
}


def make(file: File, seed: int = 0) -> dict[str, dict[str, Any]]:
    """The dict of `file`: sample 1 has every length full; sample 0 has zero frames inside its valid prefix."""
    generator = np.random.default_rng(seed)
    return {split: _split(file, split, count, generator) for split, count in COUNTS.items()}


def _split(file: File, name: str, count: int, generator: np.random.Generator) -> dict[str, Any]:
    steps = {"text": file.text, "audio": file.audio, "vision": file.vision}
    lengths = {m: generator.integers(6, t, count) for m, t in steps.items()}
    if file.aligned:
        lengths = dict.fromkeys(steps, lengths["text"])
    for m, t in steps.items():
        lengths[m][1] = t
    real = {m: np.arange(t) < lengths[m][:, None] for m, t in steps.items()}
    x = {m: generator.standard_normal((count, t, file.config.modality(m).features)) for m, t in steps.items()}
    for m in ("audio", "vision"):
        x[m][~real[m]] = 0.0
        x[m][0, 2:4] = 0.0
    tokens = np.where(real["text"], generator.integers(1000, 30000, (count, file.text)), 0)
    labels = np.round(generator.uniform(file.config.label_min, file.config.label_max, count), 1)
    data = {
        "raw_text": np.array([f"clip {i}" for i in range(count)], dtype=object),
        "audio": x["audio"].astype(file.audio_dtype),
        "vision": x["vision"].astype(file.audio_dtype),
        "id": np.array([f"video_{name}$_${i}" for i in range(count)], dtype=object),
        "text": x["text"].astype(np.float32),
        "text_bert": np.stack([tokens, real["text"], np.zeros_like(tokens)], axis=1).astype(np.float64),
        "annotations": np.array(["Neutral"] * count),
        "classification_labels": np.sign(labels) + 1,
        "regression_labels": labels,
    }
    if not file.aligned:
        data |= {"audio_lengths": lengths["audio"].tolist(), "vision_lengths": lengths["vision"].tolist()}
    if file.preset.startswith("sims"):
        for m in "TAV":
            data |= {f"regression_labels_{m}": labels, f"classification_labels_{m}": np.sign(labels) + 1}
    return data


def soil(data: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Puts numbers that are none into audio and vision of each split; how many per modality."""
    counts = {"text": 0, "audio": 0, "vision": 0}
    for split in data.values():
        audio, vision = split["audio"], split["vision"]
        audio[0, 0, 0], audio[0, 1, 1], audio[1, -1, -1] = -np.inf, np.nan, np.inf
        vision[1, 0, 0] = -np.inf
        counts["audio"] += 3
        counts["vision"] += 1
        if audio.dtype == np.float64:
            audio[1, 0, 0], audio[1, 0, 1] = 1e300, -1e39
            counts["audio"] += 2
    return counts


def expected(split: dict[str, Any], m: str) -> list[np.ndarray]:
    """The valid steps per sample, by a plain loop over what was stored."""
    result = []
    for i, frames in enumerate(split[m]):
        clean = [
            [float(v) if abs(float(v)) <= float(np.finfo(np.float32).max) else 0.0 for v in frame] for frame in frames
        ]
        if m == "text":
            length = sum(int(flag) for flag in split["text_bert"][i][1])
        elif f"{m}_lengths" in split:
            length = split[f"{m}_lengths"][i]
        else:
            length = max(step for step, frame in enumerate(clean, 1) if any(frame))
        result.append(np.array(clean[:length], dtype=np.float32))
    return result


def written(path: Path, data: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(data, protocol=protocol))
    return path
