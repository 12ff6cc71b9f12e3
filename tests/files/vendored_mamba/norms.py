"""A norm beside a residual in Triton, with the order of arguments of mamba_ssm 1.0."""

import torch
import triton
import triton.language as tl


@triton.autotune(
    configs=[triton.Config({}, num_warps=n) for n in (1, 2, 4)] + [triton.Config({"BLOCK": 64}, num_stages=2)],
    key=["N", "IS_RMS"],
)
@triton.heuristics({"HAS_BIAS": lambda args: args["B"] is not None})
@triton.jit
def _norm_kernel(X, Y, W, B, N, eps, IS_RMS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    x = tl.load(X + row * N + cols, mask=cols < N, other=0.0).to(tl.float32)
    rstd = 1 / tl.sqrt(tl.sum(x * x, axis=0) / N + eps)
    tl.store(Y + row * N + cols, x * rstd * tl.load(W + cols, mask=cols < N), mask=cols < N)


def rms_norm_fn(x, weight, bias, residual=None, prenorm=False, residual_in_fp32=False, eps=1e-6):
    whole = x if residual is None else x + residual
    y = torch.empty_like(whole)
    block = triton.next_power_of_2(x.shape[-1])
    with torch.cuda.device(x.device.index):
        _norm_kernel[(whole.numel() // x.shape[-1],)](whole, y, weight, bias, x.shape[-1], eps, True, True, block)
    return (y, whole) if prenorm else y


def scaled(x):
    """Nothing in mamba_ssm is like it."""
    y = torch.empty_like(x)
    _norm_kernel[(1,)](x, y, x, x, x.shape[-1], 0.0, True, True, 16)
    return y


class RMSNorm(torch.nn.Module):
    def __init__(self, width, eps=1e-5):
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(width)), eps
        self.register_parameter("bias", None)

    def forward(self, x, residual=None, prenorm=False):
        return rms_norm_fn(x, self.weight, self.bias, residual, prenorm, False, self.eps)
