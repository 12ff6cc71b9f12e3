"""tests/gpu/pack.py: what comes out of the pieces is what went into them, and a damaged piece leaves nothing."""

from __future__ import annotations

import hashlib
import json
import lzma
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PACK = Path(__file__).resolve().parents[1] / "gpu" / "pack.py"
WHEEL = "pkg-1-py3-none-any.whl"


def pack(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """-S: without any package."""
    command = [sys.executable, "-S", str(PACK), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def files_in(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def wheel_at(path: Path, **more: bytes) -> dict[str, str]:
    """A wheel with a file beyond a slice that is not to be compressed, and an empty one; their digests."""
    large = np.random.default_rng(0).bytes((8 << 20) + 12345)
    content = {"pkg/__init__.py": b"x = 1\n", "pkg/large.bin": large, "pkg/py.typed": b"", **more}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three pieces and their listing."""
    folder = tmp_path_factory.mktemp("pack")
    wheel_at(folder / WHEEL)
    out = folder / "pieces"
    done = pack("make", "--out", out, "--name", "p", "--piece-mib", 3, "--preset", 0, folder / WHEEL)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def pieces(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "pieces"))


def test_pieces_give_back_the_files(pieces, tmp_path):
    want = wheel_at(tmp_path / WHEEL)
    parts = sorted(pieces.glob("p.0*"))
    assert len(parts) == 3
    assert max(p.stat().st_size for p in parts) <= 3 << 20

    extra = wheel_at(tmp_path / "other-1-py3-none-any.whl", **{"other/run.sh": b"#!/bin/sh\n"})
    done = pack("make", "--out", pieces, "--leave-out", "pkg/*", "--preset", 0, tmp_path / "other-1-py3-none-any.whl")
    assert done.returncode == 0, done.stderr
    assert "pkg/large.bin: left out" in done.stdout

    assert pack("join", pieces, "--target", tmp_path / "site").returncode == 0
    assert files_in(tmp_path / "site") == want | {"other/run.sh": extra["other/run.sh"]}
    assert (tmp_path / "site" / "pkg" / "__init__.py").stat().st_mode & 0o777 == 0o644


Damage = Callable[[Path, dict[str, Any]], None]


def _piece(number: int, change: Callable[[Path], object]) -> Damage:
    def damage(folder: Path, listing: dict[str, Any]) -> None:
        change(folder / f"p.{number:03}")

    return damage


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _swap(folder: Path, listing: dict[str, Any]) -> None:
    (folder / "p.000").rename(folder / "x")
    (folder / "p.001").rename(folder / "p.000")
    (folder / "x").rename(folder / "p.001")


def _set(*keys: Any) -> Damage:
    *way, last, value = keys

    def damage(folder: Path, listing: dict[str, Any]) -> None:
        for key in way:
            listing = listing[key]
        listing[last] = value

    return damage


def _repack(raw: bytes, **options: Any) -> Damage:
    """One slice of another content, with sizes and digests to match."""

    def damage(folder: Path, listing: dict[str, Any]) -> None:
        data = lzma.compress(raw, **options)
        for path in folder.glob("p.0*"):
            path.unlink()
        (folder / "p.000").write_bytes(data)
        stated = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        listing |= {"pieces": [{"name": "p.000", **stated}], "whole": stated, "slices": [len(data)]}
        listing["files"] = [{"path": "a", "size": 1000, "executable": False}]
        listing["content"] = {"size": 1000, "sha256": hashlib.sha256(bytes(1000)).hexdigest()}

    return damage


LARGE_DICTIONARY = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 512 << 20}]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing": (_piece(1, Path.unlink), "p.001 is not there"),
    "altered": (_piece(1, _flip), "p.001 has another digest"),
    "cut": (_piece(2, lambda path: path.write_bytes(path.read_bytes()[:-1])), "bytes, not"),
    "swapped": (_swap, "p.000 has another digest"),
    "a folder": (_piece(0, lambda path: (path.unlink(), path.mkdir())), "p.000 is not there"),
    "version": (_set("version", 2), "no listing of this version"),
    "no lists": (_set("files", {}), "no lists of pieces, slices and files"),
    "no digest": (_set("pieces", 0, "sha256", 5), "piece 0 has no size and sha256"),
    "order": (_set("pieces", 0, "name", "p.001"), "piece 0 has another name"),
    "name with a slash": (_set("pieces", 0, "name", "../pieces/p.000"), "piece 0 has another name"),
    "negative": (_set("files", 0, "size", -1), "file 0 has no path, size and executable"),
    "a text for a size": (_set("content", "size", "1"), "content has no size"),
    "true for a size": (_set("files", 0, "size", True), "file 0 has no path, size"),
    "a slice of nothing": (_set("slices", 0, 0), "a slice's size"),
    "files do not add up": (_set("files", 0, "size", 7), "the sizes do not add up"),
    "slices do not add up": (_set("slices", 0, 1), "the sizes do not add up"),
    "outside": (_set("files", 0, "path", "../x"), "is no path inside a wheel"),
    "absolute": (_set("files", 0, "path", "/tmp/x"), "is no path inside a wheel"),
    "zero byte": (_set("files", 0, "path", "a\0b"), "is no path inside a wheel"),
    "roundabout": (_set("files", 0, "path", "a//b"), "is no path to unpack"),
    "twice": (_set("files", 0, "path", "pkg/large.bin"), "is no path to unpack, or twice"),
    "file and folder": (_set("files", 0, "path", "pkg"), "is a file and a folder"),
    "whole digest": (_set("whole", "sha256", "0" * 64), "the pieces together have another digest"),
    "content digest": (_set("content", "sha256", "0" * 64), "the files have another digest"),
    "bomb": (_repack(bytes(64 << 20)), "a slice holds more or less than it should"),
    "too little": (_repack(bytes(999)), "the slices hold less than the listing states"),
    "too much": (_repack(bytes(1001)), "the slices hold more than the listing states"),
    "memory": (_repack(bytes(1000), filters=LARGE_DICTIONARY), "a slice cannot be unpacked: Memory usage limit"),
    "lzma": (_repack(bytes(1000), format=lzma.FORMAT_ALONE), "a slice cannot be unpacked"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_told_and_leaves_nothing(pieces, tmp_path, name):
    damage, told = DAMAGES[name]
    listing = json.loads((pieces / "p.json").read_text())
    damage(pieces, listing)
    (pieces / "p.json").write_text(json.dumps(listing))
    done = pack("join", pieces, "--target", tmp_path / "site")
    assert (done.returncode, done.stdout) == (5, "")
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["pieces"]


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, "{"])
def test_a_listing_that_is_none_is_told(pieces, tmp_path, text):
    (pieces / "p.json").write_text(text)
    done = pack("join", pieces, "--target", tmp_path / "site")
    assert done.returncode == 5
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_a_target_that_is_there_is_left_alone(pieces, tmp_path, kind):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    site = tmp_path / "site"
    site.mkdir() if kind == "folder" else site.symlink_to(elsewhere)
    done = pack("join", pieces, "--target", site)
    assert done.returncode == 2
    assert done.stderr.endswith("site is there already: name a folder that is not\n")
    assert not list(elsewhere.iterdir())
    assert not list(site.iterdir())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["make", "--out", "o", "--piece-mib", "0", WHEEL], "'0' is no number above 0 and up to 60"),
        (["make", "--out", "o", "--piece-mib", "-1", WHEEL], "'-1' is no number above 0 and up to 60"),
        (["make", "--out", "o", "--piece-mib", "nan", WHEEL], "'nan' is no number above 0 and up to 60"),
        (["make", "--out", "o", "--piece-mib", "61", WHEEL], "'61' is no number above 0 and up to 60"),
        (["make", "--out", "o", "--architecture", "x", WHEEL], "argument --architecture: invalid int value"),
        (["make", "--out", "o", "--name", "a/b", WHEEL], "the name is 'a/b', expected letters"),
        (["make", "--out", "o", "nowhere.whl"], "No such file or directory: 'nowhere.whl'"),
        (["make", "--out", "o", "text"], "text is no wheel: it is no zip archive"),
        (["make", "--out", "o", "folder"], "Is a directory: 'folder'"),
        (["make", "--out", "o", "outside.whl"], "'../x' is no path inside a wheel"),
        (["make", "--out", "o", WHEEL, WHEEL], "comes twice"),
        (["make", "--out", "text", WHEEL], "File exists: 'text'"),
        (
            ["make", "--out", "o", "--architecture", "61", "device.whl"],
            "no device code serves architecture 61: there is",
        ),
        (["make", "--out", "o", "--architecture", "90", "odd.whl"], "without --architecture nothing is cut"),
        (["make", "--out", "o", "--architecture", "90", "short.whl"], "without --architecture nothing is cut"),
        (["make", "--out", "o"], "the following arguments are required: wheel"),
        (["join", "nowhere", "--target", "site"], "there is no listing in nowhere"),
        (["join", "folder", "--target", "site"], "there is no listing in folder"),
        (["join", "pieces", "--target", "text/site"], "text"),
        ([], "make or join"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(pieces, tmp_path, arguments, told):
    for name, content in {
        WHEEL: {"pkg/__init__.py": b""},
        "outside.whl": {"../x": b""},
        "device.whl": {"lib.so": library(images=[(2, 75), (2, 90)])},
        "odd.whl": {"lib.so": library(magic=5)},
        "short.whl": {"lib.so": library(images=[])[:-100]},
    }.items():
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for path, data in content.items():
                archive.writestr(path, data)
    (tmp_path / "text").write_text("x")
    (tmp_path / "folder").mkdir()
    done = pack(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "site").exists()
    assert not list((tmp_path / "o").glob("*"))


def library(images: list[tuple[int, int]] | None = None, magic: int = 0xBA55ED50) -> bytes:
    """A 64-bit ELF file with a section of device code: images of (kind, architecture), 64 bytes of 0xff each."""
    code = b""
    for kind, architecture in images or []:
        header = struct.pack("<HHIQ", kind, 0, 64, 64) + bytes(12) + struct.pack("<I", architecture) + bytes(32)
        code += header + b"\xff" * 64
    section = struct.pack("<IHHQ", magic, 1, 16, len(code)) + code
    names = b"\0.nv_fatbin\0"
    at = 64 + len(section)
    head = b"\x7fELF\x02\x01" + bytes(34) + struct.pack("<Q", at + len(names)) + bytes(10)
    head += struct.pack("<HHH", 64, 3, 2)
    sections = [(0, 0, 0), (1, 64, len(section)), (0, at, len(names))]
    table = b"".join(struct.pack("<IIQQQQ", name, 1, 0, 0, start, size) + bytes(24) for name, start, size in sections)
    assert len(head) == 64
    return head + section + names + table


def test_device_code_of_other_architectures_is_cut(tmp_path):
    with zipfile.ZipFile(tmp_path / WHEEL, "w") as archive:
        archive.writestr("lib.so", library(images=[(2, 75), (2, 90), (1, 90)]))
    done = pack("make", "--out", tmp_path / "pieces", "--architecture", 90, tmp_path / WHEEL)
    assert done.stdout.startswith("lib.so: 64 bytes of device code kept, 128 blanked\n"), done.stderr
    assert pack("join", tmp_path / "pieces", "--target", tmp_path / "site").returncode == 0
    want = bytearray(library(images=[(2, 75), (2, 90), (1, 90)]))
    first = want.index(b"\xff")
    for image in (0, 2):
        want[first + 128 * image : first + 128 * image + 64] = bytes(64)
    assert (tmp_path / "site" / "lib.so").read_bytes() == want


def test_without_device_code_nothing_is_cut(tmp_path):
    with zipfile.ZipFile(tmp_path / WHEEL, "w") as archive:
        archive.writestr("pkg/__init__.py", b"x = 1\n")
    done = pack("make", "--out", tmp_path / "pieces", "--architecture", 90, tmp_path / WHEEL)
    assert done.stdout.startswith("no device code was found: nothing was cut")
