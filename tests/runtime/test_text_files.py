"""hcmen-run --text and --text-file: every text is scored or told of, in order, whatever else is in the file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.command import run
from helpers.micro import MICRO
from helpers.tiny_bert import write_bert

from hcmen.base.clip import write_clip
from hcmen.base.inputs import FeatureConfig
from hcmen.base.modalities import variant_named
from hcmen.data.synthetic import make_synthetic
from hcmen.export.bundle import export_bundle
from hcmen.media.text_lines import TextLines
from hcmen.models.hcmen.model import HCMEN
from hcmen.models.text_encoder import load_weights, read_sizes, read_tokenizer, read_weights
from hcmen.runtime import load
from hcmen.runtime.commands.run import main as hcmen_run
from hcmen.training.checkpoint import save_checkpoint, write_whole
from hcmen.training.config import TrainConfig
from hcmen.training.outputs import CLIPS, TOKENIZER

HIDDEN, STEPS = 8, 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random model with a text encoder, and its bundle of text_only."""
    root = tmp_path_factory.mktemp("texts")
    bert = write_bert(root / "bert", HIDDEN)
    config = dataclasses.replace(MICRO, text=FeatureConfig(HIDDEN, STEPS), text_encoder=read_sizes(bert)[0])
    torch.manual_seed(0)
    model = HCMEN(config)
    load_weights(model.text_encoder, read_weights(model.text_encoder, bert))
    train = root / "train"
    (train / CLIPS).mkdir(parents=True)
    save_checkpoint(train, model, TrainConfig(), epoch=1, validation={}, dataset={"name": "synthetic"})
    write_whole(train / TOKENIZER, read_tokenizer(bert))
    tokens = make_synthetic(config.inputs, (8, 8, 8), 0)["valid"]["text_bert"]
    for i, row in enumerate(tokens):
        write_clip(train / CLIPS / f"{i:03d}.npz", {"text_tokens": row[:, : int(row[1].sum())].astype(np.int64)})
    export_bundle(train, root / "bundle", [variant_named("text_only")])
    return train, root / "bundle"


@pytest.fixture(scope="module")
def spoken(folders: tuple[Path, Path]) -> Path:
    return folders[1]


