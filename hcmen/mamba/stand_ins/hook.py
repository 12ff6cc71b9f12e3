"""Puts the stand-ins where `import` finds them, and hcmen's functions where the kernels of imported modules stood.

A module that is there for real is imported as it is. After any module has run, functions of known names beside Triton
kernels or compiled modules are replaced in it (KERNELS), wherever a repository keeps its copy of mamba_ssm's files.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
import torch.utils._triton

from hcmen.mamba.stand_ins import causal_conv, norms, packages, ssd, transformers, triton
from hcmen.mamba.stand_ins.adapting import MARK, adapted, on_cuda

__all__ = ["KERNELS", "Shim", "hidden", "shim"]

KERNELS: Mapping[str, Callable[..., Any]] = {
    "_layer_norm_fwd": norms.normed_with_statistics,
    "causal_conv1d_bwd_function": causal_conv.causal_conv1d_bwd_function,
    "causal_conv1d_fwd_function": causal_conv.causal_conv1d_fwd_function,
    "causal_conv1d_update_function": causal_conv.causal_conv1d_update_function,
    "causal_conv1d_varlen_states": causal_conv.causal_conv1d_varlen_states,
    "layer_norm_fn": norms.layer_norm_fn,
    "layer_norm_linear_fn": norms.layer_norm_linear_fn,
    "layernorm_fn": norms.layernorm_fn,
    "mamba_chunk_scan_combined": ssd.mamba_chunk_scan_combined,
    "mamba_split_conv1d_scan_combined": ssd.mamba_split_conv1d_scan_combined,
    "rms_norm_fn": norms.rms_norm_fn,
    "rmsnorm_fn": norms.rmsnorm_fn,
    "selective_state_update": ssd.selective_state_update,
    "swiglu": ssd.swiglu,
}
"""Functions above Triton kernels, or above operators for CUDA alone, by the names that mamba_ssm gives them."""

_KERNEL_MODULES = ("triton", "causal_conv1d_cuda")
_BLIND = frozenset({"torch", "torchvision", "transformers"})
"""Packages that look for Triton or mamba_ssm when they are imported, and would take stand-ins for the real ones."""


def _by_device(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """For functions of compiled modules, whose arguments have no names: `ours` unless a tensor is on CUDA."""

    def call(*arguments: Any, **named: Any) -> Any:
        chosen = original if on_cuda(iter((*arguments, *named.values()))) else ours
        return chosen(*arguments, **named)

    return call


class _Event:
    """torch.cuda.Event on a machine without CUDA, where mamba_ssm's `generate` makes two of them to take its time."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self._at = 0.0

    def record(self, stream: Any = None) -> None:
        self._at = time.perf_counter()

    def elapsed_time(self, other: _Event) -> float:
        """Milliseconds."""
        return 1e3 * (other._at - self._at)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Nothing is under way."""

    wait = synchronize


class _Device:
    """torch.cuda.device on a machine without CUDA: a block in which nothing is chosen."""

    def __init__(self, device: Any = None) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


class _Stood(importlib.abc.Loader):
    """Gives an import a module that is there already."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def create_module(self, spec: Any) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Finder(importlib.abc.MetaPathFinder):
    """First of all finders: asks the others, and stands in where they find nothing."""

    def __init__(self, shim: Shim) -> None:
        self.shim = shim

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        spec = None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec") and spec is None:
                spec = finder.find_spec(name, path, target)
        if name.partition(".")[0] in packages.ROOTS and not _hiding:
            stood = self._stood_in(name, spec)
            if stood is not None:
                return importlib.machinery.ModuleSpec(name, _Stood(stood), is_package=hasattr(stood, "__path__"))
        if spec is not None and spec.loader is not None:
            self._watch(name, spec.loader)
        return spec

    def _stood_in(self, name: str, spec: Any) -> ModuleType | None:
        """What to import in the place of `spec`; None if it is there for real."""
        root, _, below = name.partition(".")
        if below and not packages.is_stand_in(sys.modules.get(root)):
            return None
        if name in packages.COMPILED and spec is not None and spec.loader is not None:
            return self.shim.compiled(name, spec)
        # A folder of the name without an __init__.py has no loader of its own, or one of namespaces.
        if not below and spec is not None and spec.origin is not None:
            return None
        found = packages.module(name)
        if found is None:
            raise packages.missing(name)
        return found

    def _watch(self, name: str, loader: Any) -> None:
        """Has the shim look at the module once it has run."""
        if not isinstance(loader, (importlib.machinery.SourceFileLoader, importlib.machinery.SourcelessFileLoader)):
            return
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            with ExitStack() as stack:
                if name.partition(".")[0] in _BLIND:
                    stack.enter_context(hidden())
                run(module)
            self.shim.serve(sys.modules.get(name, module), imported_now=True)

        loader.exec_module = exec_module  # type: ignore[method-assign]


_hiding = 0


