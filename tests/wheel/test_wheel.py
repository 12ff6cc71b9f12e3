"""What a wheel has to be: tests/wheel/run.py builds one and runs it alone; here is what costs little to know."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hcmen.base.library import library_path

ROOT = Path(__file__).resolve().parents[2]
CHECK = ROOT / "tests" / "wheel" / "check.py"


def test_the_library_asks_for_the_c_library_alone():
    """Nothing of the C++ library of the machine that it was built on."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump (binutils) is not installed")
    spec = importlib.util.spec_from_file_location("wheel_build", ROOT / "tests" / "wheel" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    needs = build.library_needs(library_path())
    if "libstdc++.so.6" in needs["needed"]:
        pytest.skip("the compiler of this machine has no static C++ library")
    parts = ("libc.so", "libm.so", "libpthread.so", "libdl.so", "librt.so", "ld-linux")
    assert [n for n in needs["needed"] if not n.startswith(parts)] == []
    assert needs["other_versions"] == []


def test_the_check_of_an_installed_wheel_passes_here():
    """On this environment, which has more in it than a wheel needs."""
    done = subprocess.run(
        [sys.executable, str(CHECK), "--not-bare"], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert len(facts["self_test"]) == 7
    assert facts["clip"]["score"] == pytest.approx(facts["clip"]["golden"], abs=1e-4)


def test_the_check_sees_what_should_not_be_there():
    done = subprocess.run([sys.executable, str(CHECK)], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("error: expected no torch or onnx")


def test_the_check_fails_where_hcmen_does(tmp_path):
    """An interpreter that cannot run it is named with what it said."""
    command = [
        sys.executable,
        str(CHECK),
        "--python",
        f"{shlex.quote(sys.executable)} -S -E",
        "--scripts",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "No module named 'hcmen'" in done.stderr


def test_both_architectures_are_built_and_checked():
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    assert all(b.endswith("-manylinux_*") for b in settings["build"])
    assert (ROOT / settings["test-command"].split()[1].replace("{project}/", "")) == CHECK
    workflow = (ROOT / ".github" / "workflows" / "wheels.yml").read_text()
    assert "ubuntu-24.04-arm" in workflow
    assert "cibuildwheel" in workflow
