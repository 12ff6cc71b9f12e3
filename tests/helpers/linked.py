"""A bundle laid out as caches and mounts lay out what they hold: as links to files that lie elsewhere."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

__all__ = ["LAYOUTS", "linked"]


def _files(bundle: Path) -> list[Path]:
    return [p.relative_to(bundle) for p in sorted(bundle.rglob("*")) if p.is_file()]


def _hugging_face(bundle: Path, place: Path) -> Path:
    """snapshots/<revision>/<file> -> ../../blobs/<sha256>"""
    made = place / "models--a--b" / "snapshots" / "0123abcd"
    blobs = place / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for name in _files(bundle):
        blob = blobs / hashlib.sha256((bundle / name).read_bytes()).hexdigest()
        shutil.copyfile(bundle / name, blob)
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).symlink_to(Path("../" * (1 + len(name.parts))) / "blobs" / blob.name)
    return made


def _config_map(bundle: Path, place: Path) -> Path:
    """<file or folder> -> ..data/<the same>, ..data -> ..<time>"""
    made = place / "mounted"
    shutil.copytree(bundle, made / "..2026_11_28.1")
    (made / "..data").symlink_to("..2026_11_28.1")
    for name in sorted(p.name for p in bundle.iterdir()):
        (made / name).symlink_to(Path("..data") / name)
    return made


def _dvc(bundle: Path, place: Path) -> Path:
    """<file> -> /absolute/cache/<two digits>/<the others>"""
    made = place / "work" / "bundle"
    for name in _files(bundle):
        digest = hashlib.md5((bundle / name).read_bytes()).hexdigest()
        cached = place / "cache" / digest[:2] / digest[2:]
        cached.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle / name, cached)
        cached.chmod(0o444)
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).symlink_to(cached)
    return made


LAYOUTS: dict[str, Callable[[Path, Path], Path]] = {
    "hugging face": _hugging_face,
    "config map": _config_map,
    "dvc": _dvc,
}


def linked(bundle: Path, layout: str, place: Path) -> Path:
    """A copy of `bundle` below `place` in one of `LAYOUTS`, and the folder of links to it."""
    return LAYOUTS[layout](bundle, place)
