"""A model traced by torch.export with sizes that stay open, and the line of the model that fixes each other one.

Every size that may be open is offered to torch.export as a symbol. While the model's Python runs, each symbol that is
turned into a number is seen at the moment of it (`_Watch`), with the stack of that moment.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import linecache
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import hcmen
from hcmen.base.errors import BackendError, HcmenError, InputError, reason_of

__all__ = ["Line", "Size", "Traced", "files_of", "quiet", "trace", "user_line_of", "where_it_was_fixed"]

_NOT_THE_MODEL = tuple(
    os.path.join(os.path.dirname(str(module.__file__)), "") for module in (torch, hcmen, contextlib, logging)
)
"""Folders whose files are not the user's: of PyTorch, of hcmen, of Python's own library."""


@dataclass(frozen=True)
class Line:
    """A line of somebody's source."""

    file: str
    number: int
    text: str = ""

    def __str__(self) -> str:
        """`file:number (text)`, as editors find it."""
        return f"{self.file}:{self.number}" + (f" ({self.text})" if self.text else "")


@dataclass
class Size:
    """One size of one input.

    Attributes:
        input, axis, example: which it is, and what it is in the example.
        asked: the name that it was given by the caller; None where nobody asked for it.
        name: of the open size; None where it is fixed.
        expression: what it is in terms of `Traced.free`; a number where it is fixed. fixed_by: the line that did it.
        note: what else there is to know.
    """

    input: str
    axis: int
    example: int
    asked: str | None = None
    name: str | None = None
    expression: Any = None
    fixed_by: Line | None = None
    note: str = ""

    @property
    def symbols(self) -> list[Any]:
        """What its expression has of `Traced.free`, none where it is fixed."""
        return sorted(getattr(self.expression, "free_symbols", ()), key=str)


@dataclass
class Traced:
    """program: of torch.export. sizes: every size that was tried, in the order of the inputs.

    free: symbol -> the values that torch.export admits, (least, most), most None for no limit.
    numbers: (symbols, line) where a line took the value of what stayed open, in the order of the run.
    """

    program: Any
    sizes: list[Size] = field(default_factory=list)
    free: dict[Any, tuple[int, int | None]] = field(default_factory=dict)
    numbers: list[tuple[frozenset[Any], Line]] = field(default_factory=list)


class _Watch:
    """Within the block, remembers where sizes become numbers.

    lines: symbol -> the line that made it a number, or something of other symbols. numbers: (symbols of an expression,
    the line that took its value): `int()` and `float()` of what is open, which PyTorch lets pass.
    """

    def __init__(self, files: frozenset[str]) -> None:
        self.lines: dict[str, Line] = {}
        self.numbers: list[tuple[frozenset[Any], Line]] = []
        self._files = files
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Watch:
        def became(env: ShapeEnv, symbol: Any, *_: Any, **__: Any) -> None:
            line = user_line(self._files)
            if line is not None:
                self.lines.setdefault(str(symbol), line)

        def taken(node: SymNode, *_: Any) -> None:
            symbols = frozenset(node.expr.free_symbols)
            line = user_line(self._files) if symbols else None
            if line is not None:
                self.numbers.append((symbols, line))

        self._before(ShapeEnv, "_set_replacement", became)
        self._before(SymNode, "guard_int", taken)
        self._before(SymNode, "guard_float", taken)
        return self

    def _before(self, holder: Any, name: str, look: Callable[..., None]) -> None:
        own = getattr(holder, name)

        @functools.wraps(own)
        def looking(*args: Any, **kwargs: Any) -> Any:
            look(*args, **kwargs)
            return own(*args, **kwargs)

        setattr(holder, name, looking)
        self._stack.callback(setattr, holder, name, own)

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def line_of(self, symbol: Any) -> Line | None:
        """The line that fixed it: the first that took its value, since what came of that fixed it later."""
        taken = (line for symbols, line in self.numbers if symbol in symbols)
        return next(taken, self.lines.get(str(symbol)))


