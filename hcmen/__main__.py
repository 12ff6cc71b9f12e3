"""`hcmen COMMAND` and `python -m hcmen COMMAND`: every command of hcmen under one name.

A command's module is imported when it is called and not before, so that `hcmen --help` costs what click costs.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import click

import hcmen
from hcmen.base.console import Choice, Command

__all__ = ["COMMANDS", "main"]


_ASKED = "_HCMEN_COMPLETE"
"""By this variable a shell asks for what a word can be completed to; click derives its name from the program's."""


class _Home(NamedTuple):
    """Where a command is, and what it does."""

    module: str
    purpose: str


COMMANDS = {
    "train": _Home("hcmen.training.command", "Train a model; without data, on a synthetic set."),
    "eval": _Home("hcmen.evaluation.command", "Judge a model with modalities and steps missing."),
    "export": _Home("hcmen.export.commands.export", "Export a checkpoint to a bundle of ONNX graphs."),
    "run": _Home("hcmen.runtime.commands.run", "Score clips with a bundle, and check the bundle."),
    "follow": _Home("hcmen.runtime.commands.follow", "Score a recording, window by window, as its chunks appear."),
    "bench": _Home("hcmen.runtime.benchmark.command", "Measure a bundle beside what could run instead."),
    "doctor": _Home("hcmen.runtime.commands.doctor", "Check what is installed and works here."),
    "convert": _Home("hcmen.data.convert", "Convert a data file for training in bounded memory."),
    "clip": _Home("hcmen.data.cut", "Cut samples of a data set out as clips."),
    "compile": _Home("hcmen.export.commands.compile", "Compile a bundle to TensorRT engines, on the device."),
    "export-mamba": _Home("hcmen.export.commands.export_mamba", "Export anybody's Mamba model to one ONNX file."),
}


class _Hcmen(Command):
    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *more: Any, **extra: Any) -> Any:
        """Hands the words after a command's name to that command; this one answers all others itself."""
        if _ASKED in os.environ:
            from hcmen.base.completion import Umbrella

            Umbrella(COMMANDS, [p for p in self.get_params(click.Context(self)) if isinstance(p, click.Option)]).main(
                [], "hcmen", complete_var=_ASKED
            )
        words = list(sys.argv[1:] if args is None else args)
        if words and words[0] in COMMANDS:
            chosen: Command = importlib.import_module(COMMANDS[words[0]].module).main
            return chosen.main(words[1:], f"hcmen {words[0]}", *more, **extra)
        return super().main(words[:1] or ["--help"], "hcmen", *more, **extra)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands, then the options."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, home.purpose) for name, home in COMMANDS.items()])
        super().format_options(ctx, formatter)


main = click.version_option(hcmen.__version__, prog_name="hcmen", message="%(prog)s %(version)s")(
    _Hcmen(
        "hcmen",
        params=[click.Argument(["command"], type=Choice(list(COMMANDS)), metavar="COMMAND")],
        help="A Mamba model from PyTorch to an edge device: `hcmen COMMAND --help` tells of each step.",
        epilog="Each command is there as hcmen-COMMAND too.",
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
)

if __name__ == "__main__":
    main()
