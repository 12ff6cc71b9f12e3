"""Which sizes of a model's inputs shall be open, and what they are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hcmen.base.errors import InputError, did_you_mean, shown
from hcmen.mamba.tracing import Size

__all__ = ["AUTO", "Spec", "name_sizes", "wanted"]

AUTO = "auto"
Spec = str | None | Mapping[Any, Any] | Sequence[Any]
"""AUTO, None for no open size, axis -> name for all inputs, or that by input: by its name, or in order."""
_TAKEN = {2: ("batch", "time"), 3: ("batch", "time", "channel"), 4: ("batch", "channel", "height", "width")}
_TAKEN_5 = ("batch", "channel", "depth", "height", "width")


def wanted(
    dynamic: Spec, inputs: Mapping[str, Tensor], closed: frozenset[tuple[str, int]] = frozenset()
) -> list[dict[int, str | None]]:
    """For each input, axis -> the name that its size was given; None where it is tried without being asked for.

    Args:
        dynamic: see `Spec`. inputs: name -> example. closed: (input, axis) of sizes that are left alone.

    Raises:
        InputError: it names no axis of an input, one name stands for two sizes, or an example has a size of 0 or 1
            where an open one is wanted, which PyTorch takes for another case than all other sizes.
    """
    if isinstance(dynamic, str):
        if dynamic != AUTO:
            raise InputError(f"dynamic is {shown(dynamic)}", f"'{AUTO}' or axis -> name, such as {{0: 'batch'}}")
        found: list[dict[int, str | None]] = []
        for name, x in inputs.items():
            if x.dim() and x.shape[0] < 2:
                raise _too_small(name, 0, x, "its first size is tried as an open one")
            found.append({axis: None for axis in range(x.dim()) if x.shape[axis] > 1 and (name, axis) not in closed})
        return found
    by_input = _by_input(dynamic, inputs)
    sizes: dict[str, tuple[str, int]] = {}
    for name, axes in by_input.items():
        x = inputs[name]
        for axis, given in axes.items():
            if type(axis) is not int or not 0 <= axis < x.dim():
                raise InputError(f"dynamic has axis {shown(axis)} of '{name}'", f"0 to {x.dim() - 1}")
            if not isinstance(given, str) or not given.isidentifier():
                raise InputError(f"dynamic calls axis {axis} of '{name}' {shown(given)}", "a name, such as 'time'")
            if x.shape[axis] < 2:
                raise _too_small(name, axis, x, f"'{given}' shall be open")
            other, size = sizes.setdefault(given, (name, x.shape[axis]))
            if size != x.shape[axis]:
                raise InputError(
                    f"'{given}' is {size} in '{other}' and {x.shape[axis]} in '{name}'", "one size in the example"
                )
    return [dict(by_input.get(name, {})) for name in inputs]


def _too_small(name: str, axis: int, x: Tensor, why: str) -> InputError:
    return InputError(
        f"input '{name}' has size {x.shape[axis]} on axis {axis}, and {why}",
        "2 or more in the example",
        "PyTorch takes 0 and 1 for cases of their own",
    )


def _by_input(dynamic: Any, inputs: Mapping[str, Tensor]) -> dict[str, Mapping[int, str]]:
    if dynamic is None:
        return {}
    if isinstance(dynamic, Mapping) and all(isinstance(key, int) for key in dynamic):
        used = {axis for axis in dynamic if any(axis < x.dim() for x in inputs.values())}
        if len(inputs) == 1 or used != set(dynamic):
            return dict.fromkeys(inputs, dynamic) if dynamic else {}
        return {name: {a: given for a, given in dynamic.items() if a < x.dim()} for name, x in inputs.items()}
    if isinstance(dynamic, Mapping):
        for name in dynamic:
            if name not in inputs:
                hint = did_you_mean(str(name), inputs)
                raise InputError(f"dynamic names an input {shown(name)}", f"one of {', '.join(inputs)}", hint or None)
        pairs = list(dynamic.items())
    elif isinstance(dynamic, (list, tuple)) and len(dynamic) == len(inputs):
        pairs = list(zip(inputs, dynamic, strict=True))
    else:
        raise InputError(f"dynamic is {shown(dynamic)}", f"'{AUTO}', or axis -> name for each of {len(inputs)} inputs")
    for name, axes in pairs:
        if axes is not None and not isinstance(axes, Mapping):
            raise InputError(f"dynamic has {shown(axes)} for '{name}'", "axis -> name, such as {0: 'batch'}")
    return {name: axes or {} for name, axes in pairs}


def name_sizes(sizes: Sequence[Size], ranks: Mapping[str, int]) -> dict[Any, str]:
    """Gives every open size its name, and every symbol one: name of the size that is that symbol, or of a part of it.

    ranks: input -> rank.
    """
    names: dict[Any, str] = {}
    opened = [size for size in sizes if size.symbols]
    # Those that were asked for first, so that their names win where the model makes sizes equal.
    for size in sorted(opened, key=lambda size: size.asked is None):
        symbols = size.symbols
        plain = size.expression == symbols[0]
        if plain and symbols[0] in names:
            size.name = names[symbols[0]]
            if size.asked not in (None, size.name):
                size.note = f"the model makes '{size.asked}' and '{size.name}' one size"
            continue
        size.name = size.asked or _guessed(size, sizes, ranks[size.input], set(names.values()))
        if plain:
            names[symbols[0]] = size.name
            continue
        size.note = f"always {size.expression}"
        for symbol in symbols:
            names.setdefault(symbol, f"{size.name}_part")
            size.note = size.note.replace(str(symbol), names[symbol])
    return names


def _guessed(size: Size, sizes: Sequence[Size], rank: int, taken: set[str]) -> str:
    own = [s for s in sizes if s.input == size.input and s.symbols]
    usual = _TAKEN_5 if rank == 5 else _TAKEN.get(rank, ("batch",))
    if rank == 4 and [s.axis for s in own if s.axis] == [1, 2]:
        usual = ("batch", "height", "width", "channel")
    name = usual[size.axis] if size.axis < len(usual) else f"{size.input}_{size.axis}"
    name = name if name not in taken else f"{size.input}_{name}"
    return name if name not in taken else f"{size.input}_{size.axis}"
