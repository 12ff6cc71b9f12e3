"""What `make` does before anything is installed: where torch comes from, and folders with signs in their names."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INDEX = "https://download.pytorch.org/whl/cpu"
ODD = os.fsdecode("it's a plàce, (1) & b #2".encode())  # also where the locale knows no à
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

# Stands for the Python of .venv: writes its arguments down, and fails where the test says so.
_PYTHON = """#!/bin/sh
echo "$*" >> calls
case "$*" in
  *--no-index*) test -n "$LOCAL";;
  *urllib*) test -n "$REACHED";;
  *--index-url*) test -n "$OFFERED";;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with what make reads and a Python that does nothing."""
    folder = tmp_path / ODD
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "CMakeLists.txt"):
        shutil.copy(ROOT / name, folder)
    for name in ("hcmen/base", "export", "runtime/csrc"):
        (folder / name).mkdir(parents=True)
    python = folder / ".venv" / "bin" / "python"
    python.write_text(_PYTHON)
    python.chmod(0o755)
    return folder


def make(folder: Path, *arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """What make says and the calls of Python that it made."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "TORCH_INDEX"))}
    command = ["make", "--no-print-directory", *arguments]
    done = subprocess.run(
        command, cwd=folder, env={**inherited, **environment}, capture_output=True, text=True, errors="replace"
    )
    calls = folder / "calls"
    return done, calls.read_text(encoding="utf-8").splitlines() if calls.exists() else []


PIP = "-m pip install --constraint constraints.txt "
LOCAL = PIP + "--quiet --no-deps --no-index torch"
CPU = f"{PIP}--no-deps --index-url {INDEX} torch"
ALL = PIP + "--editable .[dev]"


@pytest.mark.parametrize(
    ("state", "expected", "told"),
    [
        ({"LOCAL": "1"}, [LOCAL, ALL], False),
        ({"REACHED": "1", "OFFERED": "1"}, [LOCAL, "probe", CPU, ALL], False),
        ({"REACHED": "1"}, [LOCAL, "probe", CPU, ALL], True),
        ({}, [LOCAL, "probe", ALL], True),
        ({"TORCH_INDEX": ""}, [ALL], False),
    ],
    ids=["at hand", "from its own index", "not in its index", "no network", "declined"],
)
def test_torch_comes_from_the_index_of_the_cpu_build_where_it_can(checkout, state, expected, told):
    done, calls = make(checkout, ".venv/installed", **state)
    assert done.returncode == 0, done.stderr
    assert ["probe" if "urllib" in call else call for call in calls] == expected
    assert f"make: {INDEX} gives no torch: pip's own index is asked" in done.stderr if told else done.stderr == ""
    assert (checkout / ".venv" / "installed").exists()
    assert make(checkout, ".venv/installed", **state)[1] == calls, "a second time there is nothing to do"


def test_a_failure_of_pip_is_one_of_make(checkout):
    (checkout / ".venv" / "bin" / "python").write_text('#!/bin/sh\ncase "$*" in *editable*) exit 7;; esac\n')
    done, _ = make(checkout, ".venv/installed")
    assert done.returncode == 2
    assert not (checkout / ".venv" / "installed").exists()


@pytest.mark.parametrize("sign", ['"', "$", ";", ":", "\\"])
def test_a_folder_that_cmake_or_python_cannot_take_is_refused(checkout, sign):
    folder = checkout.rename(checkout.with_name(f"a{sign}b"))
    done, calls = make(folder, ".venv/installed")
    assert (done.returncode, calls) == (2, [])
    assert "move it" in done.stderr.splitlines()[0]


def test_types_are_laid_out_anywhere(checkout):
    (checkout / ".venv" / "installed").touch()
    done, calls = make(checkout, "types")
    assert (done.returncode, calls) == (0, ["-m mypy"]), done.stderr
    laid = checkout / "build" / "typing" / "hcmen"
    assert {p.name: p.resolve() for p in laid.iterdir()} == {
        "base": (checkout / "hcmen" / "base").resolve(),
        "export": (checkout / "export").resolve(),
        "runtime": (checkout / "runtime").resolve(),
    }
