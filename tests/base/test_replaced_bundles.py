"""A bundle that is exported again while it is read: the reader has the older one whole, or the newer one whole."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import shutil
import time
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest
from helpers.linked import linked
from helpers.processes import open_files
from helpers.small_bundle import clip_arrays, expected, make_bundle

from hcmen.base import files
from hcmen.base.bundle import begun_again, read_bundle, writing_bundle
from hcmen.base.errors import CorruptFileError, InputError
from hcmen.base.shared_file import SharedFile
from hcmen.runtime import load

VARIANTS = ("text_only", "audio_only")


@pytest.fixture(params=["exchange", "two renames"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "two renames":
        monkeypatch.setattr(files, "_exchanged", lambda one, other: False)


def no_lock(descriptor: int, operation: int) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def left(folder: Path) -> list[str]:
    """What writers left beside the bundle."""
    return [name for name in os.listdir(folder) if name.startswith(".")]


# --- who holds the older one ------------------------------------------------------------------------------------------


def test_a_reader_has_the_older_bundle_whole(tmp_path: Path, either_way: None) -> None:
    path = make_bundle(tmp_path / "b", VARIANTS)
    opened, model = read_bundle(path), load(path, map=True)
    before = {r.file: (path / r.file).read_bytes() for r in opened.records()}
    scored = model(clip_arrays(0, ("text",))).score
    assert opened.is_in_place()
    make_bundle(path, ("text_only",), scale=2.0)
    assert not opened.is_in_place()
    opened.verify()
    assert {r.file: opened.read(r).tobytes() for r in opened.records()} == before
    for record in opened.records():
        assert SharedFile(opened, record).opened_by(Path.read_bytes) == before[record.file]
    assert not opened.others_may_write(opened.manifest.weights)
    # A variant that is loaded by now goes with the one that was loaded before, and maps its weights.
    assert model(clip_arrays(0, ("text",))).score == scored
    arrays = clip_arrays(1, ("audio",))
    assert model(arrays).score == pytest.approx(expected(arrays, "audio_only")[0], abs=1e-5)
    assert all(test.passed for test in model.self_test())
    assert list(read_bundle(path).manifest.variants) == ["text_only"]


def test_what_a_reader_held_goes_with_the_next_export_after_its_end(tmp_path: Path, either_way: None) -> None:
    path = make_bundle(tmp_path / "b", VARIANTS)
    make_bundle(path, VARIANTS)
    assert left(tmp_path) == []
    opened = read_bundle(path)
    make_bundle(path, VARIANTS)
    assert len(left(tmp_path)) == 1
    make_bundle(path, VARIANTS)
    assert len(left(tmp_path)) == 1
    opened.verify()
    shutil.rmtree(path)
    files.sweep(tmp_path)
    assert len(os.listdir(tmp_path)) == 1  # and is not put back in the place of a bundle that the user removed
    opened.let_go()
    files.sweep(tmp_path)
    assert os.listdir(tmp_path) == []


def test_no_descriptor_stays_behind(shared_bundle: Path) -> None:
    count = partial(open_files, collected=False)  # they are closed at once
    load(shared_bundle)(clip_arrays(0))
    before = open_files()
    for i in range(200):
        model = load(shared_bundle)
        if i % 20 == 0:
            model(clip_arrays(0, ("text",)))
        assert count() == before + 1
        del model
        assert count() == before
    opened = read_bundle(shared_bundle)
    for _ in range(200):
        opened.verify()
    assert count() == before + 1
    opened.let_go()
    assert count() == before
    opened.verify()
    assert pickle.loads(pickle.dumps(read_bundle(shared_bundle).folder)) is None


def test_a_file_that_moves_while_it_is_opened_is_opened_where_it_went(tmp_path: Path, either_way: None) -> None:
    path = make_bundle(tmp_path / "b", VARIANTS)
    opened, places = read_bundle(path), []
    before = (path / "weights.bin").read_bytes()

    def use(real: Path) -> bytes:
        if not places:
            make_bundle(path, VARIANTS, scale=2.0)
        places.append(real)
        return real.read_bytes()

    assert SharedFile(opened, opened.manifest.weights).opened_by(use) == before
    assert places[0] == path / "weights.bin"
    assert len(places) == 2


# --- exchanges that no lock holds up ----------------------------------------------------------------------------------


def test_a_mount_whose_links_move_is_read_again(shared_bundle: Path, tmp_path: Path) -> None:
    """As a ConfigMap is updated: ..data is bent to another folder, and the older one is removed."""
    made = linked(shared_bundle, "config map", tmp_path)
    opened, model, used = read_bundle(made), load(made), load(made)
    used(clip_arrays(0, ("text",)))
    older = (made / "..data").resolve()
    make_bundle(made / "..2026_11_28.2", tuple(opened.manifest.variants), scale=2.0)
    (made / "..data_tmp").symlink_to("..2026_11_28.2")
    os.replace(made / "..data_tmp", made / "..data")
    shutil.rmtree(older)
    with pytest.raises(CorruptFileError, match="sha256"):
        opened.verify()
    begun_again(opened, lambda bundle: bundle.verify())
    with pytest.raises(InputError, match="another export was put there while this one was in use: load it again"):
        begun_again(opened, lambda bundle: bundle.verify(), lambda found: False)
    arrays = clip_arrays(0)
    got = (model(arrays).score - 0.25) / 2 + 0.25
    assert got == pytest.approx(expected(arrays, "full")[0], abs=1e-5)
    # One that has scored with the older does not go on with the newer as if nothing had been.
    if used.backend.maps_weights:
        with pytest.raises(InputError, match="another export was put there while this one was in use: load it again"):
            used(arrays)
    else:  # an older ONNX Runtime, for which all weights were read when the first were needed
        assert used(arrays).score == pytest.approx(expected(arrays, "full")[0], abs=1e-5)


def test_an_altered_file_is_no_exchange(bundle: Path) -> None:
    opened, tries = read_bundle(bundle), []
    (bundle / "weights.bin").write_bytes(bytes(opened.manifest.weights.bytes))
    with pytest.raises(CorruptFileError, match=r"weights\.bin: sha256"):
        begun_again(opened, lambda found: (tries.append(found), found.verify()))
    assert tries == [opened]


def test_a_file_system_without_locks_has_the_newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.fcntl, "flock", no_lock)
    path = make_bundle(tmp_path / "b", VARIANTS)
    opened, model = read_bundle(path), load(path)
    make_bundle(path, VARIANTS, scale=2.0)
    assert left(tmp_path) == []
    with pytest.raises(CorruptFileError, match="missing"):
        opened.verify()
    assert begun_again(opened, lambda bundle: (bundle.verify(), bundle)[1]).manifest == read_bundle(path).manifest
    model(clip_arrays(0, ("text",)))
    assert model.bundle.manifest == read_bundle(path).manifest


# --- moments without a folder -----------------------------------------------------------------------------------------


def test_a_folder_that_is_aside_for_a_moment_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_bundle(tmp_path / "b", VARIANTS)
    path.rename(tmp_path / ".b.old-01234567")
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            (tmp_path / ".b.old-01234567").rename(path)

    monkeypatch.setattr(files.time, "sleep", nap)
    read_bundle(path).verify()
    assert len(naps) == 3


def test_what_a_killed_writer_moved_aside_is_not_waited_for_without_end(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b", VARIANTS).rename(tmp_path / ".b.old-01234567")
    started = time.monotonic()
    with pytest.raises(InputError, match="no such folder"):
        read_bundle(tmp_path / "b")
    assert time.monotonic() - started < 10
    started = time.monotonic()
    with pytest.raises(InputError, match="no such folder"):
        read_bundle(tmp_path / "other")
    assert time.monotonic() - started < files._PATIENCE_SECONDS / 2


# --- under stress -----------------------------------------------------------------------------------------------------


def _write(copies: Path, path: Path, exchange: bool, done: Event) -> None:
    """Puts one copy after the other in the place, as an export does, until all readers are done."""
    if not exchange:
        files._exchanged = lambda one, other: False  # type: ignore[assignment]
    turn = 0
    while not done.is_set():
        turn += 1
        with writing_bundle(path) as folder:
            shutil.copytree(copies / str(turn % 2), folder, dirs_exist_ok=True)


def _read(path: Path, seconds: float, told: multiprocessing.SimpleQueue) -> None:  # type: ignore[type-arg]
    """Verifies and scores again and again; tells how often, what went wrong, and which scores came."""
    reads, failures, scores = 0, [], set()
    arrays = {name: clip_arrays(0, (name.removesuffix("_only"),)) for name in VARIANTS}
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            read_bundle(path).verify()
            with load(path, threads=1) as model:
                scores.add(tuple(round(model(arrays[name]).score, 4) for name in VARIANTS))
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
        reads += 2
    told.put((reads, failures, scores))


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """Two bundles that differ in their weights."""
    for i, scale in enumerate((1.0, 2.0)):
        make_bundle(tmp_path / "copies" / str(i), VARIANTS, scale=scale)
    return tmp_path / "copies"


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_no_reader_fails_while_a_writer_exports_again_and_again(tmp_path: Path, copies: Path, exchange: bool) -> None:
    path = tmp_path / "place" / "b"
    shutil.copytree(copies / "0", path)
    context = multiprocessing.get_context("spawn")
    done, told = context.Event(), context.SimpleQueue()
    writer = context.Process(target=_write, args=(copies, path, exchange, done))
    readers = [context.Process(target=_read, args=(path, 3.0, told)) for _ in range(2)]
    for process in (writer, *readers):
        process.start()
    try:
        answers = [told.get() for _ in readers]
    finally:
        done.set()
        for process in (*readers, writer):
            process.join()
    assert writer.exitcode == 0
    of = [[expected(clip_arrays(0, (n.removesuffix("_only"),)), n)[0] - 0.25 for n in VARIANTS] for _ in range(2)]
    sound = {tuple(np.round(np.multiply(scores, i + 1) + 0.25, 3)) for i, scores in enumerate(of)}
    for reads, failures, scores in answers:
        assert not failures, (len(failures), reads, failures[:3])
        assert reads > 20
        # Of one bundle or of the other, never a variant of each.
        assert {tuple(np.round(s, 3)) for s in scores} <= sound
    files.sweep(path.parent)
    assert os.listdir(path.parent) == ["b"]
