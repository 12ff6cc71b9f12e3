"""`hcmen.mamba.export`: anybody's Mamba model as one ONNX file, checked against the model, in one call.

The model is traced by torch.export with every size open that can be (tracing.py, dynamic.py), lowered (lowering.py),
given model-local functions (functions.py), and run beside eager PyTorch and float64 (verification.py).
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from hcmen.base.errors import BackendError, CheckFailed, InputError, reason_of
from hcmen.base.files import refused, write_file
from hcmen.base.op import OPERATORS, OPSET
from hcmen.mamba.calls import FlatModel, arguments, run_once
from hcmen.mamba.dynamic import AUTO, Spec, name_sizes, wanted
from hcmen.mamba.functions import add_functions, nodes_of
from hcmen.mamba.graph import fold, tidy
from hcmen.mamba.graph_rewrites import rewrite_graph
from hcmen.mamba.lowering import STANDARD, custom_op
from hcmen.mamba.report import Report
from hcmen.mamba.rewrite import Rewrite, rewrite_modules
from hcmen.mamba.stand_ins.hook import hidden
from hcmen.mamba.states import StatefulModel, stateful
from hcmen.mamba.tracing import Size, Traced, quiet, trace, where_it_was_fixed
from hcmen.mamba.verification import Verdict, sized, variables, verify, verify_cuts

__all__ = ["Report", "check_target", "export"]

MOST_INSIDE = 2 << 30
"""Bytes of weights in the file itself. protobuf reads no file of more; beyond that they lie beside it."""
_TIMED_CALLS = 20


def export(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    dynamic: Spec = AUTO,
    states: bool = False,
    last_step: bool = False,
    functions: bool = True,
    verify: bool = True,
    tolerance: float = 1e-5,
    overwrite: bool = False,
    times: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> Report:
    """Writes `model` to `path`, a file that runs in ONNX Runtime with hcmen's library and without it.

    Args:
        model: on the CPU. It calls hcmen.mamba.scan, or runs on it by `hcmen.mamba.shim()`. It is exported in
            evaluation mode and left as it was.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments. Sizes that shall be open are 2
            or more in it.
        path: of the file, .onnx; weights of more than 2 GiB lie beside it, as `path` with .data behind it.
        dynamic: "auto" tries every size of every input; `{0: "batch", 1: "time"}` asks for these sizes of all inputs,
            and the same by input in a tuple, or in a dict by the name of the input. A name stands for one size.
        states: the states of convolutions and scans are inputs and outputs, for causal models that run step by step.
        last_step: with states, outputs are of the last step alone: all that a language model is asked for.
        functions: carry the functions that the file needs to run without the library.
        verify: run the file beside eager PyTorch and float64, at other sizes than the example's too.
        tolerance: of the largest value of an output, or 3 times eager float32's own distance from float64 if that is
            more.
        overwrite: replace what is at `path`.
        times: measure one call on the example.
        note: is told what is being done.

    Returns:
        What was done and found; `str` of it is for a terminal.

    Raises:
        InputError: arguments do not fit, or the model makes no call of ours.
        CheckFailed: the file is not what the model is, or a size that was asked for is fixed; nothing was written.
        BackendError: PyTorch cannot export the model, or the library or ONNX Runtime is missing.
        OSError: the place cannot be written.
    """
    if last_step and not states:
        raise InputError("last_step was asked for without states", fix="ask for states, too")
    if states and dynamic != AUTO:
        raise InputError("dynamic was given with states", "batch and time, which are open then", "leave it out")
    target = check_target(path, overwrite)
    args, kwargs = arguments(model, example_inputs)
    report = Report(str(target))
    with _as_exported(model), _scratch(target) as folder:
        note("running the model on the example")
        run_once(model, args, kwargs)

        def flat(made: nn.Module, *, check: bool = True) -> FlatModel | StatefulModel:
            if states:
                return stateful(made, args, kwargs, last_step=last_step, check=check, tolerance=tolerance)
            return FlatModel(made, args, kwargs)

        own = flat(model)
        faster, done = rewrite_modules(model, args, kwargs)
        report.rewrites = [asdict(row) for row in done]
        # That it can be cut into pieces was checked of the model as it came.
        call = flat(faster, check=False) if any(row.kept for row in done) else own
        job = _Job(own, call, folder / target.name, report, functions, note)
        verdict = job.make(dynamic, tolerance if verify else None)
        if verify and isinstance(call, StatefulModel):
            note("checking the file in pieces")
            bounds = {output.name: output.bound for output in verdict.outputs}
            report.cuts = verify_cuts(call, folder / target.name, functions=functions, bounds=bounds)
        if times:
            report.times = _times(own, job.tensors, job.inputs, folder / target.name, functions)
        report.verified = verify
        report.outputs, report.trials, report.float64 = verdict.outputs, verdict.trials, verdict.float64
        _move(folder, target)
    report.bytes = sum(file.stat().st_size for file in (target, _beside(target)) if file.exists())
    return report


# --- what came ------------------------------------------------------------------------------------------------------


def check_target(path: str | os.PathLike[str], overwrite: bool) -> Path:
    """`path`, where a file can be put. Raises InputError where it cannot, or where something is and shall stay."""
    target = Path(path)
    if target.suffix != ".onnx":
        raise InputError(f"the file is called '{target.name}'", "a name that ends in .onnx")
    if not overwrite:
        for place in (target, _beside(target)):
            if place.exists() or place.is_symlink():
                raise InputError(
                    "something is there already", fix="name another place, or ask to overwrite", where=str(place)
                )
    elif target.is_dir():
        raise InputError("a folder is there", "a place for a file", where=str(target))
    if not target.parent.is_dir():
        raise InputError("no such folder", fix="make it first", where=str(target.parent))
    return target


def _beside(target: Path) -> Path:
    """Where weights lie that are too large for the file."""
    return target.with_name(f"{target.name}.data")


@contextlib.contextmanager
def _as_exported(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and no stand-in of hcmen's in the way of PyTorch."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with hidden():
            yield
    finally:
        for module, was in training.items():
            module.training = was


# --- the file -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """An empty folder beside the target, gone at the end."""
    folder = target.with_name(f".{target.name}.tmp-{os.urandom(4).hex()}")
    with refused(target.parent, fix="name another place"):
        folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(folder: Path, target: Path) -> None:
    beside = folder / _beside(target).name
    with refused(target, fix="name another place"):
        if beside.exists():
            os.replace(beside, _beside(target))
        write_file(target, (folder / target.name).read_bytes())


class _Job:
    """One model on its way into one file.

    own: what the file is held to. call: the same, with what is rewritten of it; this is traced.
    """

    def __init__(
        self, own: Any, call: Any, file: Path, report: Report, functions: bool, note: Callable[[str], None]
    ) -> None:
        self.own, self.call, self.file, self.report = own, call, file, report
        self.functions, self.note = functions, note
        self.tensors: tuple[Tensor, ...] = call.example
        self.inputs: tuple[str, ...] = call.graph_inputs
        self.outputs: tuple[str, ...] = call.graph_outputs
        self.names: dict[Any, str] = {}
        report.inputs = list(self.inputs)
        report.dropped = list(getattr(call, "dropped", ()))

    def make(self, dynamic: Spec, tolerance: float | None) -> Verdict:
        """Writes the file; sizes that turn out to be fixed are declared so, or refused where they were asked for."""
        if isinstance(self.call, StatefulModel) and dynamic == AUTO:
            dynamic = self.call.dynamic_axes()
        closed: dict[tuple[str, int], Size] = {}
        while True:
            axes = wanted(dynamic, dict(zip(self.inputs, self.tensors, strict=True)), frozenset(closed))
            traced = self._traced(axes)
            sizes = sorted([*traced.sizes, *closed.values()], key=lambda s: (self.inputs.index(s.input), s.axis))
            self.report.sizes = sizes
            _refuse_fixed(sizes)
            self._write(traced)
            if tolerance is None:
                return Verdict()
            verdict = self._checked(traced, tolerance)
            if verdict.failed:
                raise CheckFailed(f"the file is not what the model is, and nothing was written: {verdict.failed}")
            self._judge(traced, verdict)
            if not verdict.fixed:
                return verdict
            for size in traced.sizes:
                if size.name in verdict.fixed:
                    at_another = functools.partial(self._at_another, traced, size, axes)
                    size.fixed_by = where_it_was_fixed(self.call, traced, size, at_another)
                    size.note = f"at another one {verdict.fixed[size.name]}"
                    size.name, size.expression = None, size.example
                    closed[size.input, size.axis] = size
            self.report.sizes = sizes
            _refuse_fixed(sizes)
            self.note(f"closing {', '.join(verdict.fixed)}, which the model fixes")

    def _traced(self, axes: Sequence[Mapping[int, str | None]]) -> Traced:
        self.note("tracing the model")
        traced = trace(self.call, self.tensors, self.inputs, axes)
        ranks = {name: x.dim() for name, x in zip(self.inputs, self.tensors, strict=True)}
        self.names = name_sizes(traced.sizes, ranks)
        sites = _sites(traced.program)
        if not sites:
            raise InputError(
                "the model makes no convolution or scan of hcmen's, so there is nothing to speed up",
                fix="import and build it within hcmen.mamba.shim(), or call the functions of hcmen.mamba.scan",
            )
        self.report.sites = sites
        return traced

    def _at_another(self, traced: Traced, size: Size, axes: Sequence[Mapping[int, str | None]]) -> Traced:
        """The trace of an example of which one size is another one."""
        found = {v.name: v for v in variables(traced.sizes, self.names, traced.free)}
        values = {name: v.example for name, v in found.items()}
        for symbol in size.symbols:
            variable = found[self.names[symbol]]
            values[variable.name] = variable.others[0] if variable.others else variable.example
        others = sized(self.tensors, self.inputs, traced.sizes, self.names, values)
        return trace(self.call, others, self.inputs, axes)

    def _write(self, traced: Traced) -> None:
        self.note("making the graph")
        proto = self._exported(traced)
        self.report.nodes_traced = len(list(nodes_of(proto)))
        _rename(proto, traced.sizes, self.names)
        if _is_large(proto):
            done = [Rewrite("rewrites of the graph", "", 0, 0, 0, False, "weights of over 2 GiB lie outside the file")]
        else:
            feeds = {name: x.numpy() for name, x in zip(self.inputs, self.tensors, strict=True)}
            proto, done = rewrite_graph(proto, feeds)
        kept = [row for row in self.report.rewrites if not row["graph"]]
        self.report.rewrites = kept + [asdict(replace(row, graph=True)) for row in done]
        proto = tidy(proto, self.file.stem)
        if self.functions:
            add_functions(proto)
        if isinstance(self.call, StatefulModel):
            self.call.mark(proto)
            self.report.states = [state.name for state in self.call.states]
        self.report.nodes = len(proto.graph.node)
        write_file(self.file, proto.SerializeToString(deterministic=True))
        try:
            onnx.checker.check_model(str(self.file), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise BackendError(f"the exported graph is not valid ONNX: {reason_of(error, 300)}") from error

    def _exported(self, traced: Traced) -> onnx.ModelProto:
        try:
            with quiet(), torch.no_grad():
                program = torch.onnx.export(
                    traced.program,
                    (),
                    input_names=list(self.inputs),
                    output_names=list(self.outputs),
                    opset_version=OPSET,
                    custom_translation_table=STANDARD,
                    dynamo=True,
                    optimize=True,
                    verbose=False,
                )
                assert program is not None
                fold(program.model)
                weights = sum(x.const_value.nbytes for x in program.model.graph.initializers.values() if x.const_value)
                if weights <= MOST_INSIDE:
                    return program.model_proto
                program.save(str(self.file), external_data=True)
        except Exception as error:  # PyTorch raises dozens of classes
            raise BackendError(
                f"PyTorch {torch.__version__} has no ONNX for a part of the model: {_innermost(error)}"
            ) from error
        return onnx.load(str(self.file), load_external_data=False)

    def _checked(self, traced: Traced, tolerance: float) -> Verdict:
        self.note("checking the file")
        return verify(
            self.own,
            self.tensors,
            self.file,
            inputs=self.inputs,
            outputs=self.outputs,
            open_sizes=variables(traced.sizes, self.names, traced.free),
            at=lambda values: sized(self.tensors, self.inputs, traced.sizes, self.names, values),
            functions=self.functions,
            tolerance=tolerance,
        )

    def _judge(self, traced: Traced, verdict: Verdict) -> None:
        """Notes at the sizes what the check found of them."""
        for size in traced.sizes:
            parts = [self.names[s] for s in size.symbols]
            for part in parts:
                if part in verdict.unmoved:
                    size.note = f"not checked at another size: {verdict.unmoved[part]}"
                if part in verdict.from_two:
                    size.note = ", ".join(filter(None, (size.note, "2 or more")))


def _refuse_fixed(sizes: Sequence[Size]) -> None:
    """Raises CheckFailed for sizes that were asked for and are fixed."""
    wrong = [size for size in sizes if size.asked is not None and size.name is None]
    if not wrong:
        return
    told = []
    for size in wrong:
        by = f" by {size.fixed_by}" if size.fixed_by else ""
        told.append(f"'{size.asked}' (axis {size.axis} of '{size.input}') is fixed to {size.example}{by}")
    raise CheckFailed(
        f"nothing was written: {'; '.join(told)}",
        fix="take sizes from x.shape without int(), len() or numel(), or do not ask for them as open ones",
    )


def _sites(program: Any) -> dict[str, dict[str, int]]:
    """Operator -> module -> calls whose results are used: a stand-in may call an operator once more for the gate."""
    ops = {custom_op(op): op.name for op in OPERATORS.values()}
    found: dict[str, dict[str, int]] = {}
    # A region under torch.autocast is a graph of its own in the program.
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    used: set[torch.fx.Node] = set()
    for node in (node for graph in graphs for node in reversed(graph.nodes)):
        if node.op == "output" or not used.isdisjoint(node.users):
            used.add(node)
    for node in (node for graph in graphs for node in graph.nodes):
        if node in used and node.target in ops:
            stack = list((node.meta.get("nn_module_stack") or {"": ("", "")}).values())
            path = re.sub(r"^(L\['self'\]\.?)?(model\.?){0,2}", "", str(stack[-1][0]))
            modules = found.setdefault(ops[node.target], {})
            modules[path] = modules.get(path, 0) + 1
    return found


def _rename(proto: onnx.ModelProto, sizes: Sequence[Size], names: Mapping[Any, str]) -> None:
    """Sizes of the graph get the names that the report has."""
    whole = {str(size.expression): size.name for size in sizes if size.name is not None}
    parts = {str(symbol): name for symbol, name in names.items()}
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                found = whole.get(dim.dim_param)
                found = found or re.sub(r"\w+", lambda m: parts.get(m.group(), m.group()), dim.dim_param)
                if found.isdecimal():  # a symbol that became a number
                    dim.dim_value = int(found)
                else:
                    dim.dim_param = found


def _is_large(proto: onnx.ModelProto) -> bool:
    return any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in proto.graph.initializer)


def _innermost(error: BaseException) -> str:
    """What the first of a chain of errors says."""
    seen = [error]
    while (cause := seen[-1].__cause__ or seen[-1].__context__) is not None and cause not in seen:
        seen.append(cause)
    return reason_of(seen[-1], 300)


def _times(
    call: nn.Module, tensors: Sequence[Tensor], inputs: Sequence[str], file: Path, functions: bool
) -> dict[str, float]:
    """Milliseconds of one call on the example, the median of calls in turns."""
    from hcmen.mamba.verification import runner

    runs: dict[str, Callable[[], Any]] = {"eager": lambda: call(*tensors)}
    runs |= {kind: runner(file, kind, inputs, tensors) for kind in ("library", *(("functions",) if functions else ()))}
    took: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for i in range(_TIMED_CALLS + 2):
            for name, run in runs.items():
                begin = time.perf_counter()
                run()
                if i >= 2:
                    took[name].append(time.perf_counter() - begin)
    return {name: 1e3 * statistics.median(seconds) for name, seconds in took.items()}
