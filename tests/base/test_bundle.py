"""The bundle: a manifest that is read strictly, files that are verified, and writing that is whole or nothing."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.small_bundle import INPUTS, make_bundle, manifest

import hcmen.base.bundle
from hcmen.base.bundle import file_record, read_bundle, write_manifest, writing_bundle
from hcmen.base.errors import BackendError, CorruptFileError, HcmenError, InputError
from hcmen.base.manifest import Manifest, ModelRecord
from hcmen.base.modalities import VARIANTS
from hcmen.base.records import FileRecord


@pytest.fixture(scope="module")
def document(shared_bundle) -> dict:
    """A manifest in which everything is there that may be."""
    document = json.loads((shared_bundle / "manifest.json").read_text())
    document["inputs"]["text_tokens"] = None
    score = {"data": "mosi", "split": "test", "protocol": "variants", "variant": "full", "measures": {"mae": 0.7}}
    end = {"extractor": "covarep", "settings": {"rate": 100}, "sha256": "0" * 64}
    return {**document, "scores": [score], "front_ends": {"audio": end, "vision": {**end, "sha256": None}}}


def paths_of(data, prefix=()):
    """Every place in a JSON document, containers included."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*prefix, key)
        yield from paths_of(value, (*prefix, key))


def changed(document, path, value):
    """A copy of `document` with the value at `path` replaced; `...` removes it."""
    document = copy.deepcopy(document)
    place = document
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return document


def free(path) -> bool:
    """Whether a manifest may hold anything at `path`: what only people read."""
    return (
        path[0] in ("source", "created")
        or (path[0] == "versions" and len(path) > 1)
        or "parity" in path[:-1]
        or path[:2] == ("model", "config")
        or (path[0] == "scores" and path[-1] in ("data", "split", "protocol", "variant"))
        or (path[0] == "front_ends" and ("settings" in path[:-1] or path[-1] == "extractor"))
    )


def test_the_manifest_survives_a_round_trip(document, shared_bundle):
    made = Manifest.from_json(document)
    assert made.to_json() == document
    assert Manifest.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert made.inputs == INPUTS
    assert (made.model.kind, dict(made.model.config)) == ("by hand", {"bias": 0.25})
    assert list(made.variants) == [v.name for v in VARIANTS]
    bare = dataclasses.replace(made, scores=(), front_ends={})
    assert bare == manifest(shared_bundle, tuple(made.variants)) == read_bundle(shared_bundle).manifest


def test_every_key_is_needed(document):
    tried = 0
    for path in paths_of(document):
        if isinstance(path[-1], int) or path in (("variants", v.name) for v in VARIANTS):
            continue
        if (path[0] in ("source", "versions") and len(path) > 1) or ("parity" in path[:-1] and path[-1] != "passed"):
            continue
        if path in (("front_ends", "audio"), ("front_ends", "vision")) or {"config", "settings", "measures"} & {
            *path[:-1]
        }:
            continue
        with pytest.raises(CorruptFileError):
            Manifest.from_json(changed(document, path, ...))
        tried += 1
    assert tried > 100


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        (("inputs", "label_max"), -3, r"'inputs': label range is \[-3.0, -3\], expected two finite numbers in rising"),
        (("inputs", "label_max"), 10**400, "'label_max' is a number of 1329 bits, expected float"),
        (("inputs", "audio", "features"), 0, "'inputs': features is 0, expected at least 1"),
        (("inputs", "audio", "features"), 65537, "'inputs': features is 65537, expected 1 to 65536"),
        (("inputs", "audio", "max_steps"), 10**9, "'inputs': max_steps is 1000000000, expected 1 to 1048576"),
        (("inputs", "text", "max_steps"), 10**400, "'inputs': max_steps is a number of 1329 bits, expected 1 to"),
        (("inputs", "audoi"), {}, "unknown config key 'audoi', did you mean 'audio'"),
        (("inputs", "outputs"), [], r"unknown key 'inputs\.outputs'"),
        (("inputs", "label_min_means"), "two\nlines", "expected 1 to 40 printable characters"),
        (("inputs", "text_tokens"), {"vocabulary": 5, "token_types": 2, "unknown_token": 5}, "an id below 5"),
        (("outputs", 0, "shape"), ["batch", 2], r"expected score float32 \['batch'\] among them"),
        (("outputs", 1, "dtype"), "float16", "expected modality_weights float32"),
        (("outputs", 1, "name"), "score", "expected each name once"),
        (("front_ends", "audio", "sha256"), "0" * 63, r"'front_ends\.audio\.sha256' is no sha256"),
        (("scores", 0, "measures", "mae"), "low", r"'scores\[0\]\.measures\.mae' is a string, expected a number"),
    ],
    ids=lambda x: ".".join(map(str, x)) if isinstance(x, tuple) else "",
)
def test_what_a_model_takes_and_gives_is_checked(document, path, value, why):
    with pytest.raises(CorruptFileError, match=why) as caught:
        Manifest.from_json(changed(document, path, value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, True, -1, 1.5, "x", "", [], {}, [1], {"a": 1}, 10**30], ids=repr)
