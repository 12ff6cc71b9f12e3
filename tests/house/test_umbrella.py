"""`hcmen COMMAND` and `python -m hcmen COMMAND`: they reach every command there is, and load none before its time."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import tomllib
from helpers.command import run
from helpers.processes import loaded_after
from house.test_imports import ALL, HEAVY

import hcmen
from hcmen.__main__ import COMMANDS, main
from hcmen.base.modalities import VARIANTS

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


def completed(words: str) -> list[str]:
    """What the program answers a bash that completes the last of `words`."""
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1), "_HCMEN_COMPLETE": "bash_complete"}
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv = ['hcmen']\nfrom hcmen.__main__ import main; main()"],
        capture_output=True,
        text=True,
        env={**os.environ, **asked},
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_a_shell_completes_commands_options_and_choices():
    assert completed("hcmen ") == [f"plain,{name}" for name in COMMANDS]
    assert completed("hcmen tr") == ["plain,train"]
    assert completed("hcmen --ver") == ["plain,--version"]
    assert completed("hcmen run --var") == ["plain,--variant"]
    assert completed("hcmen run clip.npz --variant ") == ["plain,auto", *(f"plain,{v.name}" for v in VARIANTS)]
    assert completed("hcmen run --variant te") == ["plain,text_missing", "plain,text_only"]
    assert completed("hcmen train --preset mos") == ["plain,mosi", "plain,mosei"]
    assert completed("hcmen nope --var") == []


def test_what_is_text_is_completed_as_files_are():
    assert completed("hcmen run sam") == ["file,sam"]
    assert completed("hcmen run --bundle bui") == ["file,bui"]
    assert completed("hcmen eval --checkpoint bui") == ["file,bui"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_every_command_is_completed_and_torch_is_not_loaded(name):
    command = importlib.import_module(COMMANDS[name].module).main
    with click.Context(command) as ctx:
        options = [o for p in command.get_params(ctx) if isinstance(p, click.Option) and not p.hidden for o in p.opts]
    found = completed(f"hcmen {name} --")
    assert {f"plain,{o}" for o in options if o.startswith("--")} <= set(found)
    loaded = loaded_after(
        "import os, sys; sys.argv = ['hcmen']\n"
        f"os.environ.update(COMP_WORDS='hcmen {name} --', COMP_CWORD='2', _HCMEN_COMPLETE='bash_complete')\n"
        "from hcmen.__main__ import main; main()"
    )
    assert loaded.isdisjoint(HEAVY)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_itself_completes_once_it_is_switched_on(tmp_path):
    program = tmp_path / "hcmen"
    program.write_text(f"#!/bin/sh\nexec '{sys.executable}' -m hcmen \"$@\"\n")
    program.chmod(0o755)
    script = (
        'eval "$(_HCMEN_COMPLETE=bash_source hcmen)"; complete -p hcmen\n'
        "COMP_WORDS=(hcmen run --variant audio); COMP_CWORD=3; _hcmen_completion hcmen\n"
        'echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        check=True,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "audio_missing audio_only"
    assert "_hcmen_completion hcmen" in done.stdout


def test_the_docs_say_how_to_switch_completion_on():
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    assert 'eval "$(_HCMEN_COMPLETE=bash_source hcmen)"' in page
