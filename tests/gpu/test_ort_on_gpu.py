"""Bundles on ONNX Runtime's CUDA provider: every variant against its golden outputs, with and without CUDA graphs, and
single nodes against float64.
"""

from __future__ import annotations

import numpy as np
import pytest
from helpers.scan_grid import grid_case, grid_feeds, oracle

from hcmen.base.errors import BackendError
from hcmen.mamba.one_node import scan_model


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


@pytest.mark.parametrize(("time", "channel", "state"), [(1, 16, 4), (7, 17, 12), (500, 512, 16), (500, 16, 64)])
def test_scan_nodes(time, channel, state):
    from hcmen.runtime.backends.ort_cuda import OrtCudaBackend

    for batch in (1, 3):
        case = grid_case(time, channel, state, batch)
        feeds = grid_feeds(time, channel, state, batch, case)
        model = scan_model(channel, state, **case, functions=False).SerializeToString()
        got = OrtCudaBackend().session(model, np.zeros(0, np.uint8), "weights.bin", "node").run(feeds)
        for name, want in zip(("y", "last_state"), oracle(feeds, case["delta_softplus"], case["reverse"]), strict=True):
            if name in got:
                half = got[name].dtype == np.float16
                bound = 1e-3 if half else 3e-6
                assert np.abs(got[name] - want).max() <= bound * np.abs(want).max()
