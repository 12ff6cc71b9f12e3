"""Wheels that a test reads and nothing installs: fetched once by pip into build/wheels, unpacked, not on any path."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "build" / "wheels"
_DOWNLOAD = (
    *("-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
    *("--no-deps", "--only-binary=:all:", "--timeout", "15", "--retries", "1"),
)


class Unavailable(Exception):
    """The wheel cannot be had here; the message names it and the reason."""


def folder_of(*requirements: str) -> Path:
    """Where `unpacked` puts the wheels `requirements`."""
    name = "-".join(re.sub(r"[^\w.]+", "-", requirement) for requirement in requirements)
    return FOLDER / f"{name}-{sys.implementation.cache_tag}"


def unpacked(*requirements: str) -> Path:
    """The folder with the content of the wheels `requirements`, such as "tritonclient==2.73.0"; raises Unavailable."""
    wanted, target = " ".join(requirements), folder_of(*requirements)
    if target.is_dir():
        return target
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        command = [sys.executable, *_DOWNLOAD, "-d", str(temporary), *requirements]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        wheels = sorted(temporary.glob("*.whl"))
        if done.returncode or len(wheels) != len(requirements):
            reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise Unavailable(f"{wanted} cannot be had here: {reason}")
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(temporary)
            wheel.unlink()
        temporary.rename(target)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{wanted} cannot be had here: pip took too long") from error
    except OSError as error:
        if not target.is_dir():  # another process may have been first
            raise Unavailable(f"{wanted} cannot be had here: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
