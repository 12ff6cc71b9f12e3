"""Bad input of every kind, through the command lines: the right exit code, one line on stderr, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import onnxruntime
import pytest
from helpers.command import Outcome, open_folder, run, without_privileges
from helpers.small_bundle import clip_arrays, graph, make_bundle

import hcmen.runtime.commands.doctor
import hcmen.runtime.commands.run
from hcmen.base.bundle import file_record
from hcmen.base.clip import write_clip
from hcmen.base.console import command
from hcmen.base.errors import BackendError, CorruptFileError
from hcmen.base.shipped import DEMO
from hcmen.runtime.backends import ort


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything below `folder`: kind and content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        content = b""
        if stat.S_ISLNK(mode):
            content = os.readlink(path).encode()
        elif stat.S_ISREG(mode) and path.stat().st_size < 1 << 24:
            content = path.read_bytes()
        found[str(path.relative_to(folder))] = (stat.S_IFMT(mode), content)
    return found


def assert_one_line(done: Outcome, code: int, *parts: str) -> None:
    """The whole of what a user sees of an expected error."""
    assert len(done.lines) == 1, done.err
    assert done.lines[0].startswith("error: ")
    for part in parts:
        assert part in done.lines[0]
    assert "Traceback" not in done.err
    assert done.code == code, done.err
    assert done.out == ""


@dataclass(frozen=True)
class Case:
    """A way to go wrong. make: makes the bad thing at `path`; then the exit code and parts of the line."""

    name: str
    make: Callable[[Path], object]
    code: int
    says: tuple[str, ...]


def save(**arrays: object) -> Callable[[Path], object]:
    return lambda path: np.savez(path, **arrays)


def full(**changes: object) -> Callable[[Path], object]:
    return save(**{**clip_arrays(0), **changes})


def nan_in(modality: str, value: float, count: int) -> Callable[[Path], object]:
    arrays = clip_arrays(0, text=3, audio=3, vision=3)
    arrays[modality].ravel()[:count] = value
    return save(**arrays)


def raw(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def cut(length: int) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        np.savez(path, **clip_arrays(0))
        path.write_bytes(path.read_bytes()[:length])

    return make


def flipped(path: Path) -> None:
    np.savez(path, **clip_arrays(0))
    content = bytearray(path.read_bytes())
    content[content.index(b"\x93NUMPY") + 200] ^= 255
    path.write_bytes(content)


def bomb(path: Path) -> None:
    """64 MiB of zeros in 64 KiB, lawful but for its length."""
    np.savez_compressed(path, text=np.zeros((2796202, 6), np.float32))


def encrypted(path: Path) -> None:
    np.savez(path, **clip_arrays(0))
    content = bytearray(path.read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = 0
        while (start := content.find(mark, start)) >= 0:
            content[start + at] |= 1
            start += 4
    path.write_bytes(content)


def lzma(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("text.npy", b"x" * 100)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


CLIPS = [
    Case("missing", lambda p: None, 2, ("no such file or directory",)),
    Case("folder without clips", lambda p: p.mkdir(), 2, ("no .npz file in this folder",)),
    Case("a bundle", lambda p: shutil.copytree(DEMO / "bundle", p), 2, ("a bundle, expected clips", "--bundle ")),
    Case("empty file", raw(b""), 5, ("the file is empty",)),
    Case("not a zip", raw(b"hello, world"), 2, ("not an .npz file", "use numpy.savez")),
    Case("single array", lambda p: p.write_bytes(b"\x93NUMPY\x01\x00"), 2, ("a single .npy array",)),
    Case("truncated in the data", cut(600), 5, ("damaged .npz",)),
    Case("truncated in the directory", cut(-30), 5, ("damaged .npz",)),
    Case("one byte of it", cut(3), 5, ("damaged .npz",)),
    Case("bytes changed", flipped, 5, ("damaged", "Bad CRC")),
    Case("zip of nothing", raw(b"PK\x05\x06" + bytes(18)), 2, ("no modality is present",)),
    Case("zip bomb", bomb, 2, ("text has 2796202 steps, expected at most 12",)),
    Case("encrypted", encrypted, 2, ("is encrypted",)),
    Case("odd compression", lzma, 2, ("compressed by method 14",)),
    Case(
        "object array", full(text=np.array([[None] * 6], object)), 5, ("text holds Python objects", "never unpickled")
    ),
    Case("no known key", save(sound=np.zeros((3, 3), np.float32)), 2, ("unknown key 'sound'",)),
    Case("misspelt key", full(vison=np.zeros((3, 4), np.float32)), 2, ("unknown key 'vison': did you mean 'vision'?",)),
    Case("labels in the clip", full(label=np.float32(1)), 2, ("unknown key 'label'",)),
    Case(
        "tokens without encoder", save(text_tokens=np.zeros((3, 9), np.int64)), 2, ("no text encoder", "under 'text'")
    ),
    Case("rank 1", full(audio=np.zeros(3, np.float32)), 2, ("audio has shape [3], expected [time, 3]",)),
    Case("rank 3", full(audio=np.zeros((1, 5, 3), np.float32)), 2, ("shape [1, 5, 3], expected [time, 3]",)),
    Case("rank 0", full(text=np.float32(1)), 2, ("text has shape [], expected [time, 6]",)),
    Case("feature count", full(vision=np.zeros((5, 5), np.float32)), 2, ("vision has 5 features", "[time, 4]")),
    Case("transposed", full(text=np.zeros((6, 9), np.float32)), 2, ("text has 9 features (shape [6, 9])",)),
    Case("integers", full(text=np.zeros((5, 6), np.int32)), 2, ("dtype int32, expected float16, float32, float64",)),
    Case("booleans", full(text=np.zeros((5, 6), bool)), 2, ("dtype bool",)),
    Case("complex", full(text=np.zeros((5, 6), np.complex64)), 2, ("dtype complex64",)),
    Case("strings", full(text=np.full((5, 6), "x")), 2, ("dtype <U1",)),
    Case("records", full(text=np.zeros((5, 6), [("a", "<f4")])), 2, ("has dtype [('a', '<f4')]",)),
    Case("no time step", full(audio=np.zeros((0, 3), np.float32)), 2, ("no time step, expected 1 to 20",)),
    Case("too long", full(audio=np.zeros((21, 3), np.float32)), 2, ("audio has 21 steps, expected at most 20",)),
    Case("nan", nan_in("audio", np.nan, 2), 2, ("audio has 2 NaN or infinite values among 9", "--clean")),
    Case("infinity", nan_in("text", np.inf, 1), 2, ("text has 1 NaN or infinite values among 18",)),
    Case("minus infinity", nan_in("vision", -np.inf, 4), 2, ("vision has 4 NaN or infinite values",)),
    Case("too large for float32", full(text=np.full((1, 6), 1e200)), 2, ("text has 6 NaN or infinite values among 6",)),
    Case("pipe", os.mkfifo, 2, ("not a regular file",)),
    Case("link to nothing", lambda p: p.symlink_to("nowhere"), 2, ("no such file",)),
    Case("link to itself", loop, 2, ("too many levels of symbolic links",)),
]


@pytest.mark.parametrize("case", CLIPS, ids=lambda c: c.name.replace(" ", "_"))
def test_bad_clips(shared_bundle, tmp_path, case):
    path = tmp_path / "clip.npz"
    case.make(path)
    before = tree(tmp_path)
    done = run(hcmen.runtime.commands.run.main, path, "--bundle", shared_bundle)
    assert_one_line(done, case.code, str(path), *case.says)
    assert tree(tmp_path) == before


def edit(**changes: object) -> Callable[[Path], object]:
    """Changes to manifest.json; `a__b=value` reaches inward."""

    def make(bundle: Path) -> None:
        path = bundle / "manifest.json"
        document = json.loads(path.read_text())
        for key, value in changes.items():
            *outer, last = key.split("__")
            place = document
            for part in outer:
                place = place[part]
            if value is ...:
                del place[last]
            else:
                place[last] = value
        path.write_text(json.dumps(document))

    return make


def forged(**changes: object) -> Callable[[Path], object]:
    """As `edit`, with the record of full.onnx brought up to date first: the manifest agrees with the altered file."""

    def make(bundle: Path) -> None:
        record = file_record(bundle / "full.onnx", bundle)
        edit(variants__full__sha256=record.sha256, variants__full__bytes=record.bytes, **changes)(bundle)

    return make


def both(*makers: Callable[[Path], object]) -> Callable[[Path], object]:
    def make(bundle: Path) -> None:
        for maker in makers:
            maker(bundle)

    return make


def at(name: str, change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda bundle: change(bundle / name)


def to(target: str) -> Callable[[Path], None]:
    def linked(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return linked


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def hard_linked_secret(bundle: Path) -> None:
    secret = bundle.parent / "secret"
    secret.write_bytes(bytes((bundle / "weights.bin").stat().st_size))
    (bundle / "weights.bin").unlink()
    os.link(secret, bundle / "weights.bin")


def outside(location: str) -> Callable[[Path], object]:
    def make(bundle: Path) -> None:
        (bundle / "full.onnx").write_bytes(graph("full", location=location).SerializeToString())
        forged()(bundle)

    return make


BUNDLES = [
    Case("missing", shutil.rmtree, 2, ("no such folder, expected a bundle: make one with ", "hcmen-export --bundle")),
    Case("a file", both(shutil.rmtree, raw(b"x")), 2, ("not a folder",)),
    Case("no manifest", at("manifest.json", Path.unlink), 2, ("no manifest.json in it",)),
    Case("manifest linked to nothing", at("manifest.json", to("gone")), 5, ("manifest.json: missing, a link to what",)),
    Case("manifest linked to a device", at("manifest.json", to("/dev/zero")), 5, ("json: not a regular file",)),
    Case("manifest cut", at("manifest.json", shorten), 5, ("not valid JSON",)),
    Case("manifest is no text", at("manifest.json", raw(b"\xff\x00")), 5, ("not valid JSON",)),
    Case("manifest is a list", at("manifest.json", raw(b"[]")), 5, ("expected an object",)),
    Case("doubled key", at("manifest.json", raw(b'{"name": 1, "name": 2}')), 5, ("'name' is there twice",)),
    Case("NaN in it", at("manifest.json", raw(b'{"name": NaN}')), 5, ("NaN is not a finite number",)),
    Case("deep nesting", at("manifest.json", raw(b"[" * 100_000)), 5, ("manifest.json",)),
    Case("newer schema", edit(schema_version=3), 2, ("schema_version is 3, expected 1 or 2: upgrade hcmen",)),
    Case("schema is text", edit(schema_version="1"), 5, ("'schema_version' is a string, expected an integer",)),
    Case("newer op", edit(op__version=2), 3, ("'hcmen' version 2, this package has 'hcmen' version 1",)),
    Case("other op domain", edit(op__domain="com.other"), 3, ("need ops 'com.other' version 1",)),
    Case("missing key", edit(weights=...), 5, ("'weights' is missing",)),
    Case("unknown key", edit(extra=1), 5, ("unknown key 'extra'",)),
    Case("unknown variant", edit(variants__deaf={}), 5, ("unknown variant 'deaf'",)),
    Case("no variants", edit(variants={}), 5, ("'variants' is empty",)),
    Case("absolute path", edit(variants__full__file="/etc/passwd"), 5, ("'/etc/passwd' is unsafe",)),
    Case("path upwards", edit(weights__file="../weights.bin"), 5, ("'../weights.bin' is unsafe",)),
    Case("path through", edit(weights__file="golden/../weights.bin"), 5, ("is unsafe",)),
    Case(
        "altered manifest", edit(weights__sha256="0" * 64), 5, ("weights.bin: sha256", "the manifest says 000000000000")
    ),
    Case("other model", edit(inputs__text={"features": 7, "max_steps": 12}), 5, ("not a list of 7 numbers",)),
    Case("weights missing", at("weights.bin", Path.unlink), 5, ("weights.bin: missing from the bundle",)),
    Case("weights altered", at("weights.bin", flip), 5, ("weights.bin: sha256", "altered or damaged")),
    Case("weights cut", at("weights.bin", lambda p: p.write_bytes(b"1")), 5, ("1 bytes, the manifest says 52",)),
    Case("weights linked to others", at("weights.bin", to("full.onnx")), 5, ("bytes, the manifest says",)),
    Case("weights linked to nothing", at("weights.bin", to("gone")), 5, ("weights.bin: missing, a link to what",)),
    Case("weights linked to a device", at("weights.bin", to("/dev/zero")), 5, ("weights.bin: not a regular file",)),
    Case("weights hard-linked", hard_linked_secret, 5, ("weights.bin: sha256",)),
    Case("graph missing", at("full.onnx", Path.unlink), 5, ("full.onnx: missing from the bundle",)),
    Case("graph altered", at("full.onnx", flip), 5, ("full.onnx: sha256",)),
    Case("graph linked to itself", at("full.onnx", to("full.onnx")), 5, ("full.onnx: links without end",)),
    Case("graph truncated", both(at("full.onnx", shorten), forged()), 5, ("full.onnx: truncated or not an ONNX file",)),
    Case("graph is text", both(at("full.onnx", raw(b"hello")), forged()), 5, ("full.onnx: truncated or not an ONNX",)),
    Case("graph of nothing", both(at("full.onnx", raw(b"\x08\x09")), forged()), 5, ("ONNX Runtime refused it",)),
    Case("graph reads /etc/passwd", outside("/etc/passwd"), 5, ("lies in '/etc/passwd', expected 'weights.bin'",)),
    Case("graph reads upwards", outside("../secret"), 5, ("lies in '../secret', expected 'weights.bin' alone",)),
]


@pytest.mark.parametrize("case", BUNDLES, ids=lambda c: c.name.replace(" ", "_"))
def test_bad_bundles(bundle, tmp_path, case):
    write_clip(tmp_path / "clip.npz", clip_arrays(0))
    case.make(bundle)
    before = tree(tmp_path)
    done = run(hcmen.runtime.commands.run.main, tmp_path / "clip.npz", "--bundle", bundle)
    assert_one_line(done, case.code, str(bundle), *case.says)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("case", BUNDLES, ids=lambda c: c.name.replace(" ", "_"))
def test_bad_bundles_before_the_doctor(bundle, case):
    case.make(bundle)
    done = run(hcmen.runtime.commands.doctor.main, "--bundle", bundle, "--format", "json")
    rows = json.loads(done.out)["rows"]
    (row,) = [r for r in rows if r["name"] == "bundle"]
    assert done.code == 1
    assert row["status"] == "failed"
    assert row["fix"]
    assert done.lines == [f"error: 1 of {len(rows)} checks failed: bundle"]


def arguments_of(name: str, clip: Path, bundle: Path, folder: Path) -> list[object]:
    """The arguments of one bad call of hcmen-run."""
    there = [clip, "--bundle", bundle]
    return {
        "no clip": [],
        "unknown variant": [*there, "--variant", "audio_mising"],
        "variant of no bundle": [*there, "--variant", "loud"],
        "unknown backend": [*there, "--backend", "openvino"],
        "no threads": [*there, "--threads", "0"],
        "threads are text": [*there, "--threads", "two"],
        "unknown option": [*there, "--sparkle"],
        "misspelt option": [*there, "--varant", "full"],
        "unknown format": [*there, "--format", "jsn"],
        "option without value": [*there, "--variant"],
        "check without clip": ["--check", "--self-test", "--bundle", bundle],
        "missing checkpoint": [*there, "--check", "--checkpoint", folder / "none"],
        "empty checkpoint": [*there, "--check", "--checkpoint", folder],
        "variant needs more": [*there, "--variant", "full"],
        "null in the name": ["a\0b", "--bundle", bundle],
        "name too long": ["x" * 5000, "--bundle", bundle],
        "newline in the name": ["a\nb\x1b[31m", "--bundle", bundle],
    }[name]


ARGUMENTS = [
    ("no clip", 2, ("no clip given", "--self-test")),
    ("unknown variant", 2, ("'audio_mising': did you mean 'audio_missing'?",)),
    ("variant of no bundle", 2, ("'loud': choose from auto, full, text_missing",)),
    ("unknown backend", 2, ("'openvino': choose from auto, ort, ort-cuda, tensorrt",)),
    ("no threads", 2, ("threads is 0, expected 1 to 1024",)),
    ("threads are text", 2, ("'two' is not a valid integer", "see hcmen-run --help")),
    ("unknown option", 2, ("--sparkle",)),
    ("misspelt option", 2, ("--varant", "--variant")),
    ("unknown format", 2, ("'jsn': did you mean 'json'? choose from text, json",)),
    ("option without value", 2, ("--variant", "requires an argument")),
    ("check without clip", 2, ("no clip was given",)),
    ("missing checkpoint", 2, ("no such checkpoint folder", "--self-test")),
    ("empty checkpoint", 2, ("checkpoint",)),
    ("variant needs more", 2, ("variant 'full' needs audio and vision, the clip has only text",)),
    ("null in the name", 2, ("null",)),
    ("name too long", 2, ("file name too long",)),
    ("newline in the name", 2, ("a b\\x1b[31m: no such file",)),
]


@pytest.mark.parametrize(("name", "code", "says"), ARGUMENTS, ids=[a[0].replace(" ", "_") for a in ARGUMENTS])
def test_bad_arguments(shared_bundle, tmp_path, name, code, says):
    write_clip(tmp_path / "clip.npz", clip_arrays(0, ("text",)))
    (tmp_path / "folder").mkdir()
    before = tree(tmp_path)
    arguments = arguments_of(name, tmp_path / "clip.npz", shared_bundle, tmp_path / "folder")
    assert_one_line(run(hcmen.runtime.commands.run.main, *arguments), code, *says)
    assert tree(tmp_path) == before


def test_a_self_test_of_a_variant_that_was_not_exported(tmp_path):
    bundle = make_bundle(tmp_path / "b", ("text_only",))
    done = run(hcmen.runtime.commands.run.main, "--self-test", "--bundle", bundle, "--variant", "full")
    assert_one_line(done, 2, "variant 'full' is not in this bundle, it has text_only")


@pytest.mark.parametrize("what", ["clip", "folder of clips", "bundle", "manifest", "weights"])
def test_what_may_not_be_read(what):
    with open_folder() as folder:
        bundle = make_bundle(folder / "bundle")
        (folder / "clips").mkdir()
        clip = folder / "clips" / "clip.npz"
        write_clip(clip, clip_arrays(0))
        closed = {
            "clip": clip,
            "folder of clips": folder / "clips",
            "bundle": bundle,
            "manifest": bundle / "manifest.json",
            "weights": bundle / "weights.bin",
        }[what]
        closed.chmod(0)
        argument = folder / "clips" if what == "folder of clips" else clip
        with without_privileges():
            done = run(hcmen.runtime.commands.run.main, argument, "--bundle", bundle)
        closed.chmod(0o755)
    assert_one_line(done, 2, str(closed), "permission denied")


# --- export and training --------------------------------------------------------------------------------------------


def test_export_without_a_checkpoint(tmp_path):
    from hcmen.export.commands.export import main

    before = tree(tmp_path)
    done = run(main, "--checkpoint", tmp_path / "none", "--bundle", tmp_path / "bundle")
    assert_one_line(done, 2, str(tmp_path / "none"))
    assert tree(tmp_path) == before


def test_export_of_an_unknown_variant(tmp_path):
    from hcmen.export.commands.export import main

    done = run(main, "--checkpoint", tmp_path, "--bundle", tmp_path / "b", "--variant", "text_mising")
    assert_one_line(done, 2, "'text_mising': did you mean 'text_missing'?")
    assert not (tmp_path / "b").exists()


@command("hcmen-write")
@click.argument("place")
def write(console: object, place: str) -> None:
    """Writes the small bundle as hcmen-export does, without a model to train first."""
    make_bundle(Path(place))


def test_output_that_may_not_be_written():
    with open_folder() as folder:
        (folder / "file").write_text("x")
        (folder / "other").mkdir()
        (folder / "other" / "thesis.txt").write_text("x")
        before = tree(folder)
        folder.chmod(0o555)
        with without_privileges():
            denied = run(write, folder / "bundle")
            below_a_file = run(write, folder / "file" / "bundle")
        folder.chmod(0o755)
        on_a_file = run(write, folder / "file")
        on_other_things = run(write, folder / "other")
        after = tree(folder)
    assert_one_line(denied, 2, "permission denied", str(folder))
    assert_one_line(below_a_file, 2, str(folder / "file"))
    assert_one_line(on_a_file, 2, "a file is there, expected a folder for the bundle")
    assert_one_line(on_other_things, 2, "a folder that is no bundle")
    assert after == before


@pytest.mark.parametrize("kilobytes", [4, 8, 24, 64])
def test_a_full_disk(tmp_path, kilobytes):
    """A tmpfs too small for the bundle: one line, and an older bundle is as it was."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        done = run(write, place / "bundle")
        left = os.listdir(place)
    finally:
        subprocess.run(["umount", str(place)], check=True)
    assert_one_line(done, 2, "no space left on device, free some space or choose another place")
    assert left == []


