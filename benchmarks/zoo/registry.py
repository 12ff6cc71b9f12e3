"""What a family of models is, and how code that is not installed is imported from a folder that the user names."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

__all__ = ["FAMILIES", "Example", "Family", "Missing", "bare_package", "family", "fill", "stand_ins"]

Axes = dict[int, str]
Example = tuple[nn.Module, tuple[Tensor, ...]]


class Missing(Exception):
    """A family cannot be built here; the text says what would make it possible."""


@dataclass(frozen=True)
class Family:
    """One family: where its code is, and how a small one is built.

    Attributes:
        name: For the table, and for --only.
        source: The address of the repository, or the name of a package of the index.
        commit: The commit that was tried; None for a package.
        what: Class and sizes, in words.
        build: Path of the repositories -> the model in eval mode, and its inputs.
        dynamic: For each input, the sizes to be left open: axis -> name.
        folders: What goes onto sys.path, below the folder of the repositories; the first part is the repository.
        packages: What has to be installed from the index.
        absent: Packages that the code imports and the model does not use: empty stand-ins take their places.
        note: What the table has to say.
        refused: Why ONNX cannot hold it, where that is known; then a failure is what is expected.
    """

    name: str
    source: str
    commit: str | None
    what: str
    build: Callable[[Path], Example]
    dynamic: Sequence[Axes]
    folders: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    note: str = ""
    refused: str | None = None

    def missing(self, repositories: Path) -> str | None:
        """One line that says what to bring where; None if all is there. packages: looked for on sys.path."""
        for folder in self.folders:
            if not (repositories / folder).is_dir():
                name = Path(folder).parts[0]
                return f"no {repositories / folder}: git clone {self._address(name)} {repositories / name}"
        for package in self.packages:
            try:
                there = importlib.util.find_spec(package.replace("-", "_")) is not None
            except ValueError:  # a stand-in
                there = True
            if not there:
                return f"no package {package}: pip install --no-deps --target build/zoo {package}"
        return None

    def _address(self, name: str) -> str:
        return self.source if self.source.rstrip("/").endswith(name) else f"https://github.com/state-spaces/{name}"


FAMILIES: dict[str, Family] = {}


def family(
    name: str, source: str, commit: str | None, what: str, dynamic: Sequence[Axes], **rest: object
) -> Callable[[Callable[[Path], Example]], Callable[[Path], Example]]:
    """Registers a builder. rest: further fields of Family."""

    def register(build: Callable[[Path], Example]) -> Callable[[Path], Example]:
        FAMILIES[name] = Family(name, source, commit, what, build, dynamic, **rest)  # type: ignore[arg-type]
        return build

    return register


def bare_package(name: str, folder: Path) -> None:
    """Makes `name.x` importable from `folder/x.py` without the package's own __init__, which imports too much."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    sys.modules[name] = module


def fill(name: str, **attributes: object) -> types.ModuleType:
    """The module `name`, a stand-in, with these attributes: what little of it the model uses."""
    module = importlib.import_module(name)
    for key, value in attributes.items():
        setattr(module, key, value)
    return module


class _Anything(type):
    """The class of classes that have every name."""

    def __getattr__(cls, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Anything(name, (), {"__init__": lambda self, *_, **__: None})
        setattr(cls, name, made)
        return made


class _Nothing(types.ModuleType):
    """A module that has every name: each is a class that does nothing."""

    __path__: ClassVar[list[str]] = []
    __all__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Anything(name, (), {"__init__": lambda self, *_, **__: None})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not any(fullname == name or fullname.startswith(f"{name}.") for name in self.names):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Nothing(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextmanager
def stand_ins(names: tuple[str, ...]) -> Iterator[None]:
    """Within the block `import NAME` gives a module of empty stand-ins, for all of `names` and what lies below them."""
    finder = _Finder(names)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
