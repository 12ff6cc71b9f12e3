"""What raw words cost: an encoder in training with and without padding, and a bundle that scores a file of texts.

    python benchmarks/words.py --encoder minilm --texts train.txt --bundle build/words --out docs/results/words.json

TEXTS has one text a line. The two forms of the encoder take the same batches in turns, in one process; both views of a
batch are in it, as in training. Texts a second are those of whole processes of hcmen-run, their start included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Read once, when torch is loaded: waiting threads sleep instead of keeping a core from whoever could use it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from machine import describe
from tokenizers import Tokenizer
from torch import Tensor

from hcmen.media.encoder_folder import encoder_folder
from hcmen.models.text_encoder import TextEncoder, load_weights, read_sizes, read_tokenizer, read_weights
from hcmen.training.checkpoint import write_json

BATCH, STEPS = 32, 128


def batch(rows: list[list[int]]) -> Tensor:
    """Tokens [2 x rows, 3, longest]."""
    tokens = np.zeros((len(rows), 3, max(map(len, rows))), np.int64)
    for out, row in zip(tokens, rows, strict=True):
        out[:2, : len(row)] = [row, [1] * len(row)]
    return torch.from_numpy(np.concatenate([tokens, tokens]))


def training(folder: Path, texts: list[str], threads: int, rounds: int) -> dict[str, Any]:
    """Median milliseconds of each form, forward alone and with backward, and how far the two are apart."""
    torch.set_num_threads(threads)
    sizes, hidden = read_sizes(folder)
    encoder = TextEncoder(sizes, hidden)
    load_weights(encoder, read_weights(encoder, folder))
    ids = [x.ids[:STEPS] for x in Tokenizer.from_str(read_tokenizer(folder).decode()).encode_batch(texts)]
    rng = np.random.default_rng(0)
    forms = {"padded": encoder._padded, "packed": encoder._packed}
    spent: dict[str, list[float]] = {f"{form} {what}": [] for form in forms for what in ("forward", "both")}
    padding, apart = [], 0.0
    for _ in range(rounds + 1):
        tokens = batch([ids[i] for i in rng.choice(len(ids), BATCH, replace=False)])
        padding.append(1 - float(tokens[:, 1].float().mean()))
        outputs = []
        for name, form in forms.items():
            encoder.eval()
            with torch.no_grad():
                started = time.perf_counter()
                outputs.append(form(tokens))
                spent[f"{name} forward"].append(time.perf_counter() - started)
            encoder.train()
            encoder.zero_grad()
            started = time.perf_counter()
            form(tokens).square().sum().backward()
            spent[f"{name} both"].append(time.perf_counter() - started)
        apart = max(apart, float((outputs[0] - outputs[1]).abs().max()))
    median = {name: round(1e3 * statistics.median(x[1:]), 1) for name, x in spent.items()}
    return {
        "threads": threads,
        "milliseconds": median,
        "times_faster": {w: round(median[f"padded {w}"] / median[f"packed {w}"], 2) for w in ("forward", "both")},
        "padding": round(statistics.mean(padding), 3),
        "largest_difference": apart,
    }


def scoring(bundle: Path, texts: list[str], count: int, threads: int) -> dict[str, Any]:
    """Texts a second of one process, and seconds of one that scores a single text."""
    command = [sys.executable, "-m", "hcmen", "run", "--bundle", bundle, "--threads", str(threads), "--format", "json"]
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for n in (1, count):
            file = Path(folder) / "texts.txt"
            file.write_text("\n".join(texts[i % len(texts)] for i in range(n)), encoding="utf-8")
            started = time.perf_counter()
            subprocess.run([*command, "--text-file", file], check=True, capture_output=True)
            seconds[n] = time.perf_counter() - started
    return {
        "threads": threads,
        "texts": count,
        "seconds": round(seconds[count], 2),
        "texts_a_second": round(count / seconds[count]),
        "seconds_for_one": round(seconds[1], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--encoder", default="minilm", help="a BERT: its folder, or the package that holds it")
    parser.add_argument("--texts", type=Path, required=True, help="a file with one text a line")
    parser.add_argument("--bundle", type=Path, help="a bundle with a text encoder")
    parser.add_argument("--count", type=int, default=10_000, help="texts for the bundle")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    texts = [line for line in arguments.texts.read_text("utf-8").splitlines() if line.strip()]
    found = {
        "schema_version": 1,
        "environment": describe(),
        "texts": {"count": len(texts), "mean_words": round(statistics.mean(len(t.split()) for t in texts), 1)},
        "batch": [2, BATCH],
        "training": [training(encoder_folder(arguments.encoder), texts, n, arguments.rounds) for n in (1, 2)],
    }
    if arguments.bundle is not None:
        found["scoring"] = [scoring(arguments.bundle, texts, arguments.count, n) for n in (1, 2)]
    write_json(arguments.out, found)


if __name__ == "__main__":
    main()
