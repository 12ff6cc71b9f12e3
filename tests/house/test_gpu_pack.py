"""tests/gpu/pack.py: what comes out of the pieces is what went into them, and a damaged piece leaves nothing."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np

PACK = Path(__file__).resolve().parents[1] / "gpu" / "pack.py"


def pack(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(PACK), *map(str, arguments)], capture_output=True, text=True)


def files_in(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def wheel_at(path: Path) -> dict[str, str]:
    """A wheel of two files, one of them beyond a slice and not to be compressed; their digests."""
    rng = np.random.default_rng(0)
    content = {"pkg/__init__.py": b"x = 1\n", "pkg/large.bin": rng.bytes((8 << 20) + 12345)}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}


def test_pieces_give_back_the_files_and_damage_leaves_nothing(tmp_path):
    want = wheel_at(tmp_path / "pkg-1-py3-none-any.whl")
    pieces = tmp_path / "pieces"
    done = pack(
        "make", "--out", pieces, "--name", "p", "--piece-mib", 3, "--preset", 0, tmp_path / "pkg-1-py3-none-any.whl"
    )
    assert done.returncode == 0, done.stderr
    parts = sorted(pieces.glob("p.0*"))
    assert len(parts) == 3
    assert max(p.stat().st_size for p in parts) <= 3 << 20

    assert pack("join", pieces, "--target", tmp_path / "site").returncode == 0
    assert files_in(tmp_path / "site") == want

    data = bytearray(parts[1].read_bytes())
    data[len(data) // 2] ^= 1
    parts[1].write_bytes(data)
    done = pack("join", pieces, "--target", tmp_path / "other")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "other").exists() or not files_in(tmp_path / "other")

    parts[1].unlink()
    assert pack("join", pieces, "--target", tmp_path / "other").returncode == 1
