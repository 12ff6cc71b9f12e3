"""The bundle: the folder that export writes and a device runs from. Its manifest is read in manifest.py.

    manifest.json         what is in the bundle; everything else is read only because it is listed there
    weights.bin           the weights of all variants
    <variant>.onnx        one graph per variant
    golden/<variant>.npz  inputs with the eager model's outputs, so that a device checks itself
    tokenizer.json        words to token ids; only where the model has a text encoder

A bundle is not trusted. The manifest is read with every key, type and value checked (`Manifest.from_json`). A listed
file must be a regular file of the listed size and sha256, under a plain name; `read` hashes the very bytes it returns,
so that nothing can change between the check and the use.

Links are followed, symbolic and hard ones, from the manifest, from listed files and from the folders they lie in, as
caches and mounts are made of them: content that has the listed sha256 is the listed content, wherever it lies. What a
link leads to is looked at before it is opened, since opening a device may do things, or wait. Nothing is written
through a link: a bundle is replaced whole, and `Bundle.read_index` follows none.

Writing goes to a temporary sibling which is renamed when it is whole (`writing_bundle`), so that a killed or failed
export leaves no half bundle. A reader holds the folder that it read the manifest from, and opens all files beneath it.
Where an export puts another bundle in its place, the reader has the whole of the older one until it ends
(`files.HeldFolder`). Other ways to exchange files (a ConfigMap's links, a file system without locks) are seen as
files that are not as listed: `Bundle.successor` then is what to begin again with.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hcmen.base.errors import CorruptFileError, HcmenError, InputError
from hcmen.base.files import HeldFolder, open_regular, read_small, write_file, writing_folder
from hcmen.base.manifest import NAME, Manifest, VariantRecord
from hcmen.base.modalities import variant_named
from hcmen.base.records import MANIFEST, MANIFEST_FILE, MOST_MANIFEST_BYTES, FileRecord, check_file_name, parse_json
from hcmen.base.shipped import or_the_demo
from hcmen.base.trust import check_nobody_else_writes
from hcmen.base.typed import as_typed, from_here

__all__ = [
    "CHECKPOINT_FILE",
    "Bundle",
    "begun_again",
    "check_no_bundle",
    "file_record",
    "identity",
    "looks_like_bundle",
    "read_bundle",
    "write_manifest",
    "writing_bundle",
]

CHECKPOINT_FILE = "checkpoint.safetensors"
"""What tells the folders that hcmen-train writes."""
_READ_BYTES = 1 << 20
_OF_A_MANIFEST = {"op", "variants", "weights"}
"""A manifest.json without any of these keys is none of ours that was damaged."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose manifest has been read and checked; no other file of it has been touched.

    folder: the one that the manifest was read from, held; without it each file is opened by its path.
    """

    path: Path
    manifest: Manifest
    folder: HeldFolder | None = field(default=None, repr=False, compare=False)

    def variant(self, name: str) -> VariantRecord:
        """The record of the variant `name`.

        Raises:
            InputError: there is no such variant, or this bundle was exported without it.
        """
        variant_named(name)
        found = self.manifest.variants.get(name)
        if found is None:
            have = ", ".join(self.manifest.variants)
            raise InputError(
                f"variant '{name}' is not in this bundle, it has {have}",
                fix=f"export it too: {as_typed('hcmen-export', '--variant', name, '--bundle', from_here(self.path))}",
                where=str(self.path),
            )
        return found

    def read(self, record: FileRecord) -> NDArray[np.uint8]:
        """The verified content of a listed file, as read-only bytes [record.bytes] in memory of our own.

        Raises:
            CorruptFileError: missing, not a regular file, or not of the listed size and sha256.
        """
        content, _ = self.verified(record, keep=True)
        content.flags.writeable = False
        return content

    def file(self, record: FileRecord) -> Path:
        """The path of a listed file, verified; for tools that take paths alone, as the file can change afterwards.

        Raises:
            CorruptFileError: missing, not a regular file, or not of the listed size and sha256.
        """
        self.verified(record, keep=False)
        return self.path / record.file

    def others_may_write(self, record: FileRecord) -> bool:
        """Whether somebody but this user and root may change the file, or put another one in its place.

        All that lies on the way to it is judged: links, what they lead through, and folders. What cannot be looked at
        counts as theirs.
        """
        try:
            check_nobody_else_writes(self.place() / record.file, "")
        except HcmenError:
            return True
        return False

    def read_index(self, name: str) -> bytes | None:
        """The content of a small file that no manifest lists, since it is made on the device; None if it is not there.

        It says which native code may run, and no digest vouches for it. hcmen writes a file here, never a link, so that
        a link was put here by somebody else: none is followed, neither to the file nor to its folder.

        Raises:
            InputError: it may not be read.
            CorruptFileError: a link, or not a regular file.
        """
        try:
            with self.opened(name, links=False) as file:
                return _content(file)
        except _MissingFile:
            return None

    def read_manifest(self) -> bytes:
        """The content of manifest.json as it is now.

        Raises:
            InputError: it may not be read.
            CorruptFileError: missing, or not a regular file.
        """
        with self.opened(MANIFEST_FILE) as file:
            return _content(file)

    def successor(self) -> Bundle | None:
        """The bundle at the same path now; None where it is this one, or none that can be read."""
        try:
            found = read_bundle(self.path)
        except HcmenError:
            return None
        return None if found.manifest == self.manifest and self.is_in_place() else found

    def is_in_place(self) -> bool:
        """Whether this bundle's folder is still the one at its path."""
        if self.folder is None or self.folder.descriptor is None:
            return True
        with contextlib.suppress(OSError):
            return self.folder.is_at(self.path)
        return False

    def let_go(self) -> None:
        """Holds the folder no longer: what replaces it may remove it. Files are opened by their paths from here on."""
        if self.folder is not None:
            self.folder.close()

    def verify(self) -> None:
        """Verifies every file that the manifest lists; raises CorruptFileError at the first that is not as listed."""
        for record in self.records():
            self.file(record)

    def records(self) -> list[FileRecord]:
        """All files that the manifest lists, the weights first."""
        variants = self.manifest.variants.values()
        tokenizer = [self.manifest.tokenizer] if self.manifest.tokenizer else []
        return [self.manifest.weights, *tokenizer, *(v.graph for v in variants), *(v.golden for v in variants)]

    def verified(self, record: FileRecord, *, keep: bool) -> tuple[NDArray[np.uint8], tuple[int, ...]]:
        """Reads and hashes a listed file; its content with `keep`, else an empty array; which file it was."""
        where = self.path / record.file
        check_file_name(record.file)
        with self.opened(record.file) as file:
            found = os.fstat(file.fileno())
            size = found.st_size
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
                count = os.readv(file.fileno(), [part])
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
        return content if keep else content[:0], identity(found)

    def opened(self, name: str, *, links: bool = True) -> contextlib.AbstractContextManager[IO[bytes]]:
        """The file `name` of the bundle, open for reading, whether or not it is as listed."""
        return _opened_beneath(self.path, name, self.folder, links=links)

    def place(self) -> Path:
        """Where this bundle lies by now: what was replaced while it was held has another name."""
        if self.folder is not None and not self.is_in_place():
            with contextlib.suppress(OSError):
                return Path(os.readlink(f"/proc/self/fd/{self.folder.descriptor}"))
        return self.path.absolute()


