"""Pickles of Python 2: what its own interpreter wrote, and byte strings opcode by opcode.

tests/files/make_python2_pickles.py wrote the archive, under Python 2.7 and NumPy 1.16.
"""

from __future__ import annotations

import pickle
import pickletools
import struct
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hcmen.base.errors import CorruptFileError
from hcmen.base.inputs import Inputs
from hcmen.data.convert import convert
from hcmen.data.mmsa import dataset_from_mmsa, read_mmsa
from hcmen.data.unpickle import load_pickle

FILES = Path(__file__).parents[1] / "files"
sys.path.insert(0, str(FILES))
from make_python2_pickles import SAMPLES, data  # noqa: E402

with zipfile.ZipFile(FILES / "python2_pickles.zip") as _archive:
    WRITTEN = {name: _archive.read(name) for name in _archive.namelist()}


def read(folder: Path, content: bytes) -> Any:
    (folder / "old.pkl").write_bytes(content)
    return load_pickle(folder / "old.pkl")


def short(value: bytes) -> bytes:
    return b"U" + bytes([len(value)]) + value


def long(value: bytes) -> bytes:
    return b"T" + struct.pack("<i", len(value)) + value


def array(body: bytes, dtype: bytes = b"f4", shape: bytes = b"K\x02\x85") -> bytes:
    """An array of NumPy as Python 2 spells it in protocol 2, over the bytes that `body` pushes."""
    return (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
        + shape
        + b"cnumpy\ndtype\n"
        + short(dtype)
        + b"K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + body
        + b"tb"
    )


def test_the_archive_is_of_python_2_and_spans_its_ways() -> None:
    assert sorted(WRITTEN) == sorted(f"{module}-{protocol}.pkl" for module in ("c", "python") for protocol in range(3))
    for name in ("c-2.pkl", "python-2.pkl"):  # pickletools stumbles over what Python 2 writes in protocol 0
        used = {opcode.name for opcode, _, _ in pickletools.genops(WRITTEN[name])}
        assert {"BINSTRING", "SHORT_BINSTRING"} <= used
        assert not any(opcode.startswith(("BINBYTES", "SHORT_BINBYTES")) for opcode in used)
    assert b"S'train'\n" in WRITTEN["c-0.pkl"]
    with pytest.raises(UnicodeDecodeError):
        pickle.loads(WRITTEN["c-2.pkl"])


@pytest.mark.parametrize("name", WRITTEN)
def test_what_python_2_wrote_is_read(tmp_path: Path, name: str) -> None:
    found = read(tmp_path, WRITTEN[name])
    assert set(found) == set(SAMPLES)
    for split, expected in data().items():
        assert set(found[split]) == set(expected)
        for key in ("text", "audio", "vision", "regression_labels"):
            assert found[split][key].dtype == expected[key].dtype
            np.testing.assert_array_equal(found[split][key], expected[key])
        assert found[split]["names"].tolist() == [name.encode() for name in expected["names"].tolist()]
        assert found[split]["id"] == expected["id"]
        assert found[split]["annotations"] == expected["annotations"].tolist()
        assert found[split]["classification_labels"] == [0.1, -5, 7, True, None, "\u4f60"]
        # The literals of that source are bytes in Python 2, and the same characters in Latin-1.
        assert found[split]["raw_text"] == expected["raw_text"]


@pytest.mark.parametrize("name", WRITTEN)
def test_a_set_of_python_2_is_converted_as_it_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "old.pkl").write_bytes(WRITTEN[name])
    (tmp_path / "new.pkl").write_bytes(pickle.dumps(data(), 4))
    convert(tmp_path / "old.pkl", tmp_path / "old")
    convert(tmp_path / "new.pkl", tmp_path / "new")
    files = sorted(path.relative_to(tmp_path / "new") for path in (tmp_path / "new").rglob("*.*") if path.is_file())
    assert len(files) > 20
    for file in files:
        if file.name != "dataset.json":
            assert (tmp_path / "old" / file).read_bytes() == (tmp_path / "new" / file).read_bytes(), file


NUMBERS = np.array([1.5, -3e-20], "<f4")