def test_no_value_of_another_type_passes(document, value):
    """Every place is given every kind of value: refused with an expected error, or taken where the value is lawful."""
    taken = set()
    for path in paths_of(document):
        try:
            Manifest.from_json(changed(document, path, value))
        except HcmenError as error:
            message = str(error)
        else:
            message = ""
            if not free(path):
                taken.add(path)
        assert "\n" not in message
    numbers = {p for p in paths_of(document) if p[0] in ("normalisation", "inputs") or "measures" in p}
    ends = {("inputs", "label_min_means"), ("inputs", "label_max_means")}
    objects = {("versions",), ("front_ends",), ("scores", 0, "measures"), ("model", "config")}
    settings = {("front_ends", m, "settings") for m in ("audio", "vision")}
    lawful = {
        "1.5": numbers,
        "-1": {p for p in numbers if "std" not in p},
        repr(10**30): numbers,
        "[]": {("scores",)},
        "{}": objects | settings,
        "{'a': 1}": objects - {("front_ends",)} | settings,
        "None": {("inputs", "text_tokens"), *(("front_ends", m, "sha256") for m in ("audio", "vision"))},
        "'x'": {p for p in paths_of(document) if p[-1] in ("file", "kind")} | ends,
        "''": {("model", "kind")},
    }
    assert taken <= lawful.get(repr(value), set())


def test_unknown_keys_are_refused_at_every_level(document):
    for path in [(), *paths_of(document)]:
        place = document
        for key in path:
            place = place[key]
        free_form = {"parity", "config", "settings", "measures"} & {*path}
        if not isinstance(place, dict) or path[:1] in (("source",), ("versions",)) or free_form:
            continue
        with pytest.raises(CorruptFileError, match="unknown"):
            Manifest.from_json(changed(document, (*path, "surprise"), 1))


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../weights.bin",
        "a/../../b",
        "a/b/c",
        "./weights.bin",
        "a//b",
        "~/x",
        ".hidden",
        "",
        "a\x00b",
        "a\nb",
        "C:\\x",
        "a b",
        "manifest.json",
        "x" * 200,
        "\N{CYRILLIC SMALL LETTER A}.onnx",
    ],
)
@pytest.mark.parametrize("place", [("weights",), ("variants", "full"), ("variants", "full", "golden")])
def test_unsafe_file_names_are_refused(document, name, place):
    with pytest.raises(CorruptFileError, match="unsafe"):
        Manifest.from_json(changed(document, (*place, "file"), name))


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "A" * 64, "g" * 64, "0" * 64 + "\n"])
def test_only_sha256_digests_are_taken(document, digest):
    with pytest.raises(CorruptFileError, match="sha256"):
        Manifest.from_json(changed(document, ("weights", "sha256"), digest))


def test_a_bound_of_any_number_of_digits_is_refused(document):
    document["precision"] = "int8"
    with pytest.raises(CorruptFileError, match="atol' is a number of 1329 bits, expected 0 to 6"):
        Manifest.from_json(changed(document, ("variants", "full", "parity", "atol"), 10**400))


