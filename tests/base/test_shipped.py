"""What commands take where no bundle or checkpoint was named, and that what comes with the package is sound."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command import run
from helpers.small_bundle import make_bundle

import hcmen.runtime.benchmark.command
import hcmen.runtime.commands.doctor
import hcmen.runtime.commands.follow
import hcmen.runtime.commands.run
from hcmen.base.bundle import read_bundle
from hcmen.base.modalities import VARIANTS
from hcmen.base.shipped import DEMO, chosen_bundle, chosen_checkpoint
from hcmen.runtime import load

CLIP = DEMO / "train" / "clips" / "000.npz"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_bundle_passes_its_self_test_and_its_card_is_there():
    from hcmen.export.card import CARD, card
    from hcmen.export.trained import trained

    bundle = read_bundle(DEMO / "bundle")
    bundle.verify()
    assert list(bundle.manifest.variants) == [v.name for v in VARIANTS]
    with load(bundle.path) as model:
        assert all(test.passed for test in model.self_test())
    told = (DEMO / "bundle" / CARD).read_text()
    config = json.loads((DEMO / "train" / "config.json").read_bytes())
    assert told == card(bundle.manifest, trained(DEMO / "train", config))
    assert "synthetic set of the demo" in told
    files = {str(p.relative_to(DEMO / "bundle")) for p in (DEMO / "bundle").rglob("*") if p.is_file()}
    assert files == {*(r.file for r in bundle.records()), "manifest.json", CARD}
    assert not (DEMO / "bundle" / "manifest.json").is_symlink()


def test_the_checkpoint_is_the_one_of_the_bundle():
    from hcmen.training.checkpoint import load_checkpoint

    model, described = load_checkpoint(DEMO / "train")
    weights = (DEMO / "train" / "checkpoint.safetensors").read_bytes()
    source = read_bundle(DEMO / "bundle").manifest.source
    assert hashlib.sha256(weights).hexdigest() == described["weights"]["sha256"] == source["checkpoint_sha256"]
    assert model.config.inputs == read_bundle(DEMO / "bundle").manifest.inputs
    text = "".join((DEMO / "train" / name).read_text() for name in ("config.json", "report.json"))
    assert str(Path.home()) not in text
    assert "/tmp" not in text


def test_a_named_place_is_taken_then_that_of_the_working_directory_then_the_demo(here):
    said: list[str] = []
    assert chosen_bundle("b", said.append) == Path("b")
    assert said == []
    assert chosen_bundle(None, said.append) == DEMO / "bundle"
    assert chosen_checkpoint(None, said.append) == DEMO / "train"
    assert said == [
        f"no --bundle given: taking {DEMO / 'bundle'}, the demo's, which comes with hcmen",
        f"no --checkpoint given: taking {DEMO / 'train'}, the demo's, which comes with hcmen",
    ]
    # Whatever is there is what was meant, also where it is no good: an error says so.
    (here / "build").mkdir()
    (here / "build" / "bundle").symlink_to("nowhere")
    (here / "build" / "train").mkdir()
    said.clear()
    assert chosen_bundle(None, said.append) == Path("build/bundle")
    assert chosen_checkpoint(None, said.append) == Path("build/train")
    assert said == ["no --bundle given: taking build/bundle", "no --checkpoint given: taking build/train"]


def test_the_checkpoint_of_a_bundle_is_found_wherever_it_is(here):
    digest = read_bundle(DEMO / "bundle").manifest.source["checkpoint_sha256"]
    shutil.copytree(DEMO / "train", here / "build" / "train")
    assert chosen_checkpoint(None, print, sha256=digest) == Path("build/train")
    for content in ("", "[]", '{"weights": 1}', '{"weights": {"sha256": "0"}}', "[" * 100_000):
        (here / "build" / "train" / "config.json").write_text(content)
        assert chosen_checkpoint(None, print, sha256=digest) == DEMO / "train"
    assert chosen_checkpoint(None, print, sha256=None) == Path("build/train")
    assert chosen_checkpoint(None, print, sha256="1") == Path("build/train")


COMMANDS = {
    "run": (hcmen.runtime.commands.run.main, [CLIP]),
    "check": (hcmen.runtime.commands.run.main, [CLIP, "--check"]),
    "doctor": (hcmen.runtime.commands.doctor.main, []),
    "bench": (
        hcmen.runtime.benchmark.command.main,
        ["--variant", "text_only", "--rounds", "1", "--calls", "1", "--warmup", "0", "--loads", "0"],
    ),
    "follow": (
        hcmen.runtime.commands.follow.main,
        ["chunks", "--window", "1", "--hop", "1", "--rate", "audio=20", "--rate", "vision=15"],
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_work_on_the_demo_with_nothing_named(here, name):
    command, arguments = COMMANDS[name]
    (here / "chunks").mkdir()
    shutil.copy(CLIP, here / "chunks")
    (here / "chunks" / "end").touch()
    done = run(command, *arguments)
    assert done.code == 0, done.err
    assert sum("which comes with hcmen" in line for line in done.lines) == (2 if name == "check" else 1)
    assert not (here / "build").exists()
    make_bundle(here / "build" / "bundle")
    assert "no --bundle given: taking build/bundle" in run(command, *arguments).err


def test_an_export_of_the_demo_goes_to_the_working_directory(here):
    from hcmen.export.commands.export import main

    before = {p: p.stat().st_mtime_ns for p in DEMO.rglob("*")}
    done = run(main, "--variant", "audio_missing")
    assert done.code == 0, done.err
    assert list(read_bundle(here / "build" / "bundle").manifest.variants) == ["audio_missing"]
    scored = run(hcmen.runtime.commands.run.main, CLIP)
    assert scored.code == 0
    assert "scored without audio, by 'audio_missing'" in scored.err
    assert {p: p.stat().st_mtime_ns for p in DEMO.rglob("*")} == before


@pytest.mark.parametrize("place", ["build/bundle", "elsewhere"])
@pytest.mark.parametrize("checkout", [True, False])
def test_what_is_named_and_not_there_is_an_error_that_tells_of_the_demo(here, place, checkout):
    if checkout:
        (here / "samples").mkdir()
        (here / "samples" / "demo.py").touch()
    done = run(hcmen.runtime.commands.run.main, CLIP, "--bundle", place)
    assert done.code == 2
    assert len(done.lines) == 1
    assert ("make demo" in done.err) == (checkout and place == "build/bundle")


def test_scoring_imports_no_torch(here):
    code = (
        "import sys; from hcmen.runtime.commands.run import main; main.main(sys.argv[1:], standalone_mode=False); "
        "sys.exit('torch' in sys.modules or 'onnx' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(CLIP)], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "full" in done.stdout


def test_the_demo_ships_what_it_made(here, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "samples"))
    import demo

    train = shutil.copytree(DEMO / "train", here / "train")
    report = json.loads((train / "report.json").read_text())
    (train / "report.json").write_text(json.dumps({**report, "checkpoint": "/home/someone/build/train"}))
    demo.ship(train, DEMO / "bundle", here / "shipped")
    files = {p.relative_to(DEMO): p.read_bytes() for p in DEMO.rglob("*") if p.is_file()}
    assert {p.relative_to("shipped"): p.read_bytes() for p in Path("shipped").rglob("*") if p.is_file()} == files
