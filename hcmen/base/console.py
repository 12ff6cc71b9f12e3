"""What every command line of hcmen shares: options, one-line errors, exit codes, text or JSON, progress.

Used by hcmen-run and hcmen-doctor, and by the training and export commands, so it imports neither torch nor
onnxruntime. A command is written as

    @command("hcmen-run")
    @click.argument("clips", nargs=-1)
    def main(console: Console, clips: tuple[str, ...]) -> None:
        ...
        console.emit(data, text)

and gets `--format`, `-v`, `-q` and `--version` with it. Exit codes:

    0    ok
    1    a check ran and said no (CheckFailed)
    2    usage, bad input, or a file that cannot be read or written (InputError, OSError)
    3    a backend, library or Python package is missing (BackendError, ModuleNotFoundError)
    5    a corrupt or unsafe file (CorruptFileError)
    70   an error nobody expected: a defect of hcmen
    130  interrupted (Ctrl-C); 143 terminated (SIGTERM); 141 the reader of a pipe went away

Data goes to stdout; errors, warnings, notes and progress go to stderr, each as one line. A traceback appears with
`-v` alone. NO_COLOR is honoured.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, TextIO

import click

import hcmen
from hcmen.base.errors import EXIT_INTERRUPTED, HcmenError, did_you_mean, several_names, shortened
from hcmen.base.interrupts import end_by_signal, told
from hcmen.base.modalities import VARIANTS, variant_meant

__all__ = [
    "EXIT_BROKEN_PIPE",
    "EXIT_INTERNAL",
    "EXIT_TERMINATED",
    "Choice",
    "Command",
    "Console",
    "Progress",
    "VariantChoice",
    "command",
    "describe_error",
    "end_at_once",
    "one_line",
]

EXIT_INTERNAL = 70
EXIT_BROKEN_PIPE = 141
EXIT_TERMINATED = 143

JSON_SCHEMA_VERSION = 1

_EXTRAS = {
    **dict.fromkeys(("torch", "safetensors", "rich", "matplotlib"), "train"),
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "cpu",
    "transformers": "text",
    "tensorrt_rtx_bindings": "rtx",
    **{name: name for name in ("tensorrt", "tensorboard", "wandb")},
}


def one_line(message: object) -> str:
    """`message` on a single line, with control characters (a file name may hold some) made visible."""
    text = " ".join(shortened(str(message)).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def describe_error(error: BaseException) -> tuple[str, int]:
    """The line that tells of `error`, and the exit code it becomes."""
    if isinstance(error, HcmenError):
        return one_line(error), error.exit_code
    if isinstance(error, click.UsageError):
        from hcmen.base.typed import as_called

        where = f" (see {as_called(error.ctx.command_path)} --help)" if error.ctx is not None else ""
        return one_line(error.format_message()) + where, 2
    if isinstance(error, click.ClickException):
        return one_line(error.format_message()), 2
    if isinstance(error, (KeyboardInterrupt, click.Abort, EOFError)):
        return "interrupted", EXIT_INTERRUPTED
    if isinstance(error, _Terminated):
        return "terminated", EXIT_TERMINATED
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in _EXTRAS:
        package = (error.name or "").partition(".")[0]
        return f"{package} is not installed: pip install 'hcmen[{_EXTRAS[package]}]'", 3
    if isinstance(error, OSError):
        return _describe_os_error(error), 2
    if isinstance(error, MemoryError):
        return "out of memory: end other programs, or give less at a time", EXIT_INTERNAL
    if isinstance(error, getattr(sys.modules.get("torch"), "OutOfMemoryError", ())):
        return "the GPU has no memory left: end what else uses it, or give less at a time", 3
    what = one_line(error) or "no message"
    return f"unexpected {type(error).__name__}: {what} (run again with -v for the traceback)", EXIT_INTERNAL


_OS_HINTS = {
    errno.ENOSPC: "free some space or choose another place",
    errno.EDQUOT: "free some space or choose another place",
    errno.EACCES: "check the owner and the permissions",
    errno.EPERM: "check the owner and the permissions",
    errno.EROFS: "choose a place that can be written",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file, expected a folder",
    errno.EISDIR: "expected a file",
}


def _describe_os_error(error: OSError) -> str:
    reason = (error.strerror or type(error).__name__).lower()
    path = error.filename2 or error.filename
    name = f"{os.fsdecode(path) if isinstance(path, (str, bytes)) else path}: " if path is not None else ""
    hint = _OS_HINTS.get(error.errno or 0)
    return one_line(f"{name}{reason}{f', {hint}' if hint else ''}")


class _Interrupted(KeyboardInterrupt):
    """Ctrl-C, as an exception."""


class _Terminated(BaseException):
    """SIGTERM, as an exception, so that half-written files are removed on the way out."""


class Choice(click.Choice):  # type: ignore[type-arg,unused-ignore]
    """click.Choice whose error suggests the nearest choice, and says how several are given."""

    def meant(self, value: str) -> str | None:
        """The choice that `value` says in other words, or None."""
        return None

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The choice `value`; a usage error with a suggestion when it is none."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            names = [str(c) for c in self.choices]
            several = several_names(str(value), names)
            if several and param is not None and param.multiple and param.opts:
                self.fail(f"'{value}': repeat the option: {' '.join(f'{param.opts[0]} {n}' for n in several)}")
            if several:
                self.fail(f"'{value}': takes one at a time: choose {' or '.join(several)}", param, ctx)
            meant = self.meant(str(value))
            near = f"did you mean '{meant}'?" if meant else did_you_mean(str(value), names)
            hint = f"{near} choose from {', '.join(names)}".lstrip()
            self.fail(f"'{value}': {hint}", param, ctx)


class VariantChoice(Choice):
    """A choice of variants, in front of them those of `more`; other words for a variant are understood in its error."""

    def __init__(self, *more: str):
        super().__init__([*more, *(v.name for v in VARIANTS)])

    def meant(self, value: str) -> str | None:
        """As `Choice.meant`."""
        return variant_meant(value)


def _color_wanted(stream: TextIO) -> bool:
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and stream.isatty()


def _echo_error(line: str) -> None:
    _echo_marked("error:", "red", line)


def _echo_marked(mark: str, color: str, line: str) -> None:
    click.echo(f"{click.style(mark, fg=color)} {line}", err=True, color=_color_wanted(sys.stderr))


@dataclass(frozen=True)
class Console:
    """Where a command says things: results to stdout in the format asked for, everything else to stderr.

    format: "text" or "json". verbosity: -1 with -q, 0, 1 with -v, 2 with -vv.
    """

    format: str = "text"
    verbosity: int = 0

    @property
    def color(self) -> bool:
        """Whether colour suits stdout: a terminal, and NO_COLOR not set."""
        return _color_wanted(sys.stdout)

    def emit(self, data: Mapping[str, Any], text: str) -> None:
        """The command's result: `data` as JSON (with its schema_version) or `text`, to stdout."""
        if self.format == "json":
            document = {"schema_version": JSON_SCHEMA_VERSION, **data}
            click.echo(json.dumps(document, indent=2, ensure_ascii=True, allow_nan=False))
        else:
            click.echo(text, color=self.color)

    def error(self, error: object) -> None:
        """One line on stderr, also with -q: for an error after which the command goes on."""
        _echo_error(one_line(error))

    def warn(self, message: object) -> None:
        """One line on stderr, also with -q: something the caller must know, such as a slow way being taken."""
        _echo_marked("warning:", "yellow", one_line(message))

    def note(self, message: object) -> None:
        """One line on stderr, unless -q."""
        if self.verbosity >= 0:
            click.echo(one_line(message), err=True)

    def block(self, text: str) -> None:
        """Text of several lines, such as a table, on stderr as it is, unless -q."""
        if self.verbosity >= 0:
            click.echo(text, err=True)

    def detail(self, message: object) -> None:
        """One line on stderr, with -v."""
        if self.verbosity >= 1:
            click.echo(one_line(message), err=True)

    @contextlib.contextmanager
    def progress(self, label: str, total: int, unit: str = "") -> Iterator[Progress]:
        """Shows on stderr how far `total` steps have come (0: of unknown many), after 1 or 10 s; not with -q."""
        bar = Progress(label, total, unit, shown=self.verbosity >= 0)
        try:
            yield bar
        finally:
            bar.close()


