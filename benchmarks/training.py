"""Seconds per training epoch at the size of CMU-MOSI, where they go, and the same model on the reference scan.

    python benchmarks/training.py --out docs/results/training_speed.json

Preset mosi, batches of 64, the synthetic set with MOSI's 1284 / 229 / 686 samples. Four parts, each a line of progress
on stderr per step:

    steps       whole optimiser steps (data, both views, losses, backward pass, optimiser), one after the other
    shares      two more under torch's profiler: the time of each operation's own work, by kind
    reference   the same model with every selective scan by selective_scan_ref, in turns with the native one; the
                convolutions are the native ones in both. For its gradients the reference keeps decay and state of every
                step, by calculation 14 GB for 64 samples, so both run on batches of 16
    epoch       one whole epoch with its validation, where the time left allows; the estimate from the median step is
                given beside it

Times are medians; a machine with other work on it shows in `load_average_1min` and in the quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Read once, when torch is loaded: waiting threads sleep instead of keeping a core from whoever could use it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from machine import describe
from torch.profiler import ProfilerActivity, profile

import hcmen.models.hcmen.layers
from hcmen.base.library import library_isa
from hcmen.data import MultimodalDataset
from hcmen.data.mmsa import dataset_from_mmsa
from hcmen.data.synthetic import SAMPLES, make_synthetic
from hcmen.mamba.scan import implementation, selective_scan_ref
from hcmen.training.presets import preset_named
from hcmen.training.trainer import Trainer

TARGET = 10.0
# Of an operation's name, the first that fits.
KINDS = {
    "scan": ("hcmen::selective_scan",),
    "causal_convolution": ("hcmen::causal_conv1d",),
    "cnn_block_convolution": ("convolution", "mkldnn_conv", "thnn_conv", "slow_conv"),
    # Projections, and the few products of tokens with tokens: pooling, matching, the alignment loss.
    "matrix_products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn_linear"),
    "norms_and_softmax": ("layer_norm", "softmax"),
    "optimiser": ("Optimizer.", "_foreach", "fused_adam"),
}


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def quartiles(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles, with the number of runs."""
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    return {
        "median_s": round(statistics.median(seconds), 4),
        "quartiles_s": [round(low, 4), round(high, 4)],
        "n": len(seconds),
    }


@contextmanager
def reference_scan() -> Iterator[None]:
    """Within the block the model's scans are `selective_scan_ref`, its convolutions what they were."""
    before = hcmen.models.hcmen.layers.selective_scan
    hcmen.models.hcmen.layers.selective_scan = selective_scan_ref  # type: ignore[assignment]
    try:
        yield
    finally:
        hcmen.models.hcmen.layers.selective_scan = before


class Bench:
    """One trainer in training mode, and its steps on batches of a fixed order."""

    def __init__(self, dataset: MultimodalDataset, folder: Path) -> None:
        chosen = preset_named("mosi")
        self.trainer = Trainer(chosen.model, chosen.train, dataset, folder)
        self.split = dataset.splits["train"]
        self.order = np.random.default_rng(0).permutation(len(self.split))
        self.trainer.model.train()

    def step(self, number: int, batch: int) -> tuple[float, float]:
        """Seconds and loss of step `number`, on `batch` samples that all steps of this number have."""
        start = number * batch % (len(self.order) - batch)
        torch.manual_seed(number)
        started = time.perf_counter()
        found = self.trainer._step(1, number, self.split, self.order[start : start + batch])
        return time.perf_counter() - started, found["loss"]

    def data_seconds(self, number: int, batch: int) -> float:
        """Seconds for the samples of a step alone: both views cut out and corrupted."""
        start = number * batch % (len(self.order) - batch)
        rows = self.order[start : start + batch]
        started = time.perf_counter()
        features, _, _ = self.trainer._corrupted(1, self.split, rows)
        for m, x in features.items():
            torch.from_numpy(self.split.features[m][rows, : x.shape[1]])
        return time.perf_counter() - started


def shares(bench: Bench, batch: int, steps: int) -> dict[str, Any]:
    """Seconds per step and share of each kind of operation, as the profiler sees them."""
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for number in range(steps):
            bench.step(number, batch)
    whole = (time.perf_counter() - started) / steps
    sums = dict.fromkeys(KINDS, 0.0)
    elementwise = 0.0
    for event in profiler.key_averages():
        seconds = event.self_cpu_time_total * 1e-6 / steps
        kind = next((k for k, names in KINDS.items() if any(n in event.key for n in names)), None)
        if kind is None:
            elementwise += seconds
        else:
            sums[kind] += seconds
    sums["data"] = statistics.median(bench.data_seconds(n, batch) for n in range(steps))
    # The corruption is NumPy's, outside torch and so outside every operation.
    sums["elementwise_and_copies"] = elementwise
    sums["rest"] = max(0.0, whole - sum(sums.values()))
    return {
        "profiled_step_s": round(whole, 4),
        "steps": steps,
        "seconds": {name: round(s, 4) for name, s in sums.items()},
        "share": {name: round(s / whole, 4) for name, s in sums.items()},
    }


