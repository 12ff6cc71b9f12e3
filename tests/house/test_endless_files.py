"""Pipes, devices, sockets and folders in the place of files: every command refuses each in one line, and at once."""

from __future__ import annotations

import importlib
import io
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers.command import run
from helpers.tiny_bert import write_bert

import hcmen.training.command
from hcmen.__main__ import COMMANDS
from hcmen.base.shipped import DEMO
from hcmen.data.synthetic import SAMPLES, make_synthetic, write_synthetic
from hcmen.training.presets import preset_named

_SECONDS = 60
"""What a command may take here; what waits for a pipe waits for ever."""


class Case(NamedTuple):
    """A command, its words, and the file among its own that is put another thing in the place of."""

    command: str
    words: str
    file: str


# {} is a folder with bundle/, train/, bert/, data/ (converted), set.pkl and chunks/.
CASES = [
    Case("run", "{}/train/clips/000.npz --bundle {}/bundle", "train/clips/000.npz"),
    Case("run", "{}/train/clips/000.npz --bundle {}/bundle", "bundle/manifest.json"),
    Case("run", "{}/train/clips/000.npz --bundle {}/bundle", "bundle/weights.bin"),
    Case("run", "{}/train/clips/000.npz --bundle {}/bundle", "bundle/full.onnx"),
    Case("run", "--self-test --bundle {}/bundle", "bundle/golden/full.npz"),
    Case("run", "{}/train/clips/000.npz --bundle {}/bundle --check --checkpoint {}/train", "train/config.json"),
    Case(
        "run", "{}/train/clips/000.npz --bundle {}/bundle --check --checkpoint {}/train", "train/checkpoint.safetensors"
    ),
    Case("doctor", "--bundle {}/bundle", "bundle/manifest.json"),
    Case("doctor", "--bundle {}/bundle", "bundle/weights.bin"),
    Case("bench", "--bundle {}/bundle --calls 1 --rounds 2", "bundle/manifest.json"),
    Case("bench", "--bundle {}/bundle --variant full --calls 1 --rounds 2", "bundle/weights.bin"),
    Case("bench", "--bundle {}/bundle --calls 1 --rounds 2 --clip {}/train/clips/000.npz", "train/clips/000.npz"),
    Case("bench", "--show {}/report.json", "report.json"),
    Case("bench", "--bundle {}/bundle --calls 1 --rounds 2 --compare {}/report.json", "report.json"),
    Case("bench", "--bundle {}/bundle --against eager --checkpoint {}/train", "train/checkpoint.safetensors"),
    Case("follow", "{}/chunks --window 0.4 --hop 0.1 --rate audio=100 --bundle {}/bundle", "bundle/manifest.json"),
    Case(
        "follow",
        "{}/chunks --window 0.4 --hop 0.1 --rate audio=100 --rate vision=30 --bundle {}/bundle",
        "chunks/1.npz",
    ),
    Case("convert", "{}/set.pkl {}/converted", "set.pkl"),
    Case("clip", "{}/set.pkl --index 0 --out {}/clip.npz", "set.pkl"),
    Case("clip", "{}/data --index 0 --out {}/clip.npz", "data/dataset.json"),
    Case("clip", "{}/data --index 0 --out {}/clip.npz", "data/test/audio.npy"),
    Case("clip", "{}/data --index 0 --out {}/clip.npz", "data/test/id.json"),
    Case("train", "--data {}/set.pkl --out {}/out", "set.pkl"),
    Case("train", "--data {}/data --out {}/out", "data/dataset.json"),
    Case("train", "--data {}/data --out {}/out", "data/train/regression_labels.npy"),
    Case("train", "--resume --out {}/train", "train/last.safetensors"),
    Case("train", "--text-encoder {}/bert --out {}/out", "bert/config.json"),
    Case("train", "--text-encoder {}/bert --out {}/out", "bert/model.safetensors"),
    Case("train", "--text-encoder {}/bert --out {}/out", "bert/vocab.txt"),
    Case("train", "--text-encoder {}/bert --out {}/out", "bert/tokenizer.json"),
    Case("train", "--text-encoder {}/bert --out {}/out", "bert/tokenizer_config.json"),
    Case("eval", "--checkpoint {}/train --out {}/eval", "train/config.json"),
    Case("eval", "--checkpoint {}/train --out {}/eval", "train/checkpoint.safetensors"),
    Case("eval", "--checkpoint {}/train --data {}/set.pkl --out {}/eval", "set.pkl"),
    Case("eval", "--bundle {}/bundle --data {}/set.pkl --out {}/eval", "bundle/manifest.json"),
    Case("export", "--checkpoint {}/train --bundle {}/new --variant full", "train/config.json"),
    Case("export", "--checkpoint {}/train --bundle {}/new --variant full", "train/checkpoint.safetensors"),
    Case("export", "--checkpoint {}/train --bundle {}/new --variant full", "train/clips/000.npz"),
    Case("export", "--checkpoint {}/train --bundle {}/new --variant full", "train/report.json"),
    Case("export", "--checkpoint {}/train --bundle {}/bundle --variant full", "bundle/manifest.json"),
    Case("export", "--checkpoint {}/train --bundle {}/bundle --variant full", "bundle/weights.bin"),
    Case(
        "export", "--checkpoint {}/train --bundle {}/new --precision fp16 --data {}/set.pkl --variant full", "set.pkl"
    ),
    Case("compile", "--bundle {}/bundle", "bundle/manifest.json"),
]