class Progress:
    """A count that shows itself: one line rewritten on a terminal, else a line every ten seconds."""

    def __init__(self, label: str, total: int, unit: str = "", *, shown: bool = True):
        self.label, self.total, self.unit, self.shown, self.done = label, total, unit, shown, 0
        self._terminal = sys.stderr.isatty()
        self._started = time.monotonic()
        self._next = self._started + (1.0 if self._terminal else 10.0)
        self._width = 0

    def advance(self, steps: int = 1) -> None:
        """`steps` more are done."""
        self.done += steps
        now = time.monotonic()
        if not self.shown or now < self._next:
            return
        self._next = now + (0.1 if self._terminal else 10.0)
        unit = f" {self.unit}" if self.unit else ""
        total = f"/{self.total}" if self.total else ""
        line = f"{self.label}: {self.done}{total}{unit}, {now - self._started:.0f} s"
        if self._terminal:
            click.echo("\r" + line.ljust(self._width), err=True, nl=False)
            self._width = len(line)
        else:
            click.echo(line, err=True)

    def close(self) -> None:
        """Wipes the line on a terminal."""
        if self._width:
            click.echo("\r" + " " * self._width + "\r", err=True, nl=False)
            self._width = 0


_at_once = False


def end_at_once() -> None:
    """Makes the running command end its process without the interpreter's own end, exit code and output as ever.

    For processes with threads of a library's that may touch Python objects to the last.
    """
    global _at_once
    _at_once = True