@pytest.mark.parametrize(
    "body",
    [
        short(NUMBERS.tobytes()),
        long(NUMBERS.tobytes()),
        b"S" + repr(NUMBERS.tobytes())[1:].encode() + b"\n",
    ],
    ids=["SHORT_BINSTRING", "BINSTRING", "STRING"],
)
def test_the_bytes_of_an_array_are_what_they_were(tmp_path: Path, body: bytes) -> None:
    assert max(NUMBERS.tobytes()) > 127
    found = read(tmp_path, b"\x80\x02}" + short(b"train") + b"}" + short(b"text") + array(body) + b"ss.")
    np.testing.assert_array_equal(found["train"]["text"], NUMBERS)
    assert not found["train"]["text"].flags.writeable


def test_a_large_array_stays_in_the_map(tmp_path: Path) -> None:
    numbers = np.arange(100_000, dtype="<f4")
    body = array(long(numbers.tobytes()), shape=b"J" + struct.pack("<i", 100_000) + b"\x85")
    found = read(tmp_path, b"\x80\x02}" + short(b"train") + b"}" + short(b"text") + body + b"ss.")["train"]["text"]
    np.testing.assert_array_equal(found, numbers)
    assert found.base is not None


STRINGS = {
    "every byte": (short(bytes(range(256))[:255]), bytes(range(255)).decode("latin1")),
    "nothing": (short(b""), ""),
    "nothing, long": (long(b""), ""),
    "double quotation marks": (b'S"it\'s"\n', "it's"),
    "escapes": (rb"S'\n\t\r\\\'\x00\xff\"'" + b"\n", "\n\t\r\\'\x00\xff\""),
    "an escape that is none": (rb"S'\q'" + b"\n", "\\q"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", STRINGS)
def test_byte_strings_are_latin_1(tmp_path: Path, case: str) -> None:
    content, expected = STRINGS[case]
    assert read(tmp_path, b"\x80\x02" + content + b".") == expected
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert pickle.loads(content + b".", encoding="latin1") == expected


DAMAGED = {
    "a length below zero": b"T\xff\xff\xff\xffabc.",
    "a length beyond the file": b"T\xff\xff\xff\x7fabc.",
    "a short one beyond the file": b"U\xffabc.",
    "no quotation marks": b"Sabc\n.",
    "one quotation mark": b"S'\n.",
    "two kinds of quotation marks": b"S'abc\"\n.",
    "half an escape": rb"S'\x0'" + b"\n.",
    "no end of the line": b"S'abc'",
    "an array of too few bytes": array(short(b"abcd")) + b".",
    "an array over characters that are no bytes": array(b"X\x04\x00\x00\x00\xe2\x82\xac1") + b".",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_damaged_is_refused(tmp_path: Path, case: str) -> None:
    with pytest.raises(CorruptFileError, match="truncated, damaged or not a pickle") as caught:
        read(tmp_path, b"\x80\x02" + DAMAGED[case])
    assert "\n" not in str(caught.value)


REFUSED = {
    "a class of Python 2": b"c__builtin__\neval\n" + short(b"id") + b"\x85R.",
    "a call by INST": b"(S'id'\nios\nsystem\n.",
    "a call by OBJ": b"(cos\nsystem\nS'id'\no.",
    "a dtype of objects over bytes": array(short(bytes(16)), b"O8") + b".",
    "a structured dtype": array(short(bytes(16)), b"V8") + b".",
}


@pytest.mark.parametrize("case", REFUSED)
def test_nothing_more_is_admitted(tmp_path: Path, case: str) -> None:
    with pytest.raises(CorruptFileError, match="the pickle asks for"):
        read(tmp_path, b"\x80\x02" + REFUSED[case])


def test_what_a_broken_text_needs_is_not_python_2(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match="get it from its publisher again"):
        read(tmp_path, b"\x80\x02X\x02\x00\x00\x00\xff\xff.")


def test_the_set_fits_a_model(tmp_path: Path) -> None:
    (tmp_path / "old.pkl").write_bytes(WRITTEN["c-2.pkl"])
    found = read_mmsa(tmp_path / "old.pkl", lambda sizes: Inputs(**sizes.modalities))
    assert {name: len(split) for name, split in found.splits.items()} == SAMPLES


def test_names_in_an_array_of_bytes_are_names(tmp_path: Path) -> None:
    found = read(tmp_path, WRITTEN["c-2.pkl"])
    for split in found.values():
        split["id"] = split.pop("names")
    ids = dataset_from_mmsa(found, "old", lambda sizes: Inputs(**sizes.modalities)).splits["valid"].ids
    assert ids == ["valid 0", "valid 1"]
