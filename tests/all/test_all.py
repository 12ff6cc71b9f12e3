"""The runner of `make test-all`: what it brings, what it says of the rest, how it counts. Nothing is fetched."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers import trt_wheels, wheels
from helpers.scripts import loaded
from helpers.wheels import Unavailable

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    return loaded(Path(__file__).with_name("run.py"), "all_run")


# --- what is brought --------------------------------------------------------------------------------------------------


def test_everything_has_a_version(runner):
    assert {*runner.PACKAGES, *runner.RUNNERS} <= runner.pins().keys()
    brought = [*runner.ENVIRONMENTS.values(), *trt_wheels.LEAN.values(), (trt_wheels.HEADERS,)]
    assert all(
        re.fullmatch(r"[\w.-]+==[\w.]+", requirement) for requirements in brought for requirement in requirements
    )
    names = [item.name for item in runner.items()]
    assert len(set(names)) == len(names)


def test_the_oldest_environment_is_the_oldest_that_the_package_admits(runner):
    project = (ROOT / "pyproject.toml").read_text()
    oldest = dict(requirement.split("==") for requirement in runner.ENVIRONMENTS["oldest"])
    assert oldest.keys() == {"numpy", "click", "onnxruntime"}
    for name, version in oldest.items():
        (admitted,) = set(re.findall(rf'"{name}>=([\d.]+)"', project))
        assert version.startswith(f"{admitted}."), name


def test_the_rest_is_brought_where_one_thing_cannot_be(runner, capsys):
    calls: list[str] = []

    def item(name: str, here: bool, error: str = "") -> Any:
        def bring() -> None:
            calls.append(name)
            if error:
                raise Unavailable(error)

        return runner.Item(name, lambda: here, bring)

    left_out = runner.bring([item("there", True), item("gone", False, "no index answers"), item("new", False)])
    assert (calls, left_out) == (["gone", "new"], {"gone": "no index answers"})
    assert capsys.readouterr().out.splitlines() == ["left out gone: no index answers", "brought new, 0 s"]


def test_a_package_of_another_version_is_not_there(runner):
    assert runner.package("pytest", pytest.__version__).here()
    assert not runner.package("pytest", "0.0.1").here()
    assert not runner.package("no-such-package", "1.0").here()


def test_a_command_that_fails_gives_its_last_line(runner):
    runner.run([sys.executable, "-c", "pass"])
    with pytest.raises(Unavailable, match=r"^No matching distribution$"):
        runner.run([sys.executable, "-c", "import sys; sys.exit('Looking\\nNo matching distribution')"])
    with pytest.raises(Unavailable, match=r"^exit code 7$"):
        runner.run([sys.executable, "-c", "raise SystemExit(7)"])
    with pytest.raises(Unavailable, match="no-such-program"):
        runner.run(["no-such-program"])
    with pytest.raises(Unavailable, match="timed out"):
        runner.run([sys.executable, "-c", "import time; time.sleep(60)"], timeout_s=1)


def test_programs_are_installed_by_root_alone(runner, monkeypatch, tmp_path):
    (tmp_path / "apt-get").write_text(
        f"#!/bin/sh\nfor word; do case $word in update|install) echo $word >> {tmp_path}/calls;; esac; done\n"
    )
    (tmp_path / "apt-get").chmod(0o755)
    item = runner.program("no-such-program", "some-package")
    assert not item.here()
    assert runner.program("sh", "dash").here()
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Unavailable, match=r"^only root installs it: sudo apt-get install some-package$"):
        item.bring()
    assert not (tmp_path / "calls").exists()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    item.bring()
    assert (tmp_path / "calls").read_text() == "update\ninstall\n"
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Unavailable, match="no apt-get to install some-package with"):
        item.bring()


def test_an_environment_is_kept_until_something_changes(runner, monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    commands: list[list[str]] = []

    def run(command: list[object]) -> None:
        commands.append([str(c) for c in command])
        (tmp_path / "build" / "numpy" / "old").mkdir(parents=True, exist_ok=True)

    source = tmp_path / "runtime" / "csrc" / "kernels.cc"
    source.parent.mkdir(parents=True)
    for path in (tmp_path / "pyproject.toml", tmp_path / "CMakeLists.txt", source):
        path.touch()
        os.utime(path, (1, 1))
    monkeypatch.setattr(runner, "run", run)
    monkeypatch.setattr(runner, "ENVIRONMENTS", {"old": ["numpy==1.24.2"]})
    item = runner.environment("old", ["numpy==1.24.2"])
    assert not item.here()
    item.bring()
    assert item.here()
    assert "old" in [part.name for part in runner.smaller_parts()]
    assert [*commands[1][-5:-3], commands[2][-2:]] == ["numpy==1.24.2", commands[1][-4], ["--editable", str(tmp_path)]]
    assert not runner.environment("old", ["numpy==1.24.3"]).here()
    later = (tmp_path / "build" / "numpy" / "old" / "installed").stat().st_mtime + 10
    os.utime(source, (later, later))
    assert not item.here()

    def fails(command: list[object]) -> None:
        raise Unavailable("no index answers")

    monkeypatch.setattr(runner, "run", fails)
    with pytest.raises(Unavailable):
        item.bring()
    assert "old" not in [part.name for part in runner.smaller_parts()]  # which would fail half made


def write_wheel(folder: Path, name: str) -> None:
    about = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/__init__.py", "")
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")


def test_wheels_lie_together_or_not_at_all(monkeypatch, tmp_path):
    monkeypatch.setattr(wheels, "FOLDER", tmp_path / "wheels")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    for name in ("one", "other"):
        write_wheel(tmp_path, name)
    with pytest.raises(Unavailable, match=r"^one==1.0 absent==1.0 cannot be had here: .*absent"):
        wheels.unpacked("one==1.0", "absent==1.0")
    assert list((tmp_path / "wheels").iterdir()) == []
    folder = wheels.unpacked("one==1.0", "other==1.0")
    assert folder == wheels.folder_of("one==1.0", "other==1.0")
    assert {"one", "other"} <= {path.name for path in folder.iterdir()}
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert wheels.unpacked("one==1.0", "other==1.0") == folder  # without asking anyone


def test_headers_and_lean_runtimes_are_those_that_are_named_or_there(monkeypatch, tmp_path):
    monkeypatch.setattr(wheels, "FOLDER", tmp_path)
    monkeypatch.setattr(trt_wheels, "_PLACES", (str(tmp_path / "debian"),))
    monkeypatch.delenv("TENSORRT_INCLUDE_DIR", raising=False)
    monkeypatch.delenv("TENSORRT_LEAN_DIR", raising=False)
    packages = "tensorrt_bindings", "tensorrt_lean_libs"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # nothing is installed
    assert (trt_wheels.include_folders(), trt_wheels.lean_folders(*packages)) == ([], {})

    brought = wheels.folder_of(trt_wheels.HEADERS) / "kernel_lens" / "include" / "tensorrt"
    for place in (brought, tmp_path / "debian"):
        place.mkdir(parents=True)
        (place / "NvInferRuntimePlugin.h").touch()
        assert trt_wheels.include_folders() == [place]  # the machine's own before the one that was brought
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", "/a:/b")
    assert trt_wheels.include_folders() == [Path("/a"), Path("/b")]

    version, requirements = next(iter(trt_wheels.LEAN.items()))
    lean = wheels.folder_of(*requirements)
    (lean / packages[0]).mkdir(parents=True)
    assert trt_wheels.lean_folders(*packages) == {}  # half of it
    (lean / packages[1]).mkdir()
    monkeypatch.setenv("TENSORRT_LEAN_DIR", f"{lean}:/nowhere")
    assert trt_wheels.lean_folders(*packages) == {lean.name: lean, version: lean}


# --- what is counted --------------------------------------------------------------------------------------------------

CASES = """
import pytest

