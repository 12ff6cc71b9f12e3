"""Mamba and Mamba-2 mixers for whoever has neither mamba_ssm nor a checkout of it.

Constructors, parameters and state_dict keys are those of mamba_ssm 2.3, so that checkpoints load; the initial values
are those of the papers. The forward pass is channels last throughout.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcmen.base.errors import InputError
from hcmen.mamba.scan import causal_conv1d, selective_scan
from hcmen.mamba.stand_ins.arguments import not_served
from hcmen.mamba.stand_ins.causal_conv import causal_conv1d_update
from hcmen.mamba.stand_ins.norms import RMSNormGated
from hcmen.mamba.stand_ins.ssd import (
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
    selective_state_update,
    swiglu,
)

__all__ = ["Mamba", "Mamba2"]


def _log_uniform_steps(count: int, dt_min: float, dt_max: float, least: float, options: dict[str, Any]) -> Tensor:
    """[count]: the inverse softplus of step sizes, uniform in their logarithm between dt_min and dt_max."""
    steps = torch.exp(torch.empty(count, **options).uniform_(math.log(dt_min), math.log(dt_max))).clamp(min=least)
    return steps + torch.log(-torch.expm1(-steps))


def _without_decay(x: Tensor) -> nn.Parameter:
    """A parameter that mamba_ssm's users leave out of weight decay by this mark."""
    made = nn.Parameter(x)
    made._no_weight_decay = True  # type: ignore[attr-defined]
    return made


class _Mixer(nn.Module):
    """What both have: a projection, a causal convolution, states, and a last projection."""

    layer_idx: int | None
    conv1d: nn.Conv1d
    in_proj: nn.Linear

    def _state_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int = 0, dtype: Any = None, **others: Any
    ) -> tuple[Tensor, Tensor]:
        """Zero states: the last inputs of the convolution [batch, channel, taps], and the scan's [batch, ...]."""
        channel, _, taps = self.conv1d.weight.shape
        options: dict[str, Any] = {"device": self.conv1d.weight.device, "dtype": dtype or self.conv1d.weight.dtype}
        state = torch.zeros(batch_size, *self._state_shape(), **options)
        return torch.zeros(batch_size, channel, taps, **options), state

    def _states(self, inference_params: Any, batch: int) -> tuple[Tensor, Tensor]:
        if self.layer_idx is None:
            fix = "build every layer with its number"
            raise InputError("layer_idx is None", "the layer's number, by which inference_params keeps its states", fix)
        kept = inference_params.key_value_memory_dict
        if self.layer_idx not in kept:
            kept[self.layer_idx] = self.allocate_inference_cache(batch)
        conv_state, ssm_state = kept[self.layer_idx]
        return conv_state, ssm_state

    def _remember(self, conv_state: Tensor, x: Tensor) -> None:
        """The last inputs of x [batch, time, channel] into conv_state [batch, channel, taps]."""
        kept = conv_state.shape[-1]
        conv_state.copy_(F.pad(x.transpose(1, 2), (kept, 0))[..., -kept:])

    def _convolved(self, x: Tensor) -> Tensor:
        y = causal_conv1d(x, self.conv1d.weight[:, 0], self.conv1d.bias, activation="silu")
        assert isinstance(y, Tensor)
        return y


