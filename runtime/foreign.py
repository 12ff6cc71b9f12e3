"""Anybody's .onnx file, as `hcmen.mamba.export` writes it: what it takes, and inputs to try it with.

Such a file has no manifest and no golden outputs. Its sizes may be open, under names; its metadata may tell of states.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hcmen.base.errors import CheckFailed, InputError, shown, unknown_name
from hcmen.base.inputs import TensorSpec
from hcmen.base.state_records import BATCH, STATES_KEY, StateRecord, states_from_json
from hcmen.runtime.backends.graph import read_graph
from hcmen.runtime.backends.ort import OrtBackend, OrtSession
from hcmen.runtime.compare import Comparison, compare
from hcmen.runtime.mamba import EXTERNAL, read_model

__all__ = ["ForeignGraph", "apart", "check_names", "parse_ranges", "parse_sizes"]

_MOST_SIZE = 1 << 31
_MOST_NUMBERS = 1 << 30
_FLOATS = ("float16", "float32", "float64")
_INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
_RANGE = re.compile(r"(-?\d{1,19})\.\.(-?\d{1,19})")

Arrays = dict[str, NDArray[Any]]


class ForeignGraph:
    """An .onnx file and what it takes.

    Args:
        path: of the file; weights outside it lie in the one file `path` + ".data".

    Attributes:
        content, weights: of the two files. tables: input -> rows of the table that it looks up.

    Raises:
        InputError: no such file.
        CorruptFileError: it is damaged or unsafe.
    """

    def __init__(self, path: str):
        self.path = path
        self.content, self.weights = read_model(path)
        self.weights_file = Path(path).name + EXTERNAL
        self.tables = read_graph(self.content, self.weights_file, len(self.weights), path).tables
        self._inputs: list[TensorSpec] | None = None
        self.states: tuple[StateRecord, ...] = ()

    @property
    def sha256(self) -> str:
        """Of the file, and of that of its weights behind it."""
        digest = hashlib.sha256(self.content)
        digest.update(self.weights.data)
        return digest.hexdigest()

    def session(self, backend: OrtBackend) -> OrtSession:
        """A session of what was read; raises as `OrtBackend.session`, and InputError for inputs that are no tensors."""
        session = backend.session(self.content, self.weights, self.weights_file, self.path)
        if self._inputs is None:
            inputs, _, metadata = session.described()
            for t in inputs:
                if t.dtype not in (*_FLOATS, *_INTEGERS, "bool"):
                    raise InputError(f"input '{t.name}' is {t.dtype}", "a tensor of numbers", where=self.path)
            self.states = tuple(states_from_json(metadata[STATES_KEY], self.path)) if STATES_KEY in metadata else ()
            self._inputs = inputs
        return session

    @property
    def inputs(self) -> list[TensorSpec]:
        """Name, dtype and shape of each input; an open size that has no name is called INPUT.AXIS. After `session`."""
        assert self._inputs is not None
        return [
            TensorSpec(t.name, t.dtype, tuple(f"{t.name}.{i}" if n == "?" else n for i, n in enumerate(t.shape)))
            for t in self._inputs
        ]

    @property
    def open_sizes(self) -> list[str]:
        """The names of the open sizes, in the order of the inputs."""
        return list(dict.fromkeys(n for t in self.inputs for n in t.shape if isinstance(n, str)))

    def sized(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """A number for each open size: that of `sizes`, and 1 for a batch that is not among them.

        Raises:
            InputError: one is missing.
        """
        found = {name: sizes[name] for name in self.open_sizes if name in sizes}
        if BATCH in self.open_sizes:
            found.setdefault(BATCH, 1)
        missing = [name for name in self.open_sizes if name not in found]
        if missing:
            words = " ".join(f"--size {name}=N" for name in missing)
            raise InputError(f"open sizes without a number: {', '.join(missing)}", fix=f"say {words}", where=self.path)
        return found

    def random(self, sizes: Mapping[str, int], ranges: Mapping[str, tuple[int, int]], seed: int) -> Arrays:
        """Inputs: numbers of a normal distribution, whole numbers of a range, both ends included, and zero states.

        Args:
            sizes: from `sized`. ranges: by input; without one it is that of the table which the input looks up, or 0
                to 1.

        Raises:
            InputError: an input is too large, or a range is not of its type.
        """
        rng = np.random.default_rng(seed)
        zero = {s.name for s in self.states}
        made: Arrays = {}
        for t in self.inputs:
            shape = [n if isinstance(n, int) else sizes[n] for n in t.shape]
            if math.prod(shape) > _MOST_NUMBERS:
                raise InputError(
                    f"input '{t.name}' has {math.prod(shape)} numbers", f"at most {_MOST_NUMBERS}", where=self.path
                )
            if t.name in zero:
                made[t.name] = np.zeros(shape, t.dtype)
            elif t.dtype in _FLOATS:
                if t.name in ranges:
                    raise InputError(f"--range is given for '{t.name}'", f"whole numbers, not {t.dtype}")
                made[t.name] = rng.standard_normal(shape).astype(t.dtype)
            else:
                low, high = ranges.get(t.name, (0, 1 if t.dtype == "bool" else self.tables.get(t.name, 2) - 1))
                limits = (0, 1) if t.dtype == "bool" else (np.iinfo(t.dtype).min, np.iinfo(t.dtype).max)
                if not limits[0] <= low <= high <= min(limits[1], np.iinfo(np.int64).max - 1):
                    raise InputError(f"the range of '{t.name}' is {low}..{high}", f"one within {t.dtype}")
                made[t.name] = rng.integers(low, high + 1, shape).astype(t.dtype)
        return made


def apart(got: Sequence[Arrays], expected: Sequence[Arrays], tolerance: float) -> dict[str, Comparison]:
    """Outputs by name, compared within `tolerance` times the largest expected number of each.

    Raises:
        CheckFailed: the shapes differ.
    """
    found = {}
    for name in expected[0]:
        pairs = [
            (np.asarray(g[name], np.float64), np.asarray(e[name], np.float64))
            for g, e in zip(got, expected, strict=True)
        ]
        for g, e in pairs:
            if g.shape != e.shape:
                raise CheckFailed(f"output '{name}' has shape {list(g.shape)}", str(list(e.shape)))
        a, b = (np.concatenate([np.ravel(pair[i]) for pair in pairs]) for i in (0, 1))
        if a.size:
            finite = np.abs(b[np.isfinite(b)])
            found[name] = compare(a, b, tolerance * float(finite.max(initial=0.0)), 0.0)
    return found


# --- options --------------------------------------------------------------------------------------------------------


def parse_sizes(texts: Sequence[str]) -> dict[str, int]:
    """{name: number} of texts such as batch=2; raises InputError where one is not written so, or a name comes twice."""
    found: dict[str, int] = {}
    for name, text in _pairs("size", texts, "NAME=N, such as time=256"):
        if not text.isascii() or not text.isdigit() or not 1 <= int(text[:20]) < _MOST_SIZE:
            raise InputError(f"--size is {shown(f'{name}={text}')}", f"NAME=N with N from 1 to {_MOST_SIZE - 1}")
        found[name] = int(text)
    return found


def parse_ranges(texts: Sequence[str]) -> dict[str, tuple[int, int]]:
    """{input: (least, greatest)} of texts such as ids=0..99; raises InputError where one is not written so."""
    found: dict[str, tuple[int, int]] = {}
    for name, text in _pairs("range", texts, "INPUT=LEAST..GREATEST, such as ids=0..99"):
        match = _RANGE.fullmatch(text)
        if match is None or int(match[1]) > int(match[2]):
            raise InputError(f"--range is {shown(f'{name}={text}')}", "INPUT=LEAST..GREATEST, such as ids=0..99")
        found[name] = (int(match[1]), int(match[2]))
    return found


def _pairs(option: str, texts: Sequence[str], form: str) -> list[tuple[str, str]]:
    pairs = [text.rpartition("=")[::2] for text in texts]
    for (name, _), text in zip(pairs, texts, strict=True):
        if not name:
            raise InputError(f"--{option} is {shown(text)}", form)
        if [n for n, _ in pairs].count(name) > 1:
            raise InputError(f"--{option} tells twice of {shown(name)}", "once")
    return pairs


def check_names(
    graphs: Sequence[ForeignGraph], sizes: Mapping[str, object], ranges: Mapping[str, object] | None = None
) -> None:
    """Raises InputError for a size, or an input with a range, that none of `graphs` has."""
    for what, given, known in (
        ("size", sizes, [n for g in graphs for n in g.open_sizes]),
        ("input", ranges or {}, [t.name for g in graphs for t in g.inputs]),
    ):
        for name in given:
            if name not in known:
                raise unknown_name(what, name, list(dict.fromkeys(known)))
