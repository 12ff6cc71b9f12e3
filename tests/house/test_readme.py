"""The README quotes docs/results as they are, and its commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_figures_are_those_of_the_results():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "readme.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README))))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


@pytest.mark.parametrize("line", re.findall(r"^(hcmen-\w+ .*?)\s*(?:#.*)?$", README, re.M))
def test_commands_take_the_options_shown(line):
    name, *arguments = line.split()
    shown = subprocess.run(
        [Path(sys.executable).parent / name, "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(option in shown for option in arguments if option.startswith("--"))