def test_a_disk_that_fills_up_leaves_the_older_bundle(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        make_bundle(place / "bundle", ("text_only", "audio_only"))
        before = tree(place)
        done = run(write, place / "bundle")
        after = tree(place)
    finally:
        subprocess.run(["umount", str(place)], check=True)
    assert_one_line(done, 2, "no space left on device")
    assert after == before


@pytest.mark.parametrize(
    ("reason", "kind", "fix"),
    [
        ("Secure opened-file canonicalization requires procfs at /proc/self/fd/5.", BackendError, "mount /proc"),
        ("Exception during initialization: std::bad_alloc", BackendError, "free some memory"),
        ("Failed to allocate memory for requested buffer of size 1048576", BackendError, "free some memory"),
        ("mmap failed: Cannot allocate memory", BackendError, "free some memory"),
        ("Load model failed: Too many open files", BackendError, "close files, or raise the limit"),
        ("Unsupported model IR version: 99, max supported IR version: 11", BackendError, "upgrade onnxruntime"),
        ("Type Error: Type 'tensor(int64)' of input is invalid", CorruptFileError, "export the bundle again"),
    ],
)
def test_a_graph_that_is_as_listed_is_refused_for_a_reason_that_has_its_own_advice(reason, kind, fix):
    error = ort._load_error(RuntimeError(f"[ONNXRuntimeError] : 1 : FAIL : {reason}"), "b/full.onnx", "1.23.2")
    assert type(error) is kind
    assert (error.where, error.fix.startswith(fix)) == ("b/full.onnx", True)
    assert reason in str(error)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="mounts, which root alone may")
def test_without_proc_the_bundle_is_not_blamed(tmp_path, shared_bundle):
    write_clip(tmp_path / "clip.npz", clip_arrays(0))
    score = [sys.executable, "-m", "hcmen", "run", str(tmp_path / "clip.npz"), "--bundle", str(shared_bundle)]
    hidden = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
    if subprocess.run([*hidden, "true"], capture_output=True).returncode:
        pytest.skip("this container mounts nothing")
    done = subprocess.run([*hidden, *score], capture_output=True, text=True)
    assert "bundle again" not in done.stderr
    if done.returncode == -signal.SIGABRT and "Error in cpuinfo" in done.stderr:
        pytest.skip(f"onnxruntime {onnxruntime.__version__} itself ends where there is no /proc: a later one does not")
    # Versions of ONNX Runtime that open no file by /proc need none.
    assert done.returncode == 0 or (done.returncode == 3 and "mount /proc where this runs" in done.stderr), done.stderr
