"""What goes wrong on a device is one line that says what to do: over the emulation, whose calls can be made to fail."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
from helpers import emulated
from helpers.emulated import Kernels
from helpers.op_cases import ConvCase, ScanCase, address, conv_arrays, conv_structure, scan_arrays, scan_structure

from hcmen.base.cuda_library import CudaLaunch, call, workspace_bytes
from hcmen.base.errors import BackendError, InputError

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="there is no C++ compiler")

NO_MEMORY, OLD_DRIVER, NO_IMAGE, NEW_PTX, OTHER = 2, 35, 209, 222, 719
CAPTURE = [900, 901, 906, 908]


@pytest.fixture
def library() -> ctypes.CDLL:
    return emulated.kernels_library()


def scan(library: ctypes.CDLL) -> None:
    arrays = {**scan_arrays(ScanCase()), "y": np.empty((2, 9, 5), np.float32)}
    call(library, "selective_scan_forward", scan_structure(ScanCase(), arrays, address), CudaLaunch())


def convolution(library: ctypes.CDLL) -> None:
    arrays = conv_arrays(ConvCase())
    arrays["y"] = np.empty_like(arrays["x"])
    call(library, "causal_conv1d_forward", conv_structure(ConvCase(), arrays, address), CudaLaunch())


def warm(library: ctypes.CDLL) -> None:
    call(library, "warm")


@pytest.mark.parametrize("use", [scan, convolution, warm])
@pytest.mark.parametrize(
    ("error", "driver", "words"),
    [
        (
            NO_IMAGE,
            13000,
            r"the device is sm_86, the library has code for 75, 90, 120: build the library for 86: docs/cuda",
        ),
        (
            OLD_DRIVER,
            12020,
            r"the driver serves CUDA 12.2, the library was built with 13.0: update the driver, or build",
        ),
        (NEW_PTX, 12090, r"the driver serves CUDA 12.9, the library was built with 13.0: update the driver, or build"),
        (OLD_DRIVER, 0, r"there is no CUDA driver: install NVIDIA's"),
        (NO_MEMORY, 13000, r"take fewer sequences at once, or end what else uses the device"),
        *((error, 13000, r"run it once before a CUDA graph records it") for error in CAPTURE),
        (OTHER, 13000, r"check the driver and the device with nvidia-smi"),
    ],
)
def test_what_cuda_says_comes_with_what_to_do(
    library: ctypes.CDLL, use: Callable[[ctypes.CDLL], None], error: int, driver: int, words: str
) -> None:
    with (
        emulated.troubled(library, error, driver),
        pytest.raises(
            BackendError, match=rf"^hcmen_cuda_\w+: CUDA failed: cudaErrorEmulated \(in words\): {words}"
        ) as told,
    ):
        use(library)
    assert "\n" not in str(told.value)
    assert told.value.exit_code == 3
    assert told.value.fix
    # It is over once the device works again.
    use(library)


def test_a_first_launch_may_be_recorded(library: ctypes.CDLL) -> None:
    """While a stream is recorded, CUDA loads a kernel in its relaxed mode alone; a graph then has every launch."""
    case = ScanCase(1, 700, 33, 16)  # cut into chunks: three kernels
    kernels, arrays = Kernels(library), scan_arrays(case)
    dy = np.ones_like(arrays["u"])
    with emulated.troubled(library, recording=True):
        recorded = kernels.scan(case, arrays)
        gradients = kernels.scan_gradients(case, arrays, dy, None)
        convolution(library)
    for got, want in zip(recorded, kernels.scan(case, arrays), strict=True):
        np.testing.assert_array_equal(got, want)
    for name, want in kernels.scan_gradients(case, arrays, dy, None).items():
        np.testing.assert_array_equal(gradients[name], want)


# Sizes whose arrays could be addressed, over more blocks than a grid has.
SCANS = [ScanCase(1 << 31, 1, 1, 1), ScanCase(1 << 28, 1, 1024, 16), ScanCase(1 << 16, 1, 1 << 16, 1, 1 << 16)]
CONVOLUTIONS = [ConvCase(1 << 31, 1, 1, 4), ConvCase(1 << 26, 3, 1 << 13, 2), ConvCase(1 << 20, 1 << 18, 200, 4)]


@pytest.mark.parametrize("case", SCANS, ids=str)
def test_a_scan_beyond_the_grid(library: ctypes.CDLL, case: ScanCase) -> None:
    structure = scan_structure(case, {}, address)
    words = (
        rf"batch {case.batch}, time {case.time}, channel {case.channel}, .* make \d+ blocks of work, expected at most"
    )
    for backward in (0, 1):
        with pytest.raises(InputError, match=words + " the 2147483647 of a grid: take fewer sequences at once") as told:
            workspace_bytes(library, "selective_scan", structure, None, backward)
        assert told.value.exit_code == 2


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_a_convolution_beyond_the_grid(library: ctypes.CDLL, case: ConvCase) -> None:
    structure = conv_structure(case, {}, address)
    words = rf"batch {case.batch}, time {case.time}, channel {case.channel}, width {case.width} make \d+ blocks of work"
    with pytest.raises(InputError, match=words):
        workspace_bytes(library, "causal_conv1d", structure, 0)


def test_sizes_that_are_refused_are_told(library: ctypes.CDLL) -> None:
    for case, words in (
        (ScanCase(state=513), "batch 2, time 9, channel 5, state 513, group 1 .* at most 512 states forward and 256"),
        (ScanCase(channel=1 << 29), "channel 536870912, .*, 2\\^28 channels"),
        (ScanCase(time=1 << 31), "time 2147483648, .* 2\\^31 - 1 steps"),
    ):
        with pytest.raises(InputError, match=words):
            workspace_bytes(library, "selective_scan", scan_structure(case, {}, address), None, 0)
