"""The pins of a device's packages: their digests are there, and the versions are those that are tested."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE = ROOT / "constraints-device.txt"


def pins(path):
    return dict(re.findall(r"(?m)^([\w.-]+)==(\S+)", path.read_text("ascii")))


def test_the_devices_packages_have_the_versions_that_are_tested():
    tested, device = pins(ROOT / "constraints.txt"), pins(FILE)
    assert {"click", "numpy", "onnxruntime"} <= device.keys()
    assert {name: tested[name] for name in device if name in tested} == {n: v for n, v in device.items() if n in tested}


def test_pip_takes_every_package_by_its_digest(tmp_path):
    """With nothing but this file, as a device would: all that the packages need must be in it."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-cache-dir"]
    command += ["--require-hashes", "--only-binary", ":all:"]
    done = subprocess.run([*command, "-r", FILE], capture_output=True, text=True, check=False, cwd=tmp_path)
    if re.search("No matching distribution|Connection|ConnectTimeout", done.stderr):
        pytest.skip("no package index answers")
    assert done.returncode == 0, done.stderr
    assert all(f"{name}-{version}" in done.stdout for name, version in pins(FILE).items())

    # And a digest that differs is refused.
    altered = tmp_path / "altered.txt"
    altered.write_text(re.sub(r"sha256:\w{4}", "sha256:0000", FILE.read_text("ascii")))
    done = subprocess.run([*command, "-r", altered], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr
