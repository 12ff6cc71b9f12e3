"""Commands that are printed can be typed as printed, from wherever one is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hcmen.base import typed
from hcmen.base.typed import as_typed, from_here

SCRIPTS = Path(sys.executable).parent


@pytest.fixture
def scripts(tmp_path, monkeypatch) -> Path:
    """An installation of its own, with one script, that PATH does not lead to."""
    folder = tmp_path / "my project" / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "hcmen-run").write_text('#!/bin/sh\necho ran "$@"\n')
    (folder / "hcmen-run").chmod(0o755)
    monkeypatch.setattr(typed, "_script_folders", lambda: [folder])
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return folder


def shell(line: str, **environment: str) -> str:
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("place", [".", "..", "../..", "/"])
def test_a_script_off_the_path_is_called_by_its_path(scripts, monkeypatch, place):
    monkeypatch.chdir(scripts / place)
    line = as_typed("hcmen-run", "a clip.npz", "--bundle", Path("b"))
    assert shell(line) == "ran a clip.npz --bundle b"


def test_it_is_short_where_it_can_be(scripts, monkeypatch):
    monkeypatch.chdir(scripts.parent.parent)
    assert as_typed("hcmen-run", "clip.npz") == ".venv/bin/hcmen-run clip.npz"
    monkeypatch.setenv("PATH", str(scripts))
    assert as_typed("hcmen-run", "clip.npz") == "hcmen-run clip.npz"


def test_a_link_on_the_path_counts_and_another_installation_does_not(scripts, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setenv("PATH", f"{other}:/usr/bin:/bin")
    (other / "hcmen-run").symlink_to(scripts / "hcmen-run")
    assert as_typed("hcmen-run") == "hcmen-run"
    (other / "hcmen-run").unlink()
    shutil.copy(scripts / "hcmen-run", other / "hcmen-run")
    assert as_typed("hcmen-run") == f"'{scripts / 'hcmen-run'}'"


def test_without_scripts_it_is_a_module(scripts, tmp_path, monkeypatch):
    (scripts / "hcmen-run").unlink()
    monkeypatch.chdir(tmp_path)
    line = as_typed("hcmen-run", "--version")
    assert line.endswith(" -m hcmen run --version")
    assert shell(line).startswith("hcmen-run ")
    # Another environment's python, which is a link to the same program, does not have hcmen.
    (tmp_path / "python").symlink_to(os.path.realpath(sys.executable))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert as_typed("hcmen-run", "--version") == line


def test_a_folder_that_is_gone_is_no_error(scripts, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert as_typed("hcmen-run") == f"'{scripts / 'hcmen-run'}'"


def test_paths_are_relative_within_the_working_directory_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert from_here(tmp_path / "a" / "b") == "a/b"
    assert from_here("a/../b") == "b"
    assert from_here("/usr/bin") == "/usr/bin"
    assert from_here(tmp_path.parent) == str(tmp_path.parent)


def test_the_line_of_this_environment_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shell(as_typed("hcmen-run", "--version")).startswith("hcmen-run ")
