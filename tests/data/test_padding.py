"""Padding in front, as MMSA-FET writes it with padding_location="start", and lengths that contradict the frames."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command import run

from hcmen.base.errors import InputError
from hcmen.base.inputs import FeatureConfig
from hcmen.base.modalities import MODALITIES
from hcmen.data import MultimodalDataset, layout
from hcmen.data.convert import convert, main
from hcmen.data.mmsa import read_mmsa
from hcmen.models.hcmen.config import ModelConfig

COUNTS = {"train": 5, "valid": 3, "test": 4}
SIZES = {"text": (7, 4), "audio": (11, 3), "vision": (9, 5)}
FORMS = ("pickle", "folder")


def config(text: int, audio: int, vision: int) -> ModelConfig:
    steps = {"text": text, "audio": audio, "vision": vision}
    return ModelConfig(*(FeatureConfig(SIZES[m][1], steps[m]) for m in MODALITIES), width=8, tokens=4)


def padded(sequences: list[Any], location: str) -> Any:
    """MMSA-FET's paddingSequence (dataset.py): to the mean length and three deviations, longer ones cut."""
    lengths = [len(s) for s in sequences]
    steps = int(np.mean(lengths) + 3 * np.std(lengths))
    out = np.zeros([len(sequences), steps, sequences[0].shape[-1]])
    for row, s in zip(out, sequences, strict=True):
        kept = s[:steps]
        row[steps - len(kept) if location == "start" else 0 :][: len(kept)] = kept
    return out


def fet(location: str = "end", *, aligned: bool = False, words: bool = False, seed: int = 0) -> dict[str, Any]:
    """What MMSA-FET's run_dataset returns: arrays chosen by index from the padded whole, `text_bert` of swapped axes.

    aligned: audio and vision by word, no lengths. words: text by word (GloVe), so of other steps than `text_bert`.
    """
    generator = np.random.default_rng(seed)
    modes = [mode for mode, count in COUNTS.items() for _ in range(count)]
    tokens = [
        np.stack([generator.integers(1000, 2000, n), np.ones(n, int), np.zeros(n, int)], 1)
        for n in generator.integers(2, 7, len(modes))
    ]
    steps = {m: generator.integers(1, t, len(modes)) for m, (t, _) in SIZES.items()}
    steps["text"] = np.array([len(t) - 2 * words or 1 for t in tokens])
    if aligned:
        steps = dict.fromkeys(SIZES, steps["text"])
    data: dict[str, Any] = {m: [generator.standard_normal((n, SIZES[m][1])) for n in steps[m]] for m in SIZES}
    data |= {
        "text_bert": tokens,
        "id": [f"v$_${i}" for i in range(len(modes))],
        "raw_text": [f"clip {i}" for i in range(len(modes))],
        "annotations": ["Neutral"] * len(modes),
        "regression_labels": [round(float(x), 1) for x in generator.uniform(-3, 3, len(modes))],
    }
    for m in ("audio", "vision"):
        data[f"{m}_lengths"] = [len(s) for s in data[m]]
    for m in (*SIZES, "text_bert"):
        data[m] = padded(data[m], location)
    for m in ("audio", "vision"):
        data[f"{m}_lengths"] = [min(n, data[m].shape[1]) for n in data[f"{m}_lengths"]]
        if aligned:
            del data[f"{m}_lengths"]
    data["text_bert"] = data["text_bert"].transpose(0, 2, 1)
    final: dict[str, Any] = {}
    for mode in COUNTS:
        chosen = [i for i, other in enumerate(modes) if other == mode]
        final[mode] = {
            k: np.array([v[i] for i in chosen]) if isinstance(v, list) else v[chosen] for k, v in data.items()
        }
    final["config"] = {"audio": {"tool": "opensmile", "args": {"feature_set": "eGeMAPS"}}, "text": {"model": "bert"}}
    return final


def sizes(data: dict[str, Any]) -> ModelConfig:
    return config(*(data["train"][m].shape[1] for m in MODALITIES))


def read(tmp_path: Path, data: Any, form: str, inputs: Any = None, protocol: int = 5) -> MultimodalDataset:
    path = tmp_path / "set.pkl"
    path.write_bytes(pickle.dumps(data, protocol=protocol))
    if form == "folder":
        convert(path, tmp_path / "set", force=True)
        path = tmp_path / "set"
    return read_mmsa(path, inputs or sizes(data).inputs)


def assert_same(found: MultimodalDataset, expected: MultimodalDataset) -> None:
    for s, split in expected.splits.items():
        for m in MODALITIES:
            np.testing.assert_array_equal(found.splits[s].lengths[m], split.lengths[m])
            np.testing.assert_array_equal(found.splits[s].features[m], split.features[m])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("aligned", [False, True], ids=["unaligned", "aligned"])
