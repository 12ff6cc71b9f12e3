"""The key that signs engines, and libraries that environment variables name."""

from __future__ import annotations

import os
import shutil
import stat
import threading
from pathlib import Path

import pytest
from helpers.command import open_folder, without_privileges

from hcmen.base import trust
from hcmen.base.cuda_library import cuda_library_path
from hcmen.base.errors import BackendError, CorruptFileError, InputError
from hcmen.base.trust import check_nobody_else_writes, engine_key, key_path, library_from_environment, made_key

OTHER = 65534
"""A user that is neither root nor, in all likelihood, whoever runs the tests."""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")


@pytest.fixture(autouse=True)
def state(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "hcmen" / "engine.key"


# --- the key ----------------------------------------------------------------------------------------------------------


def test_the_key_is_made_once_and_for_its_user_alone(state):
    assert engine_key() is None
    assert not state.exists()
    old = os.umask(0)
    try:
        key = made_key()
    finally:
        os.umask(old)
    assert len(key) == 32
    assert stat.S_IMODE(state.stat().st_mode) == 0o600
    assert stat.S_IMODE(state.parent.stat().st_mode) == 0o700
    assert made_key() == engine_key() == key
    assert [p.name for p in state.parent.iterdir()] == ["engine.key"]


@pytest.mark.parametrize(("named", "home", "path"), [
    (None, "/home/a", "/home/a/.local/state/hcmen/engine.key"),
    ("", "/home/a", "/home/a/.local/state/hcmen/engine.key"),
    ("relative", "/home/a", "/home/a/.local/state/hcmen/engine.key"),
    ("/state", "/home/a", "/state/hcmen/engine.key"),
    ("/state", "nowhere", "/state/hcmen/engine.key"),
    ("relative", "nowhere", None),
])  # fmt: skip
def test_where_the_key_lies(monkeypatch, named, home, path):
    monkeypatch.delenv("XDG_STATE_HOME")
    if named is not None:
        monkeypatch.setenv("XDG_STATE_HOME", named)
    monkeypatch.setenv("HOME", home)
    assert key_path() == (Path(path) if path else None)


def test_many_makers_make_one_key():
    keys: list[bytes] = []
    threads = [threading.Thread(target=lambda: keys.append(made_key())) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 16
    assert len(set(keys)) == 1


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o606, 0o620, 0o602, 0o777])
def test_a_key_that_others_may_use_is_refused(state, mode):
    made_key()
    state.chmod(mode)
    for read in (engine_key, made_key):
        with pytest.raises(CorruptFileError, match=rf"engine\.key: mode {mode:04o}, others may use it, expected 0600"):
            read()


@as_root
def test_a_key_of_another_user_is_refused(state):
    made_key()
    os.chown(state, OTHER, -1)
    for read in (engine_key, made_key):
        with pytest.raises(CorruptFileError, match=rf"owned by user {OTHER}, expected user 0, who runs this"):
            read()


@pytest.mark.parametrize(
    "content", [b"", b"0" * 63 + b"\n", b"0" * 65 + b"\n", b"x" * 64 + b"\n", b"0" * 10**6, b"\xff"]
)
def test_what_is_no_key_is_refused(state, content):
    made_key()
    state.write_bytes(content)
    with pytest.raises(CorruptFileError, match="no key of hcmen's, expected 64 hexadecimal digits: remove it"):
        engine_key()


@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "dangling"])
def test_what_is_no_file_is_refused(state, tmp_path, kind):
    made_key()
    if kind == "link":
        state.symlink_to(state.rename(tmp_path / "elsewhere"))
    else:
        state.unlink()
        {
            "folder": state.mkdir,
            "pipe": lambda: os.mkfifo(state, 0o600),
            "dangling": lambda: state.symlink_to(tmp_path / "none"),
        }[kind]()
    for read in (engine_key, made_key):
        with pytest.raises(CorruptFileError, match=r"a link|not a regular file"):
            read()
    assert not (tmp_path / "none").exists()


def test_a_home_that_cannot_be_written_is_told(monkeypatch):
    with open_folder() as folder:
        monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))
        with without_privileges():
            folder_mode = folder.stat().st_mode
            if os.geteuid() == os.stat(folder).st_uid:
                folder.chmod(0o555)
            assert engine_key() is None
            with pytest.raises(InputError, match=r"permission denied, and engines are signed.*set XDG_STATE_HOME to a"):
                made_key()
        folder.chmod(folder_mode)


