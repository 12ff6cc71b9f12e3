"""The grid of awkward sizes on another machine: cases are made and judged here, in float64, and computed over there.

    python tests/arm/grid.py --python "qemu-aarch64 -L SYSROOT SYSROOT/usr/bin/python3.11" FOLDER

The cases are the table of helpers/op_cases.py; small ones in float32 have their gradients checked too. Needs PyTorch
and onnx here; compute.py says what the other side needs. Exit code 1 if a number is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import op_cases as kernels

HERE = Path(__file__).resolve().parent
FORWARD, BACKWARD = 1e-6, 4e-6
"""Bounds of float32, of the largest value of an array."""
GRADIENT_ELEMENTS = 100_000
"""Cases up to so many states over time have their gradients checked: float64 with autograd keeps them all."""


def made_of(cases: Sequence[kernels.ScanCase | kernels.ConvCase]) -> Iterator[dict[str, Any]]:
    for case in cases:
        if isinstance(case, kernels.ConvCase):
            op, arrays, small = "conv", kernels.conv_arrays(case), True
        else:
            op, arrays = "scan", kernels.scan_arrays(case)
            states = case.batch * case.time * case.channel * case.state
            small = states <= GRADIENT_ELEMENTS and case.mean == kernels.ScanCase.mean
        gradients = small and case.dtype == "float32"
        yield {"op": op, "case": case, "feeds": arrays, "model": kernels.model_of(case), "gradients": gradients}


def write(folder: Path, index: int, made: dict[str, Any]) -> None:
    """The files of one case, for compute.py."""
    case, stem = made["case"], folder / f"{index:04d}"
    if made["op"] == "scan":
        arguments = kernels.scan_structure(case, {}, kernels.address)
        names = ("batch", "time", "channel", "state", "group", "dtype", "delta_softplus", "reverse")
    else:
        arguments = kernels.conv_structure(case, {}, kernels.address)
        names = ("batch", "time", "channel", "width", "dtype", "silu", "reverse")
    sizes = {name: getattr(arguments, name) for name in names}
    stem.with_suffix(".onnx").write_bytes(made["model"].SerializeToString())
    np.savez(stem.with_suffix(".in.npz"), **made["feeds"])
    if made["gradients"]:
        np.savez(stem.with_suffix(".grad.npz"), **given_gradients(made, index))
    stem.with_suffix(".json").write_text(json.dumps({"op": made["op"], "case": str(case), "sizes": sizes}))


def given_gradients(made: dict[str, Any], index: int) -> dict[str, np.ndarray]:
    """Of the outputs, to be taken backward."""
    rng, feeds = np.random.default_rng(index), made["feeds"]
    like = {"dy": feeds["u" if made["op"] == "scan" else "x"]}
    if "initial_state" in feeds:
        like["dlast_state"] = feeds["initial_state"]
    return {name: rng.normal(size=x.shape).astype(np.float32) for name, x in like.items()}


def judge(folder: Path, index: int, made: dict[str, Any]) -> dict[str, float]:
    """The largest float32 errors of a case, forward and backward, of the largest value. Raises AssertionError."""
    case, feeds = made["case"], made["feeds"]
    given = given_gradients(made, index) if made["gradients"] else None
    with np.load(folder / f"{index:04d}.out.npz") as file:
        got = {name: file[name] for name in file.files}
    if made["op"] == "scan":
        y, last = kernels.scan_oracle(case, feeds)
        want = {"y": y} | ({"last_state": last} if case.stateful else {})
        if given:
            want |= kernels.scan_gradients_oracle(case, feeds, given["dy"], given.get("dlast_state"))
    else:
        y, last = kernels.conv_oracle(case, feeds)
        want = {"y": y} | ({"last_state": last} if case.stateful else {})
        if given:
            want |= kernels.conv_gradients_oracle(case, feeds, given["dy"], given.get("dlast_state"))
    assert got.keys() == want.keys(), f"{case}: {sorted(got)}, expected {sorted(want)}"
    worst = {"forward": 0.0, "backward": 0.0}
    for name, w in want.items():
        way, bound = ("forward", FORWARD) if name in ("y", "last_state") else ("backward", BACKWARD)
        scale = np.abs(w).max()
        # A sum that cancels to little has the error of its terms. Those of y are of the order of 1.
        if name == "y":
            scale = max(1.0, scale)
        elif name == "dD" and given is not None:
            scale = np.abs(given["dy"].astype(np.float64) * feeds["u"]).sum((0, 1)).max()
        elif name == "ddelta_bias":
            scale = np.abs(want["ddelta"]).sum((0, 1)).max()
        elif name == "dbias" and given is not None:
            scale = np.abs(given["dy"].astype(np.float64)).sum((0, 1)).max()
        kernels.assert_near(f"{case}: {name}", got[name], w, bound * scale / max(np.abs(w).max(), 1e-30))
        if got[name].dtype == np.float32:
            worst[way] = max(worst[way], float(np.abs(got[name] - w).max() / max(scale, 1e-30)))
    return worst


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="for the cases; emptied before and after")
    parser.add_argument("--python", required=True, help="the other machine's interpreter, a command line")
    parser.add_argument("--quick", action="store_true", help="every ninth case")
    options = parser.parse_args(arguments)
    step = 9 if options.quick else 1
    # In parts, so that the files of one are not many.
    makers = [made_of(kernels.SCANS[i :: 4 * step]) for i in range(4)] + [made_of(kernels.CONVS[::step])]
    worst: dict[str, float] = {}
    counts = {"scan": 0, "conv": 0, "gradients": 0}
    said, wrong = "", 0
    for maker in makers:
        shutil.rmtree(options.folder, ignore_errors=True)
        options.folder.mkdir(parents=True)
        cases = list(maker)
        for index, made in enumerate(cases):
            write(options.folder, index, made)
        command = [*shlex.split(options.python), str(HERE / "compute.py"), str(options.folder)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
        if done.returncode != 0:
            return 1
        said = done.stdout.strip()
        for index, made in enumerate(cases):
            try:
                found = judge(options.folder, index, made)
            except AssertionError as error:
                print(f"error: {error}", file=sys.stderr)
                wrong += 1
                continue
            counts[made["op"]] += 1
            counts["gradients"] += made["gradients"]
            for way, error in found.items():
                name = f"{made['op']} {way}"
                worst[name] = max(worst.get(name, 0.0), error)
    shutil.rmtree(options.folder)
    if wrong:
        print(f"error: {wrong} cases are wrong", file=sys.stderr)
        return 1
    print(json.dumps({"cases": counts, "largest_errors": worst, "said": said}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
