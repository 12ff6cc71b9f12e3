"""hcmen/base/files.py: whole or not at all, whatever happens; leftovers are known by their lock; readers never wait."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.processes import open_files

from hcmen.base import files
from hcmen.base.errors import InputError
from hcmen.base.files import (
    check_writable,
    open_regular,
    read_small,
    refused,
    replace_folder,
    sweep,
    write_file,
    write_files,
    writing_file,
    writing_folder,
)


def tree(folder: Path) -> dict[str, str | None]:
    """Everything below `folder`, folders as None."""
    return {str(p.relative_to(folder)): None if p.is_dir() else p.read_text() for p in sorted(folder.rglob("*"))}


def write_a_file(target: Path, content: str) -> None:
    with writing_file(target) as file:
        file.write(content.encode())


def write_a_folder(target: Path, content: str) -> None:
    with writing_folder(target) as folder:
        (folder / "part").write_text(content)


WRITERS: dict[str, Callable[[Path, str], None]] = {
    "file": write_a_file,
    "files": lambda target, content: write_files(target.parent, {target.name: content.encode()}),
    "folder": write_a_folder,
}


@pytest.fixture(params=WRITERS)
def write(request: pytest.FixtureRequest) -> Callable[[Path, str], None]:
    return WRITERS[request.param]


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that cannot exchange two names in one step."""
    monkeypatch.setattr(files, "_exchanged", lambda one, other: False)


@pytest.fixture(params=["exchange", "two renames"])
def either_way(request: pytest.FixtureRequest) -> None:
    if request.param == "two renames":
        request.getfixturevalue("no_exchange")


def test_the_old_is_replaced_by_the_new_and_nothing_is_left(
    tmp_path: Path, write: Callable[[Path, str], None], either_way: None
) -> None:
    for content in ("old", "new"):
        write(tmp_path / "x", content)
        assert tree(tmp_path) in ({"x": content}, {"x": None, "x/part": content})


@pytest.mark.parametrize("name", ["fsync", "replace", "rename"])
def test_a_failure_leaves_the_old_and_nothing_else(
    tmp_path: Path, write: Callable[[Path, str], None], name: str, either_way: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "x", "old")
    before = tree(tmp_path)
    genuine = getattr(os, name)

    def fails(*arguments: object) -> None:
        # Moving aside and back is not what fails.
        if name == "fsync" or ".tmp-" in str(arguments[0]):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        genuine(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fails)
        # A file is put in its place by one of these, a folder by the other.
        if name == ("rename" if (tmp_path / "x").is_file() else "replace"):
            write(tmp_path / "x", "new")
        else:
            with pytest.raises(OSError, match="Input/output"):
                write(tmp_path / "x", "new")
            assert tree(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_an_error_of_the_writer_leaves_the_old(tmp_path: Path) -> None:
    write_a_file(tmp_path / "x", "old")
    write_a_folder(tmp_path / "y", "old")
    before = tree(tmp_path)
    with pytest.raises(TypeError), writing_file(tmp_path / "x") as file:
        file.write("half")  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt), writing_folder(tmp_path / "y") as folder:
        os.kill(os.getpid(), (folder / "half").touch() or signal.SIGINT)
    assert tree(tmp_path) == before


