"""Paths that are not UTF-8, as on old disks and where LC_ALL=C: every command takes them, and tells of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.small_bundle import clip_arrays

from hcmen.base.clip import write_clip

LOCALES = {
    "UTF-8": {"LC_ALL": "C.UTF-8"},
    "C": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}


@pytest.fixture(params=LOCALES)
def locale(request: pytest.FixtureRequest) -> dict[str, str]:
    return LOCALES[request.param]


@pytest.fixture
def folder(tmp_path: Path, shared_bundle: Path) -> Path:
    """A folder whose name is no text in any encoding but by chance, with a bundle and a clip in it."""
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xe9j\xe0-vu\xff"))
    shutil.copytree(shared_bundle, place / "bundle")
    write_clip(place / "a.npz", clip_arrays(1))
    return place


def hcmen(locale: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LC_") and k != "LANG"} | locale
    line = [sys.executable, "-m", "hcmen", *(str(a) for a in arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=240, env=environment, errors="strict")


def test_scores(folder: Path, locale: dict[str, str]) -> None:
    done = hcmen(locale, "run", folder / "a.npz", "--bundle", folder / "bundle", "--self-test")
    assert (done.returncode, done.stderr) == (0, "")
    assert "7 of 7 variants passed" in done.stdout
    assert r"d\udce9j\udce0-vu\udcff/a.npz  full" in done.stdout
    done = hcmen(locale, "run", folder, "--bundle", folder / "bundle", "--format", "json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["results"][0]["clip"] == str(folder / "a.npz")
    done = hcmen(locale, "run", folder / "none.npz", "--bundle", folder / "bundle")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert r"-vu\udcff/none.npz: no such file" in done.stderr


def test_the_machine_and_its_figures(folder: Path, locale: dict[str, str]) -> None:
    done = hcmen(locale, "doctor", "--bundle", folder / "bundle", "--format", "json")
    assert done.returncode in (0, 1)
    (row,) = [r for r in json.loads(done.stdout)["rows"] if r["name"] == "bundle"]
    assert row["status"] == "ok"
    few = ("--variant", "text_only", "--rounds", 1, "--calls", 1, "--warmup", 0, "--loads", 1)
    out = ("--out", folder / "b.json", "--html", folder / "b.html")
    done = hcmen(locale, "bench", folder / "bundle", *few, *out)
    assert done.returncode == 0, done.stderr
    assert (folder / "b.html").read_text().endswith("</html>\n")
    assert hcmen(locale, "bench", "--show", folder / "b.json").returncode == 0


def test_a_recording(folder: Path, locale: dict[str, str]) -> None:
    (folder / "chunks").mkdir()
    shutil.copy(folder / "a.npz", folder / "chunks" / os.fsdecode(b"1\xfe.npz"))
    (folder / "chunks" / "end").touch()
    rates = ("--window", 0.4, "--hop", 0.2, "--rate", "audio=20", "--rate", "vision=20")
    done = hcmen(locale, "follow", folder / "chunks", "--bundle", folder / "bundle", *rates, "--format", "json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{")


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--data", "{}/none.pkl", "--out", "{}/out"),
        ("train", "--resume", "--out", "{}/none"),
        ("export", "--checkpoint", "{}/none", "--bundle", "{}/out"),
        ("eval", "--checkpoint", "{}/none", "--out", "{}/out"),
        ("eval", "--bundle", "{}/none"),
        ("convert", "{}/none.pkl", "{}/out"),
        ("clip", "{}/none.pkl", "--all", "--out", "{}/out"),
        ("bench", "{}/none"),
        ("doctor", "--bundle", "{}/none"),
        ("follow", "{}/none", "--window", "1", "--hop", "1"),
        ("compile", "{}/none"),
    ],
    ids=" ".join,
)
def test_what_is_missing_is_told(folder: Path, arguments: tuple[str, ...]) -> None:
    done = hcmen(LOCALES["C"], *(a.replace("{}", str(folder)) for a in arguments))
    assert done.returncode in (1, 2, 3), done.stderr
    assert r"-vu\udcff/none" in done.stdout + done.stderr or done.returncode == 3
    assert not [*(folder / "out").glob("*")]


def test_a_checkpoint_on_its_way_to_a_bundle(folder: Path) -> None:
    from helpers.micro import MICRO

    from hcmen.models.hcmen.model import HCMEN
    from hcmen.training.checkpoint import save_checkpoint
    from hcmen.training.config import TrainConfig

    (folder / "train").mkdir()
    save_checkpoint(folder / "train", HCMEN(MICRO), TrainConfig(), epoch=0, validation={}, dataset={"name": "none"})
    out = ("--bundle", folder / "new", "--variant", "audio_only")
    done = hcmen(LOCALES["C"], "export", "--checkpoint", folder / "train", *out)
    assert done.returncode == 0, done.stderr
    assert (folder / "new" / "audio_only.onnx").is_file()
