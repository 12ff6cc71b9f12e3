"""The shared layer of the command lines: exit codes, one-line errors, JSON, warnings, progress."""

from __future__ import annotations

import errno
import json
import math
import signal
import subprocess
import sys
import textwrap
import warnings

import click
import pytest
import torch
from helpers.command import run

from hcmen.base.console import Choice, Console, Progress, command, describe_error, one_line
from hcmen.base.errors import BackendError, CheckFailed, CorruptFileError, InputError

ERRORS = {
    "check": (CheckFailed("no"), 1, "error: no"),
    "input": (InputError("two\nlines"), 2, "error: two lines"),
    "backend": (BackendError("none"), 3, "error: none"),
    "corrupt": (CorruptFileError("bad"), 5, "error: bad"),
    "full disk": (
        OSError(errno.ENOSPC, "No space left on device", "/x/y"),
        2,
        "error: /x/y: no space left on device, f",
    ),
    "no permission": (
        PermissionError(errno.EACCES, "Permission denied", "/x"),
        2,
        "error: /x: permission denied, check",
    ),
    "nameless": (OSError("odd"), 2, "error: oserror"),
    "torch": (ModuleNotFoundError("No module named 'torch'", name="torch.nn"), 3, "error: torch is not installed: pip"),
    "tensorrt_rtx": (
        ModuleNotFoundError("No module named 'tensorrt_rtx_bindings'", name="tensorrt_rtx_bindings"),
        3,
        "error: tensorrt_rtx_bindings is not installed: pip install 'hcmen[rtx]'",
    ),
    "other module": (ModuleNotFoundError("No module named 'x'", name="x"), 70, "error: unexpected ModuleNotFoundError"),
    "memory": (MemoryError(), 70, "error: out of memory"),
    "memory of a GPU": (
        torch.OutOfMemoryError("CUDA out\nof memory"),
        3,
        "error: the GPU has no memory left: end what",
    ),
    "defect": (ZeroDivisionError("a\nb"), 70, "error: unexpected ZeroDivisionError: a b (run again with -v"),
    "silent defect": (AssertionError(), 70, "error: unexpected AssertionError: no message"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "error: interrupted"),
}


@command("hcmen-fail", epilog="The end.")
@click.argument("kind", type=Choice(["none", "warn", "exit", *ERRORS]))
def fail(console: Console, kind: str) -> None:
    """Fails as it is told."""
    if kind in ERRORS:
        raise ERRORS[kind][0]
    if kind == "warn":
        warnings.warn("slow\nway", stacklevel=1)
    if kind == "exit":
        raise click.exceptions.Exit(9)
    console.note("a note")
    console.detail("a detail")
    console.emit({"a": [1, None]}, "text")


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_is_one_line_and_its_exit_code(kind):
    _, code, line = ERRORS[kind]
    done = run(fail, kind)
    assert (done.code, done.out, len(done.lines)) == (code, "", 1)
    assert done.lines[0].startswith(line)


def test_a_traceback_comes_with_v_alone_and_the_line_comes_last():
    assert "Traceback" not in run(fail, "defect").err
    for flag in ("-v", "-vv", "--verbose"):
        done = run(fail, "defect", flag)
        assert done.code == 70
        assert done.lines[0].startswith("Traceback")
        assert done.lines[-1].startswith("error: unexpected ZeroDivisionError")
    assert "Traceback" not in run(fail, "Ctrl-C", "-v").err


def test_verbosity_and_formats():
    assert run(fail, "none") == run(fail, "none", "--format", "text")
    assert (run(fail, "none").out, run(fail, "none").err) == ("text\n", "a note\n")
    assert run(fail, "none", "-v").err == "a note\na detail\n"
    assert run(fail, "none", "-q").err == ""
    assert json.loads(run(fail, "none", "--format", "json").out) == {"schema_version": 1, "a": [1, None]}
    assert run(fail, "exit").code == 9
    assert run(fail, "--version").out.startswith("hcmen-fail 0.")
    assert "The end." in run(fail, "-h").out


def test_json_never_holds_nan():
    with pytest.raises(ValueError, match="Out of range"):
        Console("json").emit({"x": math.nan}, "")


