"""The same numbers however a sequence is cut: a model with states is run in one piece and in several."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hcmen.base.errors import CheckFailed
from hcmen.mamba.nests import leaves
from hcmen.mamba.report import accepted

__all__ = ["Cut", "check_cuts", "cuts_of", "fed", "in_pieces", "largest_error", "off_by_cutting", "told"]

Cut = tuple[int, ...]
"""Steps of each piece of a sequence, in order."""

Run = Callable[[Sequence[Any]], Sequence[Any]]
FEWEST_CHECKED_STEPS, MOST_CHECKED_STEPS = 21, 32
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


def fed(run: Run, inputs: Sequence[Any], states: Sequence[Any], cut: Cut) -> list[list[Any]]:
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


def in_pieces(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The inputs at a length that can be cut in many ways: an example of fewer than 21 steps comes again and again."""
    time = inputs[0].shape[1]
    if time >= FEWEST_CHECKED_STEPS:
        return [x[:, :MOST_CHECKED_STEPS] for x in inputs]
    times = -(-FEWEST_CHECKED_STEPS // time)
    return [torch.cat([x] * times, 1)[:, :FEWEST_CHECKED_STEPS] for x in inputs]


def off_by_cutting(
    run: Run, inputs: Sequence[Tensor], states: Sequence[Tensor], names: Sequence[str]
) -> tuple[list[Any], list[tuple[str, float, Cut]]]:
    """What `run` gives for whole sequences, and for each output how far it is off at most in pieces, and in which.

    Raises:
        CheckFailed: an output has no finite number.
    """
    (whole,) = fed(run, inputs, states, (inputs[0].shape[1],))
    for name, x in zip(names, whole, strict=True):
        if x.is_floating_point() and not bool(x.isfinite().any()):
            raise CheckFailed(f"'{name}' has no finite number", fix="give the model weights and an example that do")
    worst: list[tuple[str, float, Cut]] = [(name, 0.0, ()) for name in names]
    for cut in cuts_of(inputs[0].shape[1]):
        pieces = fed(run, inputs, states, cut)
        for i, name in enumerate(names):
            error = largest_error(whole[i], [piece[i] for piece in pieces])
            if error > worst[i][1]:
                worst[i] = (name, error, cut)
    return whole, worst


def check_cuts(
    made: nn.Module,
    inputs: Sequence[Tensor],
    states: Sequence[Tensor],
    names: Sequence[str],
    tolerance: float,
) -> None:
    """Runs `made(*inputs, *states)` on whole sequences and on pieces of them.

    Args:
        made: a model with its states, as of states.py; its `model` is what runs.
        inputs: each `[batch, time, ...]`. states: before the first step. names: of the outputs, then of the states.
        tolerance: how far one may be off, as a part of its largest value; or 3 times eager float32's own distance from
            float64, if that is more.

    Raises:
        CheckFailed: one is off by more; the message names the first module that differs.
    """
    inputs = in_pieces(inputs)

    def run(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        result: Sequence[Tensor] = made(*tensors)
        return result

    with torch.no_grad():
        whole, worst = off_by_cutting(run, inputs, states, names)
        if all(error <= tolerance for _, error, _ in worst):
            return
        own = _from_float64(made, [*inputs, *states], whole)
        for (name, error, cut), far in zip(worst, own, strict=True):
            bound = accepted(tolerance, far)
            if not error <= bound:
                first = _first_difference(made, inputs, states, cut, tolerance)
                raise CheckFailed(
                    f"{told(name, error, inputs, cut)}; the first module that differs is {first}",
                    f"at most {bound:.0e}",
                    _HINT,
                )


def told(name: str, error: float, inputs: Sequence[Tensor], cut: Cut) -> str:
    """How far an output is off when the inputs come in pieces."""
    pieces = "one" if set(cut) == {1} else " + ".join(map(str, cut))
    return (
        f"'{name}' is {error:.1e} of its largest value off when {inputs[0].shape[1]} steps come in pieces of {pieces}"
    )


def _from_float64(made: nn.Module, tensors: Sequence[Tensor], got: Sequence[Tensor]) -> list[float]:
    """How far each output is from what the model gives in float64; 0 where the model does not run in it."""
    try:
        wide = copy.deepcopy(made).double()
        exact = wide(*(x.double() if x.is_floating_point() else x for x in tensors))
    except Exception:  # the model's own code may raise anything
        return [0.0] * len(got)
    return [
        0.0 if far == float("inf") else far for far in (largest_error(e, [g]) for e, g in zip(exact, got, strict=True))
    ]


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
