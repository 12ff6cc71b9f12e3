"""The files of a run's folder: what they are called, and how a run begins in it."""

from __future__ import annotations

from pathlib import Path

from hcmen.base.errors import InputError
from hcmen.base.files import check_writable, refused

__all__ = ["CLIPS", "CURVES", "REPORT", "TOKENIZER", "check_free", "clear"]

CURVES, CLIPS, REPORT, TOKENIZER = "curves.png", "clips", "report.json", "tokenizer.json"
_OUTPUTS = ("checkpoint.safetensors", "config.json", "last.safetensors", "log.jsonl", CURVES, REPORT, TOKENIZER)


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
    """Removes what an earlier run left, so that the folder never mixes two runs."""
    for path in (*(out / name for name in _OUTPUTS), *(out / CLIPS).glob("*.npz")):
        path.unlink(missing_ok=True)
