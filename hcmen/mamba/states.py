"""Models that run step by step: the states of their convolutions and scans become inputs and outputs.

A causal Mamba model mixes time by `causal_conv1d`, `selective_scan` and `state_space_dual` alone. So `stateful` changes
no line of a model. While its forward runs, every call of these functions in hcmen.mamba.scan takes the next state that
was given, and hands its last state out, in order of execution. One graph with any number of steps, one included, then
serves a whole prompt and each token after it.

Whether a model mixes time in another way too (attention, positions, a mean over time) is found by running it: a
sequence in one piece and in several must give the same.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from hcmen.base.errors import InputError
from hcmen.base.state_records import KINDS, STATES_KEY, StateRecord, states_to_json
from hcmen.mamba.cuts import check_cuts
from hcmen.mamba.nests import arguments_by_name, named, outputs_by_name, replaced
from hcmen.mamba.scan import call_group, collecting

__all__ = ["StatefulModel", "stateful"]


class StatefulModel(nn.Module):
    """A model whose states are inputs and outputs: `forward(*inputs, *states) -> (*outputs, *states)`, flat.

    Inputs are `[batch, time, ...]` each, with one batch and one time; so are outputs that have a time. States are
    float32 and zero before the first step.

    Attributes:
        model: what runs. states: their records, in the order of the arguments. input_names, output_names: of the
        model's own tensors. example: the tensors that it was made with, and zero states.
    """

    def __init__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, last_step: bool = False):
        super().__init__()
        self.model = model
        self.training = model.training
        self._args, self._kwargs = tuple(args), dict(kwargs)
        given = list(named(arguments_by_name(model, self._args, self._kwargs)))
        self.input_names = tuple(name for name, _ in given)
        self._inputs = tuple(x for _, x in given)
        _check_inputs(given)
        found = _Calls(self._inputs[0].shape[:2])
        with torch.no_grad(), _running_names(model) as found.stack, collecting(found):
            outputs = model(*self._args, **self._kwargs)
        self.states = tuple(found.records)
        if not self.states:
            raise InputError(
                f"{type(model).__name__} makes no convolution or scan by hcmen.mamba.scan",
                fix="build and export it within hcmen.mamba.shim(), or call those functions",
            )
        made = list(named(outputs_by_name(outputs)))
        self.output_names = tuple(name for name, _ in made)
        self._cut = [last_step and x.dim() > 1 and x.shape[1] == found.sizes[1] for _, x in made]
        ((name, count),) = Counter(self.graph_inputs + self.graph_outputs).most_common(1)
        if count > 1:
            raise InputError(f"'{name}' is the name of two inputs, outputs or states", fix="rename the model's own")

    @property
    def example(self) -> tuple[Tensor, ...]:
        """The inputs that it was made with, and its states before the first step."""
        return (*self._inputs, *self.first_states(self._inputs[0].shape[0]))

    def first_states(self, batch: int) -> tuple[Tensor, ...]:
        """Zeros, float32 `[batch, ...]`."""
        device = self._inputs[0].device
        return tuple(torch.zeros(batch, *s.shape, device=device) for s in self.states)

    @property
    def graph_inputs(self) -> tuple[str, ...]:
        """The names of the graph's inputs: the model's, then the states'."""
        return (*self.input_names, *(s.name for s in self.states))

    @property
    def graph_outputs(self) -> tuple[str, ...]:
        """The names of the graph's outputs: the model's, then the states'."""
        return (*self.output_names, *(s.output for s in self.states))

    def dynamic_axes(self) -> tuple[dict[int, str], ...]:
        """For each input of the graph, axis -> "batch" or "time"."""
        return (*({0: "batch", 1: "time"} for _ in self.input_names), *({0: "batch"} for _ in self.states))

    def mark(self, model: onnx.ModelProto) -> None:
        """Writes into `model`, its graph in ONNX, which inputs and outputs are states; a runtime reads that."""
        for entry in [entry for entry in model.metadata_props if entry.key == STATES_KEY]:
            model.metadata_props.remove(entry)
        model.metadata_props.add(key=STATES_KEY, value=states_to_json(self.states))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The model's outputs and its states after the last step.

        Args:
            tensors: the inputs, each `[batch, time, ...]`, then the states.

        Raises:
            InputError: another number of tensors, or this run makes other calls than the first one did.
        """
        count = len(self._inputs)
        if len(tensors) != count + len(self.states):
            raise InputError(f"{len(tensors)} tensors", f"{count} inputs and {len(self.states)} states")
        args, kwargs = replaced((self._args, self._kwargs), iter(tensors))
        calls = _Calls(tensors[0].shape[:2], self.states, tensors[count:])
        with collecting(calls):
            outputs = self.model(*args, **kwargs)
        if calls.done != len(self.states):
            raise InputError(
                f"{calls.done} convolutions and scans ran, expected {len(self.states)}",
                fix="the model runs other layers for other inputs, and cannot have states",
            )
        made = (x for _, x in named(outputs_by_name(outputs)))
        return (*(x[:, -1:] if cut else x for x, cut in zip(made, self._cut, strict=True)), *calls.last)


def stateful(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    last_step: bool = False,
    check: bool = True,
    tolerance: float = 1e-5,
) -> StatefulModel:
    """`model` with its states as inputs and outputs, found by one run on the example.

    Args:
        model: a causal model in evaluation mode that calls hcmen.mamba.scan, by itself or under `shim()`.
        args, kwargs: of its forward. Every tensor in them is `[batch, time, ...]`, of 2 steps or more.
        last_step: outputs are of the last step alone, `[batch, 1, ...]`, which is all that a language model is asked
            for after a prompt. One of transformers or mamba_ssm then computes no others.
        check: run the example, at 21 to 32 steps, in one piece and in several, and compare.
        tolerance: how far an output may then be off, as of `check_cuts`.

    Raises:
        InputError: no call of ours, one that is not causal or has a state of its own, or tensors that have no time.
        CheckFailed: a sequence gives other numbers in several pieces; the message names the first module that differs.
    """
    if model.training:
        raise InputError(f"{type(model).__name__} is in training mode", fix="call its eval() first")
    # A cache of the model's own would be a second set of states.
    asked: dict[str, Any] = {"use_cache": False, **({"logits_to_keep": 1, "num_last_tokens": 1} if last_step else {})}
    takes = list(inspect.signature(model.forward).parameters)
    kwargs = {**{name: value for name, value in asked.items() if name in takes[len(args) :]}, **(kwargs or {})}
    made = StatefulModel(model, args, kwargs, last_step=last_step)
    if check:
        inputs = made.example[: len(made.input_names)]
        check_cuts(made, inputs, made.first_states(len(inputs[0])), made.graph_outputs, tolerance)
    return made


# --- what a run does ------------------------------------------------------------------------------------------------


class _Calls:
    """The calls of one run of a model: finds their states, or hands given ones to them.

    Attributes:
        stack: names of the modules that run, the innermost last. records: what was found. last: states after the run.
        done: how many calls there were.
    """

    def __init__(
        self, sizes: Sequence[int], records: Sequence[StateRecord] = (), given: Sequence[Tensor] | None = None
    ) -> None:
        self.sizes = tuple(sizes)
        self.stack: list[str] = []
        self.records = list(records)
        self.given = given
        self.last: list[Tensor] = []
        self.done = 0
        self._group: object | None = None

    def __call__(self, kind: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = inspect.signature(function).bind(*args, **kwargs).arguments
        if kind == "conv" and arguments["weight"].shape[1] == 1:
            return function(**arguments)  # it sees no other step
        self._check(function, arguments, next(iter(arguments.values())))
        both = arguments.pop("return_last_state", False)
        before, self._group = self._group, call_group()
        if self._group is not None and self._group is before:
            self.done -= 1
        arguments["initial_state"] = None if self.given is None else self._next(kind, function)
        y, last = function(**arguments, return_last_state=True)
        if self.done == len(self.records):
            self.records.append(self._record(kind, last))
        if self.done == len(self.last):
            self.last.append(last)
        elif arguments.get("z") is not None:  # of one call in several ways that with a gate is read
            self.last[self.done] = last
        self.done += 1
        return (y, last) if both else y

    def _check(self, function: Callable[..., Any], arguments: Mapping[str, Any], series: Tensor) -> None:
        where = f"{function.__name__} of {self._where()}"
        if arguments.get("reverse"):
            raise InputError(f"{where} runs from the last step to the first", fix="a causal model alone has states")
        if arguments.get("initial_state") is not None:
            raise InputError(
                f"{where} is given a state by the model itself", fix="leave the model's own cache out (use_cache=False)"
            )
        # While a model is traced sizes are symbols, and to compare them would fix them.
        if all(type(n) is int for n in (*self.sizes, *series.shape[:2])) and tuple(series.shape[:2]) != self.sizes:
            raise InputError(
                f"{where} has batch and time {list(series.shape[:2])}",
                f"{list(self.sizes)} as the model's inputs",
                "a model whose scans run over something else than its time has no states",
            )

    def _next(self, kind: str, function: Callable[..., Any]) -> Tensor:
        assert self.given is not None
        if self.done >= len(self.records) or self.records[self.done].kind != kind:
            raise InputError(
                f"call {self.done} of this run is {function.__name__}, which it was not in the first one",
                fix="the model runs other layers for other inputs, and cannot have states",
            )
        return self.given[self.done]

    def _record(self, kind: str, last: Tensor) -> StateRecord:
        place = self.stack[-1] if self.stack else ""
        name = f"{place}.{kind}" if place else kind
        taken = {record.name for record in self.records}
        count = 1
        while name in taken:
            count += 1
            name = f"{place}.{kind}_{count}" if place else f"{kind}_{count}"
        assert last.dim() == KINDS[kind] + 1
        return StateRecord(name, kind, tuple(last.shape[1:]))

    def _where(self) -> str:
        if self.stack and self.stack[-1]:
            return f"module {self.stack[-1]}"
        return f"state {self.records[self.done].name}" if self.done < len(self.records) else "the model"


@contextmanager
def _running_names(model: nn.Module) -> Iterator[list[str]]:
    """Within the block the list holds the names of the modules of `model` that run, the innermost last."""
    stack: list[str] = []
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _m, _a, name=name: stack.append(name)))
        handles.append(module.register_forward_hook(lambda *_: (stack.pop(), None)[1], always_call=True))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def _check_inputs(given: Sequence[tuple[str, Tensor]]) -> None:
    if not given:
        raise InputError("no tensor among the model's inputs", "at least one [batch, time, ...]")
    first = given[0][1].shape[:2]
    for name, x in given:
        if x.dim() < 2 or x.shape[:2] != first:
            raise InputError(
                f"input '{name}' has shape {list(x.shape)}",
                f"[batch, time, ...] with the batch and time of '{given[0][0]}', {list(given[0][1].shape)}",
            )
    if first[0] < 1 or first[1] < 2:
        raise InputError(
            f"input '{given[0][0]}' has shape {list(given[0][1].shape)}",
            "a batch of 1 or more and 2 steps or more",
            "give a longer example",
        )
