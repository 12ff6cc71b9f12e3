"""Files that were given for others: each is told what it is, and what helps."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zipfile
from collections import OrderedDict, defaultdict

import pytest

from hcmen.base import library
from hcmen.base.errors import BackendError, CorruptFileError
from hcmen.base.strangers import stranger
from hcmen.data.unpickle import load_pickle

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def tarred() -> bytes:
    """An empty file in a tar archive."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    return stream.getvalue()


def torch_zip() -> bytes:
    """The beginning of what torch.save writes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("data/data.pkl", b"")
    return stream.getvalue()


FILES = {
    "gzip": (gzip.compress(b"x"), "gzip archive", "gunzip"),
    "tar": (tarred(), "tar archive", "tar xf"),
    "lfs": (POINTER, "Git LFS pointer", "git lfs pull"),
    "html": (b"\n<!DOCTYPE html><html>", "HTML page", "download the file itself"),
    "torch": (torch_zip(), "torch.save", "tensor.numpy()"),
    "defaultdict": (pickle.dumps(defaultdict(list)), "collections.defaultdict", "plain dict"),
    "ordered": (pickle.dumps({"train": OrderedDict()}), "collections.OrderedDict", "plain dict"),
    "python 2": (b"ccopy_reg\n_reconstructor\n.", "copy_reg._reconstructor", "encoding='latin1'"),
    "tensor": (b"ctorch._utils\n_rebuild_tensor_v2\n.", "torch._utils", "x.numpy()"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_data_file_of_another_kind_is_told_what_helps(case, tmp_path):
    content, what, fix = FILES[case]
    (tmp_path / "data.pkl").write_bytes(content)
    with pytest.raises(CorruptFileError) as caught:
        load_pickle(tmp_path / "data.pkl")
    assert what in str(caught.value)
    assert fix in str(caught.value)
    assert "publisher" not in str(caught.value)


@pytest.mark.parametrize("protocol", range(6))
def test_a_sound_pickle_is_no_stranger(protocol):
    assert stranger(pickle.dumps({"train": {"id": ["a"], "text": [1.5]}}, protocol), "data.pkl") is None


@pytest.mark.parametrize("frozen", [True, False])
def test_a_missing_library_in_a_frozen_application_asks_for_its_files(frozen, monkeypatch):
    monkeypatch.setattr(library.sys, "frozen", frozen, raising=False)
    monkeypatch.setattr(library, "library_folders", list)
    with pytest.raises(BackendError) as caught:
        library.library_path()
    assert ("pyinstaller --collect-binaries hcmen" in str(caught.value)) is frozen
    assert ("C++17" in str(caught.value)) is not frozen
