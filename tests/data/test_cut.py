"""hcmen-clip: the samples of a file or folder as clips that the model sees as training saw them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.mmsa_files import FILES, expected, make, soil, written

from hcmen.base.clip import read_clip
from hcmen.base.modalities import MODALITIES
from hcmen.data.convert import convert
from hcmen.data.cut import main

FILE = FILES["mosi unaligned"]


def run(*arguments: Any) -> int:
    return main.main([*map(str, arguments)], standalone_mode=False)


@pytest.fixture(scope="module")
def data() -> dict[str, dict[str, Any]]:
    made = make(FILE)
    soil(made)
    return made


@pytest.fixture(scope="module", params=["pickle", "folder"])
def source(request: pytest.FixtureRequest, data: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set with audio and vision that need cleaning, in both forms."""
    folder = tmp_path_factory.mktemp("source")
    path = written(folder / "set.pkl", data)
    if request.param == "pickle":
        return path
    convert(path, folder / "set")
    return folder / "set"


def assert_is(path: Path, data: Any, split: str, index: int, modalities: tuple[str, ...] = MODALITIES) -> None:
    clip = read_clip(path, FILE.config.inputs)  # refuses what is not finite
    assert set(clip.features) == set(modalities)
    for m in modalities:
        np.testing.assert_array_equal(clip.features[m], expected(data[split], m)[index])


def test_one_sample_by_number(source: Path, data: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(source, "--index", 2, "-o", tmp_path / "new" / "clip.npz") == 0
    assert_is(tmp_path / "new" / "clip.npz", data, "test", 2)
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{tmp_path / 'new' / 'clip.npz'}: sample 2 (video_test$_$2), label ")
    assert captured.err == ""


def test_one_sample_by_name(source: Path, data: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "clip.npz"
    assert run(source, "--split", "valid", "--id", "video_valid$_$1", "-o", out, "--format", "json") == 0
    assert_is(out, data, "valid", 1)
    found = json.loads(capsys.readouterr().out)
    assert found["clips"] == [
        {
            "path": str(out),
            "index": 1,
            "id": "video_valid$_$1",
            "label": pytest.approx(data["valid"]["regression_labels"][1]),
            "steps": {"text": 50, "audio": 375, "vision": 500},
        }
    ]
    assert (found["schema_version"], found["split"]) == (1, "valid")


def test_all_of_a_split(source: Path, data: Any, tmp_path: Path) -> None:
    assert run(source, "--split", "train", "--all", "-o", tmp_path / "clips", "-q") == 0
    assert sorted(p.name for p in (tmp_path / "clips").iterdir()) == [f"train-{i:05d}.npz" for i in range(5)]
    for i in range(5):
        assert_is(tmp_path / "clips" / f"train-{i:05d}.npz", data, "train", i)


def test_some_samples_each_once(source: Path, data: Any, tmp_path: Path) -> None:
    assert run(source, "--index", 3, "--index", 0, "--id", "video_test$_$3", "-o", tmp_path) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["test-00000.npz", "test-00003.npz"]
    for i in (0, 3):
        assert_is(tmp_path / f"test-{i:05d}.npz", data, "test", i)


@pytest.mark.parametrize("kept", [("text",), ("vision", "audio"), ("audio",)])
def test_modalities_are_left_out(source: Path, data: Any, tmp_path: Path, kept: tuple[str, ...]) -> None:
    out = tmp_path / "clip.npz"
    assert run(source, "--index", 0, "--modalities", ", ".join(kept), "-o", out) == 0
    assert_is(out, data, "test", 0, kept)
    assert read_clip(out, FILE.config.inputs).variant.present == tuple(m for m in MODALITIES if m in kept)


REFUSED = {
    "no sample named": ((), "name samples with --index or --id, or take every one with --all"),
    "all and one": (("--all", "--index", "1"), "name samples with --index or --id, or take"),
    "beyond the split": (("--index", "4"), "test: has no sample 4, expected 0 to 3"),
    "negative": (("--index", "-1"), "-1"),
    "misspelt name": (("--id", "video_test$_$33"), "has no sample called 'video_test$_$33': did you mean 'video_test"),
    "unknown name": (("--id", "xyz"), "has no sample called 'xyz', its first is 'video_test$_$0'"),
    "unknown split": (("--split", "tset", "--index", "1"), "did you mean 'test'?"),
    "misspelt modality": (("--index", "1", "--modalities", "text,vison"), "'vison': did you mean 'vision'?"),
    "no modality": (("--index", "1", "--modalities", ""), "unknown modality ''"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_cut_is_refused(
    source: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = REFUSED[case]
    assert run(source, *arguments, "-o", tmp_path / "clip.npz") == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


def test_several_samples_do_not_go_into_one_file(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(source, "--all", "-o", tmp_path / "clip.npz") == 2
    assert "clip.npz: one clip, and 4 samples are asked for: give a folder" in capsys.readouterr().err


def test_clips_are_written_over_on_request_alone(
    source: Path, data: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test-00001.npz").write_text("precious")
    assert run(source, "--all", "-o", tmp_path) == 2
    assert "test-00001.npz: is there already: write over it with --force" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["test-00001.npz"]
    assert run(source, "--all", "-o", tmp_path, "--force") == 0
    assert_is(tmp_path / "test-00001.npz", data, "test", 1)


def test_a_name_that_is_there_twice(tmp_path: Path, data: Any, capsys: pytest.CaptureFixture[str]) -> None:
    twice = {**data, "test": {**data["test"], "id": ["a", "b", "a", "c"]}}
    path = written(tmp_path / "set.pkl", twice)
    assert run(path, "--id", "a", "-o", tmp_path / "clip.npz") == 2
    assert "samples 0 and 2 are both called 'a': choose with --index" in capsys.readouterr().err
    assert run(path, "--id", "c", "-o", tmp_path / "clip.npz") == 0


def test_other_splits_may_be_missing(tmp_path: Path, data: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "set.pkl", {"test": data["test"]})
    assert run(path, "--index", 0, "-o", tmp_path / "clip.npz") == 0
    assert run(path, "--split", "train", "--index", 0, "-o", tmp_path / "other.npz") == 2
    assert "'train' is missing, found test" in capsys.readouterr().err


class _Call:
    def __reduce__(self) -> Any:
        return os.system, ("echo caught",)


@pytest.mark.parametrize(
    ("damage", "code", "message"),
    [
        ("hostile", 5, f"the pickle asks for '{os.system.__module__}.system'"),
        ("truncated", 5, "truncated, damaged or not a pickle"),
        ("gone", 2, "no such file"),
        ("folder of something else", 2, "is a directory without dataset.json"),
    ],
)
def test_bad_sources(
    tmp_path: Path, data: Any, damage: str, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "set.pkl"
    if damage == "hostile":
        written(path, {"test": data["test"], "train": {"x": _Call()}})
    elif damage == "truncated":
        written(path, data)
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "folder of something else":
        path.mkdir()
    assert run(path, "--index", 0, "-o", tmp_path / "clip.npz") == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert (captured.err.count("\n"), captured.out) == (1, "")
    assert not (tmp_path / "clip.npz").exists()


def test_a_place_that_cannot_be_written(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert run(source, "--index", 0, "-o", tmp_path / "file" / "clip.npz") == 2
    assert capsys.readouterr().err.count("\n") == 1
