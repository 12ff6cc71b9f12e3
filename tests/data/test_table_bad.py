"""What is wrong with a table is told in one line, or by row; nothing is written then."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tables import (
    TEXTS,
    array,
    as_csv,
    clips,
    convert,
    index,
    names,
    rows,
    split_of,
    vectors,
    write_words,
    written,
)

from hcmen.base.clip import write_clip
from hcmen.data.table.reading import TableFile
from hcmen.data.unpickle import load_pickle

LINE = re.compile(r"error: [^\n]*\n")


def columns(**change: Callable[[int], object]) -> str:
    """A table of vectors with other values in some columns; a value of ... leaves the column out."""
    table = vectors()
    for row in table:
        for name, value in change.items():
            row[name.replace("_", ".")] = value(int(str(row["id"])[1:].split("$")[0] or 0))
    left = [{name: value for name, value in row.items() if value is not ...} for row in table]
    return as_csv(left)


def workbook() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("xl/workbook.xml", b"<xml/>")
    return stream.getvalue()


GOOD = as_csv(vectors())
# name -> file, content, exit code, what the one line says.
WHOLE: dict[str, tuple[str, str | bytes, int, str]] = {
    "nothing": ("a.csv", b"", 2, "is empty, expected a table"),
    "blank lines alone": ("a.csv", b"\n\n\n", 2, "has no column 'id' and no column 'label', its names are nothing"),
    "the names alone": ("a.csv", "id,label,text\n", 2, "has no rows"),
    "no names": ("a.csv", "1,2.5,a film\n2,1.0,b\n", 2, "put a first row with the names of the columns on top"),
    "no id": ("a.csv", "label,text\n1,a\n", 2, "has no column 'id', its names are 'label', 'text'"),
    "another name for the label": ("a.csv", "id,Label\na,1\n", 2, "did you mean 'label'? name the columns so"),
    "no label in JSON": ("a.jsonl", '{"id": "a", "text": "b"}\n', 2, "has no column 'label'"),
    "no usable column": (
        "a.csv",
        columns(audio_0=lambda i: ..., audio_1=lambda i: ..., vision_0=lambda i: ...),
        2,
        "has no column to learn from: give words in 'text', clips in 'clip', or features in columns",
    ),
    "a column twice": ("a.csv", "id,label,label\na,1,2\n", 2, "the column 'label' is there twice"),
    "a gap in features": (
        "a.csv",
        "id,label,audio.0,audio.2\na,1,2,3\n",
        2,
        "column audio.2 is there and audio.1 is not",
    ),
    "words without a tokenizer": ("a.csv", "id,label,text\na,1,b\nb,2,c\nc,0,d\n", 2, "--text-encoder FOLDER"),
    "labels as words": (
        "a.csv",
        columns(label=lambda i: ("positive", "negative")[i % 2]),
        2,
        "labels are words: 'positive', 'negative', expected numbers: give numbers",
    ),
    "labels with a comma": ("a.csv", columns(label=lambda i: f"{i},5"), 2, "write a point where the comma is"),
    "labels all alike": ("a.csv", columns(label=lambda i: 1), 2, "every label is 1, expected at least two different"),
    "one row": ("a.csv", "id,label,audio.0\na,1,2\n", 2, "1 row in 1 group: too few for train, valid, test"),
    "two groups": ("a.csv", "id,label,audio.0,group\na,1,2,x\nb,2,2,x\nc,2,2,y\n", 2, "3 rows in 2 groups: too few"),
    "an empty split": (
        "a.csv",
        columns(split=lambda i: "train", group=lambda i: "a"),
        2,
        "no row is in split valid or test, expected some in each of train, valid, test",
    ),
    "a group in two splits": (
        "a.csv",
        columns(group=lambda i: "a"),
        2,
        "group 'a' is in split train and in valid, expected each in one split",
    ),
    "a video in two splits": (
        "a.csv",
        columns(id=lambda i: f"v$_${i}", group=lambda i: ...),
        2,
        "video 'v' is in split train and in valid",
    ),
    "UTF-16": ("a.csv", GOOD.encode("utf-16"), 2, "UTF-16, expected a table in text"),
    "UTF-16 without a mark": ("a.csv", GOOD.encode("utf-16-le"), 5, "row 1 holds zero bytes, expected text"),
    "zero bytes": ("a.csv", GOOD.replace("r3", "r\0"), 5, "row 5 holds zero bytes"),
    "Latin-1": ("a.csv", GOOD.replace("r3", "ré").encode("latin1"), 2, "row 5 is no UTF-8 (byte 0xe9)"),
    "a workbook by another name": ("a.csv", workbook(), 2, "a zip archive or a workbook, expected a table in text"),
    "an old workbook": ("a.csv", b"\xd0\xcf\x11\xe0" + bytes(600), 2, "an old workbook"),
    "a pickle by another name": ("a.csv", pickle.dumps({"a": 1}), 2, "a pickle or binary"),
    "a page": ("a.csv", b"<!DOCTYPE html><html></html>", 2, "an HTML page"),
    "gzip": ("a.csv", b"\x1f\x8b" + bytes(20), 2, "a gzip archive"),
    "Parquet by another name": ("a.csv", b"PAR1" + bytes(20), 2, "a Parquet file"),
    "another kind called Parquet": ("a.parquet", GOOD, 2, "not Parquet"),
    "a quotation mark left open": ("a.csv", GOOD.replace("r3", '"r3'), 2, "a quotation mark of row 5 is never closed"),
    "a cell without an end": (
        "a.csv",
        GOOD + '"' + "x\n" * (1 << 23) + "x",
        2,
        "a quotation mark of row 10 is followed by",
    ),
    "a line without an end": ("a.csv", GOOD + "x" * (1 << 25), 2, "row 10 has a line of 33554432 characters or more"),
    "an array in JSON": ("a.jsonl", json.dumps(vectors()), 2, "has no column 'id' and no column 'label'"),
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_table_that_cannot_be_used_is_refused_in_a_line(tmp_path: Path, case: str) -> None:
    name, content, code, says = WHOLE[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    outcome = convert(tmp_path / name)
    assert outcome.code == code, outcome.err
    errors = [line for line in outcome.lines if line.startswith("error: ")]
    assert len(errors) == 1
    assert f"{tmp_path / name}: " in errors[0]
    assert says in errors[0]
    assert "Traceback" not in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def bad_csv(**change: object) -> list[dict[str, Any]]:
    table = vectors()
    for name, value in change.items():
        table[4][name.replace("_", ".")] = value
    return table


ROWS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "no id": (bad_csv(id=""), "row 6: id is empty, expected a name of its own"),
    "an id twice": (bad_csv(id="r2"), "row 6 (r2): id 'r2' is that of row 4 too, expected one of its own"),
    "a long id": (bad_csv(id="x" * 1001), "row 6: id has 1001 characters, expected at most 1000"),
    "a label as a word": (bad_csv(label="good"), "row 6 (r4): label is 'good', expected a number"),
    "no label": (bad_csv(label=" "), "row 6 (r4): label is empty, expected a number"),
    "NaN": (bad_csv(label="NaN"), "row 6 (r4): label is nan, expected a finite number"),
    "infinity": (bad_csv(label="-inf"), "row 6 (r4): label is -inf, expected a finite number"),
    "a label that float32 has not": (bad_csv(label="1e39"), "row 6 (r4): label is 1e+39, expected a finite number"),
    "underscores": (bad_csv(label="1_0"), "row 6 (r4): label is '1_0', expected a number"),
    "another split": (bad_csv(split="dev"), "expected train, valid, test: did you mean 'valid'?"),
    "no split": (bad_csv(split=""), "row 6 (r4): split is empty"),
    "no group": (bad_csv(group=""), "row 6 (r4): group is empty"),
    "no feature": (bad_csv(audio_1=""), "row 6 (r4): audio.1 is empty, expected a number"),
    "a feature as a word": (bad_csv(audio_1="x"), "row 6 (r4): audio.1 is 'x', expected a number"),
    "a feature that is none": (bad_csv(audio_1="nan"), "row 6 (r4): audio.1 is nan, expected a finite number"),
    "a feature that float32 has not": (bad_csv(vision_0="1e39"), "vision.0 is 1e+39, expected a finite number"),
}


@pytest.mark.parametrize(("splits", "told"), [(["dev"], False), (["train", "valid", "test"], True)])
def test_an_encoder_is_called_needless_only_where_rows_could_be_used(
    tmp_path: Path, splits: list[str], told: bool
) -> None:
    table = vectors()
    for i, row in enumerate(table):
        row["split"] = splits[i % len(splits)]
        row["group"] = row["id"]
    outcome = convert(written(tmp_path, table), "--text-encoder", write_words(tmp_path / "bert"))
    assert (outcome.code == 0) == told, outcome.err
    assert ("--text-encoder is not needed" in outcome.err) == told


@pytest.mark.parametrize("case", ROWS)
def test_a_bad_row_is_told_by_its_number(tmp_path: Path, case: str) -> None:
    table, says = ROWS[case]
    source = written(tmp_path, table)
    outcome = convert(source)
    assert outcome.code == 2
    assert len(outcome.lines) == 2
    assert says in outcome.lines[0]
    fix = "expected all: mend them, or leave them out with --skip-bad"
    assert outcome.lines[1] == f"error: {source}: 1 of 8 rows cannot be used, {fix}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set.csv"]


@pytest.mark.parametrize("case", ROWS)
def test_a_bad_row_is_left_out_when_that_is_asked_for(tmp_path: Path, case: str) -> None:
    table, says = ROWS[case]
    outcome = convert(written(tmp_path, table), "--skip-bad")
    assert outcome.code == 0, outcome.err
    assert any(says in line and line.startswith("warning: row 6") for line in outcome.lines)
    assert names(tmp_path, "valid") == ["r5"]
    found = index(tmp_path)["source"]
    assert (found["rows"], found["left_out"]) == (8, 1)
    (told,) = found["left_out_rows"]
    assert told["row"] == 6
    assert told["reason"] in outcome.err


def test_a_row_of_other_cells_is_told(tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text(as_csv(vectors()).replace("r4,", "r4,9,9,"), newline="")
    outcome = convert(tmp_path / "set.csv")
    assert outcome.lines[0] == "error: row 6: has 9 cells, expected 7 as the first row has"
    (tmp_path / "set.csv").write_text(as_csv(vectors()).replace("r4,", ""), newline="")
    assert convert(tmp_path / "set.csv").lines[0] == "error: row 6: has 6 cells, expected 7 as the first row has"


def test_a_broken_quotation_is_of_its_row(tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text(as_csv(vectors()).replace("r4,", '"r"4,'), newline="")
    outcome = convert(tmp_path / "set.csv", "--skip-bad")
    assert outcome.code == 0, outcome.err
    assert any(line.startswith("warning: row 6: cannot be read (") for line in outcome.lines)
    assert names(tmp_path, "valid") == ["r5"]


def test_labels_beyond_the_range_are_told(tmp_path: Path) -> None:
    outcome = convert(written(tmp_path, vectors()), "--label-range=-2,2.5")
    assert outcome.lines[0] == "error: row 5 (r3): label is 3, expected -2 to 2.5, as --label-range says"
    assert outcome.code == 2


@pytest.mark.parametrize("value", ["1", "1,2,3", "3,-3", "a,b", "nan,1", "0,inf", "1,1", ""])
def test_a_range_that_is_none(tmp_path: Path, value: str) -> None:
    outcome = convert(written(tmp_path, vectors()), "--label-range", value)
    assert outcome.code == 2
    assert "is no range, expected two numbers in rising order, such as -3,3" in outcome.lines[0]


def test_ten_megabytes_in_a_cell(tmp_path: Path) -> None:
    words = write_words(tmp_path / "bert")
    table = rows(text=TEXTS, split=split_of)
    table[5]["text"] = "word " * (2 << 20)
    source = written(tmp_path, table)
    outcome = convert(source, "--text-encoder", words)
    assert outcome.lines[0] == "error: row 7 (r5): text has 10485760 characters, expected at most 262144"
    assert len(outcome.lines) == 2
    assert convert(source, "--text-encoder", words, "--skip-bad").code == 0


def test_texts_that_are_none(tmp_path: Path) -> None:
    words = write_words(tmp_path / "bert")
    lines = [json.dumps(row) for row in rows(text=TEXTS, split=split_of)]
    for i, value in enumerate(('" "', "5", "true", "[1]", r'"\ud800"')):
        lines[i] = re.sub(r'"text": "[^"]*"', lambda _, value=value: f'"text": {value}', lines[i])
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    outcome = convert(tmp_path / "set.jsonl", "--text-encoder", words)
    assert outcome.lines[:-1] == [
        "error: row 1 (r0): text is empty",
        "error: row 3 (r2): text is True, expected text",
        "error: row 4 (r3): text is [1], expected text",
        "error: row 5 (r4): text holds half a character, expected Unicode text",
    ]


JSON = {
    "no JSON": ("{", "not valid JSON"),
    "a key twice": ('{"id": "a", "id": "b"}', "is there twice"),
    "NaN": ('{"id": "a", "label": NaN}', "NaN is not a finite number"),
    "a list": ("[1, 2]", "is a list, expected an object"),
    "a number": ("5", "is 5, expected an object"),
    "deep": ("[" * 100_000 + "]" * 100_000, "not valid JSON (nested too deeply)"),
    "deep within": ('{"id": ' + "[" * 200 + "]" * 200 + "}", "nested too deeply"),
    "digits": ('{"id": "a", "label": ' + "9" * 5000 + "}", "not valid JSON"),
    "a label of many bits": ('{"id": "a", "label": ' + "9" * 400 + "}", "label is inf, expected a finite number"),
    "a label of true": ('{"id": "a", "label": true}', "label is True, expected a number"),
    "an id of a fraction": ('{"id": 1.5, "label": 1}', "id is 1.5, expected a name"),
}


@pytest.mark.parametrize("case", JSON)
def test_a_line_of_json_that_is_none(tmp_path: Path, case: str) -> None:
    line, says = JSON[case]
    lines = [json.dumps(row) for row in vectors()]
    (tmp_path / "set.jsonl").write_text("\n".join([*lines[:4], line, *lines[4:]]))
    outcome = convert(tmp_path / "set.jsonl")
    assert outcome.code in (2, 5)
    assert len(outcome.lines) == 2
    assert outcome.lines[0].startswith("error: row 5")
    assert says in outcome.lines[0]
    assert convert(tmp_path / "set.jsonl", "--skip-bad").code == 0
    assert names(tmp_path, "train") == ["r0", "r1", "r2", "r3"]


def spoilt(folder: Path) -> dict[str, tuple[str, str, int]]:
    """Name of a clip -> how its bad row is told, and the exit code."""
    good = (folder / "clips" / "1.npz").read_bytes()
    (folder / "clips" / "cut.npz").write_bytes(good[:-40])
    (folder / "clips" / "text.npz").write_text("no clip")
    write_clip(folder / "clips" / "nan.npz", {"audio": np.full((2, 3), np.nan), "vision": np.zeros((2, 4))})
    write_clip(folder / "clips" / "wide.npz", {"audio": np.zeros((2, 9)), "vision": np.zeros((2, 4))})
    write_clip(folder / "clips" / "less.npz", {"audio": np.zeros((2, 3))})
    write_clip(folder / "clips" / "words.npz", {"text_tokens": np.ones((3, 2)), "audio": np.zeros((2, 3))})
    np.savez(folder / "clips" / "object.npz", audio=np.array([[None]]))
    np.savez(folder / "clips" / "spelt.npz", audoi=np.zeros((2, 3)))
    np.savez(folder / "clips" / "flat.npz", audio=np.zeros(3), vision=np.zeros((2, 4)))
    np.savez(folder / "clips" / "none.npz", audio=np.zeros((0, 3)), vision=np.zeros((2, 4)))
    os.mkfifo(folder / "clips" / "pipe.npz")
    return {
        "missing.npz": ("no such file or directory: check the path", "", 2),
        "cut.npz": ("damaged .npz", "", 5),
        "text.npz": ("not an .npz file", "", 2),
        "nan.npz": ("audio has 6 NaN or infinite values, expected finite numbers: mend it", "", 2),
        "wide.npz": ("audio has 9 features, expected 3 as in row 2", "", 2),
        "less.npz": ("holds audio, expected audio, vision as in row 2", "", 2),
        "words.npz": ("holds text_tokens, expected features: give the words in a column 'text'", "", 2),
        "object.npz": ("holds Python objects", "", 5),
        "spelt.npz": ("unknown key 'audoi': did you mean 'audio'?", "", 2),
        "flat.npz": ("audio has shape [3]", "", 2),
        "none.npz": ("audio has no time step", "", 2),
        "pipe.npz": ("not a regular file", "", 2),
        "../clips": ("a folder", "", 2),
    }


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_clips_that_cannot_be_used_are_told_by_row(tmp_path: Path, jobs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hcmen.data.table.work._CLIPS", 4)
    clips(tmp_path, 8)
    bad = spoilt(tmp_path)
    table = rows(
        8 + len(bad), clip=lambda i: f"clips/{i}.npz" if i < 8 else f"clips/{list(bad)[i - 8]}", split=split_of
    )
    source = written(tmp_path, table)
    outcome = convert(source, "--jobs", jobs, "--format", "json")
    assert outcome.code == 5  # some are damaged
    told = json.loads(outcome.out)["rows"]
    assert [row["row"] for row in told] == list(range(10, 10 + len(bad)))
    for row, (name, (says, _, _)) in zip(told, bad.items(), strict=True):
        assert says in row["reason"], name
        assert (tmp_path / "clips" / name).name in row["reason"]
    assert not (tmp_path / "out").exists()
    assert convert(source, "--jobs", jobs, "--skip-bad").code == 0
    assert names(tmp_path, "train") == [f"r{i}" for i in range(4)]
    assert index(tmp_path)["source"]["left_out"] == len(bad)


def test_a_clip_and_columns_of_one_modality_contradict(tmp_path: Path) -> None:
    clips(tmp_path, 8)
    table = [{**row, "clip": f"clips/{i}.npz"} for i, row in enumerate(vectors())]
    outcome = convert(written(tmp_path, table))
    assert outcome.lines[0].endswith("clips/0.npz: holds audio, which the columns audio.0 and so on hold too")


def test_the_first_twenty_bad_rows_are_told_and_the_others_counted(tmp_path: Path) -> None:
    table = rows(60, label=lambda i: "" if 10 <= i < 45 else i, **{"audio.0": float})
    source = written(tmp_path, table)
    outcome = convert(source)
    assert len(outcome.lines) == 22
    assert outcome.lines[19].startswith("error: row 31 (r29)")
    assert outcome.lines[20] == "error: and 15 rows more, which --format json lists"
    assert len(json.loads(convert(source, "--format", "json").out)["rows"]) == 35
    assert convert(source, "--skip-bad").code == 0
    assert sum(len(names(tmp_path, split)) for split in ("train", "valid", "test")) == 25


def test_nothing_but_bad_rows(tmp_path: Path) -> None:
    outcome = convert(written(tmp_path, rows(5, label=lambda i: "", **{"audio.0": float})), "--skip-bad")
    assert (outcome.code, outcome.lines[-1].count("5 of 5 rows cannot be used")) == (2, 1)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "nothing"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    outcome = convert(path)
    assert outcome.code == 2
    assert len(outcome.lines) == 1
    assert outcome.lines[0].startswith(f"error: {path}: ")


ENCODERS: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "no folder": (lambda folder: folder.rename(folder.with_name("x")), 2, "no such folder"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), 2, "has no tokenizer.json and no vocab.txt"),
    "a damaged tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), 5, "copy the folder again"),
    "damaged sizes": (lambda folder: (folder / "config.json").write_text('{"vocab_size": 0}'), 2, "vocab_size is 0"),
    "fewer ids than words": (
        lambda folder: (folder / "config.json").write_text('{"vocab_size": 6}'), 5, "the text encoder knows 0 to 5"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ENCODERS)
def test_an_encoder_that_cannot_be_used(tmp_path: Path, case: str) -> None:
    spoil, code, says = ENCODERS[case]
    words = write_words(tmp_path / "bert")
    spoil(words)
    outcome = convert(written(tmp_path, rows(text=TEXTS, split=split_of)), "--text-encoder", words)
    assert outcome.code == code
    assert says in outcome.err
    assert "bundle" not in outcome.err


def test_more_tokens_than_the_encoder_takes(tmp_path: Path) -> None:
    words = write_words(tmp_path / "bert", positions=5)
    source = written(tmp_path, rows(text=TEXTS, split=split_of))
    outcome = convert(source, "--text-encoder", words, "--max-tokens", 6)
    assert outcome.lines == [f"error: {words}: --max-tokens is 6, this encoder takes 5: give 5 or less"]
    assert convert(source, "--text-encoder", words).code == 0
    assert array(tmp_path, "train", "text_bert").shape == (4, 3, 5)


def test_context_without_features(tmp_path: Path) -> None:
    words = write_words(tmp_path / "bert")
    source = written(tmp_path, rows(text=TEXTS, split=split_of))
    outcome = convert(source, "--text-encoder", words, "--context", 2)
    assert outcome.lines[-1].startswith(f"error: {source}: --context is for feature columns, and there are none")


def test_the_limit_of_others_on_cells_is_left_alone(tmp_path: Path) -> None:
    import csv

    before = csv.field_size_limit(1234)
    try:
        path = written(tmp_path, vectors())
        with open(path, "rb") as file:
            reading = TableFile(file, path).rows()
            next(reading)
            assert csv.field_size_limit() == 1234
            assert len(list(reading)) == 7
        assert csv.field_size_limit() == 1234
    finally:
        csv.field_size_limit(before)


def test_a_table_as_a_pickle_is_still_refused_by_its_reader(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="is a table: convert it first with"):
        load_pickle(written(tmp_path, vectors()))
