"""A BERT of true size inside the model: what export, parity, disk and a run cost.

    python benchmarks/text_encoder.py --out docs/results/text_encoder.json

The weights are random, of BERT-base's sizes (bert-base-uncased's vocabulary count) and HCMEN's MOSI preset: nothing is
learned here, and nothing needs to be for size, time and parity. Medians of single clips at full length on the exported
graphs, variant by variant in turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from machine import describe

from hcmen.base.console import Console
from hcmen.base.modalities import VARIANTS, variant_named
from hcmen.export.bundle import export_bundle
from hcmen.models.hcmen.model import HCMEN
from hcmen.models.text_encoder_config import TextEncoderConfig
from hcmen.runtime import load
from hcmen.training.checkpoint import save_checkpoint, write_json
from hcmen.training.config import TrainConfig
from hcmen.training.presets import preset_named

BERT_BASE = TextEncoderConfig(vocabulary=30522, layers=12, heads=12, intermediate=3072, positions=512)


def main() -> None:
    """Exports to a temporary folder, runs, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=[v.name for v in VARIANTS])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    config = dataclasses.replace(preset_named("mosi").model, text_encoder=BERT_BASE)
    model = HCMEN(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, bundle = Path(folder) / "checkpoint", Path(folder) / "bundle"
        checkpoint.mkdir()
        save_checkpoint(checkpoint, model, TrainConfig(), epoch=0, validation={}, dataset={"name": "none"})
        del model
        started = time.monotonic()
        manifest = export_bundle(checkpoint, bundle, [variant_named(n) for n in a.variants], console=Console())
        exported = time.monotonic() - started
        device = load(bundle, threads=a.threads)
        rng = np.random.default_rng(0)
        clip = {m: rng.standard_normal((s.max_steps, s.features)).astype(np.float32) for m, s in
                (("audio", config.audio), ("vision", config.vision))}  # fmt: skip
        steps = config.text.max_steps
        clip["text_tokens"] = np.stack(
            [rng.integers(BERT_BASE.vocabulary, size=steps), np.ones(steps, int), np.zeros(steps, int)]
        )
        times: dict[str, list[float]] = {name: [] for name in a.variants}
        for round_ in range(a.rounds + 2):
            for name, own in times.items():
                seconds = device(clip, variant=name).run_seconds
                if round_ >= 2:
                    own.append(seconds)
            print(f"round {round_ + 1} of {a.rounds + 2}", file=sys.stderr)
        result = {
            "schema_version": 1,
            "command": " ".join(["python", *sys.argv]),
            "machine": describe(),
            "threads": a.threads,
            "model": config.to_json(),
            "export_seconds": round(exported, 1),
            "checkpoint_bytes": (checkpoint / "checkpoint.safetensors").stat().st_size,
            "weights_bytes": manifest.weights.bytes,
            "variants": {
                name: {
                    "graph_bytes": v.graph.bytes,
                    "parity_max_abs": v.parity["outputs"]["score"]["max_abs"],
                    "parity_passed": v.parity["passed"],
                    "median_ms": round(1e3 * statistics.median(times[name]), 3),
                    "n": len(times[name]),
                }
                for name, v in manifest.variants.items()
            },
        }
    a.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(a.out, result)
    print(json.dumps(result["variants"], indent=1))


if __name__ == "__main__":
    main()
