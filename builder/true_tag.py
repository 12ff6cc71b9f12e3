"""Gives a wheel the manylinux tag that is true of its libraries.

scikit-build-core names a wheel linux_x86_64. No package index takes that, and it does not say where the wheel runs. The
symbols that the libraries ask of the C library say it: manylinux_2_35 is every Linux with glibc 2.35 or newer. A wheel
keeps its tag where a library asks for more than the C library, or where `readelf` is missing; stderr says so.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# What every glibc brings; more is allowed by the policies of manylinux, and none of ours needs it.
_GLIBC = re.compile(r"(lib(c|m|pthread|dl|rt)|ld-linux[\w-]*)\.so\.\d+")
_LINUX = re.compile(r"(?<![\w.])linux_(\w+)")
_VERSION = re.compile(r"\d+\.\d+(\.\d+)*")
_OLDEST = (2, 5)  # of any manylinux


class Untrue(Exception):
    """Why a wheel can have no manylinux tag."""


def true_tag(wheel: Path) -> Path:
    """`wheel` under the tag that is true of it, in place of the file that was given; the same file if there is none."""
    if not _LINUX.search(wheel.name):
        return wheel
    try:
        major, minor = _oldest_glibc(wheel)
    except (Untrue, OSError, subprocess.CalledProcessError) as error:
        print(f"hcmen: the wheel keeps the tag of this machine: {error}", file=sys.stderr)
        return wheel
    target = wheel.with_name(_LINUX.sub(rf"manylinux_{major}_{minor}_\1", wheel.name))
    _rewrite(wheel, target, f"manylinux_{major}_{minor}")
    wheel.unlink()
    return target


def _oldest_glibc(wheel: Path) -> tuple[int, int]:
    """The newest version of glibc that a library of the wheel asks for. Raises Untrue where one asks for more."""
    found = {_OLDEST}
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        for name in archive.namelist():
            if name.endswith(".so"):
                found.add(_asked_of_glibc(Path(archive.extract(name, folder))))
    return max(found)


def _asked_of_glibc(library: Path) -> tuple[int, int]:
    """The newest glibc version among the symbols that a library asks for. Raises Untrue."""
    shown = subprocess.run(
        ["readelf", "--wide", "--dynamic", "--version-info", library],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**os.environ, "LC_ALL": "C"},
    ).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", shown)
    if others := [name for name in needed if not _GLIBC.fullmatch(name)]:
        raise Untrue(f"{library.name} needs {', '.join(others)}")
    if not needed:
        raise Untrue(f"{library.name} names no C library")
    asked = re.findall(r"Name: (\w+?)_([\w.]+) ", shown.partition("Version needs section")[2])
    if others := sorted({name for name, _ in asked if name != "GLIBC"}):
        raise Untrue(f"{library.name} asks for symbols of {', '.join(others)}")
    if others := sorted({version for _, version in asked if not _VERSION.fullmatch(version)}):
        raise Untrue(f"{library.name} asks for GLIBC_{', GLIBC_'.join(others)}, which is no version")
    return max(((int(v.split(".")[0]), int(v.split(".")[1])) for _, v in asked), default=_OLDEST)


def _rewrite(wheel: Path, target: Path, platform: str) -> None:
    """Copies `wheel` to `target`, with `platform` for linux in its WHEEL, whose line in RECORD follows."""
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(target, "w") as new:
        contents = {info.filename: (info, old.read(info)) for info in old.infolist()}
        (about,) = (name for name in contents if name.endswith(".dist-info/WHEEL"))
        (record,) = (name for name in contents if name.endswith(".dist-info/RECORD"))
        info, text = contents[about]
        text = _LINUX.sub(rf"{platform}_\1", text.decode()).encode()
        contents[about] = info, text
        digest = base64.urlsafe_b64encode(hashlib.sha256(text).digest()).rstrip(b"=").decode()
        rows = list(csv.reader(io.StringIO(contents[record][1].decode())))
        rows = [[about, f"sha256={digest}", str(len(text))] if row and row[0] == about else row for row in rows]
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows(rows)
        contents[record] = contents[record][0], out.getvalue().encode()
        for info, content in contents.values():
            new.writestr(info, content, compress_type=info.compress_type)
