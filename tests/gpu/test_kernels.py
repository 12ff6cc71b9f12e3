"""The tests of csrc/test_cuda_kernels.py, on a device instead of the emulation: the same cases, the same oracle."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
from csrc.test_cuda_dual import (  # noqa: F401
    test_dual_at_addresses_that_are_no_multiple_of_four_elements,
    test_dual_gradients_in_chunks,
    test_dual_gradients_of_portions,
    test_dual_steps_that_are_cut_have_no_gradient,
    test_dual_with_awkward_sizes,
    test_dual_with_every_attribute,
    test_dual_with_every_head,
    test_dual_with_every_length,
    test_dual_with_every_number_of_states,
    test_dual_with_every_plan,
    test_dual_with_long_steps_and_short_ones,
    test_nan_of_a_dual_stays_where_it_can_reach,
    test_random_duals,
    test_what_lies_in_masked_steps_of_a_dual_does_not_matter,
)
from csrc.test_cuda_kernels import (  # noqa: F401
    one_thread,
    test_addresses_that_are_no_multiple_of_four_elements,
    test_chunks_over_blocks,
    test_convolution,
    test_convolution_with_many_sequences,
    test_every_attribute,
    test_every_length,
    test_every_number_of_channels,
    test_every_number_of_states,
    test_every_plan,
    test_long_steps_and_short_ones,
    test_nan_stays_where_it_can_reach,
    test_random_cases,
    test_what_lies_in_masked_steps_does_not_matter,
)
from helpers.dual_cases import DualCase, dual_arrays, dual_oracle
from helpers.op_cases import ScanCase, assert_near, scan_arrays

from hcmen.base.cuda_library import CudaLaunch, cuda_library_path, device_problem
from hcmen.base.errors import BackendError


def _problem() -> str | None:
    if (problem := device_problem()) is not None:
        return f"{problem}: python tests/gpu/run.py on a machine with an NVIDIA GPU"
    try:
        cuda_library_path()
    except BackendError as error:
        return str(error)
    return None


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_problem() is not None, reason=f"{_problem()}")]


@pytest.fixture(scope="module")
def kernels():
    from helpers.device import DeviceKernels

    return DeviceKernels()


@pytest.fixture
def library(kernels):
    return kernels.library


def test_results_are_the_same_bits_at_every_run(kernels):
    import numpy as np

    case = ScanCase(4, 700, 96, 16)
    arrays = scan_arrays(case)
    dy = np.random.default_rng(0).normal(size=arrays["u"].shape).astype(np.float32)
    first = kernels.scan(case, arrays), kernels.scan_gradients(case, arrays, dy, None)
    for _ in range(5):
        for got, want in zip(kernels.scan(case, arrays), first[0], strict=True):
            np.testing.assert_array_equal(got, want)
        for name, got in kernels.scan_gradients(case, arrays, dy, None).items():
            np.testing.assert_array_equal(got, first[1][name])


@pytest.mark.parametrize("state", [16, 64, 128, 256])
@pytest.mark.parametrize("time", [1, 63, 500, 4096])
def test_duals_as_models_have_them(kernels, time, state):
    """Sizes that the emulation does not get through, by every plan of the rule; the same bits at every run."""
    import numpy as np

    case = DualCase(2, time, 24, 64, state, 8 if state == 64 else 1, reverse=state == 16)
    arrays = dual_arrays(case)
    got = kernels.dual(case, arrays)
    for name, g, w in zip(("y", "last_state"), got, dual_oracle(case, arrays), strict=True):
        assert_near(f"{name} of {case}", g, w, kernels.bound)
    dy = np.random.default_rng(0).normal(size=case.series).astype(np.float32)
    gradients = kernels.dual_gradients(case, arrays, dy, None)
    for g, again in zip(got, kernels.dual(case, arrays), strict=True):
        np.testing.assert_array_equal(g, again)
    for name, again in kernels.dual_gradients(case, arrays, dy, None).items():
        assert np.isfinite(again).all(), name
        np.testing.assert_array_equal(gradients[name], again)


def test_a_library_without_code_for_this_device_says_what_it_has(kernels, tmp_path):
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        from build import CSRC, WANTED, device_architecture, find_nvcc
    finally:
        sys.path.pop(0)
    nvcc, here = find_nvcc(), device_architecture()
    if nvcc is None:
        pytest.skip("there is no nvcc")
    other = next(a for a in WANTED if a // 10 != here // 10)
    target, rest = tmp_path / "libother.so", tmp_path / "rest.cc"  # one file of the kernels is enough
    names = ("forward", "backward", "convolution", "dual_forward", "dual_backward")
    rest.write_text("".join(f"namespace hcmen::cuda {{ int load_{n}_kernels() {{ return 0; }} }}\n" for n in names))
    code = f"-gencode=arch=compute_{other},code=sm_{other}"
    command = [nvcc, "-std=c++17", code, "-cudart=static", "-shared", "-Xcompiler=-fPIC", str(CSRC / "cuda_launch.cu")]
    subprocess.run([*command, str(rest), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    library.hcmen_cuda_problem.restype = library.hcmen_cuda_fix.restype = ctypes.c_char_p
    assert library.hcmen_cuda_nothing(ctypes.byref(CudaLaunch())) == 16
    problem = library.hcmen_cuda_problem().decode()
    assert f"the device is sm_{here}, the library has code for {other}" in problem
    assert library.hcmen_cuda_fix().decode() == f"build the library for {here}: docs/cuda.md"
