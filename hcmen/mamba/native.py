"""The kernels of libhcmen_ops.so as torch.library custom ops with autograd, for CPU tensors.

What every library with these kernels is given: `run` takes the structures of arguments and fills what they point to;
`inputs` are those of the custom op, tensors and then switches, as hcmen/base/op.py has them.
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
from hcmen.base.library import (
    ConvArguments,
    ConvGradients,
    DualArguments,
    DualGradients,
    ScanArguments,
    ScanGradients,
    load_library,
)
from hcmen.base.op import CAUSAL_CONV1D, SELECTIVE_SCAN, STATE_SPACE_DUAL, Operator

__all__ = [
    "causal_conv1d_backward_op",
    "causal_conv1d_op",
    "conv_by",
    "conv_gradients_by",
    "dual_by",
    "dual_gradients_by",
    "pointer",
    "scan_by",
    "scan_gradients_by",
    "selective_scan_backward_op",
    "selective_scan_op",
    "state_space_dual_backward_op",
    "state_space_dual_op",
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


def _split(op: Operator, inputs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """The inputs of a custom op: tensors, then switches."""
    return inputs[: len(op.inputs)], inputs[len(op.inputs) :]


def _named(op: Operator, tensors: Sequence[Tensor | None], switches: Sequence[float]) -> dict[str, float | None]:
    """Fields of the C structure of `op`: its switches, and pointers to its inputs."""
    flags = {name: v if name in op.numbers else int(v) for name, v in zip(op.switches, switches, strict=True)}
    return {**flags, **{t.name: pointer(x) for t, x in zip(op.inputs, tensors, strict=True)}}


def _scan_arguments(
    tensors: Sequence[Any], switches: Sequence[bool], y: Tensor | None, last_state: Tensor | None
) -> ScanArguments:
    u, _, A, B, *_ = tensors
    return ScanArguments(
        batch=u.shape[0],
        time=u.shape[1],
        channel=u.shape[2],
        state=A.shape[1],
        group=B.shape[2] if B.dim() == 4 else 1,
        dtype=int(u.dtype == torch.float16),
        y=pointer(y),
        last_state=pointer(last_state),
        **_named(SELECTIVE_SCAN, tensors, switches),
    )


def scan_by(run: Callable[..., None], inputs: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """y and last_state, computed by `run(scan)`."""
    tensors, switches = _split(SELECTIVE_SCAN, inputs)
    dense = _dense(*tensors)
    u, A = dense[0], dense[2]
    assert u is not None
    assert A is not None
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    last_state = torch.empty(u.shape[0], u.shape[2], A.shape[1], dtype=torch.float32, device=u.device)
    run(_scan_arguments(dense, switches, y, last_state))
    return y, last_state


def _widened(tensors: Sequence[Tensor | None]) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """`tensors` in float32, as the backward kernels are, and room for their gradients, which are narrowed on return."""
    wide = [None if x is None else x.float().contiguous() for x in tensors]
    return wide, [None if x is None else torch.empty_like(x) for x in wide]


def scan_gradients_by(run: Callable[..., None], dy: Tensor, dlast_state: Tensor, inputs: Sequence[Any]) -> list[Tensor]:
    """Gradients of the tensors among `inputs`, computed by `run(scan, gradients)`; empty for absent ones."""
    tensors, switches = _split(SELECTIVE_SCAN, inputs)
    wide, grads = _widened(tensors)
    dy, dlast_state = dy.float().contiguous(), dlast_state.float().contiguous()
    pointers = {f"d{t.name}": pointer(g) for t, g in zip(SELECTIVE_SCAN.inputs, grads, strict=True)}
    run(
        _scan_arguments(wide, switches, None, None),
        ScanGradients(dy=pointer(dy), dlast_state=pointer(dlast_state), **pointers),
    )
    return [dy.new_empty(0) if g is None else g.to(x.dtype) for g, x in zip(grads, tensors, strict=True)]


def _parameters(op: Operator) -> str:
    """The inputs of a custom op, as schemas have them."""
    tensors = (f"Tensor{'' if t.only_with is None else '?'} {t.name}" for t in op.inputs)
    switches = (f"{'float' if name in op.numbers else 'bool'} {name}" for name in op.switches)
    return ", ".join((*tensors, *switches))


_SCAN, _CONV, _DUAL = (_parameters(op) for op in (SELECTIVE_SCAN, CAUSAL_CONV1D, STATE_SPACE_DUAL))
_cpu_op = partial(torch.library.custom_op, mutates_args=(), device_types="cpu")


@_cpu_op("hcmen::selective_scan", schema=f"({_SCAN}) -> (Tensor, Tensor)")
def selective_scan_op(*inputs: Any) -> tuple[Tensor, Tensor]:
    return scan_by(partial(_call, "hcmen_selective_scan_forward"), inputs)


@selective_scan_op.register_fake
def _(u, delta, A, *others):  # type: ignore[no-untyped-def]
    return torch.empty_like(u, memory_format=torch.contiguous_format), A.new_empty(u.shape[0], u.shape[2], A.shape[1])


@_cpu_op("hcmen::selective_scan_backward", schema=f"(Tensor dy, Tensor dlast_state, {_SCAN}) -> Tensor[]")
def selective_scan_backward_op(dy: Tensor, dlast_state: Tensor, *inputs: Any) -> list[Tensor]:
    """Gradients in the order of the tensor arguments; those of an absent z or initial_state are empty tensors."""
    return scan_gradients_by(partial(_call, "hcmen_selective_scan_backward"), dy, dlast_state, inputs)


@selective_scan_backward_op.register_fake
def _(dy, dlast_state, *inputs):  # type: ignore[no-untyped-def]
    return _empty_gradients(dy, _split(SELECTIVE_SCAN, inputs)[0])


def _empty_gradients(dy: Tensor, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [
        dy.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors
    ]


def _scan_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors, ctx.switches = _split(SELECTIVE_SCAN, inputs)
    ctx.save_for_backward(*tensors)


def _scan_backward(ctx: Any, dy: Tensor, dlast_state: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    grads = torch.ops.hcmen.selective_scan_backward(dy, dlast_state, *tensors, *ctx.switches)
    return (*(None if x is None else g for g, x in zip(grads, tensors, strict=True)), *(None for _ in ctx.switches))


selective_scan_op.register_autograd(_scan_backward, setup_context=_scan_setup)


def _conv_arguments(
    tensors: Sequence[Any], switches: Sequence[bool], y: Tensor | None, last_state: Tensor | None
) -> ConvArguments:
    x, weight, *_ = tensors
    return ConvArguments(
        batch=x.shape[0],
        time=x.shape[1],
        channel=x.shape[2],
        width=weight.shape[1],
        dtype=int(x.dtype == torch.float16),
        y=pointer(y),
        last_state=pointer(last_state),
        **_named(CAUSAL_CONV1D, tensors, switches),
    )


def conv_by(run: Callable[..., None], inputs: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """y and last_state, computed by `run(conv)`."""
    tensors, switches = _split(CAUSAL_CONV1D, inputs)
    dense: list[Any] = _dense(*tensors)
    x, weight, *_ = dense
    y = torch.empty_like(x)
    # The address of one without elements, of a width of 1, is null.
    last_state = weight.new_empty(x.shape[0], weight.shape[1] - 1, x.shape[2])
    run(_conv_arguments(dense, switches, y, last_state))
    return y, last_state


def conv_gradients_by(
    run: Callable[..., None], dy: Tensor, dlast_state: Tensor | None, inputs: Sequence[Any]
) -> tuple[Tensor, ...]:
    """As `scan_gradients_by`, of a convolution."""
    tensors, switches = _split(CAUSAL_CONV1D, inputs)
    wide = [None if x is None else x.float().contiguous() for x in tensors]
    dy, dlast_state = dy.float().contiguous(), None if dlast_state is None else dlast_state.float().contiguous()
    grads = [None if x is None else torch.empty_like(x) for x in wide]
    pointers = {f"d{t.name}": pointer(g) for t, g in zip(CAUSAL_CONV1D.inputs, grads, strict=True)}
    run(
        _conv_arguments(wide, switches, None, None),
        ConvGradients(dy=pointer(dy), dlast_state=pointer(dlast_state), **pointers),
    )
    return tuple(dy.new_empty(0) if g is None else g.to(x.dtype) for g, x in zip(grads, tensors, strict=True))


@_cpu_op("hcmen::causal_conv1d", schema=f"({_CONV}) -> (Tensor, Tensor)")
def causal_conv1d_op(*inputs: Any) -> tuple[Tensor, Tensor]:
    return conv_by(partial(_call, "hcmen_causal_conv1d_forward"), inputs)


@causal_conv1d_op.register_fake
def _(x, weight, *others):  # type: ignore[no-untyped-def]
    last_state = weight.new_empty(x.shape[0], weight.shape[1] - 1, x.shape[2])
    return torch.empty_like(x, memory_format=torch.contiguous_format), last_state


@_cpu_op(
    "hcmen::causal_conv1d_backward",
    schema=f"(Tensor dy, Tensor? dlast_state, {_CONV}) -> ({', '.join(['Tensor'] * len(CAUSAL_CONV1D.inputs))})",
)
def causal_conv1d_backward_op(dy: Tensor, dlast_state: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    """Gradients in the order of the tensor arguments; that of an absent initial_state is an empty tensor."""
    return conv_gradients_by(partial(_call, "hcmen_causal_conv1d_backward"), dy, dlast_state, inputs)


@causal_conv1d_backward_op.register_fake
def _(dy, dlast_state, *inputs):  # type: ignore[no-untyped-def]
    tensors, _ = _split(CAUSAL_CONV1D, inputs)
    return tuple(
        dy.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors
    )


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors, ctx.switches = _split(CAUSAL_CONV1D, inputs)
    ctx.save_for_backward(*tensors)
    # Mostly nobody uses the last state: zeros for its gradient would cost a small backward pass a tenth of its time.
    ctx.set_materialize_grads(False)


def _conv_backward(ctx: Any, dy: Tensor | None, dlast_state: Tensor | None) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    grads = torch.ops.hcmen.causal_conv1d_backward(dy, dlast_state, *tensors, *ctx.switches)
    return (*(None if x is None else g for g, x in zip(grads, tensors, strict=True)), *(None for _ in ctx.switches))


causal_conv1d_op.register_autograd(_conv_backward, setup_context=_conv_setup)


def _dual_arguments(
    tensors: Sequence[Any], switches: Sequence[Any], y: Tensor | None, last_state: Tensor | None
) -> DualArguments:
    x, _, _, B, _, D, *_ = tensors
    sizes = dict(zip(STATE_SPACE_DUAL.sizes, (*x.shape, *B.shape[2:]), strict=True))
    return DualArguments(
        **sizes,
        dtype=int(x.dtype == torch.float16),
        wide_D=int(D.dim() == 2),
        y=pointer(y),
        last_state=pointer(last_state),
        **_named(STATE_SPACE_DUAL, tensors, switches),
    )


def dual_by(run: Callable[..., None], inputs: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """y and last_state, computed by `run(dual)`."""
    tensors, switches = _split(STATE_SPACE_DUAL, inputs)
    dense: list[Any] = _dense(*tensors)
    x, B = dense[0], dense[3]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    last_state = torch.empty(x.shape[0], *x.shape[2:], B.shape[3], dtype=torch.float32, device=x.device)
    run(_dual_arguments(dense, switches, y, last_state))
    return y, last_state


def dual_gradients_by(run: Callable[..., None], dy: Tensor, dlast_state: Tensor, inputs: Sequence[Any]) -> list[Tensor]:
    """Gradients of the tensors among `inputs`, computed by `run(dual, gradients)`; empty for absent ones."""
    tensors, switches = _split(STATE_SPACE_DUAL, inputs)
    wide, grads = _widened(tensors)
    dy, dlast_state = dy.float().contiguous(), dlast_state.float().contiguous()
    pointers = {f"d{t.name}": pointer(g) for t, g in zip(STATE_SPACE_DUAL.inputs, grads, strict=True)}
    run(
        _dual_arguments(wide, switches, None, None),
        DualGradients(dy=pointer(dy), dlast_state=pointer(dlast_state), **pointers),
    )
    return [dy.new_empty(0) if g is None else g.to(x.dtype) for g, x in zip(grads, tensors, strict=True)]


@_cpu_op("hcmen::state_space_dual", schema=f"({_DUAL}) -> (Tensor, Tensor)")
def state_space_dual_op(*inputs: Any) -> tuple[Tensor, Tensor]:
    return dual_by(partial(_call, "hcmen_state_space_dual_forward"), inputs)


@state_space_dual_op.register_fake
def _(x, dt, A, B, *others):  # type: ignore[no-untyped-def]
    last_state = A.new_empty(x.shape[0], *x.shape[2:], B.shape[3])
    return torch.empty_like(x, memory_format=torch.contiguous_format), last_state


@_cpu_op("hcmen::state_space_dual_backward", schema=f"(Tensor dy, Tensor dlast_state, {_DUAL}) -> Tensor[]")
def state_space_dual_backward_op(dy: Tensor, dlast_state: Tensor, *inputs: Any) -> list[Tensor]:
    """Gradients in the order of the tensor arguments; those of an absent z or initial_state are empty tensors."""
    return dual_gradients_by(partial(_call, "hcmen_state_space_dual_backward"), dy, dlast_state, inputs)


@state_space_dual_backward_op.register_fake
def _(dy, dlast_state, *inputs):  # type: ignore[no-untyped-def]
    return _empty_gradients(dy, _split(STATE_SPACE_DUAL, inputs)[0])


def _dual_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors, ctx.switches = _split(STATE_SPACE_DUAL, inputs)
    ctx.save_for_backward(*tensors)


def _dual_backward(ctx: Any, dy: Tensor, dlast_state: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    grads = torch.ops.hcmen.state_space_dual_backward(dy, dlast_state, *tensors, *ctx.switches)
    return (*(None if x is None else g for g, x in zip(grads, tensors, strict=True)), *(None for _ in ctx.switches))


state_space_dual_op.register_autograd(_dual_backward, setup_context=_dual_setup)
