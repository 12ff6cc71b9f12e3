"""Runs a command of this project in-process, as a terminal would see it."""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import hcmen

# Before 8.2, click's runner mixes stdout and stderr unless told otherwise.
_APART: dict[str, Any] = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}


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
    result = CliRunner(**_APART).invoke(command, [str(a) for a in arguments])
    return Outcome(result.exit_code, result.stdout, result.stderr)


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    """A temporary folder that every user can look into, unlike pytest's own, where its parents let them."""
    folder = Path(tempfile.mkdtemp(prefix="hcmen-test-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        folder.chmod(0o755)  # some tests close it
        shutil.rmtree(folder, ignore_errors=True)


# CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH of linux/capability.h: what lets root pass by the permissions of files.
_PASS_BY = 1 << 1 | 1 << 2


def _effective_capabilities(clear: int = 0, put: int = 0) -> int:
    """The effective capabilities of this thread before those of `clear` are dropped and those of `put` are taken up."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, for 32 capabilities each time
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    before = sets[0]
    sets[0] = before & ~clear | put
    if sets[0] != before and libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")
    return before & clear


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Held to the permissions of files within the block, as an ordinary user is: they do not bind root otherwise.

    Root stays the owner of its files and may still enter its own folders, in which the checkout may lie. Where it lies
    in a folder of somebody else that is closed to others, root becomes that owner. Skips the test where permissions
    bind nobody, or where nothing could be imported.
    """
    package = Path(hcmen.__file__)
    user, owner = os.geteuid(), package.stat().st_uid
    dropped = _effective_capabilities(clear=_PASS_BY)
    try:
        if user == 0 and not os.access(package, os.R_OK, effective_ids=True):
            os.seteuid(owner)
        with open_folder() as folder:
            (folder / "closed").touch(mode=0)
            if os.access(folder / "closed", os.R_OK, effective_ids=True):
                pytest.skip(f"the file system of {folder.parent} knows no permissions")
        if not os.access(package, os.R_OK, effective_ids=True):
            pytest.skip(f"user {os.geteuid()}, whom permissions bind, cannot reach {package.parent}")
        yield
    finally:
        os.seteuid(user)
        _effective_capabilities(put=dropped)
