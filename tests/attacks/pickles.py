"""Small pickles that build something large, deep or endless, or that call what no data has a use for."""

from __future__ import annotations

import pickle
import struct

import numpy as np

__all__ = ["BOMBS", "CALLS", "text"]


def text(value: str) -> bytes:
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def doubled(count: int, pair: bytes) -> bytes:
    """Two references to the last one, `count` times; `pair` makes one of two from the stack."""
    return b"".join(b"q" + bytes([i]) + b"0h" + bytes([i]) + b"h" + bytes([i]) + pair for i in range(count))


def listed(count: int) -> bytes:
    return b"".join(b"q" + bytes([i]) + b"0](h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(count))


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


def calling(name: str, arguments: bytes = b"X\x02\x00\x00\x00id\x85") -> bytes:
    """A call of `name`, "module attribute", as os.system("id")."""
    return b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n" + arguments + b"R."


CALLS = {
    "GLOBAL and REDUCE of os.system": calling("os system"),
    "GLOBAL of posix.system, which os.system is": calling("posix system"),
    "builtins.eval": calling("builtins eval"),
    "builtins.getattr": calling("builtins getattr"),
    "a name with dots": calling("numpy core.multiarray.os.system"),
    "STACK_GLOBAL of os.system": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R.",
    "INST of os.system": b"(S'id'\nios\nsystem\n.",
    "OBJ of os.system": b"(cos\nsystem\nS'id'\no.",
    "NEWOBJ of a class": b"\x80\x02cbuiltins\nobject\n)\x81.",
    "BUILD of an admitted function": b"\x80\x02cnumpy\nndarray\n}X\x05\x00\x00\x00_callNsb.",
    "BUILD of a list": b"\x80\x02]}X\x05\x00\x00\x00_callNsb.",
    "numpy.ndarray called": calling("numpy ndarray", b"J\xff\xff\xff\x7f\x85"),
    "numpy.load": calling("numpy load"),
    "a persistent id, as text": b"\x80\x02Pid\n.",
    "a persistent id, from the stack": b"\x80\x02X\x02\x00\x00\x00idQ.",
    "an extension code": b"\x80\x02\x82\x01.",
    "an extension code of four bytes": b"\x80\x02\x84\xff\xff\xff\x7f.",
    "a buffer outside the file": b"\x80\x05\x97.",
    "a read-only buffer": b"\x80\x05C\x01a\x98.",
    "a place in the memo of 32 bits": b"\x80\x02Nr\xff\xff\xff\xffj\xfe\xff\xff\xff.",
    "a place in the memo below zero": b"\x80\x02Np-1\n.",
    "bytes of 2**64 - 1": b"\x80\x04\x8e" + b"\xff" * 8 + b".",
    "a text of 2**63": b"\x80\x04\x8d" + b"\x00" * 7 + b"\x80.",
    "a frame of 2**63": b"\x80\x04\x95" + b"\x00" * 7 + b"\x80N.",
    "protocol 99": b"\x80\x63N.",
    "a pop of nothing": b"0.",
    "no end": b"\x80\x02N",
    "nothing": b"",
}
