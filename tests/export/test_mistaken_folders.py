"""A folder or file that was named in another's place: the error says what it is, and what then helps."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command import Outcome, open_folder, run, without_privileges

from hcmen.__main__ import COMMANDS
from hcmen.base.bundle import read_bundle
from hcmen.base.errors import CorruptFileError, InputError
from hcmen.base.shipped import DEMO
from hcmen.base.typed import as_typed
from hcmen.training.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[2]
CLIP = ROOT / "samples" / "clip.npz"
BUNDLE, TRAIN = DEMO / "bundle", DEMO / "train"

READERS = {
    "run": ["run", CLIP],
    "follow": ["follow", "chunks", "--window", "1", "--hop", "1"],
    "bench": ["bench"],
    "doctor": ["doctor"],
    "eval": ["eval", "--no-pictures"],
    "compile": ["compile"],
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    (tmp_path / "chunks").mkdir()
    shutil.copytree(TRAIN, tmp_path / "build" / "train")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def called(name: str, *arguments: object) -> Outcome:
    return run(importlib.import_module(COMMANDS[name].module).main, *arguments)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("place", ["build/train", "build/train/checkpoint.safetensors"])
@pytest.mark.parametrize("name", READERS)
def test_a_checkpoint_in_a_bundles_place_can_be_made_one(name, place):
    command, *arguments = READERS[name]
    done = called(command, *arguments, "--bundle", place)
    assert done.code == (1 if name == "doctor" else 2), done.err
    told = done.out if name == "doctor" else done.err
    assert f"{place}: a " in told
    assert "checkpoint folder, expected a bundle" in told
    assert f"{as_typed('hcmen-export')} --checkpoint build/train --bundle OTHER" in told.replace(f"{os.getcwd()}/", "")


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("b/full.onnx", "b/full.onnx: not a folder, expected a bundle: name the folder itself, b"),
        ("b/golden", "b/golden: a part of a bundle, expected a bundle: name the whole, b"),
        ("b/engines", "b/engines: a part of a bundle, expected a bundle: name the whole, b"),
        ("other", "other: no manifest.json in it, expected a bundle: name the folder that hcmen-export wrote"),
        ("web", "web: its manifest.json is something else's, expected a bundle: name the folder that hcmen-export"),
        ("file", "file: not a folder, expected a bundle: name the folder that hcmen-export wrote"),
        ("empty", "make one with hcmen-export --bundle empty"),
        ("none", "none: no such folder, expected a bundle: make one with hcmen-export --bundle none"),
        ("a b; rm", "--bundle 'a b; rm'"),
    ],
)
def test_what_else_is_no_bundle_is_told_by_what_it_is(here, place, says):
    shutil.copytree(BUNDLE, "b")
    (here / "b" / "engines").mkdir()
    (here / "b" / "engines" / "manifest.json").write_text('{"schema_version": 1, "engines": []}')
    for name in ("other", "web", "empty"):
        (here / name).mkdir()
    (here / "other" / "notes.txt").touch()
    (here / "web" / "manifest.json").write_text('{"name": "an extension", "version": "1"}')
    (here / "file").touch()
    with pytest.raises(InputError) as told:
        read_bundle(place)
    assert says in str(told.value).replace(as_typed("hcmen-export"), "hcmen-export")


def test_a_damaged_manifest_is_still_one():
    shutil.copytree(BUNDLE, "b")
    data = json.loads(Path("b/manifest.json").read_text(encoding="utf-8"))
    for content in ({}, {"op": data["op"]}):
        Path("b/manifest.json").write_text(json.dumps(content))
        with pytest.raises(CorruptFileError, match="is missing: copy or export the bundle again"):
            read_bundle("b")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["export", "--checkpoint", BUNDLE, "--bundle", "new"], "name the one it was exported from"),
        (["eval", "--no-pictures", "--checkpoint", BUNDLE], "name the one it was exported from"),
        (["run", CLIP, "--check", "--checkpoint", BUNDLE], "name the one it was exported from"),
        (["bench", "--against", "eager", "--checkpoint", BUNDLE], "name the one it was exported from"),
        (["train", "--resume", "--out", "b"], "name the one to resume by --out"),
        (["train", "--out", "b"], "choose another --out"),
        (["train", "--force", "--out", "b"], "choose another --out"),
    ],
)
def test_a_bundle_in_a_checkpoints_place_is_told(here, command, says):
    shutil.copytree(BUNDLE, "b")
    before = files(here / "b")
    done = called(command[0], *command[1:])
    assert done.code == 2, done.err
    assert ": a bundle, expected a" in done.lines[-1]
    assert done.lines[-1].endswith(says)
    assert files(here / "b") == before
    assert not (here / "new").exists()


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_an_export_never_replaces_a_checkpoint(here, force):
    before = files(here / "build" / "train")
    done = called("export", "--variant", "text_only", "--bundle", "build/train", *force)
    assert done.code == 2, done.err
    assert done.lines[-1] == "error: build/train: a checkpoint folder, expected a place for the bundle: choose another"
    assert files(here / "build" / "train") == before


@pytest.mark.parametrize("way", ["hcmen-run", "hcmen run", "python -m hcmen run"])
def test_errors_name_commands_that_can_be_typed_where_one_is(here, way):
    """In a checkout the commands are in .venv/bin, which is not on the PATH."""
    scripts = Path(sys.executable).parent
    start = {
        "hcmen-run": [scripts / "hcmen-run"],
        "hcmen run": [scripts / "hcmen", "run"],
        "python -m hcmen run": [sys.executable, "-m", "hcmen", "run"],
    }[way]
    environment = {**os.environ, "PATH": "/usr/bin:/bin"}

    def line(*arguments: str) -> str:
        done = subprocess.run([*start, *arguments], capture_output=True, text=True, env=environment)
        assert done.returncode == 2, done.stderr
        return done.stderr.splitlines()[-1]

    told = line(str(CLIP), "--bundle", "none")
    typed = told.partition("make one with ")[2].replace(" --bundle none", " --help")
    assert typed != told
    usage = line("--no-such-option").partition("(see ")[2].removesuffix(")")
    for each in (typed, usage):
        assert each.startswith(("/", "'/", ".venv")), each
        done = subprocess.run(["sh", "-c", each], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("Usage: ")


@pytest.mark.parametrize("name", ["config.json", "checkpoint.safetensors"])
def test_a_checkpoint_that_may_not_be_read_is_not_to_be_trained_again(name):
    with open_folder() as folder:
        shutil.copytree(TRAIN, folder / "train")
        (folder / "train" / name).chmod(0)
        with without_privileges(), pytest.raises(InputError) as told:
            load_checkpoint(folder / "train")
    assert str(told.value).endswith("permission denied, expected a checkpoint: check its owner and permissions")
