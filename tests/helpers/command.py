"""Runs a command of this project in-process, as a terminal would see it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
from click.testing import CliRunner


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """The lines of stderr."""
        return self.err.splitlines()


def run(command: click.Command, *arguments: object) -> Outcome:
    """The outcome of `command` with `arguments`."""
    result = CliRunner().invoke(command, [str(a) for a in arguments])
    return Outcome(result.exit_code, result.stdout, result.stderr)


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    """A temporary folder that every user can look into, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="hcmen-test-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """As an ordinary user within the block: permissions do not bind root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