class Mamba(_Mixer):
    """mamba_ssm.modules.mamba_simple.Mamba: [batch, time, d_model] to the same (arXiv 2312.00752)."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = inner = int(expand * d_model)
        self.dt_rank = rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        self.use_fast_path, self.layer_idx, self.activation, self.act = use_fast_path, layer_idx, "silu", nn.SiLU()
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias, **options)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1, bias=conv_bias, **options)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False, **options)
        self.dt_proj = nn.Linear(rank, inner, bias=True, **options)
        spread = rank**-0.5 * dt_scale
        if dt_init not in ("constant", "random"):
            raise InputError(f"dt_init is '{dt_init}'", "'random' or 'constant'")
        nn.init.uniform_(self.dt_proj.weight, spread if dt_init == "constant" else -spread, spread)
        with torch.no_grad():
            self.dt_proj.bias.copy_(_log_uniform_steps(inner, dt_min, dt_max, dt_init_floor, options))
        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]
        rates = torch.arange(1, d_state + 1, dtype=torch.float32, device=device)
        self.A_log = _without_decay(rates.log().repeat(inner, 1))
        self.D = _without_decay(torch.ones(inner, device=device))
        self.out_proj = nn.Linear(inner, d_model, bias=bias, **options)

    def _state_shape(self) -> tuple[int, ...]:
        return self.d_inner, self.d_state

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        states = None
        if inference_params is not None:
            states = self._states(inference_params, hidden_states.shape[0])
            if inference_params.seqlen_offset > 0:
                return self.step(hidden_states, *states)[0]
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        if states is not None:
            self._remember(states[0], x)
        x = self._convolved(x)
        low, B, C = torch.split_with_sizes(self.x_proj(x), [self.dt_rank, self.d_state, self.d_state], dim=-1)
        found = selective_scan(
            x,
            F.linear(low, self.dt_proj.weight),
            -torch.exp(self.A_log.float()),
            B,
            C,
            self.D,
            self.dt_proj.bias,
            z,
            delta_softplus=True,
            return_last_state=states is not None,
        )
        if states is not None:
            found, last = found
            states[1].copy_(last)
        out: Tensor = self.out_proj(found)
        return out

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step [batch, 1, d_model]; the states are changed in place."""
        x, z = self.in_proj(hidden_states.squeeze(1)).chunk(2, dim=-1)
        x = causal_conv1d_update(x, conv_state, self.conv1d.weight[:, 0], self.conv1d.bias, self.activation)
        low, B, C = torch.split_with_sizes(self.x_proj(x), [self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = selective_state_update(
            ssm_state,
            x,
            F.linear(low, self.dt_proj.weight),
            -torch.exp(self.A_log.float()),
            B,
            C,
            self.D,
            z,
            self.dt_proj.bias,
            dt_softplus=True,
        )
        return self.out_proj(y)[:, None], conv_state, ssm_state


class Mamba2(_Mixer):
    """mamba_ssm.modules.mamba2.Mamba2: [batch, time, d_model] to the same (arXiv 2405.21060), on one process."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: Any = None,
        sequence_parallel: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        not_served("process_group", process_group, "build the mixer on one process")
        options = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand, self.headdim = d_model, d_state, d_conv, expand, headdim
        self.d_inner = inner = expand * d_model
        self.d_ssm = width = inner if d_ssm is None else d_ssm
        if width % headdim or (width // headdim) % ngroups:
            raise InputError(
                f"{width} channels in heads of {headdim} and {ngroups} groups",
                "whole heads, and as many of them for each group",
            )
        self.nheads = head = width // headdim
        self.ngroups, self.D_has_hdim, self.rmsnorm, self.norm_before_gate = (
            ngroups,
            D_has_hdim,
            rmsnorm,
            norm_before_gate,
        )
        self.dt_limit, self.chunk_size, self.use_mem_eff_path = dt_limit, chunk_size, use_mem_eff_path
        self.layer_idx = layer_idx
        self.activation, self.act = "silu", nn.SiLU()
        convolved = width + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, 2 * inner - width + convolved + head, bias=bias, **options)
        self.conv1d = nn.Conv1d(
            convolved, convolved, d_conv, groups=convolved, padding=d_conv - 1, bias=conv_bias, **options
        )
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.dt_bias = _without_decay(_log_uniform_steps(head, dt_min, dt_max, dt_init_floor, options))
        rates = torch.empty(head, dtype=torch.float32, device=device).uniform_(*A_init_range)
        self.A_log = _without_decay(rates.log().to(dtype or torch.float32))
        self.D = _without_decay(torch.ones(width if D_has_hdim else head, device=device))
        if rmsnorm:
            self.norm = RMSNormGated(width, 1e-5, width // ngroups, norm_before_gate, **options)
        self.out_proj = nn.Linear(inner, d_model, bias=bias, **options)

    def _state_shape(self) -> tuple[int, ...]:
        return self.nheads, self.headdim, self.d_state

    def _skip(self) -> Tensor:
        """D, [head] or [head, p]."""
        return torch.unflatten(self.D, 0, (self.nheads, self.headdim)) if self.D_has_hdim else self.D

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
    ) -> Tensor:
        not_served("cu_seqlens", cu_seqlens)
        series = u if seqlen is None else torch.unflatten(u, 0, (-1, seqlen))
        if inference_params is not None:
            states = self._states(inference_params, series.shape[0])
            if inference_params.seqlen_offset > 0:
                return self.step(series, *states)[0]
            return self._prefill(series, *states)
        out: Tensor = mamba_split_conv1d_scan_combined(
            self.in_proj(series),
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            self.dt_bias,
            -torch.exp(self.A_log.float()),
            self._skip(),
            seq_idx=seq_idx,
            dt_limit=self.dt_limit,
            rmsnorm_weight=self.norm.weight if self.rmsnorm else None,
            rmsnorm_eps=self.norm.eps if self.rmsnorm else 1e-6,
            outproj_weight=self.out_proj.weight,
            outproj_bias=self.out_proj.bias,
            headdim=self.headdim,
            ngroups=self.ngroups,
            norm_before_gate=self.norm_before_gate,
        )
        return out if seqlen is None else out.flatten(0, 1)

    def _split(self, projected: Tensor) -> tuple[Tensor, ...]:
        """[..., all] -> what is beside the mixer, z, x with B and C, dt."""
        convolved = self.conv1d.weight.shape[0]
        sizes = [2 * (self.d_inner - self.d_ssm), self.d_ssm, convolved, self.nheads]
        return tuple(torch.split_with_sizes(projected, sizes, dim=-1))

    def _finished(self, y: Tensor, z: Tensor, beside: Tensor) -> Tensor:
        y = self.norm(y, z) if self.rmsnorm else y
        out: Tensor = self.out_proj(torch.cat((swiglu(beside), y), dim=-1) if beside.shape[-1] else y)
        return out

    def _prefill(self, u: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        beside, z, xBC, dt = self._split(self.in_proj(u))
        self._remember(conv_state, xBC)
        size = self.ngroups * self.d_state
        x, B, C = torch.split_with_sizes(self._convolved(xBC), [self.d_ssm, size, size], dim=-1)
        heads = (self.nheads, self.headdim)
        y, last = mamba_chunk_scan_combined(
            torch.unflatten(x, -1, heads),
            dt,
            -torch.exp(self.A_log.float()),
            torch.unflatten(B, -1, (self.ngroups, self.d_state)),
            torch.unflatten(C, -1, (self.ngroups, self.d_state)),
            D=self._skip(),
            z=None if self.rmsnorm else torch.unflatten(z, -1, heads),
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            return_final_states=True,
        )
        ssm_state.copy_(last)
        return self._finished(y.flatten(-2), z, beside)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step [batch, 1, d_model]; the states are changed in place. As in mamba_ssm, dt_limit is for sequences."""
        beside, z, xBC, dt = self._split(self.in_proj(hidden_states.squeeze(1)))
        xBC = causal_conv1d_update(xBC, conv_state, self.conv1d.weight[:, 0], self.conv1d.bias, self.activation)
        size, heads = self.ngroups * self.d_state, (self.nheads, self.headdim)
        x, B, C = torch.split_with_sizes(xBC, [self.d_ssm, size, size], dim=-1)
        rates = -torch.exp(self.A_log.float())
        y = selective_state_update(
            ssm_state,
            torch.unflatten(x, -1, heads),
            dt[..., None].expand(-1, -1, self.headdim),
            rates[:, None, None].expand(-1, self.headdim, self.d_state),
            torch.unflatten(B, -1, (self.ngroups, self.d_state)),
            torch.unflatten(C, -1, (self.ngroups, self.d_state)),
            D=self._skip() if self.D_has_hdim else self.D[:, None].expand(heads),
            z=None if self.rmsnorm else torch.unflatten(z, -1, heads),
            dt_bias=self.dt_bias[:, None].expand(heads),
            dt_softplus=True,
        )
        return self._finished(y.flatten(-2), z, beside)[:, None], conv_state, ssm_state
