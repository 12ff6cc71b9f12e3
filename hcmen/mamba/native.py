"""The kernels of libhcmen_ops.so as torch.library custom ops with autograd, for CPU tensors.

What every library with these kernels is given: `run` takes the structures of arguments and fills what they point to.
native_cuda.py adds the kernels of CUDA tensors to the same ops.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hcmen.base.errors import BackendError, InputError
from hcmen.base.library import ConvArguments, ConvGradients, ScanArguments, ScanGradients, load_library

__all__ = [
    "causal_conv1d_backward_op",
    "causal_conv1d_op",
    "conv_by",
    "conv_gradients_by",
    "pointer",
    "scan_by",
    "scan_gradients_by",
    "selective_scan_backward_op",
    "selective_scan_op",
    "works",
]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def works() -> bool:
    """`_loads`, which torch.compile does not look into: a graph break in every scan would cost it all it gains."""
    return _loads()


@functools.cache
def _loads() -> bool:
    """Whether the library loads; if not, says so once, for "auto" then means a run some 25 times slower."""
    try:
        load_library()
    except BackendError as error:
        warnings.warn(f"the native scan is unavailable, the slow reference runs instead: {error}", stacklevel=3)
        return False
    return True


def pointer(x: Tensor | None) -> int | None:
    """The address of what `x` holds."""
    return None if x is None else x.data_ptr()


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _call(name: str, *structures: ctypes.Structure) -> None:
    status = getattr(load_library(), name)(*(ctypes.byref(s) for s in structures), torch.get_num_threads())
    if status == 2:
        raise MemoryError(f"{name}: the working memory could not be allocated")
    if status != 0:
        raise InputError(f"{name} refused its arguments (status {status}): sizes must be at least 1 and fit each other")


def _scan_arguments(
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
    y: Tensor | None,
    last_state: Tensor | None,
) -> ScanArguments:
    return ScanArguments(
        batch=u.shape[0],
        time=u.shape[1],
        channel=u.shape[2],
        state=A.shape[1],
        group=B.shape[2],
        dtype=int(u.dtype == torch.float16),
        delta_softplus=int(delta_softplus),
        reverse=int(reverse),
        u=pointer(u),
        delta=pointer(delta),
        A=pointer(A),
        B=pointer(B),
        C=pointer(C),
        D=pointer(D),
        delta_bias=pointer(delta_bias),
        z=pointer(z),
        initial_state=pointer(initial_state),
        y=pointer(y),
        last_state=pointer(last_state),
    )


def scan_by(
    run: Callable[..., None], tensors: Sequence[Tensor | None], delta_softplus: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    """y and last_state of the op's `tensors` (u to initial_state), computed by `run(scan)`."""
    dense = _dense(*tensors)
    u, A = dense[0], dense[2]
    assert u is not None
    assert A is not None
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    last_state = torch.empty(u.shape[0], u.shape[2], A.shape[1], dtype=torch.float32, device=u.device)
    run(_scan_arguments(*dense, delta_softplus, reverse, y, last_state))  # type: ignore[arg-type,call-arg]
    return y, last_state


def scan_gradients_by(
    run: Callable[..., None],
    dy: Tensor,
    dlast_state: Tensor,
    originals: Sequence[Tensor | None],
    delta_softplus: bool,
    reverse: bool,
) -> list[Tensor]:
    """Gradients of the op's tensors (u to initial_state), computed by `run(scan, gradients)`; empty for absent ones."""
    # The backward kernels are float32; half-precision inputs are widened here, their gradients narrowed on return.
    wide = [None if x is None else x.float().contiguous() for x in originals]
    dy, dlast_state = dy.float().contiguous(), dlast_state.float().contiguous()
    grads = [None if x is None else torch.empty_like(x) for x in wide]
    names = ("du", "ddelta", "dA", "dB", "dC", "dD", "ddelta_bias", "dz", "dinitial_state")
    pointers = {name: pointer(g) for name, g in zip(names, grads, strict=True)}
    run(
        _scan_arguments(*wide, delta_softplus, reverse, None, None),  # type: ignore[arg-type,call-arg]
        ScanGradients(dy=pointer(dy), dlast_state=pointer(dlast_state), **pointers),
    )
    return [dy.new_empty(0) if g is None or x is None else g.to(x.dtype) for g, x in zip(grads, originals, strict=True)]


