"""Channels-last forwards for the Mamba mixers of other people's models, each kept only where it gives the same numbers.

mamba_ssm and its forks work channels first, because their CUDA kernels do. In an exported graph that is a Transpose on
each side of every projection: 49 of them in a language model of four layers, which then takes 2.4 times as long.

`rewrite_modules` looks at attributes, never at class names. A mixer of Mamba-1 has in_proj, conv1d, x_proj, dt_proj,
A_log, D and out_proj; one of Mamba-2 has dt_bias in place of x_proj and dt_proj. What else a mixer has (norms of B, C
and dt, a backward direction, a gated MLP beside it, multipliers) selects among the forwards of mixers.py. What is
selected runs beside the module's own forward, on the input which the module had in a run of the model and on a shorter
one, in float32 and float64. Where they differ the module keeps its own.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from hcmen.mamba.mixers import Forward, candidates, family
from hcmen.mamba.report import accepted

__all__ = ["Rewrite", "rewrite_modules"]

TOLERANCE = 1e-5
# A forward is compared on at most so much of the input that was recorded.
MOST_BATCH, MOST_STEPS = 2, 96


@dataclass(frozen=True)
class Rewrite:
    """One kind of rewrite in a model or graph.

    Attributes:
        name: what it is, such as "channels-last Mamba-1".
        where: the modules or nodes it concerns.
        count: how many of them.
        nodes_before, nodes_after: of modules, the PyTorch operations of their calls; of a graph, its nodes.
        kept: whether the result has it.
        reason: why it is kept or left out, with the largest difference that was found.
        graph: it is of the graph, not of modules.
    """

    name: str
    where: str
    count: int
    nodes_before: int
    nodes_after: int
    kept: bool
    reason: str
    graph: bool = False


@dataclass(frozen=True)
class _Call:
    """What a module was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class _Found:
    """What became of one mixer: kept where `reason` is empty. before, after: PyTorch operations of a call."""

    where: str
    name: str
    reason: str = ""
    before: int = 0
    after: int = 0
    difference: float = 0.0
    precision: str = ""


class _Differs(Exception):
    """Why a forward is left out."""


def rewrite_modules(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, *, tolerance: float = TOLERANCE
) -> tuple[nn.Module, list[Rewrite]]:
    """A copy of `model` whose recognised mixers run channels last, and what was done to it.

    The copy shares its parameters and buffers with `model`, which stays as it is. It is in evaluation mode.

    args, kwargs: an example call of `model`; the mixers are compared on what reaches them in it.
    tolerance: the largest difference, relative to the largest output, that is always accepted. More is accepted where
        the module's own float32 is itself off: 3 times its distance from float64.
    """
    try:
        twin = _twin(model)
    except Exception as error:  # a module may hold anything at all, and copying runs its code
        reason = f"the model cannot be copied: {type(error).__name__}: {error}"
        return model, [Rewrite("channels-last mixers", type(model).__name__, 0, 0, 0, False, reason)]
    twin.eval()
    experts = _experts_apart(twin, args, kwargs or {}, tolerance)
    mixers = {name: module for name, module in twin.named_modules() if family(module)}
    calls = _record(twin, mixers, args, kwargs or {}) if mixers else {}
    found = [_rewrite_one(name, module, calls.get(name), tolerance) for name, module in mixers.items()]
    return twin, [*experts, *_by_kind(found)]


def _twin(model: nn.Module) -> nn.Module:
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _by_kind(found: Sequence[_Found]) -> list[Rewrite]:
    kinds: dict[tuple[str, str, str], list[_Found]] = {}
    for one in found:
        kinds.setdefault((one.name, one.reason, one.precision), []).append(one)
    rewrites = []
    for (name, reason, precision), ones in kinds.items():
        where = ones[0].where if len(ones) == 1 else f"{ones[0].where} and {len(ones) - 1} more"
        before, after = sum(one.before for one in ones), sum(one.after for one in ones)
        within = f"within {max(one.difference for one in ones):.1e} of its own forward in {precision}"
        rewrites.append(Rewrite(name, where, len(ones), before, after, not reason, reason or within))
    return rewrites


# --- one mixer ------------------------------------------------------------------------------------------------------


