"""What a pickle may build: as much as data needs. tests/attacks/pickles.py has what is refused."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attacks.pickles import text

from hcmen.base.errors import CorruptFileError, HcmenError
from hcmen.data.layout import open_split
from hcmen.data.unpickle import load_pickle


def shared_lists() -> bytes:
    """A list of 4,000 references, as 4,000 values of one split: 16 million references if each were copied."""
    keys = b"".join(text(str(i)) + b"h\x01" for i in range(4000))
    return b"\x80\x02}" + text("train") + b"}(" + text("k") + b"](" + b"K\x01" * 4000 + b"eq\x01" + keys + b"us."


def encoded(count: int) -> bytes:
    """A text of 1 MB that is left in the map, asked for as bytes again and again."""
    body = "é" * (1 << 19)
    return b"\x80\x04" + text(body) + b"q\x000](" + b"c_codecs\nencode\n(h\x00X\x06\x00\x00\x00latin1tR" * count + b"e."


@pytest.mark.parametrize("content", [shared_lists(), encoded(5000)], ids=["lists", "long text"])
def test_what_is_shared_is_not_copied(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "set.pkl"
    path.write_bytes(content)
    found = load_pickle(path)
    values = found if isinstance(found, list) else [x for k, x in found["train"].items() if k != "k"]
    assert len(values) in (4000, 5000)
    assert len({id(x) for x in values}) == 1


@pytest.mark.parametrize("what", ["a dict", "a list", "a tuple", "a set"])
def test_plain_containers_are_let_be(tmp_path: Path, what: str) -> None:
    inner = {"a dict": {1: "a", 2.5: "b", None: "c", False: "d", b"e": "f", 2**60 - 1: 1}, "a list": [1, [2, (3,)]]}
    value = inner.get(what, (1, "b", (None,)) if what == "a tuple" else {1, "b", frozenset()} - {frozenset()})
    path = tmp_path / "set.pkl"
    for protocol in range(4 if what == "a set" else 0, pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps({"train": {"x": value, "y": value}, "config": {"k": [value] * 3}}, protocol))
        assert load_pickle(path) == {"train": {"x": value, "y": value}, "config": {"k": [value] * 3}}


def test_numbers_as_large_as_they_may_be(tmp_path: Path) -> None:
    path = tmp_path / "set.pkl"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for value in (2**511 - 1, -(2**511), 2**64, -1, 0, True, False, 1e308, -0.5):
            path.write_bytes(pickle.dumps([value], protocol))
            assert load_pickle(path) == [value]
            assert type(load_pickle(path)[0]) is type(value)


@pytest.mark.parametrize(
    "ids",
    [
        ["x" * 60_000] * 3,
        ["a", "b", "x" * 1001],
        np.frombuffer(b"\xff" * 12, "<U1"),
        [2**500, 1, 2],
        [float("nan")] * 3,
    ],
    ids=["shared and long", "long", "no characters", "great numbers", "not numbers"],
)
def test_names_of_samples(tmp_path: Path, ids: Any) -> None:
    """Either names of at most 1,000 characters come out, or one line."""
    split = {m: np.ones((3, 2, 2)) for m in ("text", "audio", "vision")}
    data = {"train": {**split, "regression_labels": np.zeros(3), "id": ids}}
    try:
        found = open_split(data, "train", "set").ids
    except HcmenError as error:
        found = [str(error)]
        assert "'id'" in found[0]
    assert max(map(len, found)) <= 1000


def test_keys_in_messages_are_short(tmp_path: Path) -> None:
    with pytest.raises(HcmenError) as error:
        open_split({"x" * 60_000 + str(i): 0 for i in range(1000)}, "train", "set")
    assert "'train' is missing" in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_name_in_a_message_is_printable(tmp_path: Path) -> None:
    path = tmp_path / "set.pkl"
    path.write_bytes(b"\x80\x04\x8c\x02\x1b[\x8c\x03a\nb\x93.")
    with pytest.raises(CorruptFileError) as error:
        load_pickle(path)
    assert "\x1b" not in str(error.value)
    assert r"'\x1b[.a\nb'" in str(error.value)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_reading(tmp_path: Path, name: str) -> None:
    """While the longest admitted program runs, which takes seconds."""
    path = tmp_path / "set.pkl"
    path.write_bytes(b"\x80\x04N" + b"N0" * 4_000_000 + b".")
    process = subprocess.Popen(
        [sys.executable, "-m", "hcmen", "convert", str(path), str(tmp_path / "out")], stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr or ():
        if "checksum" in line:
            break
    time.sleep(1)
    process.send_signal(getattr(signal, name))
    assert process.wait(20) in (130, 143, 2)
    assert not (tmp_path / "out").exists()
