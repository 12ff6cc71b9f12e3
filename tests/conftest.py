"""Lets test files import `helpers`, and makes the small hand-made bundle once."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

# A library that a group may write is refused, and some umasks let groups write all that is made.
os.umask(0o022)

# Users have buffered streams, and what is in a buffer when a command ends is half of what can go wrong there.
os.environ.pop("PYTHONUNBUFFERED", None)

# A shell starts its background jobs with Ctrl-C ignored, and child processes would inherit that; some are tested on it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the key that signs engines lies, apart from that of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("state")
        patch.setenv("XDG_STATE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def shared_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sound bundle of all variants; not to be changed."""
    from helpers.small_bundle import make_bundle

    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture
def bundle(shared_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the small bundle that a test may damage."""
    return Path(shutil.copytree(shared_bundle, tmp_path / "bundle"))


@pytest.fixture
def micro_bundle(tmp_path: Path) -> Path:
    """A fresh copy of the exported bundle of the smallest model, which a test may damage."""
    from helpers.micro import micro_bundle_at

    return micro_bundle_at(tmp_path / "micro")
