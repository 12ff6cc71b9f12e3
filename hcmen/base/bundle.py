"""The bundle: the folder that export writes and a device runs from. Its manifest is read in manifest.py.

    manifest.json         what is in the bundle; everything else is read only because it is listed there
    weights.bin           the weights of all variants
    <variant>.onnx        one graph per variant
    golden/<variant>.npz  inputs with the eager model's outputs, so that a device checks itself
    tokenizer.json        words to token ids; only where the model has a text encoder

A bundle is not trusted. The manifest is read with every key, type and value checked (`Manifest.from_json`). A listed
file must be a regular file reached by plain names, through no symbolic link, of the listed size and sha256; `read`
hashes the very bytes it returns, so that nothing can change between the check and the use. Hard links are let be: a
content that has the listed sha256 is the listed content, and image-based systems store all their files as hard links.

Writing goes to a temporary sibling which is renamed when it is whole (`writing_bundle`), so that a killed or failed
export leaves no half bundle.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hcmen.base.errors import CorruptFileError, HcmenError, InputError
from hcmen.base.files import open_regular, read_small, writing_folder
from hcmen.base.manifest import NAME, Manifest, VariantRecord
from hcmen.base.modalities import variant_named
from hcmen.base.records import MANIFEST_FILE, MOST_MANIFEST_BYTES, FileRecord, check_file_name, parse_json
from hcmen.base.shipped import or_the_demo

__all__ = [
    "Bundle",
    "SharedFile",
    "file_record",
    "looks_like_bundle",
    "read_bundle",
    "write_manifest",
    "writing_bundle",
]

_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose manifest has been read and checked; no other file of it has been touched."""

    path: Path
    manifest: Manifest

    def variant(self, name: str) -> VariantRecord:
        """The record of the variant `name`.

        Raises:
            InputError: there is no such variant, or this bundle was exported without it.
        """
        variant_named(name)
        found = self.manifest.variants.get(name)
        if found is None:
            have = ", ".join(self.manifest.variants)
            raise InputError(f"{self.path}: variant '{name}' is not in this bundle, it has {have}: export it too")
        return found

    def read(self, record: FileRecord) -> NDArray[np.uint8]:
        """The verified content of a listed file, as read-only bytes [record.bytes] in memory of our own.

        Raises:
            CorruptFileError: missing, a link, not a regular file, or not of the listed size and sha256.
        """
        content = self._verify(record, keep=True)
        content.flags.writeable = False
        return content

    def file(self, record: FileRecord) -> Path:
        """The path of a listed file, verified; for tools that take paths alone, as the file can change afterwards.

        Raises:
            CorruptFileError: missing, a link, not a regular file, or not of the listed size and sha256.
        """
        self._verify(record, keep=False)
        return self.path / record.file

    def others_may_write(self, record: FileRecord) -> bool:
        """Whether somebody but this user and root may change the file, or put another one in its place.

        Raises:
            CorruptFileError: missing, a link, or not a regular file.
        """
        with _opened_beneath(self.path, record.file) as descriptor:
            places = [os.fstat(descriptor), *map(os.stat, {self.path, (self.path / record.file).parent})]
        return any(p.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or p.st_uid not in (0, os.geteuid()) for p in places)

    def read_index(self, name: str) -> bytes | None:
        """The content of a small file that no manifest lists, since it is made on the device; None if it is not there.

        Raises:
            InputError: it may not be read.
            CorruptFileError: a link, or not a regular file.
        """
        try:
            with _opened_beneath(self.path, name) as descriptor, os.fdopen(os.dup(descriptor), "rb") as file:
                return file.read(MOST_MANIFEST_BYTES + 1)
        except _MissingFile:
            return None

    def verify(self) -> None:
        """Verifies every file that the manifest lists; raises CorruptFileError at the first that is not as listed."""
        for record in self.records():
            self.file(record)

    def records(self) -> list[FileRecord]:
        """All files that the manifest lists, the weights first."""
        variants = self.manifest.variants.values()
        tokenizer = [self.manifest.tokenizer] if self.manifest.tokenizer else []
        return [self.manifest.weights, *tokenizer, *(v.graph for v in variants), *(v.golden for v in variants)]

    def _verify(self, record: FileRecord, *, keep: bool) -> NDArray[np.uint8]:
        """Reads and hashes a listed file; returns its content with `keep`, else an empty array."""
        where = self.path / record.file
        check_file_name(record.file)
        with _opened_beneath(self.path, record.file) as descriptor:
            size = os.fstat(descriptor).st_size
            if size != record.bytes:
                raise CorruptFileError(
                    f"{size} bytes, the manifest says {record.bytes}",
                    fix="copy or export the bundle again",
                    where=str(where),
                )
            digest = hashlib.sha256()
            content = np.empty(size if keep else min(size, _READ_BYTES), np.uint8)
            done = 0
            while done < size:
                start = done if keep else 0
                part = content.data[start : start + min(_READ_BYTES, size - done)]
                count = os.readv(descriptor, [part])
                if count == 0:
                    raise CorruptFileError(
                        f"ended after {done} of {size} bytes", fix="copy the bundle again", where=str(where)
                    )
                digest.update(part[:count])
                done += count
        if digest.hexdigest() != record.sha256:
            raise CorruptFileError(
                f"sha256 {digest.hexdigest()[:12]}..., the manifest says {record.sha256[:12]}...",
                fix="the file was altered or damaged, copy or export the bundle again",
                where=str(where),
            )
        return content if keep else content[:0]


