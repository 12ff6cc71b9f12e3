"""Words into tokens, with the tokenizer in the folder of a BERT: as hcmen-run does it with the one in a bundle."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from hcmen.base.errors import CorruptFileError, InputError, shown
from hcmen.base.inputs import FeatureConfig, Inputs, TokenConfig
from hcmen.base.manifest import FrontEnd
from hcmen.base.records import read_json

__all__ = ["Words"]

_MOST_TOKENS = 128
"""Of a text where nobody says."""
_MOST_IDS, _MOST_POSITIONS = 1 << 24, 1 << 16
_AGAIN = "copy the folder again"


class Words:
    """The tokenizer of the BERT in `folder`; called with a text as media/words.py's.

    Args:
        folder: the BERT, or an installed package that carries one.
        most: tokens of a text; 128 or what the encoder takes if None.

    Attributes:
        most: tokens of a text, [CLS] and [SEP] among them. digest: sha256 of the tokenizer.json that a checkpoint and a
        bundle with this encoder carry.

    Raises:
        InputError: there is no vocabulary, or the encoder takes fewer tokens.
        BackendError: `tokenizers` is not installed. CorruptFileError: a file is damaged.
    """

    def __init__(self, folder: Path, most: int | None = None):
        from hcmen.media.encoder_folder import encoder_folder, folder_tokenizer
        from hcmen.media.words import Tokenizer

        folder = encoder_folder(folder)
        where = str(folder)
        if not folder.is_dir():
            raise InputError("no such folder", "a BERT with its vocabulary", "check the path", where=where)
        content = folder_tokenizer(folder).to_str().encode()
        vocabulary, types, positions = _sizes(folder / "config.json")
        most = most or min(_MOST_TOKENS, positions)
        if most > positions:
            raise InputError(
                f"--max-tokens is {most}, this encoder takes {positions}", fix=f"give {positions} or less", where=where
            )
        limits = TokenConfig(vocabulary, types, 0)
        try:
            self._tokenizer = Tokenizer(content, Inputs(FeatureConfig(1, most), None, None, limits), where)
        except CorruptFileError as error:
            raise error.but(fix=_AGAIN) from error
        # A checkpoint and a bundle carry the same, as the library writes it.
        self.most, self.digest = most, hashlib.sha256(content).hexdigest()

    def __call__(self, text: str) -> Any:
        """The tokens of `text`; raises InputError where it has none, CorruptFileError where they are none of it."""
        try:
            return self._tokenizer(text)
        except CorruptFileError as error:
            raise error.but(fix=_AGAIN) from error

    @property
    def front_end(self) -> FrontEnd:
        """What made the tokens, for dataset.json."""
        return FrontEnd("tokenizer", {"max_tokens": self.most}, self.digest)


def _sizes(path: Path) -> tuple[int, int, int]:
    """Token ids, token types and most tokens of the encoder; without a config.json all that tokens can be."""
    if not os.path.lexists(path):
        return _MOST_IDS, _MOST_IDS, _MOST_POSITIONS
    found = read_json(path, _AGAIN, "the sizes of a BERT")
    sizes = []
    for name, default, most in (
        ("vocab_size", 30522, _MOST_IDS),
        ("type_vocab_size", 2, _MOST_IDS),
        ("max_position_embeddings", 512, _MOST_POSITIONS),
    ):
        number = found.get(name, default) if isinstance(found, dict) else None
        if type(number) is not int or not 1 <= number <= most:
            raise InputError(f"{name} is {shown(number)}", f"a whole number from 1 to {most}", _AGAIN, where=str(path))
        sizes.append(number)
    return sizes[0], sizes[1], sizes[2]
