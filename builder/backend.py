"""The build backend of pyproject.toml: scikit-build-core's, whose wheel then gets its true tag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scikit_build_core import build
from scikit_build_core.build import *  # noqa: F403 (the other hooks are taken as they are)
from true_tag import true_tag


def build_wheel(directory: str, settings: dict[str, Any] | None = None, metadata: str | None = None) -> str:
    """scikit-build-core's wheel in `directory`, under its true tag; its file name."""
    return true_tag(Path(directory, build.build_wheel(directory, settings, metadata))).name
