"""The files of a run's folder: what they are called, and how a run begins in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from hcmen.base.errors import InputError
from hcmen.base.files import check_writable, refused

__all__ = [
    "CLIPS",
    "CURVES",
    "REPORT",
    "SEVERAL",
    "TENSORBOARD",
    "TOKENIZER",
    "WANDB_ID",
    "check_free",
    "clear",
    "finished_runs",
    "seed_folder",
]

CURVES, CLIPS, REPORT, TOKENIZER = "curves.png", "clips", "report.json", "tokenizer.json"
SEVERAL = "run.json"
"""The settings of several runs, one for each seed, in the folder above theirs."""
TENSORBOARD, WANDB_ID = "tensorboard", "wandb_id.txt"
"""The folder of TensorBoard's events, and by what W&B knows the run."""
_OUTPUTS = (
    *("checkpoint.safetensors", "config.json", "last.safetensors", "log.jsonl", CURVES, REPORT, TOKENIZER),
    *(SEVERAL, WANDB_ID),
)


def check_free(out: Path, force: bool) -> None:
    """Refuses to write over a run, and finds out before the training whether `out` can be written."""
    from hcmen.base.bundle import check_no_bundle

    check_no_bundle(out, "a folder for a checkpoint", "choose another --out")
    there = [name for name in _OUTPUTS if (out / name).exists()]
    if there and not force:
        raise InputError(
            f"{out}: holds {there[0]} of a run already: --resume it, start over with --force, or choose another --out"
        )
    with refused(out, "a folder that can be written", "choose another --out"):
        check_writable(out)


def clear(out: Path) -> None:
    """Removes what an earlier run left, or those of several seeds, so that the folder never mixes two runs."""
    # A folder of that name may also be a run that has nothing to do with this one.
    several = out.glob("seed-*") if (out / SEVERAL).is_file() else ()
    for folder in (*(f for f in several if f.is_dir() and not f.is_symlink()), out):
        events = folder / TENSORBOARD
        for path in (
            *(folder / name for name in _OUTPUTS),
            *(folder / CLIPS).glob("*.npz"),
            *events.glob("events.out.tfevents.*"),
        ):
            path.unlink(missing_ok=True)
        if folder != out:
            for emptied in (folder / CLIPS, events, folder):
                with contextlib.suppress(OSError):  # there is something else in it
                    emptied.rmdir()


def seed_folder(out: Path, seed: int) -> Path:
    """Where the run of `seed` lies, of several in `out`."""
    return out / f"seed-{seed}"


def finished_runs(out: Path, seeds: Iterable[int]) -> tuple[list[Path], list[int]]:
    """The folders of the runs in `out` that came to their end, and the seeds of the others."""
    ended = {seed: (seed_folder(out, seed) / REPORT).is_file() for seed in seeds}
    return [seed_folder(out, seed) for seed, end in ended.items() if end], [s for s, end in ended.items() if not end]