def texts(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
    return path


def scored(bundle: Path, *arguments: object) -> tuple[dict[str, Any], Any]:
    outcome = run(hcmen_run, "--bundle", bundle, "--format", "json", *arguments)
    return json.loads(outcome.out), outcome


def alone(bundle: Path, text: str) -> float:
    return load(bundle)({"text": text}).score


# --- --text ---------------------------------------------------------------------------------------------------------


def test_every_text_is_scored_or_told_of(spoken: Path):
    words = ["the film is good", "", "bad", "x" * (1 << 20), "a good story " * 9]
    told, outcome = scored(spoken, *(part for word in words for part in ("--text", word)))
    assert [r["clip"] for r in told["results"]] == ["--text 1", "--text 3", "--text 5"]
    for result, place in zip(told["results"], (0, 2, 4), strict=True):
        assert result["score"] == pytest.approx(alone(spoken, words[place]), abs=1e-5)
    assert [e["clip"] for e in told["errors"]] == ["--text 2", "--text 4"]
    assert outcome.code == 2
    assert any("--text 2: the text is empty" in line for line in outcome.lines)


def test_one_text_alone(spoken: Path):
    outcome = run(hcmen_run, "--bundle", spoken, "--text", "the film is good")
    assert outcome.code == 0
    assert f"{alone(spoken, 'the film is good'):+.2f}" in outcome.out


# --- --text-file ----------------------------------------------------------------------------------------------------


def test_lines_are_scored_in_order_and_alike_alone(spoken: Path, tmp_path: Path):
    rng = np.random.default_rng(0)
    vocabulary = ["truly", "very", "the", "film", "good", "bad", "story"]
    lines = [" ".join(rng.choice(vocabulary, size=n)) for n in rng.integers(1, STEPS - 2, size=300)]
    file = texts(tmp_path / "reviews.txt", *lines)
    told, outcome = scored(spoken, "--text-file", file)
    assert outcome.code == 0, outcome.err
    assert [r["clip"] for r in told["results"]] == [f"{file}:{i}" for i in range(1, 301)]
    assert max(r["batch_size"] for r in told["results"]) > 1
    for i in (0, 1, 7, 150, 255, 256, 299):
        assert told["results"][i]["score"] == pytest.approx(alone(spoken, lines[i]), abs=1e-5)
    assert len({r["score"] for r in told["results"]}) > 50


def test_texts_of_like_length_share_a_run(spoken: Path):
    model = load(spoken)
    lengths: list[list[int]] = []
    words = [{"text": "good " * (1 + i % 8)} for i in range(64)]
    list(model.outcomes(words, observe=lambda v, p, inputs, o: lengths.append(inputs["text_tokens"][:, 1].sum(1))))
    assert [sorted({int(n) for n in batch}) for batch in lengths] == [[3, 4, 5, 6], [7, 8, 9, 10]]


def test_mark_blank_lines_and_line_ends(spoken: Path, tmp_path: Path):
    file = tmp_path / "t.txt"
    file.write_bytes(b"\xef\xbb\xbfgood film\r\n\r\n  \nbad\n\n")
    told, outcome = scored(spoken, "--text-file", file)
    assert [r["clip"] for r in told["results"]] == [f"{file}:1", f"{file}:4"]
    assert told["results"][0]["score"] == pytest.approx(alone(spoken, "good film"), abs=1e-5)
    assert outcome.code == 0
    assert outcome.lines == [f"note: {file}: 3 blank lines were skipped"]


def test_a_line_that_cannot_be_read_is_told_and_the_others_are_scored(spoken: Path, tmp_path: Path):
    file = texts(tmp_path / "t.txt", "good", b"caf\xe9", "x" * (1 << 19), "bad", "")
    told, outcome = scored(spoken, "--text-file", file)
    assert [r["clip"] for r in told["results"]] == [f"{file}:1", f"{file}:4"]
    assert [e["clip"] for e in told["errors"]] == [f"{file}:2", f"{file}:3"]
    assert outcome.code == 2
    assert "byte 0xe9 at place 4 is no UTF-8" in outcome.lines[0]
    assert f"{file}:3: the text has 524288 characters" in outcome.lines[1]


def test_errors_stand_in_the_order_of_the_file(spoken: Path, tmp_path: Path):
    """An error of the graph's side comes later than one of reading, and both by their lines."""
    file = texts(tmp_path / "t.txt", "good", b"\xff", "bad", b"\xfe")
    told, _ = scored(spoken, "--text-file", file, "--text-file", tmp_path / "none")
    assert [e["clip"] for e in told["errors"]] == [f"{file}:2", f"{file}:4", str(tmp_path / "none")]
    assert len(told["results"]) == 2


def test_what_was_cut_is_said_of_the_first_and_counted(spoken: Path, tmp_path: Path):
    file = texts(tmp_path / "t.txt", *["good " * 30] * 5, "bad")
    _, outcome = scored(spoken, "--text-file", file)
    assert outcome.lines == [
        *(f"note: {file}:{i}: the text is 20 tokens too long for the model, its end was cut" for i in (1, 2, 3)),
        "note: 2 more texts are too long, and cut",
    ]


def test_a_check_against_the_eager_model_goes_with_it(folders: tuple[Path, Path], tmp_path: Path):
    train, bundle = folders
    file = texts(tmp_path / "t.txt", *(f"good {'film ' * (i % 7)}" for i in range(40)))
    told, outcome = scored(bundle, "--text-file", file, "--check", "--checkpoint", train)
    assert outcome.code == 0, outcome.err
    assert all(r["eager_score"] == pytest.approx(r["score"], abs=1e-5) for r in told["results"])


@pytest.mark.parametrize("more", [("a.npz",), ("--text", "good")])
def test_it_goes_alone(spoken: Path, tmp_path: Path, more: tuple[str, ...]):
    outcome = run(hcmen_run, "--bundle", spoken, "--text-file", texts(tmp_path / "t.txt", "good"), *more)
    assert (outcome.code, len(outcome.lines)) == (2, 1)
    assert "--text-file goes without" in outcome.err


def test_a_bundle_without_an_encoder_says_so_once(bundle: Path, tmp_path: Path):
    outcome = run(hcmen_run, "--bundle", bundle, "--text-file", texts(tmp_path / "t.txt", "good", "bad"))
    assert (outcome.code, len(outcome.lines)) == (2, 1)
    assert "has no text encoder" in outcome.err


BAD = {
    "missing": (None, "no such file or directory, expected UTF-8 text, one text a line"),
    "a folder": ("folder", "is a directory, expected UTF-8 text"),
    "a pipe": ("pipe", "not a regular file, expected UTF-8 text"),
    "empty": (b"", "no text in it, expected UTF-8 text"),
    "blank lines": (b"\n \n\t\n", "no text in it"),
    "the mark alone": (b"\xef\xbb\xbf", "no text in it"),
    "UTF-16": ("the film".encode("utf-16"), "the byte 0 in line 1, which no text has"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "a picture, expected UTF-8 text"),
    "gzip": (b"\x1f\x8b\x08\x08\xff\xff", "a gzip archive, expected UTF-8 text, one text a line: unpack it first"),
    "a program": (b"\x7fELF\x02\x01\x01" + bytes(9), "the byte 0 in line 1"),
    "a line without an end": (b"word " * (1 << 18), "line 1 has more than 1048576 bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_used_gets_one_line(spoken: Path, tmp_path: Path, name: str):
    content, words = BAD[name]
    file = tmp_path / "t.txt"
    if content == "folder":
        file.mkdir()
    elif content == "pipe":
        os.mkfifo(file)
    elif isinstance(content, bytes):
        file.write_bytes(content)
    outcome = run(hcmen_run, "--bundle", spoken, "--text-file", file, "-q")
    assert outcome.code == 2
    assert len(outcome.lines) == 1
    assert outcome.lines[0].startswith(f"error: {file}: {words}")


def test_what_came_before_a_line_without_an_end_is_scored(spoken: Path, tmp_path: Path):
    file = texts(tmp_path / "t.txt", "good", "x" * (1 << 21), "bad")
    told, outcome = scored(spoken, "--text-file", file)
    assert [r["clip"] for r in told["results"]] == [f"{file}:1"]
    assert told["errors"][0]["clip"] == str(file)
    assert outcome.code == 2


def test_more_texts_than_a_file_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hcmen.media.text_lines._MOST_TEXTS", 2)
    *kept, (_, error) = TextLines(str(texts(tmp_path / "t.txt", "a", "", "b", "c", "d")))
    assert [text for _, text in kept] == ["a", "b"]
    assert "more than 2 texts" in str(error)


def test_lines_are_read_as_they_are_asked_for(tmp_path: Path):
    file = texts(tmp_path / "t.txt", *["word " * 50] * 20000)
    import tracemalloc

    tracemalloc.start()
    assert sum(1 for _ in TextLines(str(file))) == 20000
    assert tracemalloc.get_traced_memory()[1] < 3 << 20
    tracemalloc.stop()


# --- stdin ----------------------------------------------------------------------------------------------------------


def piped(bundle: Path, content: bytes, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hcmen", "run", "--bundle", str(bundle), "--text-file", "-", "--format", "json"]
    done = subprocess.run([*command, *more], input=content, capture_output=True, check=False, timeout=120)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_a_pipe_is_read(spoken: Path):
    done = piped(spoken, b"good\n\nbad film\n")
    assert done.returncode == 0, done.stderr
    assert [r["clip"] for r in json.loads(done.stdout)["results"]] == ["stdin:1", "stdin:3"]


def test_a_pipe_that_never_ends_a_line_is_left(spoken: Path):
    """And what writes to it without an end is not waited for."""
    command = [sys.executable, "-m", "hcmen", "run", "--bundle", str(spoken), "--text-file", "-", "-q"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None

        def pour() -> None:
            with contextlib.suppress(OSError):
                while True:
                    process.stdin.write(b"word " * 1000)

        thread = threading.Thread(target=pour, daemon=True)
        thread.start()
        assert process.wait(120) == 2
        _, err = process.stdout.read(), process.stderr.read().decode()
        thread.join(60)
        with contextlib.suppress(OSError):
            process.stdin.close()
    assert err.splitlines() == [err.strip()]
    assert "stdin: line 1 has more than 1048576 bytes" in err


def test_closed_stdin(spoken: Path):
    command = [sys.executable, "-m", "hcmen", "run", "--bundle", str(spoken), "--text-file", "-", "-q"]
    done = subprocess.run(["sh", "-c", '"$@" <&-', "sh", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "stdin: " in done.stderr