def test_versions_of_another_age_say_what_to_do(document):
    with pytest.raises(InputError, match="schema_version is 3, expected 1 or 2: upgrade hcmen"):
        Manifest.from_json(changed(document, ("schema_version",), 3))
    with pytest.raises(BackendError, match="'hcmen' version 2, this package has 'hcmen' version 1: upgrade hcmen"):
        Manifest.from_json(changed(document, ("op", "version"), 2))
    with pytest.raises(BackendError, match="'other' version 1"):
        Manifest.from_json(changed(document, ("op", "domain"), "other"))


def test_graph_inputs_must_be_those_of_the_variant(document):
    inputs = document["variants"]["text_only"]["inputs"]
    for wrong in (inputs[:1], [], [*inputs, inputs[0]], document["variants"]["audio_only"]["inputs"]):
        with pytest.raises(CorruptFileError, match=r"'variants\.text_only\.inputs' is .* expected text"):
            Manifest.from_json(changed(document, ("variants", "text_only", "inputs"), wrong))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"a": 1, "a": 2}', "'a' is there twice"),
        ('{"a": NaN}', "NaN is not a finite number"),
        ('{"a": -Infinity}', "-Infinity is not a finite number"),
        ('{"a": 1e999}', "1e999 is not a finite number"),
        ("[" * 100_000, "nested too deeply|not valid JSON"),
        ('{"a":' * 40 + "1" + "}" * 40, "nested too deeply"),
        ("", "not valid JSON"),
        ("null", "is null, expected an object"),
        ("[]", "is a list, expected an object"),
        ('{"schema_version": 1', "not valid JSON"),
        ('{"a": ' + "9" * 10_000 + "}", "not valid JSON"),
        ("\ufeff{}", "not valid JSON"),
    ],
)
def test_traps_of_json_are_refused(bundle, text, why):
    (bundle / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(CorruptFileError, match=why):
        read_bundle(bundle)


def test_a_manifest_of_no_text_or_of_any_size_is_refused(bundle):
    (bundle / "manifest.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CorruptFileError, match="not valid JSON"):
        read_bundle(bundle)
    with open(bundle / "manifest.json", "wb") as file:
        file.truncate(1 << 40)  # sparse: a reader that takes it whole would not come back
    with pytest.raises(CorruptFileError, match="more than"):
        read_bundle(bundle)


# --- files ----------------------------------------------------------------------------------------------------------


def test_verified_content_is_the_content(bundle):
    opened = read_bundle(bundle)
    opened.verify()
    for record in opened.records():
        content = opened.read(record)
        assert content.tobytes() == (bundle / record.file).read_bytes()
        assert not content.flags.writeable
        assert opened.file(record) == bundle / record.file
    assert len(opened.records()) == 1 + 2 * len(VARIANTS)


@pytest.mark.parametrize("at", [0, 3, -1])
def test_one_changed_bit_is_found(bundle, at):
    path = bundle / "weights.bin"
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    opened = read_bundle(bundle)
    for use in (opened.read, opened.file):
        with pytest.raises(CorruptFileError, match=r"weights\.bin: sha256 .* was altered or damaged"):
            use(opened.manifest.weights)


def test_files_larger_than_a_read_are_hashed_in_full(tmp_path):
    content = np.random.default_rng(0).bytes((3 << 20) + 5)
    (tmp_path / "big").write_bytes(content)
    opened = hcmen.base.bundle.Bundle(tmp_path, None)
    record = file_record(tmp_path / "big", tmp_path)
    assert opened.read(record).tobytes() == content
    opened.file(record)
    (tmp_path / "big").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CorruptFileError, match="altered"):
        opened.file(record)


def as_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda p: p.unlink(), "missing from the bundle"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "bytes, the manifest says"),
        (lambda p: p.write_bytes(p.read_bytes() + b"0"), "bytes, the manifest says"),
        (as_fifo, "not a regular file"),
        (as_folder, "not a regular file"),
    ],
    ids=["missing", "short", "long", "fifo", "folder"],
)
@pytest.mark.parametrize("name", ["weights.bin", "full.onnx", "golden/full.npz"])
def test_files_that_are_not_as_listed_are_refused(bundle, damage, why, name):
    damage(bundle / name)
    opened = read_bundle(bundle)
    record = next(r for r in opened.records() if r.file == name)
    with pytest.raises(CorruptFileError, match=why):
        opened.read(record)