def test_a_name_that_cannot_be_guessed_and_no_link_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link planted under the next temporary name is not written through: another name is taken."""
    names = iter([b"\1\1\1\1", b"\2\2\2\2", b"\1\1\1\1", b"\3\3\3\3"])
    monkeypatch.setattr(os, "urandom", lambda count: next(names))
    (tmp_path / "precious").write_text("kept")
    (tmp_path / ".x.tmp-01010101").symlink_to(tmp_path / "precious")
    write_file(tmp_path / "x", b"new")
    write_a_folder(tmp_path / "x2", "new")
    assert (tmp_path / "precious").read_text() == "kept"
    assert (tmp_path / "x").read_text() == "new"


def test_a_file_that_is_a_link_is_replaced_and_a_folder_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("kept")
    (tmp_path / "x").symlink_to("real")
    write_file(tmp_path / "x", b"new")
    assert not (tmp_path / "x").is_symlink()
    write_a_folder(tmp_path / "folder", "old")
    (tmp_path / "y").symlink_to("folder")
    write_a_folder(tmp_path / "y", "new")
    assert (tmp_path / "y").is_symlink()
    assert (tmp_path / "real").read_text() == "kept"
    assert (tmp_path / "folder" / "part").read_text() == "new"


def test_a_reader_sees_a_folder_at_every_moment(tmp_path: Path) -> None:
    """With the system's exchange; with two renames there is a moment without."""
    if sys.platform != "linux":
        pytest.skip("renameat2 is Linux's")
    write_a_folder(tmp_path / "x", "0")
    if not files._exchanged(tmp_path / "x", tmp_path / "x"):
        pytest.skip("this file system cannot exchange")
    missing, done = [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            missing.extend([1] * (not (tmp_path / "x" / "part").exists()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for i in range(200):
            (tmp_path / "new").mkdir()
            (tmp_path / "new" / "part").write_text(str(i))
            replace_folder(tmp_path / "new", tmp_path / "x")
    finally:
        done.set()
        watcher.join()
    assert not missing
    assert tree(tmp_path) == {"x": None, "x/part": "199"}


def test_files_are_renamed_when_all_are_written(tmp_path: Path) -> None:
    write_files(tmp_path, {"a": b"old", "b": b"old"})
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="folder is a folder"):
        write_files(tmp_path, {"a": b"new", "folder": b"new"})
    assert tree(tmp_path) == {"a": "old", "b": "old", "folder": None}


# --- leftovers --------------------------------------------------------------------------------------------------------

KILLED = """
    import os, signal, sys
    from pathlib import Path
    from hcmen.base.files import writing_file, writing_folder
    target = Path(sys.argv[1])
    with writing_file(target / "a") as file, writing_folder(target / "b") as folder:
        file.write(b"half")
        (folder / "part").write_text("half")
        print("writing", flush=True)
        sys.stdin.read()
"""


def test_leftovers_go_when_their_writer_has_gone_and_not_before(tmp_path: Path) -> None:
    """Whatever number the writer has: the lock tells, not the process's number."""
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"writing\n"
    written = tree(tmp_path)
    assert len(written) == 3
    sweep(tmp_path)
    sweep(tmp_path, "a")
    assert tree(tmp_path) == written
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    sweep(tmp_path, "other")
    assert tree(tmp_path) == written
    sweep(tmp_path, "a")
    assert len(tree(tmp_path)) == 2
    sweep(tmp_path)
    assert tree(tmp_path) == {}


def test_every_writer_removes_what_killed_ones_left_of_its_name(
    tmp_path: Path, write: Callable[[Path, str], None]
) -> None:
    for name in (".x.tmp-01234567", ".x.tmp-89abcdef", ".y.tmp-01234567"):
        (tmp_path / name).write_text("half")
    write(tmp_path / "x", "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".y.tmp-01234567", "x"]


def test_a_writer_leaves_what_a_living_one_of_the_same_name_has(tmp_path: Path) -> None:
    with writing_file(tmp_path / "x") as file:
        (mine,) = tmp_path.iterdir()
        write_file(tmp_path / "x", b"another's")
        assert mine.exists()
        file.write(b"mine")
    assert tree(tmp_path) == {"x": "mine"}


def test_a_folder_that_many_files_are_written_to_is_seldom_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock of the test's: listing takes 0.1 s and writing 0.5 s, so it is listed every 10 s."""
    clock, listed, genuine = [0.0], [], os.listdir

    def listing(folder: Path) -> list[str]:
        clock[0] += 0.1
        listed.append(folder)
        return genuine(folder)

    monkeypatch.setattr(files.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(files.os, "listdir", listing)
    for i in range(100):
        write_file(tmp_path / str(i), b"")
        clock[0] += 0.5
        if i == 50:
            (tmp_path / ".99.tmp-01234567").touch()
    assert len(listed) == 5
    assert not (tmp_path / ".99.tmp-01234567").exists()


def test_a_file_may_be_for_its_user_alone(tmp_path: Path) -> None:
    write_file(tmp_path / "key", b"secret", mode=0o600)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    write_file(tmp_path / "x", b"")
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


def test_names_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    for name in (".b.tmp-x", ".b.tmp-1234567g", ".b.tmp-123", "b.tmp-01234567", ".tmp-01234567", ".b.01234567"):
        (tmp_path / name).mkdir()
    before = tree(tmp_path)
    sweep(tmp_path)
    assert tree(tmp_path) == before
    sweep(tmp_path / "nowhere")


def test_a_folder_caught_between_two_renames_is_put_back(tmp_path: Path) -> None:
    write_a_folder(tmp_path / "b", "kept")
    (tmp_path / "b").rename(tmp_path / ".b.old-01234567")
    sweep(tmp_path, "b")
    assert tree(tmp_path) == {"b": None, "b/part": "kept"}
    (tmp_path / ".b.old-01234567").mkdir()
    sweep(tmp_path, "b")
    assert tree(tmp_path) == {"b": None, "b/part": "kept"}


def test_a_sweep_between_making_and_locking_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The neighbour is made, another process sweeps it, then it is locked: another is made."""
    genuine, swept = files._locked, []

    def late(descriptor: int) -> bool:
        if not swept:
            swept.append(1)
            sweep(tmp_path)
            assert tree(tmp_path) == {}
        return genuine(descriptor)

    monkeypatch.setattr(files, "_locked", late)
    for write in (write_a_file, write_a_folder):
        swept.clear()
        write(tmp_path / "x", "new")
        assert (tmp_path / "x").exists()
        (tmp_path / "x").rename(tmp_path.parent / f"{tmp_path.name}.{write.__name__}")


def test_a_file_system_without_locks_is_written_and_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", none)
    (tmp_path / ".x.tmp-01234567").mkdir()
    write_a_folder(tmp_path / "x", "new")
    assert tree(tmp_path) == {".x.tmp-01234567": None, "x": None, "x/part": "new"}


# --- reading ----------------------------------------------------------------------------------------------------------


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, number in (
        (tmp_path / "pipe", errno.EINVAL),
        (Path("/dev/zero"), errno.EINVAL),
        (tmp_path, errno.EISDIR),
    ):
        for read in (open_regular, read_small):
            before = open_files()
            with pytest.raises(OSError) as told:
                read(path)
            assert (told.value.errno, told.value.filename) == (number, str(path))
            assert open_files() == before


def test_small_files_are_read_up_to_the_most(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(1000))
    (tmp_path / "link").symlink_to("x")
    assert read_small(tmp_path / "link", 1000) == bytes(1000)
    with pytest.raises(OSError, match="more than 999 bytes") as told:
        read_small(tmp_path / "x", 999)
    assert told.value.errno == errno.EFBIG
    # Files of the kernel's, which say that they have no bytes.
    assert read_small("/proc/self/status").startswith(b"Name:")
    with pytest.raises(OSError, match="more than 10 bytes"):
        read_small("/proc/self/status", 10)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_an_error_of_the_system_gets_the_parts_of_ours() -> None:
    with pytest.raises(InputError) as told, refused("here", "a folder", "choose another", note="2 bytes"):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    assert str(told.value) == "here: permission denied, 2 bytes, expected a folder: choose another"
    with pytest.raises(InputError) as told, refused("here", fix="choose another"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (told.value.where, told.value.what) == ("here", "no space left on device")
    assert told.value.fix == "make room, or choose another"
    with pytest.raises(InputError, match="here: the disk burns"), refused("here"):
        raise OSError("the disk burns")


def test_a_place_is_tried_before_the_work(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder")
    assert tree(tmp_path) == {"new": None, "new/folder": None}
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        check_writable(tmp_path / "file")
