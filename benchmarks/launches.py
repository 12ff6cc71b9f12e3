"""Kernel launches of an engine, counted in the layer list that TensorRT-RTX writes into the log of a detailed build.

One line is one step of the engine, in the order in which they run. A loop is a conditional jump back; whoever reads the
list has to know how often each is run through, and `launches` works that out from the loop's own counter and limit.
Nothing is timed: a launch may take a microsecond or a millisecond.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

__all__ = ["Layer", "activation_bytes", "launches", "layers_of"]

KERNELS = frozenset(("kgen", "gemm", "correlation", "runtime_fusion"))
"""Types of layers that launch a kernel each."""
OTHERS = frozenset(
    "add cast cjmp copy div memset mul reshape shape_call signal sub wait".split()  # noqa: SIM905
)
"""Types that launch none: numbers on the host, copies, events, other views of a tensor."""
OUTSIDE = frozenset(("ShapeHostToDevice",))
"""Types of layers that stand outside of Myelin, of which none is known to launch a kernel."""
_LINE = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: (?P<inputs>.*?), (?P<rest>(?:Constants|Outputs): .*)$"
)
_TENSOR = re.compile(r"\{ Name: (.*?)(?: \[profile \d+\])?, (?:Dimensions|Location): ")
_PROFILE = re.compile(r"_myl(\d+)_\d+$")
_CONSTANT = re.compile(r"__d\^(-?\d+)i(?:32|64)_myl")


class Layer(NamedTuple):
    """One line. profile: a number of Myelin's, in the order of the profiles. target: where a jump back leads."""

    name: str
    type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    profile: int
    target: str | None = None


def layers_of(log: str) -> list[list[Layer]]:
    """The layers of each profile, from the log of a build at detailed verbosity.

    Raises:
        ValueError: the log has no such list, or a layer is of a type whose launches are not known.
    """
    found: dict[int, list[Layer]] = {}
    for line in log.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        profile = _PROFILE.search(match["name"])
        if match["type"] not in (KERNELS | OTHERS if profile else OUTSIDE):
            raise ValueError(f"layer {match['name']} is of type {match['type']}: say whether that launches a kernel")
        if not profile:
            continue
        outputs = match["rest"].partition("Outputs: ")[2]
        target = re.search(r"JumpTargetThen: (.*?), JumpTargetElse", outputs)
        layer = Layer(
            match["name"],
            match["type"],
            tuple(_TENSOR.findall(match["inputs"])),
            tuple(_TENSOR.findall(outputs)),
            int(profile[1]),
            target and target[1],
        )
        found.setdefault(layer.profile, []).append(layer)
    if not found:
        raise ValueError("the log lists no layers: build with ProfilingVerbosity.DETAILED and a verbose logger")
    return [found[profile] for profile in sorted(found)]


def activation_bytes(log: str) -> list[int]:
    """What the builder reports for each profile."""
    return [int(n) for n in re.findall(r"Total Activation Memory: (\d+) bytes", log)]


def launches(layers: Sequence[Layer], turns: Sequence[int]) -> int:
    """Kernels that one run launches.

    Args:
        layers: of one profile.
        turns: of a loop over the time of each input that has one, in the order of the graph; for inputs of one length,
            once.

    Raises:
        ValueError: a loop is not of the kinds known, or there are loops over other lengths than `turns` gives.
    """
    loops = list(_loops(layers))
    limits = dict.fromkeys(loop.limit for loop in loops if _constant(loop.limit) is None)
    # A length is computed once, and named by the place in the graph of the first that needs it.
    limits = sorted(limits, key=lambda name: int(re.findall(r"\d+", name)[0]))
    if len(turns) == 1:
        turns = list(turns) * len(limits)
    if len(limits) != len(turns):
        raise ValueError(f"there are loops over {len(limits)} lengths, expected {len(turns)}: {limits}")
    lengths = dict(zip(limits, turns, strict=True))
    times = [1] * len(layers)
    for loop in loops:
        constant = _constant(loop.limit)
        n = loop.times(lengths[loop.limit] if constant is None else constant)
        times[loop.first : loop.last + 1] = [n * t for t in times[loop.first : loop.last + 1]]
    return sum(t for t, layer in zip(times, layers, strict=True) if layer.type in KERNELS)


class _Loop(NamedTuple):
    """From the layer `first` to the jump `last`, a counter going up to `limit` by `by`.

    A loop that is unrolled stands there twice: by n as far as that goes, whole, and by 1 for what is left of n.
    """

    first: int
    last: int
    limit: str
    by: int
    left_of: int | None = None

    def times(self, length: int) -> int:
        if self.left_of is not None:
            return length % self.left_of
        return length // self.by


def _loops(layers: Sequence[Layer]) -> Iterator[_Loop]:
    """The loops in `layers`; raises ValueError for one that is of no kind known."""
    places = {layer.name: index for index, layer in enumerate(layers)}
    made = {kind: {n: x for x in layers if x.type == kind for n in x.outputs} for kind in ("mul", "div")}

    def rounded(name: str) -> tuple[str, int] | None:
        """If `name` is made as number / n * n: that number, and n."""
        product = made["mul"].get(name)
        quotients = [made["div"][n] for n in product.inputs if n in made["div"]] if product else []
        if not quotients:
            return None
        number, by = quotients[0].inputs
        return number, _known(by)

    for last, jump in enumerate(layers):
        first = places.get(jump.target or "", last + 1)
        if first > last:
            continue
        counter, limit = jump.inputs
        adds = [x for x in layers[first : last + 1] if x.type == "add" and counter in x.outputs]
        starts = [x for x in layers[:first] if counter in x.outputs]
        if len(adds) != 1 or len(starts) != 1:
            raise ValueError(f"loop {jump.name} has {len(adds)} additions to its counter and {len(starts)} beginnings")
        (by,) = (_known(n) for n in adds[0].inputs if n != counter)
        whole = rounded(limit)
        if starts[0].type == "copy":  # it goes on where the other one ended
            part = rounded(starts[0].inputs[0])
            if part is None or part[0] != limit or by != 1:
                raise ValueError(
                    f"loop {jump.name} begins at {starts[0].inputs[0]}, which is not what another one left"
                )
            yield _Loop(first, last, limit, by, part[1])
        elif whole is not None and whole[1] == by:
            yield _Loop(first, last, whole[0], by)
        elif whole is None and (by == 1 or (_constant(limit) or 1) % by == 0):
            yield _Loop(first, last, limit, by)
        else:
            raise ValueError(f"loop {jump.name} goes to {limit} by {by}, which it may not meet")


def _constant(name: str) -> int | None:
    match = _CONSTANT.match(name)
    return int(match[1]) if match else None


def _known(name: str) -> int:
    value = _constant(name)
    if value is None:
        raise ValueError(f"{name} was expected to be a constant")
    return value
