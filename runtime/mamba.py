"""Runs an exported Mamba model step by step: a prompt at once, then token after token, from the states it left.

    from hcmen.runtime.mamba import Stepper

    stepper = Stepper("mamba.onnx")
    logits = stepper.feed(input_ids=prompt)["logits"]             # prompt: int64 [1, time]
    logits = stepper.feed(input_ids=logits[:, -1:].argmax(-1))["logits"]

The graph is one that `hcmen.mamba.export(..., states=True)` wrote: its metadata say which inputs are states
(hcmen/base/state_records.py). It has any number of steps, so that one session serves both. PyTorch is not needed.

No run writes into a state that it was given. So a snapshot is a reference, takes no time, and stays as it is. States
pass through NumPy. At the sizes of a model of 130 million weights (2.8 MB of states), and of one layer, OrtValues kept
by ONNX Runtime were slower for their calls' overhead, and two sets of bound buffers were as fast.

A graph's functions or projections may take another number of steps by other arithmetic. docs/mamba.md says where the
outputs have the same bits however a sequence is cut. For it every session packs its weights: without, ONNX Runtime
multiplies a single row by another kernel than many.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hcmen.base.errors import CorruptFileError, InputError, did_you_mean, reason_of
from hcmen.base.files import open_regular, read_small, refused, writing_file
from hcmen.base.inputs import TensorSpec
from hcmen.base.npy import read_npy_header
from hcmen.base.state_records import STATES_KEY, StateRecord, states_from_json
from hcmen.runtime.backends.limits import check_time_limit
from hcmen.runtime.backends.options import Ort
from hcmen.runtime.backends.ort import OrtBackend

__all__ = ["EXTERNAL", "Snapshot", "Stepper", "read_model"]

_MOST_BYTES = (2 << 30) - 1
"""Of a model in protobuf's format."""
EXTERNAL = ".data"
"""What the name of the file beside a model has behind that of the model, where its weights lie outside."""
_ZIP_ERRORS = (
    *(OSError, zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, struct.error, EOFError),
    *(NotImplementedError, OverflowError, RuntimeError, UnicodeDecodeError, ValueError),
)


@dataclass(frozen=True)
class Snapshot:
    """The states of a `Stepper` at one moment. It never changes, and any stepper of the same model takes it.

    batch: how many sequences. steps: how many steps were fed before.
    """

    batch: int
    steps: int
    _session: object
    _values: Mapping[str, NDArray[np.float32]]


