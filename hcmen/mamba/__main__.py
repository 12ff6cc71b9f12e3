"""`python -m hcmen.mamba run train.py ARGS...`: a script as it is, with `hcmen.mamba.shim` around it.

`python -m hcmen.mamba run -m package.module ARGS...` runs a module, as `python -m` does. Exit codes are Python's own.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from functools import partial

from hcmen.base.errors import InputError

__all__ = ["main", "prepared"]

_USAGE = "python -m hcmen.mamba run SCRIPT ARGS... or python -m hcmen.mamba run -m MODULE ARGS..."


def prepared(words: Sequence[str]) -> Callable[[], object]:
    """What runs what `words` name: "run", then a script or "-m" and a module, then its own arguments.

    Raises:
        InputError: there is no such command, script or module.
    """
    command, *rest = words or ("",)
    if command != "run" or not rest or rest == ["-m"]:
        raise InputError(f"'{' '.join(words)}' came" if words else "no command came", _USAGE)
    if rest[0] != "-m":
        script = rest[0]
        if not os.path.exists(script):
            raise InputError(f"there is no file '{script}'", "the path of a Python script")
        sys.argv = rest
        sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
        _install()
        return partial(runpy.run_path, script, run_name="__main__")
    module = rest[1]
    sys.path.insert(0, os.getcwd())
    if importlib.util.find_spec(module.partition(".")[0]) is not None:
        _install()
    if not _there(module):
        raise InputError(f"there is no module '{module}'", "one that Python finds", "see PYTHONPATH")
    sys.argv = rest[1:]
    return partial(runpy.run_module, module, run_name="__main__", alter_sys=True)


def _install() -> None:
    from hcmen.mamba.stand_ins.hook import shim  # it imports torch, which takes seconds

    shim().install()


def _there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:
        # A package above the module; if it was found, what it imports itself is for its own traceback.
        return not (error.name or "").startswith(name.partition(".")[0])


def main() -> None:
    """For `python -m hcmen.mamba`; the first folder on the path is the script's or the working directory."""
    if sys.path and sys.path[0] in ("", os.getcwd()):
        del sys.path[0]
    try:
        run = prepared(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    run()


if __name__ == "__main__":
    main()
