"""What `hcmen.mamba.export` did: the sites it found, what it changed, which sizes are open, how far off the file is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hcmen.base.state_records import NEXT
from hcmen.mamba.tracing import Size

__all__ = ["OutputError", "Report", "Trial", "accepted"]


def accepted(tolerance: float, own: float | None) -> float:
    """How far an output may be off: `tolerance`, or three times eager float32's own distance from float64.

    A distance that is infinite excuses nothing: float32 overflows there, or picks another whole number.
    """
    return max(tolerance, 3 * own) if own is not None and math.isfinite(own) else tolerance


@dataclass(frozen=True)
class OutputError:
    """How far an output is from eager PyTorch, as a part of its largest value, in the worst of all runs.

    library, functions: ONNX Runtime with the kernels of the library, and without; None for a file that needs it.
    float64: eager float32 from the model in float64; None where that cannot run or is infinite. bound: the most that
    was accepted.
    """

    name: str
    library: float
    functions: float | None
    float64: float | None
    bound: float


@dataclass(frozen=True)
class Trial:
    """One run of the check. sizes: open size -> what it was. outcome: "same", or why there is nothing to compare."""

    sizes: Mapping[str, int]
    outcome: str = "same"


@dataclass
class Report:
    """What became of a model.

    Attributes:
        path, bytes: the file, and how large it is with the one beside it that may hold its weights.
        sites: operator -> module -> nodes. nodes_traced, nodes: of the graph as PyTorch made it, and of the file.
        rewrites: what was rewritten, or left as it was, and why.
        sizes: every size of an input that may be open. dropped: outputs that are no tensors and are not in the graph.
        outputs: errors by output, none where `verified` is False. trials: the runs of the check.
        float64: why the model does not run in float64; None where it does.
        times: milliseconds of one call on the example, by who ran it; None where nobody asked.
        states: inputs that are states; the output of each has the same name and more.
        cuts: "library" and "functions" -> how far outputs and states are off when a sequence comes in pieces, as a
            part of the largest value; 0 for the same bits.
    """

    path: str
    bytes: int = 0
    inputs: list[str] = field(default_factory=list)
    sites: dict[str, dict[str, int]] = field(default_factory=dict)
    nodes_traced: int = 0
    nodes: int = 0
    rewrites: list[dict[str, Any]] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    outputs: list[OutputError] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    verified: bool = False
    float64: str | None = None
    times: dict[str, float] | None = None
    states: list[str] = field(default_factory=list)
    cuts: dict[str, float] = field(default_factory=dict)

    @property
    def next_states(self) -> set[str]:
        """The outputs that are states after the last step."""
        return {f"{name}{NEXT}" for name in self.states}

    def as_dict(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        found = asdict(self)
        for size, row in zip(self.sizes, found["sizes"], strict=True):
            row["expression"] = str(size.expression)
            row["fixed_by"] = None if size.fixed_by is None else str(size.fixed_by)
            row["open"] = size.name is not None
        return found

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.nodes} nodes ({self.nodes_traced} as traced), {self.bytes / 1e6:.1f} MB"]
        for op, modules in self.sites.items():
            names = list(modules)
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"  {op}: {sum(modules.values())} in {shown or 'the model'}")
        for row in self.rewrites:
            state = "rewritten" if row["kept"] else "left as it was"
            gain = f", {row['nodes_before']} to {row['nodes_after']} {'nodes' if row['graph'] else 'operations'}"
            where = (row["where"] or "the model") + (gain if row["kept"] else "")
            lines.append(f"  {row['name']}: {state}, {where}: {row['reason']}")
        lines += [f"  {line}" for line in self._size_lines()]
        if self.states:
            lines.append(f"  states: {len(self.states)}, from {self.states[0]} on")
        if self.dropped:
            lines.append(f"  not in the graph: {', '.join(self.dropped)}, which are no tensors")
        if self.verified:
            lines += self._check_lines()
        else:
            lines.append("  not verified")
        if self.times:
            lines.append("  " + ", ".join(f"{name} {ms:.3g} ms" for name, ms in self.times.items()))
        return "\n".join(lines)

    def _size_lines(self) -> list[str]:
        lines = []
        for name in self.inputs:
            if name in self.states:
                continue
            own = [size for size in self.sizes if size.input == name]
            for size in own:
                what = f"{name} axis {size.axis}"
                if size.name is not None:
                    lines.append(f"{what}: open, '{size.name}'" + (f", {size.note}" if size.note else ""))
                else:
                    why = f", by {size.fixed_by}" if size.fixed_by else ""
                    lines.append(f"{what}: always {size.example}{why}" + (f", {size.note}" if size.note else ""))
        return lines

    def _check_lines(self) -> list[str]:
        lines = []
        rows = [output for output in self.outputs if output.name not in self.next_states]
        states = [output for output in self.outputs if output.name in self.next_states]
        for output in (*rows, *([_worst("next states", states)] if states else [])):
            exact = "" if output.float64 is None else f", eager from float64 {output.float64:.1e}"
            without = "" if output.functions is None else f", {output.functions:.1e} without"
            lines.append(
                f"{output.name}: off by {output.library:.1e} with the library{without}, "
                f"{output.bound:.1e} accepted{exact}"
            )
        if self.float64:
            lines.append(f"float64: {self.float64}")
        for kind, off in self.cuts.items():
            how = "with the library" if kind == "library" else "without the library"
            lines.append(f"in pieces, {how}: {f'off by {off:.1e}' if off else 'the same bits as a whole'}")
        for trial in self.trials:
            sizes = ", ".join(f"{name} {n}" for name, n in trial.sizes.items()) or "the example"
            lines.append(f"checked at {sizes}: {trial.outcome}")
        return [f"  {line}" for line in lines]


def _worst(name: str, outputs: list[OutputError]) -> OutputError:
    """The largest errors of several outputs."""
    functions = [output.functions for output in outputs if output.functions is not None]
    exact = [output.float64 for output in outputs if output.float64 is not None]
    return OutputError(
        name,
        max(output.library for output in outputs),
        max(functions) if functions else None,
        max(exact) if exact else None,
        max(output.bound for output in outputs),
    )