@contextmanager
def hidden() -> Iterator[None]:
    """Within the block no stand-in can be imported: for an exporter, which looks for Triton and trusts what it finds.

    PyTorch keeps what it once found, so these memories are wiped before and after.
    """
    global _hiding
    ours = {name: module for name, module in sys.modules.items() if packages.is_stand_in(module)}
    for name in ours:
        del sys.modules[name]
    _hiding += 1
    _forget_triton()
    try:
        yield
    finally:
        _hiding -= 1
        for name, module in ours.items():
            sys.modules.setdefault(name, module)
        if not _hiding and "triton" not in ours:
            _forget_triton()


def _forget_triton() -> None:
    """Has PyTorch ask again whether there is Triton, and remember the answer while no stand-in is in sight."""
    if any(name == "triton" and packages.is_stand_in(module) for name, module in sys.modules.items()):
        return
    for question in vars(torch.utils._triton).values():
        if hasattr(question, "cache_clear"):
            question.cache_clear()
    torch.utils._triton.has_triton_package()


class Shim:
    """Stand-ins for mamba_ssm, causal_conv1d, their compiled modules and Triton, on hcmen's operators.

    As a context manager it ends with the block: what was imported before is as it was and no stand-in can be imported
    any more, but modules that were imported within keep what they were built on, so that their models go on working.
    `install` begins it for good.
    """

    def __init__(self) -> None:
        self._finder = _Finder(self)
        self._undo: list[Callable[[], object]] = []
        self._depth = 0

    def __enter__(self) -> Shim:
        self._depth += 1
        if self._depth == 1:
            _forget_triton()
            sys.meta_path.insert(0, self._finder)
            if not torch.cuda.is_available():
                self.replace(torch.cuda, "Event", _Event)
                self.replace(torch.cuda, "device", _Device)
            for module in list(sys.modules.values()):
                if isinstance(module, ModuleType) and not packages.is_stand_in(module):
                    self.serve(module, imported_now=False)
        return self

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        sys.meta_path.remove(self._finder)
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        for name in [name for name, module in sys.modules.items() if packages.is_stand_in(module)]:
            del sys.modules[name]

    def install(self) -> Shim:
        """Begins now and never ends."""
        return self.__enter__()

    def on_exit(self, undo: Callable[[], object]) -> None:
        """Has `undo` called in the end."""
        self._undo.append(undo)

    def replace(self, owner: Any, name: str, value: Any, *, for_good: bool = False) -> None:
        """Sets an attribute, to be as it was in the end unless `for_good`."""
        before = vars(owner).get(name, self)
        setattr(owner, name, value)
        if for_good:
            return
        if before is self:
            self._undo.append(functools.partial(delattr, owner, name))
        else:
            self._undo.append(functools.partial(setattr, owner, name, before))

    def compiled(self, name: str, spec: Any) -> ModuleType | None:
        """A compiled module that is installed, with hcmen's functions for the CPU; the stand-in if it does not load."""
        try:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except (ImportError, OSError):
            return packages.module(name)
        self._by_device(module, packages.COMPILED[name])
        return module

    def _by_device(self, module: ModuleType, functions: Any) -> None:
        for name, ours in vars(functions).items():
            if hasattr(module, name):
                self.replace(module, name, _by_device(getattr(module, name), ours))

    def serve(self, module: ModuleType, *, imported_now: bool) -> None:
        """Replaces what this module has of the functions that there are stand-ins for."""
        name = getattr(module, "__name__", "")
        if name in packages.COMPILED and not imported_now:
            self._by_device(module, packages.COMPILED[name])
        elif name == "transformers" or name.startswith("transformers."):
            transformers.serve(self, module)
        elif name == "triton.runtime.driver" and not torch.cuda.is_available():
            if "active" in vars(module.driver):
                self.replace(module.driver, "active", triton.NoDriver())
        else:
            self._serve_kernels(module, imported_now)

    def _serve_kernels(self, module: ModuleType, imported_now: bool) -> None:
        names = vars(module)
        for name in KERNELS.keys() & names.keys():
            value = names[name]
            if not isinstance(value, (FunctionType, MethodType)) or hasattr(value, MARK):
                continue
            home = sys.modules.get(getattr(value, "__self__", value).__module__)
            below = [vars(home)[k] for k in _KERNEL_MODULES if k in vars(home)] if home is not None else []
            # layernorm_gated's function of this name is only called by others that are replaced.
            if not below or (name == "_layer_norm_fwd" and "z" in inspect.signature(value).parameters):
                continue
            stands_in = any(map(packages.is_stand_in, below))
            call = adapted(value, KERNELS[name], works_on_cuda=not stands_in)
            self.replace(module, name, call, for_good=stands_in and imported_now)


_SHIM = Shim()


def shim() -> Shim:
    """Makes `import mamba_ssm`, `causal_conv1d`, `triton` and what lies below them succeed, on hcmen's operators.

        with hcmen.mamba.shim():
            from mamba_ssm import Mamba
        hcmen.mamba.shim().install()                 # for good, before a repository is imported
        python -m hcmen.mamba run train.py ARGS...   # the same for a script as it is

    Models then run and train on the CPU as their authors wrote them. What is installed and works is never replaced, but
    for its kernels on tensors of the CPU. Modules of transformers are changed too, and are as they were in the end.
    """
    return _SHIM
