"""Scores a clip as if it came live: frames in small chunks, a window of one second every quarter of a second.

python samples/stream.py [BUNDLE [CLIP]]         BUNDLE is build/bundle, or else the demo's
"""

from __future__ import annotations

import sys
from pathlib import Path

from hcmen.runtime import load, read_clip

ROOT = Path(__file__).resolve().parent.parent
RATES = {"audio": 20, "vision": "14.985"}


def main() -> None:
    """Pushes a tenth of a second at a time, then what is left of the last window."""
    arguments = sys.argv[1:]
    with load(arguments[0] if arguments else None) as model:
        clip = read_clip(arguments[1] if len(arguments) > 1 else ROOT / "samples" / "clip.npz", model.inputs)
        frames = {m: x for m, x in clip.features.items() if m in RATES}
        stream = model.stream("auto", window=1, hop="0.25", rates={m: RATES[m] for m in frames})
        sent = dict.fromkeys(frames, 0)
        tenths = 0
        while any(sent[m] < len(x) for m, x in frames.items()):
            tenths += 1
            chunk = {}
            for m, x in frames.items():
                upto = int(tenths * float(RATES[m]) / 10)
                chunk[m] = x[sent[m] : upto]
                sent[m] = upto
            updates = stream.push(**chunk)
            if all(sent[m] >= len(x) for m, x in frames.items()):
                updates += stream.flush(partial=True)
            for u in updates:
                print(f"{u.start_seconds:5.2f} to {u.end_seconds:5.2f} s  {u.variant:<13}  {u.score:+.4f}  "
                      f"{u.latency_seconds * 1e3:.1f} ms")  # fmt: skip
        print(stream.counts)


if __name__ == "__main__":
    main()
