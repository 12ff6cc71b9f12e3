"""What the stand-in modules have in them, by their names.

mamba_ssm and causal_conv1d are here for a machine that has neither package nor checkout; where there is one, its own
files are imported, and only the compiled modules below them come from here.
"""

from __future__ import annotations

import functools
import importlib.machinery
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from hcmen.mamba.stand_ins import causal_conv, mamba_modules, norms, selective_scan, ssd, triton

__all__ = ["COMPILED", "ROOTS", "is_stand_in", "missing", "module"]

COMPILED: Mapping[str, Any] = {
    "selective_scan_cuda": selective_scan.CUDA,
    "selective_scan_cuda_nrow": selective_scan.CUDA,
    "selective_scan_cuda_core": selective_scan.CORE,
    "selective_scan_cuda_oflex": selective_scan.OFLEX,
    "causal_conv1d_cuda": causal_conv.CUDA,
}
"""Compiled modules, which have nothing but functions."""

_MARK = "__hcmen_stand_in__"  # hcmen/mamba/mamba_ssm.py looks for it too
_CHECKOUT = "put a checkout of github.com/state-spaces/mamba on the path (PYTHONPATH): its files run on these operators"


class Block(nn.Module):
    """mamba_ssm.modules.block.Block: a norm and a mixer, then a norm and an MLP, each beside a residual."""

    def __init__(
        self,
        dim: int,
        mixer_cls: Any,
        mlp_cls: Any = nn.Identity,
        norm_cls: Any = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.fused_add_norm, self.residual_in_fp32 = fused_add_norm, residual_in_fp32
        self.norm, self.mixer = norm_cls(dim), mixer_cls(dim)
        self.mlp: Any = None
        if mlp_cls is not nn.Identity:
            self.norm2, self.mlp = norm_cls(dim), mlp_cls(dim)

    def _normed(self, norm: Any, x: Tensor, residual: Tensor | None) -> Any:
        return norms.layer_norm_fn(
            x,
            norm.weight,
            getattr(norm, "bias", None),
            residual,
            eps=norm.eps,
            prenorm=True,
            residual_in_fp32=self.residual_in_fp32,
            is_rms_norm=not isinstance(norm, nn.LayerNorm),
        )

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None, inference_params: Any = None, **others: Any
    ) -> tuple[Tensor, Tensor]:
        """(what comes out, the residual): both [batch, time, dim]."""
        x, residual = self._normed(self.norm, hidden_states, residual)
        x = self.mixer(x, inference_params=inference_params, **others)
        if self.mlp is not None:
            x, residual = self._normed(self.norm2, x, residual)
            x = self.mlp(x)
        assert residual is not None
        return x, residual

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: Any = None, **others: Any) -> Any:
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **others)


class BlockOf1(Block):
    """mamba_ssm.modules.mamba_simple.Block of 1.x, which has no MLP."""

    def __init__(
        self,
        dim: int,
        mixer_cls: Any,
        norm_cls: Any = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__(dim, mixer_cls, nn.Identity, norm_cls, fused_add_norm, residual_in_fp32)


@dataclass
class InferenceParams:
    """mamba_ssm.utils.generation.InferenceParams: the states of every layer, and how many steps they have seen."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[Any, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0


def _of(source: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names}


_SCANS = ("selective_scan_fn", "selective_scan_ref", "mamba_inner_fn", "mamba_inner_ref", "mamba_inner_fn_no_out_proj")
_NORMS = ("RMSNorm", "layer_norm_fn", "rms_norm_fn", "layer_norm_linear_fn")
_CONV = ("causal_conv1d_fn", "causal_conv1d_update")
_MIXERS = _of(mamba_modules, "Mamba", "Mamba2")

_CONTENTS: Mapping[str, dict[str, Any]] = {
    **{name: vars(functions) for name, functions in COMPILED.items()},
    "causal_conv1d": {"__version__": "1.6.1"} | _of(causal_conv, *_CONV),
    "causal_conv1d.causal_conv1d_interface": _of(causal_conv, *_CONV, "causal_conv1d_ref", "causal_conv1d_update_ref"),
    "causal_conv1d.causal_conv1d_varlen": _of(causal_conv, "causal_conv1d_varlen_states"),
    "causal_conv1d.cpp_functions": _of(
        causal_conv, "causal_conv1d_fwd_function", "causal_conv1d_bwd_function", "causal_conv1d_update_function"
    ),
    "mamba_ssm": {"__version__": "2.3.2"} | _MIXERS | _of(selective_scan, "selective_scan_fn", "mamba_inner_fn"),
    "mamba_ssm.modules": {},
    "mamba_ssm.modules.block": {"Block": Block},
    "mamba_ssm.modules.mamba2": _of(mamba_modules, "Mamba2"),
    "mamba_ssm.modules.mamba_simple": _of(mamba_modules, "Mamba") | {"Block": BlockOf1},
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": _of(selective_scan, *_SCANS, "bimamba_inner_fn", "bimamba_inner_ref"),
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.k_activations": _of(ssd, "swiglu"),
    "mamba_ssm.ops.triton.layer_norm": _of(norms, *_NORMS),
    "mamba_ssm.ops.triton.layernorm": _of(norms, *_NORMS),
    "mamba_ssm.ops.triton.layernorm_gated": _of(norms, "rmsnorm_fn", "layernorm_fn")
    | {"RMSNorm": norms.RMSNormGated, "LayerNorm": norms.LayerNormGated},
    "mamba_ssm.ops.triton.selective_state_update": _of(ssd, "selective_state_update")
    | {"selective_state_update_ref": ssd.selective_state_update},
    "mamba_ssm.ops.triton.ssd_combined": _of(ssd, "mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"),
    "mamba_ssm.utils": {},
    "mamba_ssm.utils.generation": {"InferenceParams": InferenceParams},
}
_ELSEWHERE = {"mamba_ssm": ("MambaLMHeadModel", "Mamba3")}
"""Names of the real modules that a stand-in has not."""

ROOTS = frozenset(name.partition(".")[0] for name in _CONTENTS) | {"triton"}
"""The packages that there are stand-ins for."""


def missing(name: str) -> ModuleNotFoundError:
    """The error for a module that a stand-in package has not."""
    return ModuleNotFoundError(f"{name} is not among hcmen's stand-ins: {_CHECKOUT}", name=name)


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name in _ELSEWHERE.get(self.__name__, ()):
            raise ImportError(f"{name} is not in hcmen's stand-in for {self.__name__}: {_CHECKOUT}", name=self.__name__)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


@functools.cache
def module(name: str) -> ModuleType | None:
    """The stand-in of this name, one and the same each time; None if there is none."""
    if name == "triton" or name.startswith("triton."):
        made = triton.module(name)
    elif name in _CONTENTS:
        made = _Module(name, "A stand-in by hcmen.mamba.shim, on hcmen's operators.")
        package = any(other.startswith(f"{name}.") for other in _CONTENTS)
        made.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=package)
        if package:
            made.__path__ = []
        made.__dict__.update(_CONTENTS[name])
    else:
        return None
    setattr(made, _MARK, True)
    return made


def is_stand_in(value: Any) -> bool:
    """Whether this module is one of ours."""
    return isinstance(value, ModuleType) and _MARK in vars(value)
