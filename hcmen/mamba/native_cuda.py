"""The CUDA kernels of libhcmen_ops_cuda.so as implementations of native.py's custom ops, for CUDA tensors.

Work is queued on PyTorch's current stream; working memory comes from PyTorch's allocator, so that the ops may be
captured in a CUDA graph. Backward is float32, as on the CPU: half-precision inputs are widened, their gradients
narrowed.

No GPU has run this file yet: its tests run it over kernels emulated on the host, tests/gpu on a device.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hcmen.base.cuda_library import CudaLaunch, call, cuda_library_path, load_cuda_library, workspace_bytes
from hcmen.base.errors import BackendError, InputError
from hcmen.mamba.native import (
    causal_conv1d_backward_op,
    causal_conv1d_op,
    conv_by,
    conv_gradients_by,
    pointer,
    scan_by,
    scan_gradients_by,
    selective_scan_backward_op,
    selective_scan_op,
)

__all__ = ["demand", "works"]


def demand() -> None:
    """Loads the library.

    Raises:
        BackendError: it cannot be had; the message says how to build it.
    """
    load_cuda_library()


@functools.cache
def works() -> bool:
    """Whether the library is there and loads. One that is there and does not load is warned of, once."""
    try:
        cuda_library_path()
    except BackendError:
        return False
    try:
        load_cuda_library()
    except BackendError as error:
        warnings.warn(f"the CUDA scan is unavailable: {error}", stacklevel=3)
        return False
    return True


def _run(name: str, device: torch.device, size: int, *structures: ctypes.Structure) -> None:
    """Queues `hcmen_cuda_<name>` with a workspace of `size` bytes on the current stream of `device`."""
    # The allocator gives memory back to its own stream only, so the kernels may still be using it on return.
    workspace = torch.empty(size, dtype=torch.uint8, device=device) if size else None
    launch = CudaLaunch(workspace=pointer(workspace), workspace_bytes=size)
    guard: Any = contextlib.nullcontext()
    if device.type == "cuda":
        launch.stream = torch.cuda.current_stream(device).cuda_stream
        guard = torch.cuda.device(device)
    with guard:
        call(load_cuda_library(), name, *structures, launch)


def _one_device(first: str, x: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise InputError(f"{name} is on {other.device}, expected {x.device}, the device of {first}")


@selective_scan_op.register_kernel("cuda")
def _scan_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    z: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    others = {"delta": delta, "A": A, "B": B, "C": C, "D": D, "delta_bias": delta_bias, "z": z}
    _one_device("u", u, **others, initial_state=initial_state)

    def run(scan: ctypes.Structure) -> None:
        size = workspace_bytes(load_cuda_library(), "selective_scan", scan, None, 0)
        _run("selective_scan_forward", u.device, size, scan)

    return scan_by(run, (u, delta, A, B, C, D, delta_bias, z, initial_state), delta_softplus, reverse)


@selective_scan_backward_op.register_kernel("cuda")
def _scan_backward(
    dy: Tensor,
    dlast_state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    z: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> list[Tensor]:
    def run(scan: ctypes.Structure, gradients: ctypes.Structure) -> None:
        size = workspace_bytes(load_cuda_library(), "selective_scan", scan, None, 1)
        _run("selective_scan_backward", u.device, size, scan, gradients)

    originals = (u, delta, A, B, C, D, delta_bias, z, initial_state)
    return scan_gradients_by(run, dy, dlast_state, originals, delta_softplus, reverse)


@causal_conv1d_op.register_kernel("cuda")
def _conv_forward(x: Tensor, weight: Tensor, bias: Tensor, silu: bool, reverse: bool) -> Tensor:
    _one_device("x", x, weight=weight, bias=bias)
    return conv_by(partial(_run, "causal_conv1d_forward", x.device, 0), x, weight, bias, silu, reverse)


@causal_conv1d_backward_op.register_kernel("cuda")
def _conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    def run(conv: ctypes.Structure, gradients: ctypes.Structure) -> None:
        size = workspace_bytes(load_cuda_library(), "causal_conv1d", conv, 1)
        _run("causal_conv1d_backward", x.device, size, conv, gradients)

    return conv_gradients_by(run, dy, x, weight, bias, silu, reverse)
