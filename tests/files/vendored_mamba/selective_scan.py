"""The selective scan with autograd functions of its own over the compiled modules, in the layout of mamba_ssm 1.2."""

import causal_conv1d_cuda
import selective_scan_cuda
import selective_scan_cuda_oflex
import torch
from torch.nn import functional as F


class SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias, last):
        squeeze = B.dim() == 3
        if squeeze:
            B, C = B[:, None], C[:, None]
        out, x, *rest = selective_scan_cuda.fwd(u, delta, A, B, C, D, z, delta_bias, True)
        ctx.squeeze, ctx.gated = squeeze, z is not None
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, x, out)
        y = rest[0] if ctx.gated else out
        return (y, x[:, :, -1, 1::2]) if last else y

    @staticmethod
    def backward(ctx, dout, *others):
        u, delta, A, B, C, D, z, delta_bias, x, out = ctx.saved_tensors
        du, ddelta, dA, dB, dC, dD, dbias, *rest = selective_scan_cuda.bwd(
            u, delta, A, B, C, D, z, delta_bias, dout.contiguous(), x, out, None, True, False
        )
        if ctx.squeeze:
            dB, dC = dB[:, 0], dC[:, 0]
        return du, ddelta, dA, dB, dC, dD, rest[0] if ctx.gated else None, dbias, None


def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, return_last_state=False):
    return SelectiveScan.apply(u, delta, A, B, C, D, z, delta_bias, return_last_state)


class CrossScan(torch.autograd.Function):
    """Groups of directions, with the modules of VMamba."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, delta_bias):
        out, x, *_ = selective_scan_cuda_oflex.fwd(u, delta, A, B, C, D, delta_bias, True, 1, True)
        ctx.save_for_backward(u, delta, A, B, C, D, delta_bias, x)
        return out

    @staticmethod
    def backward(ctx, dout):
        u, delta, A, B, C, D, delta_bias, x = ctx.saved_tensors
        found = selective_scan_cuda_oflex.bwd(u, delta, A, B, C, D, delta_bias, dout.contiguous(), x, True, 1)
        return tuple(found[:7])


class Inner(torch.autograd.Function):
    """A mixer whole, which computes its convolution again in the backward pass to save memory."""

    @staticmethod
    def forward(ctx, xz, taps, shift, x_proj, dt_proj, A, D, dt_bias):
        x, z = xz.chunk(2, dim=1)
        conv = causal_conv1d_cuda.causal_conv1d_fwd(x, taps, shift, None, None, None, True)
        rank, state, time = dt_proj.shape[1], A.shape[1], xz.shape[-1]
        low = F.linear(conv.transpose(1, 2).reshape(-1, conv.shape[1]), x_proj)
        delta = (dt_proj @ low[:, :rank].t()).reshape(conv.shape[1], -1, time).transpose(0, 1).contiguous()
        B = low[:, rank : rank + state].reshape(-1, time, state).transpose(1, 2)[:, None].contiguous()
        C = low[:, -state:].reshape(-1, time, state).transpose(1, 2)[:, None].contiguous()
        out, x_states, out_z = selective_scan_cuda.fwd(conv, delta, A, B, C, D, z, dt_bias, True)
        ctx.save_for_backward(xz, taps, shift, low, x_proj, dt_proj, delta, A, B, C, D, dt_bias, x_states, out)
        return out_z

    @staticmethod
    def backward(ctx, dout):
        xz, taps, shift, low, x_proj, dt_proj, delta, A, B, C, D, dt_bias, x_states, out = ctx.saved_tensors
        x, z = xz.chunk(2, dim=1)
        rank, state = dt_proj.shape[1], A.shape[1]
        conv = causal_conv1d_cuda.causal_conv1d_fwd(x, taps, shift, None, None, None, True)
        dxz = torch.empty_like(xz)
        dx, dz = dxz.chunk(2, dim=1)
        dconv, ddelta, dA, dB, dC, dD, dbias, dz, _ = selective_scan_cuda.bwd(
            conv, delta, A, B, C, D, z, dt_bias, dout.contiguous(), x_states, out, dz, True, True
        )
        steps = ddelta.transpose(0, 1).reshape(ddelta.shape[1], -1)
        dlow = torch.empty_like(low)
        dlow[:, :rank] = (dt_proj.t() @ steps).t()
        dlow[:, rank : rank + state] = dB[:, 0].transpose(1, 2).reshape(-1, state)
        dlow[:, -state:] = dC[:, 0].transpose(1, 2).reshape(-1, state)
        flat = conv.transpose(1, 2).reshape(-1, conv.shape[1])
        dconv = dconv + (dlow @ x_proj).reshape(conv.shape[0], -1, conv.shape[1]).transpose(1, 2)
        dx, dtaps, dshift, *_ = causal_conv1d_cuda.causal_conv1d_bwd(
            x, taps, shift, dconv.contiguous(), None, None, None, dx, False, True
        )
        return dxz, dtaps, dshift, dlow.t() @ flat, steps @ low[:, :rank], dA, dD, dbias


def mamba_inner(*arguments):
    return Inner.apply(*arguments)
