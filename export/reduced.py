"""Bundles of float16 and int8: their graphs, the labelled data that judges them, and what they gain.

A reduced graph is held against the eager float32 model twice: on the golden set, element by element, and on the
validation split of the data, by the task's own measure (`moved`). Both bounds are in docs/parity.md.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from hcmen.base.clip import Clip, batch_clips, graph_inputs
from hcmen.base.console import Console
from hcmen.base.modalities import Variant
from hcmen.data import MultimodalDataset, Split
from hcmen.export.float16 import half_weights
from hcmen.export.int8 import activation_ranges, linear_layers, quantised, weight_key, with_layers_of
from hcmen.runtime.backends import Ort
from hcmen.runtime.backends.ort import OrtBackend, OrtSession

__all__ = [
    "CALIBRATION_CLIPS",
    "MOST_MOVED",
    "TIMED_TURNS",
    "LabelledData",
    "Latency",
    "Reduced",
    "moved",
    "side_by_side",
]

MOST_MOVED = {"fp16": 0.005, "int8": 0.01}
"""precision -> the largest part of itself by which the mean absolute error may move, up or down."""
CALIBRATION_CLIPS = 64
TIMED_TURNS = 31
_BATCH = 16
_WARM_UP = 2

Inputs = dict[str, NDArray[Any]]


class LabelledData:
    """The data that judges a precision: training samples to calibrate with, validation samples to measure on."""

    def __init__(self, dataset: MultimodalDataset):
        self.name = dataset.name
        self.valid = dataset.splits["valid"]
        train = dataset.splits["train"]
        count = min(CALIBRATION_CLIPS, len(train))
        self._train, self._chosen = train, np.unique(np.linspace(0, len(train) - 1, count).astype(np.int64))

    def calibration(self, variant: Variant) -> Iterator[Inputs]:
        """Graph inputs of training samples, evenly chosen: whole, then cut to random lengths.

        A device sees clips of any length, and what short ones make of the scans is not in the range of the whole.
        """
        yield from _batches(self._train, self._chosen, variant)
        yield from _batches(self._train, self._chosen, variant, np.random.default_rng(0))

    def validation(self, variant: Variant) -> Iterator[Inputs]:
        """Graph inputs of all validation samples, in order."""
        return _batches(self.valid, np.arange(len(self.valid)), variant)


def _batches(
    split: Split, rows: NDArray[np.int64], variant: Variant, cut: np.random.Generator | None = None
) -> Iterator[Inputs]:
    """Padded batches of the samples `rows`; with `cut` each sample is a random prefix of itself."""
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        lengths = {m: split.lengths[m][part] for m in variant.present}
        if cut is not None:
            lengths = {m: cut.integers(1, n + 1) for m, n in lengths.items()}
        features = {m: split.model_input(m, part, int(n.max())) for m, n in lengths.items()}
        for m, x in features.items():
            time = x if x.dtype != np.int64 else np.moveaxis(x, 2, 1)  # a view with time second, tokens have it last
            for row, n in zip(time, lengths[m], strict=True):
                row[n:] = 0
        yield graph_inputs(features, lengths)


def moved(
    labels: NDArray[Any], eager: NDArray[Any], got: NDArray[Any], precision: str, data: str = ""
) -> dict[str, Any]:
    """What a precision does to the mean absolute error on labelled samples, as the manifest records it.

    Args:
        labels, eager, got: [samples]: the truth, the eager model's scores, those of the graph.
        precision: "fp16" or "int8". data: what the samples are called.
    """
    bound = MOST_MOVED[precision]
    nan = int(np.count_nonzero(~np.isfinite(got)))
    before, after = (float(np.abs(scores.astype(np.float64) - labels).mean()) for scores in (eager, got))
    change = None if nan else (after - before) / before if before else float(after > 0)
    return {
        "metric": "mae",
        "data": data,
        "split": "valid",
        "clips": len(labels),
        "eager": before,
        "got": None if nan else after,
        "change": change,
        "bound": bound,
        "max_abs": None if nan else float(np.abs(got.astype(np.float64) - eager).max()),
        "nan": nan,
        "passed": change is not None and abs(change) <= bound,
    }


class Reduced:
    """The graphs of one precision, made from float32 ones that stay as they are.

    Args:
        model: whose graphs they are; its parameters give the layers their names.
        graphs: float32 graph by variant, weights inside. precision: "fp16" or "int8".
        data: calibrates int8.

    Raises:
        InputError: a weight is beyond float16.
        CheckFailed: an activation is NaN or infinite on the calibration clips.
    """

    def __init__(
        self,
        model: Any,
        graphs: Mapping[Variant, ModelProto],
        precision: str,
        data: LabelledData,
        console: Console,
    ):
        self.precision = precision
        self._float, self._data, self._console = graphs, data, console
        self._names = _layer_names(model)
        self._made: dict[Variant, ModelProto] = {}
        self._keys: dict[Variant, list[str]] = {}
        for i, (variant, graph) in enumerate(graphs.items(), 1):
            if precision == "fp16":
                self._made[variant], self._keys[variant] = half_weights(graph), []
                continue
            console.note(f"[{i}/{len(graphs)}] calibrating and quantising {variant.name}")
            ranges = activation_ranges(graph, data.calibration(variant))
            self._made[variant], self._keys[variant] = quantised(graph, ranges)

    def graphs(self, keep: Collection[str] = ()) -> dict[str, ModelProto]:
        """New graphs by variant's name; the linear layers of the weights `keep`, by `weight_key`, in float."""
        return {variant.name: with_layers_of(made, self._float[variant], keep) for variant, made in self._made.items()}

    def layers(self, variant: Variant, keep: Collection[str] = ()) -> dict[str, list[str]]:
        """Which weights of `variant` are int8, and which are not though they could be, by the model's names."""
        chosen: dict[str, list[str]] = {"quantised": [], "kept_in_float": []}
        for key, fallback in zip(self._keys[variant], self._node_names(variant), strict=True):
            chosen["kept_in_float" if key in keep else "quantised"].append(self._names.get(key, fallback))
        return chosen

    def _node_names(self, variant: Variant) -> list[str]:
        """What to call each of `_keys` if the model has no parameter of its values."""
        weights = {t.name: t for t in self._float[variant].graph.initializer}
        names = {weight_key(numpy_helper.to_array(t)): name for name, t in weights.items()}
        return [names[key] for key in self._keys[variant]]

    def by_sensitivity(self, variant: Variant) -> list[str]:
        """The weights of the linear layers of `variant`, by `weight_key`, that which moves scores most first.

        Each is measured alone: the root mean square change of the calibration clips' scores when only it is int8.
        """
        graph, backend = self._float[variant], OrtBackend(Ort(prepack=True))
        expected = _scores(_session(backend, graph), self._data.calibration(variant))
        weights = {t.name: t for t in graph.graph.initializer}
        keys = [weight_key(numpy_helper.to_array(weights[w])) for w in dict.fromkeys(linear_layers(graph).values())]
        change = {}
        with self._console.progress("sensitivity", len(keys), "layers") as bar:
            for key in keys:
                alone = with_layers_of(self._made[variant], graph, set(keys) - {key})
                got = _scores(_session(backend, alone), self._data.calibration(variant))
                change[key] = float(np.sqrt(np.mean((got - expected) ** 2)))
                bar.advance()
        return sorted(keys, key=lambda key: -change[key])


