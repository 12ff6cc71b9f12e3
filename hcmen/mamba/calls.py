"""Somebody's model as a function of tensors: what it is called with, what it gives, and the names of both."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hcmen.base.errors import InputError, reason_of
from hcmen.mamba.nests import arguments_by_name, named, outputs_by_name, replaced
from hcmen.mamba.tracing import files_of, quiet, user_line_of

__all__ = ["FlatModel", "arguments", "is_memory", "run_once"]

_OUT_OF_MEMORY = (
    *("out of memory", "can't allocate", "cannot allocate", "bad_alloc", "failed to allocate", "bad allocation"),
)


def is_memory(error: BaseException) -> bool:
    """Whether an error of PyTorch or ONNX Runtime says that there is no memory left."""
    return isinstance(error, MemoryError) or any(part in str(error).lower() for part in _OUT_OF_MEMORY)


def arguments(model: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not isinstance(model, nn.Module):
        raise InputError(f"the model is a {type(model).__name__}", "a torch.nn.Module")
    if isinstance(example, Mapping):
        args, kwargs = (), {str(name): x for name, x in example.items()}
    elif isinstance(example, (Tensor, tuple, list)):
        args, kwargs = (example,) if isinstance(example, Tensor) else tuple(example), {}
    else:
        raise InputError(
            f"example_inputs is a {type(example).__name__}", "a tensor, a tuple of arguments or a dict of them by name"
        )
    # A cache that the model makes for a next call is no output of a graph.
    if "use_cache" in inspect.signature(model.forward).parameters:
        kwargs.setdefault("use_cache", False)
    found = list(named(arguments_by_name(model, args, kwargs)))
    if not found:
        raise InputError("there is no tensor among the example inputs", "one at least")
    for name, x in found:
        if x.is_complex() or x.is_sparse or x.is_quantized:
            raise InputError(f"input '{name}' is {x.dtype}, {x.layout}", "a dense tensor of real numbers")
        if x.dtype == torch.bfloat16:
            raise InputError(f"input '{name}' is {x.dtype}", "float32 or float16, which ONNX Runtime's CPU takes")
    for name, x in (*found, *model.named_parameters(), *model.named_buffers()):
        if x.device.type != "cpu":
            raise InputError(f"'{name}' is on {x.device}", "the CPU", "call model.cpu(), and give inputs of the CPU")
    return args, kwargs


def run_once(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Finds out whether the model runs at all, and gives what a graph can give."""
    try:
        with torch.no_grad(), quiet():
            outputs = model(*args, **kwargs)
    except InputError:
        raise
    except Exception as error:  # the model's own code may raise anything
        if is_memory(error):
            raise InputError(
                "there is not enough memory for a run of the model", fix="give a smaller example"
            ) from error
        line = user_line_of(error, files_of(model))
        raise InputError(
            f"the model does not run on the example inputs: {type(error).__name__}: {reason_of(error, 300)}",
            where=None if line is None else str(line),
        ) from error
    found = list(named(outputs_by_name(_kept(outputs)[0])))
    if not found:
        raise InputError("the model gives no tensor", "a tensor, or a nest of tensors")


def _is_cache(value: Any) -> bool:
    return "Cache" in type(value).__name__ and not isinstance(value, (Tensor, Mapping, list, tuple))


def _kept(outputs: Any) -> tuple[Any, list[str]]:
    """`outputs` without caches, and the names of those."""
    if isinstance(outputs, (Tensor, str)) or not isinstance(outputs, (Mapping, list, tuple)):
        return outputs, []
    if isinstance(outputs, Mapping):
        named_outputs = {str(key): x for key, x in outputs.items()}
    else:
        keys = getattr(outputs, "_fields", [f"output_{i}" for i in range(len(outputs))])
        named_outputs = dict(zip(keys, outputs, strict=True))
    dropped = [key for key, x in named_outputs.items() if _is_cache(x)]
    return ({key: x for key, x in named_outputs.items() if key not in dropped}, dropped) if dropped else (outputs, [])


class FlatModel(nn.Module):
    """The model as a function of tensors that gives a tuple of tensors."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self._args, self._kwargs = args, kwargs
        given = dict(named(arguments_by_name(model, args, kwargs)))
        self.graph_inputs = tuple(given)
        self.example = tuple(x.detach() for x in given.values())
        with torch.no_grad(), quiet():
            outputs, self.dropped = _kept(model(*args, **kwargs))
        taken = set(self.graph_inputs)
        names = [name for name, _ in named(outputs_by_name(outputs))]
        self.graph_outputs = tuple(f"{name}_out" if name in taken else name for name in names)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = replaced((self._args, self._kwargs), iter(tensors))
        outputs, _ = _kept(self.model(*args, **kwargs))
        return tuple(x for _, x in named(outputs_by_name(outputs)))
