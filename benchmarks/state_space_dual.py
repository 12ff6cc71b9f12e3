"""The state space dual on one thread of ONNX Runtime, beside what else there runs Mamba-2.

    python benchmarks/state_space_dual.py --out docs/results/state_space_dual.json

Beside it: ONNX Runtime's own kernel for the same recurrence (com.microsoft::LinearAttention, update_rule "gated"),
which is given decays and driven inputs ready made, and the model-local functions of this package. Each pair of nodes
must give the same numbers first. LinearAttention takes B and C for each group or repeated for each head; the faster of
the two counts.

All run in one process, in turns. Times are those of the processor on the calling thread, since other work on the
machine lengthens the clock's. What other work does to the caches lengthens these too, so the least of many rounds is
given beside the median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from kernels import interleave, summary
from machine import describe
from onnx import ModelProto, TensorProto, helper

from hcmen.base.files import write_file
from hcmen.base.library import library_isa, library_path
from hcmen.base.op import IR_VERSION, OPSET
from hcmen.mamba.functions import add_functions
from hcmen.mamba.one_node import dual_model

__all__ = ["main"]

Call = Callable[[], Any]
WARM_SECONDS = 2e-3
"""Brief calls are repeated so long, one after the other: each kernel finds its own states in the cache."""


@dataclass(frozen=True)
class Size:
    head: int
    head_dim: int
    state: int
    group: int
    time: int

    @property
    def stateful(self) -> bool:
        return self.time == 1


SIZES = [
    Size(24, 64, 128, 1, 512),
    Size(24, 64, 64, 8, 512),
    Size(8, 64, 64, 8, 512),
    Size(4, 64, 128, 1, 512),
    Size(24, 64, 128, 1, 1),
]


def inputs_of(size: Size) -> dict[str, np.ndarray]:
    """As real models have them: steps of softplus(N(-4, 1)), decay rates from -1 to -16."""
    rng = np.random.default_rng(0)
    series = (1, size.time, size.head)
    projection = (1, size.time, size.group, size.state)
    arrays = {
        "x": rng.normal(size=(*series, size.head_dim)),
        "dt": rng.normal(-4.0, 1.0, series),
        "A": -rng.uniform(1.0, 16.0, size.head),
        "B": rng.normal(size=projection),
        "C": rng.normal(size=projection),
        "D": np.zeros(size.head),
        "dt_bias": np.zeros(size.head),
    }
    if size.stateful:
        arrays["initial_state"] = rng.normal(size=(1, size.head, size.head_dim, size.state))
    return {name: np.ascontiguousarray(x, np.float32) for name, x in arrays.items()}


def session(model: ModelProto, *, library: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if library:
        options.register_custom_ops_library(str(library_path()))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def linear_attention(size: Size, heads: int) -> ModelProto:
    """B and C for so many heads."""

    def value(name: str, shape: list[Any] | None) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    state = "past_state" if size.stateful else ""
    node = helper.make_node(
        "LinearAttention",
        ["query", "key", "value", state, "decay"],
        ["output", "present_state"],
        domain="com.microsoft",
        q_num_heads=heads,
        kv_num_heads=size.head,
        update_rule="gated",
        scale=1.0,
    )
    projection = [1, size.time, heads * size.state]
    given = [
        value("query", projection),
        value("key", projection),
        value("value", [1, size.time, size.head * size.head_dim]),
        value("decay", [1, size.time, size.head]),
        *([value(state, [1, size.head, size.state, size.head_dim])] if state else []),
    ]
    graph = helper.make_graph([node], "linear_attention", given, [value("output", None), value("present_state", None)])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


def attention_inputs(size: Size, arrays: dict[str, np.ndarray], heads: int) -> dict[str, np.ndarray]:
    """What the same recurrence is for LinearAttention."""
    step = np.logaddexp(0.0, arrays["dt"].astype(np.float64)).astype(np.float32)
    series = (1, size.time, -1)

    def repeated(x: np.ndarray) -> np.ndarray:
        return np.repeat(x, heads // size.group, axis=2).reshape(series)

    feeds = {
        "query": repeated(arrays["C"]),
        "key": repeated(arrays["B"]),
        "value": (arrays["x"] * step[..., None]).reshape(series),
        "decay": step * arrays["A"],
    }
    if size.stateful:
        feeds["past_state"] = arrays["initial_state"].swapaxes(2, 3)
    return {name: np.ascontiguousarray(x) for name, x in feeds.items()}


def calls_of(size: Size) -> tuple[dict[str, Call], dict[str, float]]:
    """What is measured, and how far the first output of each is from that of the kernel, of its largest value."""
    arrays = inputs_of(size)
    calls: dict[str, Call] = {}
    outputs: dict[str, np.ndarray] = {}

    def add(name: str, running: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> None:
        found = running.run(None, feeds)
        outputs[name] = found[0].reshape(arrays["x"].shape)
        # In the same memory at each call: Python's own copies would count, too.
        binding = running.io_binding()
        for key, x in feeds.items():
            binding.bind_ortvalue_input(key, ort.OrtValue.ortvalue_from_numpy(x))
        for output, x in zip(running.get_outputs(), found, strict=True):
            binding.bind_ortvalue_output(output.name, ort.OrtValue.ortvalue_from_numpy(x))
        calls[name] = lambda: running.run_with_iobinding(binding)

    def model() -> ModelProto:
        given: dict[str, Any] = {"group": size.group, "delta_softplus": True, "stateful": size.stateful}
        return dual_model(size.head, size.head_dim, size.state, **given, functions=False)

    add("kernel", session(model(), library=True), arrays)
    for heads in dict.fromkeys((size.head, size.group)):
        running = session(linear_attention(size, heads), library=False)
        add(f"linear attention, B and C of {heads}", running, attention_inputs(size, arrays, heads))
    for body in ("scan", "blocks"):
        add(f"function, {body}", session(add_functions(model(), body), library=False), arrays)
    largest = float(np.abs(outputs["kernel"]).max())
    apart = {name: float(np.abs(y - outputs["kernel"]).max()) / largest for name, y in outputs.items()}
    worst = max(apart.values())
    if not worst <= 1e-5:
        raise SystemExit(f"{size}: the nodes differ by {worst:.1e} of the largest output, expected 1e-5 or less")
    return calls, apart


def measured(size: Size, rounds: int) -> dict[str, Any]:
    calls, apart = calls_of(size)
    slow = {name for name in calls if name.startswith("function")}
    times = interleave(
        {name: call for name, call in calls.items() if name not in slow},
        rounds,
        least=WARM_SECONDS,
        clock=time.thread_time,
    )
    times |= interleave({name: calls[name] for name in slow}, max(5, rounds // 40), least=0.0, clock=time.thread_time)
    peers = [name for name in times if name.startswith("linear")]
    best = min(peers, key=lambda name: min(times[name]))
    updates = size.head * size.head_dim * size.state * size.time
    pairs = zip(times[best], times["kernel"], strict=True)
    return {
        **size.__dict__,
        "differ": apart,
        **{name: summary(values) for name, values in times.items()},
        "updates_per_ns": updates / min(times["kernel"]) / 1e9,
        "faster_than_linear_attention": {
            "by_least": min(times[best]) / min(times["kernel"]),
            "by_median_of_pairs": statistics.median(peer / own for peer, own in pairs),
        },
        "faster_than_scan_by_least": min(times["function, scan"]) / min(times["kernel"]),
    }


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    found = {
        **describe(),
        "onnxruntime": ort.__version__,
        "instruction_set": library_isa(),
        "threads": 1,
        "clock": "processor time of the calling thread",
        "load_average": Path("/proc/loadavg").read_text(encoding="utf-8").split()[:3],
        "sizes": [],
    }
    for size in SIZES:
        one = measured(size, arguments.rounds)
        found["sizes"].append(one)
        print(size, {k: v for k, v in one.items() if k.startswith("faster")}, file=sys.stderr)
    write_file(arguments.out, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
