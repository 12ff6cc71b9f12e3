"""The demo's table: text and picture say what the rows say."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from hcmen.base.shipped import DEMO as SHIPPED

DEMO_BUNDLE = SHIPPED / "bundle"
DEMO = Path(__file__).resolve().parents[2] / "samples" / "demo.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
