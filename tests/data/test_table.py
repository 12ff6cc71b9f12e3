"""hcmen-convert of a table: what is in the folder, against expectations made by hand."""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.command import run
from helpers.tables import (
    LABELS,
    TEXTS,
    WORDS,
    array,
    as_csv,
    clips,
    convert,
    index,
    names,
    rows,
    split_of,
    tokens_of,
    vectors,
    write_words,
    written,
)

from hcmen.base.clip import read_clip, write_clip
from hcmen.base.inputs import FeatureConfig, Inputs, TokenConfig
from hcmen.data import SPLITS
from hcmen.data.cut import main as cut
from hcmen.data.mmsa import read_mmsa
from hcmen.models.text_encoder import read_tokenizer


@pytest.fixture
def words(tmp_path: Path) -> Path:
    return write_words(tmp_path / "bert")


# --- texts ------------------------------------------------------------------------------------------------------------


def test_the_encoder_may_be_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_words(tmp_path / "site" / "a_bert" / "model")
    about = tmp_path / "site" / "a_bert-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: a-bert\nVersion: 1\n")
    (about / "RECORD").write_text("a_bert/model/config.json,,\na_bert/model/model.safetensors,,\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    outcome = convert(written(tmp_path, rows(text=TEXTS, split=split_of)), "--text-encoder", "a-bert")
    assert outcome.code == 0, outcome.err
    np.testing.assert_array_equal(array(tmp_path, "train", "text_bert"), tokens_of(TEXTS[:4], 6))


@pytest.mark.parametrize("lower", [True, False])
def test_a_vocabulary_alone_makes_the_tokens_that_training_asks_for(tmp_path: Path, words: Path, lower: bool) -> None:
    (words / "tokenizer.json").unlink()
    (words / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (words / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
    outcome = convert(written(tmp_path, rows(text=TEXTS, split=split_of)), "--text-encoder", words)
    assert outcome.code == 0, outcome.err
    expected = tokens_of(TEXTS[:4], 6)
    if not lower:
        expected[0, 0, 1] = WORDS.index("[UNK]")  # "The"
    np.testing.assert_array_equal(array(tmp_path, "train", "text_bert"), expected)
    digest = hashlib.sha256(read_tokenizer(words)).hexdigest()
    assert index(tmp_path)["front_ends"]["text"]["sha256"] == digest


def test_texts_become_tokens_and_nothing_else(tmp_path: Path, words: Path) -> None:
    source = written(tmp_path, rows(text=TEXTS, split=split_of))
    outcome = convert(source, "--text-encoder", words)
    assert outcome.code == 0, outcome.err
    for split, inside in (("train", range(4)), ("valid", range(4, 6)), ("test", range(6, 8))):
        files = {path.name for path in (tmp_path / "out" / split).iterdir()}
        assert files == {"id.json", "regression_labels.npy", "text_bert.npy"}
        np.testing.assert_array_equal(array(tmp_path, split, "text_bert"), tokens_of([TEXTS[i] for i in inside], 6))
        np.testing.assert_array_equal(
            array(tmp_path, split, "regression_labels"), np.array([LABELS[i] for i in inside], np.float32)
        )
        assert names(tmp_path, split) == [f"r{i}" for i in inside]
    found = index(tmp_path)
    digest = hashlib.sha256(read_tokenizer(words)).hexdigest()  # as hcmen-train puts it beside the checkpoint
    assert found["front_ends"] == {
        "text": {"extractor": "tokenizer", "settings": {"max_tokens": 128}, "sha256": digest}
    }
    assert found["label_range"] == [-3.0, 3.0]
    assert found["source"] == {
        "file": "set.csv",
        "bytes": source.stat().st_size,
        "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "rows": 8,
        "split": {"given": True, "by": "row", "groups": {"train": 4, "valid": 2, "test": 2}},
        "left_out": 0,
        "texts_cut": 0,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bert", "out", "set.csv"]


def test_the_folder_is_read_by_a_model_with_a_text_encoder(tmp_path: Path, words: Path) -> None:
    convert(written(tmp_path, rows(text=TEXTS, split=split_of)), "--text-encoder", words)
    inputs = Inputs(FeatureConfig(8, 16), None, None, TokenConfig(10, 2, 1))
    found = read_mmsa(tmp_path / "out", inputs)
    assert found.splits["train"].modalities == ("text",)
    assert found.splits["train"].lengths["text"].tolist() == [6, 6, 4, 6]
    assert found.front_ends["text"].extractor == "tokenizer"


def test_long_texts_are_cut_and_counted(tmp_path: Path, words: Path) -> None:
    outcome = convert(written(tmp_path, rows(text=TEXTS, split=split_of)), "--text-encoder", words, "--max-tokens", "4")
    np.testing.assert_array_equal(array(tmp_path, "train", "text_bert"), tokens_of(TEXTS[:4], 4))
    assert "3 of 8 texts are cut at 4 tokens: see --max-tokens" in outcome.lines
    assert index(tmp_path)["source"]["texts_cut"] == 3
    assert index(tmp_path)["front_ends"]["text"]["settings"] == {"max_tokens": 4}


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_processes_change_nothing(tmp_path: Path, words: Path, jobs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hcmen.data.table.work._TEXTS", 3)
    texts = [TEXTS[i % 8] for i in range(40)]
    outcome = convert(written(tmp_path, rows(40, text=texts, split=split_of)), "--text-encoder", words, "--jobs", jobs)
    assert outcome.code == 0, outcome.err
    inside = [i for i in range(40) if split_of(i) == "train"]
    np.testing.assert_array_equal(array(tmp_path, "train", "text_bert"), tokens_of([texts[i] for i in inside], 6))
    assert names(tmp_path, "train") == [f"r{i}" for i in inside]


# --- kinds of tables --------------------------------------------------------------------------------------------------

TRICKY = ['a "quoted" word', "two\nlines", "semi;colon, comma", "café 电影", " blanks ", "tab\there", "x", "y"]


def kinds() -> dict[str, tuple[str, bytes]]:
    table = rows(text=TRICKY, split=split_of)
    lines = "".join(json.dumps(row) + "\n" for row in table)
    made = {
        "comma": ("set.csv", as_csv(table).encode()),
        "semicolon": ("set.csv", as_csv(table, delimiter=";").encode()),
        "tab": ("set.csv", as_csv(table, delimiter="\t").encode()),
        "tab in .tsv": ("set.tsv", as_csv(table, delimiter="\t").encode()),
        "comma in .tsv": ("set.tsv", as_csv(table).encode()),
        "bar": ("set.csv", as_csv(table, delimiter="|").encode()),
        "mark of byte order": ("set.csv", codecs.BOM_UTF8 + as_csv(table).encode()),
        "quotation marks everywhere": ("set.csv", as_csv(table, quoting=csv.QUOTE_ALL).encode()),
        "lines of Unix": ("set.csv", as_csv(table, lineterminator="\n").encode()),
        "blank lines": ("set.csv", b"\n\n" + as_csv(table).encode().replace(b"\r\nr3", b"\r\n\r\n\r\nr3")),
        "a name in capitals at the end": ("SET.CSV", as_csv(table).encode()),
        "JSON lines": ("set.jsonl", lines.encode()),
        "JSON lines, escaped and with blank ones": ("set.ndjson", ("\n" + lines.replace("\n", "\r\n\n")).encode()),
        "JSON lines with a mark": ("set.jsonl", codecs.BOM_UTF8 + lines.encode()),
        "JSON lines with numbers as text": (
            "set.jsonl",
            "".join(json.dumps({**row, "label": str(row["label"])}) + "\n" for row in table).encode(),
        ),
    }
    return made


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_of_table_gives_the_same(
    tmp_path: Path, words: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr("hcmen.data.table.texts.Words.__call__", lambda self, text: seen.append(text) or _AS_X)
    name, content = kinds()[kind]
    (tmp_path / name).write_bytes(content)
    outcome = convert(tmp_path / name, "--text-encoder", words, "--jobs", "1")
    assert outcome.code == 0, outcome.err
    assert seen == TRICKY
    assert names(tmp_path, "test") == ["r6", "r7"]
    np.testing.assert_array_equal(array(tmp_path, "valid", "regression_labels"), np.array([-1.5, 0.0], np.float32))


_AS_X = (np.array([[2, 3], [1, 1], [0, 0]]), 0)


def test_parquet(tmp_path: Path, words: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = rows(text=TEXTS, split=split_of, **{"audio.0": float, "audio.1": lambda i: -i})
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "set.parquet")
    outcome = convert(tmp_path / "set.parquet", "--text-encoder", words)
    assert outcome.code == 0, outcome.err
    np.testing.assert_array_equal(array(tmp_path, "train", "text_bert"), tokens_of(TEXTS[:4], 6))
    np.testing.assert_array_equal(array(tmp_path, "test", "audio"), np.array([[[6, -6]], [[7, -7]]], np.float32))


def test_parquet_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "set.parquet").write_bytes(b"PAR1" + bytes(20) + b"PAR1")
    outcome = convert(tmp_path / "set.parquet")
    assert outcome.code == 3
    assert outcome.lines == [
        "error: Parquet needs pyarrow, which is not installed: pip install 'hcmen[parquet]', or save the table as CSV"
    ]


# --- clips ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_clips_are_padded_to_the_longest(tmp_path: Path, jobs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hcmen.data.table.work._CLIPS", 3)
    monkeypatch.setattr("hcmen.data.table.samples._PIECE_BYTES", 100)
    made = clips(tmp_path, 8)
    outcome = convert(
        written(tmp_path, rows(clip=lambda i: f"clips/{i}.npz", split=split_of)), "--jobs", jobs, "--label-range=-3,3"
    )
    assert outcome.code == 0, outcome.err
    for split in SPLITS:
        inside = [i for i in range(8) if split_of(i) == split]
        for m in ("audio", "vision"):
            x, lengths = array(tmp_path, split, m), array(tmp_path, split, f"{m}_lengths")
            assert lengths.tolist() == [len(made[i][m]) for i in inside]
            assert x.shape == (len(inside), 5, made[0][m].shape[1])
            for row, i in zip(x, inside, strict=True):
                np.testing.assert_array_equal(row[: len(made[i][m])], made[i][m])
                assert not row[len(made[i][m]) :].any()
    assert index(tmp_path)["front_ends"] == {}


def test_a_silent_first_frame_is_a_frame(tmp_path: Path) -> None:
    clips(tmp_path, 8)
    write_clip(tmp_path / "clips" / "0.npz", {"audio": np.zeros((2, 3)), "vision": np.eye(3, 4)})
    assert convert(written(tmp_path, rows(clip=lambda i: f"clips/{i}.npz", split=split_of))).code == 0
    assert array(tmp_path, "train", "audio_lengths")[0] == 2
    np.testing.assert_array_equal(array(tmp_path, "train", "vision")[0, :3], np.eye(3, 4))


def test_clips_and_words_go_together(tmp_path: Path, words: Path) -> None:
    """A text encoder takes the place of the features of the text, step by step."""
    made = clips(tmp_path, 8, ("text", "audio"))
    table = rows(text=TEXTS, clip=lambda i: f"clips/{i}.npz", split=split_of)
    assert convert(written(tmp_path, table), "--text-encoder", words).code == 0
    assert array(tmp_path, "train", "text").shape == (4, 6, 3)
    np.testing.assert_array_equal(array(tmp_path, "train", "text_bert"), tokens_of(TEXTS[:4], 6))
    assert array(tmp_path, "train", "text_lengths").tolist() == [len(made[i]["text"]) for i in range(4)]
    tokens = read_mmsa(
        tmp_path / "out", Inputs(FeatureConfig(3, 9), FeatureConfig(4, 9), None, TokenConfig(10, 2, 1))
    ).splits["train"]
    assert tokens.lengths["text"].tolist() == [6, 6, 4, 6]
    features = read_mmsa(tmp_path / "out", Inputs(FeatureConfig(3, 9), FeatureConfig(4, 9), None)).splits["train"]
    assert features.lengths["text"].tolist() == [len(made[i]["text"]) for i in range(4)]


_MEMORY = """
import sys
from pathlib import Path
from hcmen.data.table.conversion import TableOptions, convert_table
convert_table(Path(sys.argv[1]), Path(sys.argv[2]), TableOptions())
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_clips_pass_through_one_by_one(tmp_path: Path) -> None:
    """240 MB of them; the interpreter with NumPy takes some 40 MB."""
    made = np.random.default_rng(0).normal(size=(10_000, 200)).astype(np.float32)
    for i in range(30):
        write_clip(tmp_path / f"{i}.npz", {"audio": made[: 9_970 + i]})
    source = written(tmp_path, rows(30, clip=lambda i: f"{i}.npz"))
    command = [sys.executable, "-c", _MEMORY, source, tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    assert int(done.stdout) < 120 << 10
    assert sum(len(array(tmp_path, split, "audio")) for split in SPLITS) == 30


def test_a_clip_is_cut_again_from_the_folder(tmp_path: Path) -> None:
    """From one set to its clips and back: a folder without text serves hcmen-clip."""
    made = clips(tmp_path, 8)
    convert(written(tmp_path, rows(clip=lambda i: f"clips/{i}.npz", split=split_of)))
    outcome = run(cut, tmp_path / "out", "--split", "test", "--id", "r7", "--out", tmp_path / "again.npz")
    assert outcome.code == 0, outcome.err
    inputs = Inputs(None, FeatureConfig(3, 5), FeatureConfig(4, 5))
    for m, x in read_clip(tmp_path / "again.npz", inputs).features.items():
        np.testing.assert_array_equal(x, made[7][m])


def test_a_clip_of_tokens_alone_is_cut(tmp_path: Path, words: Path) -> None:
    convert(written(tmp_path, rows(text=TEXTS, split=split_of)), "--text-encoder", words)
    outcome = run(cut, tmp_path / "out", "--split", "test", "--index", "0", "--out", tmp_path / "a.npz")
    assert outcome.code == 0, outcome.err
    found = np.load(tmp_path / "a.npz")
    assert found.files == ["text_tokens"]
    np.testing.assert_array_equal(found["text_tokens"], tokens_of(TEXTS[6:7], 3)[0])


# --- columns of features ----------------------------------------------------------------------------------------------


def test_a_vector_is_a_sequence_of_one(tmp_path: Path) -> None:
    outcome = convert(written(tmp_path, vectors()))
    assert outcome.code == 0, outcome.err
    expected = np.array([[[i, i + 0.1]] for i in range(4)], np.float32)
    np.testing.assert_array_equal(array(tmp_path, "train", "audio"), expected)
    np.testing.assert_array_equal(array(tmp_path, "test", "vision"), np.array([[[-6]], [[-7]]], np.float32))
    assert array(tmp_path, "train", "audio_lengths").tolist() == [1] * 4
    assert index(tmp_path)["source"]["context"] == 0


WINDOWS = {
    1: [[0], [1, 0], [2, 1], [3, 2]],
    2: [[0, 1], [1, 0, 2], [2, 1, 3], [3, 2]],
    3: [[0, 1], [1, 0, 2], [2, 1, 3, 0], [3, 2, 1]],
    4: [[0, 1, 2], [1, 0, 2, 3], [2, 1, 3, 0], [3, 2, 1]],
}


@pytest.mark.parametrize("context", WINDOWS)
def test_neighbours_of_the_group_come_after_the_row_itself(tmp_path: Path, context: int) -> None:
    assert convert(written(tmp_path, vectors()), "--context", context).code == 0
    x, lengths = array(tmp_path, "train", "vision"), array(tmp_path, "train", "vision_lengths")
    for row, length, window in zip(x, lengths, WINDOWS[context], strict=True):
        np.testing.assert_array_equal(row[:length, 0], -np.array(window, np.float32))
    assert index(tmp_path)["source"]["context"] == context


def test_neighbours_are_those_of_the_file_and_not_of_bad_rows(tmp_path: Path) -> None:
    table = vectors()
    table[1]["label"] = "nan"
    assert convert(written(tmp_path, table), "--context", 2, "--skip-bad").code == 0
    found = array(tmp_path, "train", "vision")
    assert [row[:, 0].tolist() for row in found] == [[0, -2, 0], [-2, 0, -3], [-3, -2, 0]]


# --- labels and splits ------------------------------------------------------------------------------------------------

SCALES = {
    "of SIMS": ([-0.8, 0.2, 1.0], [-1, 1]),
    "of MOSI": ([-2.2, 0, 1.0], [-3, 3]),
    "beyond": ([-3.2, 0, 1.0], [-4, 4]),
    "of stars": ([1, 2.5, 5], [1, 5]),
    "within": ([1.5, 2.5, 4.5], [1, 5]),
}


@pytest.mark.parametrize("case", SCALES)
def test_the_scale_is_that_of_the_labels(tmp_path: Path, case: str) -> None:
    labels, expected = SCALES[case]
    table = [{**row, "label": labels[i % 3]} for i, row in enumerate(vectors())]
    outcome = convert(written(tmp_path, table))
    assert index(tmp_path)["label_range"] == expected
    told = f"taken to be on a scale from {expected[0]} to {expected[1]}: say it with --label-range if it is another"
    assert any(line.endswith(told) for line in outcome.lines)


def test_a_scale_that_is_given_is_taken(tmp_path: Path) -> None:
    outcome = convert(written(tmp_path, vectors()), "--label-range=-4,4.5")
    assert index(tmp_path)["label_range"] == [-4.0, 4.5]
    assert not any("scale" in line for line in outcome.lines)


def test_made_splits_hold_groups_together(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = rows(300, group=lambda i: f"g{rng.integers(60)}", **{"audio.0": float})
    source = written(tmp_path, table)
    outcome = convert(source)
    assert outcome.code == 0, outcome.err
    where = {name: split for split in SPLITS for name in names(tmp_path, split)}
    assert len(where) == 300
    splits_of: dict[str, set[str]] = {}
    for row in table:
        splits_of.setdefault(row["group"], set()).add(where[row["id"]])
    assert all(len(found) == 1 for found in splits_of.values())
    counts = [list(where.values()).count(split) for split in SPLITS]
    assert np.abs(np.array(counts) - [210, 30, 60]).max() <= 8
    told = f"splits are made, 70/10/20 with seed 0: {counts[0]} train, {counts[1]} valid, {counts[2]} test"
    assert f"{told}, groups held together" in outcome.lines
    assert index(tmp_path)["source"]["split"]["seed"] == 0


def splits(folder: Path) -> dict[str, str]:
    return {name: split for split in SPLITS for name in names(folder, split)}


def test_made_splits_go_by_the_seed_and_not_by_the_order(tmp_path: Path) -> None:
    table = rows(60, **{"audio.0": float})
    convert(written(tmp_path, table))
    first = splits(tmp_path)
    convert(written(tmp_path, table[::-1]), "--force")
    assert splits(tmp_path) == first
    convert(written(tmp_path, table), "--force", "--seed", 1)
    assert splits(tmp_path) != first
    assert sorted(splits(tmp_path).values()) == sorted(first.values())


def test_videos_in_names_are_groups(tmp_path: Path) -> None:
    table = [{**row, "id": f"v{i // 3}$_${i % 3}"} for i, row in enumerate(rows(90, **{"audio.0": float}))]
    outcome = convert(written(tmp_path, table))
    for name, split in splits(tmp_path).items():
        assert splits(tmp_path)[f"{name[:-1]}0"] == split
    assert any("videos held together" in line for line in outcome.lines)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 1, 1), (1, 50, 1), (10, 10, 10)])
def test_three_groups_fill_three_splits(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    groups = [f"g{k}" for k, size in enumerate(sizes) for _ in range(size)]
    outcome = convert(written(tmp_path, rows(len(groups), group=groups, **{"audio.0": float})))
    assert outcome.code == 0, outcome.err
    assert all(names(tmp_path, split) for split in SPLITS)


# --- columns that nobody knows, other options -------------------------------------------------------------------------


def test_unknown_columns_are_told(tmp_path: Path) -> None:
    table = rows(split=split_of, spilt=lambda i: "x", colour=lambda i: "red", grup=lambda i: "a", **{"audio.0": float})
    outcome = convert(written(tmp_path, table))
    assert outcome.code == 0, outcome.err
    assert "column 'colour' is ignored" in outcome.lines
    assert "column 'spilt' is ignored" in outcome.lines  # split is there
    assert "column 'grup' is ignored: did you mean 'group'?" in outcome.lines


def test_of_many_unknown_columns_some_are_told(tmp_path: Path) -> None:
    many = {f"x{i}": float for i in range(30)}
    outcome = convert(written(tmp_path, rows(split=split_of, **many, grup=lambda i: "a", **{"audio.0": float})))
    assert outcome.code == 0, outcome.err
    ignored = [line for line in outcome.lines if "ignored" in line]
    assert len(ignored) == 21
    assert ignored[0] == "column 'grup' is ignored: did you mean 'group'?"
    assert ignored[-1] == "and 11 more columns are ignored"


def test_the_digest_and_force_serve_tables_too(tmp_path: Path) -> None:
    source = written(tmp_path, vectors())
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert convert(source, "--sha256", "0" * 64).code == 5
    assert convert(source, "--sha256", "0").code == 2
    assert not (tmp_path / "out").exists()
    assert convert(source, "--sha256", digest.upper()).code == 0
    outcome = convert(source)
    assert (outcome.code, "--force" in outcome.err) == (2, True)
    assert convert(source, "--force").code == 0


def test_the_report_is_the_index(tmp_path: Path) -> None:
    outcome = convert(written(tmp_path, vectors()), "--format", "json")
    told, found = json.loads(outcome.out), index(tmp_path)
    assert {k: x for k, x in told.items() if k not in ("out", "schema_version")} == {
        k: x for k, x in found.items() if k not in ("versions", "schema_version")
    }


@pytest.mark.parametrize(
    "option", [("--skip-bad",), ("--seed", "1"), ("--context", "2"), ("--jobs", "1"), ("--label-range", "0,1")]
)
def test_options_of_tables_are_not_for_pickles(tmp_path: Path, option: tuple[str, ...]) -> None:
    (tmp_path / "set.pkl").write_bytes(b"\x80\x04N.")
    outcome = convert(tmp_path / "set.pkl", *option)
    assert outcome.code == 2
    assert outcome.lines[0].startswith(f"error: {option[0]} is for a table (.csv, .tsv, .jsonl, .ndjson, .parquet)")
