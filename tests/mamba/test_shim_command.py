"""`python -m hcmen.mamba run`: a script as it is, with Python's own exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hcmen.base.errors import InputError
from hcmen.mamba import __main__

SCRIPT = """
import sys
import triton
from mamba_ssm import Mamba
import beside

if __name__ == "__main__":
    print(sys.argv[1:], beside.here, __file__.endswith("train.py"))
    if not sys.argv[1].isdigit():
        raise KeyError(sys.argv[1])
    sys.exit(int(sys.argv[1]))
"""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hcmen.mamba", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for place in (tmp_path / "scripts", tmp_path):
        place.mkdir(exist_ok=True)
        (place / "beside.py").write_text(f"here = {place.name!r}\n")
    (tmp_path / "scripts" / "train.py").write_text(SCRIPT)
    (package / "train.py").write_text(SCRIPT)
    return tmp_path


def test_a_script_finds_what_lies_beside_it_and_ends_as_it_says(folder: Path) -> None:
    done = run(folder, "run", "scripts/train.py", "7", "--batch", "4")
    assert (done.returncode, done.stdout.strip()) == (7, "['7', '--batch', '4'] scripts True"), done.stderr


def test_a_module_runs_in_the_working_directory(folder: Path) -> None:
    done = run(folder, "run", "-m", "package.train", "lost")
    assert (done.returncode, done.stdout.strip()) == (1, f"['lost'] {folder.name} True"), done.stderr
    assert done.stderr.rstrip().endswith("KeyError: 'lost'"), "an error of the script is its own"


def test_no_script_gets_one_line(folder: Path) -> None:
    done = run(folder, "run", "nowhere.py")
    assert done.returncode == 2
    assert done.stderr == "error: there is no file 'nowhere.py', expected the path of a Python script\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("run", "-m", "package.nowhere"), "there is no module 'package.nowhere', expected one that Python finds"),
        (("run", "-m", "nowhere.train"), "there is no module 'nowhere.train', expected one that Python finds"),
        (("run", "-m"), "'run -m' came, expected python -m hcmen.mamba run SCRIPT"),
        (("run",), "'run' came, expected python -m hcmen.mamba run SCRIPT"),
        (("walk", "train.py"), "'walk train.py' came, expected python -m hcmen.mamba run SCRIPT"),
        ((), "no command came, expected"),
    ],
)
def test_what_cannot_be_run(folder: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], line: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(__main__, "_install", lambda: None)
    with pytest.raises(InputError) as error:
        __main__.prepared(words)
    assert str(error.value).startswith(line)
