"""TensorRT's headers, and the wheels of it that work without a GPU: which of them are here.

`make test-all` brings them (tests/all/run.py). Others are named by

    TENSORRT_INCLUDE_DIR   folders of NvInfer.h, separated by ':'; several versions of TensorRT may be named
    TENSORRT_LEAN_DIR      folders with tensorrt_lean_libs, tensorrt_lean_bindings and tensorrt_bindings in them
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from helpers.wheels import folder_of

# No wheel of TensorRT's holds its headers. This one carries those of 10.14, under the Apache licence.
HEADERS = "kernel-lens==2.0.1"
_INSIDE = Path("kernel_lens", "include", "tensorrt")
# Where packages and archives of NVIDIA's put them.
_PLACES = (
    "/usr/include/x86_64-linux-gnu",
    "/usr/include/aarch64-linux-gnu",
    "/usr/include",
    "/usr/local/tensorrt/include",
)


def _lean(version: str) -> tuple[str, ...]:
    packages = ("tensorrt_lean_cu13_libs", "tensorrt_lean_cu13_bindings", "tensorrt_cu13_bindings")
    return tuple(f"{package}=={version}" for package in packages)


# Sets of wheels that lie in one folder. The lean runtimes of 10.9 and 10.13 are not on PyPI as wheels: their bindings
# are tried over a later registry.
LEAN = {
    "11.4": _lean("11.4.0.106"),
    "11.0": _lean("11.0.0.114"),
    "10.16": _lean("10.16.1.11"),
    "10.15": _lean("10.15.1.29"),
    "10.13": ("tensorrt_cu13_bindings==10.13.3.9.post1", "tensorrt_lean_cu13_libs==10.16.1.11"),
    "10.9": ("tensorrt_cu12_bindings==10.9.0.34", "tensorrt_lean_cu13_libs==10.16.1.11"),
}

NO_HEADERS = "there are no headers of TensorRT: `make test-all` brings some, TENSORRT_INCLUDE_DIR names others"
NO_LEAN = (
    "the wheels of TensorRT's lean runtime are not here: `make test-all` brings some, TENSORRT_LEAN_DIR names others"
)


def _named(variable: str) -> list[Path]:
    return [Path(p) for p in os.environ.get(variable, "").split(":") if p]


def include_folders() -> list[Path]:
    """Folders of NvInfer.h: those that are named, else the first that is found."""
    places = [*map(Path, _PLACES), folder_of(HEADERS) / _INSIDE]
    return _named("TENSORRT_INCLUDE_DIR") or [p for p in places if (p / "NvInferRuntimePlugin.h").is_file()][:1]


def lean_folders(*packages: str) -> dict[str, Path]:
    """label -> a folder that holds all of `packages`: in this environment, named, or brought."""
    spec = importlib.util.find_spec(packages[0])
    places = {"installed": Path(spec.origin).parents[1]} if spec and spec.origin else {}
    places |= {path.name: path for path in _named("TENSORRT_LEAN_DIR")}
    places |= {version: folder_of(*wheels) for version, wheels in LEAN.items()}
    return {name: path for name, path in places.items() if all((path / package).is_dir() for package in packages)}
