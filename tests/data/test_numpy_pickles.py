"""Arrays as NumPy from 1.13 on pickles them: every memory order, every protocol, byte for byte what that NumPy wrote.

tests/files/make_numpy_pickles.py wrote the files, each under the NumPy it is named after.
"""

from __future__ import annotations

import pickle
import pickletools
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hcmen.base.errors import CorruptFileError
from hcmen.data.unpickle import load_pickle

FILES = Path(__file__).parents[1] / "files"
sys.path.insert(0, str(FILES))
from make_numpy_pickles import arrays  # noqa: E402

WRITTEN = sorted((FILES / "numpy_pickles").glob("*.zip"))


def assert_same(found: Any, expected: np.ndarray[Any, Any]) -> None:
    if expected.dtype == object:
        assert found == expected.tolist()
        return
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(found, expected)
    assert not found.size or not found.flags.writeable


def test_the_matrix_spans_the_writers() -> None:
    versions = {path.stem for path in WRITTEN}
    assert {"1.13.3", "1.16.6", "1.26.4", "2.0.2", "2.3.0", "2.4.0"} <= versions
    protocols = {path.stem: len(zipfile.ZipFile(path).namelist()) for path in WRITTEN}
    assert protocols["1.13.3"] == 5  # of a Python without protocol 5
    assert protocols["2.3.0"] == 6
    # The axis order, which NumPy writes since 2.3.
    new = zipfile.ZipFile(FILES / "numpy_pickles" / "2.3.0.zip").read("protocol-5.pkl")
    assert any(arg == "K" for _, arg, _ in pickletools.genops(new))


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)
def test_what_each_numpy_wrote(tmp_path: Path, path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            (tmp_path / name).write_bytes(archive.read(name))
            found = load_pickle(tmp_path / name)["train"]
            assert set(found) == set(arrays())
            for key, expected in arrays().items():
                assert_same(found[key], expected)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("large", [False, True], ids=["small", "mapped"])
def test_what_the_numpy_that_is_here_writes(tmp_path: Path, protocol: int, large: bool) -> None:
    """Arrays of 64 KiB and more stay in the map."""
    made = arrays()
    if large:
        made = {
            k: np.repeat(x, 9000, axis=-1).transpose(np.argsort(np.argsort(x.strides))[::-1])
            for k, x in made.items()
            if x.ndim == 3
        }
    path = tmp_path / "set.pkl"
    path.write_bytes(pickle.dumps({"train": made}, protocol=protocol))
    found = load_pickle(path)["train"]
    for key, expected in made.items():
        assert_same(found[key], expected)


@pytest.mark.parametrize(
    "order",
    [(0, 1), (0, 1, 1), (0, 1, 3), (-1, 0, 1), (0, 1, 2.0), [0, 1, 2], "012", 7, (True, 0, 2), (0, 1, 2, 3)],
    ids=str,
)
def test_an_axis_order_that_is_none(tmp_path: Path, order: Any) -> None:
    content = pickle.dumps(np.zeros((2, 3, 4)), protocol=5)
    at = content.rindex(b"\x8c\x01C")
    tail = pickle.dumps(order, protocol=2)[2:-1]
    # The memory order is the last but one thing of the call: `K`, and then the axes.
    content = content[:at] + b"\x8c\x01K\x94" + tail + b"t\x94R\x94."
    path = tmp_path / "set.pkl"
    frame = content.index(b"\x95")
    path.write_bytes(content[:frame] + content[frame + 9 :])
    with pytest.raises(CorruptFileError, match="an array whose axis order names not every axis once"):
        load_pickle(path)
