"""A trained model by its folder, its archive, its URL, its name or its repository: `hcmen.models.load`.

Every way ends at the checkpoint folder that hcmen-train wrote, config.json and checkpoint.safetensors. Neither is a
pickle, and no code comes with them.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from hcmen.base.bundle import CHECKPOINT_FILE, looks_like_bundle
from hcmen.base.errors import BackendError, CorruptFileError, HcmenError, InputError, reason_of, shown, unknown_name
from hcmen.base.files import open_regular, refused
from hcmen.base.shipped import DEMO
from hcmen.models.loading_archive import AGAIN, CONFIG_FILE, unpack
from hcmen.models.loading_url import download

if TYPE_CHECKING:
    from torch import nn

__all__ = ["load"]

_SHIPPED = {"demo": DEMO / "train"}
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([\w./-]{1,200}))?\Z", re.ASCII)
_PART = 1 << 20


def load(
    source: str | os.PathLike[str],
    *,
    sha256: str | None = None,
    most_bytes: int = 2 << 30,
    time_limit: float = 3600.0,
) -> nn.Module:
    """The trained model of `source`, of PyTorch, in eval mode. Its `config` says what it takes and gives.

    Args:
        source: in this order, what it is:
            an https URL of an archive; `sha256` is then demanded, and the file kept in the user's cache;
            a folder that hcmen-train wrote, or a zip, tar or tar.gz of one;
            "owner/name" or "owner/name@revision", a repository of the Hugging Face Hub that holds such a folder's two
            files; it is got and cached by huggingface_hub, and a commit as revision pins it;
            a name of what comes with hcmen: "demo".
        sha256: 64 hexadecimal digits; of the archive, where it is one, else of checkpoint.safetensors.
        most_bytes: of an archive, and of what is unpacked from it.
        time_limit: in seconds, for a file that is fetched by URL.

    Raises:
        InputError: nothing is there, it is no checkpoint, or it cannot be fetched; a bundle is loaded by
            hcmen.runtime.load.
        CorruptFileError: the sha256 is another, or a file is damaged, or the archive is unsafe.
        BackendError: a repository was named, and huggingface_hub is not installed.
    """
    digest = _checked(sha256)
    name = os.fspath(source)
    if isinstance(source, str) and "://" in source:
        fetched = download(source, digest, most_bytes=most_bytes, time_limit=time_limit)
        return _from_archive(fetched, digest, most_bytes)
    path = Path(name)
    if os.path.isdir(name):
        return _from_folder(path, digest)
    if os.path.lexists(name):
        return _from_archive(path, digest, most_bytes)
    found = _REPOSITORY.match(name) if isinstance(source, str) else None
    if found:
        return _from_folder(_repository(found[1], found[2]), digest)
    if not isinstance(source, str) or os.sep in name or name.endswith((".zip", ".tar", ".tar.gz", ".tgz")):
        raise InputError("nothing is there", "a checkpoint folder, or an archive of one", where=shown(name))
    if name not in _SHIPPED:
        raise unknown_name("model", name, _SHIPPED)
    return _from_folder(_SHIPPED[name], digest)


def _checked(sha256: object) -> str | None:
    if sha256 is None:
        return None
    digest = sha256.lower() if isinstance(sha256, str) else ""
    if not _SHA256.match(digest):
        raise InputError(f"sha256 is {shown(sha256)}", "64 hexadecimal digits, as sha256sum prints them")
    return digest


def _from_folder(folder: Path, digest: str | None) -> nn.Module:
    from hcmen.training.checkpoint import load_checkpoint

    if looks_like_bundle(folder):
        fix = "load it with hcmen.runtime.load, or name the checkpoint folder that it was exported from"
        raise InputError("a bundle", "a checkpoint folder of hcmen-train", fix, where=str(folder))
    model: nn.Module
    model, about = load_checkpoint(folder)
    _hold(about["weights"]["sha256"], digest, f"{folder}: {CHECKPOINT_FILE}")
    return model


def _from_archive(path: Path, digest: str | None, most_bytes: int) -> nn.Module:
    with tempfile.TemporaryDirectory(prefix="hcmen-") as made:
        with refused(path, "a checkpoint folder, or an archive of one"):
            file = open_regular(path)
        with file, refused(path):
            if os.fstat(file.fileno()).st_size > most_bytes:
                raise InputError("a larger file", f"at most {most_bytes} bytes", "raise most_bytes", where=str(path))
            if digest is not None:
                found = hashlib.sha256()
                while part := file.read(_PART):
                    found.update(part)
                _hold(found.hexdigest(), digest, str(path))
                file.seek(0)
            unpack(file, Path(made), str(path), most_bytes)
        try:
            return _from_folder(Path(made), None)
        except CorruptFileError as error:
            raise error.but(where=str(path), fix=AGAIN) from error
        except HcmenError as error:
            raise error.but(where=str(path)) from error


def _hold(found: str, wanted: str | None, where: str) -> None:
    if wanted is not None and found != wanted:
        fix = "do not use it: it is another file than the one that was meant"
        raise CorruptFileError(f"the file has the sha256 {found}", wanted, fix, where=where)


def _repository(name: str, revision: str | None) -> Path:
    """The folder in huggingface_hub's cache; offline, what is there already."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise BackendError(
            "no such folder, and to get a repository huggingface_hub is not installed",
            "it",
            "pip install 'hcmen[hub]', or correct the path",
            where=name,
        ) from error
    files = [CONFIG_FILE, CHECKPOINT_FILE]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except Exception as error:  # of several libraries, as its version has them
        raise InputError(
            f"no such folder, and no such repository can be had ({reason_of(error)})",
            fix="correct the path, or the repository's name and revision; offline, it has to be in the cache",
            where=name,
        ) from error
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        what = f"the repository has no {' and no '.join(missing)}"
        raise InputError(what, "the two files that hcmen-train writes", where=name)
    return folder
