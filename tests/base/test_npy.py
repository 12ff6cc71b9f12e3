"""Headers of .npy files: all that NumPy writes is read, without Python's parser, and nothing else is."""

from __future__ import annotations

import ast
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.small_bundle import INPUTS, clip_arrays, golden

from hcmen.base.clip import read_clip, write_clip
from hcmen.base.errors import CorruptFileError
from hcmen.base.npy import read_header
from hcmen.data.folder import _map_array
from hcmen.runtime.golden import read_golden


@pytest.fixture
def no_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython 3.11's parser as it fails when threads meet."""

    def literal_eval(text: Any) -> Any:
        raise SystemError("AST constructor recursion depth mismatch (before=54, after=50)")

    monkeypatch.setattr(ast, "literal_eval", literal_eval)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 6), np.float32),
        np.zeros((6, 3), ">f8").T,
        np.float16(1),
        np.zeros((0, 3), np.int64),
        np.zeros((1,) * 30, bool),
        np.zeros(2, [("a", "<f4"), ("b", "<i8")]),
        np.zeros(2, object),
        np.zeros(2, "M8[ns]"),
        np.array(["ab", "c"]),
    ],
    ids=lambda array: f"{array.dtype} {array.shape}".replace(" ", "_"),
)
def test_what_numpy_writes_is_read(array: np.ndarray) -> None:
    file = io.BytesIO()
    np.save(file, array)
    for version in ((1, 0), (2, 0)):
        file = io.BytesIO()
        np.lib.format.write_array(file, array, version)
        file.seek(0)
        expected = np.asarray(array)
        assert read_header(file) == (expected.shape, np.isfortran(expected), expected.dtype)
        assert file.tell() + (expected.nbytes if expected.dtype != object else 0) <= len(file.getvalue())


def header(text: str, version: bytes = b"\1\0", size: int | None = None) -> io.BytesIO:
    content = text.encode("latin1")
    width = 2 if version == b"\1\0" else 4
    announced = len(content) if size is None else size
    return io.BytesIO(b"\x93NUMPY" + version + announced.to_bytes(width, "little") + content)


def test_headers_of_other_writers() -> None:
    """Keys in any order, quotes of either kind, no comma at the end, and Python 2's long numbers."""
    for text in (
        '{"shape":(3,6),"fortran_order":False,"descr":"<f4"}',
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3L, 6L), }    \n",
        "\n{ 'fortran_order' : False , 'descr' : '<f4' , 'shape' : ( 3 , 6 ) , } ",
    ):
        assert read_header(header(text)) == ((3, 6), False, np.dtype("<f4"))


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 6), }"


@pytest.mark.parametrize(
    "file",
    [
        header(""),
        header("{"),
        header("{}"),
        header(GOOD[:-1]),
        header(GOOD + "\0"),
        header(GOOD.replace("(3, 6)", "(" * 2000 + ")" * 2000)),
        header(GOOD.replace("(3, 6)", "(-3, 6)")),
        header(GOOD.replace("(3, 6)", "(" + "9" * 4000 + ",)")),
        header(GOOD.replace("(3, 6)", "(3.0, 6)")),
        header(GOOD.replace("(3, 6)", "'(3, 6)'")),
        header(GOOD.replace("False", "0")),
        header(GOOD.replace("False", "'False'")),
        header(GOOD.replace("False", "(1,)")),
        header(GOOD.replace("'<f4'", "'\\d'")),
        header(GOOD.replace("'<f4'", "'nonsense'")),
        header(GOOD.replace("'<f4'", "True")),
        header(GOOD.replace("'<f4'", "[('a', 'a', 'a')]")),
        header(GOOD.replace("'<f4'", "[('a', '<f4'), ('a', '<f4')]")),
        header(GOOD.replace("}", "'more': 'a'}")),
        header(GOOD.replace("'shape'", "'descr'")),
        header(GOOD.ljust(5000)),
        header(GOOD, size=len(GOOD) + 1),
        header(GOOD, b"\2\0", (1 << 32) - 1),
        header(GOOD, b"\3\0"),
        header(GOOD, b"\0\0"),
        io.BytesIO(b"\x93NUMPY\1"),
        io.BytesIO(b"PK\3\4" + bytes(100)),
    ],
)
def test_anything_else_is_refused(file: io.BytesIO) -> None:
    with pytest.raises(ValueError):
        read_header(file)


def test_a_clip_is_read(tmp_path: Path, no_parser: None) -> None:
    arrays = clip_arrays(3)
    write_clip(tmp_path / "clip.npz", arrays)
    clip = read_clip(tmp_path / "clip.npz", INPUTS)
    for name, array in arrays.items():
        np.testing.assert_array_equal(clip.arrays[name], array)


def test_a_golden_set_is_read(no_parser: None) -> None:
    file, arrays = io.BytesIO(), golden("full")
    np.savez_compressed(file, **arrays, **{"000/turned": np.asfortranarray(np.arange(6.0).reshape(2, 3))})
    cases = read_golden(np.frombuffer(file.getvalue(), np.uint8), "golden.npz")
    for name, array in arrays.items():
        case, _, tensor = name.partition("/")
        np.testing.assert_array_equal(cases[int(case)][tensor], array)
    np.testing.assert_array_equal(cases[0]["turned"], np.arange(6.0).reshape(2, 3))


def test_an_array_of_a_converted_folder_is_mapped(tmp_path: Path, no_parser: None) -> None:
    path = tmp_path / "audio.npy"
    for shape in ((2, 3, 4), (0, 3, 4)):
        array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        np.save(path, array)
        np.testing.assert_array_equal(_map_array(path, "audio"), array)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ("(1 << 62, 6, 2)", "damaged"),
        ("(9223372036854775807, 6, 2)", "damaged .shape .9223372036854775807, 6, 2. in "),
        ("(18446744073709551616, 0, 2)", "damaged .shape "),
        ("(4294967296, 4294967296, 16)", "damaged .shape "),
        ("(2, 3)", "expected float32 with 3 axes"),
    ],
)
def test_a_shape_that_is_not_that_of_the_file(tmp_path: Path, shape: str, says: str) -> None:
    path = tmp_path / "audio.npy"
    path.write_bytes(header(GOOD.replace("(3, 6)", shape)).getvalue() + bytes(96))
    with pytest.raises(CorruptFileError, match=says) as caught:
        _map_array(path, "audio")
    assert "\n" not in str(caught.value)
