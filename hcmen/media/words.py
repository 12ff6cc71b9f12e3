"""Raw words to token ids, with the tokenizer that a bundle carries.

`tokenizers` (the library behind the fast tokenizers of `transformers`, in Rust) is imported when words are first given,
and not before. It needs no torch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hcmen.base.errors import BackendError, CorruptFileError, InputError, reason_of
from hcmen.base.inputs import Inputs
from hcmen.media.tokenizer_file import guarded, read_tokenizer_file

__all__ = ["Encoded", "Tokenizer"]

_MOST_CHARACTERS = 1 << 18


class Encoded(NamedTuple):
    """tokens int64 [3, time]: ids, attention mask, token types. dropped: tokens that did not fit at the end."""

    tokens: NDArray[np.int64]
    dropped: int


class Tokenizer:
    """The tokenizer in the content of a tokenizer.json.

    Args:
        content: the file. inputs: of a model whose text is tokens; it bounds ids and length. where: what to call the
            file in messages.

    Raises:
        BackendError: `tokenizers` is not installed.
        CorruptFileError: the content is no tokenizer.
    """

    def __init__(self, content: bytes, inputs: Inputs, where: str):
        assert inputs.text_tokens is not None
        try:
            self._tokenizer = read_tokenizer_file(content, where, "export the bundle again")
        except ImportError as error:
            raise BackendError(
                f"{error.name} is not installed, and words need it: pip install 'hcmen[words]', or give token ids"
            ) from error
        self._where = where
        self._steps = inputs.modality("text").max_steps
        self._limits = inputs.text_tokens

    def __call__(self, text: str) -> Encoded:
        """The tokens of `text` between [CLS] and [SEP]; what is too long is cut before [SEP].

        Raises:
            InputError: no words, or more text than anyone says.
            CorruptFileError: the tokenizer is not that of the bundle's text encoder.
        """
        if not text.strip():
            raise InputError("the text is empty, expected words: leave the text out instead")
        if len(text) > _MOST_CHARACTERS:
            raise InputError(f"the text has {len(text)} characters, expected at most {_MOST_CHARACTERS}: cut it")
        try:
            # With `encode` no other thread could run, and nobody could stop it.
            (encoding,) = guarded(self._tokenizer.encode_batch, [text])
        except Exception as error:  # as above; an unpaired surrogate, for one
            raise InputError(f"the text cannot be read ({reason_of(error)}), expected Unicode text") from error
        ids, types = (np.array(row, np.int64) for row in (encoding.ids, encoding.type_ids))
        dropped = max(0, len(ids) - self._steps)
        if dropped:
            kept = np.r_[0 : self._steps - 1, len(ids) - 1]
            ids, types = ids[kept], types[kept]
        if not ids.size:
            raise CorruptFileError(f"{self._where}: gives no token for words", fix="export the bundle again")
        for what, found, most in (
            ("token", ids.max(), self._limits.vocabulary),
            ("token type", types.max(), self._limits.token_types),
        ):
            if found >= most:
                raise CorruptFileError(
                    f"{self._where}: gives {what} {found}, the text encoder knows 0 to {most - 1}",
                    fix="export the bundle again",
                )
        return Encoded(np.stack([ids, np.ones_like(ids), types]), dropped)