def test_a_link_to_the_whole_bundle_is_followed(bundle, tmp_path):
    (tmp_path / "link").symlink_to(bundle)
    read_bundle(tmp_path / "link").verify()


def test_a_hard_link_counts_by_its_content(bundle, tmp_path):
    """It cannot bring in other content, since that has another sha256."""
    os.link(bundle / "weights.bin", tmp_path / "copy")
    opened = read_bundle(bundle)
    opened.read(opened.manifest.weights)
    (tmp_path / "secret").write_bytes(bytes(opened.manifest.weights.bytes))
    (bundle / "weights.bin").unlink()
    os.link(tmp_path / "secret", bundle / "weights.bin")
    with pytest.raises(CorruptFileError, match="altered"):
        opened.read(opened.manifest.weights)


def test_a_declared_size_is_not_believed_before_it_is_seen(bundle):
    opened = read_bundle(bundle)
    record = FileRecord("weights.bin", "0" * 64, 8 << 30)
    with pytest.raises(CorruptFileError, match="the manifest says 8589934592"):
        opened.read(record)  # eight gigabytes are not set aside first


def test_what_was_hashed_is_what_is_returned(bundle, monkeypatch):
    """The file is exchanged in mid-read: the reader has the old file open and returns its content."""
    opened = read_bundle(bundle)
    before = (bundle / "weights.bin").read_bytes()
    readv = os.readv

    def exchange_then_read(descriptor, buffers):
        (bundle / "new").write_bytes(bytes(len(before)))
        os.replace(bundle / "new", bundle / "weights.bin")
        return readv(descriptor, buffers)

    monkeypatch.setattr(os, "readv", exchange_then_read)
    assert opened.read(opened.manifest.weights).tobytes() == before


def test_no_bundle_is_told_from_a_damaged_one(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        read_bundle(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="not a folder"):
        read_bundle(tmp_path / "file")
    with pytest.raises(InputError, match=r"no manifest\.json in it"):
        read_bundle(tmp_path)


def test_a_variant_that_was_not_exported_is_named(tmp_path):
    opened = read_bundle(make_bundle(tmp_path / "b", ("text_only",)))
    with pytest.raises(InputError, match="variant 'full' is not in this bundle, it has text_only"):
        opened.variant("full")
    with pytest.raises(InputError, match="did you mean 'text_only'"):
        opened.variant("text_onyl")


# --- writing --------------------------------------------------------------------------------------------------------


def test_write_manifest_refuses_what_read_bundle_would(shared_bundle, tmp_path):
    good = manifest(shared_bundle, ("full",))
    for bad in (
        dataclasses.replace(good, schema_version=3),
        dataclasses.replace(good, weights=FileRecord("../x", "0" * 64, 1)),
        dataclasses.replace(good, model=ModelRecord("k" * 1001, {})),
    ):
        with pytest.raises(HcmenError):
            write_manifest(tmp_path, bad)
    assert not list(tmp_path.iterdir())


def test_file_records_stay_inside_the_bundle(tmp_path):
    (tmp_path / "outside").write_text("x")
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match="is not inside"):
        file_record(tmp_path / "outside", tmp_path / "b")
    (tmp_path / "b" / "a b").write_text("x")
    with pytest.raises(InputError, match="unsafe"):
        file_record(tmp_path / "b" / "a b", tmp_path / "b")


def test_an_older_bundle_is_replaced_only_by_a_whole_one(tmp_path):
    path = make_bundle(tmp_path / "b", ("full", "text_only"))
    before = sorted(p.name for p in path.rglob("*"))

    def fail_half_way() -> None:
        with writing_bundle(path) as folder:
            (folder / "weights.bin").write_bytes(b"x")
            assert path.exists()
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        fail_half_way()
    assert sorted(p.name for p in path.rglob("*")) == before
    assert os.listdir(tmp_path) == ["b"]
    make_bundle(path, ("audio_only",))
    assert list(read_bundle(path).manifest.variants) == ["audio_only"]
    assert os.listdir(tmp_path) == ["b"]