class SharedFile:
    """A listed file that others open by its path once it is verified, such as ONNX Runtime, which maps it.

    Between hashing and opening the file could change. `held` sees that it did not: device, inode, size and both times
    of the file are those of the hashed one before and after. (Who may write the file can still change what is mapped,
    as with a program's own libraries. An export never does, it puts another file in the place.)

    Several threads may hold it at once.
    """

    def __init__(self, bundle: Bundle, record: FileRecord) -> None:
        self.bundle, self.record = bundle, record
        self._hashed: tuple[int, ...] | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator[Path]:
        """The absolute folder of the bundle, in which the file is the verified one while the block runs.

        Raises:
            CorruptFileError: missing, a link, not of the listed size and sha256, or changed meanwhile.
        """
        before = self._identity()
        if before != self._hashed:
            self.bundle.file(self.record)
            self._unchanged(before)
            self._hashed = before
        yield self.bundle.path.absolute()
        self._unchanged(before)

    def _identity(self) -> tuple[int, ...]:
        with _opened_beneath(self.bundle.path, self.record.file) as descriptor:
            found = os.fstat(descriptor)
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def _unchanged(self, before: tuple[int, ...]) -> None:
        if self._identity() != before:
            raise CorruptFileError(
                f"{self.bundle.path / self.record.file}: changed while it was being loaded: load the bundle again"
            )


def read_bundle(path: str | os.PathLike[str]) -> Bundle:
    """The bundle in the folder `path`: its manifest is read and checked, nothing else is opened.

    Raises:
        InputError: no such folder, no manifest in it, it may not be read, or its schema is of another version.
        BackendError: its graphs need another version of the ops.
        CorruptFileError: the manifest is damaged, altered or unsafe.
    """
    root = Path(path)
    if not root.is_dir():
        what = "not a folder" if root.exists() else "no such folder"
        raise InputError(
            f"{root}: {what}, expected a bundle: make one with hcmen-export --bundle {root}{or_the_demo(root)}"
        )
    try:
        with _opened_beneath(root, MANIFEST_FILE) as descriptor, os.fdopen(os.dup(descriptor), "rb") as file:
            content = file.read(MOST_MANIFEST_BYTES + 1)
    except _MissingFile as error:
        raise InputError(
            f"{root}: no {MANIFEST_FILE} in it, expected a bundle: make one with hcmen-export --bundle {root}"
            f"{or_the_demo(root)}"
        ) from error
    where = root / MANIFEST_FILE
    try:
        return Bundle(root, Manifest.from_json(parse_json(content)))
    except HcmenError as error:
        raise error.but(where=str(where)) from error


def file_record(path: str | os.PathLike[str], root: str | os.PathLike[str]) -> FileRecord:
    """The record of the file `path`, which lies inside the folder `root`, as it is now.

    Raises:
        InputError: it lies outside `root` or under a name that a manifest cannot hold.
        OSError: it cannot be read.
    """
    try:
        name = Path(path).resolve().relative_to(Path(root).resolve()).as_posix()
    except ValueError as error:
        raise InputError(f"{path} is not inside {root}, expected a file of the bundle") from error
    digest, size = hashlib.sha256(), 0
    with open_regular(path) as file:
        most = os.fstat(file.fileno()).st_size  # a file that grows meanwhile need not end
        while part := file.read(min(_READ_BYTES, most - size)):
            digest.update(part)
            size += len(part)
    record = FileRecord(name, digest.hexdigest(), size)
    try:
        check_file_name(name)
    except CorruptFileError as error:
        raise InputError(str(error)) from error
    return record


