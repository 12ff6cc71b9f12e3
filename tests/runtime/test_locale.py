"""Numbers and names do not depend on the locale: where 0.5 is 0,5, and where the lower case of I is no i."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hcmen.base.shipped import DEMO

CLIP = Path(__file__).resolve().parents[2] / "samples" / "clip.npz"
# As an application with a user interface does; Python itself takes over the encoding alone.
TAKE_OVER = (
    "import locale, sys; locale.setlocale(locale.LC_ALL, ''); from hcmen.__main__ import main\n"
    "assert locale.localeconv()['decimal_point'] == sys.argv.pop(1); main()"
)


@pytest.fixture(scope="module", params=["de_DE", "tr_TR"])
def environment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables that set the locale, which is made here where the system has its source."""
    folder = tmp_path_factory.mktemp("locales")
    program = shutil.which("localedef")
    if program is None:
        pytest.skip("there is no localedef")
    made = subprocess.run(
        [program, "-i", request.param, "-f", "UTF-8", f"{folder}/{request.param}.UTF-8"], capture_output=True
    )
    if made.returncode:
        pytest.skip(f"this system has no source of {request.param}")
    return {**os.environ, "LOCPATH": str(folder), "LC_ALL": f"{request.param}.UTF-8", "HCMEN_ISA": "baseline"}


def scores(point: str, environment: dict[str, str], *arguments: str) -> list[float]:
    command = [sys.executable, "-c", TAKE_OVER, point, "run", str(CLIP), "--bundle", str(DEMO / "bundle"), *arguments]
    done = subprocess.run([*command, "--format", "json"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [result["score"] for result in json.loads(done.stdout)["results"]]


def test_scores_and_options_are_those_of_any_other_locale(environment: dict[str, str]) -> None:
    plain = {**environment, "LC_ALL": "C.UTF-8"}
    arguments = ("--variant", "vision_missing", "--time-limit", "2.5")
    assert scores(",", environment, *arguments) == scores(".", plain, *arguments)


def test_a_graph_is_written_as_in_any_other_locale(environment: dict[str, str], tmp_path: Path) -> None:
    made = []
    for point, variables in ((",", environment), (".", {**environment, "LC_ALL": "C.UTF-8"})):
        out = tmp_path / variables["LC_ALL"]
        command = [sys.executable, "-c", TAKE_OVER, point, "export", "--checkpoint", str(DEMO / "train"), "-q"]
        done = subprocess.run(
            [*command, "--variant", "vision_only", "--bundle", str(out)], capture_output=True, text=True, env=variables
        )
        assert done.returncode == 0, done.stderr
        made.append([(out / name).read_bytes() for name in ("vision_only.onnx", "weights.bin")])
    assert made[0] == made[1]
