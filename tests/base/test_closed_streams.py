"""Every command with any of its three standard streams closed: it works, and what has a place to go to goes there."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

import hcmen.__main__ as umbrella

LOST = "warning: stdout is closed, what would be printed there is lost\n"
CLOSED = {"<&-": 0, ">&-": 1, "2>&-": 2}


def shell(arguments: list[str], closing: str) -> subprocess.CompletedProcess[str]:
    line = ["bash", "-c", f'"$@" {closing}', "bash", sys.executable, "-m", "hcmen", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, stdin=subprocess.PIPE)


@pytest.mark.parametrize("name", umbrella.COMMANDS)
def test_every_command(name: str) -> None:
    for closing in CLOSED:
        done = shell([name, "--version"], closing)
        assert done.returncode == 0, closing
        assert done.stdout == ("" if closing == ">&-" else f"hcmen-{name} 0.1.0\n")
        assert done.stderr == (LOST if closing == ">&-" else "")
        done = shell([name, "--no-such-option"], closing)
        assert (done.returncode, done.stdout) == (2, ""), closing
        assert (done.stderr == "") == (closing == "2>&-")


def test_the_umbrella() -> None:
    for closing in CLOSED:
        assert shell(["--help"], closing).returncode == 0
        assert shell(["no-such-command"], closing).returncode == 2


@pytest.mark.parametrize("closing", [" ".join(c) for n in (1, 2, 3) for c in itertools.combinations(CLOSED, n)])
def test_a_score(shared_bundle, tmp_path, closing: str) -> None:
    from helpers.small_bundle import clip_arrays

    from hcmen.base.clip import write_clip

    write_clip(tmp_path / "a.npz", clip_arrays(1))
    whole = shell(["run", str(tmp_path / "a.npz"), "--bundle", str(shared_bundle), "--format", "json"], "")
    done = shell(["run", str(tmp_path / "a.npz"), "--bundle", str(shared_bundle), "--format", "json"], closing)
    assert done.returncode == 0
    if " >&-" in f" {closing}":
        assert done.stdout == ""
        assert done.stderr == ("" if "2>&-" in closing else LOST)
    else:
        assert '"score"' in done.stdout
        assert done.stdout.splitlines()[:10] == whole.stdout.splitlines()[:10]
    done = shell(["run", str(tmp_path / "none.npz"), "--bundle", str(shared_bundle)], closing)
    assert done.returncode == 2
    assert ("no such file" in done.stderr) == ("2>&-" not in closing)
