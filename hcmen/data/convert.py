"""The command hcmen-convert: an MMSA pickle, once, into a folder of mapped arrays (hcmen/data/folder.py).

Memory stays below 200 MB whatever the size of the file, for the files of MMSA's layout in pickle protocols 2 to 5: the
file is mapped, converted in pieces of a few megabytes, and the pages of the map are given back after each piece, so
that the bound holds for the resident set with the map in it. Beyond the pieces only what is not an array of numbers is
held: names, raw texts and lists of lengths, about 1 KB per sample. (Arrays in Fortran order need more time, not more
memory; protocol 2 needs the arrays' size again as scratch space beside the output.)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from hcmen.base.console import Console, Progress, command
from hcmen.base.errors import CorruptFileError, InputError
from hcmen.base.files import refused

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

    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise InputError(f"the SHA-256 '{sha256}' is no digest, expected 64 hexadecimal digits")
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


@command(
    "hcmen-convert",
    examples=("hcmen-convert mosi.pkl build/mosi", "hcmen-train --data build/mosi"),
)
@click.argument("source", metavar="FILE.pkl", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT_DIR", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace a converted data set that OUT_DIR holds already.")
@click.option("--sha256", metavar="DIGEST", help="Refuse FILE.pkl unless this is its SHA-256 (64 hex digits).")
def main(console: Console, source: Path, out: Path, force: bool, sha256: str | None) -> None:
    """Convert an MMSA data file (MOSI, MOSEI, SIMS, SIMSv2) to a folder of memory-mapped arrays, once.

    hcmen-train and hcmen-clip take the folder wherever they take the file, with the same results. Less than 200 MB of
    memory are used, whatever the size of the file.
    """
    from hcmen.data import cleaned_notes

    bars: dict[str, Progress] = {}

    def show(label: str, done: int, total: int) -> None:
        if label not in bars:
            for bar in bars.values():
                bar.close()
            bars[label] = Progress(label, -(-total // 10**6), "MB", shown=console.verbosity >= 0)
        bars[label].advance(done // 10**6 - bars[label].done)

    try:
        index = convert(source, out, force=force, sha256=sha256, on_progress=show)
    finally:
        for bar in bars.values():
            bar.close()
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


if __name__ == "__main__":
    main()
