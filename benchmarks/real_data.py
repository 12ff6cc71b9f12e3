"""HCMEN on real data, several seeds, beside floors, ridge regressions and a plain network on the same samples.

    hcmen-convert movies.csv build/movies --text-encoder minilm
    python benchmarks/real_data.py --data movies=build/movies --encoder minilm --out docs/results/real_texts.json

Each set is a folder that hcmen-convert wrote of a table: texts, features, or both. hcmen-train trains it once per seed,
where it has texts in two ways: with the text encoder frozen, and learning. The checkpoint is the one that validation
chose. The numbers are those of the test split, in label units, for each variant. Beside them stand, on the same splits:

    floor            the mean training label (MAE), the commonest class (Acc-2)
    valid. median    the median validation label: what a calibrated score comes down to where nothing is known
    linear           the linear model of hcmen-train's report: tf-idf of texts, means of features over the steps
    ridge            ridge regression on mean and maximum of the frozen encoder's outputs, and on the first step of what
                     is features: the sample's own row, in a table with --context. The penalty is chosen by validation
    ridge, calibr.   its scores scaled and shifted on validation, as HCMEN's are
    MLP              a network of one hidden layer on the same numbers; the epoch is chosen by validation
    ..., raw         HCMEN without that scale and shift

Runs are added to the JSON one by one, with tables in Markdown beside it: a study that is stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Read once, when torch is loaded: waiting threads sleep instead of keeping a core from whoever could use it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from machine import describe
from real_tables import tables
from torch import nn

from hcmen.base import metrics
from hcmen.data import MultimodalDataset, Split
from hcmen.data.baseline import linear_baseline, ridge
from hcmen.data.mmsa import read_mmsa
from hcmen.media.encoder_folder import encoder_folder
from hcmen.models import load
from hcmen.models.contract import uncalibrated
from hcmen.models.text_encoder import TextEncoder, load_weights, read_sizes, read_weights
from hcmen.training.checkpoint import write_json, write_whole
from hcmen.training.evaluate import calibration_of, predict_variants, texts_read
from hcmen.training.presets import preset_for, preset_named, sized

ARMS = {
    "hcmen, encoder frozen": ("--text-encoder-learning-rate", "0"),
    "hcmen, encoder learning": (),
    "hcmen": (),  # of features alone
}
MLP_WIDTH, MLP_EPOCHS, MLP_BATCH = 256, 30, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", action="append", required=True, metavar="NAME=FOLDER", help="repeatable")
    parser.add_argument("--encoder", help="a BERT: its folder, or the package that holds it")
    parser.add_argument("--seeds", default="1,2,3,4,5")
    parser.add_argument("--arms", default="frozen,learning", help="where there are texts; frozen,learning by default")
    parser.add_argument("--work", type=Path, default=Path("build/real"), help="where the runs are")
    parser.add_argument("--preset", help="instead of the one that the data choose")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="passed on to hcmen-train")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    encoder = encoder_folder(a.encoder) if a.encoder else None
    begun = {"machine": describe(), "encoder": a.encoder, "sets": {}}  # each run names its own machine
    study = json.loads(a.out.read_text()) if a.out.exists() else begun
    sets = study["sets"]
    for name, _, folder in (item.partition("=") for item in a.data):
        dataset, words = read(Path(folder), encoder)
        if name not in sets:
            sets[name] = beside(dataset, encoder if words else None, [int(seed) for seed in a.seeds.split(",")])
        for way in [f"hcmen, encoder {kind}" for kind in a.arms.split(",")] if words else ["hcmen"]:
            arm = f"{way}, preset {a.preset}" if a.preset else way
            told = ["--data", folder, "--seeds", a.seeds, *ARMS[way]]
            told += ["--preset", a.preset] if a.preset else []
            told += ["--text-encoder", a.encoder] if words else []
            told += [word for change in a.set for word in ("--set", change)]
            if sets[name]["runs"].get(arm, {}).get("told") == told:
                continue
            sets[name]["runs"][arm] = trained(a.work / name / arm.replace(", ", "-").replace(" ", "-"), told, dataset)
            write_json(a.out, study)
            write_whole(a.out.with_suffix(".md"), f"{tables(sets)}\n".encode())
            print(f"{name}: {arm}", flush=True)


def read(folder: Path, encoder: Path | None) -> tuple[MultimodalDataset, bool]:
    """The set in `folder`, and whether its text is tokens for the encoder."""
    words = (folder / "train" / "text_bert.npy").exists()
    if words and encoder is None:
        raise SystemExit(f"{folder} has texts: name what reads them with --encoder")
    of_encoder = read_sizes(encoder) if words and encoder else (None, 0)
    return read_mmsa(folder, lambda x: sized(preset_named(preset_for(x)[0]), x, *of_encoder).inputs), words


def trained(out: Path, told: Sequence[str], dataset: MultimodalDataset) -> dict[str, Any]:
    """What hcmen-train reaches on the test split per variant; a run that is there goes on, or has ended.

    `unheard` counts the seeds in which a variant does not listen to modalities that it is given.
    """
    begun = time.monotonic()
    words = ["--out", str(out), *(["--resume"] if out.exists() else []), *told, "--format", "json"]
    done = subprocess.run([sys.executable, "-m", "hcmen", "train", *words], stdout=subprocess.PIPE, check=True)
    seeds = json.loads(done.stdout)["seeds"]
    reports = [json.loads((out / f"seed-{seed}" / "report.json").read_text()) for seed in seeds]
    scored: dict[str, list[dict[str, Any]]] = {"calibrated": [], "raw": []}
    errors: dict[str, list[Any]] = {}
    test = dataset.splits["test"]
    for seed in seeds:
        model = load(out / f"seed-{seed}")
        for name in scored:
            if name == "raw":
                model.calibrate(uncalibrated())
            found = predict_variants(model, test)
            scored[name].append({variant: measures(said, dataset) for variant, said in found.items()})
            for variant, said in found.items() if name == "calibrated" else ():
                said = said.clip(dataset.label_min, dataset.label_max)
                errors.setdefault(variant, []).append(np.abs(said - test.labels))
    for report, again in zip(reports, scored["calibrated"], strict=True):
        for variant, found in again.items():
            assert abs(found["mae"] - report["test"][variant]["hcmen"]["mae"]) < 1e-4, (variant, found["mae"])
    return {
        "machine": describe(),
        "told": told,
        "seconds": round(time.monotonic() - begun),
        "epochs": [report["epoch"] for report in reports],
        "validation_mae": metrics.spread([report["validation_mae"] for report in reports]),
        "unheard": Counter(
            f"{', '.join(modalities)} in {variant}"
            for report in reports
            for variant, modalities in report.get("unheard", {}).items()
        ),
        "test": {v: spreads([one[v] for one in scored["calibrated"]]) for v in scored["calibrated"][0]},
        "test_raw": {v: spreads([one[v] for one in scored["raw"]]) for v in scored["raw"][0]},
        "gains": gains({variant: np.mean(runs, axis=0) for variant, runs in errors.items()}, test),
    }


def measures(prediction: Any, dataset: MultimodalDataset) -> dict[str, float]:
    """MAE, Corr and the family's Acc-2 of test scores, within the label range."""
    family = metrics.family_for(dataset.label_min, dataset.label_max)
    found = metrics.scores(dataset.splits["test"].labels, prediction, family)
    return {"mae": found["mae"], "corr": found["corr"], "acc2": found[family.acc2]}


