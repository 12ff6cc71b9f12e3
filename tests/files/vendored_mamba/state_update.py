"""The single step, in Triton."""

import torch
import triton
import triton.language as tl


@triton.heuristics({"HAS_Z": lambda args: args["z_ptr"] is not None})
@triton.jit
def _step_kernel(state_ptr, x_ptr, z_ptr, HAS_Z: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(state_ptr, tl.load(x_ptr))


def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    out = torch.empty_like(x)
    grid = lambda META: (triton.cdiv(x.shape[-1], META["BLOCK"]),)  # noqa: E731
    _step_kernel[grid](state, out, z, BLOCK=4)
    return out
