"""A tokenizer.json that is not trusted: those of BERTs are read, all others are refused before Rust sees them."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.small_bundle import INPUTS, golden, graph, manifest, weights
from helpers.tables import bert_splits

from hcmen.base.bundle import file_record, write_manifest, writing_bundle
from hcmen.base.errors import CorruptFileError, InputError
from hcmen.base.inputs import TokenConfig
from hcmen.base.modalities import MODALITIES
from hcmen.media.tokenizer_file import guarded, read_tokenizer_file
from hcmen.media.words import Tokenizer
from hcmen.runtime import load

tokenizers = pytest.importorskip("tokenizers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "film", "is", "good", "##ly", "a", "##a", ",", "!", "好"]
TEXTS = ["The film is goodly", "a, aaa! ", "  好 film\n", "nothing", "[MASK] is a film", "é ﷺ \u200b\x00 \ufffd 𐐀"]
INPUTS_OF_WORDS = dataclasses.replace(INPUTS, text_tokens=TokenConfig(len(WORDS), 2, 1))


def bert() -> dict[str, Any]:
    """As the fast tokenizers of transformers are saved."""

    def piece(name: str, kind: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": kind}}

    def sequence(name: str, kind: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": kind}}

    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    single = [piece("[CLS]", 0), sequence("A", 0), piece("[SEP]", 0)]
    return {
        "version": "1.0",
        "truncation": {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": {
            "strategy": {"Fixed": 128},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[PAD]",
        },
        "added_tokens": [{"id": i, "content": WORDS[i], "special": True, **flags} for i in range(5)],
        **bert_splits(),
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, sequence("B", 1), piece("[SEP]", 1)],
            "special_tokens": {t: {"id": t, "ids": [WORDS.index(t)], "tokens": [t]} for t in ("[CLS]", "[SEP]")},
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {word: i for i, word in enumerate(WORDS)},
        },
    }


def read(data: dict[str, Any]) -> Any:
    return read_tokenizer_file(json.dumps(data).encode(), "tokenizer.json", "export again")


Change = Callable[[dict[str, Any]], object]

SOUND: dict[str, Change] = {
    "of transformers": lambda t: None,
    "of tokenizers": lambda t: t.update(
        post_processor={"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}
    ),
    "cased": lambda t: t["normalizer"].update(lowercase=False, strip_accents=False),
    "without marks": lambda t: t.update(post_processor=None),
    "without a normalizer": lambda t: t.update(normalizer=None),
    "without a splitter": lambda t: t.update(pre_tokenizer=None),
    "with three normalizers": lambda t: t.update(
        normalizer={
            "type": "Sequence",
            "normalizers": [{"type": "NFD"}, {"type": "Lowercase"}, {"type": "StripAccents"}],
        }
    ),
    "with two splitters": lambda t: t.update(
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [{"type": "WhitespaceSplit"}, {"type": "Punctuation", "behavior": "Isolated"}],
        }
    ),
    "with words of one's own": lambda t: t["added_tokens"].append(
        {
            "id": 15,
            "content": "film is",
            "special": False,
            "single_word": False,
            "lstrip": True,
            "rstrip": False,
            "normalized": True,
        }
    ),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_tokenizer_gives_what_it_gives_by_itself(name: str):
    data = bert()
    SOUND[name](data)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(data))
    theirs.no_truncation()
    theirs.no_padding()
    ours = read(data)
    for text in TEXTS:
        wanted, found = theirs.encode(text), ours.encode(text)
        assert (found.ids, found.type_ids) == (wanted.ids, wanted.type_ids), text
    assert len(ours.encode("the film is good").ids) >= 3


def test_a_tokenizer_of_transformers_and_what_is_made_of_a_vocabulary(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    for kind in ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer", "LxmertTokenizer"):
        if not hasattr(transformers, kind):
            continue
        theirs = getattr(transformers, kind)(vocab=str(tmp_path / "vocab.txt"))
        theirs.save_pretrained(tmp_path / kind)
        content = (tmp_path / kind / "tokenizer.json").read_bytes()
        ours = read_tokenizer_file(content, "tokenizer.json", "")
        for text in TEXTS:
            assert ours.encode(text).ids == theirs(text)["input_ids"], (kind, text)


def test_a_vocabulary_of_120000_words_is_read(tmp_path: Path):
    data = bert()
    data["model"]["vocab"].update({f"word{i}": len(WORDS) + i for i in range(120000)})
    assert read(data).encode("word119999").ids == [2, len(WORDS) + 119999, 3]


def _model(**changes: Any) -> Change:
    return lambda t: t["model"].update(changes)


def _normalizer(**part: Any) -> Change:
    return lambda t: t.update(normalizer=part)


def _splitter(**part: Any) -> Change:
    return lambda t: t.update(pre_tokenizer=part)


def _template(*single: dict[str, Any]) -> Change:
    return lambda t: t["post_processor"].update(single=list(single))


def _nested(kind: str, several: str, depth: int) -> Change:
    def change(t: dict[str, Any]) -> None:
        part: Any = {"type": "Lowercase"}
        for _ in range(depth):
            part = {"type": "Sequence", several: [part]}
        t[kind] = part

    return change


_A = {"Sequence": {"id": "A", "type_id": 0}}
_REGEX = {"Regex": "(a+)+$"}

HOSTILE: dict[str, tuple[Change, str]] = {
    "a template whose token is missing": (
        _template({"SpecialToken": {"id": "[X]", "type_id": 0}}, _A),
        "a special token that is there",
    ),
    "a template of a pair": (_template({"Sequence": {"id": "B", "type_id": 0}}), "the sequence 'A'"),
    "a template without the text": (_template(), "the text in it once"),
    "a template of many texts": (_template(*[_A] * 10), "the text in it once"),
    "a template without end": (_template(*[_A] * 100), "a list of at most 16"),
    "a template of nothing": (_template({}), "a piece of the template"),
    "a template of two in one": (_template({**_A, "SpecialToken": {}}), "no tokenizer of a BERT"),
    "a token without ids": (
        lambda t: t["post_processor"]["special_tokens"]["[CLS]"].update(ids=[]),
        "one for each of its 0 ids",
    ),
    "a token of another count": (
        lambda t: t["post_processor"]["special_tokens"]["[CLS]"].update(tokens=["a", "b"]),
        "one for each of its 1 ids",
    ),
    "pieces of length 0": (_splitter(type="FixedLength", length=0), "pre_tokenizer.type is 'FixedLength'"),
    "a pattern that backtracks": (
        _splitter(type="Split", pattern=_REGEX, behavior="Isolated", invert=False),
        "pre_tokenizer.type is 'Split'",
    ),
    "a replacement that backtracks": (
        _normalizer(type="Replace", pattern=_REGEX, content=""),
        "normalizer.type is 'Replace'",
    ),
    "a replacement that multiplies": (
        _normalizer(type="Replace", pattern={"String": "a"}, content="a" * 1000000),
        "normalizer.type is 'Replace'",
    ),
    "a prefix of a million letters": (_normalizer(type="Prepend", prepend="a" * 1000000), "'Prepend'"),
    "a table of garbage": (_normalizer(type="Precompiled", precompiled_charsmap="AAAA"), "'Precompiled'"),
    "a sequence within itself": (_nested("normalizer", "normalizers", 2), "a list of at most 8"),
    "a sequence of 20 depths": (_nested("pre_tokenizer", "pretokenizers", 10), "a list of at most 8"),
    "a sequence of many": (
        _normalizer(type="Sequence", normalizers=[{"type": "NFKD"}] * 9),
        "a list of at most 8",
    ),
    "a sequence of none": (_normalizer(type="Sequence"), "normalizer.normalizers is None"),
    "a normalizer without a type": (_normalizer(lowercase=True), "normalizer.type is None"),
    "a normalizer of another type": (_normalizer(type=["NFC"]), "normalizer.type is of type list"),
    "a setting of another type": (
        _normalizer(type="BertNormalizer", lowercase=1, clean_text=True, handle_chinese_chars=True),
        "normalizer.lowercase is 1",
    ),
    "no vocabulary": (_model(vocab={}), "model.unk_token is '[UNK]'"),
    "a vocabulary that is a list": (_model(vocab=["a"]), "model.vocab is of type list"),
    "an id beyond all": (lambda t: t["model"]["vocab"].update(film=(1 << 32) - 1), "an id of model.vocab"),
    "an id of 400 digits": (lambda t: t["model"]["vocab"].update(film=10**400), "a number of 1329 bits"),
    "an id below zero": (lambda t: t["model"]["vocab"].update(film=-1), "an id of model.vocab is -1"),
    "an id that is a text": (lambda t: t["model"]["vocab"].update(film="1"), "an id of model.vocab is '1'"),
    "an id that is true": (lambda t: t["model"]["vocab"].update(film=True), "an id of model.vocab is True"),
    "a word of 10,000 letters": (lambda t: t["model"]["vocab"].update({"a" * 10000: 5}), "at most 1000 characters"),
    "no unknown word": (_model(unk_token="[X]"), "model.unk_token is '[X]'"),
    "a mark of pieces without end": (_model(continuing_subword_prefix="#" * 1000), "continuing_subword_prefix"),
    "words of 0 letters": (_model(max_input_chars_per_word=-1), "max_input_chars_per_word is -1"),
    "words of 2^63 letters": (_model(max_input_chars_per_word=1 << 63), "max_input_chars_per_word"),
    "words of 100,000 letters": (_model(max_input_chars_per_word=100000), "0 to 200"),
    "a unigram model": (_model(type="Unigram", unk_id=None, vocab=[["a", 0.0]]), "model.type is 'Unigram'"),
    "merges of absent tokens": (_model(type="BPE", merges=["x y"]), "model.type is 'BPE'"),
    "no model": (lambda t: t.pop("model"), "model is None"),
    "an added token of nothing": (lambda t: t["added_tokens"][0].update(content=""), "1 to 1000 characters"),
    "an added token without an id": (lambda t: t["added_tokens"][0].pop("id"), "the id of an added token is None"),
    "an added token of an id beyond all": (lambda t: t["added_tokens"][0].update(id=1 << 40), "added token"),
    "added tokens without end": (lambda t: t.update(added_tokens=t["added_tokens"] * 1000), "a list of at most 4096"),
    "added tokens that are an object": (lambda t: t.update(added_tokens={}), "added_tokens is of type dict"),
    "an added token with a flag of 2": (lambda t: t["added_tokens"][0].update(lstrip=2), "'lstrip' of an added token"),
    "marks of one": (
        lambda t: t.update(post_processor={"type": "BertProcessing", "sep": ["[SEP]"], "cls": ["[CLS]", 2]}),
        "a token and its id",
    ),
    "marks that are a text": (
        lambda t: t.update(post_processor={"type": "BertProcessing", "sep": "[SEP]", "cls": ["[CLS]", 2]}),
        "a mark of post_processor",
    ),
    "bytes as letters": (lambda t: t.update(post_processor={"type": "ByteLevel"}), "post_processor.type"),
    "a token that is no Unicode": (lambda t: t["model"]["vocab"].update({"\ud800": 5}), "no tokenizer of a BERT"),
}

CONTENTS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not valid JSON"),
    "no text": (b"\xff\xfe", "not valid JSON"),
    "lists within lists": (b"[" * 100000 + b"]" * 100000, "nested too deeply"),
    "sequences within sequences": (
        b'{"normalizer":' + b'{"type":"Sequence","normalizers":[' * 100000 + b"]}" * 100000 + b"}",
        "nested too deeply",
    ),
    "a list": (b"[]", "the file is []"),
    "a number": (b"1", "the file is 1"),
    "a key that is there twice": (b'{"model": 1, "model": 2}', "twice"),
    "a word that is there twice": (b'{"model": {"vocab": {"a": 1, "a": 2}}}', "twice"),
}


def _content(name: str) -> bytes:
    if name in CONTENTS:
        return CONTENTS[name][0]
    data = copy.deepcopy(bert())
    HOSTILE[name][0](data)
    return json.dumps(data).encode()


@pytest.mark.parametrize("name", [*HOSTILE, *CONTENTS])
def test_a_hostile_tokenizer_is_refused_in_one_line_and_at_once(name: str, capfd: pytest.CaptureFixture[str]):
    content, started = _content(name), time.monotonic()
    with pytest.raises(CorruptFileError) as found:
        Tokenizer(content, INPUTS_OF_WORDS, "tokenizer.json")
    assert (HOSTILE.get(name) or CONTENTS[name])[1] in str(found.value)
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 500
    assert time.monotonic() - started < 5
    assert capfd.readouterr() == ("", "")


def test_a_panic_of_rust_is_an_error():
    """What the list above keeps from Rust, given to it all the same."""
    data = bert()
    HOSTILE["a template of a pair"][0](data)
    made = tokenizers.Tokenizer.from_str(json.dumps(data))
    with pytest.raises(BaseException, match="index out of bounds") as found:
        made.encode("film")
    assert not isinstance(found.value, Exception)
    with pytest.raises(RuntimeError, match="tokenizers failed: index out of bounds"):
        guarded(made.encode, "film")


def test_what_a_mutated_file_gives_is_tokens_or_an_error(capfd: pytest.CaptureFixture[str]):
    """Any value in the file replaced by another one: nothing else comes out, and nothing is said on stderr."""
    generator = random.Random(0)
    values: list[Any] = [
        None,
        True,
        -1,
        0,
        1,
        2**31,
        2**32,
        2**63,
        0.5,
        "",
        "[CLS]",
        "A",
        "Sequence",
        [],
        {},
        [[]],
        "a" * 99,
    ]
    refused = read_through = 0
    for _ in range(600):
        data = bert()
        if generator.random() < 0.5:
            data["normalizer"] = {"type": "Sequence", "normalizers": [data["normalizer"], {"type": "NFKC"}]}
            data["post_processor"] = {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}
        place: Any = data
        while True:
            key = generator.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], (dict, list)) or not place[key] or generator.random() < 0.2:
                break
            place = place[key]
        place[key] = generator.choice(values)
        try:
            tokenizer = Tokenizer(json.dumps(data).encode(), INPUTS_OF_WORDS, "tokenizer.json")
            for text in TEXTS:
                tokenizer(text)
            read_through += 1
        except CorruptFileError:
            refused += 1
    assert min(refused, read_through) > 100
    assert capfd.readouterr() == ("", "")


def test_a_token_or_a_type_that_the_encoder_does_not_know_is_refused():
    data = bert()
    data["model"]["vocab"]["film"] = 99
    with pytest.raises(CorruptFileError, match="gives token 99, the text encoder knows 0 to 14"):
        Tokenizer(json.dumps(data).encode(), INPUTS_OF_WORDS, "tokenizer.json")("film")
    data = bert()
    data["post_processor"]["single"][1]["Sequence"]["type_id"] = 2
    with pytest.raises(CorruptFileError, match="gives token type 2, the text encoder knows 0 to 1"):
        Tokenizer(json.dumps(data).encode(), INPUTS_OF_WORDS, "tokenizer.json")("film")


def test_a_text_without_unicode_is_the_caller_s_fault():
    tokenizer = Tokenizer(json.dumps(bert()).encode(), INPUTS_OF_WORDS, "tokenizer.json")
    with pytest.raises(InputError, match="cannot be read"):
        tokenizer("a\ud800b")


# --- in a bundle ----------------------------------------------------------------------------------------------------


def _bundle(path: Path, content: bytes) -> Path:
    """A bundle that says that it takes words, whose graph nobody gets to run."""
    with writing_bundle(path) as folder:
        (folder / "weights.bin").write_bytes(b"".join(weights()[m].tobytes() for m in MODALITIES))
        (folder / "golden").mkdir()
        (folder / "text_only.onnx").write_bytes(graph("text_only").SerializeToString())
        np.savez(folder / "golden" / "text_only.npz", **golden("text_only"))
        (folder / "tokenizer.json").write_bytes(content)
        made = manifest(folder, ("text_only",))
        record = dataclasses.replace(
            made.variants["text_only"], inputs=INPUTS_OF_WORDS.of_variant("text_only"), outputs=INPUTS.outputs
        )
        write_manifest(
            folder,
            dataclasses.replace(
                made,
                inputs=INPUTS_OF_WORDS,
                variants={"text_only": record},
                tokenizer=file_record(folder / "tokenizer.json", folder),
            ),
        )
    return path


_RUN = "import sys; from hcmen.runtime.commands.run import main; main([*sys.argv[1:], '--text', {text}])"


def _started(bundle: Path, *arguments: str, text: str = "'the film'") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _RUN.format(text=text), "--bundle", str(bundle), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("name", ["a template of a pair", "a pattern that backtracks", "sequences within sequences"])
def test_a_bundle_with_a_hostile_tokenizer_ends_with_5(tmp_path: Path, name: str):
    process = _started(_bundle(tmp_path / "bundle", _content(name)), "--time-limit", "20")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (5, "")
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert "tokenizer.json" in err


# 262,144 letters, each of which NFKD makes 18 of: some seconds.
_LONG = "chr(0xFDFA) * (1 << 18)"


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = bert()
    data["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFKD"}] * 8}
    return _bundle(tmp_path_factory.mktemp("slow") / "bundle", json.dumps(data).encode())


def test_a_time_limit_ends_the_reading_of_words(slow: Path):
    process = _started(slow, "--time-limit", "0.5", text=_LONG)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (3, ""), err
    assert err.count("\n") == 1
    assert "reading the words took more than 0.5 s" in err


@pytest.mark.parametrize("limit", [(), ("--time-limit", "100")], ids=["free", "limited"])
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_ends_the_reading_of_words(slow: Path, limit: tuple[str, ...], number: int, code: int, word: str):
    process = _started(slow, *limit, text=_LONG)
    ticks = os.sysconf("SC_CLK_TCK")
    for _ in range(600):
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        # The library is there, and more time has passed in it than its loading takes.
        if "tokenizers" in maps and int(fields[11]) + int(fields[12]) > 2 * ticks:
            break
        time.sleep(0.02)
    started = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (code, "", f"error: {word}\n")
    assert time.monotonic() - started < 10


def test_a_sound_tokenizer_in_a_bundle_is_used(tmp_path: Path):
    model = load(_bundle(tmp_path / "bundle", json.dumps(bert()).encode()))
    assert model.encode("The film is good").tokens.tolist() == [[2, 5, 6, 7, 8, 3], [1] * 6, [0] * 6]
