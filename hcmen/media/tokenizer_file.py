"""A tokenizer.json that is not trusted, held to what a BERT's tokenizer is before the library behind it sees it.

`tokenizers` is written for files of one's own. It panics on some (a template that names a token which is not there),
which in Python is no Exception, with a page of Rust on stderr. Others never end: a regular expression that backtracks,
a replacement that makes a million letters of one. It cannot be stopped from outside. A process of its own for it would
cost a device its memory twice, and a limit on time alone would not keep the memory in bounds.

So the file is read here, with JSON's own traps left out (`records.parse_json`), and written anew from a list of parts
that take time and memory by the length of the text: the pieces of words (WordPiece) that every BERT has, the usual
normalizers and splitters without a pattern of the file's own, and marks around a text. The library sees nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from hcmen.base.errors import CorruptFileError, reason_of, shown
from hcmen.base.records import JsonFile, parse_json

__all__ = ["checked_tokenizer", "guarded", "read_tokenizer_file"]

_MOST_IDS = 1 << 24
_MOST_ADDED = 1 << 12
_MOST_LETTERS = 1000  # of a token
_MOST_PARTS = 8
_MOST_TEMPLATE = 16

_FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")
# By type: its settings that may be there, each with the values that it may have.
_YES = (True, False)
_BEHAVIOURS = ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
_Parts = Mapping[str, Mapping[str, tuple[Any, ...]]]
_NORMALIZERS: _Parts = {
    "BertNormalizer": {
        "clean_text": _YES,
        "handle_chinese_chars": _YES,
        "strip_accents": (*_YES, None),
        "lowercase": _YES,
    },
    "Strip": {"strip_left": _YES, "strip_right": _YES},
    **{name: {} for name in ("Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "StripAccents")},
}
_SPLITTERS: _Parts = {
    "BertPreTokenizer": {},
    "Digits": {"individual_digits": _YES},
    "Punctuation": {"behavior": _BEHAVIOURS},
    "Whitespace": {},
    "WhitespaceSplit": {},
}


class _Refused(Exception):
    """Why a file is no tokenizer of a BERT."""


def read_tokenizer_file(content: bytes, where: str, fix: str) -> Any:
    """The `tokenizers.Tokenizer` in the content of a tokenizer.json, without truncation, padding and decoder.

    Args:
        content: the file. where, fix: of the error.

    Raises:
        CorruptFileError: it is none, or none that a BERT has.
        ImportError: `tokenizers` is not installed.
    """
    # It would warn at every fork of a process that has used its threads, and one text at a time needs none.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import tokenizers

    made = checked_tokenizer(content, where, fix)
    try:
        return guarded(tokenizers.Tokenizer.from_str, made)
    except Exception as error:  # tokenizers raises plain Exception
        raise CorruptFileError(f"no tokenizer of a BERT ({reason_of(error)})", fix=fix, where=where) from error


def checked_tokenizer(content: bytes, where: str, fix: str) -> str:
    """The content of a tokenizer.json written anew, of known parts alone; it needs no `tokenizers`.

    Args and Raises: as `read_tokenizer_file`.
    """
    found = parse_json(content, JsonFile(where, fix))
    try:
        return json.dumps(_checked(found))
    except _Refused as error:
        raise CorruptFileError(f"no tokenizer of a BERT ({error})", fix=fix, where=where) from error


def guarded(call: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of `tokenizers` gives; a panic of its Rust code, which is no Exception, is made one."""
    try:
        return call(*arguments)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(f"tokenizers failed: {reason_of(error)}") from error


def _checked(data: Any) -> dict[str, Any]:
    """What of the file is used, every part of it known."""
    top = _object(data, "the file")
    model = _model(_object(top.get("model"), "model"))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(token) for token in _list(top.get("added_tokens", []), "added_tokens", _MOST_ADDED)],
        "normalizer": _part(top.get("normalizer"), "normalizer", "normalizers", _NORMALIZERS),
        "pre_tokenizer": _part(top.get("pre_tokenizer"), "pre_tokenizer", "pretokenizers", _SPLITTERS),
        "post_processor": _marks(top.get("post_processor")),
        "decoder": None,
        "model": model,
    }


def _model(data: dict[str, Any]) -> dict[str, Any]:
    if data.get("type", "WordPiece") != "WordPiece":  # the oldest files do not say
        _refuse("model.type", data["type"], "'WordPiece'")
    vocabulary = _object(data.get("vocab"), "model.vocab")
    for token, number in vocabulary.items():
        if len(token) > _MOST_LETTERS:
            _refuse("a token", f"{token[:40]}...", f"at most {_MOST_LETTERS} characters")
        _number(number, "an id of model.vocab", _MOST_IDS - 1)
    unknown, prefix = data.get("unk_token", "[UNK]"), data.get("continuing_subword_prefix", "##")
    if not isinstance(unknown, str) or unknown not in vocabulary:
        _refuse("model.unk_token", unknown, "a token of the vocabulary")
    if not isinstance(prefix, str) or len(prefix) > 16:
        _refuse("model.continuing_subword_prefix", prefix, "at most 16 characters")
    return {
        "type": "WordPiece",
        "unk_token": unknown,
        "continuing_subword_prefix": prefix,
        # It takes time by the square of this, and memory for nothing.
        "max_input_chars_per_word": _number(data.get("max_input_chars_per_word", 100), "max_input_chars_per_word", 200),
        "vocab": vocabulary,
    }


