"""What sample mixing is worth: every method against none, over training-set sizes and seeds, on the synthetic set.

    python benchmarks/mixing_study.py --out docs/results/mixing_study.json
    python benchmarks/mixing_study.py --study ablations --out docs/results/ablation_study.json

Every run is the tiny preset on the first n training samples; the seed makes weights, order and corruption, and the set
itself is the same for all. The checkpoint is the one that validation chooses, the numbers are those of the test split:
with all modalities, and the mean of the six variants that miss some. Runs are added to the JSON one by one, with a
Markdown table of means and standard deviations beside it: a study that is stopped goes on where it was.
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Read once, when torch is loaded: waiting threads sleep instead of keeping a core from whoever could use it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from machine import describe

from hcmen.base import metrics
from hcmen.data import MultimodalDataset, Split
from hcmen.data.mmsa import dataset_from_mmsa
from hcmen.data.synthetic import SAMPLES, make_synthetic
from hcmen.training.checkpoint import load_checkpoint, write_json, write_whole
from hcmen.training.config import MIXES, TrainConfig
from hcmen.training.evaluate import predict_variants
from hcmen.training.presets import preset_named
from hcmen.training.trainer import Trainer

# What each arm changes: of the model, of the training.
Arm = tuple[Mapping[str, Any], Mapping[str, Any]]
STUDIES: dict[str, dict[str, Arm]] = {
    "mixing": {
        **{name: ({}, {"mix": name}) for name in MIXES},
        "polarity": ({}, {"aux": "polarity"}),
        "manifold + polarity": ({}, {"mix": "manifold", "aux": "polarity"}),
    },
    "ablations": {
        "none": ({}, {}),
        "without proxies": ({"proxies": False}, {}),
        "without alignment": ({}, {"alignment_weight": 0.0}),
        "without CNN": ({"cnn": False}, {}),
        "without Mamba": ({"mamba": False}, {}),
        "50 tokens": ({"tokens": 50}, {}),
    },
}
MEASURES = (("full", "mae"), ("full", "acc2"), ("missing", "mae"), ("missing", "acc2"))


def first(split: Split, count: int) -> Split:
    """The first `count` samples of `split`."""
    return dataclasses.replace(
        split,
        features={m: x[:count] for m, x in split.features.items()},
        lengths={m: n[:count] for m, n in split.lengths.items()},
        labels=split.labels[:count],
        ids=split.ids[:count],
    )


def one_run(arm: Arm, dataset: MultimodalDataset, samples: int, train: TrainConfig) -> dict[str, Any]:
    """Trains and tests one model.

    Returns:
        epoch, seconds, and per condition (full, missing) the MAE in label units and Acc-2 as a share.
    """
    model_changes, train_changes = arm
    config = dataclasses.replace(preset_named("tiny").model, **model_changes)
    data = dataclasses.replace(dataset, splits={**dataset.splits, "train": first(dataset.splits["train"], samples)})
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        Trainer(config, dataclasses.replace(train, **train_changes), data, Path(folder)).run()
        model, described = load_checkpoint(folder)
    family = metrics.family_for(dataset.label_min, dataset.label_max)
    accuracy = family.acc2
    truth = dataset.splits["test"].labels
    found = {
        name: metrics.scores(truth, scores, family)
        for name, scores in predict_variants(model, dataset.splits["test"]).items()
    }
    missing = [scores for name, scores in found.items() if name != "full"]
    return {
        "epoch": described["epoch"],
        "seconds": round(time.monotonic() - started, 1),
        "full": {"mae": found["full"]["mae"], "acc2": found["full"][accuracy]},
        "missing": {
            "mae": statistics.fmean(s["mae"] for s in missing),
            "acc2": statistics.fmean(s[accuracy] for s in missing),
        },
    }


def table(results: Mapping[str, Any]) -> str:
    """Means and standard deviations over the seeds in Markdown; a cell of a single run has no deviation."""
    lines = [
        f"# {results['settings']['study'].capitalize()}, on the synthetic set",
        "",
        f"Preset tiny, {results['settings']['epochs']} epochs, checkpoint chosen on validation, test split; mean and "
        "standard deviation over seeds. Missing is the mean of the six variants that lack a modality. MAE is in label "
        "units, lower is better.",
        "",
        "| training samples | arm | runs | full: MAE | full: Acc-2 % | missing: MAE | missing: Acc-2 % |",
        "|---|---|---|---|---|---|---|",
    ]
    runs = results["runs"]
    for samples in sorted({r["samples"] for r in runs}):
        for arm in STUDIES[results["settings"]["study"]]:
            own = [r for r in runs if r["samples"] == samples and r["arm"] == arm]
            if not own:
                continue
            cells = []
            for condition, measure in MEASURES:
                values = [r[condition][measure] * (100 if measure == "acc2" else 1) for r in own]
                digits = 1 if measure == "acc2" else 3
                spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
                cells.append(f"{statistics.fmean(values):.{digits}f}{spread}")
            lines.append(f"| {samples} | {arm} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Does the runs that the JSON does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", choices=list(STUDIES), default="mixing")
    parser.add_argument("--arms", nargs="+", help="Some of the study's arms only.")
    parser.add_argument("--sizes", nargs="+", type=int, default=[100, 400, 1600], help="Training samples.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=preset_named("tiny").train.epochs)
    parser.add_argument(
        "--held-out", nargs=2, type=int, default=SAMPLES["tiny"][1:], help="Validation and test samples."
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    arms = STUDIES[a.study]
    unknown = [name for name in a.arms or () if name not in arms]
    if unknown:
        parser.error(f"unknown arm '{unknown[0]}': choose from {', '.join(arms)}")

    torch.set_num_threads(a.threads)
    settings = {
        "study": a.study,
        "preset": "tiny",
        "epochs": a.epochs,
        "set": [max(*a.sizes, SAMPLES["tiny"][0]), *a.held_out],
    }
    results: dict[str, Any] = {"schema_version": 1, "machine": describe(), "settings": settings, "runs": []}
    if a.out.exists():
        results = json.loads(a.out.read_text(encoding="utf-8"))
        if results["settings"] != settings:
            sys.exit(f"{a.out}: was made with {results['settings']}, not {settings}: choose another --out")
    done = {(r["arm"], r["samples"], r["seed"]) for r in results["runs"]}

    preset = preset_named("tiny")
    dataset = dataset_from_mmsa(
        make_synthetic(preset.model.inputs, tuple(settings["set"]), 0), "synthetic", preset.model.inputs
    )
    a.out.parent.mkdir(parents=True, exist_ok=True)
    # Seeds outermost: a study that is stopped early has every arm.
    for seed in a.seeds:
        for samples in a.sizes:
            for name in a.arms or arms:
                if (name, samples, seed) in done:
                    continue
                train = dataclasses.replace(preset.train, epochs=a.epochs, seed=seed)
                run = {
                    "arm": name,
                    "samples": samples,
                    "seed": seed,
                    **one_run(arms[name], dataset, samples, train),
                }
                results["runs"].append(run)
                write_json(a.out, results)
                write_whole(a.out.with_suffix(".md"), table(results).encode())
                print(f"{name}, {samples} samples, seed {seed}: {json.dumps(run)}", file=sys.stderr)
    sys.stdout.reconfigure(errors="replace")  # the table has signs that not every locale has
    print(table(results), end="")


if __name__ == "__main__":
    main()
