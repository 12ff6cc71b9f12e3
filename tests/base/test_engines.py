"""The index of engines: what is written is read back, whatever happens in between; nothing else is read."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import resource
import shutil
from pathlib import Path

import pytest
from helpers.command import open_folder, without_privileges
from helpers.small_bundle import engine_record, make_bundle

from hcmen.base.bundle import Bundle, read_bundle
from hcmen.base.engines import EngineRecord, read_engines, write_engine
from hcmen.base.errors import CorruptFileError, InputError


def write(bundle: Bundle, content: bytes, variant: str = "full", sm: int = 87) -> EngineRecord:
    record = engine_record(bundle, content, variant, capabilities=(sm,))
    write_engine(bundle, record, content, {"seconds": 1.0})
    return record


def test_what_is_written_is_read_back(bundle):
    opened = read_bundle(bundle)
    assert read_engines(opened) == ()
    names = [("full", 87), ("full", 110), ("text_only", 87)]
    records = [write(opened, bytes([i]) * 10, variant, sm) for i, (variant, sm) in enumerate(names)]
    assert sorted(records, key=lambda r: r.engine.file) == list(read_engines(opened))
    for r in records:
        assert r.of_export(opened)
        assert bytes(opened.read(r.engine)) == bytes((bundle / r.engine.file).read_bytes())
        side = json.loads((bundle / f"{r.engine.file}.json").read_text())
        assert side.pop("build") == {"seconds": 1.0}
        assert side == r.to_json()
    read_bundle(bundle).verify()  # the bundle itself is as it was


def test_a_signature_that_is_no_text_is_nobodys(bundle):
    opened = read_bundle(bundle)
    write(opened, b"engine")
    path = bundle / "engines" / "manifest.json"
    index = json.loads(path.read_text())
    index["engines"][0]["signature"] = "\ud800"
    path.write_text(json.dumps(index))
    (record,) = read_engines(opened)
    assert not record.signed_with(b"key")


def test_one_of_the_same_name_is_replaced(bundle):
    opened = read_bundle(bundle)
    write(opened, b"old")
    write(opened, b"new one")
    (record,) = read_engines(opened)
    assert bytes(opened.read(record.engine)) == b"new one"


@pytest.mark.parametrize("survived", range(4))
def test_a_kill_leaves_no_engine_that_is_not_as_listed(bundle, monkeypatch, survived):
    """The index without it, the engine, its report, the index: whatever is the last write that was done."""
    opened = read_bundle(bundle)
    kept = write(opened, b"other", "text_only")
    write(opened, b"old")
    real, done = os.replace, []

    def dying(source: Path, target: Path) -> None:
        if len(done) == survived:
            raise KeyboardInterrupt
        done.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        write(opened, b"new one")
    monkeypatch.undo()
    listed = read_engines(opened)
    assert kept.engine in [r.engine for r in listed]
    for r in listed:
        opened.read(r.engine)
    assert len(listed) == (2 if survived == 0 else 1)
    write(opened, b"new one")
    assert len(read_engines(opened)) == 2


def test_a_disk_that_is_full_leaves_the_engine_and_the_index_as_they_were(bundle):
    opened = read_bundle(bundle)
    write(opened, b"old")
    before = {path.name: path.read_bytes() for path in (bundle / "engines").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # larger files are refused as on a full disk
    try:
        with pytest.raises(InputError, match=r"full\.fp16\.sm87\.trt10\.3\.0\.engine: file too large"):
            write(opened, bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in (bundle / "engines").iterdir()} == before


def _write_many(bundle: Path, sm: int) -> None:
    opened = read_bundle(bundle)
    for i in range(10):
        write(opened, bytes([i]) * 100, "full", sm + i)


def test_two_processes_lose_nothing(bundle):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write_many, args=(bundle, sm)) for sm in (100, 200)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(read_engines(read_bundle(bundle))) == 20


def test_the_record_must_be_of_the_engine(bundle):
    opened = read_bundle(bundle)
    with pytest.raises(InputError, match="the record is of another engine"):
        write_engine(opened, engine_record(opened, b"one"), b"two", {})
    assert not (bundle / "engines").exists()


def test_another_export_disowns_the_engines(bundle):
    opened = read_bundle(bundle)
    record = write(opened, b"engine")
    for field in ("graph_sha256", "weights_sha256"):
        assert not dataclasses.replace(record, **{field: "0" * 64}).of_export(opened)


def test_places_that_cannot_be_written(shared_bundle):
    with open_folder() as folder:
        copy = Path(shutil.copytree(shared_bundle, folder / "bundle"))
        copy.chmod(0o555)
        opened = read_bundle(copy)
        with without_privileges(), pytest.raises(InputError, match="permission denied: copy the bundle to a place"):
            write(opened, b"engine")
        copy.chmod(0o755)


def test_an_index_that_is_no_regular_file(bundle, tmp_path):
    opened = read_bundle(bundle)
    write(opened, b"engine")
    index = bundle / "engines" / "manifest.json"
    index.rename(tmp_path / "index")
    index.symlink_to(tmp_path / "index")
    with pytest.raises(CorruptFileError, match="a link"):
        read_engines(opened)


def test_engines_of_an_older_export_are_not_listed_beside_the_newer(tmp_path):
    path = make_bundle(tmp_path / "b", ("full", "text_only"))
    opened = read_bundle(path)
    make_bundle(path, ("full", "text_only"), scale=2.0)
    with pytest.raises(InputError, match="another export was put there meanwhile: compile again"):
        write(opened, b"engine")
    assert read_engines(read_bundle(path)) == ()