class Stepper:
    """A model with its states.

    One thread uses a stepper at a time. `clone` makes another for another thread, which shares session and weights.

    Args:
        path: an .onnx file with states; weights outside it lie in the one file `path` + ".data".
        library: use the kernels of libhcmen_ops.so where they are found. False: the graph's own functions.
        threads: of ONNX Runtime; None for the physical cores.
        time_limit: seconds that loading, and each run, may take; None for no limit.

    Attributes:
        inputs, outputs: of the model, without the states. states: the records of these. kernels: "native", "functions"
        or "standard". batch: how many sequences it runs. steps: how many steps were fed since the start.

    Raises:
        InputError: no such file, or a model without states.
        CorruptFileError: the file is damaged or unsafe, or its metadata and its graph differ.
        BackendError: ONNX Runtime is missing or does not load the graph.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        library: bool = True,
        threads: int | None = None,
        time_limit: float | None = None,
    ):
        self.path = os.fspath(path)
        backend = OrtBackend(Ort(threads=threads, prepack=True), library=library)
        backend.time_limit = check_time_limit(time_limit)
        content, weights = read_model(self.path)
        self._session = backend.session(content, weights, Path(self.path).name + EXTERNAL, self.path)
        self.kernels = self._session.kernels
        inputs, outputs, metadata = self._session.described()
        if STATES_KEY not in metadata:
            raise InputError(
                f"a model without states (no {STATES_KEY} in its metadata)",
                fix="export it with states=True, or hcmen-export-mamba --states",
                where=self.path,
            )
        self.states = states_from_json(metadata[STATES_KEY], self.path)
        self.inputs = self._without_states(inputs, {s.name: s for s in self.states}, "input")
        self.outputs = self._without_states(outputs, {s.output: s for s in self.states}, "output")
        self.batch, self.steps = 1, 0
        self._values: Mapping[str, NDArray[np.float32]] = {}
        self.reset()

    def _without_states(
        self, found: Sequence[TensorSpec], states: Mapping[str, StateRecord], what: str
    ) -> tuple[TensorSpec, ...]:
        """The tensors that are the model's own; the others must be what the metadata say of them."""
        by_name = {t.name: t for t in found}
        for name, state in states.items():
            t = by_name.get(name)
            sizes = () if t is None else t.shape[1:]
            fits = t is not None and t.dtype == "float32" and len(t.shape) == len(state.shape) + 1
            # ONNX Runtime may not know the shape of an output, and what a run gives is held to the record.
            if t is None or (what == "input" and not (fits and sizes == state.shape)):
                got = "is not there" if t is None else f"is {t.dtype} {list(t.shape)}"
                raise CorruptFileError(
                    f"{what} '{name}' {got}",
                    f"float32 {['batch', *state.shape]} as {STATES_KEY} says",
                    "export the model again",
                    where=self.path,
                )
        own = tuple(t for t in found if t.name not in states)
        for t in own if what == "input" else ():
            if len(t.shape) < 2:
                raise CorruptFileError(
                    f"input '{t.name}' has shape {list(t.shape)}", "[batch, time, ...]", where=self.path
                )
        return own

    # --- running ----------------------------------------------------------------------------------------------------

    def feed(self, **inputs: Any) -> dict[str, NDArray[Any]]:
        """The model's outputs for the next steps; its states are afterwards those after the last of them.

        Args:
            inputs: name -> array `[batch, time, ...]` of the input's own dtype, or numbers that make one. All have the
                same number of steps, at least one.

        Raises:
            InputError: a name, dtype, shape or batch that does not fit. The states are as they were.
            BackendError: ONNX Runtime could not run it. The states are as they were.
        """
        values, steps = self._checked(inputs)
        found = self._session.run({**values, **self._values})
        after = {}
        for state in self.states:
            x = after[state.name] = found.pop(state.output)
            if not isinstance(x, np.ndarray) or x.dtype != np.float32 or x.shape != (self.batch, *state.shape):
                kind = f"{x.dtype} {list(x.shape)}" if isinstance(x, np.ndarray) else type(x).__name__
                raise CorruptFileError(
                    f"state '{state.output}' came as {kind}",
                    f"float32 {[self.batch, *state.shape]}",
                    "export the model again",
                    where=self.path,
                )
        self._values = after
        self.steps += steps
        return found

    def _checked(self, inputs: Mapping[str, Any]) -> tuple[dict[str, NDArray[Any]], int]:
        """The inputs as arrays, and how many steps they have."""
        names = [t.name for t in self.inputs]
        if inputs.keys() != set(names):
            unknown = sorted(inputs.keys() - set(names))
            what = f"unknown input '{unknown[0]}'" if unknown else f"no input '{min(set(names) - inputs.keys())}'"
            near = did_you_mean(unknown[0], names) if unknown else ""
            raise InputError(what, ", ".join(names), near or None, where=self.path)
        values: dict[str, NDArray[Any]] = {}
        steps = None
        for t in self.inputs:
            x = self._array(t, inputs[t.name])
            if x.shape[0] != self.batch:
                raise InputError(
                    f"input '{t.name}' has batch {x.shape[0]}",
                    f"{self.batch}, that of the states",
                    f"begin anew with reset(batch={x.shape[0]})",
                    where=self.path,
                )
            if x.shape[1] < 1 or x.shape[1] != (x.shape[1] if steps is None else steps):
                expected = "at least 1" if steps is None else f"{steps} as '{self.inputs[0].name}'"
                raise InputError(f"input '{t.name}' has {x.shape[1]} steps", expected, where=self.path)
            steps = x.shape[1]
            values[t.name] = x
        return values, steps or 0

    def _array(self, t: TensorSpec, given: Any) -> NDArray[Any]:
        try:
            x = np.asarray(given)
        except ValueError as error:
            raise InputError(f"input '{t.name}' is no array ({reason_of(error)})", where=self.path) from None
        if not isinstance(given, np.ndarray) and x.dtype.kind in ("f" if t.dtype.startswith("float") else "i"):
            x = x.astype(t.dtype)  # numbers of Python have no size
        if x.dtype != t.dtype:
            raise InputError(
                f"input '{t.name}' is {x.dtype}", t.dtype, f"convert it with .astype('{t.dtype}')", where=self.path
            )
        sizes = t.shape[2:]
        fits = x.ndim == len(t.shape) and all(
            not isinstance(n, int) or n == m for n, m in zip(sizes, x.shape[2:], strict=True)
        )
        if not fits:
            raise InputError(
                f"input '{t.name}' has shape {list(x.shape)}",
                f"[{', '.join(map(str, ('batch', 'time', *sizes)))}]",
                where=self.path,
            )
        return np.ascontiguousarray(x)

    # --- states -----------------------------------------------------------------------------------------------------

    def reset(self, batch: int = 1) -> None:
        """Begins anew, with `batch` sequences and states of zeros.

        Raises:
            InputError: a batch below 1, or one whose states have no room in memory.
        """
        if isinstance(batch, bool) or not isinstance(batch, (int, np.integer)) or batch < 1:
            raise InputError(f"batch is {batch!r:.40}", "a whole number of 1 or more")
        try:
            zeros = {s.name: np.zeros((int(batch), *s.shape), np.float32) for s in self.states}
        except (MemoryError, ValueError):
            raise InputError(f"the states of a batch of {batch} have no room in memory", "a smaller one") from None
        self._hold(zeros, 0)

    def _hold(self, arrays: Mapping[str, NDArray[np.float32]], steps: int) -> None:
        self._values = arrays
        self.batch = len(next(iter(arrays.values())))
        self.steps = steps

    @property
    def state(self) -> dict[str, NDArray[np.float32]]:
        """A copy of every state by name, float32 `[batch, ...]`."""
        return {name: x.copy() for name, x in self._values.items()}

    @state.setter
    def state(self, arrays: Mapping[str, Any]) -> None:
        """Goes on from a copy of these; their batch is the new one. Raises InputError where they do not fit."""
        self._hold(self._fitting(arrays, "state"), self.steps)

    def _fitting(self, arrays: Mapping[str, Any], where: str) -> dict[str, NDArray[np.float32]]:
        wrong = sorted(set(arrays) ^ {s.name for s in self.states})
        if wrong:
            known = wrong[0] in {s.name for s in self.states}
            raise InputError(
                f"'{wrong[0]}' is {'missing' if known else 'no state'}", "the states of this model", where=where
            )
        batches: set[int] = set()
        for s in self.states:
            x = arrays[s.name]
            expected = f"float32 {['batch', *s.shape]}, one batch for all"
            if not isinstance(x, np.ndarray) or x.dtype != np.float32:
                kind = x.dtype if isinstance(x, np.ndarray) else type(x).__name__
                raise InputError(f"'{s.name}' is {kind}", expected, where=where)
            batches.add(len(x) if x.ndim else 0)
            if x.ndim != len(s.shape) + 1 or x.shape[1:] != s.shape or len(batches) > 1 or not len(x):
                raise InputError(f"'{s.name}' has shape {list(x.shape)}", expected, where=where)
        return {s.name: np.array(arrays[s.name], np.float32, order="C") for s in self.states}

    def snapshot(self) -> Snapshot:
        """The states as they are now, to come back to by `restore`."""
        return Snapshot(self.batch, self.steps, self._session, self._values)

    def restore(self, snapshot: Snapshot) -> None:
        """Goes on from where `snapshot` was made; raises InputError for that of another model."""
        if not isinstance(snapshot, Snapshot) or snapshot._session is not self._session:
            what = "of another model" if isinstance(snapshot, Snapshot) else f"of type {type(snapshot).__name__}"
            raise InputError(f"a snapshot {what}", "one of this stepper or a clone of it", where=self.path)
        self._values, self.batch, self.steps = snapshot._values, snapshot.batch, snapshot.steps

    def clone(self) -> Stepper:
        """Another stepper, in the same state, that shares the session: for another thread, or another branch."""
        other = object.__new__(Stepper)
        other.__dict__.update(self.__dict__)
        return other

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the states to an .npz file, whole or not at all; raises InputError where that cannot be done."""
        with refused(path, "a place to write to"), writing_file(path) as file:
            np.savez(file, **self.state)  # type: ignore[arg-type,unused-ignore]

    def load(self, path: str | os.PathLike[str]) -> None:
        """Goes on from the states that `save` wrote; their batch is the new one. The file may be anybody's.

        Names and shapes are held to this model's. That its weights are those of the states is for the caller to know.

        Raises:
            InputError: no such file, or the states of another model.
            CorruptFileError: it is damaged or not as `save` writes it.
        """
        name = os.fspath(path)
        with refused(name, "an .npz file of states"), open_regular(name) as file:
            try:
                with zipfile.ZipFile(file) as archive:
                    arrays = _arrays(archive, os.fstat(file.fileno()).st_size)
            except _ZIP_ERRORS as error:
                raise CorruptFileError(
                    f"damaged or no file of states ({reason_of(error)})", fix="save them again", where=name
                ) from error
        self._hold(self._fitting(arrays, name), 0)


def _arrays(archive: zipfile.ZipFile, size: int) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file of `size` bytes. Nothing in it is compressed, so that they are no larger than it."""
    arrays: dict[str, NDArray[Any]] = {}
    if sum(member.file_size for member in archive.infolist()) > size:
        raise ValueError("its members are larger than it is")
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if name in arrays or name == member.filename or member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"member {member.filename[:100]!r}")
        with archive.open(member) as stream:
            header = read_npy_header(stream)
        if member.file_size != header.offset + header.nbytes:
            raise ValueError(f"size of {name[:100]!r}")
        arrays[name] = header.array(archive.read(member))
    return arrays


def read_model(path: str) -> tuple[bytes, NDArray[np.uint8]]:
    """The content of a model, and that of the file beside it that its weights may lie in.

    Raises:
        InputError: a file that cannot be read, or a model of more than 2 GiB.
    """
    with refused(path, "an .onnx file of at most 2 GiB"):
        content = read_small(path, _MOST_BYTES)
    try:
        with open_regular(path + EXTERNAL) as file:
            weights: NDArray[np.uint8] = np.fromfile(file, np.uint8)
    except FileNotFoundError:
        weights = np.zeros(0, np.uint8)
    except OSError as error:
        raise InputError(reason_of(error), "a file of weights", where=path + EXTERNAL) from error
    return content, weights
