"""How a training shows itself on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hcmen.base.console import Console

__all__ = ["shown"]


@contextmanager
def shown(console: Console, epochs: int, done: int) -> Iterator[tuple[Callable[[Any], None], Callable[[Any], None]]]:
    """Callbacks that show the training on stderr: a bar on a terminal, else a line per epoch; nothing with -q."""
    if console.verbosity < 0:
        yield (lambda _: None), (lambda _: None)
        return

    def line(record: Mapping[str, Any]) -> str:
        best = " (best so far)" if record["best"] else ""
        return (
            f"epoch {record['epoch']}/{epochs}: loss {record['loss']:.4f}, "
            f"validation MAE {record['validation_mae']:.4f}{best}, {record['seconds']:.1f} s"
        )

    if not sys.stderr.isatty():
        yield (lambda _: None), (lambda record: console.note(line(record)))
        return

    from rich.console import Console as Terminal
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    terminal = Terminal(stderr=True)
    columns = (
        "{task.description}",
        BarColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=terminal) as bar:
        task = bar.add_task(f"epoch {done + 1}/{epochs}", total=float(epochs), completed=float(done), status="")
        latest = ""

        def on_step(progress: Any) -> None:
            bar.update(
                task,
                description=f"epoch {progress.epoch}/{epochs}",
                completed=progress.epoch - 1 + progress.step / progress.steps,
                status=f"loss {progress.loss:.4f}{latest}",
            )

        def on_epoch(record: Mapping[str, Any]) -> None:
            nonlocal latest
            latest = f"  validation MAE {record['validation_mae']:.4f}"
            if record["best"] or console.verbosity > 0:
                bar.console.print(line(record), highlight=False)

        yield on_step, on_epoch
