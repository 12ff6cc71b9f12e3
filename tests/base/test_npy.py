"""Headers of .npy files, read while other threads make CPython's parser stumble."""

from __future__ import annotations

import ast
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.small_bundle import clip_arrays

from hcmen.base.clip import read_clip, write_clip
from hcmen.base.npy import undisturbed
from hcmen.data.folder import _map_array
from hcmen.runtime import load


@pytest.fixture
def stumbles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every second header that NumPy parses fails as it does when threads meet; what has failed so far."""
    failed: list[str] = []
    real, lock, calls = ast.literal_eval, threading.Lock(), [0]

    def literal_eval(text: Any) -> Any:
        with lock:
            calls[0] += "descr" in str(text)
            if "descr" in str(text) and calls[0] % 2:
                failed.append(text)
                raise SystemError("AST constructor recursion depth mismatch (before=54, after=50)")
        return real(text)

    monkeypatch.setattr(ast, "literal_eval", literal_eval)
    return failed


def test_a_clip_is_read(shared_bundle: Path, tmp_path: Path, stumbles: list[str]) -> None:
    inputs, arrays = load(shared_bundle).inputs, clip_arrays(3)
    write_clip(tmp_path / "clip.npz", arrays)
    clip = read_clip(tmp_path / "clip.npz", inputs)
    assert len(stumbles) == len(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(clip.arrays[name], array)


def test_a_golden_set_is_not_called_damaged(shared_bundle: Path, stumbles: list[str]) -> None:
    assert all(test.passed for test in load(shared_bundle).self_test())
    assert stumbles


def test_an_array_of_a_converted_folder_is_mapped(tmp_path: Path, stumbles: list[str]) -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    np.save(tmp_path / "audio.npy", array)
    np.testing.assert_array_equal(_map_array(tmp_path / "audio.npy", "audio"), array)
    assert len(stumbles) == 1


def test_what_fails_for_ever_fails() -> None:
    def broken() -> None:
        raise SystemError("for another reason")

    with pytest.raises(SystemError, match="for another reason"):
        undisturbed(broken)