@pytest.mark.parametrize("words", [False, True], ids=["bert", "glove"])
def test_in_front_is_as_at_the_end(tmp_path: Path, form: str, protocol: int, aligned: bool, words: bool) -> None:
    kind = {"aligned": aligned, "words": words}
    behind = read(tmp_path, fet("end", **kind), form, protocol=protocol)
    in_front = read(tmp_path, fet("start", **kind), form, protocol=protocol)
    assert_same(in_front, behind)
    assert behind.cleaned == behind.misplaced == dict.fromkeys(MODALITIES, 0)
    assert all(in_front.misplaced[m] > 0 for m in MODALITIES if not (aligned and words) or m == "text")
    assert in_front.cleaned == in_front.misplaced


@pytest.mark.parametrize("form", FORMS)
def test_moved_values_are_counted_and_told_of(tmp_path: Path, form: str) -> None:
    data = fet()
    split = data["valid"]
    split["audio"][1] = 0.0
    split["audio"][1, -2:] = 3.0
    split["audio_lengths"][1] = 2
    split["audio"][0, 0, 0] = np.nan
    found = read(tmp_path, data, form)
    assert (found.cleaned["audio"], found.misplaced["audio"]) == (2 * 3 + 1, 2 * 3)
    audio = found.splits["valid"].features["audio"][1]
    assert (audio[:2] == 3.0).all()
    assert not audio[2:].any()
    if form == "folder":
        done = run(main, tmp_path / "set.pkl", tmp_path / "again")
        assert "audio: 1 stored values were NaN or infinite and are 0 now" in done.err
        assert "audio: 6 stored values were not where their sample's length says" in done.err


@pytest.mark.parametrize("piece", [1, 1 << 23])
def test_frames_that_no_length_explains_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    """Zeros in front, but not as many as the length leaves; or a hole in the middle and frames behind."""
    monkeypatch.setattr(layout, "_PIECE_BYTES", piece)
    for zeros in ([0], [0, 1], [1], [2]):
        data = fet()
        data["test"]["vision"][3] = 1.0
        data["test"]["vision"][3, zeros] = 0.0
        data["test"]["vision_lengths"][3] = 3
        with pytest.raises(
            InputError, match=f"test: vision: sample 3 has the length 3, frame {zeros[0]} is zero and frame 3"
        ):
            read(tmp_path, data, "pickle")
        with pytest.raises(InputError, match="pad at the end") as error:
            read(tmp_path, data, "folder")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("form", FORMS)
def test_frames_beyond_the_length_are_counted(tmp_path: Path, form: str) -> None:
    data = fet()
    steps = data["test"]["audio"].shape[1]
    data["test"]["audio"][0] = 1.0
    data["test"]["audio_lengths"][0] = steps - 2
    found = read(tmp_path, data, form)
    assert found.misplaced == {"text": 0, "audio": 2 * 3, "vision": 0}
    assert not found.splits["test"].features["audio"][0, -2:].any()


@pytest.mark.parametrize("form", FORMS)
def test_silence_is_no_padding(tmp_path: Path, form: str) -> None:
    """Zero frames first and last within the length stay where they are; so does a sample of nothing but zeros."""
    data = fet()
    audio, lengths = data["train"]["audio"], data["train"]["audio_lengths"]
    audio[:] = 0.0
    audio[0, 2:4] = 1.0
    lengths[0], lengths[1] = 6, 0
    found = read(tmp_path, data, form)
    np.testing.assert_array_equal(found.splits["train"].features["audio"], audio.astype(np.float32))
    assert found.splits["train"].lengths["audio"].tolist()[:2] == [6, 1]
    assert found.misplaced["audio"] == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "change",
    [
        lambda tokens: tokens[:, :, :-1],
        lambda tokens: np.concatenate([tokens, tokens], axis=2),
        lambda tokens: tokens.transpose(0, 2, 1),
        lambda tokens: tokens[:-1],
        lambda tokens: tokens[:, :2],
        lambda tokens: tokens[0],
        lambda tokens: tokens + 0.5,
        lambda tokens: np.full(tokens.shape, np.nan),
        lambda tokens: tokens.tolist(),
        lambda tokens: np.full(tokens.shape, "x"),
        lambda tokens: None,
    ],
    ids=["shorter", "longer", "turned", "few", "two rows", "two axes", "broken", "nan", "lists", "words", "none"],
)
def test_tokens_that_nobody_asks_for_refuse_nothing(tmp_path: Path, form: str, change: Any) -> None:
    data = fet()
    expected = read(tmp_path, {s: {k: v for k, v in data[s].items() if k != "text_bert"} for s in COUNTS}, form)
    for s in COUNTS:
        data[s]["text_bert"] = change(data[s]["text_bert"])
    assert_same(read(tmp_path, data, form), expected)


def test_a_folder_says_which_tokens_it_left_out(tmp_path: Path) -> None:
    data = fet()
    data["test"]["text_bert"] = data["test"]["text_bert"] + 0.5
    read(tmp_path, data, "folder")
    done = run(main, tmp_path / "set.pkl", tmp_path / "again", "--format", "json")
    assert list(json.loads(done.out)["left_out"]) == ["test"]
    assert "test: text_bert is left out" in done.err
    assert not (tmp_path / "again/test/text_bert.npy").exists()
    assert (tmp_path / "again/train/text_bert.npy").exists()
