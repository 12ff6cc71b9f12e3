"""The command hcmen-clip: single samples of a data set, as the .npz clips that hcmen-run reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hcmen.base.console import Choice, Console, command
from hcmen.base.errors import InputError, did_you_mean, unknown_name
from hcmen.base.modalities import MODALITIES
from hcmen.data import SPLITS

if TYPE_CHECKING:
    from hcmen.data.layout import RawSplit

__all__ = ["main"]


@command(
    "hcmen-clip",
    examples=(
        "hcmen-clip mosi.pkl --index 3 --out clip.npz",
        "hcmen-clip build/mosi --split valid --all --modalities text,audio --out clips",
    ),
    groups={"Samples": ("split", "indices", "ids", "everything"), "Clips": ("modalities", "text", "out", "force")},
)
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--split", type=Choice(list(SPLITS)), default="test", show_default=True, help="Which split to cut from.")
@click.option(
    "--index", "indices", type=click.IntRange(min=0), multiple=True, help="Sample number, from 0; repeatable."
)
@click.option("--id", "ids", multiple=True, help="Name of the sample, such as 'video$_$3'; repeatable.")
@click.option("--all", "everything", is_flag=True, help="Every sample of the split.")
@click.option(
    "--modalities",
    metavar="NAMES",
    help="What the clips carry, separated by commas; the others are left out.  [default: all that the data has]",
)
@click.option(
    "--text",
    type=Choice(["features", "tokens"]),
    help="The text as features, or as tokens for a bundle with a text encoder.  [default: features, if there]",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="The clip (one sample, a name in .npz), or the folder for SPLIT-INDEX.npz.",
)
@click.option("--force", is_flag=True, help="Write over clips that are there.")
def main(
    console: Console,
    data: Path,
    split: str,
    indices: tuple[int, ...],
    ids: tuple[str, ...],
    everything: bool,
    modalities: str | None,
    text: str | None,
    out: Path,
    force: bool,
) -> None:
    """Cut clips for hcmen-run out of DATA, an MMSA data file (.pkl) or a folder that hcmen-convert wrote.

    A clip holds the valid steps of one sample, NaN and infinity set to zero, as hcmen-train sees them.
    """
    if everything == bool(indices or ids):
        raise click.UsageError("name samples with --index or --id, or take every one with --all")
    kept = None if modalities is None else _modalities(modalities)
    source = _opened(data, split)
    text, kept = _carried(source, text, kept, f"{data}: {split}")
    chosen = range(len(source)) if everything else _chosen(f"{data}: {split}", source.ids, indices, ids)
    if out.suffix == ".npz":
        if len(chosen) > 1:
            raise InputError(f"{out}: one clip, and {len(chosen)} samples are asked for: give a folder")
        paths = {chosen[0]: out}
    else:
        paths = {i: out / f"{split}-{i:05d}.npz" for i in chosen}
    there = next((path for path in paths.values() if path.exists()), None)
    if there is not None and not force:
        raise InputError(f"{there}: is there already: write over it with --force, or choose another --out")

    from hcmen.base.clip import TEXT_TOKENS, write_clip

    (out.parent if out.suffix == ".npz" else out).mkdir(parents=True, exist_ok=True)
    clips: list[dict[str, Any]] = []
    with console.progress("cutting", len(paths), "clips") as bar:
        for i, path in paths.items():
            features = {m: x for m, x in source.sample(i).items() if m in kept}
            arrays: dict[str, Any] = dict(features)
            steps = {m: len(x) for m, x in features.items()}
            if text == "tokens" and "text" in kept:
                arrays.pop("text", None)
                arrays[TEXT_TOKENS] = _tokens(source, i, f"{data}: {split}")
                steps["text"] = arrays[TEXT_TOKENS].shape[1]
            write_clip(path, arrays)
            clips.append(
                {
                    "path": str(path),
                    "index": i,
                    "id": source.ids[i],
                    "label": float(source.labels[i]),
                    "steps": steps,
                }
            )
            bar.advance()
    console.emit({"data": str(data), "split": split, "clips": clips}, "\n".join(map(_line, clips)))


def _tokens(source: RawSplit, index: int, where: str) -> Any:
    tokens = source.tokens(index)
    if tokens is None:
        raise InputError(f"{where}: lacks 'text_bert', expected token ids for --text tokens: take --text features")
    return tokens


def _carried(source: RawSplit, text: str | None, kept: set[str] | None, where: str) -> tuple[str, set[str]]:
    """How the text is carried, and the modalities: those that are asked for, or all that are there."""
    tokens = source.text_bert is not None
    if text is None:
        text = "tokens" if tokens and "text" not in source.raw else "features"
    there = set(source.raw) - {"text"} | ({"text"} if "text" in source.raw or tokens else set())
    missing = [m for m in MODALITIES if m in (kept or ()) and m not in there]
    if missing:
        has = ", ".join(m for m in MODALITIES if m in there)
        raise InputError(f"has no {' and no '.join(missing)}", has, "name those with --modalities", where=where)
    chosen = there if kept is None else kept
    if "text" in chosen and text == "features" and "text" not in source.raw:
        raise InputError("has text as tokens alone", "text features for --text features", "--text tokens", where=where)
    return text, chosen


def _line(clip: dict[str, Any]) -> str:
    steps = ", ".join(f"{m} {n}" for m, n in clip["steps"].items())
    return f"{clip['path']}: sample {clip['index']} ({clip['id']}), label {clip['label']:g}, steps {steps}"


def _modalities(value: str) -> set[str]:
    names = [name.strip() for name in value.split(",")]
    for name in names:
        if name not in MODALITIES:
            raise click.UsageError(f"--modalities: {unknown_name('modality', name, MODALITIES)}")
    return set(names)


def _opened(path: Path, split: str) -> RawSplit:
    """The split, as it is stored: of a large file only what is cut out is converted."""
    from hcmen.data.folder import map_arrays
    from hcmen.data.layout import open_split
    from hcmen.data.unpickle import load_pickle

    return open_split(map_arrays(path, split) if path.is_dir() else load_pickle(path), split, str(path))


def _chosen(where: str, names: Sequence[str], indices: Sequence[int], ids: Sequence[str]) -> list[int]:
    """The samples asked for, each once, in the order of the split."""
    found = set()
    for index in indices:
        if index >= len(names):
            raise InputError(f"{where}: has no sample {index}, expected 0 to {len(names) - 1}")
        found.add(index)
    for name in ids:
        places = [i for i, other in enumerate(names) if other == name]
        if not places:
            hint = did_you_mean(name, names)
            what = f"has no sample called '{name}'" + ("" if hint else f", its first is '{names[0]}'")
            raise InputError(what, fix=hint, where=where)
        if len(places) > 1:
            first, second = places[:2]
            raise InputError(f"{where}: samples {first} and {second} are both called '{name}': choose with --index")
        found.add(places[0])
    return sorted(found)


if __name__ == "__main__":
    main()