def test_a_python_warning_is_one_line():
    done = run(fail, "warn")
    assert done.lines == ["warning: slow way", "a note"]
    assert run(fail, "warn", "-q").lines == ["warning: slow way"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Missing argument"),
        (["ful disk"], "'ful disk': did you mean 'full disk'? choose from none, warn"),
        (["zzzz"], "'zzzz': choose from none"),
        (["none", "--format", "xml"], "choose from text, json"),
        (["none", "--nope"], "--nope"),
        (["none", "more"], "unexpected extra argument"),
    ],
)
def test_usage_errors_are_one_line_that_names_the_help(arguments, says):
    done = run(fail, *arguments)
    assert (done.code, done.out, len(done.lines)) == (2, "", 1)
    assert done.lines[0].startswith("error: ")
    assert says in done.lines[0]
    assert done.lines[0].endswith("(see hcmen-fail --help)")


def test_control_characters_never_reach_the_terminal():
    assert one_line("a\x1b[31m\tb\r\nc\x00\udcff\u202e") == "a\\x1b[31m b c\\x00\\udcff\\u202e"
    assert one_line("Zürich 日本") == "Zürich 日本"
    assert describe_error(InputError("\x07")) == ("\\x07", 2)


def process(script: str, **options: object) -> subprocess.CompletedProcess:
    code = "from hcmen.base.console import command\n" + textwrap.dedent(script)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False, **options)


def test_sigterm_after_an_error_adds_no_line():
    """As torchrun sends it to the processes that are ending because another one failed."""
    done = process(
        f"""
        import click, os, signal
        from hcmen.base.errors import InputError
        @command("x")
        def main(console):
            click.get_current_context().call_on_close(lambda: os.kill(os.getpid(), {int(signal.SIGTERM)}))
            print("said before")
            raise InputError("the other one has ended")
        main([])
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "said before\n", "error: the other one has ended\n")


def test_sigterm_lets_files_be_tidied_up_and_ends_with_143(tmp_path):
    done = process(
        f"""
        import os, signal, time
        from hcmen.base.bundle import writing_bundle
        @command("x")
        def main(console):
            with writing_bundle({str(tmp_path / "b")!r}):
                os.kill(os.getpid(), {int(signal.SIGTERM)})
                time.sleep(30)
        main([])
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "error: terminated\n")
    assert not list(tmp_path.iterdir())


def test_an_interrupt_ends_with_130():
    done = process(
        f"""
        import os, time
        @command("x")
        def main(console):
            os.kill(os.getpid(), {int(signal.SIGINT)})
            time.sleep(30)
        main([])
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


def test_text_that_the_terminal_cannot_show_is_no_error():
    done = process(
        """
        @command("x")
        def main(console):
            console.emit({}, "Z\\u00fcrich \\udcff")
            console.warn("\\u65e5")
        main([])
        """,
        env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
    )
    assert done.returncode == 0
    assert "rich" in done.stdout
    assert done.stderr.startswith("warning: ")
    assert done.stderr.count("\n") == 1


def test_progress_shows_itself_only_when_work_takes_long(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("hcmen.base.console.time.monotonic", lambda: clock[0])
    bar = Progress("scoring", 9, "clips")
    for _ in range(3):
        bar.advance()
    assert capsys.readouterr().err == ""
    clock[0] = 11.0
    bar.advance(2)
    bar.advance()
    bar.close()
    assert capsys.readouterr().err == "scoring: 5/9 clips, 11 s\n"
    quiet = Progress("scoring", 9, shown=False)
    clock[0] = 99.0
    quiet.advance()
    assert capsys.readouterr().err == ""


def test_progress_rewrites_its_line_on_a_terminal(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("hcmen.base.console.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Console().progress("scoring", 9) as bar:
        clock[0] = 2.0
        bar.advance()
    line = "scoring: 1/9, 2 s"
    assert capsys.readouterr().err == f"\r{line}\r{' ' * len(line)}\r"


@pytest.mark.parametrize(
    ("environment", "colored"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_colour_needs_a_terminal_and_leave(monkeypatch, environment, colored):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Console().color is False
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert Console().color is colored
