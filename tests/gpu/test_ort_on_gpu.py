"""Bundles on ONNX Runtime's CUDA provider: every variant against its golden outputs, with and without CUDA graphs, and
single nodes against float64.
"""

from __future__ import annotations

import numpy as np
import pytest
from helpers.op_cases import ScanCase, assert_scan, model_of, scan_arrays

from hcmen.base.errors import BackendError


def _problem() -> str | None:
    try:
        from hcmen.runtime.backends.ort_cuda import OrtCudaBackend

        OrtCudaBackend()
    except BackendError as error:
        return str(error)
    return None


PROBLEM = _problem()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(PROBLEM is not None, reason=f"{PROBLEM}")]


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_every_variant_gives_its_golden_outputs(shared_bundle, cuda_graph):
    from hcmen.runtime import load

    model = load(shared_bundle, backend="ort-cuda", cuda_graph=cuda_graph)
    for _ in range(3):  # apart, recorded, replayed
        tests = list(model.self_test(atol=1e-4, rtol=1e-4))
        assert [t.variant for t in tests if not t.passed] == []
        assert len(tests) == 7


@pytest.mark.parametrize(
    "case",
    [
        ScanCase(3, 1, 16, 4, None),
        ScanCase(1, 7, 17, 12, None, dtype="float16"),
        ScanCase(3, 500, 512, 16, 2, reverse=True, gated=False),
        ScanCase(1, 500, 16, 64, None, stateful=False),
    ],
    ids=str,
)
def test_scan_nodes(case):
    from hcmen.runtime.backends.ort_cuda import OrtCudaBackend

    feeds = scan_arrays(case)
    session = OrtCudaBackend().session(model_of(case).SerializeToString(), np.zeros(0, np.uint8), "weights.bin", "node")
    got = session.run(feeds)
    assert_scan(case, feeds, [got[name] for name in ("y", "last_state") if name in got], 3e-6)