def test_a_file_where_the_folder_should_be_is_told(state, tmp_path):
    (tmp_path / "state").write_text("")
    assert engine_key() is None
    with pytest.raises(InputError, match="set XDG_STATE_HOME to a folder of yours"):
        made_key()


def test_a_maker_that_dies_leaves_no_key(state, monkeypatch):
    def dying(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trust.os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        made_key()
    assert list(state.parent.iterdir()) == []


# --- libraries --------------------------------------------------------------------------------------------------------

VARIABLE = "HCMEN_CUDA_LIBRARY"


@pytest.fixture
def library(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "folder" / "lib.so"
    path.parent.mkdir()
    path.write_bytes(b"library")
    monkeypatch.setenv(VARIABLE, str(path))
    return path


def test_a_library_of_ones_own_is_taken(library):
    assert library_from_environment(VARIABLE, "build it") == library.resolve()
    assert cuda_library_path() == library.resolve()


@pytest.mark.parametrize("named", ["lib.so", "./lib.so", "../folder/lib.so", "~/lib.so"])
def test_a_relative_library_is_refused(library, monkeypatch, named):
    monkeypatch.chdir(library.parent)
    monkeypatch.setenv(VARIABLE, named)
    with pytest.raises(InputError, match=rf"{VARIABLE} is '{named}', expected an absolute path"):
        cuda_library_path()


def test_no_library_is_told(library, monkeypatch):
    library.unlink()
    with pytest.raises(BackendError, match=r"lib\.so', expected a file: build it with"):
        cuda_library_path()
    monkeypatch.setenv(VARIABLE, "")
    assert library_from_environment(VARIABLE, "") is None


@pytest.mark.parametrize("mode", [0o020, 0o002, 0o022])
@pytest.mark.parametrize("what", ["file", "folder", "above"])
def test_what_others_may_write_is_refused(library, what, mode):
    place = {"file": library, "folder": library.parent, "above": library.parent.parent}[what]
    place.chmod(place.stat().st_mode | mode)
    with pytest.raises(CorruptFileError, match=rf"{place} may be written by others .*chmod go-w {place}"):
        cuda_library_path()


def test_a_sticky_folder_serves(library):
    library.parent.chmod(0o1777)
    assert cuda_library_path() == library.resolve()


@as_root
@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_another_user_owns_is_refused(library, what):
    os.chown(library if what == "file" else library.parent, OTHER, -1)
    with pytest.raises(CorruptFileError, match=rf"is owned by user {OTHER}, expected user 0, who runs this, or root"):
        cuda_library_path()


@pytest.mark.parametrize("what", ["file", "folder"])
def test_links_are_followed_and_all_on_their_way_is_checked(library, tmp_path, monkeypatch, what):
    middle = tmp_path / "middle"
    middle.mkdir()
    if what == "file":
        (middle / "lib.so").symlink_to(Path("..") / "folder" / "lib.so")
        named = middle / "lib.so"
    else:
        (middle / "link").symlink_to(library.parent)
        named = middle / "link" / "lib.so"
    (tmp_path / "first").symlink_to(named)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "first"))
    assert cuda_library_path() == library.resolve()
    middle.chmod(0o777)
    with pytest.raises(CorruptFileError, match=rf"{middle} may be written by others"):
        cuda_library_path()


def test_links_without_end_are_refused(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(CorruptFileError, match="links without end"):
        check_nobody_else_writes(tmp_path / "a", VARIABLE)


def test_the_toolkit_that_a_variable_names_is_held_to_the_same(tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    from hcmen.mamba import ptx

    monkeypatch.setattr(ptx.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "lib64").mkdir()
    library = tmp_path / "lib64" / "libnvrtc.so.13"
    library.write_bytes(b"")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert next(ptx._nvrtc_candidates()) == str(library)
    library.chmod(0o666)
    with pytest.raises(CorruptFileError, match=r"CUDA_HOME is .*may be written by others"):
        list(ptx._nvrtc_candidates())
    monkeypatch.setenv("CUDA_HOME", os.path.relpath(tmp_path))
    with pytest.raises(InputError, match=r"CUDA_HOME is .*expected an absolute path"):
        list(ptx._nvrtc_candidates())
    shutil.rmtree(tmp_path / "lib64")
