"""What compute-sanitizer watches: every kernel once or twice at awkward sizes, without PyTorch in the process.

    compute-sanitizer --tool memcheck --error-exitcode 9 python tests/gpu/sanitize.py [RESULT]

RESULT gets what was run, after every case. compute-sanitizer has ended well without starting the program it was given;
then there is no RESULT.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from helpers.device import DeviceKernels
from helpers.dual_cases import DualCase, dual_arrays
from helpers.op_cases import ConvCase, ScanCase, conv_arrays, scan_arrays

SCANS: list[tuple[ScanCase, dict[str, int]]] = [
    (ScanCase(1, 1, 1, 1), {}),
    (ScanCase(2, 50, 40, 16), {}),
    (ScanCase(2, 50, 40, 16, dtype="float16", reverse=True), {}),
    (ScanCase(1, 70, 12, 12, 3), {"steps_per_chunk": 20}),
    (ScanCase(1, 70, 12, 12, 3), {"steps_per_chunk": -1, "time_warps": 4}),
    (ScanCase(3, 33, 130, 8, gated=False), {"lanes_per_channel": 1, "time_warps": 1}),
    (ScanCase(2, 20, 7, 64, 7), {}),
    (ScanCase(1, 18, 3, 256), {}),
    (ScanCase(1, 1100, 8, 16, stateful=False), {}),
]


DUALS: list[tuple[DualCase, dict[str, int]]] = [
    (DualCase(1, 1, 1, 1, 1), {}),
    (DualCase(2, 20, 5, 7, 33), {"steps_per_chunk": 9}),
    (DualCase(2, 30, 4, 64, 128, reverse=True), {}),
    (DualCase(1, 30, 4, 64, 64, 2, dtype="float16", wide=True), {"steps_per_chunk": -1}),
    (DualCase(1, 18, 40, 1, 3, 4, gated=False), {"lanes_per_channel": 1}),
    (DualCase(1, 12, 2, 130, 200, stateful=False), {}),
    (DualCase(1, 9, 1, 4, 256), {}),
]


CONVS = [(1, False), (2, True), (2, False), (3, True), (4, True), (4, False), (7, True)]
"""Widths, and whether there are states, each in two dtypes."""


def main(result: str | None = None) -> None:
    kernels = DeviceKernels()
    done: list[str] = []

    def ended(case: ScanCase | ConvCase | DualCase) -> None:
        done.append(str(case))
        if result is not None:
            part = Path(f"{result}.part")
            part.write_text(json.dumps({"done": len(done), "last": done[-1]}), encoding="utf-8")
            part.replace(result)

    rng = np.random.default_rng(0)
    for case, wish in SCANS:
        arrays = scan_arrays(case)
        y, last = kernels.scan(case, arrays, **wish)
        assert np.isfinite(y).all()
        assert np.isfinite(last).all()
        if case.dtype == "float32":
            dy = rng.normal(size=y.shape).astype(np.float32)
            for name, x in kernels.scan_gradients(case, arrays, dy, None).items():
                assert np.isfinite(x).all(), name
        ended(case)
    for dual, wish in DUALS:
        arrays = dual_arrays(dual)
        y, last = kernels.dual(dual, arrays, **wish)
        assert np.isfinite(y).all()
        assert np.isfinite(last).all()
        if dual.dtype == "float32":
            dy = rng.normal(size=y.shape).astype(np.float32)
            chunk = {"steps_per_chunk": wish.get("steps_per_chunk", 0)}
            for name, x in kernels.dual_gradients(dual, arrays, dy, None, **chunk).items():
                assert np.isfinite(x).all(), name
        ended(dual)
    for width, stateful in CONVS:
        for dtype in ("float32", "float16"):
            conv = ConvCase(2, 30, 130, width, dtype, reverse=width == 3, stateful=stateful)
            inputs = conv_arrays(conv)
            assert all(np.isfinite(x).all() for x in kernels.conv(conv, inputs))
            if dtype == "float32":
                dy = rng.normal(size=inputs["x"].shape).astype(np.float32)
                dlast = inputs.get("initial_state")
                assert all(np.isfinite(x).all() for x in kernels.conv_gradients(conv, inputs, dy, dlast).values())
            ended(conv)
    print(f"{len(done)} scans, duals and convolutions")


if __name__ == "__main__":
    main(*sys.argv[1:])
