"""Bundles of links: caches and mounts are read, what is no file behind a link is neither read nor waited for."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.command import run
from helpers.linked import LAYOUTS, linked
from helpers.processes import open_files

import hcmen.base.files
import hcmen.runtime.commands.run
from hcmen.base.bundle import file_record, read_bundle
from hcmen.base.errors import CorruptFileError
from hcmen.base.files import open_regular
from hcmen.base.shared_file import SharedFile

Place = Callable[[Path], None]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bundle_of_links_is_the_bundle_they_lead_to(shared_bundle: Path, tmp_path: Path, layout: str) -> None:
    made = linked(shared_bundle, layout, tmp_path)
    opened = read_bundle(made)
    assert opened.manifest == read_bundle(shared_bundle).manifest
    opened.verify()
    for record in opened.records():
        assert opened.read(record).tobytes() == (shared_bundle / record.file).read_bytes()
        real = SharedFile(opened, record).opened_by(Path)
        assert real == (made / record.file).resolve()
        assert not real.is_symlink()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_link_to_other_content_is_an_altered_file(shared_bundle: Path, tmp_path: Path, layout: str) -> None:
    made = linked(shared_bundle, layout, tmp_path)
    opened = read_bundle(made)
    other = tmp_path / "secret"
    other.write_bytes(bytes(opened.manifest.weights.bytes))
    (made / "weights.bin").unlink()
    (made / "weights.bin").symlink_to(other)
    for use in (opened.read, opened.file, lambda record: SharedFile(opened, record).opened_by(Path)):
        with pytest.raises(CorruptFileError, match=r"weights\.bin: sha256 .* altered or damaged"):
            use(opened.manifest.weights)


def to(target: str | Path) -> Place:
    return lambda path: path.symlink_to(target)


def to_fifo(path: Path) -> None:
    os.mkfifo(path.parent / "pipe")
    path.symlink_to("pipe")


def to_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = Path.cwd()
        os.chdir(path.parent)  # the path of a socket has at most 107 bytes
        try:
            made.bind("socket")
        finally:
            os.chdir(here)
    path.symlink_to("socket")


HOSTILE: dict[str, tuple[Place, str]] = {
    "zeros without end": (to("/dev/zero"), "not a regular file"),
    "the terminal": (to("/dev/tty"), "not a regular file"),
    "pipe": (to_fifo, "not a regular file"),
    "socket": (to_socket, "not a regular file"),
    "folder": (to("."), "not a regular file"),
    "itself": (lambda path: path.symlink_to(path.name), "links without end"),
    "nothing": (to("gone"), "missing, a link to what is not there"),
    "below a file": (to("/dev/null/x"), "missing, a link to what is not there"),
    "a file of the kernel's that never ends": (to("/proc/self/pagemap"), "0 bytes, the manifest says|not valid JSON"),
}


@pytest.mark.parametrize("name", ["weights.bin", "manifest.json", "golden/full.npz"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_file_behind_a_link_is_refused_at_once(bundle: Path, kind: str, name: str) -> None:
    place, why = HOSTILE[kind]
    (bundle / name).unlink()
    place(bundle / name)
    before, started = open_files(), time.monotonic()
    with pytest.raises(CorruptFileError, match=why) as told:
        read_bundle(bundle).verify()
    assert time.monotonic() - started < 5
    assert "\n" not in str(told.value)
    assert name in str(told.value)
    del told  # whose frames have the bundle
    assert open_files() == before
    done = run(hcmen.runtime.commands.run.main, "--self-test", "--bundle", bundle)
    assert (done.code, done.out) == (5, "")
    assert [line.startswith("error: ") for line in done.lines] == [True]


def test_a_device_is_not_even_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a watchdog or a tape does something, whatever is read afterwards."""
    (tmp_path / "link").symlink_to("/dev/zero")
    monkeypatch.setattr(hcmen.base.files.os, "open", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(tmp_path / "link")


def test_what_is_put_in_the_place_while_it_is_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    genuine = os.open

    def late(path: Path, *arguments: int, **more: int | None) -> int:
        os.replace(tmp_path / "pipe", tmp_path / "x")
        return genuine(path, *arguments, **more)

    before = open_files()
    with monkeypatch.context() as patch:
        patch.setattr(hcmen.base.files.os, "open", late)
        with pytest.raises(OSError, match="changed while it was opened"):
            open_regular(tmp_path / "x")
    assert open_files() == before


def test_no_link_brings_in_a_name_that_is_not_plain(shared_bundle: Path) -> None:
    opened = read_bundle(shared_bundle)
    for name in ("../x", "/etc/passwd", "golden/../weights.bin"):
        with pytest.raises(CorruptFileError, match="unsafe"):
            opened.read(type(opened.manifest.weights)(name, "0" * 64, 1))


@pytest.mark.parametrize("what", ["engines", "engines/manifest.json"])
def test_what_no_manifest_lists_is_reached_through_no_link(bundle: Path, tmp_path: Path, what: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "manifest.json").write_text("{}")
    if what == "engines":
        (bundle / "engines").symlink_to(tmp_path / "elsewhere")
    else:
        (bundle / "engines").mkdir()
        (bundle / what).symlink_to(tmp_path / "elsewhere" / "manifest.json")
    with pytest.raises(CorruptFileError, match="a link, expected a regular file"):
        read_bundle(bundle).read_index("engines/manifest.json")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_on_the_way_to_the_weights_says_who_may_write_them(
    shared_bundle: Path, tmp_path: Path, layout: str
) -> None:
    made = linked(shared_bundle, layout, tmp_path)
    opened = read_bundle(made)
    weights = opened.manifest.weights
    assert not opened.others_may_write(weights)
    real = (made / "weights.bin").resolve()
    for place in (real, real.parent, real.parent.parent, made):
        before = place.stat().st_mode
        place.chmod(before | 0o020)
        assert opened.others_may_write(weights), place
        place.chmod(before)
    assert not opened.others_may_write(weights)
    if os.geteuid() == 0:
        os.chown(made / "weights.bin", 12345, -1, follow_symlinks=False)
        assert opened.others_may_write(weights)
        os.chown(made / "weights.bin", 0, -1, follow_symlinks=False)
    (made / "weights.bin").unlink()
    assert opened.others_may_write(weights)


@pytest.mark.parametrize("after", ["sound", "altered"])
def test_what_was_never_hashed_is_not_handed_on(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """The file is altered, sound for the moment of its hashing, and maybe altered again."""
    opened = read_bundle(bundle)
    weights = bundle / "weights.bin"
    (tmp_path / "altered").write_bytes(bytes(opened.manifest.weights.bytes))
    weights.rename(tmp_path / "sound")
    weights.symlink_to(tmp_path / "altered")
    shared, genuine = SharedFile(opened, opened.manifest.weights), type(opened).verified

    def bend(to: str) -> None:
        weights.unlink()
        weights.symlink_to(tmp_path / to)

    def sound_for_a_moment(*arguments: Any, **more: Any) -> Any:
        bend("sound")
        try:
            return genuine(*arguments, **more)
        finally:
            bend(after)

    with monkeypatch.context() as patch:
        patch.setattr(type(opened), "verified", sound_for_a_moment)
        with pytest.raises(CorruptFileError, match="changed while it was being loaded"):
            shared.opened_by(Path)
    bend("altered")
    with pytest.raises(CorruptFileError, match="altered or damaged"):
        shared.opened_by(Path)


def test_weights_are_not_handed_on_where_their_link_moves(shared_bundle: Path, tmp_path: Path) -> None:
    """The link is bent to a copy between hashing and opening: another file, so it is not the one that was hashed."""
    made = linked(shared_bundle, "dvc", tmp_path)
    opened = read_bundle(made)
    shared = SharedFile(opened, opened.manifest.weights)
    (tmp_path / "copy").write_bytes((made / "weights.bin").read_bytes())

    def bend(real: Path) -> None:
        (made / "weights.bin").unlink()
        (made / "weights.bin").symlink_to(tmp_path / "copy")

    with pytest.raises(CorruptFileError, match="changed while it was being loaded"):
        shared.opened_by(bend)
    real = shared.opened_by(Path)
    assert real == (tmp_path / "copy").resolve()
    assert file_record(real, real.parent).sha256 == opened.manifest.weights.sha256
