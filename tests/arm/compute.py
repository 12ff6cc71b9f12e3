"""What runs on the ARM side of grid.py: every case of a folder through ONNX Runtime and the C interface.

    python3 compute.py FOLDER

Needs NumPy, onnxruntime and hcmen. Case N is N.onnx, a graph of one node, with its inputs N.in.npz; a case with
N.grad.npz has a backward pass too. Outputs go to N.out.npz. Those of one and two threads, and of the two interfaces,
have to be the same bits.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from hcmen.base.library import (
    ConvArguments,
    ConvGradients,
    ScanArguments,
    ScanGradients,
    library_isa,
    library_path,
    load_library,
)


def session(model: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library_path()))
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def structure(about: dict[str, Any], arrays: dict[str, np.ndarray]) -> ctypes.Structure:
    """The arguments of the C function; absent arrays are null."""
    kind = ScanArguments if about["op"] == "scan" else ConvArguments
    return kind(**about["sizes"], **{name: x.ctypes.data for name, x in arrays.items()})


def call(about: dict[str, Any], way: str, *structures: ctypes.Structure) -> None:
    name = "hcmen_selective_scan" if about["op"] == "scan" else "hcmen_causal_conv1d"
    status = getattr(load_library(), f"{name}_{way}")(*(ctypes.byref(s) for s in structures), 2)
    if status != 0:
        raise SystemExit(f"{about}: {way} returned {status}")


def compute(case: Path) -> None:
    about = json.loads(case.with_suffix(".json").read_text())
    with np.load(case.with_suffix(".in.npz")) as file:
        feeds = {name: file[name] for name in file.files}
    model = case.with_suffix(".onnx")
    one, two = (session(model, threads).run(None, feeds) for threads in (1, 2))
    outputs = {name: np.full_like(x, np.nan) for name, x in zip(("y", "last_state"), one, strict=False)}
    call(about, "forward", structure(about, {**feeds, **outputs}))
    for (name, direct), a, b in zip(outputs.items(), one, two, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=f"{about}: {name} on one and two threads")
        np.testing.assert_array_equal(a, direct, err_msg=f"{about}: {name} by ONNX Runtime and by the C interface")
    gradients = case.with_suffix(".grad.npz")
    if gradients.exists():
        with np.load(gradients) as file:
            given = {name: file[name] for name in file.files}
        wanted = {f"d{name}": np.full(x.shape, np.nan, np.float32) for name, x in feeds.items()}
        kind = ScanGradients if about["op"] == "scan" else ConvGradients
        backward = kind(**{name: x.ctypes.data for name, x in {**given, **wanted}.items()})
        call(about, "backward", structure(about, feeds), backward)
        outputs |= wanted
    np.savez(case.with_suffix(".out.npz"), **outputs)


def main() -> None:
    for case in sorted(Path(sys.argv[1]).glob("*.json")):
        compute(case)
    print(f"instruction set: {library_isa()}")


if __name__ == "__main__":
    main()
