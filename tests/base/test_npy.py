"""Headers of .npy files: those of all writers are read as NumPy reads them, and hostile ones are one short line."""

from __future__ import annotations

import ast
import io
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.small_bundle import INPUTS, clip_arrays
from hypothesis import given
from hypothesis import strategies as st

from hcmen.base.clip import read_clip, write_clip
from hcmen.base.errors import CorruptFileError
from hcmen.base.npy import read_npy_header
from hcmen.data.folder import _map_array
from hcmen.runtime import load
from hcmen.runtime.golden import read_golden


def npy(header: str, version: int = 1, body: bytes = b"") -> bytes:
    content = header.encode("latin1")
    return b"\x93NUMPY" + bytes([version, 0]) + len(content).to_bytes(2 * version, "little") + content + body


def header(shape: str = "(1, 6)", descr: str = "'<f4'", order: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


@pytest.mark.parametrize("dtype", ["f2", "<f4", ">f4", "f8", "?", "i1", "u8", "c16", "S5", "U3", "M8[ns]", "m8"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 4), (1, 2, 3, 4)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_what_numpy_writes_is_read(dtype: str, shape: tuple[int, ...], order: Any):
    array = np.zeros(shape, dtype, order=order)
    if array.size and array.dtype.kind in "fi":
        array[...] = np.arange(array.size).reshape(shape)
    buffer = io.BytesIO()
    np.save(buffer, array)
    found = read_npy_header(io.BytesIO(buffer.getvalue()))
    assert (found.shape, found.dtype) == (shape, array.dtype)
    assert found.offset + found.nbytes == len(buffer.getvalue())
    np.testing.assert_array_equal(found.array(buffer.getvalue()), np.load(io.BytesIO(buffer.getvalue())))


@pytest.mark.parametrize(
    "text",
    [
        header(),
        header("(1,6)"),
        header("(1L, 6L)"),
        "{'descr':'<f4','fortran_order':False,'shape':(1,6)}",
        '{"shape": (1, 6), "fortran_order": False, "descr": "<f4"}',
        " {  'shape' : ( 1 , 6 , ) ,\n'descr' : '<f4','fortran_order' : False }  \n",
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_what_others_write_is_read(text: str, version: int):
    content = npy(text, version, np.arange(6, dtype="<f4").tobytes())
    found = read_npy_header(io.BytesIO(content))
    np.testing.assert_array_equal(found.array(content), [[0, 1, 2, 3, 4, 5]])


HOSTILE = {
    "300 parentheses": header("(" * 300 + ")" * 300),
    "100 brackets": header("[" * 100 + "]" * 100),
    "200 objects": header("{1:" * 200 + "1" + "}" * 200),
    "signs": header("-" * 3000 + "1"),
    "a sum": header("(" + "+".join("1" * 900) + ",)"),
    "a length of 4,000 digits": header(f"({'9' * 4000}, 6)"),
    "a length of 19 digits": header(f"({'9' * 19}, 6)"),
    "a hexadecimal length": header(f"(0x{'f' * 3900}, 6)"),
    "a length that runs into a word": header("(1if 1else 2, 6)"),
    "an escape that is none": header(descr=r"'\\d\\p'".replace("\\\\", "\\")),
    "an escape in a string of bytes": header(descr=r"b'\d'"),
    "a call": header("__import__('os').getpid()"),
    "a comprehension": header("tuple(1 for _ in range(10**9))"),
    "a length below zero": header("(-1, 6)"),
    "a length of half": header("(1.5, 6)"),
    "a number as shape": header("6"),
    "a number in parentheses": header("(6)"),
    "a shape of 33 axes": header(f"({'1, ' * 33})"),
    "records of nothing": header(descr="[(, )]"),
    "records of records": header(descr="[('a', [('b', '<f4')])]"),
    "no dtype": header(descr="'nonsense'"),
    "a dtype of 10 digits": header(descr="'<f1234567890'"),
    "an order that is 0": header(order="0"),
    "a key twice": "{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (1, 6)}",
    "a key too many": "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 6), 'more': True}",
    "a key too few": "{'descr': '<f4', 'shape': (1, 6)}",
    "a length that begins with 0": header("(01, 6)"),
    "no dictionary": "(1, 6)",
    "NUL": "\0" * 100,
    "nothing": "",
    "spaces": " " * 4000,
    "10,000 bytes": header("(1, " + " " * 10000 + "6)"),
    "commas": header("(" + "," * 4000 + ")"),
    "no end": "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 6",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_one_short_line_and_no_warning(tmp_path: Path, name: str):
    content = npy(HOSTILE[name], 2 if len(HOSTILE[name]) > 65535 else 1, bytes(24))
    with zipfile.ZipFile(tmp_path / "clip.npz", "w") as archive:
        archive.writestr("text.npy", content)
    (tmp_path / "audio.npy").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CorruptFileError, match=r"text has no valid \.npy header \(") as clip:
            read_clip(tmp_path / "clip.npz", INPUTS)
        with pytest.raises(CorruptFileError, match="damaged") as mapped:
            _map_array(tmp_path / "audio.npy", "audio")
        with pytest.raises(CorruptFileError, match="damaged golden file") as golden:
            read_golden(np.fromfile(tmp_path / "clip.npz", np.uint8), "golden.npz")
    for found in (clip, mapped, golden):
        assert "\n" not in str(found.value)
        assert len(str(found.value)) < 150 + len(str(tmp_path))


@given(
    st.text("{}()[]'\": ,.0123456789LdescrfotnahpTuFl<>|=\\\n", max_size=200), st.integers(0, 120), st.integers(0, 40)
)
def test_any_header_is_read_or_refused_as_numpy_does(text: str, at: int, cut: int):
    """What is read is what NumPy reads; what NumPy refuses is refused."""
    whole = header()
    content = npy(whole[:at] + text + whole[at + cut :], 1, bytes(24))
    try:
        found = read_npy_header(io.BytesIO(content))
    except ValueError:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # It minds line breaks and the spaces behind them, which are as good as others here.
        spelt = " ".join(content[10 : found.offset].decode("latin1").split())
        stream = io.BytesIO(npy(spelt)[8:])
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    assert (found.shape, found.fortran, found.dtype) == (shape, fortran, dtype)


@pytest.mark.parametrize("cut", [0, 5, 7, 8, 9, 40])
def test_a_header_that_ends_too_early_is_refused(cut: int):
    with pytest.raises(ValueError, match=r"begin|early|version"):
        read_npy_header(io.BytesIO(npy(header())[:cut]))


def test_records_are_named():
    content = npy(header(descr="[('a', '<f4'), ('b', '|u1')]"), 1, bytes(30))
    assert read_npy_header(io.BytesIO(content)).dtype == np.dtype([("a", "<f4"), ("b", "u1")])


def test_python_objects_are_never_made():
    content = npy(header(descr="'|O'"), 1, bytes(48))
    with pytest.raises(ValueError, match="Python objects"):
        read_npy_header(io.BytesIO(content)).array(content)


def test_no_header_is_evaluated(shared_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Python 3.11 fails by chance where threads parse at once, and what a parser says differs by version."""

    real = ast.literal_eval

    def parsed(text: Any) -> Any:
        if "descr" not in str(text):
            return real(text)
        raise SystemError("AST constructor recursion depth mismatch (before=54, after=50)")

    monkeypatch.setattr(ast, "literal_eval", parsed)
    arrays = clip_arrays(3)
    write_clip(tmp_path / "clip.npz", arrays)
    clip = read_clip(tmp_path / "clip.npz", load(shared_bundle).inputs)
    for name, array in arrays.items():
        np.testing.assert_array_equal(clip.arrays[name], array)
    assert all(test.passed for test in load(shared_bundle).self_test())
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    np.save(tmp_path / "audio.npy", array)
    np.testing.assert_array_equal(_map_array(tmp_path / "audio.npy", "audio"), array)


@pytest.mark.parametrize(
    "shape", ["(999999999999999999, 6, 2)", "(99999999999999999, 0, 2)", "(4294967296, 4294967296, 16)", "(2, 3, 5)"]
)
def test_a_shape_that_is_not_that_of_the_file(tmp_path: Path, shape: str):
    (tmp_path / "audio.npy").write_bytes(npy(header(shape), 1, bytes(96)))
    with pytest.raises(CorruptFileError, match="damaged") as caught:
        _map_array(tmp_path / "audio.npy", "audio")
    assert "\n" not in str(caught.value)
