"""The same numbers however a sequence is cut: a model with states is run in one piece and in several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hcmen.base.errors import CheckFailed
from hcmen.mamba.nests import leaves

__all__ = ["Cut", "check_cuts", "cuts_of", "fed", "largest_error"]

Cut = tuple[int, ...]
"""Steps of each piece of a sequence, in order."""

MOST_CHECKED_STEPS = 32
_HINT = (
    "a state carries convolutions and scans alone. Attention, positions and means over time need more: for a hybrid "
    "with attention use transformers' OnnxExporter, else export without states"
)


def cuts_of(time: int) -> list[Cut]:
    """How a sequence of `time` steps is cut for a check: single steps, halves, and a mixture of both."""
    cuts: list[Cut] = [(1,) * time]
    if time >= 3:
        cuts.append((time // 2, time - time // 2))
    if time >= 5:
        cuts.append((time // 3, 1, 1, time - time // 3 - 2))
    return cuts


def fed(
    run: Callable[[Sequence[Any]], Sequence[Any]], inputs: Sequence[Any], states: Sequence[Any], cut: Cut
) -> list[list[Any]]:
    """What `run(inputs, then states)` gives for each piece, outputs and states, each beginning with the last's states.

    Args:
        run: what runs. inputs: tensors or arrays `[batch, time, ...]`. states: before the first step. cut: the pieces.
    """
    found: list[list[Any]] = []
    at = 0
    for steps in cut:
        given = [*(x[:, at : at + steps] for x in inputs), *states]
        found.append(list(run(given)))
        states = found[-1][len(found[-1]) - len(states) :]
        at += steps
    return found


def largest_error(whole: Tensor, pieces: Sequence[Tensor]) -> float:
    """The largest difference between a tensor and its pieces, as a part of its largest value; infinite if NaN differs.

    Pieces that have no time of their own are states: the last one is compared.
    """
    got = _joined(whole, pieces)
    if got is None or got.shape != whole.shape:
        return float("inf")
    if not whole.is_floating_point():
        return 0.0 if torch.equal(got, whole) else float("inf")
    off = (got.double() - whole.double()).abs().max().item() if whole.numel() else 0.0
    if off != off:
        return 0.0 if torch.equal(got.isnan(), whole.isnan()) and not got.isnan().all() else float("inf")
    largest = whole.double().abs().max().item() if whole.numel() else 0.0
    return float(off / largest) if largest else float(off)


def _joined(whole: Tensor, pieces: Sequence[Tensor]) -> Tensor | None:
    """The pieces along the axis on which they are shorter than the whole; the last one where none is."""
    if any(p.dim() != whole.dim() for p in pieces):
        return None
    if all(p.shape == whole.shape for p in pieces):
        return pieces[-1]
    axes = [i for i in range(whole.dim()) if sum(p.shape[i] for p in pieces) == whole.shape[i]]
    axes = [
        i for i in axes if all(p.shape[:i] + p.shape[i + 1 :] == whole.shape[:i] + whole.shape[i + 1 :] for p in pieces)
    ]
    return torch.cat(list(pieces), axes[0]) if axes else None


def check_cuts(
    made: nn.Module,
    inputs: Sequence[Tensor],
    states: Sequence[Tensor],
    names: Sequence[str],
    tolerance: float,
) -> None:
    """Runs `made(*inputs, *states)` on whole sequences, at most their first 32 steps, and on pieces of them.

    Args:
        made: a model with its states, as of states.py; its `model` is what runs.
        inputs: each `[batch, time, ...]`. states: before the first step. names: of the outputs, then of the states.
        tolerance: how far one may be off, as a part of its largest value.

    Raises:
        CheckFailed: one is off by more; the message names the first module that differs.
    """
    inputs = [x[:, :MOST_CHECKED_STEPS] for x in inputs]
    time = inputs[0].shape[1]

    def run(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        result: Sequence[Tensor] = made(*tensors)
        return result

    with torch.no_grad():
        (whole,) = fed(run, inputs, states, (time,))
        for name, x in zip(names, whole, strict=True):
            if x.is_floating_point() and not bool(x.isfinite().any()):
                raise CheckFailed(f"'{name}' has no finite number", fix="give the model weights and an example that do")
        for cut in cuts_of(time):
            pieces = fed(run, inputs, states, cut)
            for i, name in enumerate(names):
                error = largest_error(whole[i], [piece[i] for piece in pieces])
                if not error <= tolerance:
                    first = _first_difference(made, inputs, states, cut, tolerance)
                    raise CheckFailed(
                        f"'{name}' is {error:.1e} of its largest value off when {time} steps come in pieces of "
                        f"{_shown(cut)}; the first module that differs is {first}",
                        f"at most {tolerance:.0e}",
                        _HINT,
                    )


def _shown(cut: Cut) -> str:
    return "one" if set(cut) == {1} else " + ".join(map(str, cut))


def _first_difference(
    made: nn.Module, inputs: Sequence[Tensor], states: Sequence[Tensor], cut: Cut, tolerance: float
) -> str:
    """The name and type of the module whose output is the first, in order of execution, to differ."""

    model = made.model
    assert isinstance(model, nn.Module)

    def recorded(steps: Cut) -> list[dict[tuple[str, int], Tensor]]:
        runs: list[dict[tuple[str, int], Tensor]] = []

        def run(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
            with _outputs_of(model) as outputs:
                result: Sequence[Tensor] = made(*tensors)
            runs.append(outputs)
            return result

        fed(run, inputs, states, steps)
        return runs

    (whole,) = recorded((inputs[0].shape[1],))
    pieces = recorded(cut)
    for key, x in whole.items():
        parts = [piece[key] for piece in pieces if key in piece]
        if len(parts) == len(pieces) and largest_error(x, parts) > tolerance:
            module = model.get_submodule(key[0])
            return f"{key[0] or 'the model itself'} ({type(module).__name__})"
    return "none that gives a tensor"


@contextmanager
def _outputs_of(model: nn.Module) -> Iterator[dict[tuple[str, int], Tensor]]:
    """Within the block, (name, how often it ran before) -> the first tensor that a module of `model` gave."""
    found: dict[tuple[str, int], Tensor] = {}
    times: Counter[str] = Counter()

    def note(name: str, result: Any) -> None:
        for _, x in leaves(result):
            found[name, times[name]] = x
            break
        times[name] += 1

    handles = [
        module.register_forward_hook(lambda _m, _a, result, name=name: note(name, result))
        for name, module in model.named_modules()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
