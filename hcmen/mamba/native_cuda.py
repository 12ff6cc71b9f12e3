"""The CUDA kernels of libhcmen_ops_cuda.so as implementations of native.py's custom ops, for CUDA tensors.

Work is queued on PyTorch's current stream; working memory comes from PyTorch's allocator, so that the ops may be
captured in a CUDA graph. Backward is float32, as on the CPU: half-precision inputs are widened, their gradients
narrowed.

Its tests run it over kernels emulated on the host, tests/gpu on a device.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hcmen.base.cuda_library import VARIABLE, CudaLaunch, call, cuda_library_path, load_cuda_library, workspace_bytes
from hcmen.base.errors import BackendError, InputError
from hcmen.base.op import CAUSAL_CONV1D, SELECTIVE_SCAN, STATE_SPACE_DUAL, Operator
from hcmen.mamba.native import (
    causal_conv1d_backward_op,
    causal_conv1d_op,
    conv_by,
    conv_gradients_by,
    dual_by,
    dual_gradients_by,
    pointer,
    scan_by,
    scan_gradients_by,
    selective_scan_backward_op,
    selective_scan_op,
    state_space_dual_backward_op,
    state_space_dual_op,
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
    """Whether the library is there and loads. One that is there or was asked for, and does not, is warned of once."""
    try:
        cuda_library_path()
    except BackendError:
        if not os.environ.get(VARIABLE):
            return False
    try:
        load_cuda_library()
    except BackendError as error:
        warnings.warn(f"the CUDA scan is unavailable: {error}", stacklevel=3)
        return False
    return True


def _workspace(name: str, device: torch.device, size: int) -> Tensor | None:
    """`size` bytes on `device` for `hcmen_cuda_<name>`.

    Raises:
        BackendError: the device has no room for them.
    """
    try:
        # The allocator gives memory back to its own stream only, so the kernels may still be using it on return.
        return torch.empty(size, dtype=torch.uint8, device=device) if size else None
    except torch.OutOfMemoryError as error:
        raise BackendError(
            f"hcmen_cuda_{name}: {device} has no room for a workspace of {-(-size // 2**20)} MiB",
            fix="take fewer sequences at once, or end what else uses the device",
        ) from error


def _run(name: str, device: torch.device, size: int, *structures: ctypes.Structure) -> None:
    """Queues `hcmen_cuda_<name>` with a workspace of `size` bytes on the current stream of `device`."""
    _launch(name, device, CudaLaunch(), _workspace(name, device, size), *structures)


def _launch(
    name: str, device: torch.device, launch: CudaLaunch, workspace: Tensor | None, *structures: ctypes.Structure
) -> None:
    launch.workspace, launch.workspace_bytes = pointer(workspace), 0 if workspace is None else workspace.numel()
    guard: Any = contextlib.nullcontext()
    if device.type == "cuda":
        launch.stream = torch.cuda.current_stream(device).cuda_stream
        guard = torch.cuda.device(device)
    with guard:
        call(load_cuda_library(), name, *structures, launch)


def _one_device(op: Operator, inputs: Sequence[Any]) -> torch.device:
    """The device of all tensors of an op, which are on one."""
    first, x = op.inputs[0].name, inputs[0]
    for tensor, other in zip(op.inputs, inputs, strict=False):
        if other is not None and other.device != x.device:
            raise InputError(f"{tensor.name} is on {other.device}, expected {x.device}, the device of {first}")
    device: torch.device = x.device
    return device


def _forward(name: str, device: torch.device, arguments: ctypes.Structure) -> None:
    """Of a recurrence, `name`."""
    size = workspace_bytes(load_cuda_library(), name, arguments, None, 0)
    _run(f"{name}_forward", device, size, arguments)


def _backward(name: str, device: torch.device, arguments: Any, gradients: ctypes.Structure) -> None:
    # The rule lets a workspace have 4 GiB. Where that is not there, fewer sequences at once give the same numbers.
    at_once = arguments.batch
    while True:
        launch = CudaLaunch(sequences_at_once=at_once)
        size = workspace_bytes(load_cuda_library(), name, arguments, launch, 1)
        try:
            workspace = _workspace(f"{name}_backward", device, size)
        except BackendError:
            if at_once == 1:
                raise
            at_once = -(-at_once // 2)
            continue
        return _launch(f"{name}_backward", device, launch, workspace, arguments, gradients)


@selective_scan_op.register_kernel("cuda")
def _scan_forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    return scan_by(partial(_forward, "selective_scan", _one_device(SELECTIVE_SCAN, inputs)), inputs)


@selective_scan_backward_op.register_kernel("cuda")
def _scan_backward(dy: Tensor, dlast_state: Tensor, *inputs: Any) -> list[Tensor]:
    return scan_gradients_by(partial(_backward, "selective_scan", inputs[0].device), dy, dlast_state, inputs)


@state_space_dual_op.register_kernel("cuda")
def _dual_forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    return dual_by(partial(_forward, "state_space_dual", _one_device(STATE_SPACE_DUAL, inputs)), inputs)


@state_space_dual_backward_op.register_kernel("cuda")
def _dual_backward(dy: Tensor, dlast_state: Tensor, *inputs: Any) -> list[Tensor]:
    return dual_gradients_by(partial(_backward, "state_space_dual", inputs[0].device), dy, dlast_state, inputs)


@causal_conv1d_op.register_kernel("cuda")
def _conv_forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    device = _one_device(CAUSAL_CONV1D, inputs)
    return conv_by(partial(_run, "causal_conv1d_forward", device, 0), inputs)


@causal_conv1d_backward_op.register_kernel("cuda")
def _conv_backward(dy: Tensor, dlast_state: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    def run(conv: ctypes.Structure, gradients: ctypes.Structure) -> None:
        size = workspace_bytes(load_cuda_library(), "causal_conv1d", conv, 1)
        _run("causal_conv1d_backward", inputs[0].device, size, conv, gradients)

    return conv_gradients_by(run, dy, dlast_state, inputs)
