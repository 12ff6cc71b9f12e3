"""Programs that lie in no package, such as the runners of tests and the samples, as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["loaded"]


def loaded(path: Path, name: str) -> ModuleType:
    """The file `path`, run now, as the module `name`, under which its own classes find it."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