def _layer_names(model: Any) -> dict[str, str]:
    """{weight_key: name} of the model's weights in the forms that a graph has them in.

    Matrices as they are and transposed, as a product takes them; halved, as the model takes `out_proj`; and the two
    halves of their rows, as it takes `in_proj`, under names like `in_proj[:128]`.
    """
    names: dict[str, str] = {}
    for full_name, parameter in model.named_parameters():
        name, values = full_name.removesuffix(".weight"), parameter.detach().numpy()
        if parameter.dim() == 3:
            names[weight_key(values)] = name
        elif parameter.dim() == 2:
            half = len(values) // 2
            forms = {name: (values, values.T, np.float32(0.5) * values.T)}
            forms |= {f"{name}[:{half}]": (values[:half].T,), f"{name}[{half}:]": (values[half:].T,)}
            for called, arrays in forms.items():
                for form in arrays:
                    names.setdefault(weight_key(form), called)
    return names


def _session(backend: OrtBackend, model: ModelProto) -> OrtSession:
    return backend.session(model.SerializeToString(), np.zeros(0, np.uint8), "weights.bin", model.graph.name)


def _scores(session: OrtSession, batches: Iterator[Inputs]) -> NDArray[np.float64]:
    return np.concatenate([session.run(inputs)["score"] for inputs in batches]).astype(np.float64)


@dataclass(frozen=True)
class Latency:
    """A graph's calls beside those of another graph, in turns.

    seconds, other: medians. ratio: the median of seconds over other, turn by turn. slower: by more than 2 % in
    three turns of four, which two graphs of one speed are not, even on a machine that is busy with other things.
    """

    seconds: float
    other: float
    ratio: float
    slower: bool


def side_by_side(
    graph: ModelProto,
    other: ModelProto,
    clip: Clip,
    variant: Variant,
    turns: int = TIMED_TURNS,
) -> Latency:
    """Times `graph` beside `other`, both with their weights inside, on one clip; they take turns in this process.

    What is counted is the processor time of the one thread that runs them: on a busy machine the clock counts whoever
    else had the core, in step with the turns at that, and two sessions' threads spin against each other. In a turn each
    runs twice, in the order a b b a, since whoever comes first in all turns is a few percent slower than itself.
    """
    # Packed, both: so int8 runs on a device, and float32 at its best.
    backend = OrtBackend(Ort(threads=1, prepack=True))
    sessions = [_session(backend, model) for model in (graph, other)]
    inputs = batch_clips([clip], variant.present)
    seconds = np.zeros((2, turns + _WARM_UP))
    for turn in range(turns + _WARM_UP):
        for which in (0, 1, 1, 0):
            started = time.thread_time()
            sessions[which].run(inputs)
            seconds[which, turn] += (time.thread_time() - started) / 2
    own, its = seconds[:, _WARM_UP:]
    ratio = own / its
    return Latency(
        float(np.median(own)), float(np.median(its)), float(np.median(ratio)), bool(np.quantile(ratio, 0.25) > 1.02)
    )
