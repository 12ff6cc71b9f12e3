"""`hcmen COMMAND` and `python -m hcmen COMMAND`: they reach every command there is, and load none before its time."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
from helpers.command import run
from helpers.processes import loaded_after
from house.test_imports import ALL, HEAVY

import hcmen
from hcmen.__main__ import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]


def test_the_commands_are_those_that_are_installed_and_those_that_there_are():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    modules = {f"hcmen-{name}": f"{home.module}:main" for name, home in COMMANDS.items()}
    assert scripts == {"hcmen": "hcmen.__main__:main", **modules}
    start = re.compile(r'^@command\(\s*"hcmen-', re.M)
    written = {name for name, path in ALL.items() if start.search(path.read_text(encoding="utf-8"))}
    assert {home.module for home in COMMANDS.values()} == written


@pytest.mark.parametrize("name", COMMANDS)
def test_each_is_the_command_of_its_own_name(name):
    alone = run(importlib.import_module(COMMANDS[name].module).main, "--version")
    assert (alone.code, alone.out) == (0, f"hcmen-{name} {hcmen.__version__}\n")
    assert run(main, name, "--version") == alone
    refused = run(main, name, "--no-such-option")
    assert (refused.code, len(refused.lines)) == (2, 1)
    assert refused.lines[0].endswith(f"(see hcmen {name} --help)")


def test_help_names_all_and_is_what_comes_without_a_command():
    shown = run(main, "--help")
    assert (shown.code, shown.err) == (0, "")
    for name, home in COMMANDS.items():
        assert f"  {name} " in shown.out
        assert home.purpose in shown.out
    assert run(main) == shown
    assert run(main, "--version").out == f"hcmen {hcmen.__version__}\n"


def test_an_unknown_command_is_one_line_whatever_comes_after_it():
    done = run(main, "trian", "--epochs", "3")
    assert (done.code, done.out, len(done.lines)) == (2, "", 1)
    assert "'trian': did you mean 'train'? choose from train, eval, export" in done.lines[0]


def test_python_runs_the_package():
    code = [sys.executable, "-m", "hcmen", "doctor", "--no-such-option"]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "hcmen doctor --help" in done.stderr


def test_help_loads_no_command_and_nothing_heavy():
    loaded = loaded_after("import sys; sys.argv = ['hcmen', '--help']\nfrom hcmen.__main__ import main; main()")
    assert loaded.isdisjoint({*HEAVY, "numpy"})
    program = "import sys\nfrom hcmen.__main__ import main\nmain(['--help'], standalone_mode=False)\n"
    program += "print(sorted(m for m in sys.modules if m.startswith('hcmen.')), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    base = [f"hcmen.base{part}" for part in ("", ".console", ".errors", ".interrupts", ".modalities")]
    assert done.stderr.strip() == str(["hcmen.__main__", *base])
