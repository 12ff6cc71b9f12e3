"""hcmen's operators in the modules of transformers 5: Mamba, FalconMamba, Jamba, Zamba, Mamba2, Bamba, Zamba2,
GraniteMoeHybrid, NemotronH, FalconH1.

Newer versions call functions of their modules, which are replaced by name. Older ones have a second forward method for
mamba_ssm's kernels, taken on CUDA alone; it then runs in the place of the slow one, on the stand-ins.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hcmen.mamba import native_cuda
from hcmen.mamba.stand_ins import causal_conv, selective_scan, ssd
from hcmen.mamba.stand_ins.adapting import Replacing, adapted
from hcmen.mamba.stand_ins.arguments import not_served

__all__ = ["OLD_NAMES", "serve"]


def _nothing(*arguments: Any, **named: Any) -> None:
    """In the place of a fused kernel: the mixer then goes on with its single steps, which are replaced."""


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_conv.causal_conv1d_fn,
    "causal_conv1d_update": causal_conv.causal_conv1d_update,
    "mamba_inner_fn": _nothing,
    "mamba_selective_scan": selective_scan.selective_scan_fn,
    "mamba_selective_state_update": ssd.selective_state_update,
    "mamba2_chunk_scan": ssd.mamba_chunk_scan_combined,
    "mamba2_selective_state_update": ssd.selective_state_update,
    "mamba2_split_conv1d_scan_combined": _nothing,
}
"""Functions of a module in newer versions."""
_SCANS = ("mamba_selective_scan", "mamba2_chunk_scan")

OLD_NAMES = {
    **{
        f"{kind}DecoderOnlyOutput": "GenerateDecoderOnlyOutput"
        for kind in ("GreedySearch", "Sample", "ContrastiveSearch")
    },
    **{f"{kind}DecoderOnlyOutput": "GenerateBeamDecoderOnlyOutput" for kind in ("BeamSearch", "BeamSample")},
    **{f"{kind}EncoderDecoderOutput": "GenerateEncoderDecoderOutput" for kind in ("GreedySearch", "Sample")},
    **{f"{kind}EncoderDecoderOutput": "GenerateBeamEncoderDecoderOutput" for kind in ("BeamSearch", "BeamSample")},
}
"""Names of transformers.generation before 5 that old repositories import, and what they are called now."""


_RENAMED = {"hidden_states": "x"}
_RENAMED_IN_SCAN = {"hidden_states": "u", "dt": "delta"}
"""What arguments of transformers' functions are called in ours, where they differ."""


def _served(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """One function of a module, with hcmen's operators below it."""
    ours = FUNCTIONS[name]
    renamed = _RENAMED_IN_SCAN if name == "mamba_selective_scan" else _RENAMED
    taken = {*inspect.signature(ours).parameters, *renamed}
    run = adapted(
        original,
        ours,
        works_on_cuda=not native_cuda.works() if torch.cuda.is_available() else False,
        renamed=renamed,
        ignored=("use_mambapy", "use_associative_scan"),
    )

    def call(*arguments: Any, **named: Any) -> Any:
        if named.get("activation") not in (None, "silu", "swish"):
            return original(*arguments, **named)
        for packed in ("seq_idx", "cu_seqlens"):
            not_served(packed, named.get(packed))
        # Layers pass on what other layers of the model take.
        known = {k: v for k, v in named.items() if k in taken}
        return run(*arguments, **known)

    return call


def serve(shim: Replacing, module: ModuleType) -> None:
    """Replaces what a module of transformers has of Mamba, until the shim ends."""
    name, names = module.__name__, vars(module)
    if name in ("transformers.generation", "transformers.generation.utils"):
        _serve_old_names(shim, module)
    if not name.startswith("transformers.models."):
        return
    if any(scan in names for scan in _SCANS):
        for function in FUNCTIONS.keys() & names.keys():
            shim.replace(module, function, _served(function, names[function]))
    mixers = [c for c in list(names.values()) if isinstance(c, type) and c.__module__ == name]
    mixers = [c for c in mixers if "cuda_kernels_forward" in vars(c) and _is_mamba(c)]
    if mixers:
        _serve_mixers(shim, module, mixers)


# --- versions with a second forward method ----------------------------------------------------------------------------


def _is_mamba(mixer: type) -> bool:
    """Others that have such a method are convolutions alone."""
    return "selective_state_update" in mixer.__dict__["cuda_kernels_forward"].__code__.co_names


_KERNELS = {
    "causal_conv1d_fn": causal_conv.causal_conv1d_fn,
    "causal_conv1d_update": causal_conv.causal_conv1d_update,
    "falcon_mamba_inner_fn": _nothing,
    "mamba_chunk_scan_combined": ssd.mamba_chunk_scan_combined,
    "mamba_inner_fn": _nothing,
    "mamba_split_conv1d_scan_combined": _nothing,
    "selective_scan_fn": selective_scan.selective_scan_fn,
    "selective_state_update": ssd.selective_state_update,
}
"""What the second method calls, by its global names; a mixer's constructor fetches them from a kernel's module."""


def _serve_mixers(shim: Replacing, module: ModuleType, mixers: list[type]) -> None:
    for name, function in _KERNELS.items():
        shim.replace(module, name, function)
    if "lazy_load_kernel" in vars(module):
        load, kernels = vars(module)["lazy_load_kernel"], SimpleNamespace(**_KERNELS)
        ours = ("causal-conv1d", "mamba-ssm", "falcon_mamba-ssm")
        shim.replace(module, "lazy_load_kernel", lambda name, *a, **k: kernels if name in ours else load(name, *a, **k))
    for mixer in mixers:
        slow = next(name for name in ("slow_forward", "torch_forward") if name in vars(mixer))
        shim.replace(mixer, slow, _unfused(vars(mixer)["cuda_kernels_forward"]))


def _unfused(kernels_forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The method step by step in training too: the fused kernels norm otherwise than the slow method does."""

    def forward(self: Any, *arguments: Any, **named: Any) -> Tensor:
        training, self.training = self.training, False
        try:
            return kernels_forward(self, *arguments, **named)
        finally:
            self.training = training

    return forward


# --- what goes with it ------------------------------------------------------------------------------------------------


def _serve_old_names(shim: Replacing, module: ModuleType) -> None:
    """The old names, found when they are asked for: what they mean now takes seconds to import."""
    base = type(module)

    def attribute(self: Any, name: str) -> Any:
        if name in OLD_NAMES:
            return getattr(self, OLD_NAMES[name])
        above = getattr(base, "__getattr__", None)
        if above is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return above(self, name)

    module.__class__ = type(base.__name__, (base,), {"__getattr__": attribute, "__module__": base.__module__})
    shim.on_exit(lambda: setattr(module, "__class__", base))