def fifo(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def listening(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket has 107 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


KINDS: list[Callable[[Path], None]] = [fifo, endless, folder, listening, loop]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that the commands above take, sound."""
    from hcmen.data.convert import convert

    place = tmp_path_factory.mktemp("whole")
    for name in ("bundle", "train"):
        shutil.copytree(DEMO / name, place / name)
    (place / "train" / "last.safetensors").write_bytes(b"")
    inputs = preset_named("tiny").model.inputs
    write_synthetic(place / "set.pkl", make_synthetic(inputs, (12, 8, 8)))
    convert(place / "set.pkl", place / "data")
    write_bert(place / "bert", inputs.text.features)
    (place / "chunks").mkdir()
    (place / "chunks" / "end").touch()
    return place


@pytest.fixture
def in_time() -> Iterator[None]:
    """Fails what waits."""

    def late(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# A folder among the chunks is none of them.
@pytest.mark.parametrize(
    ("case", "kind"),
    [
        pytest.param(case, kind, id=f"{case.command} {case.file}-{kind.__name__}")
        for case in CASES
        for kind in KINDS
        if not (kind is folder and case.command == "follow" and case.file.startswith("chunks"))
    ],
)
def test_what_is_no_file_is_refused_at_once(
    whole: Path, tmp_path: Path, case: Case, kind: Any, in_time: None, monkeypatch: pytest.MonkeyPatch
):
    # Links to all that stays as it is, and the one file's folders made anew.
    place = tmp_path / "p"
    here, there = place, whole
    place.mkdir()
    parts = Path(case.file).parts
    for i, part in enumerate(parts):
        for entry in os.listdir(there):
            if entry != part:
                source = there / entry
                # Folders of ours are written to, and a bundle's files must not be links.
                (shutil.copytree if source.is_dir() else shutil.copy)(source, here / entry)
        here, there = here / part, there / part
        if i < len(parts) - 1:
            here.mkdir()
    kind(here)
    main = importlib.import_module(COMMANDS[case.command].module).main
    monkeypatch.setitem(SAMPLES, "tiny", (12, 8, 8))
    outcome = run(main, *case.words.format(*[place] * 5).split(), "-q")
    if case.command == "doctor":  # whose table goes on
        assert outcome.code == 1
        assert "FAILED   bundle" in outcome.out
    else:
        assert outcome.code in (2, 5), outcome.err or outcome.out
    assert len([line for line in outcome.lines if not line.startswith("warning: ")]) == 1, outcome.err
    assert "it waits" not in outcome.err
    assert len(outcome.err) < 1200
    assert hcmen.training.command  # which torch comes with, once


def test_of_a_file_that_grows_what_was_there_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each reading of a piece adds two: who reads to the end never comes there."""
    import hcmen.base.bundle as bundle
    from hcmen.base.files import read_small
    from hcmen.data.unpickle import MappedPickle

    path = tmp_path / "grows"
    path.write_bytes(b"x" * 1000)

    def grow() -> None:
        with path.open("ab") as file:
            file.write(b"x" * (4 << 20))
        assert path.stat().st_size < 100 << 20, "it reads on and on"

    real = os.pread

    def pread(descriptor: int, count: int, at: int) -> bytes:
        grow()
        return real(descriptor, count, at)

    monkeypatch.setattr(os, "pread", pread)
    with MappedPickle(path) as pickled:
        assert b"".join(pickled.pieces()) == b"x" * pickled.size

    class Growing(io.FileIO):
        def read(self, count: int | None = -1) -> bytes:
            grow()
            return super().read(-1 if count is None else count)

    path.write_bytes(b"x" * 1000)
    monkeypatch.setattr(bundle, "open_regular", Growing)
    assert bundle.file_record(path, tmp_path).bytes == 1000
    with pytest.raises(OSError, match="more than 1000 bytes"):
        read_small(path, 1000)
