"""Whether a file does what its model does: at the example's sizes and at others, with the library and without it.

The bound is that of docs/parity.md for anybody's model: within max(tolerance, 3 x eager float32's own distance from
float64) of the largest value of each output. What eager PyTorch refuses at some size, a file need not do.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hcmen.base.errors import BackendError, CheckFailed, reason_of
from hcmen.base.library import library_path
from hcmen.mamba.calls import is_memory
from hcmen.mamba.cuts import in_pieces, off_by_cutting, told
from hcmen.mamba.report import OutputError, Trial, accepted
from hcmen.mamba.states import StatefulModel
from hcmen.mamba.tracing import Size, quiet

__all__ = ["Variable", "Verdict", "distance", "runner", "sized", "variables", "verify", "verify_cuts"]


@dataclass(frozen=True)
class Variable:
    """An open size of a graph: its name, the example's, and what torch.export admits (most: None for no limit)."""

    name: str
    example: int
    least: int
    most: int | None

    @property
    def others(self) -> list[int]:
        """Other sizes to run at, the most telling first."""
        n = self.example
        found = [n + 1, n + n // 2 + 1, n // 2, 2 * n, n // 2 * 3, 4 * n]
        return [m for m in dict.fromkeys(found) if m != n and max(2, self.least) <= m <= (self.most or m)]


@dataclass
class Verdict:
    """What a check found.

    fixed: open size -> what ONNX Runtime said, or how far off it was, when that size alone was another one.
    failed: why the file is not what the model is; None if it is.
    """

    outputs: list[OutputError] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    float64: str | None = None
    fixed: dict[str, str] = field(default_factory=dict)
    failed: str | None = None
    unmoved: dict[str, str] = field(default_factory=dict)
    """Open size -> why eager PyTorch ran at no other."""
    from_two: list[str] = field(default_factory=list)
    """Open sizes that eager PyTorch takes as 1 and the file does not."""


def variables(
    sizes: Sequence[Size], names: Mapping[Any, str], free: Mapping[Any, tuple[int, int | None]]
) -> list[Variable]:
    """The open sizes, in the order of the inputs; names: of the symbols."""
    found: dict[str, Variable] = {}
    for size in sizes:
        for symbol in size.symbols:
            if symbol not in names or names[symbol] in found:
                continue
            example = size.example if size.expression == symbol else _solved(size, symbol)
            found[names[symbol]] = Variable(names[symbol], example, *free[symbol])
    return list(found.values())


def _solved(size: Size, symbol: Any) -> int:
    """What `symbol` is where the expression of `size` gives the example's: a search, for there is one symbol alone."""
    for n in range(size.example + 1):
        if size.expression.subs(symbol, n) == size.example:
            return n
    raise CheckFailed(
        f"input '{size.input}' has on axis {size.axis} a size of {size.expression}, which is not understood"
    )


def sized(
    tensors: Sequence[Tensor],
    inputs: Sequence[str],
    sizes: Sequence[Size],
    names: Mapping[Any, str],
    values: Mapping[str, int],
) -> list[Tensor]:
    """The example at other sizes: values are drawn from its own, or are normal where it is one number throughout.

    values: open size -> what it shall be.
    """
    generator = torch.Generator().manual_seed(sum(values.values()))
    made = []
    for name, x in zip(inputs, tensors, strict=True):
        shape = list(x.shape)
        for size in sizes:
            if size.input == name and size.symbols:
                shape[size.axis] = int(size.expression.subs({s: values[names[s]] for s in size.symbols}))
        if x.is_floating_point() and x.numel() and bool((x == x.flatten()[0]).all()):
            made.append(torch.randn(shape, generator=generator).to(x.dtype))
            continue
        for axis, n in enumerate(shape):
            if n != x.shape[axis]:
                x = x.index_select(axis, torch.randint(x.shape[axis], (n,), generator=generator))
        made.append(x.contiguous())
    return made


def distance(got: Tensor, want: Tensor) -> float:
    """The largest difference over the largest value of `want`; infinite where shapes, NaNs or whole numbers differ."""
    if got.shape != want.shape:
        return float("inf")
    if not want.is_floating_point():
        return 0.0 if torch.equal(got, want.to(got.dtype)) else float("inf")
    got, want = got.double(), want.double()
    same = (got == want) | (got.isnan() & want.isnan())
    if bool(same.all()):
        return 0.0
    off = (got - want).abs()[~same].max().item()
    largest = want[want.isfinite()].abs().max().item() if bool(want.isfinite().any()) else 0.0
    return float("inf") if off != off else off / largest if largest else float("inf")


class _Hosts:
    """What runs: eager PyTorch in two precisions, and the file in ONNX Runtime with the library and without."""

    def __init__(self, model: nn.Module, file: Path, inputs: Sequence[str], functions: bool) -> None:
        self.model, self.inputs = model, inputs
        self.float64: str | None = None
        self._double: nn.Module | None = None
        try:
            self._double = copy.deepcopy(model).double()
        except Exception as error:  # a module may hold anything, and copying runs its code
            self.float64 = f"the model cannot be copied: {reason_of(error)}"
        kinds = ("library", "functions") if functions else ("library",)
        self.sessions = {kind: _session(file, library=kind == "library") for kind in kinds}

    def eager(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad(), quiet():
            return [x.detach() for x in self.model(*(x.clone() for x in tensors))]

    def exact(self, tensors: Sequence[Tensor]) -> list[Tensor] | None:
        """In float64, or None where that cannot run."""
        if self._double is None:
            return None
        wide = [x.double() if x.is_floating_point() else x.clone() for x in tensors]
        try:
            with torch.no_grad(), quiet():
                return [x.detach() for x in self._double(*wide)]
        except Exception as error:  # kernels of others take float32 alone, and complain in words of their own
            if is_memory(error):
                raise
            self._double, self.float64 = None, f"the model does not run in it: {reason_of(error)}"
            return None

    def file(self, kind: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        feeds = {name: x.numpy() for name, x in zip(self.inputs, tensors, strict=True)}
        return [torch.from_numpy(x) for x in self.sessions[kind].run(None, feeds)]


def _session(file: Path, *, library: bool) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise BackendError(
            "onnxruntime is not installed, and what is exported is checked with it: pip install 'hcmen[cpu]', or do "
            "without the check (verify=False, --no-verify)"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if library:
        options.register_custom_ops_library(str(library_path()))
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # it has classes of its own, one for each status
        how = "with" if library else "without"
        raise CheckFailed(
            f"ONNX Runtime {onnxruntime.__version__} does not load the graph {how} the library: {reason_of(error, 300)}"
        ) from error


def runner(file: Path, kind: str, inputs: Sequence[str], tensors: Sequence[Tensor]) -> Callable[[], Any]:
    """One call of the file in ONNX Runtime; kind: "library" or "functions"."""
    session = _session(file, library=kind == "library")
    feeds = {name: x.numpy() for name, x in zip(inputs, tensors, strict=True)}
    return lambda: session.run(None, feeds)


def verify_cuts(made: StatefulModel, file: Path, *, functions: bool, bounds: Mapping[str, float]) -> dict[str, float]:
    """Runs a file with states on whole sequences and on pieces of them.

    Args:
        made: its model. functions: whether the file runs without the library. bounds: by output, of its largest value.

    Returns:
        "library" and "functions" -> how far an output or state is off at most; 0 for the same bits throughout.

    Raises:
        CheckFailed: more than its bound.
    """
    inputs = in_pieces(made.example[: len(made.input_names)])
    states = made.first_states(inputs[0].shape[0])
    found = {}
    for kind in ("library", *(("functions",) if functions else ())):
        session = _session(file, library=kind == "library")

        how = "with the library" if kind == "library" else "without the library"

        def run(tensors: Sequence[Tensor], session: Any = session, how: str = how) -> list[Tensor]:
            feeds = {name: x.contiguous().numpy() for name, x in zip(made.graph_inputs, tensors, strict=True)}
            try:
                return [torch.from_numpy(x) for x in session.run(None, feeds)]
            except Exception as error:  # ONNX Runtime has classes of its own
                if is_memory(error):
                    raise
                time = tensors[0].shape[1]
                raise CheckFailed(f"ONNX Runtime fails {how} at {time} steps: {_status(error)}") from error

        _, worst = off_by_cutting(run, inputs, states, made.graph_outputs)
        for name, off, cut in worst:
            if not off <= bounds[name]:
                raise CheckFailed(f"{told(name, off, inputs, cut)} {how}", f"at most {bounds[name]:.1e}")
        found[kind] = max(off for _, off, _ in worst)
    return found


def _status(error: Exception) -> str:
    """What ONNX Runtime says, without its codes and the places of its own source."""
    text = reason_of(error, 2000)
    node = re.search(r"Name: ?'([^']*)'", text)
    text = re.sub(r"^.*Status Message: ", "", text)
    text = re.sub(r"/onnxruntime_src/\S+ ([\w:~]+\([^)]*\) )?", "", text)
    return (f"node '{node.group(1)}', " if node else "") + text[:200]


def verify(
    model: nn.Module,
    tensors: Sequence[Tensor],
    file: Path,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    open_sizes: Sequence[Variable],
    at: Callable[[Mapping[str, int]], list[Tensor]],
    functions: bool,
    tolerance: float,
) -> Verdict:
    """Runs the file beside its model.

    Args:
        model: tensors -> tuple of tensors. tensors: the example. inputs, outputs: their names in the graph.
        at: the example at other sizes: open size -> what it is. functions: whether the file runs without the library.
        tolerance: of the largest value of an output, at least.

    Raises:
        CheckFailed: ONNX Runtime does not load the file, or there is not enough memory for the runs.
        BackendError: there is no ONNX Runtime, or no library.
    """
    check = _Check(_Hosts(model, file, inputs, functions), outputs, open_sizes, at, tolerance)
    try:
        check.run(tensors)
    except CheckFailed:
        raise
    except Exception as error:
        if not is_memory(error):
            raise
        raise CheckFailed(
            "there is not enough memory to check the file", fix="give a smaller example, or leave the check out"
        ) from error
    return check.verdict


class _Check:
    def __init__(
        self,
        hosts: _Hosts,
        outputs: Sequence[str],
        open_sizes: Sequence[Variable],
        at: Callable[[Mapping[str, int]], list[Tensor]],
        tolerance: float,
    ) -> None:
        self.hosts, self.names, self.at, self.tolerance = hosts, outputs, at, tolerance
        self.variables = {variable.name: variable for variable in open_sizes}
        self.example = {name: variable.example for name, variable in self.variables.items()}
        self.verdict = Verdict()
        self._worst: dict[str, OutputError] = {}

    def run(self, tensors: Sequence[Tensor]) -> None:
        """Everything; `verdict` has what was found."""
        first = self.hosts.eager(tensors)
        again = [distance(a, b) for a, b in zip(self.hosts.eager(tensors), first, strict=True)]
        if max(again, default=0.0) > self.tolerance:
            self.verdict.failed = (
                f"two runs of the model on one input differ by {max(again):.1e}: it draws random numbers, and no file "
                "can do as it does"
            )
            return
        self.verdict.failed = self._compare(self.example, tensors)
        if self.verdict.failed is None:
            self._other_sizes()
        if self.verdict.failed is None:
            self._single_sizes()
        self.verdict.outputs = [self._worst[name] for name in self.names if name in self._worst]
        self.verdict.float64 = self.hosts.float64

    def _other_sizes(self) -> None:
        """Two other values of each size, all sizes at once, so that no remainder hides what is fixed."""
        chosen: dict[str, list[int]] = {}
        for name, variable in self.variables.items():
            why = "PyTorch admits none"
            for n in variable.others:
                told = self._refused({**self.example, name: n})
                if told is None:
                    chosen[name] = [*chosen.get(name, []), n]
                    if len(chosen[name]) == 2:
                        break
                else:
                    why = told
            if name not in chosen:
                self.verdict.unmoved[name] = why
        for turn in range(2) if chosen else ():
            moved = {name: sizes[min(turn, len(sizes) - 1)] for name, sizes in chosen.items()}
            together = {**self.example, **moved}
            if self._refused(together) is None and self._tried(together) is None:
                continue
            for name, n in moved.items():
                problem = self._tried({**self.example, name: n})
                if problem is not None:
                    self.verdict.fixed.setdefault(name, problem)
            if not self.verdict.fixed and self._refused(together) is None:
                self.verdict.failed = self._tried(together)
            if self.verdict.fixed or self.verdict.failed:
                return

    def _single_sizes(self) -> None:
        """Sizes of 1, which torch.export takes for another case than all others."""
        for name, variable in self.variables.items():
            values = {**self.example, name: 1}
            if variable.example == 1 or variable.least > 2 or name in self.verdict.fixed or self._refused(values):
                continue
            problem = self._tried(values)
            if problem is None:
                continue
            if "off by" in problem:
                self.verdict.failed = problem
            else:
                self.verdict.from_two.append(name)

    def _refused(self, values: Mapping[str, int]) -> str | None:
        """Why eager PyTorch does not run at such sizes; None if it does."""
        try:
            self.hosts.eager(self.at(values))
        except Exception as error:  # the model's own complaint
            if is_memory(error):
                raise
            return f"the model itself does not run at others: {reason_of(error, 120)}"
        return None

    def _tried(self, values: Mapping[str, int]) -> str | None:
        problem = self._compare(values, self.at(values))
        if problem is not None:
            self.verdict.trials[-1] = Trial(dict(values), problem)
        return problem

    def _compare(self, values: Mapping[str, int], tensors: Sequence[Tensor]) -> str | None:
        """What is wrong at such sizes; None if nothing is."""
        want, exact = self.hosts.eager(tensors), self.hosts.exact(tensors)
        own = [None if exact is None else distance(w, e) for w, e in zip(want, exact or want, strict=True)]
        problem, off = None, {}
        for kind in self.hosts.sessions:
            how = "with the library" if kind == "library" else "without the library"
            try:
                got = self.hosts.file(kind, tensors)
            except Exception as error:
                if is_memory(error):
                    raise
                problem = problem or f"ONNX Runtime fails {how}: {_status(error)}"
                continue
            off[kind] = [distance(g, w) for g, w in zip(got, want, strict=True)]
        for i, name in enumerate(self.names):
            bound = accepted(self.tolerance, own[i])
            found = {kind: errors[i] for kind, errors in off.items()}
            for kind, far in found.items():
                if not far <= bound and problem is None:
                    how = "with the library" if kind == "library" else "without the library"
                    problem = f"output '{name}' is off by {far:.1e} of its largest value {how}, {bound:.1e} is accepted"
            if problem is None and found:
                self._note(OutputError(name, found["library"], found.get("functions"), own[i], bound))
        self.verdict.trials.append(Trial(dict(values)))
        return problem

    def _note(self, new: OutputError) -> None:
        old = self._worst.get(new.name, new)
        exact = None if new.float64 is None or old.float64 is None else max(new.float64, old.float64)
        exact = None if exact is None or math.isinf(exact) else exact
        self._worst[new.name] = OutputError(
            new.name,
            max(new.library, old.library),
            None if new.functions is None else max(new.functions, old.functions or 0.0),
            exact,
            max(new.bound, old.bound),
        )