def gains(errors: Mapping[str, Any], test: Split) -> list[dict[str, Any]]:
    """By how much the MAE changes when a modality is given as well, with an interval of 95 %.

    errors [samples] are means over the seeds. The interval is a bootstrap's over whole groups, a sample's being its id
    up to the last "_": sentences of one video are alike.
    """
    present = {v.name: frozenset(v.present) for v in test.variants}
    _, group = np.unique([name.rpartition("_")[0] or name for name in test.ids], return_inverse=True)
    draws = np.random.default_rng(0).multinomial(group.max() + 1, [1 / (group.max() + 1)] * (group.max() + 1), 10_000)
    found = []
    for small, large in itertools.permutations(present, 2):
        if present[small] < present[large] and len(present[large]) == len(present[small]) + 1:
            (given,) = present[large] - present[small]
            change = errors[large] - errors[small]
            drawn = draws @ np.bincount(group, change) / (draws @ np.bincount(group))
            interval = np.quantile(drawn, [0.025, 0.975]).tolist()
            found.append(
                {"of": small, "given": given, "to": large, "change": float(change.mean()), "interval": interval}
            )
    return found


def spreads(runs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    return {name: metrics.spread([run[name] for run in runs]) for name in runs[0]}


# --- what stands beside it --------------------------------------------------------------------------------------------


def beside(dataset: MultimodalDataset, encoder: Path | None, seeds: Sequence[int]) -> dict[str, Any]:
    """The sizes of a set, and per variant the test scores of everything that is no HCMEN."""
    splits = dataset.splits
    family = metrics.family_for(dataset.label_min, dataset.label_max)
    floor = metrics.floor(splits["test"].labels, splits["train"].labels, family)
    median = np.full(len(splits["test"]), np.median(splits["valid"].labels))
    columns = described(dataset, encoder)
    rows: dict[str, Any] = {}
    for variant in splits["test"].variants:
        x = {name: torch.cat([columns[name][m] for m in variant.present], dim=1) for name in splits}
        line = ridge({name: block.double().numpy() for name, block in x.items()}, dataset)
        scale, shift = calibration_of(splits["valid"].labels, line["valid"])
        rows[variant.name] = {
            "floor": {"mae": floor["mae"], "corr": floor["corr"], "acc2": floor[family.acc2]},
            "valid. median": measures(median, dataset),
            "linear": measures(linear_baseline(dataset, variant), dataset),
            "ridge": measures(line["test"], dataset),
            "ridge, calibr.": measures(scale * line["test"] + shift, dataset),
            "MLP": spreads([measures(mlp(x, dataset, seed), dataset) for seed in seeds]),
        }
    return {
        "samples": {name: len(split) for name, split in splits.items()},
        "label_range": [dataset.label_min, dataset.label_max],
        "beside": rows,
        "runs": {},
    }


def described(dataset: MultimodalDataset, encoder: Path | None) -> dict[str, dict[str, torch.Tensor]]:
    """Per split and modality [samples, columns], standardised by the training split.

    Of a text of tokens: mean and maximum of the frozen encoder's outputs over its steps. Of features: the first step.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    if encoder is not None:
        model = TextEncoder(*read_sizes(encoder)).eval()
        load_weights(model, read_weights(model, encoder))
    for name, split in dataset.splits.items():
        found[name] = {m: torch.from_numpy(np.array(x[:, 0])).float() for m, x in split.features.items()}
        if encoder is not None:
            steps, lengths = split.steps["text"], torch.from_numpy(split.lengths["text"])
            y = torch.from_numpy(texts_read(model, split).model_input("text", slice(None), steps))
            real = (torch.arange(steps) < lengths[:, None])[..., None]
            mean = y.sum(dim=1) / lengths[:, None]
            found[name]["text"] = torch.cat([mean, y.masked_fill(~real, -torch.inf).amax(dim=1)], dim=1)
    scale = {m: (x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)) for m, x in found["train"].items()}
    return {name: {m: (x - scale[m][0]) / scale[m][1] for m, x in of.items()} for name, of in found.items()}


def mlp(x: dict[str, torch.Tensor], dataset: MultimodalDataset, seed: int) -> np.ndarray:
    """Test scores by a network of one hidden layer, trained on the absolute error; validation chooses the epoch."""
    torch.manual_seed(seed)
    labels = {name: torch.from_numpy(split.labels) for name, split in dataset.splits.items()}
    model = nn.Sequential(
        nn.Dropout(0.2), nn.Linear(x["train"].shape[1], MLP_WIDTH), nn.ReLU(), nn.Dropout(0.2), nn.Linear(MLP_WIDTH, 1)
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    best: tuple[float, Any] = (float("inf"), None)
    for _ in range(MLP_EPOCHS):
        model.train()
        for rows in torch.randperm(len(labels["train"])).split(MLP_BATCH):
            optimiser.zero_grad()
            (model(x["train"][rows])[:, 0] - labels["train"][rows]).abs().mean().backward()
            optimiser.step()
        model.eval()
        with torch.inference_mode():
            said = {name: model(x[name])[:, 0] for name in ("valid", "test")}
        error = float((said["valid"] - labels["valid"]).abs().mean())
        if error < best[0]:
            best = error, said["test"].double().numpy()
    return np.clip(best[1], dataset.label_min, dataset.label_max)


if __name__ == "__main__":
    main()