def _flush() -> None:
    """Writes what waits. What cannot be written goes nowhere, or the interpreter would complain of it after us."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)


def _closed_streams_to_null() -> list[str]:
    """The standard streams that the caller had closed, which are /dev/null from here on.

    Python has None in their place, and the next file that is opened would get their number.
    """
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    for name in closed:
        number = ("stdin", "stdout", "stderr").index(name)
        null = os.open(os.devnull, os.O_RDWR)
        try:
            os.fstat(number)
        except OSError:
            os.dup2(null, number)
            os.close(null)
            null = number
        stream = open(null, "r" if name == "stdin" else "w", encoding="utf-8")  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    return closed


class Command(click.Command):
    """A click command whose every way out is an exit code of this module and at most one line on stderr.

    examples: command lines for the help, each as it is typed. groups: heading -> names of the options below it.
    """

    examples: Sequence[str] = ()
    groups: Mapping[str, Sequence[str]] = {}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options under the headings of `groups`, then those in none."""
        records: dict[str, list[tuple[str, str]]] = {}
        heading = {name: title for title, names in self.groups.items() for name in names}
        for title in self.groups:
            records[title] = []
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and not isinstance(param, click.Argument):
                records.setdefault(heading.get(param.name or "", "Output and help"), []).append(record)
        for title, rows in records.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples, then the epilog."""
        if self.examples:
            with formatter.section("Examples"):
                formatter.write("".join(f"{'':{formatter.current_indent}}{line}\n" for line in self.examples))
        super().format_epilog(ctx, formatter)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs the command and ends the process with its exit code (or returns it, with standalone_mode off)."""
        closed = _closed_streams_to_null()
        stdout = sys.stdout
        for stream in (sys.stdout, sys.stderr):
            # A file name need not be text in the terminal's encoding; that must not become an error of its own.
            with contextlib.suppress(AttributeError, ValueError, OSError):
                stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        with end_by_signal({signal.SIGINT: _Interrupted, signal.SIGTERM: _Terminated}), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            if "stdout" in closed:
                _echo_marked("warning:", "yellow", "stdout is closed, what would be printed there is lost")
            try:
                code = super().main(args, prog_name or self.name, complete_var, standalone_mode=False, **extra)
                if not code:  # else the error has been told
                    sys.stdout.flush()
            except click.exceptions.Exit as stop:
                code = stop.exit_code
            except SystemExit as stop:
                # So click ends what it prints itself, its help, when nobody reads it: with 1, and another stdout.
                code = EXIT_BROKEN_PIPE if sys.stdout is not stdout else stop.code
            except BaseException as error:
                code = _report(error, verbose=_asked_for_details(args))
        code = code if isinstance(code, int) else 0
        _flush()
        if standalone_mode:
            if _at_once:
                os._exit(code)
            sys.exit(code)
        return code

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the body; click would answer Ctrl-C with a line and an exit code of its own."""
        try:
            super().invoke(ctx)
            sys.stdout.flush()
        except click.exceptions.Exit:
            raise
        except BaseException as error:
            ctx.exit(_report(error, verbose=bool(ctx.params.get("verbose"))))


def _asked_for_details(args: Sequence[str] | None) -> bool:
    """Whether -v was among the arguments, for errors before they are parsed."""
    words = sys.argv[1:] if args is None else args
    return any(w in ("-v", "-vv", "--verbose") for w in words)


def _report(error: BaseException, *, verbose: bool) -> int:
    """Says what happened, on stderr; the exit code."""
    told()
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0
    if isinstance(error, BrokenPipeError):
        return EXIT_BROKEN_PIPE
    line, code = describe_error(error)
    if verbose and not isinstance(error, (click.ClickException, KeyboardInterrupt)):
        click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    # A launcher such as torchrun starts a command several times, and all are used wrongly in the same way.
    several = os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0"
    if several and isinstance(error, click.ClickException):
        return code
    with contextlib.suppress(OSError):
        _echo_error(line)
    _sigterm_ends(code)
    return code


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
) -> None:
    _echo_marked("warning:", "yellow", one_line(message))


def _sigterm_ends(code: int) -> None:
    """Has a SIGTERM end the process with `code`: what happened has been said, and torchrun, which stops the others when
    one process fails, would make it two lines.
    """
    if threading.current_thread() is not threading.main_thread():
        return

    def end(number: int, frame: FrameType | None) -> None:
        _flush()
        os._exit(code)

    signal.signal(signal.SIGTERM, end)


def command(
    name: str,
    *,
    epilog: str | None = None,
    kind: type[Command] = Command,
    examples: Sequence[str] = (),
    groups: Mapping[str, Sequence[str]] | None = None,
) -> Callable[[Callable[..., None]], Command]:
    """Makes a function into the command `name` with the shared options; it gets a `Console` as first argument.

    `examples` and `groups` shape the help: see `Command`.

    The function's docstring is the help text. click's own decorators for arguments and options go below this one.
    """

    def wrap(function: Callable[..., None]) -> Command:
        def callback(*, output_format: str, verbose: int, quiet: bool, **arguments: Any) -> None:
            function(Console(output_format, -1 if quiet else verbose), **arguments)

        params: list[click.Parameter] = list(reversed(getattr(function, "__click_params__", [])))
        params += [
            click.Option(
                ["--format", "output_format"],
                type=Choice(["text", "json"]),
                default="text",
                show_default=True,
                help="How results are printed on stdout.",
            ),
            click.Option(["-v", "--verbose"], count=True, help="Say more; on an error show the traceback."),
            click.Option(["-q", "--quiet"], is_flag=True, help="Say nothing but results, warnings and errors."),
        ]
        from hcmen.base.completion import complete_files

        complete_files(params)
        made = kind(
            name,
            params=params,
            callback=callback,
            help=function.__doc__,
            epilog=epilog,
            context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
        )
        made.examples, made.groups = examples, groups or {}
        return click.version_option(hcmen.__version__, prog_name=name, message="%(prog)s %(version)s")(made)

    return wrap