@torch.library.custom_op("hcmen::selective_scan", mutates_args=(), device_types="cpu")
def selective_scan_op(
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
    tensors = (u, delta, A, B, C, D, delta_bias, z, initial_state)
    return scan_by(partial(_call, "hcmen_selective_scan_forward"), tensors, delta_softplus, reverse)


@selective_scan_op.register_fake
def _(u, delta, A, B, C, D, delta_bias, z, initial_state, delta_softplus, reverse):  # type: ignore[no-untyped-def]
    return torch.empty_like(u, memory_format=torch.contiguous_format), A.new_empty(u.shape[0], u.shape[2], A.shape[1])


@torch.library.custom_op("hcmen::selective_scan_backward", mutates_args=(), device_types="cpu")
def selective_scan_backward_op(
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
    """Gradients in the order of the tensor arguments; those of an absent z or initial_state are empty tensors."""
    originals = (u, delta, A, B, C, D, delta_bias, z, initial_state)
    run = partial(_call, "hcmen_selective_scan_backward")
    return scan_gradients_by(run, dy, dlast_state, originals, delta_softplus, reverse)


@selective_scan_backward_op.register_fake
def _(dy, dlast_state, u, delta, A, B, C, D, delta_bias, z, initial_state, delta_softplus, reverse):  # type: ignore[no-untyped-def]
    originals = (u, delta, A, B, C, D, delta_bias, z, initial_state)
    return [
        u.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in originals
    ]


def _scan_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.delta_softplus, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _scan_backward(ctx: Any, dy: Tensor, dlast_state: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    grads = torch.ops.hcmen.selective_scan_backward(dy, dlast_state, *tensors, ctx.delta_softplus, ctx.reverse)
    return (*(None if x is None else g for g, x in zip(grads, tensors, strict=True)), None, None)


selective_scan_op.register_autograd(_scan_backward, setup_context=_scan_setup)


def _conv_arguments(
    x: Tensor, weight: Tensor, bias: Tensor, silu: bool, reverse: bool, y: Tensor | None
) -> ConvArguments:
    return ConvArguments(
        batch=x.shape[0],
        time=x.shape[1],
        channel=x.shape[2],
        width=weight.shape[1],
        dtype=int(x.dtype == torch.float16),
        silu=int(silu),
        reverse=int(reverse),
        x=pointer(x),
        weight=pointer(weight),
        bias=pointer(bias),
        y=pointer(y),
    )


def conv_by(run: Callable[..., None], x: Tensor, weight: Tensor, bias: Tensor, silu: bool, reverse: bool) -> Tensor:
    """y, computed by `run(conv)`."""
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    y = torch.empty_like(x)
    run(_conv_arguments(x, weight, bias, silu, reverse, y))
    return y


def conv_gradients_by(
    run: Callable[..., None], dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, computed by `run(conv, gradients)`."""
    wide, dy = x.float().contiguous(), dy.float().contiguous()
    weight, bias = weight.contiguous(), bias.contiguous()
    dx, dweight, dbias = torch.empty_like(wide), torch.empty_like(weight), torch.empty_like(bias)
    run(
        _conv_arguments(wide, weight, bias, silu, reverse, None),
        ConvGradients(dy=pointer(dy), dx=pointer(dx), dweight=pointer(dweight), dbias=pointer(dbias)),
    )
    return dx.to(x.dtype), dweight, dbias


@torch.library.custom_op("hcmen::causal_conv1d", mutates_args=(), device_types="cpu")
def causal_conv1d_op(x: Tensor, weight: Tensor, bias: Tensor, silu: bool, reverse: bool) -> Tensor:
    return conv_by(partial(_call, "hcmen_causal_conv1d_forward"), x, weight, bias, silu, reverse)


@causal_conv1d_op.register_fake
def _(x, weight, bias, silu, reverse):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("hcmen::causal_conv1d_backward", mutates_args=(), device_types="cpu")
def causal_conv1d_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return conv_gradients_by(partial(_call, "hcmen_causal_conv1d_backward"), dy, x, weight, bias, silu, reverse)


@causal_conv1d_backward_op.register_fake
def _(dy, x, weight, bias, silu, reverse):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(a, memory_format=torch.contiguous_format) for a in (x, weight, bias))


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, ctx.silu, ctx.reverse = inputs
    ctx.save_for_backward(x, weight, bias)


def _conv_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    dx, dweight, dbias = torch.ops.hcmen.causal_conv1d_backward(dy, *ctx.saved_tensors, ctx.silu, ctx.reverse)
    return dx, dweight, dbias, None, None


causal_conv1d_op.register_autograd(_conv_backward, setup_context=_conv_setup)