def identity(found: os.stat_result) -> tuple[int, ...]:
    """What tells one content of one file from another: device, inode, size and both times."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def read_bundle(path: str | os.PathLike[str]) -> Bundle:
    """The bundle in the folder `path`: its manifest is read and checked, nothing else is opened.

    Raises:
        InputError: no such folder, no manifest in it, it may not be read, or its schema is of another version.
        BackendError: its graphs need another version of the ops.
        CorruptFileError: the manifest is damaged, altered or unsafe.
    """
    root = Path(path)
    try:
        folder = HeldFolder(root)
    except OSError as error:
        if root.is_dir():
            raise _open_error(root, error, True) from error
        what = "not a folder" if root.exists() else "no such folder"
        raise _no_bundle(root, what) from error
    try:
        with _opened_beneath(root, MANIFEST_FILE, folder) as file:
            content = _content(file)
    except _MissingFile as error:
        raise _no_bundle(root, f"no {MANIFEST_FILE} in it") from error
    where = root / MANIFEST_FILE
    try:
        data = parse_json(content, MANIFEST)
        if isinstance(data, dict) and data and _OF_A_MANIFEST.isdisjoint(data):
            raise _no_bundle(root, f"its {MANIFEST_FILE} is something else's")
        return Bundle(root, Manifest.from_json(data), folder)
    except CorruptFileError as error:
        raise error.but(where=str(where)) from error
    except HcmenError as error:
        raise error.but(where=error.where or str(where)) from error


def check_no_bundle(folder: Path, expected: str, fix: str) -> None:
    """Raises InputError if `folder` is a bundle where something else, `expected`, is wanted; `fix` is what helps."""
    if looks_like_bundle(folder):
        raise InputError("a bundle", expected, fix, where=str(folder))


def _no_bundle(place: Path, what: str) -> InputError:
    """The error for what was named as a bundle and is none: what helps depends on what it is."""
    folder = place if place.is_dir() else place.parent
    fix = "name the folder that hcmen-export wrote"
    if (folder / CHECKPOINT_FILE).is_file():
        what = "a checkpoint folder" if folder == place else "a file of a checkpoint folder"
        made = as_typed("hcmen-export", "--checkpoint", folder, "--bundle", "OTHER")
        fix = f"make a bundle of it with {made}, and name that"
    elif folder != place and looks_like_bundle(folder):
        fix = f"name the folder itself, {folder}"
    elif looks_like_bundle(place.absolute().parent) and folder == place:
        what, fix = "a part of a bundle", f"name the whole, {place.parent}"
    elif not place.exists() or (folder == place and not any(place.iterdir())):
        fix = f"make one with {as_typed('hcmen-export', '--bundle', place)}{or_the_demo(place)}"
    return InputError(what, "a bundle", fix, where=str(place))


def begun_again(
    bundle: Bundle, work: Callable[[Bundle], Result], may_follow: Callable[[Bundle], bool] = lambda _: True
) -> Result:
    """`work(bundle)`; once more with its successor, where a file was not as listed since the bundle was replaced.

    may_follow: whether the work can begin with the successor.

    Raises:
        InputError: the bundle was replaced, and the work cannot begin with the other one.
        HcmenError: what `work` raises.
    """
    try:
        return work(bundle)
    except CorruptFileError as error:
        found = bundle.successor()
        if found is None:
            raise
        if not may_follow(found):
            what = "another export was put there while this one was in use"
            raise InputError(what, fix="load it again", where=str(bundle.path)) from error
    return work(found)


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
    Manifest.from_json(parse_json(text.encode(), MANIFEST))
    path = Path(folder) / MANIFEST_FILE
    write_file(path, text.encode("ascii") + b"\n")
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
def _opened_beneath(root: Path, name: str, held: HeldFolder | None, *, links: bool = True) -> Iterator[IO[bytes]]:
    """The regular file `name` below `root`, open for reading; what goes wrong with it in the block is told here.

    held: `root`, where it is held. links: whether those on the way from `root` are followed.
    """
    where = root / name
    *parents, last = (name,) if links else PurePosixPath(name).parts
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        with contextlib.ExitStack() as stack:
            folder = None if held is None else held.descriptor
            if folder is None:
                folder = os.open(root, flags)
                stack.callback(os.close, folder)
            for part in parents:
                folder = os.open(part, flags | os.O_NOFOLLOW, dir_fd=folder)
                stack.callback(os.close, folder)
            yield stack.enter_context(open_regular(last, folder=folder, links=links))
    except OSError as error:
        raise _open_error(where, error, links) from error


def _content(file: IO[bytes]) -> bytes:
    """The content of a JSON file, cut behind the most that `parse_json` takes."""
    # No more than it says that it has: files of the kernel's say that they have nothing, and some never end.
    return file.read(min(os.fstat(file.fileno()).st_size, MOST_MANIFEST_BYTES + 1)) or b""


def _open_error(where: Path, error: OSError, links: bool) -> HcmenError:
    again = "copy or export the bundle again"
    if error.errno in (errno.ENOENT, errno.ENOTDIR) and links:
        if where.is_symlink():
            return CorruptFileError("missing, a link to what is not there", "a file", again, where=str(where))
        return _MissingFile("missing from the bundle", fix=again, where=str(where))
    if error.errno == errno.ENOENT:
        return _MissingFile("missing", where=str(where))
    if error.errno == errno.ELOOP and links:
        return CorruptFileError("links without end", "a file", again, where=str(where))
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return CorruptFileError("a link", "a regular file", again, where=str(where))
    if error.errno in (errno.EACCES, errno.EPERM):
        return InputError("permission denied", fix="check its owner and permissions", where=str(where))
    if error.errno in (errno.EINVAL, errno.EISDIR):
        return CorruptFileError("not a regular file", "one", again, where=str(where))
    reason = (error.strerror or "cannot be opened").lower()
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return InputError(reason, fix="the bundle is not the cause: close files or end programs here", where=str(where))
    return CorruptFileError(reason, fix="copy the bundle again", where=str(where))


def _check_replaceable(target: Path, force: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target}: a file is there, expected a folder for the bundle: choose another place")
    if not any(target.iterdir()) or looks_like_bundle(target):
        return
    if (target / CHECKPOINT_FILE).exists():
        raise InputError("a checkpoint folder", "a place for the bundle", "choose another", where=from_here(target))
    here = Path.cwd()
    if target == here or target in here.parents or target == Path.home():
        raise InputError(f"{target}: this folder is in use and no bundle: choose another place")
    if not force:
        raise InputError(f"{target}: a folder that is no bundle: choose another place, or replace it (--force)")


def looks_like_bundle(folder: Path) -> bool:
    """Whether `folder` was written by us, of whatever schema and state; only then is it replaced unasked."""
    try:
        data = parse_json(read_small(folder / MANIFEST_FILE, MOST_MANIFEST_BYTES), MANIFEST)
    except (OSError, CorruptFileError):
        return False
    return isinstance(data, dict) and data.get("name") == NAME and "schema_version" in data and "variants" in data
