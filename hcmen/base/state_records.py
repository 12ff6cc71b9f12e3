"""The states of a graph that runs step by step, as the metadata of its .onnx file tells them.

A graph with states takes the inputs of its model, `[batch, time, ...]`, and one input for each state, and gives the
model's outputs and the same states after the last step. Its `metadata_props` hold a JSON text under `STATES_KEY`:

    {"version": 1, "states": [{"input": "layers.0.mixer.conv", "output": "layers.0.mixer.conv.next", "kind": "conv",
                               "shape": ["batch", 3, 256], "dtype": "float32"}, ...]}

so that a runtime can pair them. What stands in a file is not trusted: `states_from_json` checks all of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hcmen.base.errors import CorruptFileError, shown

__all__ = ["BATCH", "KINDS", "NEXT", "STATES_KEY", "StateRecord", "states_from_json", "states_to_json"]

STATES_KEY = "hcmen.states"
"""The key of the JSON text among the metadata of a model."""
NEXT = ".next"
"""What the name of a state's output has behind that of its input."""
BATCH = "batch"
KINDS = {"conv": 2, "scan": 2, "dual": 3}
"""kind -> sizes of a state besides the batch. conv: [batch, width - 1, channel], scan: [batch, channel, state],
dual: [batch, head, head_dim, state]."""

_VERSION = 1
_MOST_BYTES = 4 << 20
_MOST_STATES = 10_000
_MOST_SIZE = 1 << 31
_FIELDS = ("input", "output", "kind", "shape", "dtype")


@dataclass(frozen=True)
class StateRecord:
    """A state of a graph, float32 and zero before the first step. name: of its input. shape: without the batch."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def output(self) -> str:
        """The name of its output."""
        return self.name + NEXT


def states_to_json(states: Sequence[StateRecord]) -> str:
    """What `states_from_json` reads."""
    rows = [
        {"input": s.name, "output": s.output, "kind": s.kind, "shape": [BATCH, *s.shape], "dtype": "float32"}
        for s in states
    ]
    return json.dumps({"version": _VERSION, "states": rows})


def states_from_json(text: str, where: str) -> tuple[StateRecord, ...]:
    """The states that a file tells of.

    Args:
        text: the JSON text. where: what to call the file in messages.

    Raises:
        CorruptFileError: it is not what `states_to_json` writes.
    """

    def no(what: str) -> CorruptFileError:
        return CorruptFileError(f"{STATES_KEY} {what}", fix="export the model again", where=where)

    if len(text) > _MOST_BYTES:
        raise no(f"is {len(text)} characters long, expected at most {_MOST_BYTES}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise no("is no JSON text") from None
    if not isinstance(found, dict) or found.get("version") != _VERSION or isinstance(found["version"], bool):
        version = found.get("version") if isinstance(found, dict) else found
        raise no(f"has version {shown(version)}, expected {_VERSION}")
    rows = found.get("states")
    if not isinstance(rows, list) or not 1 <= len(rows) <= _MOST_STATES:
        raise no(f"has no list of 1 to {_MOST_STATES} states")
    states = []
    for i, row in enumerate(rows):
        problem = _problem(row)
        if problem:
            raise no(f"is wrong in state {i}: {problem}")
        states.append(StateRecord(row["input"], row["kind"], tuple(row["shape"][1:])))
    if len({s.name for s in states} | {s.output for s in states}) != 2 * len(states):
        raise no("has one name for two states")
    return tuple(states)


def _problem(row: Any) -> str | None:
    """What is wrong with the entry of a state; None if nothing is."""
    if not isinstance(row, dict) or set(row) != set(_FIELDS):
        return f"expected {', '.join(_FIELDS)}"
    for name in ("input", "output", "kind", "dtype"):
        if not isinstance(row[name], str):
            return f"{name} is {shown(row[name])}, expected a text"
    if not row["input"] or row["output"] != row["input"] + NEXT:
        return f"output is {shown(row['output'])}, expected {shown(row['input'] + NEXT)}"
    if row["kind"] not in KINDS:
        return f"kind is {shown(row['kind'])}, expected one of {', '.join(KINDS)}"
    if row["dtype"] != "float32":
        return f"dtype is {shown(row['dtype'])}, expected float32"
    shape, sizes = row["shape"], KINDS[row["kind"]]
    fits = isinstance(shape, list) and len(shape) == sizes + 1 and shape[0] == BATCH
    if not fits or not all(type(n) is int and 1 <= n < _MOST_SIZE for n in shape[1:]):
        return f"shape is {shown(shape)}, expected '{BATCH}' and {sizes} sizes"
    total = 1
    for n in shape[1:]:
        total *= n
    return None if total < _MOST_SIZE else f"shape is {shown(shape)}, expected fewer than {_MOST_SIZE} numbers"
