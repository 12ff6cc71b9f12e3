"""A stand-in for Triton, in which modules define their kernels as ever and no kernel runs.

Every name exists. What a launch was meant for is replaced above the kernel (hook.py); a launch that comes through is an
error that says which kernel of which file it was.
"""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType
from typing import Any, NoReturn

from hcmen.base.errors import BackendError

__all__ = ["Config", "Kernel", "NoDriver", "module"]

VERSION = "3.5.0"
_FIX = "call one of the functions that hcmen.mamba.shim replaces, or run on a machine with Triton and a GPU"


class Kernel:
    """What `triton.jit` makes of a function: it can be decorated, indexed by a grid, and not run."""

    def __init__(self, function: Any) -> None:
        self.fn = function
        self.__name__ = getattr(function, "__name__", "kernel")
        self.__doc__ = getattr(function, "__doc__", None)
        self.__module__ = getattr(function, "__module__", __name__)
        self.configs: list[Config] = []
        self.cache: dict[Any, Any] = {}

    def __getitem__(self, grid: Any) -> Any:
        return self.run

    def run(self, *arguments: Any, **named: Any) -> NoReturn:
        """Refuses.

        Raises:
            BackendError: always.
        """
        file = getattr(sys.modules.get(self.__module__), "__file__", None) or self.__module__
        raise BackendError(
            f"the Triton kernel {self.__name__} of {file} was launched, and is not served",
            fix=_FIX,
        )

    __call__ = warmup = run

    @property
    def best_config(self) -> Config:
        return self.configs[0] if self.configs else Config({})


class Config:
    """triton.Config: numbers alone."""

    def __init__(self, kwargs: Any = None, num_warps: int = 4, num_stages: int = 3, **others: Any) -> None:
        self.kwargs = dict(kwargs or {})
        self.num_warps, self.num_stages = num_warps, num_stages
        self.__dict__.update(others)

    def all_kwargs(self) -> dict[str, Any]:
        return {**self.kwargs, "num_warps": self.num_warps, "num_stages": self.num_stages}


class _Named(type):
    """Classes whose every attribute is there: a class too, so that annotations and isinstance take it."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _named(f"{cls.__qualname__}.{name}")
        setattr(cls, name, made)
        return made


def _named(qualified: str) -> _Named:
    """A name of Triton's: as a decorator it leaves a function as it is, and its values carry what they were made of."""

    def new(cls: Any, *arguments: Any, **named: Any) -> Any:
        alone = len(arguments) == 1 and not named
        if alone and callable(arguments[0]) and not isinstance(arguments[0], type):
            return arguments[0]
        made = object.__new__(cls)
        made.value = arguments[0] if arguments else None
        return made

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        return arguments[0] if arguments and callable(arguments[0]) else self

    def attribute(self: Any, name: str) -> Any:
        return getattr(type(self), name)

    spelled = {"__new__": new, "__init__": lambda *a, **k: None, "__call__": call, "__getattr__": attribute}
    return _Named(qualified.rpartition(".")[2], (), {**spelled, "__qualname__": qualified, "__module__": __name__})


class NoDriver:
    """The active driver of a real Triton 3.2 without a GPU, which decorating a kernel asks for already."""

    def get_benchmarker(self) -> Any:
        """What would time a kernel, once one is launched."""
        return self.get_current_device

    def get_current_device(self, *arguments: Any, **named: Any) -> NoReturn:
        """Refuses.

        Raises:
            BackendError: always.
        """
        raise BackendError("a Triton kernel was launched, and there is no GPU", fix=_FIX)


def jit(function: Any = None, **options: Any) -> Any:
    """triton.jit, with or without options."""
    return Kernel(function) if function is not None else Kernel


def autotune(configs: Any = (), key: Any = (), *others: Any, **options: Any) -> Any:
    """triton.autotune: the kernel keeps its configurations."""

    def keep(kernel: Any) -> Any:
        kernel.configs = list(configs)
        return kernel

    return keep


def heuristics(values: Any = None, **options: Any) -> Any:
    return lambda kernel: kernel


def cdiv(x: int, y: int) -> int:
    return (x + y - 1) // y


def next_power_of_2(n: int) -> int:
    return 1 << max(int(n) - 1, 0).bit_length()


_OWN = {
    "triton": {"__version__": VERSION, "jit": jit, "autotune": autotune, "heuristics": heuristics, "Config": Config}
    | {"cdiv": cdiv, "next_power_of_2": next_power_of_2, "JITFunction": Kernel, "KernelInterface": Kernel},
    "triton.runtime.jit": {"JITFunction": Kernel, "KernelInterface": Kernel, "jit": jit},
    "triton.runtime.autotuner": {"Autotuner": Kernel, "Heuristics": Kernel, "Config": Config, "autotune": autotune},
}


class _Module(ModuleType):
    """A module of Triton's, with every name in it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        made = sys.modules.get(full) or _named(full)
        setattr(self, name, made)
        return made


def module(name: str) -> ModuleType:
    """The stand-in for the module `name` of Triton; each is a package too, since any may be asked for more."""
    made = _Module(name, "A stand-in by hcmen.mamba.shim: no kernel runs.")
    made.__path__ = []
    made.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    made.__dict__.update(_OWN.get(name, {}))
    return made