def beside_reference(bench: Bench, batch: int, rounds: int) -> dict[str, Any]:
    """Steps of the native and the reference scan in turns, on the same samples; the first of each is a warm-up."""
    times: dict[str, list[float]] = {"native": [], "reference": []}
    losses: list[float] = []
    # The weights are put back before each step, so that both take the same one.
    weights = {name: p.detach().clone() for name, p in bench.trainer._parameters.items()}
    for number in range(rounds):
        found = []
        for name in times:
            with torch.no_grad():
                for key, p in bench.trainer._parameters.items():
                    p.copy_(weights[key])
            if name == "native":
                with implementation("native"):
                    seconds, loss = bench.step(number, batch)
            else:
                with reference_scan():
                    seconds, loss = bench.step(number, batch)
            times[name].append(seconds)
            found.append(loss)
            say(f"reference {number + 1}/{rounds}: {name} {seconds:.2f} s, loss {loss:.6f}")
        losses.append(abs(found[0] - found[1]))
    counted = {name: seconds[1:] or seconds for name, seconds in times.items()}
    native, reference = (statistics.median(seconds) for seconds in counted.values())
    return {
        "batch": batch,
        "native": quartiles(counted["native"]),
        "reference": quartiles(counted["reference"]),
        "times_reference": round(reference / native, 2),
        "largest_difference_of_losses": max(losses),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--batch", type=int, default=64, help="samples per step")
    parser.add_argument("--steps", type=int, default=7, help="steps to time, after one to warm up")
    parser.add_argument("--reference-batch", type=int, default=16, help="samples per step beside the reference")
    parser.add_argument(
        "--rounds", type=int, default=4, help="pairs of steps beside the reference, the first not counted"
    )
    parser.add_argument("--seconds", type=float, default=330.0, help="a whole epoch is run if it fits in this")
    options = parser.parse_args()
    began = time.monotonic()
    torch.set_num_threads(options.threads)
    machine = describe()
    say("making the synthetic set")
    chosen = preset_named("mosi")
    dataset = dataset_from_mmsa(make_synthetic(chosen.model.inputs, SAMPLES["mosi"]), "synthetic", chosen.model.inputs)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(dataset, Path(folder))
        seconds: list[float] = []
        for number in range(options.steps + 1):
            taken, _ = bench.step(number, options.batch)
            if number:
                seconds.append(taken)
            say(f"steps {number}/{options.steps}: {taken:.2f} s")
        started = time.perf_counter()
        bench.trainer._validate()
        validation = time.perf_counter() - started
        say(f"validation: {validation:.1f} s")
        result: dict[str, Any] = {"step": quartiles(seconds), "validation_s": round(validation, 2)}
        result["shares"] = shares(bench, options.batch, 2)
        say("shares: " + ", ".join(f"{k} {v:.0%}" for k, v in result["shares"]["share"].items()))
        result["beside_reference"] = beside_reference(bench, options.reference_batch, options.rounds)
        steps = -(-len(bench.split) // options.batch)
        estimate = steps * statistics.median(seconds) + validation
        result["epoch"] = {"steps": steps, "estimated_s": round(estimate, 1), "measured_s": None}
        if time.monotonic() - began + estimate < options.seconds:
            say(f"one epoch, about {estimate:.0f} s")
            started = time.perf_counter()
            bench.trainer._epoch(1, lambda p: say(f"epoch {p.step}/{p.steps}"))
            bench.trainer._validate()
            result["epoch"]["measured_s"] = round(time.perf_counter() - started, 1)
        else:
            say(f"one epoch would take some {estimate:.0f} s, more than is left of --seconds {options.seconds:g}")
    factor = result["beside_reference"]["times_reference"]
    result["target"] = {"times_reference": TARGET, "met": factor >= TARGET}
    print(
        f"{result['step']['median_s']:.2f} s per step of {options.batch}, {estimate:.0f} s per epoch of "
        f"{len(bench.split)} samples, {factor:.1f} x the reference scan (target {TARGET:.0f}) at "
        f"{options.threads} threads"
    )
    if options.out:
        document = {
            "schema_version": 1,
            "machine": machine,
            "native_instruction_set": library_isa(),
            "threads": options.threads,
            "preset": "mosi",
            "samples": dict(zip(("train", "valid", "test"), SAMPLES["mosi"], strict=True)),
            "batch": options.batch,
            "dtype": "float32",
            **result,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
