"""The smallest model that still has every part, for tests that train; and a bundle of it, exported beforehand."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from hcmen.base.clip import write_clip
from hcmen.base.inputs import FeatureConfig
from hcmen.models.hcmen.config import ModelConfig

MICRO = ModelConfig(
    FeatureConfig(6, 10),
    FeatureConfig(3, 16),
    FeatureConfig(4, 16),
    width=8,
    tokens=4,
    states=2,
    expand=1,
    alignment_tokens=2,
)


def micro_bundle_at(target: Path) -> Path:
    """Unpacks the bundle that files/make_micro_bundle.py exported, all variants of a random `MICRO`, to `target`."""
    with zipfile.ZipFile(Path(__file__).resolve().parents[1] / "files" / "micro_bundle.zip") as archive:
        archive.extractall(target)
    return target


def micro_clip(folder: Path, steps: int = 5) -> Path:
    """A clip of random features for that bundle."""
    feeds = micro_feeds(np.random.default_rng(0), 1, steps)
    write_clip(folder / "clip.npz", {name: x[0] for name, x in feeds.items() if x.ndim == 3})
    return folder / "clip.npz"


def micro_feeds(rng: np.random.Generator, batch: int, steps: int) -> dict[str, np.ndarray]:
    """What its graph of all modalities takes: random features, and lengths from one step on."""
    feeds: dict[str, np.ndarray] = {}
    for name, modality in (("text", MICRO.text), ("audio", MICRO.audio), ("vision", MICRO.vision)):
        feeds[name] = rng.normal(size=(batch, steps, modality.features)).astype(np.float32)
        feeds[f"{name}_length"] = rng.integers(1, steps + 1, batch)
    return feeds
