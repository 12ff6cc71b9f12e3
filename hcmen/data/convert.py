"""The command hcmen-convert: an MMSA pickle or a table, once, into a folder of mapped arrays (hcmen/data/folder.py).

What follows is of pickles; hcmen/data/table is of tables. Memory stays below 200 MB whatever the size of the file, for
the files of MMSA's layout in pickle protocols 2 to 5: the file is mapped, converted in pieces of a few megabytes, and
the pages of the map are given back after each piece, so that the bound holds for the resident set with the map in it.
Beyond the pieces only what is not an array of numbers is held: names, raw texts and lists of lengths, about 1 KB per
sample. (Arrays in Fortran order need more time, not more memory; protocol 2 needs the arrays' size again as scratch
space beside the output.)
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hcmen.base.console import Console, Progress, command
from hcmen.base.errors import CorruptFileError, InputError
from hcmen.base.files import refused
from hcmen.base.settings import finite

if TYPE_CHECKING:
    from hcmen.data.table.reading import Problem

__all__ = ["convert", "main"]

Shown = Callable[[str, int, int], None]


def convert(
    source: Path,
    out: Path,
    *,
    force: bool = False,
    sha256: str | None = None,
    on_progress: Shown = lambda label, done, total: None,
) -> dict[str, Any]:
    """Converts the MMSA pickle `source` to the folder `out`.

    Args:
        source: the pickle.
        out: the folder, whose parents are made.
        force: replace a data set that is there.
        sha256: the digest (64 hex digits) that the file must have.
        on_progress: called with what is being done, bytes done, bytes in all.

    Returns:
        What dataset.json says.

    Raises:
        InputError: no such file, or not of MMSA's layout; `out` is taken or cannot be written.
        CorruptFileError: the file has another digest, is damaged, or holds anything but arrays, strings and numbers.
    """
    from hcmen.data.folder import check_free, write_folder
    from hcmen.data.layout import open_splits
    from hcmen.data.unpickle import MappedPickle

    _check_digest(sha256)
    if source.is_dir():
        raise InputError(f"{source}: is a directory, expected a data file in MMSA's layout")
    with MappedPickle(source, scratch=out.parent) as pickled:
        check_free(out, force)
        digest, done = hashlib.sha256(), 0
        for piece in pickled.pieces():
            digest.update(piece)
            done += len(piece)
            on_progress("checksum", done, pickled.size)
        found = digest.hexdigest()
        if sha256 is not None and found != sha256.lower():
            raise CorruptFileError(
                f"{source}: SHA-256 is {found}, expected {sha256.lower()}: another file, or a damaged one: get it "
                "again, or correct --sha256"
            )
        with refused(out.parent, "scratch space", "choose another place"):
            data = pickled.load()
        splits = open_splits(data, str(source))
        total = sum(4 * raw.size for split in splits.values() for raw in split.raw.values())
        done = 0

        def written(count: int) -> None:
            nonlocal done
            done += count
            on_progress("converting", done, total)

        origin = {"file": source.name, "bytes": pickled.size, "sha256": found}
        return write_folder(out, splits, origin, pickled.release, written)


def _check_digest(sha256: str | None) -> None:
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise InputError(f"the SHA-256 '{sha256}' is no digest, expected 64 hexadecimal digits")


_REPORTED = (
    "source",
    "cleaned",
    "misplaced",
    "left_out",
    "label_min",
    "label_max",
    "label_range",
    "front_ends",
    "splits",
)


_LISTED = 20
"""Bad rows that are told one by one."""
_UNITS = {"reading": ("rows", 1)}
"""Of progress, which else is in megabytes."""


def _range(context: click.Context, param: click.Parameter, value: str | None) -> tuple[float, float] | None:
    if value is None:
        return None
    with contextlib.suppress(ValueError):
        low, high = map(float, value.split(","))
        if finite(low) and finite(high) and low < high:
            return low, high
    raise click.BadParameter(f"'{value}' is no range, expected two numbers in rising order, such as -3,3")


@command(
    "hcmen-convert",
    examples=(
        "hcmen-convert mosi.pkl build/mosi",
        "hcmen-convert reviews.csv build/reviews --text-encoder bert",
        "hcmen-train --data build/reviews --text-encoder bert",
    ),
    groups={
        "Tables": ("text_encoder", "max_tokens", "label_range", "seed", "context", "skip_bad", "jobs"),
        "Files": ("force", "sha256"),
    },
)
@click.argument("source", metavar="FILE", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT_DIR", type=click.Path(path_type=Path))
@click.option(
    "--text-encoder",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Folder of the BERT whose tokenizer.json makes tokens of the words in column text, or its installed package: "
    "minilm is that of hcmen[minilm].",
)
@click.option(
    "--max-tokens", type=click.IntRange(3, 1 << 16), help="Cut longer texts.  [default: 128, or what the encoder takes]"
)
@click.option(
    "--label-range",
    metavar="MIN,MAX",
    callback=_range,
    help="The scale that the labels are on, such as -3,3; others are refused.  [default: by the labels]",
)
@click.option("--seed", type=click.IntRange(0), help="Of the splits, where the table has none.  [default: 0]")
@click.option(
    "--context",
    type=click.IntRange(0, 100),
    metavar="N",
    help="Make of each row of feature columns a sequence: itself, then up to N neighbours of its group.  [default: 0]",
)
@click.option("--skip-bad", is_flag=True, help="Leave out rows that cannot be used, instead of refusing the table.")
@click.option("--jobs", type=click.IntRange(1, 1024), help="Processes that read clips and words.  [default: the cores]")
@click.option("--force", is_flag=True, help="Replace a converted data set that OUT_DIR holds already.")
@click.option("--sha256", metavar="DIGEST", help="Refuse FILE unless this is its SHA-256 (64 hex digits).")
def main(
    console: Console,
    source: Path,
    out: Path,
    force: bool,
    sha256: str | None,
    skip_bad: bool,
    jobs: int | None,
    **given: Any,
) -> None:
    """Convert a data set to a folder of memory-mapped arrays, once.

    FILE is an MMSA data file (MOSI, MOSEI, SIMS, SIMSv2: .pkl) or a table of your own: .csv, .tsv, .jsonl or .parquet
    with columns id, label and any of text (words), clip (a path to an .npz), split, group, and audio.0, audio.1, ...

    hcmen-train and hcmen-clip take the folder wherever they take the file, with the same results. Of a pickle less than
    200 MB of memory are used, whatever the size of the file.
    """
    from hcmen.data import cleaned_notes
    from hcmen.data.table.conversion import BadRows, TableOptions, convert_table
    from hcmen.data.table.reading import SUFFIXES

    bars: dict[str, Progress] = {}

    def show(label: str, done: int, total: int) -> None:
        unit, size = _UNITS.get(label, ("MB", 10**6))
        if label not in bars:
            for bar in bars.values():
                bar.close()
            bars[label] = Progress(label, -(-total // size), unit, shown=console.verbosity >= 0)
        bars[label].advance(done // size - bars[label].done)

    chosen = {name: value for name, value in given.items() if value is not None}
    left_out: list[Problem] = []
    notes: list[str] = []
    try:
        if source.suffix.lower() in SUFFIXES:
            _check_digest(sha256)
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            options = TableOptions(**chosen, skip_bad=skip_bad, jobs=jobs or cores)
            index, left_out = convert_table(
                source, out, options, force=force, sha256=sha256, on_progress=show, on_note=notes.append
            )
        else:
            if chosen or skip_bad or jobs is not None:
                name = next(iter([*chosen, *(["skip_bad"] if skip_bad else []), "jobs"])).replace("_", "-")
                raise click.UsageError(f"--{name} is for a table ({', '.join(SUFFIXES)}), not for '{source.name}'")
            index = convert(source, out, force=force, sha256=sha256, on_progress=show)
    except BadRows as error:
        _tell(console, error.problems, console.error)
        if console.format == "json":
            console.emit({"out": None, "source": str(source), "rows": _listed(error.problems)}, "")
        raise
    finally:
        for bar in bars.values():
            bar.close()
        for note in notes:
            console.note(note)
    _tell(console, left_out, console.warn)
    for note in cleaned_notes(index["cleaned"], index["misplaced"], "are 0 now"):
        console.note(note)
    for split, reason in index["left_out"].items():
        console.note(f"{split}: text_bert is left out ({reason})")
    samples = {name: split["samples"] for name, split in index["splits"].items()}
    console.emit(
        {"out": str(out), **{key: index[key] for key in _REPORTED}},
        f"{out}: {', '.join(f'{count} {name}' for name, count in samples.items())}, labels {index['label_min']:g} to "
        f"{index['label_max']:g}, from {source.name} (SHA-256 {index['source']['sha256']})",
    )


def _tell(console: Console, problems: Sequence[Problem], say: Callable[[str], None]) -> None:
    """The first bad rows, a line each, and how many more there are."""
    for problem in problems[:_LISTED]:
        name = f" ({problem.id[:100]})" if problem.id else ""
        say(f"row {problem.row}{name}: {problem.reason}")
    if len(problems) > _LISTED:
        say(f"and {len(problems) - _LISTED} rows more, which --format json lists")


def _listed(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    return [{"row": p.row, "id": p.id, "reason": p.reason} for p in problems]


if __name__ == "__main__":
    main()
