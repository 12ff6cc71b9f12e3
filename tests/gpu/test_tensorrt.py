"""Engines on a machine with TensorRT and a GPU: built by hcmen-compile, held against the eager model, run as clips are.

make test ARGS=tests/gpu

Each test skips with what is missing: TensorRT, a GPU, the plugin library, or NVRTC for AOT kernels.
"""

from __future__ import annotations

import numpy as np
import pytest
from helpers.command import run
from helpers.micro import micro_bundle_at, micro_feeds

from hcmen.base.bundle import read_bundle
from hcmen.base.engines import read_engines
from hcmen.base.errors import HcmenError
from hcmen.base.modalities import VARIANTS
from hcmen.export.commands.compile import main as compile_main
from hcmen.runtime import load
from hcmen.runtime.backends.cuda import Cuda
from hcmen.runtime.backends.flavour import TENSORRT, TrtModule

pytestmark = pytest.mark.gpu
NAMES = [v.name for v in VARIANTS]


@pytest.fixture(scope="module")
def tensorrt() -> TrtModule:
    try:
        Cuda()
        return TrtModule()
    except HcmenError as error:
        pytest.skip(str(error))


@pytest.fixture
def ready(tensorrt, tmp_path, request):
    """A fresh bundle, for a plugin that this machine has."""
    plugin = request.param
    try:
        if plugin == "library":
            TENSORRT.plugin_library()
        TENSORRT.require_plugin(plugin, tensorrt.version)
    except HcmenError as error:
        pytest.skip(str(error))
    return micro_bundle_at(tmp_path / "bundle"), plugin


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("ready", ["library", "aot", "function"], indirect=True)
def test_all_variants_are_built_and_agree_with_the_eager_model(ready, precision):
    """hcmen-compile itself refuses an engine beyond the bound; a second process would find the same."""
    bundle, plugin = ready
    done = run(compile_main, bundle, "--precision", precision, "--plugin", plugin)
    assert done.code == 0, done.err
    assert [r.variant for r in read_engines(read_bundle(bundle))] == sorted(NAMES)
    tests = list(load(bundle, backend="tensorrt", precision=precision).self_test())
    assert [(t.variant, t.passed) for t in tests] == [(name, True) for name in NAMES]


@pytest.mark.parametrize("ready", ["library"], indirect=True)
def test_sizes_in_any_order_and_cuda_graphs(ready):
    """Every size twice and more, single clips and batches beyond the engine's, against ONNX Runtime."""
    bundle, plugin = ready
    assert run(compile_main, bundle, "--variant", "full", "--max-batch", 4, "--plugin", plugin).code == 0
    model, reference = load(bundle, backend="tensorrt"), load(bundle)
    rng = np.random.default_rng(0)
    for batch, steps in [(1, 3), (2, 5), (7, 4), (1, 10), (4, 1)] * 4:
        feeds = micro_feeds(rng, batch, steps)
        got, expected = model.run("full", feeds), reference.run("full", feeds)
        for name in expected:
            np.testing.assert_allclose(got[name], expected[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ready", ["library"], indirect=True)
@pytest.mark.parametrize("option", ["--version-compatible", "--hardware-compatible"])
def test_compatible_engines(ready, option):
    bundle, _ = ready
    done = run(compile_main, bundle, "--variant", "text_only", option)
    if option == "--hardware-compatible" and done.code == 3:
        pytest.skip(done.err.strip().splitlines()[-1])  # not on a Jetson, nor before sm 80
    assert done.code == 0, done.err
    assert all(t.passed for t in load(bundle, backend="tensorrt").self_test(["text_only"]))
