"""The demo's table: text and picture say what the rows say."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.scripts import loaded

from hcmen.base.shipped import DEMO as SHIPPED

DEMO_BUNDLE = SHIPPED / "bundle"
DEMO = Path(__file__).resolve().parents[2] / "samples" / "demo.py"


@pytest.fixture(scope="module")
def demo():
    return loaded(DEMO, "demo")


ROWS = [
    {"variant": "full", "score": 1.25, "eager": 1.25001, "difference": 1e-5, "latency_ms": 12.5, "bytes": 2048},
    {"variant": "vision_only", "score": -0.5, "eager": -0.5, "difference": 0.0, "latency_ms": 0.731, "bytes": 30000},
]


def test_text_has_a_line_per_row_and_aligned_columns(demo):
    lines = demo.as_text(ROWS).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split() == ["full", "+1.2500", "+1.2500", "1.0e-05", "12.50", "ms", "2", "KiB"]
    assert lines[3].split() == ["vision_only", "-0.5000", "-0.5000", "0.0e+00", "0.73", "ms", "29", "KiB"]


def test_the_table_calls_the_time_what_the_command_calls_it(demo):
    from helpers.command import run

    from hcmen.runtime.commands.run import main

    header = run(main, DEMO.with_name("clip.npz"), "--bundle", DEMO_BUNDLE).out.splitlines()[0]
    assert header.split()[-1] == "time"
    assert "time" in demo.HEADER
    assert demo.TIME_IS == "Time: median of 100 calls after the first."
    assert "atency" not in demo.as_text(ROWS)


def test_picture_is_written(demo, tmp_path):
    demo.as_picture(ROWS, "a footer", tmp_path / "table.png")
    content = (tmp_path / "table.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 5000


def test_a_failing_command_ends_the_demo_with_its_exit_code(demo, capfd):
    with pytest.raises(SystemExit) as stop:
        demo.run("hcmen-run", "nowhere.npz", "--bundle", "/nonexistent", capture=True)
    assert stop.value.code == 2
    assert "no such folder" in capfd.readouterr().err


def test_the_commands_that_it_prints_can_be_typed(demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for bundle in (DEMO_BUNDLE, tmp_path / "build" / "bundle"):
        if not bundle.exists():
            shutil.copytree(DEMO_BUNDLE, bundle)
        lines = demo.next_commands(DEMO.with_name("clip.npz"), bundle).removeprefix("Next:").splitlines()
        assert len(lines) == 2
        for line in lines:
            done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        assert ("--bundle" in lines[0]) == (bundle == DEMO_BUNDLE)


# --- what is there already -------------------------------------------------------------------------------------------


@pytest.fixture
def build(demo, tmp_path, monkeypatch) -> Path:
    """A folder for the demo, whose commands are stand-ins: they copy the shipped checkpoint and bundle."""

    def stand_in(*arguments: str | Path, capture: bool = False) -> str:
        name, out = arguments[0], Path(arguments[-2])
        source, made = {"hcmen-train": (SHIPPED / "train", b"trained"), "hcmen-export": (DEMO_BUNDLE, b"")}[name]
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(source, out)
        if made:  # as another machine's training differs in its last bits
            (out / "checkpoint.safetensors").write_bytes(made)
        else:
            manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
            manifest["source"]["checkpoint_sha256"] = hashlib.sha256(b"trained").hexdigest()
            (out / "manifest.json").write_text(json.dumps(manifest))
        return ""

    monkeypatch.setattr(demo, "run", stand_in)
    monkeypatch.setattr(demo, "score_every_variant", lambda *_: ROWS)
    monkeypatch.setattr("sys.argv", ["demo.py", "--build", str(tmp_path / "build")])
    return tmp_path / "build"


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def own_training(build: Path) -> None:
    shutil.copytree(SHIPPED / "train", build / "train", dirs_exist_ok=True)
    (build / "train" / "checkpoint.safetensors").write_bytes(b"weeks of work")


def half_a_training(build: Path) -> None:
    (build / "train").mkdir(parents=True, exist_ok=True)
    (build / "train" / "last.safetensors").write_bytes(b"days of work")
    (build / "train" / "checkpoint.safetensors").unlink(missing_ok=True)


def own_bundle(build: Path) -> None:
    shutil.copytree(DEMO_BUNDLE, build / "bundle", dirs_exist_ok=True)
    manifest = json.loads((build / "bundle" / "manifest.json").read_text(encoding="utf-8"))
    manifest["source"]["checkpoint_sha256"] = "0" * 64
    (build / "bundle" / "manifest.json").write_text(json.dumps(manifest))


def own_notes(build: Path) -> None:
    shutil.rmtree(build / "bundle", ignore_errors=True)
    (build / "bundle").mkdir(parents=True)
    (build / "bundle" / "notes.txt").write_text("mine")


@pytest.mark.parametrize("after_a_demo", [False, True])
@pytest.mark.parametrize("provoke", [own_training, half_a_training, own_bundle, own_notes])
def test_what_the_demo_did_not_make_it_does_not_replace(demo, build, provoke, after_a_demo, capsys):
    if after_a_demo:
        demo.main()
    provoke(build)
    before = files(build)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        demo.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert line.startswith("error: ")
    assert "not made by the demo, which would replace it: move it away" in line
    assert "demo.py --build OTHER" in line
    assert str(build / ("bundle" if provoke in (own_bundle, own_notes) else "train")) in line
    assert files(build) == before


def test_the_demo_replaces_its_own_and_the_shipped_and_what_was_stopped(demo, build, monkeypatch):
    demo.main()
    demo.main()
    shutil.rmtree(build)
    shutil.copytree(SHIPPED / "train", build / "train")
    shutil.copytree(DEMO_BUNDLE, build / "bundle")
    demo.main()

    def stopped(*arguments: str | Path, capture: bool = False) -> str:
        (build / "train" / "checkpoint.safetensors").write_bytes(b"half way")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "run", stopped)
        with pytest.raises(KeyboardInterrupt):
            demo.main()
    demo.main()
    assert (build / "train" / "checkpoint.safetensors").read_bytes() == b"trained"


def test_the_pages_name_the_folders_of_the_demo():
    root = DEMO.parents[1]
    readme = (root / "README.md").read_text(encoding="utf-8")
    for name in ("train", "bundle", "demo"):
        assert f"`build/{name}`" in readme
    assert 'load("build/bundle")  # which make demo made' in readme