def user_line(files: frozenset[str]) -> Line | None:
    """The line that runs: the innermost of the model's own files, or else of anybody's but PyTorch's and ours."""
    frame = sys._getframe(1)
    second = None
    while frame is not None:
        file = frame.f_code.co_filename
        if file in files:
            return _line(file, frame.f_lineno)
        if second is None and _is_users(file):
            second = _line(file, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return second


def _is_users(file: str) -> bool:
    in_library = any(file.startswith(folder) for folder in _NOT_THE_MODEL) and "site-packages" not in file
    packages = ("/site-packages/torch/", "/site-packages/sympy/", "/site-packages/onnx")
    return os.path.exists(file) and not in_library and not any(part in file for part in packages)


def _line(file: str, number: int) -> Line:
    shown = os.path.relpath(file) if Path(file).is_relative_to(Path.cwd()) else file
    return Line(shown, number, linecache.getline(file, number).strip()[:80])


def files_of(model: nn.Module) -> frozenset[str]:
    """The source files of the classes of `model` and of what is in it, but for PyTorch's and ours."""
    found = set()
    for kind in {type(module) for module in model.modules()}:
        with contextlib.suppress(TypeError, OSError):
            found.add(inspect.getsourcefile(kind) or "")
    return frozenset(file for file in found if _is_users(file))


def trace(
    model: nn.Module, tensors: Sequence[Tensor], names: Sequence[str], wanted: Sequence[Mapping[int, str | None]]
) -> Traced:
    """Traces `model(*tensors)`.

    Args:
        model: takes tensors and returns a tuple of tensors. names: of the tensors.
        wanted: for each tensor, axis -> the name of a size that shall be open, None for one that may be.

    Raises:
        BackendError: PyTorch cannot trace it; the message names the line of the model.
    """
    files = files_of(model)
    at_start: list[list[Any]] = []
    specs = tuple(dict.fromkeys(axes, torch.export.Dim.AUTO) or None for axes in wanted)
    recorder = _Recorder(model, at_start)
    with _Watch(files) as watch, quiet(), torch.no_grad():
        try:
            program = torch.export.export(recorder, tuple(tensors), dynamic_shapes=(specs,), strict=False)
        except HcmenError:
            raise
        except Exception as error:  # PyTorch raises dozens of classes, and the model's own code may raise any
            raise _untraceable(error, files) from error
    inputs = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    traced = Traced(program, numbers=watch.numbers)
    for name, tensor, axes, node, first in zip(names, tensors, wanted, inputs, at_start[-1], strict=True):
        for axis, asked in axes.items():
            now = node.meta["val"].shape[axis]
            size = Size(
                name, axis, tensor.shape[axis], asked, expression=getattr(getattr(now, "node", None), "expr", now)
            )
            size.fixed_by = watch.line_of(first[axis])
            traced.sizes.append(size)
            for symbol in size.symbols:
                traced.free[symbol] = _admitted(program.range_constraints.get(symbol))
    return traced


def _expression(size: Any) -> Any:
    """What a size is in terms of symbols, or the number that it is."""
    return getattr(getattr(size, "node", None), "expr", size)


def _admitted(constraint: Any) -> tuple[int, int | None]:
    if constraint is None:
        return 0, None
    endless = not getattr(constraint.upper, "is_Integer", isinstance(constraint.upper, int))
    return int(constraint.lower), None if endless else int(constraint.upper)


class _Recorder(nn.Module):
    """The model; it notes the sizes of its inputs before anything looks at them."""

    def __init__(self, model: nn.Module, found: list[list[Any]]) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self._found = found

    def forward(self, *tensors: Tensor) -> Any:
        self._found.append([[_expression(n) for n in x.shape] for x in tensors])
        return self.model(*tensors)


def user_line_of(error: BaseException, files: frozenset[str]) -> Line | None:
    """The innermost line of the model's own files where `error` was raised."""
    line = None
    trail = error.__traceback__
    while trail is not None:
        file = trail.tb_frame.f_code.co_filename
        if file in files:
            line = _line(file, trail.tb_lineno)
        trail = trail.tb_next
    return line


def _untraceable(error: Exception, files: frozenset[str]) -> BackendError | InputError:
    """What became of the trace, with the line of the model where it ended."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HcmenError):
            return cause  # type: ignore[return-value]
        cause = cause.__cause__ or cause.__context__
    line = user_line_of(error, files)
    return BackendError(
        f"PyTorch {torch.__version__} cannot trace the model: {type(error).__name__}: {reason_of(error, 300)}",
        where=None if line is None else str(line),
    )


def where_it_was_fixed(model: nn.Module, one: Traced, size: Size, other: Callable[[], Traced]) -> Line | None:
    """The line of `model` that fixed a size which the trace has as an open one.

    It took the value of it; or it is behind the first operation whose numbers differ between traces of two examples,
    since what is open has no number in a trace.

    Args:
        one, size: the trace, and the size in it. other: makes the trace of an example with another size there.
    """
    for symbols, line in one.numbers:
        if symbols.intersection(size.symbols):
            return line
    files = files_of(model)
    graphs = [[node for node in traced.program.graph.nodes if node.op == "call_function"] for traced in (one, other())]
    for first, second in zip(*graphs, strict=False):
        if first.target != second.target or _numbers((first.args, first.kwargs)) != _numbers(
            (second.args, second.kwargs)
        ):
            return _line_of_trace(first.meta.get("stack_trace") or "", files)
    return None


def _numbers(value: Any) -> Any:
    """The numbers among the arguments of an operation."""
    if isinstance(value, Mapping):
        return {key: _numbers(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_numbers(x) for x in value]
    return value if isinstance(value, (int, float)) else None


def _line_of_trace(text: str, files: frozenset[str]) -> Line | None:
    found = [(file, int(number)) for file, number in re.findall(r'File "([^"]+)", line (\d+)', text)]
    own = [place for place in found if place[0] in files] or [place for place in found if _is_users(place[0])]
    return _line(*own[-1]) if own else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what PyTorch prints, logs and warns of about its own exporting out of our output."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
