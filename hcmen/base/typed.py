"""Commands as they can be typed: what is printed for people to type next has to work where they are."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

__all__ = ["as_called", "as_typed", "from_here"]


def as_typed(command: str, *arguments: str | os.PathLike[str]) -> str:
    """The line that runs `command`, such as "hcmen-run", of this installation from the working directory.

    Its bare name where PATH leads to this installation, else the path of its script, else `python -m hcmen`.
    """
    return " ".join([*_program(command), *(shlex.quote(os.fspath(argument)) for argument in arguments)])


def as_called(command: str) -> str:
    """`command`, such as "hcmen-run" or "hcmen run", by the program that this process was started as."""
    program, *words = command.split()
    started = Path(sys.argv[0]).name if sys.argv else ""
    module = getattr(getattr(sys.modules.get("__main__"), "__spec__", None), "name", None)
    if module == "hcmen.__main__":
        return " ".join([_python(), "-m", program, *words])
    return " ".join([*(_program(program) if started == program else [program]), *words])


def from_here(path: str | os.PathLike[str]) -> str:
    """`path` as it is called from the working directory: relative where it lies within."""
    try:
        return os.fspath(Path(os.path.abspath(path)).relative_to(os.getcwd()))
    except (ValueError, OSError):
        return os.fspath(path)


def _program(command: str) -> list[str]:
    ours = [folder / command for folder in _script_folders() if os.access(folder / command, os.X_OK)]
    found = shutil.which(command)
    if getattr(sys, "frozen", False) or (found and (not ours or any(_same(found, script) for script in ours))):
        return [command]
    if ours:
        return [shlex.quote(_with_folder(ours[0]))]
    name = command.partition("-")[2]
    return [_python(), "-m", "hcmen", *([name] if name else [])]


def _python() -> str:
    # The interpreters of virtual environments are links to one program, so it is their place that counts.
    bare = shutil.which("python") == sys.executable
    return "python" if bare else shlex.quote(_with_folder(Path(sys.executable)))


def _script_folders() -> list[Path]:
    """Where the scripts of this installation may lie."""
    schemes = [f"{os.name}_user"] if f"{os.name}_user" in sysconfig.get_scheme_names() else []
    paths = [sysconfig.get_path("scripts"), *(sysconfig.get_path("scripts", scheme) for scheme in schemes)]
    return [Path(sys.executable).parent, *(Path(path) for path in paths if path)]


def _with_folder(program: Path) -> str:
    """The path from here; a shell looks a name without a slash up on PATH."""
    path = from_here(program)
    return path if "/" in path else f"./{path}"


def _same(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)