def test_right(): pass
@pytest.mark.parametrize("i", range(3))
def test_left_out(i): pytest.skip(f"no  tool in {__file__}"[:8])
def test_wrong(): assert False
@pytest.fixture
def broken(): raise ValueError
def test_unready(broken): pass
@pytest.mark.skipif(True, reason="no GPU")
def test_later(): pass
"""


def test_pytests_own_results_are_read(runner, tmp_path):
    (tmp_path / "test_cases.py").write_text(CASES)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=out.xml", "test_cases.py"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    found = runner.of_pytest(tmp_path / "out.xml")
    assert (found.passed, found.failed, found.skipped) == (1, 2, Counter({"no tool": 3, "no GPU": 1}))


def test_the_results_for_arm_are_read(runner, tmp_path):
    steps = {
        "build": {"status": "passed"},
        "grid": {"status": "FAILED", "output_tail": "it broke"},
        "wheel": {"status": "skipped", "reason": "no index"},
    }
    (tmp_path / "arm.json").write_text(json.dumps({"steps": steps}))
    found = runner.of_arm(tmp_path / "arm.json")
    assert (found.passed, found.failed, found.skipped) == (1, 1, Counter({"step wheel: no index": 1}))


@pytest.mark.parametrize(
    ("code", "written", "failed"),
    [(0, 0, 0), (1, 2, 2), (3, 0, 1), (0, None, 1)],
    ids=["right", "wrong", "ends before it counts", "writes nothing"],
)
def test_a_part_that_ends_badly_counts_as_failed(runner, tmp_path, capsys, code, written, failed):
    results = tmp_path / "part.json"
    writes = "" if written is None else f"open({str(results)!r}, 'w').write('{written}');"
    command = [sys.executable, "-c", f"import sys; {writes} print('said'); sys.exit({code})"]

    def read(path: Path) -> Any:
        return runner.Outcome(passed=1, failed=int(path.read_text()))

    results.write_text("5")  # of a run before
    outcome, _ = runner.run_part(runner.Part("part", command, results, read))
    shown = capsys.readouterr().out
    assert outcome.failed == failed
    assert ("said" in shown) is bool(failed)


def test_the_end_says_what_was_left_out_and_why(runner):
    outcomes = {
        "suite": runner.Outcome(9, 0, Counter({"no GPU": 4, "no tool": 5})),
        "arm": runner.Outcome(2, 1),
    }
    assert runner.summary(outcomes, {"tool 1.0": "no index answers"}) == [
        "",
        "skipped in suite:",
        "    5  no tool",
        "    4  no GPU",
        "",
        "could not be brought:",
        "       tool 1.0: no index answers",
        "",
        "11 passed, 1 failed, 9 skipped",
    ]
    assert runner.summary({}, {}) == []  # where nothing ran


def test_what_is_left_out_of_the_environments_is_there(runner):
    """A test that was renamed would run where it cannot, or leave a file out that is gone."""
    for option in runner.SELECTION:
        path, _, name = option.partition("=")[2].partition("::") if "=" in option else (option, "", "")
        assert (ROOT / path).exists(), option
        assert not name or f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(), option