def _record(
    model: nn.Module, mixers: Mapping[str, nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, _Call]:
    """The first call of each mixer in one run of the model."""
    calls: dict[str, _Call] = {}
    hooks = []
    for name, module in mixers.items():

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            calls.setdefault(name, _Call(args, kwargs))

        hooks.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _rewrite_one(where: str, module: nn.Module, call: _Call | None, tolerance: float) -> _Found:
    name = f"channels-last {family(module)}"
    if call is None:
        return _Found(where, name, "the example does not call it")
    own, reason = module.forward, "no known forward fits its attributes"
    try:
        call = _shorter(own, call, MOST_BATCH, MOST_STEPS)
        _run(own, call)
    except _Differs as differs:
        return _Found(where, name, str(differs))
    except Exception as error:  # a mixer of slices takes multiples of some length alone
        return _Found(where, name, f"its own forward fails on a part of the example: {type(error).__name__}")
    for forward in candidates(module):
        new = _calling(own, forward)
        try:
            difference, precision = _compare(module, new, call, tolerance)
        except _Differs as differs:
            reason = str(differs)
            continue
        before, after = _operations(own, call), _operations(new.__get__(module), call)
        module.forward = new.__get__(module)
        return _Found(where, name, "", before, after, difference, precision)
    return _Found(where, name, reason)


def _calling(own: Callable[..., Any], forward: Forward) -> Callable[..., Any]:
    """A forward for a module: the new one where it is called with a sequence and a mask alone, else its own."""

    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hidden, mask, others = _arguments(own, args, kwargs)
        if others:
            return own(*args, **kwargs)
        return forward(self, hidden, mask)

    return run


def _arguments(
    own: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Callable[[Tensor], Tensor], list[str]]:
    """The sequence a mixer was called with, what masks it, and the names of what else would change its result."""
    bound = inspect.signature(own).bind(*args, **kwargs)
    given = dict(bound.arguments)
    for name, parameter in inspect.signature(own).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    hidden = given.pop(next(iter(given)))
    mask = given.pop("attention_mask", None)
    others = [
        name for name, value in given.items() if value is not None and not isinstance(value, bool) and value != ()
    ]
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        others.append("a first argument that is no [batch, time, channel]")
    if mask is not None and mask.dim() != 2:
        others.append("a mask that is no [batch, time]")
    return hidden, _masking(own, mask), others


def _masking(own: Callable[..., Any], mask: Tensor | None) -> Callable[[Tensor], Tensor]:
    """What a mixer of transformers does to padded steps. The rule differs by version, so its own function is called."""
    apply = getattr(sys.modules.get(getattr(own, "__module__", "")), "apply_mask_to_padding_states", None)
    if mask is None:
        return lambda x: x
    if apply is not None:
        return lambda x: apply(x, mask)
    return lambda x: (x * mask[:, :, None]).to(x.dtype)


def _shorter(own: Callable[..., Any], call: _Call, batch: int, steps: int) -> _Call:
    """The call on the first `batch` series and `steps` steps alone."""
    hidden, _, others = _arguments(own, call.args, call.kwargs)
    if others:
        raise _Differs(f"it is called with {', '.join(others)}")
    whole = hidden.shape[:2]

    def cut(x: Any) -> Any:
        fits = isinstance(x, Tensor) and x.shape[:2] == whole
        return x[:batch, :steps].contiguous() if fits else x

    return _Call(tree_map(cut, call.args), tree_map(cut, call.kwargs))


def _compare(module: nn.Module, new: Callable[..., Any], call: _Call, tolerance: float) -> tuple[float, str]:
    """The largest difference over two sizes, relative to the largest output, and the precisions it was found in."""
    own = module.forward
    steps = _arguments(own, call.args, call.kwargs)[0].shape[1]
    calls = [call]
    shorter = _shorter(own, call, 1, max(1, steps // 2))
    with contextlib.suppress(Exception):  # some mixers take multiples of a length alone
        _run(own, shorter)
        calls.append(shorter)
    double = copy.deepcopy(module).double()
    try:
        exact = [_run(double.forward, _as_double(one)) for one in calls]
    except Exception:  # kernels of others take float32 alone, and complain in words of their own
        exact = []
    worst = 0.0
    for i, one in enumerate(calls):
        mine = _run(own, one)
        bound = accepted(tolerance, _distance(mine, exact[i]) if exact else None)
        try:
            other = _run(new.__get__(module), one)
            found = {"float32": _distance(other, exact[i] if exact else mine)}
            if exact:
                found["float64"] = _distance(_run(new.__get__(double), _as_double(one)), exact[i])
        except Exception as error:  # a forward that does not fit the module may fail in any way
            raise _Differs(f"the channels-last forward fails: {type(error).__name__}: {error}") from error
        for precision, distance in found.items():
            if not distance <= bound:
                raise _Differs(f"differs by {distance:.1e} in {precision}, at most {bound:.1e} is accepted")
            worst = max(worst, distance)
    return worst, "float32 and float64" if exact else "float32 (its own does not run in float64)"


def _run(forward: Callable[..., Any], call: _Call) -> Tensor:
    with torch.no_grad():
        y = forward(*call.args, **call.kwargs)
    tensors = [x for x in tree_flatten(y)[0] if isinstance(x, Tensor)]
    if len(tensors) != 1:
        raise _Differs(f"its own forward gives {len(tensors)} tensors, expected one")
    return tensors[0]


def _as_double(call: _Call) -> _Call:
    def double(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    return _Call(tree_map(double, call.args), tree_map(double, call.kwargs))


def _distance(x: Tensor, y: Tensor) -> float:
    """The largest difference over the largest absolute value of y; infinite where shapes differ or a number is none."""
    if x.shape != y.shape:
        return float("inf")
    difference = (x.double() - y.double()).abs().max().item()
    return float("inf") if difference != difference else difference / max(y.double().abs().max().item(), 1e-30)


class _Counter(TorchDispatchMode):
    """Counts the operations that PyTorch runs in the block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _operations(forward: Callable[..., Any], call: _Call) -> int:
    with _Counter() as counter, torch.no_grad():
        forward(*call.args, **call.kwargs)
    return int(counter.count)


# --- experts --------------------------------------------------------------------------------------------------------


def _experts_apart(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], tolerance: float) -> list[Rewrite]:
    """transformers' mixtures of experts, one expert after the other: its grouped product has no form in ONNX."""
    found = {
        name: module
        for name, module in model.named_modules()
        if all(hasattr(module, attribute) for attribute in ("has_gate", "is_transposed", "num_experts"))
    }
    if not found:
        return []
    call = _Call(tuple(args), dict(kwargs))
    own, before = _floats(model, call), _operations(model.forward, call)
    for module in found.values():
        module.forward = functools.partial(_one_after_the_other, module)
    new, after = _floats(model, call), _operations(model.forward, call)
    worst = max((_distance(x, y) for x, y in zip(new, own, strict=True)), default=0.0)
    kept = worst <= tolerance
    if not kept:
        for module in found.values():
            del module.forward
    reason = f"within {worst:.1e} of the model as it was" if kept else f"differs by {worst:.1e}"
    where = next(iter(found)) + (f" and {len(found) - 1} more" if len(found) > 1 else "")
    return [Rewrite("experts apart", where, len(found), before, after, kept, reason)]


def _one_after_the_other(experts: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """x [token, channel], chosen and weights [token, k] -> [token, channel]: each expert on the tokens that chose it.

    For 512 tokens of 128 channels, 2 of 4 experts, ONNX Runtime takes 2.7 ms for this and 99 ms for "batched_mm", which
    copies an expert's weights for every token. One token takes both 0.5 ms.
    """

    def linear(x: Tensor, name: str, expert: int) -> Tensor:
        weight = getattr(experts, name)[expert]
        bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
        return nn.functional.linear(x, weight.t() if experts.is_transposed else weight, bias)

    total = torch.zeros_like(x)
    for expert in range(experts.num_experts):
        token, rank = torch.where(chosen == expert)
        y = linear(x[token], "gate_up_proj" if experts.has_gate else "up_proj", expert)
        y = linear(experts._apply_gate(y) if experts.has_gate else experts.act_fn(y), "down_proj", expert)
        if getattr(experts, "has_post_expert_norm", False):
            y = experts.post_expert_norm(y)
        total = total.index_add(0, token, (y * weights[token, rank, None]).to(total.dtype))
    return total


def _floats(model: nn.Module, call: _Call) -> list[Tensor]:
    with torch.no_grad():
        y = model(*call.args, **call.kwargs)
    return [x for x in tree_flatten(y)[0] if isinstance(x, Tensor) and x.is_floating_point()]
