"""Names the machine and the versions, for every JSON under docs/results."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from hcmen.runtime.benchmark.machine import machine

__all__ = ["describe"]


def _compiler() -> str:
    try:
        return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        return "none"


def describe() -> dict[str, Any]:
    """Machine, versions, time and the command that is running."""
    found = machine(("torch", "onnx"))
    return {**found, "compiler": _compiler(), "date": found["date"][:10], "command": " ".join(["python", *sys.argv])}
