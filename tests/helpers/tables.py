"""Small tables, the tokenizer of a few words beside them, and what hcmen-convert makes of them reckoned by hand."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hcmen.base.clip import write_clip
from hcmen.data.convert import main
from helpers.command import Outcome, run

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "film", "was", "good", "bad", "not")


def bert_splits() -> dict[str, Any]:
    """How a BERT's tokenizer.json cleans a text and splits it into words."""
    return {
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
    }


def write_words(folder: Path, *, positions: int = 512) -> Path:
    """Writes tokenizer.json and config.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    marks = {word: {"id": word, "ids": [vocabulary[word]], "tokens": [word]} for word in ("[CLS]", "[SEP]")}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        **bert_splits(),
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
            ],
            "pair": [],
            "special_tokens": marks,
        },
        "decoder": None,
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "vocab": vocabulary, "max_input_chars_per_word": 100},
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    sizes = {"model_type": "bert", "vocab_size": len(WORDS), "max_position_embeddings": positions}
    (folder / "config.json").write_text(json.dumps(sizes))
    return folder


def tokens_of(texts: list[str], steps: int) -> np.ndarray[Any, Any]:
    """int64 [N, 3, steps] of texts whose words stand between blanks; what is too long is cut before [SEP]."""
    made = np.zeros((len(texts), 3, steps), np.int64)
    for row, text in zip(made, texts, strict=True):
        ids = [WORDS.index(word) if word in WORDS else 1 for word in text.lower().split()][: steps - 2]
        row[0, : len(ids) + 2] = [2, *ids, 3]
        row[1, : len(ids) + 2] = 1
    return made


TEXTS = ["The film was good", "the film was bad", "not bad", "good good good good", "bad", "unheard of", "was", "not"]
LABELS = [2.5, -2.0, 0.5, 3.0, -1.5, 0.0, 0.25, -0.75]


def rows(count: int = 8, **columns: Any) -> list[dict[str, Any]]:
    """Rows of id and label, and of `columns`, each a list or a function of the row's number."""
    return [
        {
            "id": f"r{i}",
            "label": LABELS[i % len(LABELS)],
            **{name: value(i) if callable(value) else value[i] for name, value in columns.items()},
        }
        for i in range(count)
    ]


def as_csv(table: Sequence[dict[str, Any]], **options: Any) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(table[0]), **options)
    writer.writeheader()
    writer.writerows(table)
    return stream.getvalue()


def as_json_lines(table: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in table)


def written(folder: Path, table: Sequence[dict[str, Any]], name: str = "set.csv", **options: Any) -> Path:
    (folder / name).write_text(as_csv(table, **options), encoding="utf-8", newline="")
    return folder / name


def split_of(i: int) -> str:
    return ("train", "train", "train", "train", "valid", "valid", "test", "test")[i % 8]


def convert(source: Path, *options: object) -> Outcome:
    return run(main, source, source.parent / "out", *options)


def array(folder: Path, split: str, key: str) -> np.ndarray[Any, Any]:
    return np.load(folder / "out" / split / f"{key}.npy")


def names(folder: Path, split: str) -> list[str]:
    found: list[str] = json.loads((folder / "out" / split / "id.json").read_text())
    return found


def index(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "dataset.json").read_text())
    return found


def clips(folder: Path, count: int, modalities: tuple[str, ...] = ("audio", "vision")) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    (folder / "clips").mkdir(exist_ok=True)
    made = []
    for i in range(count):
        arrays = {m: rng.normal(size=(1 + (i * 7 + k) % 5, 3 + k)) for k, m in enumerate(modalities)}
        write_clip(folder / "clips" / f"{i}.npz", arrays)
        made.append({m: x.astype(np.float32) for m, x in arrays.items()})
    return made


def vectors(count: int = 8) -> list[dict[str, Any]]:
    return rows(
        count,
        split=split_of,
        group=lambda i: "abc"[("train", "valid", "test").index(split_of(i))],
        **{"audio.0": float, "audio.1": lambda i: i + 0.1, "vision.0": lambda i: -i},
    )