def test_what_a_reader_would_refuse_is_not_put_in_place(tmp_path):
    path = make_bundle(tmp_path / "b")
    content = (path / "full.onnx").read_bytes()
    (path / "full.onnx").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CorruptFileError, match="altered"), writing_bundle(tmp_path / "new") as folder:
        shutil.copytree(path, folder, dirs_exist_ok=True)
    with pytest.raises(InputError, match="no manifest"), writing_bundle(tmp_path / "new"):
        pass
    assert os.listdir(tmp_path) == ["b"]


def test_folders_that_are_no_bundle_are_not_replaced_unasked(tmp_path, monkeypatch):
    path = tmp_path / "precious"
    path.mkdir()
    (path / "thesis.txt").write_text("x")
    (path / "manifest.json").write_text('{"name": "other", "schema_version": 1, "variants": {}}')
    with pytest.raises(InputError, match="a folder that is no bundle"):
        make_bundle(path)
    assert (path / "thesis.txt").exists()
    monkeypatch.chdir(path)
    with pytest.raises(InputError, match="in use and no bundle"), writing_bundle(path, force=True):
        pass
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="in use and no bundle"), writing_bundle(tmp_path, force=True):
        pass
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="a file is there"), writing_bundle(tmp_path / "file", force=True):
        pass
    assert (tmp_path / "file").read_text() == "x"
    with pytest.raises(InputError, match="no manifest"), writing_bundle(path, force=True):
        assert (path / "thesis.txt").exists()
    assert (path / "thesis.txt").exists()
    assert sorted(os.listdir(tmp_path)) == ["file", "precious"]


def test_an_empty_folder_and_a_link_to_a_bundle_are_written_through(tmp_path):
    (tmp_path / "empty").mkdir()
    make_bundle(tmp_path / "empty", ("full",))
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    make_bundle(tmp_path / "link", ("text_only",))
    assert (tmp_path / "link").is_symlink()
    assert list(read_bundle(tmp_path / "empty").manifest.variants) == ["text_only"]
    make_bundle(tmp_path / "new" / "deep" / "b", ("full",))
    read_bundle(tmp_path / "new" / "deep" / "b").verify()


WRITER = """
    import sys, time
    from hcmen.base.bundle import writing_bundle
    with writing_bundle(sys.argv[1]) as folder:
        (folder / "weights.bin").write_bytes(b"half")
        print("writing", flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_writer_leaves_no_bundle_and_the_next_one_clears_up(tmp_path, number):
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path / "b")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert writer.stdout.readline() == b"writing\n"
    with pytest.raises(InputError, match="no such folder"):
        read_bundle(tmp_path / "b")
    (leftover,) = tmp_path.iterdir()
    make_bundle(tmp_path / "b", ("full",))  # a writer that is alive keeps its folder
    assert leftover.exists()
    writer.send_signal(number)
    writer.wait(20)
    writer.stdout.close()
    assert leftover.exists() == (number == signal.SIGKILL)
    make_bundle(tmp_path / "b", ("text_only",))
    assert os.listdir(tmp_path) == ["b"]


def test_a_bundle_caught_between_two_renames_is_put_back(tmp_path):
    make_bundle(tmp_path / "b", ("full",))
    (tmp_path / "b").rename(tmp_path / ".b.old-01234567")
    with pytest.raises(InputError, match="no manifest"), writing_bundle(tmp_path / "b"):
        assert list(read_bundle(tmp_path / "b").manifest.variants) == ["full"]
    assert os.listdir(tmp_path) == ["b"]


def test_creation_time_is_kept_as_text(tmp_path):
    started = time.time()
    path = make_bundle(tmp_path / "b", ("full",), created="2026-02-03T04:05:06+00:00")
    assert read_bundle(path).manifest.created == "2026-02-03T04:05:06+00:00"
    assert (path / "manifest.json").stat().st_mtime >= started - 2


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_what_this_machine_lacks_is_no_fault_of_the_bundle(shared_bundle, monkeypatch, number):
    opened = read_bundle(shared_bundle)

    def refuse(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("hcmen.base.bundle.os.open", refuse)
    with pytest.raises(InputError, match="the bundle is not the cause: close files or end programs here"):
        opened.file(opened.manifest.weights)
