"""Engines of TensorRT-RTX on a GPU that it serves: built, held against the eager model when opened, run as clips are.

make test ARGS=tests/gpu

Each test skips with what is missing: TensorRT-RTX, a GPU, or one that it has kernels for.
"""

from __future__ import annotations

import numpy as np
import pytest
from helpers.command import run
from helpers.micro import micro_bundle_at, micro_feeds

from hcmen.base.errors import HcmenError
from hcmen.base.modalities import VARIANTS
from hcmen.export.commands.compile import main as compile_main
from hcmen.runtime import load
from hcmen.runtime.backends import TensorRTRTX
from hcmen.runtime.backends.options import SPECIALIZATIONS
from hcmen.runtime.backends.tensorrt import TrtBackend

pytestmark = pytest.mark.gpu
NAMES = [v.name for v in VARIANTS]


@pytest.fixture(autouse=True)
def backend() -> TrtBackend:
    try:
        return TrtBackend(TensorRTRTX())
    except HcmenError as error:
        pytest.skip(str(error))


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache of compiled code."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_all_variants_are_built_and_agree_with_the_eager_model(backend, cache, tmp_path, precision):
    """Opening an engine for the first time runs the golden set; a second process finds its result and the code kept."""
    bundle = micro_bundle_at(tmp_path / "bundle")
    target = ("--target", backend.cuda.sm)
    done = run(compile_main, bundle, "--backend", "tensorrt-rtx", "--precision", precision, *target)
    assert done.code == 0, done.err
    for _ in range(2):
        with load(bundle, backend="tensorrt-rtx", precision=precision) as model:
            assert [(t.variant, t.passed) for t in model.self_test()] == [(name, True) for name in NAMES]
        assert len(list(bundle.glob("engines/*.parity.json"))) == len(NAMES)
        assert any(path.is_file() for path in cache.rglob("*"))


@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize("specialization", SPECIALIZATIONS)
@pytest.mark.parametrize("profiles", [1, 2])
def test_sizes_in_any_order(cache, tmp_path, cuda_graph, specialization, profiles):
    """Every size twice and more, single clips and batches beyond the engine's, against ONNX Runtime."""
    bundle = micro_bundle_at(tmp_path / "bundle")
    arguments = ("--variant", "full", "--max-batch", 4, "--profiles", profiles)
    assert run(compile_main, bundle, "--backend", "tensorrt-rtx", *arguments).code == 0
    reference = load(bundle)
    rng = np.random.default_rng(0)
    with load(bundle, backend=TensorRTRTX(cuda_graph=cuda_graph, specialization=specialization)) as model:
        for batch, steps in [(1, 3), (2, 5), (7, 4), (1, 10), (4, 1)] * 4:
            feeds = micro_feeds(rng, batch, steps)
            got, expected = model.run("full", feeds), reference.run("full", feeds)
            for name in expected:
                np.testing.assert_allclose(got[name], expected[name], atol=1e-4, rtol=1e-4)
