"""The help of every command: examples that parse as options, headings, and choices that a shell can complete."""

from __future__ import annotations

import importlib

import pytest
from click.shell_completion import ShellComplete
from helpers.command import run

from hcmen.__main__ import COMMANDS


def command_of(name):
    """The command object."""
    return importlib.import_module(COMMANDS[name].module).main


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_and_headings(name):
    main = command_of(name)
    done = run(main, "--help")
    assert done.code == 0
    assert "Examples:\n" in done.out
    options = {option for param in main.params for option in param.opts if option.startswith("--")}
    for line in main.examples:
        assert f"  {line}\n" in done.out
        if f"hcmen-{name}" not in line:
            continue  # what follows it, with another command
        assert {word for word in line.split() if word.startswith("--")} <= options | {"--rate"}
    names = {param.name for param in main.params}
    assert {option for group in main.groups.values() for option in group} <= names


@pytest.mark.parametrize("name", ["run", "follow", "export", "bench", "compile"])
def test_variants_are_completed(name):
    main = command_of(name)
    complete = ShellComplete(main, {}, f"hcmen-{name}", "_HCMEN_COMPLETE")
    assert "audio_missing" in [item.value for item in complete.get_completions(["--variant"], "aud")]


@pytest.mark.parametrize("name", ["run", "follow", "export", "bench", "compile", "eval", "doctor"])
def test_a_bundle_is_an_option_everywhere(name):
    assert "--bundle" in {option for param in command_of(name).params for option in param.opts}
