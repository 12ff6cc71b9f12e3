"""What a shell completes: the commands under `hcmen`, their options and choices, and files for all else."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = ["Umbrella", "complete_files"]


class Umbrella(click.Group):
    """The commands as one group, of which a module is imported when a word of that command is completed.

    homes: name -> (the command's module, its purpose).
    """

    def __init__(self, homes: Mapping[str, tuple[str, str]], params: Sequence[click.Parameter]):
        super().__init__("hcmen", params=list(params))
        self.homes = homes

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names."""
        return list(self.homes)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command `cmd_name`; None if there is none."""
        home = self.homes.get(cmd_name)
        found: click.Command | None = importlib.import_module(home[0]).main if home else None
        return found

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The commands by their names, and the options; click's own way would import every command for its help."""
        from click.shell_completion import CompletionItem

        names = [CompletionItem(n, help=what) for n, (_, what) in self.homes.items() if n.startswith(incomplete)]
        return [*names, *click.Command.shell_complete(self, ctx, incomplete)]


class _Text(click.types.StringParamType):
    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """What the shell itself completes, which are files."""
        # Every command has this module, and only a shell that asks needs click's.
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="file")]


def complete_files(params: Sequence[click.Parameter]) -> None:
    """Lets plain text among `params` be completed as files: a shell that asks us offers nothing of its own."""
    for param in params:
        if type(param.type) is click.types.StringParamType:
            param.type = _Text()