def _added(data: Any) -> dict[str, Any]:
    token = _object(data, "an added token")
    content = token.get("content")
    if not isinstance(content, str) or not 1 <= len(content) <= _MOST_LETTERS:
        _refuse("the content of an added token", content, f"1 to {_MOST_LETTERS} characters")
    made = {"id": _number(token.get("id"), "the id of an added token", _MOST_IDS - 1), "content": content}
    for flag in _FLAGS:
        made[flag] = token.get(flag, flag == "normalized" and not token.get("special", False))
        if type(made[flag]) is not bool:
            _refuse(f"'{flag}' of an added token", made[flag], "true or false")
    return made


def _part(data: Any, where: str, several: str, known: _Parts) -> dict[str, Any] | None:
    """One part of the kinds `known`, or a sequence of them."""
    if data is None:
        return None
    part = _object(data, where)
    kind = part.get("type")
    if kind == "Sequence":
        inner = _list(part.get(several), f"{where}.{several}", _MOST_PARTS)
        return {"type": kind, several: [_part(x, where, "", known) for x in inner if x is not None]}
    if not isinstance(kind, str) or kind not in known:
        _refuse(f"{where}.type", kind, ", ".join(known))
    made = {"type": kind}
    for name, values in known[kind].items():
        if name in part:
            made[name] = part[name]
            if not any(made[name] is value or (isinstance(value, str) and made[name] == value) for value in values):
                _refuse(f"{where}.{name}", made[name], ", ".join(map(str, values)))
    return made


def _marks(data: Any) -> dict[str, Any] | None:
    """What stands around a text: [CLS] and [SEP]. A pair of texts is never read."""
    if data is None:
        return None
    part = _object(data, "post_processor")
    kind = part.get("type")
    if kind == "BertProcessing":
        return {"type": kind, "sep": _mark(part.get("sep")), "cls": _mark(part.get("cls"))}
    if kind != "TemplateProcessing":
        _refuse("post_processor.type", kind, "BertProcessing or TemplateProcessing")
    marks = _object(part.get("special_tokens"), "post_processor.special_tokens")
    single, used = [], {}
    for piece in _list(part.get("single"), "post_processor.single", _MOST_TEMPLATE):
        if len(_object(piece, "a piece of the template")) != 1:
            _refuse("a piece of the template", f"of {len(piece)} kinds", "one")
        ((what, about),) = piece.items()
        about = _object(about, "a piece of the template")
        name, kind_id = about.get("id"), _number(about.get("type_id"), "a type_id", _MOST_IDS - 1)
        if what == "SpecialToken" and isinstance(name, str) and name in marks:
            used[name] = _special(name, _object(marks[name], "a special token"))
        elif what != "Sequence" or name != "A":
            _refuse("a piece of the template", name, "a special token that is there, or the sequence 'A'")
        single.append({what: {"id": name, "type_id": kind_id}})
    if sum("Sequence" in piece for piece in single) != 1:
        _refuse("the template", f"of {len(single)} pieces", "the text in it once")
    pair = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {"type": kind, "single": single, "pair": pair, "special_tokens": used}


def _mark(data: Any) -> list[Any]:
    mark = _list(data, "a mark of post_processor", 2)
    if len(mark) != 2 or not isinstance(mark[0], str) or len(mark[0]) > _MOST_LETTERS:
        _refuse("a mark of post_processor", data, "a token and its id")
    return [mark[0], _number(mark[1], "the id of a mark", _MOST_IDS - 1)]


def _special(name: str, data: dict[str, Any]) -> dict[str, Any]:
    ids = [
        _number(n, "the id of a special token", _MOST_IDS - 1) for n in _list(data.get("ids"), "ids", _MOST_TEMPLATE)
    ]
    tokens = _list(data.get("tokens"), "tokens", _MOST_TEMPLATE)
    if not ids or len(tokens) != len(ids) or not all(isinstance(t, str) and len(t) <= _MOST_LETTERS for t in tokens):
        _refuse("the tokens of a special token", f"{len(tokens)}", f"one for each of its {len(ids)} ids")
    return {"id": name, "ids": ids, "tokens": tokens}


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(where, value, "an object")
    return value


def _list(value: Any, where: str, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        _refuse(where, len(value) if isinstance(value, list) else value, f"a list of at most {most}")
    return value


def _number(value: Any, where: str, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        _refuse(where, value, f"a whole number from 0 to {most}")
    return value


def _refuse(where: str, value: object, expected: str) -> NoReturn:
    raise _Refused(f"{where} is {shown(value)}, expected {expected}")
