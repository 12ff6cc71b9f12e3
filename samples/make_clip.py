"""Makes samples/clip.npz: one test clip of the synthetic set that the demo trains on.

python samples/make_clip.py
"""

from __future__ import annotations

from pathlib import Path

from hcmen.base.clip import write_clip
from hcmen.data.synthetic import SAMPLES, make_synthetic
from hcmen.training.presets import preset_named

CLIP = Path(__file__).resolve().parent / "clip.npz"
INDEX = 7


def main() -> None:
    """Writes the clip and says what it is."""
    test = make_synthetic(preset_named("tiny").model.inputs, SAMPLES["tiny"], seed=0)["test"]
    features = {"text": test["text"][INDEX, : int(test["text_bert"][INDEX, 1].sum())]}
    for m in ("audio", "vision"):
        features[m] = test[m][INDEX, : test[f"{m}_lengths"][INDEX]]
    write_clip(CLIP, features)
    sizes = ", ".join(f"{m} {list(x.shape)}" for m, x in features.items())
    print(f"{CLIP}: {sizes}, label {test['regression_labels'][INDEX]:+.1f}, says: {test['raw_text'][INDEX]}")


if __name__ == "__main__":
    main()
