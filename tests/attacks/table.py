"""Named attacks: hostile files, each with what it tries, the exit code that it ends in, and a part of the line.

A new one is a line here. What the fuzzer found lies in tests/attacks/files.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from attacks.archives import ARCHIVES
from attacks.attack import Attack, content, file
from attacks.graphs import GRAPHS
from attacks.pickles import BOMBS, CALLS
from fuzz.formats import FORMATS
from helpers.tables import as_csv

__all__ = ["ATTACKS"]

# --- files that are none ---------------------------------------------------------------------------------------------


def fifo(path: Path, valid: bytes) -> None:
    os.mkfifo(path)


def zeros(path: Path, valid: bytes) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path, valid: bytes) -> None:
    path.symlink_to(path.name)


def folder(path: Path, valid: bytes) -> None:
    path.mkdir()


def linked(path: Path, valid: bytes) -> None:
    path.with_name("elsewhere").write_bytes(valid)
    path.symlink_to("elsewhere")


_PLACES: dict[str, tuple[int, str]] = {
    "clip": (2, "not a regular file"),
    "manifest": (5, ""),
    "golden set": (5, ""),
    "engine index": (5, ""),
    "engine key": (5, ""),
    "pickle": (2, ""),
    "table: CSV": (2, ""),
    "table: JSON lines": (2, ""),
    "folder: dataset.json": (2, ""),
    "folder: audio.npy": (5, ""),
    "folder: id.json": (5, ""),
    "bench report": (2, ""),
}


def placed() -> list[Attack]:
    """Each kind of thing that is no file, in the place of each file. A link is followed where a digest says so."""
    made = []
    for parser, (code, says) in _PLACES.items():
        made.append(Attack(parser, "a pipe that nobody writes to", code, says, fifo))
        made.append(Attack(parser, "a link to /dev/zero", code, says, zeros))
        made.append(Attack(parser, "a link to itself", code, says if parser != "clip" else "symbolic links", loop))
        made.append(Attack(parser, "a folder", code, "" if says else says, folder))
    for parser, code in (("manifest", 0), ("golden set", 0), ("engine index", 5), ("engine key", 5)):
        made.append(Attack(parser, "a link to a valid file", code, "a link", linked))
    return made


# --- clips -----------------------------------------------------------------------------------------------------------


def npy(shape: str = "(3, 6)", descr: str = "'<f4'", order: str = "False", body: bytes = bytes(72)) -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


def npz(members: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED, **arrays: bytes) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, data in {**(members or {}), **{f"{key}.npy": x for key, x in arrays.items()}}.items():
            archive.writestr(zipfile.ZipInfo(name), data, compress_type=method)
    return target.getvalue()


def patched(data: bytes, mark: bytes, at: int, value: bytes, last: bool = False) -> bytes:
    """`data` with bytes set behind the first or last `mark`."""
    start = (data.rindex(mark) if last else data.index(mark)) + at
    return data[:start] + value + data[start + len(value) :]


LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_NAN = np.full((3, 6), np.nan, np.float32).tobytes()
_TWO = npz(text=npy(), audio=npy("(6, 3)"))


def _clip(tries: str, code: int, says: str, made: bytes | Callable[[Path, bytes], object], *more: Any) -> Attack:
    return Attack("clip", tries, code, says, made, *more)


def bomb(_: bytes) -> bytes:
    return npz(method=zipfile.ZIP_DEFLATED, text=npy("(11184810, 6)", body=bytes(11184810 * 24)))


def encrypted() -> bytes:
    return patched(patched(npz(text=npy()), LOCAL, 6, b"\x01"), CENTRAL, 8, b"\x01")


CLIPS = [
    _clip(
        "300 parentheses, which Python's parser recurses into", 5, "no valid .npy header", npz(text=npy("(" * 300)), 5
    ),
    _clip(
        "a header that no string ends, which Python's tokenizer raises at", 5, "no valid .npy", file("clip-no-end.npz")
    ),
    _clip("an escape that newer Pythons warn of", 5, "no valid .npy header", npz(text=npy(descr=r"'\d'"))),
    _clip("long numbers of Python 2, which NumPy warns of", 0, "", npz(text=npy("(3L, 6L)"))),
    _clip("a header of 4 GiB", 5, "header", npz(text=b"\x93NUMPY\x02\x00" + b"\xff" * 4 + npy()[10:])),
    _clip("a bomb of 256 MiB in 256 KiB", 2, "at most 12", content(bomb), 2),
    _clip(
        "a member that says 1 GiB over a header of 72 bytes",
        5,
        "declares",
        patched(npz(text=npy()), CENTRAL, 24, struct.pack("<I", 1 << 30)),
    ),
    _clip("members that overlap", 5, "damaged", patched(_TWO, CENTRAL, 42, bytes(4), last=True)),
    _clip("a member beyond the end", 5, "damaged", patched(npz(text=npy()), CENTRAL, 42, b"\xff\xff\xff\x7f")),
    _clip("an encrypted member", 2, "is encrypted", encrypted(), 2),
    _clip("a wrong checksum", 5, "Bad CRC", patched(npz(text=npy()), CENTRAL, 16, b"abcd"), 5),
    _clip("a member of LZMA", 2, "compressed by method 14", npz(method=zipfile.ZIP_LZMA, text=npy())),
    _clip("65,535 members announced by 22 bytes", 2, "no modality", END + bytes(4) + b"\xff" * 4 + bytes(10)),
    _clip("17 members", 2, "17 arrays", npz({f"{i}.npy": npy() for i in range(17)})),
    _clip("a name outside", 2, "unknown key", npz({"../text.npy": npy()})),
    _clip(
        "Python objects, pickled",
        5,
        "holds Python objects",
        npz(text=npy(descr="'|O'", body=b"cos\nsystem\n(S'id'\ntR.")),
        5,
    ),
    _clip("no dimension", 2, "shape []", npz(text=npy("()", body=bytes(4)))),
    _clip("2**63 steps", 5, "no tuple of lengths", npz(text=npy("(9223372036854775808, 6)"))),
    _clip("2**63 features of no step", 5, "no tuple of lengths", npz(text=npy("(0, 9223372036854775808)", body=b""))),
    _clip("a size below zero", 5, "no valid .npy header", npz(text=npy("(-1, 6)"))),
    _clip("texts of 4 GB each", 5, "no dtype", npz(text=npy(descr="'<U999999999'"))),
    _clip("records", 2, "dtype [('a', '<f4')]", npz(text=npy(descr="[('a', '<f4')]"))),
    _clip("no numbers", 2, "18 NaN", npz(text=npy(body=_NAN)), 2),
    _clip("Fortran's order", 0, "", npz(text=npy(order="True"))),
    _clip("big-endian numbers", 0, "", npz(text=npy(descr="'>f4'"))),
    _clip("the begin of an archive alone", 5, "damaged", npz(text=npy())[:60]),
]

GOLDEN = [
    Attack(
        "golden set", "Python objects, pickled", 5, "damaged golden file", npz({"000/text.npy": npy(descr="'|O'")}), 5
    ),
    Attack("golden set", "5,000 members", 5, "expected far fewer", npz({f"{i}/a.npy": b"" for i in range(5000)})),
    Attack(
        "golden set",
        "a member that says 1 GiB",
        5,
        "far fewer",
        patched(npz(text=npy()), CENTRAL, 24, struct.pack("<I", 1 << 30)),
    ),
    Attack(
        "golden set", "a shape of 2**62 in 72 bytes", 5, "damaged", npz({"0/text.npy": npy("(4611686018427387904,)")})
    ),
    Attack("golden set", "no case", 5, "no case", npz()),
    Attack("golden set", "no outputs", 5, "lacks", npz({"0/text.npy": npy()})),
    Attack("golden set", "no archive", 5, "damaged golden file", b"hello"),
]


# --- JSON ------------------------------------------------------------------------------------------------------------


class Raw(str):
    """Stands in the file as it is."""


def edited(*path: str | int, to: Any) -> Callable[[Path, bytes], object]:
    """A valid file with one value in the place of another; ... takes it out."""

    def make(valid: bytes) -> bytes:
        document = json.loads(valid)
        place = document
        for part in path[:-1]:
            place = place[part]
        if to is ...:
            del place[path[-1]]
            return json.dumps(document).encode()
        place[path[-1]] = "@@" if isinstance(to, Raw) else to
        return json.dumps(document).replace('"@@"', str(to)).encode()

    return content(make)


def prefixed(text: str) -> Callable[[Path, bytes], object]:
    """A valid object with other keys before its own."""
    return content(lambda valid: b"{" + text.encode() + valid[1:])


_DEEP = Raw("[" * 100_000 + "]" * 100_000)
_DIGITS = Raw("9" * 5000)


def everywhere(parser: str, *path: str | int) -> list[Attack]:
    """What any JSON file of a bundle may hold at `path`."""
    tried: list[tuple[str, Any]] = [
        ("a number of 5,000 digits", _DIGITS),
        ("a value 100,000 deep", _DEEP),
        ("NaN", Raw("NaN")),
        ("a number beyond float64", Raw("1e999")),
        ("null", None),
        ("a list", []),
    ]
    made = [Attack(parser, f"{tries} at {path[-1]}", 5, "", edited(*path, to=value)) for tries, value in tried]
    made += [
        Attack(parser, "a key that is there twice", 5, "is there twice", prefixed('"schema_version": 1,')),
        Attack(parser, "an unknown key", 5, "unknown key", prefixed('"more": 1,')),
        Attack(parser, "17 MiB of blanks", 5, "more than", content(lambda valid: valid + b" " * (17 << 20))),
        Attack(parser, "no UTF-8", 5, "not valid JSON", content(lambda valid: valid.replace(b"schema", b"\xff", 1))),
        Attack(parser, "a mark of byte order", 5, "not valid JSON", content(lambda valid: b"\xef\xbb\xbf" + valid)),
        Attack(parser, "nothing", 5, "not valid JSON", b""),
    ]
    return made


_WEIGHTS = ("weights", "file")
MANIFESTS = [
    *everywhere("manifest", "opset"),
    *(
        Attack("manifest", f"weights in {name!r:.40}", 5, "unsafe", edited(*_WEIGHTS, to=name))
        for name in ("../secret", "/etc/passwd", "a/b/c", "a//b", ".", "", "a\0", "a\n", "manifest.json", "~/x", "a\\b")
    ),
    Attack("manifest", "weights in /etc/passwd", 5, "unsafe", edited(*_WEIGHTS, to="/etc/passwd"), 5),
    Attack("manifest", "10**400 opset", 5, "opset", edited("opset", to=10**400), 5),
    Attack("manifest", "10**400 bytes", 5, "bytes", edited("weights", "bytes", to=10**400)),
    Attack("manifest", "10**400 features", 5, "features", edited("inputs", "text", "features", to=10**400)),
    Attack("manifest", "10**400 as a label", 5, "label_max", edited("inputs", "label_max", to=10**400)),
    Attack("manifest", "10**400 as a mean", 5, "mean", edited("normalisation", "text", "mean", 0, to=10**400)),
    Attack(
        "manifest",
        "max_steps of 10**9, which bounds what a clip may take",
        5,
        "max_steps",
        edited("inputs", "text", "max_steps", to=10**9),
        5,
    ),
    Attack("manifest", "a schema of tomorrow", 2, "upgrade hcmen", edited("schema_version", to=3), 2),
    Attack("manifest", "ops of tomorrow", 3, "upgrade hcmen", edited("op", "version", to=2), 3),
    Attack(
        "manifest",
        "escape codes in a word that is shown",
        5,
        "printable",
        edited("inputs", "label_max_means", to="\x1b[2J"),
    ),
    Attack(
        "manifest", "half a character in a word that is shown", 5, "", edited("inputs", "label_max_means", to="\ud800")
    ),
    Attack("manifest", "a bound of parity that nothing fails", 5, "precision", edited("precision", to="int4")),
    Attack("manifest", "no variant", 5, "is empty", edited("variants", to={})),
    Attack("manifest", "a variant of no name", 5, "unknown variant", edited("variants", to={"\x1b": {}})),
]
_ENTRY = ("engines", 0)
ENGINES = [
    *everywhere("engine index", *_ENTRY, "sm"),
    Attack("engine index", "an engine outside", 5, "unsafe", edited(*_ENTRY, "file", to="../a.engine")),
    Attack("engine index", "the name of another engine", 5, "expected", edited(*_ENTRY, "file", to="engines/a.engine")),
    Attack("engine index", "10**400 of sm", 5, "sm", edited(*_ENTRY, "sm", to=10**400)),
    Attack(
        "engine index",
        "half a character as one of two signatures",
        0,
        "",
        edited("engines", 2, "signature", to="\ud800"),
    ),
    *(
        Attack(
            "engine index", f"{name} of capabilities", 5, "no rising list", edited("engines", 1, "capabilities", to=to)
        )
        for name, to in (
            ("a million", list(range(1, 10**6))),
            ("none", []),
            ("one that is true", [True]),
            ("a falling list", [89, 86]),
            ("one twice", [86, 86]),
            ("10**400", [10**400]),
        )
    ),
    Attack("engine index", "a flavour of escapes", 5, "flavour", edited("engines", 1, "flavour", to="\x1b[2J")),
    Attack("engine index", "three profiles", 5, "profiles", edited("engines", 1, "profiles", to=3)),
    Attack("engine index", "1,001 engines", 5, "expected at most 1000", edited("engines", to=[{}] * 1001)),
    Attack("engine index", "a schema of tomorrow", 2, "schema_version", edited("schema_version", to=2)),
    Attack("engine key", "a key of 1 MB", 5, "no key", b"a" * (1 << 20)),
    Attack("engine key", "a key of capitals", 5, "no key", b"A" * 64 + b"\n"),
]

# --- data sets, words, checkpoints, reports --------------------------------------------------------------------------


def tokenizer(**parts: Any) -> Callable[[Path, bytes], object]:
    return content(lambda valid: json.dumps({**json.loads(valid), **parts}).encode())


def replaces(count: int) -> dict[str, Any]:
    one = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    return {"type": "Sequence", "normalizers": [one] * count}


def state_with(part: str, value: Any) -> Callable[[Path, bytes], object]:
    """A valid last.safetensors whose state says something else."""

    def make(valid: bytes) -> bytes:
        size = int.from_bytes(valid[:8], "little")
        header = json.loads(valid[8 : 8 + size])
        state = json.loads(header["__metadata__"]["state"])
        state[part] = "@@" if isinstance(value, Raw) else value
        header["__metadata__"]["state"] = json.dumps(state).replace('"@@"', str(value))
        content = json.dumps(header).encode()
        return len(content).to_bytes(8, "little") + content + valid[8 + size :]

    return content(make)


OTHERS = [
    *(Attack("pickle", tries, 5, "", made) for tries, made in {**BOMBS, **CALLS}.items()),
    Attack("pickle", "os.system, through hcmen-convert", 5, "os.system", CALLS["GLOBAL and REDUCE of os.system"], 5),
    Attack("pickle", "tuples as keys, through hcmen-convert", 5, "as a key", BOMBS["tuples as keys, deep"], 5),
    Attack("pickle", "an archive of torch.save", 5, "torch.save", npz({"archive/data.pkl": b""})),
    Attack("folder: dataset.json", "a value 100,000 deep", 5, "nested too deeply", edited("splits", to=_DEEP), 5),
    Attack("folder: dataset.json", "another schema", 5, "schema_version", edited("schema_version", to=[[]])),
    Attack(
        "folder: dataset.json",
        "a file of another name",
        5,
        "does not describe",
        edited("splits", "test", "bytes", "../x", to=1),
    ),
    Attack(
        "folder: dataset.json",
        "another size",
        5,
        "truncated or altered",
        edited("splits", "test", "bytes", "audio.npy", to=10**400),
    ),
    Attack("folder: audio.npy", "300 parentheses", 5, "damaged", npy("(" * 300)),
    Attack("folder: audio.npy", "a header that no string ends", 5, "damaged", file("folder-no-end.npy")),
    Attack("folder: audio.npy", "Python objects, pickled", 5, "object of shape", npy("(2, 4, 3)", "'|O'")),
    Attack("folder: audio.npy", "2**63 samples", 5, "damaged", npy("(9223372036854775808, 4, 3)")),
    Attack("folder: audio.npy", "sizes whose product overflows", 5, "damaged", npy("(4294967296, 4294967296, 3)")),
    Attack("folder: audio.npy", "a header of 4 GiB", 5, "damaged", b"\x93NUMPY\x02\x00" + b"\xff" * 4 + bytes(300)),
    Attack("folder: audio.npy", "a zip, which numpy.load would open", 5, "damaged", npz(text=npy())),
    Attack("folder: id.json", "a value 100,000 deep", 5, "nested too deeply", str(_DEEP).encode()),
    Attack("folder: id.json", "a name of 100 kB", 2, "'id'", json.dumps(["a", "b" * 100_000]).encode()),
    Attack("tokenizer", "a value 100,000 deep", 5, "no tokenizer", tokenizer(model=[]), None),
    Attack(
        "tokenizer",
        "ids beyond the text encoder",
        5,
        "expected 'WordPiece'",
        tokenizer(model={"type": "WordLevel", "vocab": {"u": 4294967295}, "unk_token": "u"}),
    ),
    Attack(
        "tokenizer",
        "a table of characters that no byte is in, which panics",
        5,
        "",
        tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": base64.b64encode(bytes(4)).decode()}),
    ),
    Attack(
        "tokenizer",
        "pieces of no length, which panic",
        5,
        "",
        tokenizer(pre_tokenizer={"type": "FixedLength", "length": 0}),
    ),
    Attack(
        "tokenizer",
        "a pattern that never ends, which panics",
        5,
        "",
        tokenizer(normalizer={"type": "Replace", "pattern": {"Regex": "(\\w+)+$"}, "content": "x"}),
    ),
    Attack("tokenizer", "a text that grows tenfold nine times", 5, "", tokenizer(normalizer=replaces(9))),
    Attack("checkpoint: config.json", "an expansion of 10**6", 5, "", edited("model", "expand", to=10**6)),
    Attack("checkpoint: config.json", "2**31 layers", 5, "", edited("model", "backbone_depth", to=1 << 31)),
    Attack("checkpoint: config.json", "a width of 10**8", 5, "", edited("model", "width", to=10**8)),
    Attack("checkpoint: config.json", "a width of 10**400", 5, "", edited("model", "width", to=10**400)),
    Attack("checkpoint: config.json", "a value 100,000 deep", 5, "nested too deeply", edited("model", to=_DEEP), 5),
    Attack(
        "checkpoint: config.json",
        "10**400 as dropout",
        5,
        "a number of 1329 bits",
        edited("model", "dropout", to=10**400),
    ),
    Attack(
        "checkpoint: config.json", "a kind of model that is not known", 2, "kind", edited("kind", to="os.system"), 2
    ),
    Attack("checkpoint: config.json", "a list as the data", 5, "'dataset' is []", edited("dataset", to=[])),
    Attack("settings for --config", "a key that is not known", 2, "unknown key 'trian'", edited("trian", to={})),
    Attack("settings for --config", "2**31 layers", 2, "backbone_depth", edited("model", "backbone_depth", to=1 << 31)),
    Attack(
        "settings for --config", "10**400 epochs", 2, "a number of 1329 bits", edited("train", "epochs", to=10**400)
    ),
    Attack("settings for --config", "a value 100,000 deep", 5, "nested too deeply", edited("run", to=_DEEP)),
    Attack("settings for --config", "a path of another type", 2, "'run.data' is 3", edited("run", "data", to=3)),
    Attack("settings for --config", "a kind of model that is not known", 2, "kind", edited("kind", to="os.system")),
    Attack("settings for --config", "a list as the kind", 2, "kind", edited("kind", to=[])),
    Attack("settings for --config", "a seed of 10**400", 2, "'seeds' is", edited("seeds", to=[10**400])),
    Attack("checkpoint: checkpoint.safetensors", "a header of 2**63", 5, "does not describe", b"\x00" * 7 + b"\x80{}"),
    Attack(
        "checkpoint: checkpoint.safetensors",
        "a pickle",
        5,
        "does not describe",
        CALLS["GLOBAL and REDUCE of os.system"],
    ),
    Attack("checkpoint: last.safetensors", "a header of 2**63", 5, "damaged", b"\x00" * 7 + b"\x80{}"),
    Attack("checkpoint: last.safetensors", "a state 100,000 deep", 5, "", state_with("history", _DEEP)),
    Attack("checkpoint: last.safetensors", "a text as the run", 5, "", state_with("run", "x")),
    Attack("checkpoint: last.safetensors", "another kind", 2, "kind", state_with("kind", "os.system")),
    Attack("checkpoint: last.safetensors", "a list as the kind", 2, "kind", state_with("kind", [])),
    Attack("checkpoint: report.json", "a value 100,000 deep", 5, "no report", edited("test", to=_DEEP)),
    Attack("BERT: config.json", "10**400 as an epsilon", 2, "norm_epsilon", edited("layer_norm_eps", to=10**400)),
    Attack("bench report", "10**400 milliseconds", 5, "damaged report", edited("rows", 0, "run", "p50", to=10**400), 5),
    Attack("bench report", "10**400 clips at once", 5, "damaged report", edited("rows", 0, "batch", to=10**400), 5),
    Attack(
        "bench report",
        "a time so short that nothing can be divided by it",
        5,
        "damaged",
        edited("rows", 0, "run", "p50", to=5e-324),
    ),
    Attack(
        "bench report",
        "10**400 seconds of a cold start",
        5,
        "damaged",
        edited("cold", 0, "median", "steps_ms", 0, to=10**400),
    ),
    Attack(
        "bench report",
        "no share of stolen time",
        5,
        "stolen_share",
        edited("cpu_time_of_others", "stolen_share", to=...),
    ),
    Attack("bench report", "a value 100,000 deep", 5, "", edited("rows", to=_DEEP)),
    Attack("lines of --follow", "a line of 70,000 bytes", 2, "a line of more than", b"x" * 70_000),
    Attack(
        "lines of --follow",
        "names that are none, and a device",
        0,
        "",
        b"\0\n\xff\n/dev/zero\n..\n\r\n" + b"a" * 5000 + b"\n",
    ),
]


def cells(table: str, **change: str) -> str:
    """The table with another value in some columns of its third row."""
    rows = list(csv.DictReader(io.StringIO(table)))
    rows[2].update(change)
    return as_csv(rows)


def table(made: Callable[[str], str | bytes]) -> Callable[[Path, bytes], object]:
    def make(valid: bytes) -> bytes:
        found = made(valid.decode("utf-8-sig"))
        return found if isinstance(found, bytes) else found.encode()

    return content(make)


def _csv(tries: str, code: int, says: str, made: Callable[[str], str | bytes], *more: Any) -> Attack:
    return Attack("table: CSV", tries, code, says, table(made), *more)


def _line(tries: str, code: int, says: str, line: str, *more: Any) -> Attack:
    return Attack("table: JSON lines", tries, code, says, table(lambda valid: valid + line + "\n"), *more)


TABLES = [
    _csv("10 MB of text in a cell", 0, "", lambda valid: cells(valid, text="a " * (5 << 20))),
    _csv("a quotation mark that nothing closes", 2, "never closed", lambda valid: valid + '"' + "a\n" * 99, 2),
    _csv("a cell of 16 MiB over many lines", 2, "a quotation mark", lambda v: v + '"' + "a\n" * (9 << 20), 2),
    _csv("a line of 32 MiB", 2, "has a line of", lambda valid: valid + "a" * (33 << 20), 2),
    _csv("a name of a column of 16 MiB", 2, "characters in a cell", lambda valid: "a" * (17 << 20) + "," + valid),
    _csv("100,000 columns", 2, "has no column 'id'", lambda valid: "," * 100_000 + "\n", 2),
    _csv("a feature of the number 999,999", 2, "audio.999999 is there", lambda v: "id,label,audio.999999\na,1,2\n", 2),
    _csv("zero bytes", 5, "zero bytes", lambda valid: valid.replace("film", "fi\0lm", 1), 5),
    _csv("UTF-16 without a mark", 5, "zero bytes", lambda valid: valid.encode("utf-16-le"), 5),
    _csv("bytes that are no UTF-8", 2, "no UTF-8", lambda valid: valid.encode().replace(b"film", b"\xff\xfe"), 2),
    _csv("a clip that is a device", 0, "", lambda valid: cells(valid, clip="/dev/zero")),
    _csv("a clip that is a folder, far up", 0, "", lambda valid: cells(valid, clip="../" * 1000)),
    _csv("a clip with a zero byte", 5, "zero bytes", lambda valid: cells(valid, clip="a\0b")),
    _csv("escape codes in an id", 0, "", lambda valid: cells(valid, id="\x1b[2J")),
    _csv("a label of 100 kB", 0, "", lambda valid: cells(valid, label="9" * 100_000)),
    _csv("an exponent of 10**9", 0, "", lambda valid: cells(valid, label="1e1000000000")),
    _csv("lines that end in CR alone", 0, "", lambda valid: valid.replace("\r\n", "\r")),
    _csv("a pickle", 2, "a pickle or binary", lambda valid: CALLS["GLOBAL of posix.system, which os.system is"], 2),
    _csv("nothing", 2, "is empty", lambda valid: "", 2),
    _line("a value 100,000 deep", 0, "", str(_DEEP)),
    _line("a value 100,000 deep within", 0, "", '{"id": "x", "label": ' + str(_DEEP) + "}"),
    _line("digits", 0, "", '{"id": "x", "label": ' + str(_DIGITS) + "}"),
    _line("half a character", 0, "", '{"id": "\\ud800", "label": 1, "text": "\\udc00"}'),
    _line("a million keys", 0, "", "{" + ",".join(f'"{i}":1' for i in range(10**6)) + "}"),
    _line("a million lists", 0, "", '{"id":[' + ",".join(["[]"] * 10**6) + "]}"),
    _line("a key twice", 0, "", '{"id": "x", "id": "y"}'),
]


ATTACKS = [*TABLES, *CLIPS, *GOLDEN, *MANIFESTS, *ENGINES, *GRAPHS, *ARCHIVES, *OTHERS, *placed()]
assert all(attack.parser in FORMATS for attack in ATTACKS)
