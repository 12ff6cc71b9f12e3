"""Scores a clip from Python.

python samples/predict.py [BUNDLE [CLIP]]         BUNDLE is build/bundle, or else the demo's
"""

from __future__ import annotations

import sys
from pathlib import Path

from hcmen.runtime import load

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Scores one clip with all it carries, then as if its audio had been lost."""
    arguments = sys.argv[1:]
    model = load(arguments[0] if arguments else None)
    clip = arguments[1] if len(arguments) > 1 else ROOT / "samples" / "clip.npz"

    result = model(clip)
    print(f"{result.variant}: {result.score:+.4f}")
    for modality, weight in result.modality_weights.items():
        print(f"  {modality:<7}{weight:6.1%}")

    print(f"audio_missing: {model(clip, variant='audio_missing').score:+.4f}")


if __name__ == "__main__":
    main()
