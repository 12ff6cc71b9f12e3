"""Small pickles that build something large, deep or endless: refused in one line, in little memory and time."""

from __future__ import annotations

import pickle
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hcmen.base.errors import CorruptFileError, HcmenError
from hcmen.data.layout import open_split
from hcmen.data.unpickle import load_pickle


def text(value: str) -> bytes:
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def doubled(count: int, pair: bytes) -> bytes:
    """Two references to the last one, `count` times; `pair` makes one of two from the stack."""
    return b"".join(b"q" + bytes([i]) + b"0h" + bytes([i]) + b"h" + bytes([i]) + pair for i in range(count))


def listed(count: int) -> bytes:
    return b"".join(b"q" + bytes([i]) + b"0](h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(count))


def shared_lists() -> bytes:
    """A list of 4,000 references, as 4,000 values of one split: 16 million references if each were copied."""
    keys = b"".join(text(str(i)) + b"h\x01" for i in range(4000))
    return b"\x80\x02}" + text("train") + b"}(" + text("k") + b"](" + b"K\x01" * 4000 + b"eq\x01" + keys + b"us."


def object_array(items: bytes) -> bytes:
    """An array of objects over the list that `items` push, made anew by hand."""
    return (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR(K\x01K\x01\x85cnumpy\ndtype\n(X\x02\x00"
        b"\x00\x00O8K\x00K\x01tR(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb\x89" + items + b"tb"
    )


def scalars(count: int) -> bytes:
    """One string of 4 MB from an array's bytes, asked for again and again."""
    size = 4 * 999_999
    head = b"\x80\x04cnumpy.core.multiarray\nscalar\nq\x000cnumpy\ndtype\nX\x07\x00\x00\x00U999999\x85Rq\x010"
    head += b"\x8e" + struct.pack("<Q", size) + b"a\0\0\0" * (size // 4) + b"q\x020"
    return head + b"](" + b"h\x00(h\x01h\x02tR" * count + b"e."


def encoded(count: int) -> bytes:
    """A text of 1 MB that is left in the map, asked for as bytes again and again."""
    body = "é" * (1 << 19)
    return b"\x80\x04" + text(body) + b"q\x000](" + b"c_codecs\nencode\n(h\x00X\x06\x00\x00\x00latin1tR" * count + b"e."


BOMBS = {
    "tuples as keys, deep": b"\x80\x02})" + b"\x85" * 300_000 + b"Ns.",
    "tuples as keys, doubled": b"\x80\x02})" + doubled(60, b"\x86") + b"Ns.",
    "tuples as keys of SETITEMS": b"\x80\x02}()" + doubled(60, b"\x86") + b"Nu.",
    "tuples as keys of DICT": b"\x80\x02()" + doubled(60, b"\x86") + b"Nd.",
    "tuples in a set": b"\x80\x04\x8f()" + doubled(60, b"\x86") + b"\x90.",
    "tuples in a frozenset": b"\x80\x04()" + doubled(60, b"\x86") + b"\x91.",
    "frozensets in one another": b"\x80\x04(" * 1 + b"(\x91" + b"\x94(h\x00\x91" * 3000 + b".",
    "tuples, deep": b"\x80\x02)" + b"\x85" * 300_000 + b".",
    "tuples, doubled": b"\x80\x02)" + doubled(60, b"\x86") + b".",
    "lists, deep": b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "lists, doubled": b"\x80\x02]K\x01a" + listed(60) + b".",
    "lists, doubled 30 times": b"\x80\x02]K\x01a" + listed(30) + b".",
    "dicts, deep": b"\x80\x02" + b"}K\x01" * 100_000 + b"N" + b"s" * 100_000 + b".",
    "marks": b"\x80\x02" + b"(" * 10_000_000,
    "arrays of objects, deep": b"\x80\x03" + b"](" * 200 + b"N" + b"e" * 200 + b".",
    "a list that holds itself": b"\x80\x02]q\x00h\x00a.",
    "a dict that holds itself": b"\x80\x02}q\x00K\x01h\x00s.",
    "a tuple that holds itself": b"\x80\x02]q\x00h\x00\x85a.",
    "an array of objects that holds itself": b"\x80\x03]q\x00" + object_array(b"h\x00").replace(b"]", b"") + b"a.",
    "dtype as name": b"\x80\x02cnumpy\ndtype\n(" + b")" + doubled(60, b"\x86") + b"tR.",
    "codec": b"\x80\x02c_codecs\nencode\n(X\x01\x00\x00\x00a)" + doubled(60, b"\x86") + b"tR.",
    "state": b"\x80\x02cnumpy\ndtype\n(X\x02\x00\x00\x00f8tR)" + doubled(60, b"\x86") + b"b.",
    "shape": b"\x80\x05cnumpy.core.numeric\n_frombuffer\n(C\x08aaaaaaaacnumpy\ndtype\n(X\x02\x00\x00\x00f8tR)"
    + doubled(60, b"\x86")
    + b"X\x01\x00\x00\x00CtR.",
    "empty strings of a shape": pickle.dumps({"train": np.zeros(4, "U1")}, 2)
    .replace(b"U1", b"U0")
    .replace(b"K\x04\x85", b"J" + struct.pack("<i", 200_000_000) + b"\x85"),
    "empty bytes of a shape": b"\x80\x05cnumpy.core.numeric\n_frombuffer\n(C\x00cnumpy\ndtype\n(X\x02\x00\x00\x00S0tR"
    b"J\x00\xc2\xeb\x0b\x85X\x01\x00\x00\x00CtR.",
    "no bytes of a shape": b"\x80\x05cnumpy.core.numeric\n_frombuffer\n(C\x00cnumpy\ndtype\n(X\x02\x00\x00\x00f8tR"
    b"J\x00\xc2\xeb\x0b\x85X\x01\x00\x00\x00CtR.",
    "text that is none": pickle.dumps({"train": np.array(["ab"])}, 2).replace(b"a\x00\x00\x00b", b"\x7f\x7f\x7f\x7fb"),
    "a great number": b"\x80\x04\x8b" + struct.pack("<i", 5000) + b"\x7f" * 5000 + b".",
    "a great number in one byte of length": b"\x80\x04\x8a\xff" + b"\x7f" * 255 + b".",
    "digits, INT": b"I" + b"9" * 5000 + b"\n.",
    "digits, LONG": b"L" + b"9" * 1_000_000 + b"L\n.",
    "digits, hexadecimal": b"I0x" + b"f" * 1_000_000 + b"\n.",
    "digits, FLOAT": b"F" + b"9" * 1_000_000 + b"\n.",
    "digits, GET": b"g" + b"9" * 5000 + b"\n.",
    "digits, PUT": b"Np" + b"9" * 200 + b"\n.",
    "places that collide": b"".join(b"Np%d\n0" % (i * (2**61 - 1)) for i in range(30_000)) + b"N.",
    "keys that collide": b"\x80\x02}("
    + b"".join(b"\x8a\x0b" + (i * (2**61 - 1)).to_bytes(11, "little") + b"N" for i in range(30_000))
    + b"u.",
    "empty sets": b"\x80\x04" + b"\x8f" * 10_000_000 + b".",
    "empty dicts": b"\x80\x04" + b"}" * 20_000_000 + b".",
    "memo": b"\x80\x04N" + b"\x94" * 20_000_000 + b".",
    "scalars": scalars(2000),
    "a value among keys": b"\x80\x04}(NNNu.",
    "items in a string": b"\x80\x04X\x01\x00\x00\x00aK\x01a.",
    "items in bytes": b"\x80\x05\x96\x01\x00\x00\x00\x00\x00\x00\x00a(K\x01K\x01e.",
    "texts that widen": b"\x80\x02](" + b"V" + b"a" * 30_000_000 + b"\\U0001f600\n" + b"0V" * 0 + b"e." * 0,
}

LIMITED = """
import resource, sys, time
from pathlib import Path
import numpy as np
from hcmen.base.errors import CorruptFileError
from hcmen.data.unpickle import load_pickle

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + Path(sys.argv[1]).stat().st_size + 800_000_000,) * 2)
try:
    load_pickle(Path(sys.argv[1]))
    print("was read")
except CorruptFileError as error:
    print(error)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of memory")
@pytest.mark.parametrize("case", BOMBS)
def test_a_bomb_is_refused(tmp_path: Path, case: str) -> None:
    """In 800 MB beside the map and before half a minute: a crash, a hang and a MemoryError fail."""
    path = tmp_path / "set.pkl"
    path.write_bytes(BOMBS[case])
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{path}: ")
    assert done.stdout.count("\n") == 1
    assert len(done.stdout) < 1000
    assert any(remedy in done.stdout for remedy in ("check its SHA-256", "size and SHA-256", "dump it again"))


@pytest.mark.parametrize("content", [shared_lists(), encoded(5000)], ids=["lists", "long text"])
def test_what_is_shared_is_not_copied(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "set.pkl"
    path.write_bytes(content)
    found = load_pickle(path)
    values = found if isinstance(found, list) else [x for k, x in found["train"].items() if k != "k"]
    assert len(values) in (4000, 5000)
    assert len({id(x) for x in values}) == 1


@pytest.mark.parametrize("what", ["a dict", "a list", "a tuple", "a set"])
def test_plain_containers_are_let_be(tmp_path: Path, what: str) -> None:
    inner = {"a dict": {1: "a", 2.5: "b", None: "c", False: "d", b"e": "f", 2**60 - 1: 1}, "a list": [1, [2, (3,)]]}
    value = inner.get(what, (1, "b", (None,)) if what == "a tuple" else {1, "b", frozenset()} - {frozenset()})
    path = tmp_path / "set.pkl"
    for protocol in range(4 if what == "a set" else 0, pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps({"train": {"x": value, "y": value}, "config": {"k": [value] * 3}}, protocol))
        assert load_pickle(path) == {"train": {"x": value, "y": value}, "config": {"k": [value] * 3}}


def test_numbers_as_large_as_they_may_be(tmp_path: Path) -> None:
    path = tmp_path / "set.pkl"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for value in (2**511 - 1, -(2**511), 2**64, -1, 0, True, False, 1e308, -0.5):
            path.write_bytes(pickle.dumps([value], protocol))
            assert load_pickle(path) == [value]
            assert type(load_pickle(path)[0]) is type(value)


@pytest.mark.parametrize(
    "ids",
    [
        ["x" * 60_000] * 3,
        ["a", "b", "x" * 1001],
        np.frombuffer(b"\xff" * 12, "<U1"),
        [2**500, 1, 2],
        [float("nan")] * 3,
    ],
    ids=["shared and long", "long", "no characters", "great numbers", "not numbers"],
)
def test_names_of_samples(tmp_path: Path, ids: Any) -> None:
    """Either names of at most 1,000 characters come out, or one line."""
    split = {m: np.ones((3, 2, 2)) for m in ("text", "audio", "vision")}
    data = {"train": {**split, "regression_labels": np.zeros(3), "id": ids}}
    try:
        found = open_split(data, "train", "set").ids
    except HcmenError as error:
        found = [str(error)]
        assert "'id'" in found[0]
    assert max(map(len, found)) <= 1000


def test_keys_in_messages_are_short(tmp_path: Path) -> None:
    with pytest.raises(HcmenError) as error:
        open_split({"x" * 60_000 + str(i): 0 for i in range(1000)}, "train", "set")
    assert "'train' is missing" in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_name_in_a_message_is_printable(tmp_path: Path) -> None:
    path = tmp_path / "set.pkl"
    path.write_bytes(b"\x80\x04\x8c\x02\x1b[\x8c\x03a\nb\x93.")
    with pytest.raises(CorruptFileError) as error:
        load_pickle(path)
    assert "\x1b" not in str(error.value)
    assert r"'\x1b[.a\nb'" in str(error.value)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_reading(tmp_path: Path, name: str) -> None:
    """While the longest admitted program runs, which takes seconds."""
    path = tmp_path / "set.pkl"
    path.write_bytes(b"\x80\x04N" + b"N0" * 4_000_000 + b".")
    process = subprocess.Popen(
        [sys.executable, "-m", "hcmen", "convert", str(path), str(tmp_path / "out")], stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr or ():
        if "checksum" in line:
            break
    time.sleep(1)
    process.send_signal(getattr(signal, name))
    assert process.wait(20) in (130, 143, 2)
    assert not (tmp_path / "out").exists()