def write_manifest(folder: str | os.PathLike[str], manifest: Manifest) -> Path:
    """Writes manifest.json into `folder`, after checking that `read_bundle` will take it.

    Raises:
        CorruptFileError: the manifest would be refused when read, for the reason given.
        OSError: it cannot be written.
    """
    text = json.dumps(_plain(manifest.to_json()), indent=1, allow_nan=False)
    Manifest.from_json(parse_json(text.encode()))
    path = Path(folder) / MANIFEST_FILE
    path.write_text(text + "\n", encoding="ascii")
    return path


@contextlib.contextmanager
def writing_bundle(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Gives an empty folder to write a bundle into, and puts it at `path` when the block ends well.

    At the end it is verified as a reader would, and an older bundle at `path` is replaced then and not before. When the
    block raises, `path` is as it was (`files.writing_folder`).

    Args:
        path: where the bundle shall be. A bundle or an empty folder there is replaced.
        force: replace a folder that is no bundle, too.

    Raises:
        InputError: something else is at `path`.
        CorruptFileError: what was written would be refused when read.
        OSError: the place cannot be written.
    """
    with writing_folder(
        path, check=lambda target: _check_replaceable(target, force), verify=lambda made: read_bundle(made).verify()
    ) as folder:
        yield folder


def _plain(value: Any) -> Any:
    """`value` with NumPy numbers and mappings of any kind as JSON has them."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return _plain(value.tolist())
    return value


# --- files ----------------------------------------------------------------------------------------------------------


class _MissingFile(CorruptFileError):
    """A file that should be in the bundle is not."""


@contextlib.contextmanager
def _opened_beneath(root: Path, name: str) -> Iterator[int]:
    """A descriptor of the regular file `name` below `root`, each part of it opened without following links."""
    where = root / name
    folders: list[int] = []
    try:
        try:
            folders.append(os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            *parents, last = PurePosixPath(name).parts
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            for part in parents:
                folders.append(os.open(part, flags | os.O_DIRECTORY, dir_fd=folders[-1]))
            folders.append(os.open(last, flags | os.O_NONBLOCK, dir_fd=folders[-1]))
        except OSError as error:
            raise _open_error(where, error) from error
        if not stat.S_ISREG(os.fstat(folders[-1]).st_mode):
            raise CorruptFileError("not a regular file", "one", "copy or export the bundle again", where=str(where))
        yield folders[-1]
    finally:
        for descriptor in folders:
            os.close(descriptor)


def _open_error(where: Path, error: OSError) -> HcmenError:
    if error.errno == errno.ENOENT:
        return _MissingFile("missing from the bundle", fix="copy or export the bundle again", where=str(where))
    if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENOTDIR):
        return CorruptFileError("a link", "a regular file", "copy the bundle with its files in it", where=str(where))
    if error.errno in (errno.EACCES, errno.EPERM):
        return InputError("permission denied", fix="check its owner and permissions", where=str(where))
    reason = (error.strerror or "cannot be opened").lower()
    return CorruptFileError(reason, fix="copy the bundle again", where=str(where))


def _check_replaceable(target: Path, force: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target}: a file is there, expected a folder for the bundle: choose another place")
    if not any(target.iterdir()) or looks_like_bundle(target):
        return
    here = Path.cwd()
    if target == here or target in here.parents or target == Path.home():
        raise InputError(f"{target}: this folder is in use and no bundle: choose another place")
    if not force:
        raise InputError(f"{target}: a folder that is no bundle: choose another place, or replace it (--force)")


def looks_like_bundle(folder: Path) -> bool:
    """Whether `folder` was written by us, of whatever schema and state; only then is it replaced unasked."""
    try:
        data = parse_json(read_small(folder / MANIFEST_FILE, MOST_MANIFEST_BYTES))
    except (OSError, CorruptFileError):
        return False
    return isinstance(data, dict) and data.get("name") == NAME and "schema_version" in data and "variants" in data
